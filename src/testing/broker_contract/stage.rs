//! The stage of a case: a broker, a queue of its own, and waits that end.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::BrokerFixture;
use crate::broker::{Broker, BrokerError, Features, QueueSpec, Subscription};
use crate::{Acker, Delivery, Disposition, Message};

/// What has not happened after this long will not happen.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long nothing has to happen.
const QUIET: Duration = Duration::from_millis(300);
/// How often what cannot wake us is asked for.
pub(super) const POLL: Duration = Duration::from_millis(10);
/// More room than any case needs.
const ROOM: usize = 64;

/// One case's broker and queue.
pub(super) struct Stage<'a> {
    pub(super) fixture: &'a dyn BrokerFixture,
    pub(super) broker: Arc<dyn Broker>,
    pub(super) queue: QueueSpec,
    pub(super) features: Features,
}

impl<'a> Stage<'a> {
    /// A new connection and a queue that is declared.
    pub(super) async fn new(fixture: &'a dyn BrokerFixture, case: &str, prefetch: u16) -> Self {
        let stage = Self::bare(fixture, case, prefetch).await;
        let prepared = stage.broker.prepare(&stage.queue).await;
        prepared.unwrap_or_else(|error| panic!("prepare must declare the queue: {error:?}"));
        stage
    }

    /// A new connection; the queue is not declared.
    pub(super) async fn bare(fixture: &'a dyn BrokerFixture, case: &str, prefetch: u16) -> Self {
        let broker = fixture.connect().await;
        let features = fixture.features(&*broker);
        Self { fixture, broker, queue: fixture.queue(case, prefetch), features }
    }

    pub(super) async fn subscribe(&self) -> Inbox {
        self.subscribe_by(&*self.broker).await
    }

    /// Subscribes over another connection.
    pub(super) async fn subscribe_by(&self, broker: &dyn Broker) -> Inbox {
        match broker.subscribe(&self.queue).await {
            Ok(subscription) => Inbox { subscription, patience: self.patience() },
            Err(error) => panic!("subscribe must work on a queue that was prepared: {error:?}"),
        }
    }

    pub(super) async fn send(&self, id: &str) {
        self.fixture.send(&self.queue, id, &[], b"{}").await;
    }

    /// Sends messages with the ids `0` to `count - 1`.
    pub(super) async fn send_many(&self, count: usize) {
        for id in 0..count {
            self.send(&id.to_string()).await;
        }
    }

    /// Waits until the queue keeps this many messages; nothing may be in hand.
    pub(super) async fn depth_becomes(&self, expected: u64) {
        let begin = Instant::now();
        loop {
            let depth = self.fixture.depth(&self.queue).await;
            if depth == expected {
                return;
            }
            assert!(begin.elapsed() < self.patience(), "the queue keeps {depth} messages, not {expected}");
            sleep(POLL).await;
        }
    }

    /// Closes the connection.
    pub(super) async fn end(self) {
        self.broker.close().await;
    }

    /// How long a wait may take: an abandoned message comes again after the broker's deadline.
    pub(super) fn patience(&self) -> Duration {
        PATIENCE + self.features.ack_deadline.unwrap_or_default()
    }

    /// The broker's step of delay for this queue; zero: exact.
    pub(super) fn delay_step(&self) -> Duration {
        self.features.delay_step.min(self.queue.holds.shortest())
    }
}

/// A subscription that is read with bounded waits.
pub(super) struct Inbox {
    pub(super) subscription: Box<dyn Subscription>,
    patience: Duration,
}

impl Inbox {
    /// Polls for the next delivery, without a bound.
    pub(super) async fn poll(&mut self, room: usize) -> Option<Result<Delivery, BrokerError>> {
        poll_fn(|cx| self.subscription.poll_next(cx, room)).await
    }

    /// The next delivery; panics if none comes.
    pub(super) async fn next(&mut self) -> Delivery {
        self.next_with_room(ROOM).await
    }

    pub(super) async fn next_with_room(&mut self, room: usize) -> Delivery {
        let patience = self.patience;
        let polled = timeout(patience, self.poll(room)).await;
        match polled.unwrap_or_else(|_| panic!("a delivery was due, none came within {patience:?}")) {
            Some(Ok(delivery)) => delivery,
            Some(Err(error)) => panic!("a delivery was due, the subscription failed: {error:?}"),
            None => panic!("a delivery was due, the subscription ended"),
        }
    }

    /// This many deliveries.
    pub(super) async fn take(&mut self, count: usize) -> Vec<Delivery> {
        let mut taken = Vec::new();
        while taken.len() < count {
            taken.push(self.next().await);
        }
        taken
    }

    /// Panics if a delivery comes.
    pub(super) async fn stays_quiet(&mut self, why: &str) {
        match timeout(QUIET, self.poll(ROOM)).await {
            Err(_) | Ok(None) => {}
            Ok(Some(Ok(delivery))) => panic!("{why}, yet {:?} was delivered", text_id(delivery.message())),
            Ok(Some(Err(error))) => panic!("{why}, yet the subscription failed: {error:?}"),
        }
    }

    /// Panics if anything but the end comes.
    pub(super) async fn ends(&mut self) {
        let polled = timeout(self.patience, self.poll(ROOM)).await;
        let end = polled.unwrap_or_else(|_| panic!("a cancelled subscription did not end"));
        assert!(end.is_none(), "a cancelled subscription must end, it gave {end:?}");
    }

    pub(super) async fn close(self) {
        self.subscription.close().await;
    }
}

/// Settles, and panics if the broker could not be told.
pub(super) async fn settle(delivery: Delivery, disposition: Disposition) {
    settle_by(delivery.into_parts().1, disposition).await;
}

pub(super) async fn settle_by(acker: Acker, disposition: Disposition) {
    let told = acker.settle(disposition).await;
    told.unwrap_or_else(|error| panic!("{disposition:?} must be taken: {error:?}"));
}

pub(super) async fn ack_all(deliveries: Vec<Delivery>) {
    for delivery in deliveries {
        settle(delivery, Disposition::Ack).await;
    }
}

/// The message's id as text.
pub(super) fn text_id(message: &Message) -> String {
    let id = message.id().map_or(&b"(none)"[..], |id| id.as_bytes());
    String::from_utf8_lossy(id).into_owned()
}

/// The ids of these deliveries; panics if one is there twice.
pub(super) fn ids(deliveries: &[Delivery]) -> BTreeSet<String> {
    let ids: BTreeSet<_> = deliveries.iter().map(|delivery| text_id(delivery.message())).collect();
    assert_eq!(ids.len(), deliveries.len(), "a message was delivered twice: {ids:?} are all");
    ids
}

/// The ids that [`Stage::send_many`] sends.
pub(super) fn ids_below(count: usize) -> BTreeSet<String> {
    (0..count).map(|id| id.to_string()).collect()
}
