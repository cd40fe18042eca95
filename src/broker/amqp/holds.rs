//! The hold queues of one subscription: where delayed deliveries go meanwhile.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::publish::Publisher;
use super::topology;
use crate::broker::{BrokerError, BrokerErrorKind, Copy, QueueSpec};

/// Publishes copies to the hold queue of their delay.
pub(super) struct Holds {
    publisher: Arc<Publisher>,
    queue: QueueSpec,
    /// The steps whose queues are there. The shortest is from the start on: see `topology::prepare`.
    ready: Mutex<HashSet<Duration>>,
}

impl Holds {
    pub(super) fn new(publisher: Arc<Publisher>, queue: &QueueSpec) -> Self {
        let ready = Mutex::new(HashSet::from([queue.holds.shortest()]));
        Self { publisher, queue: queue.clone(), ready }
    }

    /// Ends when the copy is confirmed, and in a queue. Without a queue for the step it takes the shortest one: more
    /// hops, nothing lost.
    pub(super) async fn publish(&self, copy: &Copy<'_>, delay: Duration) -> Result<(), BrokerError> {
        let step = self.queue.holds.hop(delay);
        if let Err(error) = self.make(step).await {
            let shortest = self.queue.holds.shortest();
            tracing::warn!(
                target: "guestlist", queue = self.queue.name, ?step, ?error,
                "there is no hold queue for this step: messages go round by the shortest one, {shortest:?}"
            );
            // It may have been deleted meanwhile, too.
            if step != shortest {
                self.make(shortest).await?;
            }
            return self.put(copy, shortest).await;
        }
        self.put(copy, step).await
    }

    async fn put(&self, copy: &Copy<'_>, step: Duration) -> Result<(), BrokerError> {
        let name = topology::hold_queue(&self.queue, step)?;
        let put = self.publisher.publish(name.as_str(), copy, self.queue.confirm).await;
        if put.as_ref().is_err_and(|error| error.kind() == BrokerErrorKind::NotRouted) {
            // Deleted meanwhile: the next copy makes it again.
            self.ready().remove(&step);
        }
        put
    }

    /// Makes the step's queue at its first use.
    async fn make(&self, step: Duration) -> Result<(), BrokerError> {
        if self.ready().contains(&step) {
            return Ok(());
        }
        topology::hold(self.publisher.link(), &self.queue, step).await?;
        self.ready().insert(step);
        Ok(())
    }

    fn ready(&self) -> std::sync::MutexGuard<'_, HashSet<Duration>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
