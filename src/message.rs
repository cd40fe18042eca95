//! What a handler sees: [`Message`], its [`MessageId`], [`Headers`] and [`Source`].

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use bytes::Bytes;

use crate::broker::copy;
use crate::dedup::RunContext;
use crate::identity::Identified;

/// The sender's identity for a message: any bytes, at least one.
///
/// An id may be a card number for all we know, so `Debug` prints only its length.
///
/// ```
/// use guestlist::MessageId;
/// let id = MessageId::new("order-17").unwrap();
/// assert_eq!(id.as_bytes(), b"order-17");
/// assert_eq!(format!("{id:?}"), "MessageId(8 bytes)");
/// assert!(MessageId::new("").is_none());
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct MessageId(Bytes);

impl MessageId {
    /// An id of these bytes; `None` if there are none, since an empty id is a missing one.
    pub fn new(bytes: impl Into<Bytes>) -> Option<Self> {
        let bytes = bytes.into();
        (!bytes.is_empty()).then_some(Self(bytes))
    }

    /// The bytes as the sender wrote them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The id as text, if it is UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MessageId({} bytes)", self.0.len())
    }
}

/// A message's headers: names with values of any bytes, in order, a name possibly more than once.
///
/// `Debug` prints the names only.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, Bytes)>);

impl Headers {
    /// No headers.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds a header, keeping any of the same name.
    pub fn push(&mut self, name: impl Into<String>, value: impl Into<Bytes>) {
        self.0.push((name.into(), value.into()));
    }

    /// The first value of this name; names are compared as they are, upper and lower case differ.
    pub fn get(&self, name: &str) -> Option<&Bytes> {
        self.iter().find(|(n, _)| *n == name).map(|(_, value)| value)
    }

    /// The first value of this name, if it is UTF-8.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// All headers in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Bytes)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// How many headers there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes out every header whose name `pick` wants, in order.
    pub(crate) fn take(&mut self, pick: impl Fn(&str) -> bool) -> Vec<(String, Bytes)> {
        self.0.extract_if(.., |(name, _)| pick(name)).collect()
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// Where a message came from, in the broker's own terms.
///
/// Fields that a broker does not have are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Source {
    /// `rabbitmq`, `nats` or `memory`: the value of OpenTelemetry's `messaging.system`.
    pub system: &'static str,
    /// The queue, or the durable consumer.
    pub queue: String,
    /// AMQP: the exchange it was published to.
    pub exchange: String,
    /// AMQP: the routing key. NATS: the subject.
    pub routing_key: String,
    /// JetStream: the stream.
    pub stream: String,
    /// JetStream: the sequence in the stream. With the stream it names this message for ever.
    pub sequence: Option<u64>,
}

impl Source {
    /// A source of this system and queue; fill in the other fields as the broker has them.
    pub fn new(system: &'static str, queue: impl Into<String>) -> Self {
        Self { system, queue: queue.into(), ..Self::default() }
    }
}

/// A message as the handler sees it: body and metadata. Cheap to clone: one shared allocation.
///
/// `Debug` prints the payload's length and the headers' names, never their bytes: logs are
/// not a data store.
///
/// ```
/// use guestlist::Message;
/// let message = Message::builder("hello").header("kind", "greeting").build();
/// assert_eq!(message.payload(), "hello");
/// assert_eq!(message.headers().get_str("kind"), Some("greeting"));
/// assert!(!format!("{message:?}").contains("hello"));
/// ```
#[derive(Clone)]
pub struct Message {
    parts: Arc<Parts>,
    run: Option<RunContext>,
}

struct Parts {
    payload: Bytes,
    headers: Headers,
    transport_id: Option<MessageId>,
    content_type: Option<String>,
    source: Source,
    redelivered: bool,
    broker_deliveries: Option<u32>,
    priority: Option<u8>,
    timestamp: Option<SystemTime>,
    copy: copy::Marks,
    /// The number of this hand-over, unique in this process: it ties the events of one delivery together.
    number: u64,
    /// The frame as the broker's client gave it, for a copy that is true to it.
    native: Option<Arc<dyn Any + Send + Sync>>,
    /// Set once, by whoever identifies first (the dedup layer); every clone sees it.
    identified: OnceLock<Identified>,
    /// The attempt counted by the store for this delivery; 0: not claimed.
    attempt: AtomicU32,
    /// From when on it may be handled: found once, by whoever looks first.
    due: OnceLock<SystemTime>,
    /// The lease was lost or `max_run` is over: heartbeats to the broker stop.
    forsaken: AtomicBool,
}

impl Message {
    /// Starts a message with this body.
    pub fn builder(payload: impl Into<Bytes>) -> MessageBuilder {
        MessageBuilder::new(payload.into())
    }

    /// The sender's id, as the dedup layer found it; before that, the transport's own id if there is one.
    pub fn id(&self) -> Option<&MessageId> {
        self.parts
            .identified
            .get()
            .map(|found| &found.id)
            .or_else(|| self.logical_id())
            .or(self.parts.transport_id.as_ref())
    }

    /// The body.
    pub fn payload(&self) -> &Bytes {
        &self.parts.payload
    }

    /// The sender's headers. Those of our own copies are not among them.
    pub fn headers(&self) -> &Headers {
        &self.parts.headers
    }

    /// The content type, if the sender gave one.
    pub fn content_type(&self) -> Option<&str> {
        self.parts.content_type.as_deref()
    }

    /// Where it came from; on a copy of ours, where the original came from.
    pub fn source(&self) -> &Source {
        &self.parts.source
    }

    /// Which attempt at this id this is, from 1. Counted by the store, over all consumers and
    /// crashes. Without a claim: what the broker and our own copies say.
    pub fn attempt(&self) -> u32 {
        match self.parts.attempt.load(Ordering::Relaxed) {
            0 => self.hinted_attempt(),
            counted => counted,
        }
    }

    /// Whether the broker says that it delivered this message before.
    pub fn redelivered(&self) -> bool {
        self.parts.redelivered
    }

    /// How often the broker says it delivered this message, this time included, if it counts.
    pub fn broker_deliveries(&self) -> Option<u32> {
        self.parts.broker_deliveries
    }

    /// The sender's priority.
    pub fn priority(&self) -> Option<u8> {
        self.parts.priority
    }

    /// When the message was sent (AMQP: the sender's clock) or stored (JetStream: the server's; in
    /// memory: this process's, unless the sender named one).
    pub fn timestamp(&self) -> Option<SystemTime> {
        self.parts.timestamp
    }

    /// How many times an operator sent this id back to work: 0 for a message fresh from its sender.
    pub fn generation(&self) -> u32 {
        self.parts.copy.generation
    }

    /// When an operator last sent it back to work, if one did: to the second, as our own copy says.
    pub fn redriven_at(&self) -> Option<SystemTime> {
        self.parts.copy.redriven_at
    }

    /// An id for a message that the handler publishes about this one: the same for each run
    /// of this id in this scope, so that a second run publishes the same id again, and another
    /// queue's message of the same id does not.
    ///
    /// `None` if this message has no id. Ask inside the handler: before the dedup layer has looked,
    /// the scope is not known, and the answer is another one.
    ///
    /// ```
    /// use guestlist::Message;
    /// let charge = Message::builder("{}").transport_id("charge-1").build();
    /// let again = Message::builder("{}").transport_id("charge-1").build();
    /// assert_eq!(charge.child_id("receipt"), again.child_id("receipt"));
    /// assert_ne!(charge.child_id("receipt"), charge.child_id("invoice"));
    /// ```
    pub fn child_id(&self, name: &str) -> Option<MessageId> {
        // An id is unique in its scope only: two queues' messages of the same id are not one message.
        let parent = self.identified().map(|found| &found.key.as_bytes()[..]);
        let parent = parent.or_else(|| self.id().map(MessageId::as_bytes))?;
        crate::identity::child_id(parent, name)
    }

    /// The number of this hand-over, unique in this process and in its events.
    pub fn delivery_number(&self) -> u64 {
        self.parts.number
    }

    /// The transport's id: AMQP's `message_id` property or the `Nats-Msg-Id` header.
    pub fn transport_id(&self) -> Option<&MessageId> {
        self.parts.transport_id.as_ref()
    }

    /// The frame's metadata as the broker's client gave it, if it is a `T`.
    pub fn native<T: Any + Send + Sync>(&self) -> Option<&T> {
        self.parts.native.as_deref().and_then(|native| native.downcast_ref())
    }

    /// What our own copy carries beside the original; empty on a message fresh from its sender.
    pub(crate) fn copy_marks(&self) -> &copy::Marks {
        &self.parts.copy
    }

    /// The id that our own copy carries.
    pub(crate) fn logical_id(&self) -> Option<&MessageId> {
        self.parts.copy.id.as_ref()
    }

    /// What the dedup layer found, once it has looked.
    pub(crate) fn identified(&self) -> Option<&Identified> {
        self.parts.identified.get()
    }

    /// The first one to find an id sets it for every clone of this delivery's message.
    pub(crate) fn identify(&self, found: Identified) -> &Identified {
        self.parts.identified.get_or_init(|| found)
    }

    /// What our own copy's header and the broker's count say; hints, since headers can be forged.
    pub(crate) fn hinted_attempt(&self) -> u32 {
        let copies = self.parts.copy.attempt.saturating_add(1);
        copies.max(self.parts.broker_deliveries.unwrap_or(1))
    }

    /// From when on it may be handled, as far as somebody has looked, here or where our copy was made.
    pub(crate) fn due(&self) -> Option<SystemTime> {
        self.parts.due.get().copied().or(self.parts.copy.due)
    }

    pub(crate) fn set_due(&self, due: SystemTime) {
        let _ = self.parts.due.set(due);
    }

    pub(crate) fn run(&self) -> Option<&RunContext> {
        self.run.as_ref()
    }

    /// The message as the handler of this run sees it.
    pub(crate) fn for_run(mut self, run: RunContext) -> Self {
        self.count_attempt(run.attempt);
        self.run = Some(run);
        self
    }

    /// The message as the handler of this try sees it.
    pub(crate) fn lending(mut self, loan: Arc<dyn Any + Send + Sync>) -> Self {
        if let Some(run) = &mut self.run {
            run.lend(loan);
        }
        self
    }

    pub(crate) fn count_attempt(&self, attempt: u32) {
        self.parts.attempt.store(attempt, Ordering::Relaxed);
    }

    /// Nobody vouches for this delivery any more: its heartbeats stop.
    pub(crate) fn forsake(&self) {
        self.parts.forsaken.store(true, Ordering::Relaxed);
    }

    pub(crate) fn forsaken(&self) -> bool {
        self.parts.forsaken.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("id", &self.id())
            .field("payload_len", &self.parts.payload.len())
            .field("headers", &self.parts.headers)
            .field("source", &self.parts.source)
            .field("attempt", &self.attempt())
            .field("redelivered", &self.parts.redelivered)
            .finish_non_exhaustive()
    }
}

/// Builds a [`Message`]: brokers do, and tests.
pub struct MessageBuilder(Parts);

impl fmt::Debug for MessageBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageBuilder").field("headers", &self.0.headers).finish_non_exhaustive()
    }
}

impl MessageBuilder {
    fn new(payload: Bytes) -> Self {
        Self(Parts {
            payload,
            headers: Headers::new(),
            transport_id: None,
            content_type: None,
            source: Source::default(),
            redelivered: false,
            broker_deliveries: None,
            priority: None,
            timestamp: None,
            copy: copy::Marks::default(),
            number: next_number(),
            native: None,
            identified: OnceLock::new(),
            attempt: AtomicU32::new(0),
            due: OnceLock::new(),
            forsaken: AtomicBool::new(false),
        })
    }

    /// What lies at the broker: of a copy of ours, the copy's own.
    pub(crate) fn written_transport_id(&self) -> Option<&MessageId> {
        self.0.transport_id.as_ref()
    }

    /// The same content as another hand-over, for a broker that keeps what it delivers.
    pub(crate) fn again(&self) -> Self {
        Self::new(self.0.payload.clone()).set(|parts| {
            parts.headers.clone_from(&self.0.headers);
            parts.transport_id.clone_from(&self.0.transport_id);
            parts.content_type.clone_from(&self.0.content_type);
            parts.priority = self.0.priority;
            parts.timestamp = self.0.timestamp;
            parts.native.clone_from(&self.0.native);
        })
    }

    fn set(mut self, change: impl FnOnce(&mut Parts)) -> Self {
        change(&mut self.0);
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(self, name: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.set(|parts| parts.headers.push(name, value))
    }

    /// The transport's own id (AMQP `message_id`, `Nats-Msg-Id`). Empty is none.
    #[must_use]
    pub fn transport_id(self, id: impl Into<Bytes>) -> Self {
        self.set(|parts| parts.transport_id = MessageId::new(id))
    }

    /// The content type.
    #[must_use]
    pub fn content_type(self, content_type: impl Into<String>) -> Self {
        self.set(|parts| parts.content_type = Some(content_type.into()))
    }

    /// Where it came from.
    #[must_use]
    pub fn source(self, source: Source) -> Self {
        self.set(|parts| parts.source = source)
    }

    /// Whether the broker says that it delivered the message before.
    #[must_use]
    pub fn redelivered(self, redelivered: bool) -> Self {
        self.set(|parts| parts.redelivered = redelivered)
    }

    /// How often the broker says it delivered the message, this time included.
    #[must_use]
    pub fn broker_deliveries(self, count: u32) -> Self {
        self.set(|parts| parts.broker_deliveries = Some(count))
    }

    /// The sender's priority.
    #[must_use]
    pub fn priority(self, priority: u8) -> Self {
        self.set(|parts| parts.priority = Some(priority))
    }

    /// When the message was sent or stored.
    #[must_use]
    pub fn timestamp(self, timestamp: SystemTime) -> Self {
        self.set(|parts| parts.timestamp = Some(timestamp))
    }

    /// For a broker that says when it stored a message: unless the sender said when it was sent.
    pub(crate) fn or_timestamp(self, now: impl FnOnce() -> SystemTime) -> Self {
        self.set(|parts| parts.timestamp = parts.timestamp.or_else(|| Some(now())))
    }

    /// The frame's metadata as the client gave it; [`Message::native`] gives it back.
    #[must_use]
    pub fn native(self, native: Arc<dyn Any + Send + Sync>) -> Self {
        self.set(|parts| parts.native = Some(native))
    }

    /// The message. Headers of our own copies are taken out of the sender's and understood:
    /// what a copy moved aside is shown in its place again, so identity, routing and trace do
    /// not change on a retry.
    pub fn build(mut self) -> Message {
        self.0.copy = copy::Marks::take_from(&mut self.0.headers);
        self.0.copy.restore_source(&mut self.0.source);
        if let Some(original) = self.0.copy.transport_id.take() {
            self.0.transport_id = MessageId::new(original);
        }
        Message { parts: Arc::new(self.0), run: None }
    }
}

fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
