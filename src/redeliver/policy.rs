//! When a transient failure comes again.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::broker::HoldSteps;
use crate::{Backoff, Failure, FailureClass, defaults};

/// What a policy of your own says about a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Again {
    /// As the queue's backoff says.
    Backoff,
    /// After this long, at most an hour longer than the [longest backoff](Backoff::cap): for so long the attempts
    /// are on record.
    After(Duration),
    /// Never: it is a dead letter now, cause `permanent`.
    Never,
}

/// The policy of one queue.
#[derive(Clone)]
pub(super) struct Policy {
    pub(super) backoff: Backoff,
    pub(super) own: Option<Arc<OwnPolicy>>,
    /// The delays that the broker can keep in one hop; none: all.
    pub(super) steps: Option<HoldSteps>,
}

/// A policy of the user's own.
pub(crate) type OwnPolicy = dyn Fn(&Failure, u32) -> Again + Send + Sync;

impl Policy {
    /// The delay before the attempt after this one; `None`: there is to be none.
    pub(super) fn delay(&self, failure: &Failure, attempt: u32) -> Option<Duration> {
        let own = self.own.as_ref().filter(|_| failure.class() == FailureClass::Transient);
        match own.map_or(Again::Backoff, |own| own(failure, attempt)) {
            Again::Backoff => Some(self.backoff_delay(attempt)),
            Again::After(delay) => Some(delay.min(self.backoff.cap().saturating_add(defaults::BACKOFF_KEPT))),
            Again::Never => None,
        }
    }

    /// A random delay may as well be one that takes a single hop.
    fn backoff_delay(&self, attempt: u32) -> Duration {
        let delay = self.backoff.delay(attempt);
        match &self.steps {
            Some(steps) if self.backoff.has_jitter() => steps.nearby(delay),
            _ => delay,
        }
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("backoff", &self.backoff)
            .field("own", &self.own.is_some())
            .field("steps", &self.steps)
            .finish()
    }
}
