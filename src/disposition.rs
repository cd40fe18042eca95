//! How a delivery ends at the broker ([`Disposition`]) and what became of it ([`Outcome`]).

use std::time::Duration;

use crate::Cause;

/// How a delivery ends at the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Disposition {
    /// Done with: the broker forgets the message.
    Ack,
    /// Tried and failed: the broker delivers the message again after this delay, or a little later.
    Requeue {
        /// The delay.
        after: Duration,
    },
    /// Not tried: as [`Requeue`](Self::Requeue), but nothing failed. Without a delay it is
    /// handed back at once.
    Release {
        /// The delay.
        after: Duration,
    },
    /// Refused: the broker's own policy decides (a dead-letter exchange, or the bin).
    Reject,
    /// Nothing good to say: the broker delivers it again, to whomever, when it likes.
    Abandon,
}

/// What became of a delivery that is done with. `Ok` means done: the delivery is acked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The handler succeeded and its id is remembered.
    Handled,
    /// The handler succeeded, but the store did not confirm that the id is remembered (a
    /// *dedup gap*): a copy may run again.
    HandledUnrecorded,
    /// The handler succeeded without dedup: the message has no id, or the store was away, and
    /// the queue's policy says to go on.
    HandledUnchecked,
    /// The id was done before: the handler did not run.
    Duplicate,
    /// A copy is with the dead letters, confirmed and routed.
    DeadLettered(Cause),
}

impl Outcome {
    /// The name for logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Handled => "handled",
            Self::HandledUnrecorded => "handled_unrecorded",
            Self::HandledUnchecked => "handled_unchecked",
            Self::Duplicate => "duplicate",
            Self::DeadLettered(_) => "dead_lettered",
        }
    }
}
