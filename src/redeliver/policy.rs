//! When a transient failure comes again.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::broker::HoldSteps;
use crate::{Backoff, Failure, FailureClass};

/// What a policy of your own says about a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Again {
    /// As the queue's backoff says.
    Backoff,
    /// After this long. A queue cuts it to half the time for which an id that is not done is remembered (its window,
    /// or its backoff's cap and an hour, whichever is longer): else its attempts would be forgotten meanwhile, and it
    /// would be tried for ever.
    After(Duration),
    /// Never: it is a dead letter now, cause `permanent`.
    Never,
}

/// The policy of one queue.
#[derive(Clone)]
pub(super) struct Policy {
    pub(super) backoff: Backoff,
    pub(super) own: Option<Arc<OwnPolicy>>,
    /// The longest delay of the user's own; none: any.
    pub(super) longest: Option<Duration>,
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
            Again::After(delay) => Some(self.longest.map_or(delay, |longest| delay.min(longest))),
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
            .field("longest", &self.longest)
            .field("steps", &self.steps)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::memory::MemoryBroker;
    use crate::{Consumer, Message, Queue};

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    #[tokio::test(start_paused = true)]
    async fn a_delay_longer_than_an_id_is_kept_does_not_make_the_attempts_endless() {
        let broker = MemoryBroker::new();
        broker.declare("q");
        broker.declare("q.dead");
        broker.send("q", Message::builder("{}").transport_id("1")).unwrap();
        let queue =
            Queue::new("q").dead_letter("q.dead").max_attempts(3).retry_policy(|_, _| Again::After(DAY));
        let queue = queue.handler(async |_: Message| Err("no".into()));
        let parked = async {
            let _ = tokio::time::timeout(DAY * 30, broker.drained("q")).await;
        };
        Consumer::new(broker.clone()).queue(queue).run_until(parked).await.unwrap();
        let dead = broker.messages("q.dead").unwrap();
        assert_eq!(dead.len(), 1, "after a month it is still tried");
    }
}
