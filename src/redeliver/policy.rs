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
    /// After this long. The attempts are counted on, however long it is: the record is kept from the end of the delay.
    /// Only a store that cannot keep records for as long as it likes (a NATS bucket) sets a limit: a
    /// [`Queue`](crate::Queue) cuts the delay to an hour less than the store [keeps](crate::dedup::StoreFeatures::keeps)
    /// records. Else the attempts would be forgotten meanwhile, and it would be tried for ever.
    After(Duration),
    /// Never: it is a dead letter now, cause `permanent`.
    Never,
}

/// The policy of one queue.
#[derive(Clone)]
pub(super) struct Policy {
    pub(super) backoff: Backoff,
    pub(super) own: Option<Arc<OwnPolicy>>,
    /// The longest delay that is not the backoff's; none: any.
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
            Again::After(delay) => Some(self.cut(delay)),
            Again::Never => None,
        }
    }

    /// A deferral that is longer than the store keeps its record would make it forget attempts and suspicion: one
    /// that comes early is deferred again.
    pub(super) fn cut(&self, delay: Duration) -> Duration {
        self.longest.map_or(delay, |longest| delay.min(longest))
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
    async fn a_deferral_for_days_keeps_the_attempts_before_it() {
        let broker = MemoryBroker::new();
        broker.declare("q");
        broker.declare("q.dead");
        broker.send("q", Message::builder("{}").transport_id("1")).unwrap();
        // Every other run defers, and every other one fails: two failures are the last attempt.
        let runs = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let count = Arc::clone(&runs);
        let handler = move |_: Message| {
            let failure = match count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 2 {
                0 => Failure::transient("no"),
                _ => Failure::defer(10 * DAY),
            };
            std::future::ready(Err(failure))
        };
        let queue = Queue::new("q").dead_letter("q.dead").max_attempts(2).handler(handler);
        let parked = async {
            let _ = tokio::time::timeout(DAY * 100, broker.drained("q")).await;
        };
        Consumer::new(broker.clone()).queue(queue).run_until(parked).await.unwrap();
        assert_eq!(broker.messages("q.dead").unwrap().len(), 1, "after a hundred days it is still tried");
        assert_eq!(runs.load(std::sync::atomic::Ordering::Relaxed), 3);
    }

    #[test]
    fn only_a_store_with_a_limit_of_its_own_cuts_a_delay() {
        let own: Arc<OwnPolicy> = Arc::new(|_, _| Again::After(DAY));
        let policy = |longest| Policy {
            backoff: Backoff::attempts(),
            own: Some(Arc::clone(&own)),
            longest,
            steps: None,
        };
        let failed = Failure::transient("no");
        assert_eq!(policy(None).delay(&failed, 1), Some(DAY));
        assert_eq!(policy(Some(DAY / 2)).delay(&failed, 1), Some(DAY / 2));
        assert_eq!((policy(None).cut(DAY), policy(Some(DAY / 2)).cut(DAY)), (DAY, DAY / 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_delay_longer_than_an_id_is_kept_does_not_make_the_attempts_endless() {
        let broker = MemoryBroker::new();
        broker.declare("q");
        broker.declare("q.dead");
        broker.send("q", Message::builder("{}").transport_id("1")).unwrap();
        let began = tokio::time::Instant::now();
        let queue =
            Queue::new("q").dead_letter("q.dead").max_attempts(3).retry_policy(|_, _| Again::After(DAY));
        let queue = queue.handler(async |_: Message| Err("no".into()));
        let parked = async {
            let _ = tokio::time::timeout(DAY * 30, broker.drained("q")).await;
        };
        Consumer::new(broker.clone()).queue(queue).run_until(parked).await.unwrap();
        let dead = broker.messages("q.dead").unwrap();
        assert_eq!(dead.len(), 1, "after a month it is still tried");
        assert!(began.elapsed() >= 2 * DAY, "a delay was cut: {:?}", began.elapsed());
    }
}
