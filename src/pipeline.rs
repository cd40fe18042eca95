//! The layers in their one right order.
//!
//! From the outside in: trace, `dead_letter`, redeliver, delay, dedup, (concurrency limit), retry, (inbox), timeout, handler.
//!
//! - `dead_letter` is outside dedup, else a redriven message would be dropped as a duplicate;
//! - dedup is outside retry, so that one claim covers the in-process tries;
//! - timeout is inside retry, so that each try has its own;
//! - the inbox's transaction is inside retry, so that each try has its own, and outside timeout, which rolls it back;
//! - the limit is inside dedup, so that neither duplicates nor waiters keep a slot.
//!
//! Everything inside dedup answers `()`, dedup and everything outside it an [`Outcome`]: a stack put together in the
//! wrong order does not compile, and the compiler says so.
//!
//! ```compile_fail
//! # use guestlist::{HandlerService, Message, dedup::{DedupLayer, MemoryStore}, retry::RetryLayer};
//! # use tower::{ServiceBuilder, ServiceExt};
//! // "the layers are in the wrong order": retry belongs inside dedup
//! let stack = ServiceBuilder::new()
//!     .layer(RetryLayer::new(3))
//!     .layer(DedupLayer::new(MemoryStore::new(), "orders"))
//!     .service(HandlerService::new(async |_: Message| Ok(())));
//! # let _ = stack.oneshot(Message::builder("").build());
//! ```

use std::future::Future;
use std::sync::Arc;

use tokio_util::task::TaskTracker;
use tower::ServiceBuilder;
use tower::limit::ConcurrencyLimitLayer;
use tower::timeout::TimeoutLayer;
use tower::util::option_layer;
use tower_service::Service;

use crate::broker::{Broker, Facts};
use crate::consumer::{ConfigError, QueueConfig, check};
use crate::dead_letter::DeadLetterLayer;
use crate::dedup::{self, DedupLayer};
use crate::delay::DelayLayer;
use crate::events::Events;
use crate::handler::{Arguments, Handled, Handler, HandlerService, Needs};
use crate::inbox::InboxLayer;
use crate::pause::Gate;
use crate::redeliver::RedeliverLayer;
use crate::retry::RetryLayer;
use crate::trace::TraceLayer;
use crate::{BoxError, Message, Outcome, Queue};

mod sealed {
    pub trait Sealed {}
    impl Sealed for () {}
    impl Sealed for crate::Outcome {}
}

/// What a service inside dedup answers: `()`.
#[diagnostic::on_unimplemented(
    message = "the layers are in the wrong order: this layer belongs inside dedup, or around a handler, but what it wraps answers `{Self}`",
    note = "from the outside in: trace, dead_letter, redeliver, delay, dedup, retry, timeout, handler"
)]
pub trait InsideDedup: sealed::Sealed {}

impl InsideDedup for () {}

/// What dedup and every service outside it answers: an [`Outcome`].
#[diagnostic::on_unimplemented(
    message = "the layers are in the wrong order: this layer belongs outside dedup, but what it wraps answers `{Self}`",
    note = "from the outside in: trace, dead_letter, redeliver, delay, dedup, retry, timeout, handler"
)]
pub trait OutsideDedup: Into<Outcome> + sealed::Sealed {}

impl OutsideDedup for Outcome {}

/// A whole stack, from trace to handler: what a loop needs. Any service of this shape is one.
pub trait Stack:
    Service<Message, Response = Outcome, Error = BoxError, Future: Future + Send + 'static>
    + Clone
    + Send
    + 'static
{
}

impl<S> Stack for S where
    S: Service<Message, Response = Outcome, Error = BoxError, Future: Send + 'static>
        + Clone
        + Send
        + 'static
{
}

/// What goes around a handler on its way into a [`Pipeline`]: the service inside the slot.
pub trait Inner:
    Service<Message, Response = (), Error: Into<BoxError>, Future: Send + 'static> + Clone + Send + 'static
{
}

impl<S> Inner for S where
    S: Service<Message, Response = (), Error: Into<BoxError>, Future: Send + 'static>
        + Clone
        + Send
        + 'static
{
}

/// Builds the stack of one queue, for teams with a loop of their own. [`Consumer`](crate::Consumer) does it by itself.
///
/// ```
/// use guestlist::broker::memory::MemoryBroker;
/// use guestlist::{Message, Outcome, Pipeline, Queue};
/// use std::sync::Arc;
/// use tower::ServiceExt;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> guestlist::Result {
/// let broker = Arc::new(MemoryBroker::new()); // publishes the dead letters
/// let queue = Queue::new("orders").dead_letter("orders.dead");
/// let stack = Pipeline::new(queue, broker)?.handler(async |_: Message| Ok(()))?;
///
/// let message = Message::builder("{}").transport_id("order-1").build();
/// assert_eq!(stack.oneshot(message).await.unwrap(), Outcome::Handled);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Pipeline {
    config: QueueConfig,
    broker: Arc<dyn Broker>,
    gate: Gate,
    background: TaskTracker,
}

impl Pipeline {
    /// The pipeline of this queue; its dead letters are published by `broker`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if the queue's settings do not fit together.
    pub fn new(queue: Queue, broker: Arc<dyn Broker>) -> Result<Self, ConfigError> {
        let config = queue.into_config();
        config.check()?;
        config.check_connected()?;
        check::warn(&config.findings(None, &Facts::default()));
        Ok(Self::of(config, broker, Gate::default(), TaskTracker::new()))
    }

    pub(crate) fn of(
        config: QueueConfig,
        broker: Arc<dyn Broker>,
        gate: Gate,
        background: TaskTracker,
    ) -> Self {
        Self { config, broker, gate, background }
    }

    /// The stack around this handler.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if an argument of the handler needs what the queue does not give.
    pub fn handler<H, Args>(self, handler: H) -> Result<impl Stack, ConfigError>
    where
        H: Handler<Args, Future: Future<Output = Handled> + Send + 'static>,
        Args: Arguments + 'static,
    {
        self.config.check_needs(Args::NEEDS)?;
        Ok(self.stack(HandlerService::new(handler), Args::NEEDS))
    }

    /// The stack around this service: a handler with tower layers of your own.
    pub fn service(self, service: impl Inner) -> impl Stack {
        self.stack(service, Needs::CANCELLATION)
    }

    /// The one right order.
    pub(crate) fn stack(self, service: impl Inner, needs: Needs) -> impl Stack {
        let Self { config, broker, gate, background } = self;
        let events = Events::new(config.observer.clone());
        ServiceBuilder::new()
            .layer(TraceLayer::new())
            .layer(dead_letter(&config, Arc::clone(&broker), &gate, &events))
            .layer(redeliver(&config, &*broker))
            .layer(DelayLayer::new())
            .layer(dedup(&config, &*broker, &gate, &events, needs).with_background(background))
            .layer(ConcurrencyLimitLayer::new(config.concurrency))
            .layer(RetryLayer::new(config.tries))
            .layer(option_layer(inbox(&config)))
            .layer(option_layer(config.timeout.map(TimeoutLayer::new)))
            .map_err(Into::<BoxError>::into)
            .service(service)
    }
}

fn inbox(config: &QueueConfig) -> Option<InboxLayer> {
    let inbox = config.inbox.clone();
    inbox.map(|inbox| InboxLayer::new(inbox, config.dedup.window))
}

fn dead_letter(
    config: &QueueConfig,
    broker: Arc<dyn Broker>,
    gate: &Gate,
    events: &Events,
) -> DeadLetterLayer {
    let layer = DeadLetterLayer::to(broker, config.spec.dead_letter.clone())
        .with_pause_hold(config.pause_hold)
        .with_oversized(config.oversized)
        .redacted_by(config.redaction.clone())
        .with_kept(dedup::retain(config.dedup.window, config.backoff.cap()))
        .with_gate(gate.clone())
        .with_events(events.clone());
    match &config.consumer {
        Some(name) => layer.with_consumer(name),
        None => layer,
    }
}

fn redeliver(config: &QueueConfig, broker: &dyn Broker) -> RedeliverLayer {
    let steps = broker.hold_steps(&config.spec).cloned();
    let longest = config.longest_delay();
    let layer = RedeliverLayer::new().with_backoff(config.backoff).with_longest(longest).with_steps(steps);
    match config.retry_policy.clone() {
        Some(policy) => layer.with_policy(move |failure, attempt| policy(failure, attempt)),
        None => layer,
    }
}

fn dedup(
    config: &QueueConfig,
    broker: &dyn Broker,
    gate: &Gate,
    events: &Events,
    needs: Needs,
) -> DedupLayer {
    let scope = config.scope.clone().unwrap_or_else(|| broker.default_scope(&config.spec));
    let waiters = usize::from(config.spec.prefetch) / 4;
    config
        .dedup
        .clone()
        .into_layer(config.store(), scope)
        .with_waiters(waiters)
        .with_pause_hold(config.pause_hold)
        .with_longest_backoff(config.backoff.cap())
        .with_gate(gate.clone())
        .with_events(events.clone())
        .with_cancellation(needs.cancellation)
}
