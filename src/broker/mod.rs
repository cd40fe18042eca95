//! The plug for brokers: what [`Consumer`](crate::Consumer) needs of one, and nothing else.
//!
//! Three implementations have the same files: `connect` (the client and its options), `topology`
//! (declare or check), `source` (frames become deliveries), `settle` (dispositions become
//! frames), `publish` (copies, confirmed and routed), `letters` (walks over dead letters).
//! [`testing::broker_contract`](crate::testing) holds a fourth to the same promises.

#[cfg(feature = "amqp")]
pub mod amqp;
pub mod copy;
mod error;
mod facts;
mod hold;
mod letters;
pub mod memory;
#[cfg(feature = "nats")]
pub mod nats;
mod spec;
mod url;

use std::fmt::Debug;
use std::task::{Context, Poll};

use async_trait::async_trait;

pub use self::copy::Copy;
pub use self::error::{BrokerError, BrokerErrorKind};
pub use self::facts::{Facts, Kept};
pub use self::hold::HoldSteps;
pub use self::letters::{Letter, Letters, Place};
pub use self::spec::{AmqpOptions, Declare, Destination, NatsOptions, QueueKind, QueueSpec};
pub use self::url::connect;
use crate::Delivery;

/// A broker: a place to consume from and to publish copies to.
///
/// It may hold connections; each call makes a new one if the last is dead. It does not retry:
/// the consumer does, with backoff, in one place for all brokers.
#[async_trait]
pub trait Broker: Debug + Send + Sync + 'static {
    /// OpenTelemetry's `messaging.system`: `rabbitmq`, `nats`, `memory`.
    fn system(&self) -> &'static str;

    /// What this broker can and cannot do.
    fn features(&self) -> Features;

    /// The scope in which ids are unique, if the queue's configuration names none.
    fn default_scope(&self, queue: &QueueSpec) -> String;

    /// The only delays that a delivery of this queue can have in one hop; `None`: any delay will do.
    fn hold_steps<'a>(&self, queue: &'a QueueSpec) -> Option<&'a HoldSteps> {
        let _ = queue;
        None
    }

    /// Declares what the queue needs, or checks that it is there: the queue itself, its hold
    /// queue, its dead-letter destination.
    ///
    /// # Errors
    ///
    /// [`BrokerErrorKind::Refused`] if something is missing or different, naming it and the fix:
    /// trying again does not help. Other kinds: the broker could not be asked.
    async fn prepare(&self, queue: &QueueSpec) -> Result<(), BrokerError>;

    /// What it says of itself that a queue's settings have to go with. Asks only, and makes nothing; what is not there is
    /// `None`. By default, nothing is known.
    ///
    /// # Errors
    ///
    /// As for [`prepare`](Self::prepare).
    async fn facts(&self, queue: &QueueSpec) -> Result<Facts, BrokerError> {
        let _ = queue;
        Ok(Facts::default())
    }

    /// Begins to consume.
    ///
    /// # Errors
    ///
    /// As for [`prepare`](Self::prepare).
    async fn subscribe(&self, queue: &QueueSpec) -> Result<Box<dyn Subscription>, BrokerError>;

    /// Publishes a copy. `Ok` means *confirmed and routed*: the broker has it, in a place that
    /// keeps it. Publishing the same copy again is harmless.
    ///
    /// It writes [`Copy::body`], of the message's headers what [`Copy::redact`] lets through, [`Copy::moved`] and
    /// [`Copy::headers`].
    ///
    /// # Errors
    ///
    /// [`BrokerErrorKind::NotRouted`], [`BrokerErrorKind::TooLarge`], `HeadersTooLarge` and `Refused` say that the
    /// copy is not there; any other kind that it may or may not be.
    async fn publish(&self, to: &Destination, copy: &Copy<'_>) -> Result<(), BrokerError>;

    /// Where a copy goes that is to be worked on again: to this queue's consumers only, never to a place that others
    /// read as well.
    fn again(&self, queue: &QueueSpec) -> Destination {
        Destination::new(queue.name.as_str())
    }

    /// What else than its name a letter's source may call this queue; by default, nothing else. A message that was
    /// split by `nats::split` in a loop of one's own knows only the durable.
    fn also_called(&self, queue: &QueueSpec) -> Option<String> {
        let _ = queue;
        None
    }

    /// Begins a walk over the letters at `at`.
    ///
    /// # Errors
    ///
    /// [`BrokerErrorKind::Refused`] if there is no such place, or this broker cannot show what it keeps. Other kinds:
    /// the broker could not be asked.
    async fn letters(&self, at: &Destination) -> Result<Box<dyn Letters>, BrokerError> {
        let what = format!("{} cannot show the dead letters at `{}`", self.system(), at.name());
        Err(BrokerError::new(BrokerErrorKind::Refused, what))
    }

    /// Closes the connections.
    async fn close(&self);
}

/// A running subscription to one queue, over one connection. It ends with the connection.
pub trait Subscription: Send + 'static {
    /// The next delivery. `room` is how many more the consumer will take right now, at least
    /// one: a broker that fetches asks for no more than that.
    ///
    /// `Ready(None)` means that the subscription has ended, by [`cancel`](Self::cancel) or by the
    /// broker; after an error it is dead as well. Either way it is to be
    /// [closed](Self::close), and perhaps made anew.
    ///
    /// # Cancel safety
    ///
    /// A poll that is not repeated loses nothing: a delivery is taken out only by the poll
    /// that returns it.
    fn poll_next(&mut self, cx: &mut Context<'_>, room: usize)
    -> Poll<Option<Result<Delivery, BrokerError>>>;

    /// Asks the broker for no more deliveries, and hands back at once those that were not yet
    /// returned by `poll_next`. Deliveries in hand can still be settled.
    fn cancel(&mut self) -> crate::delivery::BoxFuture<()>;

    /// Ends the subscription. What is still unsettled goes back to the broker.
    fn close(self: Box<Self>) -> crate::delivery::BoxFuture<()>;
}

/// What a broker can and cannot do; its contract suite and the consumer read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[expect(clippy::struct_excessive_bools, reason = "each is a yes or no of its own")]
pub struct Features {
    /// Unsettled deliveries come again. `false` for core NATS: there dedup and dead letters work,
    /// nothing else does.
    pub redelivers: bool,
    /// The broker has a deadline for each delivery, extended by heartbeats: how long it is.
    pub ack_deadline: Option<std::time::Duration>,
    /// The finest delay it keeps. AMQP: the shortest hold step.
    pub delay_step: std::time::Duration,
    /// Deliveries are counted by the broker.
    pub counts_deliveries: bool,
    /// Shutdown hands deliveries back without a delay and without counting an attempt.
    pub hands_back: bool,
    /// Dead letters can be [walked](Broker::letters). `false` unless a broker says so: the trait's own `letters` refuses.
    pub shows_letters: bool,
}

impl Features {
    /// A broker that redelivers, with no deadline, exact delays, no count, and no sight of its dead letters.
    pub const fn new() -> Self {
        Self {
            redelivers: true,
            ack_deadline: None,
            delay_step: std::time::Duration::ZERO,
            counts_deliveries: false,
            hands_back: true,
            shows_letters: false,
        }
    }
}

impl Default for Features {
    fn default() -> Self {
        Self::new()
    }
}
