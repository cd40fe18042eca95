//! Faults that a test switches on.

use std::collections::VecDeque;
use std::iter::repeat_n;
use std::sync::Mutex;

use super::lock;

/// How publishing a copy fails, see [`MemoryBroker::fail_publishes`](super::MemoryBroker::fail_publishes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PublishFault {
    /// The copy finds no place: `NotRouted`.
    NotRouted,
    /// The broker says no, as a full queue does: `Nacked`.
    Nacked,
    /// The broker takes no copy as large as this: `TooLarge`.
    TooLarge,
    /// The copy is lost on its way to the broker: `Unknown`.
    LostCopy,
    /// The copy is there, its confirmation is lost: `Unknown`.
    LostConfirm,
}

/// The faults that are to come, first to last.
#[derive(Default)]
pub(super) struct Faults {
    publishes: Mutex<VecDeque<PublishFault>>,
}

impl Faults {
    pub(super) fn fail_publishes(&self, times: usize, fault: PublishFault) {
        lock(&self.publishes).extend(repeat_n(fault, times));
    }

    /// The fault of this publish, if it is to have one.
    pub(super) fn next_publish(&self) -> Option<PublishFault> {
        lock(&self.publishes).pop_front()
    }
}
