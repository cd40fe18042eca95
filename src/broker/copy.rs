//! Our own copies of messages: what is written on them, and how it is read back.
//!
//! A copy is not verbatim. Body, content type, correlation and application headers are the
//! same; whatever the broker *acts on* (an expiration, a sender-selected route, an expected
//! sequence) is moved aside under a header of ours, so that the copy is not refused, sent
//! elsewhere or expired. Everything of ours is under one prefix, `guestlist-`.
//!
//! Headers of ours that a stranger wrote are hints, never authority: the store counts.
//!
//! # Headers
//!
//! Times are in seconds since 1970 unless it says otherwise. "Encoded": percent-encoded, see [`encode`]; "escaped": see
//! [`escape`]. All but those that are "hold only" are on dead letters; the last column says which other copies have
//! them: those on *hold*, and those that are *redriven*. Without a mark a header is never left out; with ✂ it is, if the
//! letter is too large otherwise.
//!
//! | header | what | also on |
//! |---|---|---|
//! | `guestlist-id` | the id that dedup found, encoded; missing if there was none | hold, redriven |
//! | `guestlist-attempt` | the attempts that were counted when the copy was made | hold, redriven (0) |
//! | `guestlist-generation` | how many times an operator sent the id back to work; missing: never | hold, redriven |
//! | `guestlist-redriven-at` | when that was last done, seconds since 1970; the age of the message counts from then | hold, redriven |
//! | `guestlist-due` | not to be handled before: milliseconds since 1970 | hold, redriven |
//! | `guestlist-cause` | why it is a dead letter, a word: see [`Cause::name`](crate::Cause::name) | |
//! | `guestlist-error` ✂ | the last error and its causes, escaped, at most 1 KiB, redacted | |
//! | `guestlist-first-failed-at` | when it first failed, as far as is known, in any generation | hold, redriven |
//! | `guestlist-failed-at` | when it failed for good | |
//! | `guestlist-history` ✂ | the last ten failures, the newest last: a JSON array of objects with `attempt`, `at`, `cause`, `error` (escaped, 256 bytes, redacted) and, unless it is 0, `generation`. At most 4 KiB | hold, redriven |
//! | `guestlist-consumer` | the name of the [consumer](crate::Consumer::name) that parked it, encoded; missing if it has none | |
//! | `guestlist-truncated` | the body is cut: how many bytes it had | what is made of a cut one |
//! | `guestlist-body-hash` | the body is cut: BLAKE3 of the whole, in hex | the same |
//! | `guestlist-headers-dropped` | the message's headers are left out: how many there were | the same |
//! | `guestlist-copy-id` | AMQP: the copy's own id, by which a letter is named; on NATS it is `Nats-Msg-Id` | hold, redriven |
//! | `guestlist-orig-system` | `rabbitmq`, `nats` or `memory` | hold, redriven |
//! | `guestlist-orig-queue` | the queue, or the durable, encoded | hold, redriven |
//! | `guestlist-orig-exchange` | AMQP: the exchange it was published to, encoded | hold, redriven |
//! | `guestlist-orig-routing-key` | AMQP: the routing key; NATS: the subject; encoded | hold, redriven |
//! | `guestlist-orig-stream`, `guestlist-orig-sequence` | JetStream: where it was stored | hold, redriven |
//! | `guestlist-orig-timestamp` | JetStream: when the original was stored, milliseconds since 1970; the age of the message counts from then | hold only |
//! | `guestlist-hold` | JetStream without message schedules: how many milliseconds after it was stored the copy is handed over | hold only |
//! | `guestlist-orig-id` | the original's transport id, encoded; empty: it had none | hold, redriven |
//! | `guestlist-orig-h-…` | a header that a broker acts on, moved aside, encoded, redacted | hold, redriven |
//! | `guestlist-orig-p-…` | a property that a broker acts on, moved aside, encoded, redacted | hold, redriven |

pub(crate) mod history;
mod marks;
mod record;
#[cfg(test)]
mod tests;
mod text;

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use self::history::History;
pub use self::history::PastFailure;
pub(crate) use self::marks::Marks;
pub use self::record::DeadLetter;
pub use self::text::{decode, encode, escape};
use crate::dead_letter::redaction::Redaction;
use crate::dead_letter::{Field, Redact};
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
/// When an operator last sent it back to work, seconds since 1970: a queue's `max_age` counts from then on.
pub const REDRIVEN_AT: &str = "guestlist-redriven-at";
/// Why it is a dead letter: see [`Cause::name`](crate::Cause::name).
pub const CAUSE: &str = "guestlist-cause";
/// The chain of errors, escaped, at most 1 KiB.
pub const ERROR: &str = "guestlist-error";
/// When the message failed for good, seconds since 1970.
pub const FAILED_AT: &str = "guestlist-failed-at";
/// When the message first failed, as far as is known: seconds since 1970. On hold copies, too.
pub const FIRST_FAILED_AT: &str = "guestlist-first-failed-at";
/// The last failures, see [`PastFailure`]: a JSON array of objects, at most 4 KiB with this name. On hold copies, too.
pub const HISTORY: &str = "guestlist-history";
/// The name of the consumer, if it was given one.
pub const CONSUMER: &str = "guestlist-consumer";
/// How many bytes the body had before it was cut, since nothing takes it whole.
pub const TRUNCATED: &str = "guestlist-truncated";
/// Of a body that was cut: the BLAKE3 hash of the whole one, in hex.
pub const BODY_HASH: &str = "guestlist-body-hash";
/// How many headers the message had before they were left out, since nothing takes them.
pub const HEADERS_DROPPED: &str = "guestlist-headers-dropped";
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
/// JetStream: when the original was stored, milliseconds since 1970. A copy has a time of its own, and would be young for ever.
pub const TIMESTAMP: &str = "guestlist-orig-timestamp";
/// JetStream without message schedules: how many milliseconds after it was stored a copy is handed over.
pub const HOLD: &str = "guestlist-hold";
/// The original's transport id, since the copy may have one of its own. Empty: it had none.
pub const TRANSPORT_ID: &str = "guestlist-orig-id";
/// AMQP: the copy's own id, since its transport id is the original's.
pub const COPY_ID: &str = "guestlist-copy-id";
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
    redriven_at: Option<SystemTime>,
    story: Vec<(String, String)>,
    redaction: Option<Redaction>,
    cut: Cut,
}

/// What of the message a copy goes without.
#[derive(Debug, Default)]
struct Cut {
    body: Option<CutBody>,
    headers: bool,
}

#[derive(Debug)]
struct CutBody {
    left: usize,
    /// Of the whole.
    hash: String,
}

impl<'a> Copy<'a> {
    fn new(message: &'a Message, id: String, story: Vec<(String, String)>) -> Self {
        Self {
            message,
            id,
            attempt: message.attempt(),
            generation: message.generation(),
            redriven_at: message.redriven_at(),
            story,
            redaction: None,
            cut: Cut::default(),
        }
    }

    /// A copy that goes to a hold queue and comes back, of a message that was tried.
    pub fn hold(message: &'a Message) -> Self {
        let history = match message.noted() {
            Some(noted) => noted.history.headers(),
            None => History::carried(message).headers(),
        };
        Self::new(message, copy_id(message, "hold"), history)
    }

    /// A copy that goes to a hold queue and comes back, of a message that was not tried: its
    /// wait is no attempt, or a message that only waited would look exhausted one day.
    pub fn release(message: &'a Message) -> Self {
        Self { attempt: message.attempt().saturating_sub(1), ..Self::hold(message) }
    }

    /// A copy for the dead letters, with its story.
    pub fn dead_letter(message: &'a Message, record: &DeadLetter) -> Self {
        Self::new(message, copy_id(message, "dead"), record.headers())
    }

    /// A copy of the letter of this id that is worked on again, from attempt 1, in this generation. Its age counts from
    /// now. Its history goes on: of a message that fails once more, one can read how it failed before.
    pub fn redrive(message: &'a Message, letter: &str, generation: u32) -> Self {
        // By the letter: two letters of one message are two copies, one letter redriven twice is one.
        let id = blake3::hash(format!("redrive {generation} {letter}").as_bytes()).to_hex()[..32].to_owned();
        let copy = Self::new(message, id, History::carried(message).headers());
        Self { attempt: 0, generation, redriven_at: Some(SystemTime::now()), ..copy }
    }

    /// The same, without what this redaction takes away.
    pub(crate) fn redacted(self, redaction: Option<&Redaction>) -> Self {
        Self { redaction: redaction.cloned(), ..self }
    }

    /// Gives up a part of itself, since it is too large: the history, then the error's text. Then, if it may be cut,
    /// half of its body, again and again, and the headers of the message if all else is gone or the `headers` alone are
    /// too large. `false`: it gets no smaller.
    pub(crate) fn shrink(&mut self, cut: bool, headers: bool) -> bool {
        if self.drop_header(HISTORY) || self.drop_header(ERROR) {
            return true;
        }
        cut && (!headers && self.cut_body() || self.drop_message_headers())
    }

    fn drop_header(&mut self, dropped: &str) -> bool {
        let before = self.story.len();
        self.story.retain(|(name, _)| name != dropped);
        self.story.len() < before
    }

    fn cut_body(&mut self) -> bool {
        let (whole, had) = (self.message.payload(), self.body().len());
        if had > 0 {
            let cut = || CutBody { left: had, hash: blake3::hash(whole).to_string() };
            self.cut.body.get_or_insert_with(cut).left = had / 2;
        }
        had > 0
    }

    fn drop_message_headers(&mut self) -> bool {
        let had = !self.cut.headers && !self.message.headers().is_empty();
        self.cut.headers |= had;
        had
    }

    /// Whether the message could be made of it again.
    pub(crate) fn is_whole(&self) -> bool {
        self.cut.body.is_none() && !self.cut.headers
    }

    /// What is copied.
    pub fn message(&self) -> &'a Message {
        self.message
    }

    /// The copy's body: the message's, or as much of it as the destination takes.
    pub fn body(&self) -> Bytes {
        let whole = self.message.payload();
        self.cut.body.as_ref().map_or_else(|| whole.clone(), |body| whole.slice(..body.left.min(whole.len())))
    }

    /// What becomes of a header of the message's on the copy: whoever publishes it asks for each that it writes as it
    /// is. Those that it moves aside are asked about in [`moved`](Self::moved).
    pub fn redact(&self, header: &str, value: impl FnOnce() -> Bytes) -> Redact {
        match &self.redaction {
            _ if self.cut.headers => Redact::Remove,
            Some(redaction) => redaction.value(Field::Header(header), &value()),
            None => Redact::Keep,
        }
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
        if let Some(at) = self.redriven_at.and_then(|at| at.duration_since(UNIX_EPOCH).ok()) {
            put(REDRIVEN_AT, at.as_secs().to_string());
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
        for (name, value) in self.cut_marks() {
            put(name, value);
        }
        headers.extend(self.story.iter().cloned());
        headers
    }

    /// What says that this is not all of its message. A part of a part is a part of the whole.
    fn cut_marks(&self) -> impl Iterator<Item = (&'static str, String)> {
        let (earlier, body) = (self.message.copy_marks(), self.cut.body.as_ref());
        let length = body.map(|_| self.message.payload().len() as u64);
        let hash = || body.map(|body| body.hash.clone());
        let headers = self.cut.headers.then(|| self.message.headers().len() as u64);
        [
            (TRUNCATED, earlier.number(TRUNCATED).or(length).map(|length| length.to_string())),
            (BODY_HASH, earlier.body_hash().or_else(hash)),
            (HEADERS_DROPPED, earlier.number(HEADERS_DROPPED).or(headers).map(|count| count.to_string())),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
    }

    /// What is moved aside: what earlier copies moved, and `now` (full header names and raw
    /// values, see [`MOVED_HEADER`] and [`MOVED_PROPERTY`]). Values come out encoded.
    pub fn moved(&self, now: impl IntoIterator<Item = (String, Bytes)>) -> Vec<(String, String)> {
        let earlier = self.message.copy_marks().moved.iter().cloned();
        let mut seen = HashSet::new();
        let all = earlier.chain(now).filter_map(|(name, value)| self.aside(&name, &value));
        all.filter(|entry| seen.insert(entry.clone())).collect()
    }

    /// What is left of a header or property that travels aside.
    fn aside(&self, name: &str, value: &[u8]) -> Option<(String, String)> {
        let field = match name.strip_prefix(MOVED_HEADER) {
            Some(header) => Field::Header(header),
            None => Field::Property(name.strip_prefix(MOVED_PROPERTY)?),
        };
        let kept = match &self.redaction {
            _ if self.cut.headers => Redact::Remove,
            Some(redaction) => redaction.value(field, value),
            None => Redact::Keep,
        };
        let encoded = match field {
            Field::Header(header) => format!("{MOVED_HEADER}{}", encode_name(header)),
            _ => name.to_owned(),
        };
        match kept {
            Redact::Keep => Some((encoded, encode(value))),
            Redact::Remove => None,
            Redact::Replace(text) => Some((encoded, encode(text.as_bytes()))),
        }
    }
}

/// The name of a header, as it travels aside. Not as it was, even where it could: a NATS server of 2.9 looks for the text
/// `Nats-Msg-Id` in all of the headers, and takes one that was moved for the copy's own, so that it knows no duplicate.
fn encode_name(name: &str) -> String {
    let text = encode(name.as_bytes());
    let acted_on = text.get(..5).is_some_and(|prefix| prefix.eq_ignore_ascii_case("nats-"));
    if acted_on { format!("%{:02X}{}", text.as_bytes()[0], &text[1..]) } else { text }
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
    match message.identified() {
        Some(found) => part(found.key.as_bytes()),
        None => part(message.id().map_or(&[], MessageId::as_bytes)),
    }
    // Two messages may have one id, and none of them may pass for a copy of the other.
    part(message.payload());
    part(&message.generation().to_le_bytes());
    let source = message.source();
    // Core NATS has nothing by which two deliveries that say the same could be told apart, and never delivers one twice.
    if source.system == "nats" && source.sequence.is_none() {
        part(&crate::random::bits().to_le_bytes());
    }
    for text in [&source.queue, &source.exchange, &source.routing_key, &source.stream] {
        part(text.as_bytes());
    }
    part(&source.sequence.unwrap_or(0).to_le_bytes());
    hash.finalize().to_hex()[..32].to_owned()
}
