//! Consumes queues: pulls deliveries, runs the stack, settles, heartbeats, drains.
//!
//! One delivery, from broker to ack: [`session`] receives it, waits for the stack to be ready and
//! calls it in a task; [`settle`] releases the claim as planned, tells the broker, and counts.

mod config;
mod heartbeat;
mod queue;
mod session;
mod settle;
mod status;
mod stores;

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use self::config::ConfigError;
pub(crate) use self::config::QueueConfig;
use self::config::StoreChoice;
pub use self::queue::Queue;
pub use self::settle::disposition;
pub use self::status::{QueueStatus, State, Status};
use self::stores::Stores;
pub(crate) use self::stores::from_elsewhere;
use crate::broker::Broker;
use crate::{Error, defaults};

/// Consumes any number of queues of one broker, each with its handler and its settings.
///
/// ```
/// use guestlist::prelude::*;
/// use guestlist::broker::memory::MemoryBroker;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> guestlist::Result {
/// let broker = MemoryBroker::new();
/// broker.declare("orders");
/// for _ in 0..2 {
///     broker.send("orders", Message::builder("{}").transport_id("order-1"))?;
/// }
///
/// let consumer = Consumer::new(broker.clone())
///     .queue(Queue::new("orders").declare().dead_letter("orders.dead").handler(async |_: Message| Ok(())));
/// let status = consumer.status();
/// consumer.run_until(async { broker.drained("orders").await.unwrap() }).await?;
///
/// let orders = &status.queues()[0];
/// assert_eq!((orders.handled, orders.duplicates), (1, 1));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Consumer {
    broker: Arc<dyn Broker>,
    queues: Vec<Queue>,
    stores: Stores,
    drain: Duration,
    status: Status,
}

impl Consumer {
    /// Connects to the broker at a URL: `amqp://`, `amqps://`, `nats://`, `tls://` (NATS), or `memory:`.
    ///
    /// # Errors
    ///
    /// The URL is none of these, this build lacks the feature for it, or the broker does not answer.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped before it ends, there is no connection.
    pub async fn connect(url: &str) -> Result<Self, Error> {
        Ok(Self::over(crate::broker::connect(url).await?))
    }

    /// A consumer over a broker that is there already.
    pub fn new(broker: impl Broker) -> Self {
        Self::over(Arc::new(broker))
    }

    /// As [`new`](Self::new), for a broker that is shared.
    pub fn over(broker: Arc<dyn Broker>) -> Self {
        let (queues, stores, status) = (Vec::new(), Stores::default(), Status::default());
        Self { broker, queues, stores, drain: defaults::DRAIN, status }
    }

    /// Consumes this queue as well.
    #[must_use]
    pub fn queue(mut self, queue: Queue) -> Self {
        self.queues.push(queue);
        self
    }

    /// The store for queues that name none of their own. By default they share one
    /// [`MemoryStore`](crate::dedup::MemoryStore): read there what it does not promise.
    #[must_use]
    pub fn store(mut self, store: impl Into<crate::dedup::SharedStore>) -> Self {
        self.stores.default = StoreChoice::Given(store.into().into_arc());
        self
    }

    /// The store at this URL for queues that name none of their own; see [`Queue::store_url`].
    #[must_use]
    pub fn store_url(mut self, url: impl Into<String>) -> Self {
        self.stores.default = StoreChoice::At(url.into());
        self
    }

    /// How long running handlers may go on after a stop: 30 s by default. Then their futures are
    /// dropped, and their messages go back to the broker without an attempt spent.
    #[must_use]
    pub fn drain(mut self, drain: Duration) -> Self {
        self.drain = drain;
        self
    }

    /// Counters and health, readable at any time and after the end.
    pub fn status(&self) -> Status {
        self.status.clone()
    }

    /// Consumes until [`signal`](crate::signal): Ctrl-C or SIGTERM.
    ///
    /// # Errors
    ///
    /// See [`run_until`](Self::run_until).
    ///
    /// # Cancel safety
    ///
    /// See [`run_until`](Self::run_until).
    pub async fn run(self) -> Result<(), Error> {
        self.run_until(crate::signal()).await
    }

    /// Consumes until `stop` ends, then stops in three steps: asks the brokers for no more, lets
    /// running handlers finish until the drain is over, hands back what is left.
    ///
    /// # Errors
    ///
    /// Before it consumes anything: a queue's settings do not fit together, its store cannot be
    /// connected to, or the broker lacks what a queue needs. Later: a queue could not be consumed for about five minutes. The
    /// other queues are stopped gracefully first.
    ///
    /// # Cancel safety
    ///
    /// Dropped before it ends, it loses nothing: handlers are interrupted, their claims are
    /// released or run out, and the broker delivers again what was not acked.
    pub async fn run_until(self, stop: impl Future<Output = ()> + Send) -> Result<(), Error> {
        let Self { broker, queues, mut stores, drain, status } = self;
        let mut starts = Vec::new();
        for queue in queues {
            starts.push(queue.prepare(&broker, &mut stores, &status, drain).await?);
        }
        if starts.is_empty() {
            return Err(ConfigError::NoQueue.into());
        }
        let stopping = CancellationToken::new();
        let _stop_on_drop = stopping.clone().drop_guard();
        let mut running = JoinSet::new();
        for start in starts {
            running.spawn(start(stopping.clone()));
        }
        let ended = run_all(&mut running, &stopping, stop).await;
        broker.close().await;
        ended
    }
}

/// Waits for the signal, or for a queue that fails; then for all the others.
async fn run_all(
    running: &mut JoinSet<Result<(), Error>>,
    stopping: &CancellationToken,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let first = tokio::select! {
        biased;
        () = stop => Ok(()),
        Some(ended) = running.join_next() => flatten(ended),
    };
    stopping.cancel();
    let mut result = first;
    while let Some(ended) = running.join_next().await {
        result = result.and(flatten(ended));
    }
    result
}

fn flatten(ended: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<(), Error> {
    ended.unwrap_or_else(|error| Err(Error::loop_ended(error)))
}
