//! Where an id comes from ([`Identity`]), and the key it is looked up by ([`DedupKey`]).

#[cfg(test)]
mod tests;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;

use crate::dedup::protocol::Digest;
use crate::message::Message;
use crate::{MessageId, defaults};

/// Where a queue's ids come from: sources, asked in order.
///
/// The default: the transport's own id (AMQP `message_id`, `Nats-Msg-Id`), then CloudEvents.
/// The id on our own copies always comes first, so that a copy has its original's id.
///
/// There is no source for a delivery tag or an invented id: such an id is new on every
/// delivery, and deduplicates nothing.
///
/// ```
/// use guestlist::{Identity, Message};
/// let identity = Identity::none().header("x-request-id").json_pointer("/order/id");
/// let message = Message::builder(r#"{"order": {"id": 17}}"#).build();
/// assert_eq!(identity.find(&message).unwrap().as_bytes(), b"17");
/// ```
#[derive(Clone, Debug)]
pub struct Identity(Vec<IdSource>);

#[derive(Clone)]
enum IdSource {
    Transport,
    CloudEvents,
    Header(String),
    JsonPointer(String),
    BodyHash,
    StreamSequence,
    With(Finder),
}

type Finder = Arc<dyn Fn(&Message) -> Option<MessageId> + Send + Sync>;

impl Default for Identity {
    fn default() -> Self {
        Self::none().transport().cloud_events()
    }
}

impl Identity {
    /// No source yet.
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    fn then(mut self, source: IdSource) -> Self {
        self.0.push(source);
        self
    }

    /// Then AMQP's `message_id` property, or the `Nats-Msg-Id` header.
    #[must_use]
    pub fn transport(self) -> Self {
        self.then(IdSource::Transport)
    }

    /// Then CloudEvents: `ce-source` and `ce-id` (AMQP: `cloudEvents:source` and `cloudEvents:id`, or
    /// with an underscore).
    #[must_use]
    pub fn cloud_events(self) -> Self {
        self.then(IdSource::CloudEvents)
    }

    /// Then this header.
    #[must_use]
    pub fn header(self, name: impl Into<String>) -> Self {
        self.then(IdSource::Header(name.into()))
    }

    /// Then the string, or the whole number of at most 64 bits, at this pointer (RFC 6901) in a JSON body.
    #[must_use]
    pub fn json_pointer(self, pointer: impl Into<String>) -> Self {
        self.then(IdSource::JsonPointer(pointer.into()))
    }

    /// Then a BLAKE3 hash of the body. Two messages that mean two things and say the same are one then.
    #[must_use]
    pub fn body_hash(self) -> Self {
        self.then(IdSource::BodyHash)
    }

    /// Then the place in the stream (JetStream). Catches redeliveries only: a sender who sends
    /// twice gets two places.
    #[must_use]
    pub fn stream_sequence(self) -> Self {
        self.then(IdSource::StreamSequence)
    }

    /// Then whatever this finds.
    #[must_use]
    pub fn with(self, find: impl Fn(&Message) -> Option<MessageId> + Send + Sync + 'static) -> Self {
        self.then(IdSource::With(Arc::new(find)))
    }

    /// The message's id: the first that a source finds. An empty one is none.
    pub fn find(&self, message: &Message) -> Option<MessageId> {
        let found = || self.0.iter().find_map(|source| source.find(message));
        message.logical_id().cloned().or_else(found)
    }
}

impl IdSource {
    fn find(&self, message: &Message) -> Option<MessageId> {
        match self {
            Self::Transport => message.transport_id().cloned(),
            Self::CloudEvents => cloud_event_id(message),
            Self::Header(name) => message.headers().get(name).cloned().and_then(MessageId::new),
            Self::JsonPointer(pointer) => json_id(message, pointer),
            Self::BodyHash => Some(body_hash(message.payload())),
            Self::StreamSequence => stream_id(message),
            Self::With(find) => find(message),
        }
    }
}

impl fmt::Debug for IdSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transport => f.write_str("transport"),
            Self::CloudEvents => f.write_str("cloud_events"),
            Self::Header(name) => write!(f, "header({name})"),
            Self::JsonPointer(pointer) => write!(f, "json_pointer({pointer})"),
            Self::BodyHash => f.write_str("body_hash"),
            Self::StreamSequence => f.write_str("stream_sequence"),
            Self::With(_) => f.write_str("with(..)"),
        }
    }
}

/// CloudEvents ids are unique per source, so both make the id; the length keeps them apart.
fn cloud_event_id(message: &Message) -> Option<MessageId> {
    let get = |names: [&str; 3]| {
        let value = names.into_iter().find_map(|name| message.headers().get(name))?;
        (!value.is_empty()).then_some(value)
    };
    let id = get(["ce-id", "cloudEvents:id", "cloudEvents_id"])?;
    let source = get(["ce-source", "cloudEvents:source", "cloudEvents_source"])?;
    let mut both = format!("{}:", source.len()).into_bytes();
    both.extend_from_slice(source);
    both.push(b' ');
    both.extend_from_slice(id);
    MessageId::new(both)
}

fn json_id(message: &Message, pointer: &str) -> Option<MessageId> {
    let body: serde_json::Value = serde_json::from_slice(message.payload()).ok()?;
    match body.pointer(pointer)? {
        serde_json::Value::String(text) => MessageId::new(text.clone()),
        // A float has lost the digits that tell two long numbers apart: the second message would be
        // taken for a copy of the first.
        serde_json::Value::Number(number) if !number.is_f64() => MessageId::new(number.to_string()),
        _ => None,
    }
}

pub(crate) fn body_hash(body: &Bytes) -> MessageId {
    let hash = blake3::hash(body).to_hex();
    MessageId::new(hash.as_str().to_owned()).unwrap_or_else(|| unreachable!("a hash is not empty"))
}

fn stream_id(message: &Message) -> Option<MessageId> {
    let source = message.source();
    source.sequence.and_then(|sequence| MessageId::new(format!("{}:{sequence}", source.stream)))
}

/// The id of a message about another one: a hash of both, so that it is short and its parts
/// cannot be confused.
pub(crate) fn child_id(parent: &[u8], name: &str) -> Option<MessageId> {
    let mut hash = blake3::Hasher::new_derive_key("guestlist 2026 child id");
    hash.update(&(parent.len() as u64).to_le_bytes());
    hash.update(parent);
    hash.update(name.as_bytes());
    MessageId::new(hash.finalize().to_hex()[..32].to_owned())
}

/// What becomes of a message without an id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum MissingId {
    /// It is parked with the dead letters, cause `missing_id`. The default.
    #[default]
    DeadLetter,
    /// It is handled without dedup, and counted. A copy of it runs again.
    Process,
    /// Its body's hash is its id. Two messages that say the same are one then.
    HashBody,
}

/// The key of an id in a store: a 128-bit cryptographic hash of (namespace, scope, id).
///
/// The raw id never becomes a Redis key, a subject or SQL text. 128 bits: to suppress a
/// victim's message by a chosen id takes a second preimage (2^128 hashes); the 2^64 of a
/// birthday search only find two ids of the searcher's own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DedupKey([u8; 16]);

impl DedupKey {
    /// A key of these bytes, as [`as_bytes`](Self::as_bytes) gave them.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for DedupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for DedupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Makes the keys of one scope. The scope goes into a hash key once, so that an id of up to
/// 64 bytes costs one block of BLAKE3.
///
/// ```
/// use guestlist::{MessageId, Scope};
/// let id = MessageId::new("1").unwrap();
/// assert_ne!(Scope::new("shop", "orders").key(&id), Scope::new("shop", "refunds").key(&id));
/// assert_ne!(Scope::new("a", "bc").key(&id), Scope::new("ab", "c").key(&id));
/// ```
#[derive(Clone)]
pub struct Scope {
    name: Arc<str>,
    secret: [u8; 32],
}

impl Scope {
    /// The scope of this name in a store's namespace.
    pub fn new(namespace: &str, name: &str) -> Self {
        let mut hash = blake3::Hasher::new_derive_key("guestlist 2026 dedup scope");
        for part in [namespace, name] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        Self { name: name.into(), secret: *hash.finalize().as_bytes() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key of an id in this scope.
    pub fn key(&self, id: &MessageId) -> DedupKey {
        let hash = blake3::keyed_hash(&self.secret, id.as_bytes());
        let mut key = [0; 16];
        key.copy_from_slice(&hash.as_bytes()[..16]);
        DedupKey(key)
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Scope").field(&self.name).finish()
    }
}

/// An id that was found, with its key.
#[derive(Clone, Debug)]
pub(crate) struct Identified {
    pub(crate) id: MessageId,
    pub(crate) key: DedupKey,
    /// Of the body, if the queue compares bodies.
    pub(crate) digest: Option<Digest>,
}

impl Identified {
    /// Tells bodies of one id apart in a log. Mixed with the key, so that equal bodies of two ids look different.
    pub(crate) fn body_mark(&self) -> Option<u32> {
        let digest = self.digest?;
        let mut hash = blake3::Hasher::new_derive_key("guestlist 2026 body mark");
        hash.update(self.key.as_bytes());
        hash.update(&digest.to_le_bytes());
        let [a, b, c, d, ..] = *hash.finalize().as_bytes();
        Some(u32::from_le_bytes([a, b, c, d]))
    }
}

/// What finds the ids of a queue's messages and their keys, without a claim.
#[derive(Clone, Debug)]
pub(crate) struct Ids {
    pub(crate) identity: Identity,
    pub(crate) missing: MissingId,
    pub(crate) scope: Scope,
}

impl Ids {
    /// The id that dedup would look up; `None`: it would not, or a source of the user's panics.
    pub(crate) fn find(&self, message: &Message) -> Option<MessageId> {
        let found = catch_unwind(AssertUnwindSafe(|| self.identity.find(message))).ok()?;
        let hashed = || (self.missing == MissingId::HashBody).then(|| body_hash(message.payload()));
        found.or_else(hashed).filter(|id| !too_long(id))
    }
}

/// Why an id is not good enough: it is longer than [`MAX_ID`](defaults::MAX_ID) bytes.
pub(crate) fn too_long(id: &MessageId) -> bool {
    id.as_bytes().len() > defaults::MAX_ID
}
