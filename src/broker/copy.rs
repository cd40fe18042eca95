//! Our own copies of messages: what is written on them, and how it is read back.
//!
//! A copy is not verbatim. Body, content type, correlation and application headers are the
//! same; whatever the broker *acts on* (an expiration, a sender-selected route, an expected
//! sequence) is moved aside under a header of ours, so that the copy is not refused, sent
//! elsewhere or expired. Everything of ours is under one prefix, `guestlist-`.
//!
//! Headers of ours that a stranger wrote are hints, never authority: the store counts.

mod marks;
mod record;
#[cfg(test)]
mod tests;
mod text;

use std::collections::HashSet;
use std::time::UNIX_EPOCH;

use bytes::Bytes;

pub(crate) use self::marks::Marks;
pub use self::record::DeadLetter;
pub use self::text::{decode, encode, escape};
use crate::{Message, MessageId, defaults};

/// The prefix of every header that we write.
pub const PREFIX: &str = "guestlist-";
/// The logical id, percent-encoded.
pub const ID: &str = "guestlist-id";
/// The attempt that was counted when the copy was made: a hint.
pub const ATTEMPT: &str = "guestlist-attempt";
/// From when on it may be handled, milliseconds since 1970; see [`delay`](crate::delay).
pub const DUE: &str = "guestlist-due";
/// How many times an operator sent this id back to work.
pub const GENERATION: &str = "guestlist-generation";
/// Why it is a dead letter: see [`Cause::name`](crate::Cause::name).
pub const CAUSE: &str = "guestlist-cause";
/// The chain of errors, escaped, at most 1 KiB.
pub const ERROR: &str = "guestlist-error";
/// When the message failed, seconds since 1970.
pub const FAILED_AT: &str = "guestlist-failed-at";
/// The queue or durable that it was consumed from.
pub const QUEUE: &str = "guestlist-orig-queue";
/// The broker it was consumed from.
pub const SYSTEM: &str = "guestlist-orig-system";
/// AMQP: the exchange it was published to.
pub const EXCHANGE: &str = "guestlist-orig-exchange";
/// AMQP: the routing key. NATS: the subject.
pub const ROUTING_KEY: &str = "guestlist-orig-routing-key";
/// JetStream: the stream.
pub const STREAM: &str = "guestlist-orig-stream";
/// JetStream: the sequence in the stream.
pub const SEQUENCE: &str = "guestlist-orig-sequence";
/// The original's transport id, since the copy may have one of its own. Empty: it had none.
pub const TRANSPORT_ID: &str = "guestlist-orig-id";
/// A header that the broker acts on, moved aside: this, then its name.
pub const MOVED_HEADER: &str = "guestlist-orig-h-";
/// A property that the broker acts on, moved aside: this, then its name.
pub const MOVED_PROPERTY: &str = "guestlist-orig-p-";

/// A copy of a message, to be published: the message, and the headers of ours that go with it.
#[derive(Debug)]
pub struct Copy<'a> {
    message: &'a Message,
    id: String,
    attempt: u32,
    generation: u32,
    story: Vec<(String, String)>,
}

impl<'a> Copy<'a> {
    /// A copy that goes to a hold queue and comes back, of a message that was tried.
    pub fn hold(message: &'a Message) -> Self {
        let (id, attempt) = (copy_id(message, "hold"), message.attempt());
        Self { message, id, attempt, generation: message.generation(), story: Vec::new() }
    }

    /// A copy that goes to a hold queue and comes back, of a message that was not tried: its
    /// wait is no attempt, or a message that only waited would look exhausted one day.
    pub fn release(message: &'a Message) -> Self {
        Self { attempt: message.attempt().saturating_sub(1), ..Self::hold(message) }
    }

    /// A copy for the dead letters, with its story.
    pub fn dead_letter(message: &'a Message, record: &DeadLetter) -> Self {
        let (id, attempt) = (copy_id(message, "dead"), message.attempt());
        Self { message, id, attempt, generation: message.generation(), story: record.headers() }
    }

    /// A copy of the letter of this id that is worked on again, from attempt 1, in this generation.
    pub fn redrive(message: &'a Message, letter: &str, generation: u32) -> Self {
        // By the letter: two letters of one message are two copies, one letter redriven twice is one.
        let id = blake3::hash(format!("redrive {generation} {letter}").as_bytes()).to_hex()[..32].to_owned();
        Self { message, id, attempt: 0, generation, story: Vec::new() }
    }

    /// What is copied.
    pub fn message(&self) -> &'a Message {
        self.message
    }

    /// The copy's own transport id: the same each time this copy is published, and different
    /// from the original's, which a duplicate window of the broker's would swallow.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Our headers, all printable ASCII or escaped text, without those moved aside.
    pub fn headers(&self) -> Vec<(String, String)> {
        let message = self.message;
        let mut headers = Vec::with_capacity(12 + self.story.len());
        let mut put = |name: &str, value: String| headers.push((name.to_owned(), value));
        if let Some(id) = known_id(message) {
            put(ID, encode(cut(id)));
        }
        put(ATTEMPT, self.attempt.to_string());
        if self.generation > 0 {
            put(GENERATION, self.generation.to_string());
        }
        if let Some(due) = message.due().and_then(|due| due.duration_since(UNIX_EPOCH).ok()) {
            // Up: not even a millisecond early.
            put(DUE, due.as_micros().div_ceil(1000).to_string());
        }
        // Said even if there was none: the one on the copy is the copy's own.
        put(TRANSPORT_ID, message.transport_id().map(|id| encode(cut(id))).unwrap_or_default());
        let source = message.source();
        for (name, value) in [
            (SYSTEM, source.system),
            (QUEUE, &source.queue),
            (EXCHANGE, &source.exchange),
            (ROUTING_KEY, &source.routing_key),
            (STREAM, &source.stream),
        ] {
            // Nothing is a routing key, too: a fanout exchange's messages often have none.
            if !value.is_empty() || name == ROUTING_KEY && !source.exchange.is_empty() {
                put(name, encode(value.as_bytes()));
            }
        }
        if let Some(sequence) = source.sequence {
            put(SEQUENCE, sequence.to_string());
        }
        headers.extend(self.story.iter().cloned());
        headers
    }

    /// What is moved aside: what earlier copies moved, and `now` (full header names and raw
    /// values, see [`MOVED_HEADER`] and [`MOVED_PROPERTY`]). Values come out encoded.
    pub fn moved(&self, now: impl IntoIterator<Item = (String, Bytes)>) -> Vec<(String, String)> {
        let earlier = self.message.copy_marks().moved.iter().cloned();
        let mut seen = HashSet::new();
        let all = earlier.chain(now).map(|(name, value)| (name, encode(&value)));
        all.filter(|entry| seen.insert(entry.clone())).collect()
    }
}

/// The id that dedup found. Not the transport's, as long as nobody looked: the queue may not take
/// that one for an id, and what is on a copy is one.
fn known_id(message: &Message) -> Option<&MessageId> {
    message.identified().map(|found| &found.id).or_else(|| message.logical_id())
}

/// An id that is too long for dedup is no use on a copy either, and could make it too large for the
/// broker: it is cut to one byte too many, so that it is still too long there.
fn cut(id: &MessageId) -> &[u8] {
    let bytes = id.as_bytes();
    &bytes[..bytes.len().min(defaults::MAX_ID + 1)]
}

/// The id of a copy: a hash of what makes it one, so that the same copy has the same id each
/// time and a second failure of the same message in another generation has another.
fn copy_id(message: &Message, purpose: &str) -> String {
    let mut hash = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(purpose.as_bytes());
    if let Some(found) = message.identified() {
        part(found.key.as_bytes());
    } else {
        part(message.id().map_or(&[], MessageId::as_bytes));
        part(message.payload());
    }
    part(&message.generation().to_le_bytes());
    let source = message.source();
    for text in [&source.queue, &source.exchange, &source.routing_key, &source.stream] {
        part(text.as_bytes());
    }
    part(&source.sequence.unwrap_or(0).to_le_bytes());
    hash.finalize().to_hex()[..32].to_owned()
}
