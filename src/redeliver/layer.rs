//! [`RedeliverLayer`].

use std::sync::Arc;
use std::time::Duration;

use tower_layer::Layer;

use super::Redeliver;
use super::policy::{Again, Policy};
use crate::broker::HoldSteps;
use crate::{Backoff, Failure};

/// [`Layer`] that applies [`Redeliver`]. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct RedeliverLayer {
    policy: Policy,
}

impl RedeliverLayer {
    /// Transient failures come again after the default backoff: 1 s × 4 up to 5 min, full jitter.
    pub const fn new() -> Self {
        Self { policy: Policy { backoff: Backoff::attempts(), own: None, longest: None, steps: None } }
    }

    /// The delays between attempts.
    #[must_use]
    pub const fn with_backoff(mut self, backoff: Backoff) -> Self {
        self.policy.backoff = backoff;
        self
    }

    /// Asks this function first: it is given the failure of a transient class and the attempt, from 1, and can look
    /// at the [cause](Failure::cause) and the [error](Failure::error)'s type. How many attempts there are at most is
    /// dedup's to say, however long the delay is; see [`Again::After`] for stores that keep a record for so long only.
    #[must_use]
    pub fn with_policy(mut self, policy: impl Fn(&Failure, u32) -> Again + Send + Sync + 'static) -> Self {
        self.policy.own = Some(Arc::new(policy));
        self
    }

    /// No delay that a policy or a handler asks for is longer than this: the store could not keep the record meanwhile.
    #[must_use]
    pub(crate) const fn with_longest(mut self, longest: Option<Duration>) -> Self {
        self.policy.longest = longest;
        self
    }

    /// The delays that the broker keeps in one hop, see [`Broker::hold_steps`](crate::broker::Broker::hold_steps):
    /// a delay drawn at random becomes one of them.
    #[must_use]
    pub fn with_steps(mut self, steps: Option<HoldSteps>) -> Self {
        self.policy.steps = steps;
        self
    }
}

impl Default for RedeliverLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for RedeliverLayer {
    type Service = Redeliver<S>;

    fn layer(&self, inner: S) -> Redeliver<S> {
        Redeliver::new(inner, Arc::new(self.policy.clone()))
    }
}
