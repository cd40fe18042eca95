//! What a broker has to know of a queue.

use std::time::Duration;

use super::HoldSteps;
use crate::defaults;

/// What a broker has to know of a queue: names and numbers, nothing of the handler.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QueueSpec {
    /// The queue. JetStream: the durable consumer, and the stream unless [`NatsOptions::stream`] names it.
    pub name: String,
    /// How many unsettled deliveries the broker may hand out at once.
    pub prefetch: u16,
    /// Make what is missing, or refuse to start.
    pub declare: Declare,
    /// Where failed messages go.
    pub dead_letter: Option<Destination>,
    /// Start even if the dead-letter destination is missing; the queue pauses at the first dead letter.
    pub allow_missing_dead_letter: bool,
    /// AMQP: the hold steps, of which every delay is made.
    pub holds: HoldSteps,
    /// How often heartbeats will come: a broker's own deadline should be three times this.
    pub heartbeat: Duration,
    /// How long a copy may take to be confirmed.
    pub confirm: Duration,
    /// What only RabbitMQ needs.
    pub amqp: AmqpOptions,
    /// What only NATS needs.
    pub nats: NatsOptions,
}

impl QueueSpec {
    /// A queue of this name with the defaults.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            prefetch: defaults::prefetch(defaults::CONCURRENCY),
            declare: Declare::Check,
            dead_letter: None,
            allow_missing_dead_letter: false,
            holds: HoldSteps::default(),
            heartbeat: defaults::LEASE / defaults::RENEWALS_PER_LEASE,
            confirm: defaults::CONFIRM,
            amqp: AmqpOptions::default(),
            nats: NatsOptions::default(),
        }
    }
}

/// Whether missing queues, streams and durables are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Declare {
    /// Refuse to start if something is missing, and say what. The default: a typo in a name must
    /// not make a queue that nobody publishes to. Hold queues, and a durable's own stream, are ours and are always made.
    #[default]
    Check,
    /// Make what is missing. What is there must be as asked for.
    Create,
}

/// A place for copies: an AMQP or memory queue, a NATS subject that a stream keeps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination(String);

impl Destination {
    /// The destination of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Destination {
    fn from(name: &str) -> Self {
        Self::new(name)
    }
}

impl From<String> for Destination {
    fn from(name: String) -> Self {
        Self::new(name)
    }
}

/// What only RabbitMQ needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AmqpOptions {
    /// The kind of queue to make, with [`Declare::Create`].
    pub kind: QueueKind,
}

/// Kinds of RabbitMQ queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QueueKind {
    /// Replicated, safe, and the broker counts deliveries. Made without a delivery limit: ours
    /// is the one that dead-letters.
    #[default]
    Quorum,
    /// Classic, durable.
    Classic,
}

/// What only NATS needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NatsOptions {
    /// The stream; none: the queue's name.
    pub stream: Option<String>,
    /// The subject that the durable filters by, and that a stream is made for; none: the queue's name.
    pub subject: Option<String>,
    /// How long the server waits for an ack or a heartbeat; none: three heartbeats.
    pub ack_wait: Option<Duration>,
    /// Ask the server to confirm each ack. Slower; a lost ack is then noticed at once, instead of
    /// by a redelivery that dedup skips.
    pub double_ack: bool,
    /// From which delay on a message waits in the durable's own stream; none: [`defaults::LONG_DELAY`].
    pub long_delay: Option<Duration>,
    /// Do without the stream of its own beside each durable: long delays occupy the durable's
    /// `max_ack_pending`, and a dead letter cannot be sent back to this durable alone. Empty that stream first if there
    /// is one: what is in it waits until the option is taken back, and a warning at the start says how much that is.
    pub without_own_stream: bool,
    /// Core NATS: no stream, no acks, no redelivery. Dedup and dead letters work; a failed or
    /// interrupted message that cannot be dead-lettered is *lost*.
    pub core: bool,
}

impl NatsOptions {
    /// The defaults: JetStream, stream and subject named as the queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names the stream.
    #[must_use]
    pub fn stream(mut self, stream: impl Into<String>) -> Self {
        self.stream = Some(stream.into());
        self
    }

    /// Names the subject.
    #[must_use]
    pub fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// How long the server waits for an ack or a heartbeat.
    #[must_use]
    pub fn ack_wait(mut self, ack_wait: Duration) -> Self {
        self.ack_wait = Some(ack_wait);
        self
    }

    /// Asks the server to confirm each ack.
    #[must_use]
    pub fn double_ack(mut self) -> Self {
        self.double_ack = true;
        self
    }

    /// From which delay on a message waits in the durable's own stream. Shorter ones stay in the source's, where they
    /// cost no copy.
    #[must_use]
    pub fn long_delay(mut self, from: Duration) -> Self {
        self.long_delay = Some(from);
        self
    }

    /// Does without the stream of its own beside each durable. See [the field](#structfield.without_own_stream).
    #[must_use]
    pub fn without_own_stream(mut self) -> Self {
        self.without_own_stream = true;
        self
    }

    /// Core NATS: a queue group of the queue's name on the subject, without acks.
    #[must_use]
    pub fn core(mut self) -> Self {
        self.core = true;
        self
    }
}

impl AmqpOptions {
    /// Makes classic queues.
    #[must_use]
    pub fn classic() -> Self {
        Self { kind: QueueKind::Classic }
    }
}
