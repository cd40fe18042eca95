//! Our own copies of messages: what is written on them, and how it is read back.
//!
//! A copy is not verbatim. Body, content type, correlation and application headers are the
//! same; whatever the broker *acts on* (an expiration, a sender-selected route, an expected
//! sequence) is moved aside under a header of ours, so that the copy is not refused, sent
//! elsewhere or expired. Everything of ours is under one prefix, `guestlist-`.
//!
//! Headers of ours that a stranger wrote are hints, never authority: the store counts.

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use crate::delay::LONGEST;
use crate::message::{Headers, Source};
use crate::{Cause, Message, MessageId, defaults};

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
/// Why it is a dead letter: see [`Cause::name`].
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
}

impl<'a> Copy<'a> {
    /// A copy that goes to a hold queue and comes back, of a message that was tried.
    pub fn hold(message: &'a Message) -> Self {
        Self::of(message, copy_id(message, "hold"))
    }

    /// A copy that goes to a hold queue and comes back, of a message that was not tried: its
    /// wait is no attempt, or a message that only waited would look exhausted one day.
    pub fn release(message: &'a Message) -> Self {
        Self { attempt: message.attempt().saturating_sub(1), ..Self::hold(message) }
    }

    /// A copy for the dead letters, with its story.
    pub fn dead_letter(message: &'a Message, record: &DeadLetter) -> Self {
        Self { story: record.headers(), ..Self::of(message, copy_id(message, "dead")) }
    }

    /// A copy of the letter of this id that is worked on again, from attempt 1, in this generation. Its age counts from now.
    pub fn redrive(message: &'a Message, letter: &str, generation: u32) -> Self {
        // By the letter: two letters of one message are two copies, one letter redriven twice is one.
        let id = blake3::hash(format!("redrive {generation} {letter}").as_bytes()).to_hex()[..32].to_owned();
        Self { attempt: 0, generation, redriven_at: Some(SystemTime::now()), ..Self::of(message, id) }
    }

    fn of(message: &'a Message, id: String) -> Self {
        Self {
            message,
            id,
            attempt: message.attempt(),
            generation: message.generation(),
            redriven_at: message.redriven_at(),
            story: Vec::new(),
        }
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

/// The story of a dead letter: why it is here, and where it came from.
///
/// ```
/// use guestlist::broker::copy::DeadLetter;
/// use guestlist::{Cause, Message};
/// let letter = Message::builder("{}").header("guestlist-cause", "exhausted").header("guestlist-attempt", "5").build();
/// let record = DeadLetter::read(&letter).unwrap();
/// assert_eq!(record.cause, "exhausted");
/// assert_eq!(record.attempts, 5);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The cause's name, see [`Cause::name`].
    pub cause: String,
    /// The chain of errors, escaped, at most 1 KiB.
    pub error: String,
    /// How many times the id was tried.
    pub attempts: u32,
    /// When it failed for good, in seconds since 1970.
    pub failed_at: Option<u64>,
    /// Where it came from.
    pub source: Source,
}

impl DeadLetter {
    pub(crate) fn new(message: &Message, cause: Cause, error: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok();
        Self {
            cause: cause.name().to_owned(),
            error: escape(error, defaults::ERROR_TEXT),
            attempts: message.attempt(),
            failed_at: now.map(|now| now.as_secs()),
            source: message.source().clone(),
        }
    }

    /// Reads the story of a dead letter; `None` if the message is not one.
    pub fn read(letter: &Message) -> Option<Self> {
        let marks = letter.copy_marks();
        let text = |name| marks.story.get_str(name).map(ToOwned::to_owned);
        Some(Self {
            cause: text(CAUSE)?,
            error: text(ERROR).unwrap_or_default(),
            attempts: marks.attempt,
            failed_at: marks.story.get_str(FAILED_AT).and_then(|at| at.parse().ok()),
            source: letter.source().clone(),
        })
    }

    fn headers(&self) -> Vec<(String, String)> {
        let mut headers =
            vec![(CAUSE.to_owned(), self.cause.clone()), (ERROR.to_owned(), self.error.clone())];
        if let Some(at) = self.failed_at {
            headers.push((FAILED_AT.to_owned(), at.to_string()));
        }
        headers
    }
}

/// What a copy of ours carries beside the original. Empty on a message fresh from its sender.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    pub(crate) id: Option<MessageId>,
    pub(crate) attempt: u32,
    pub(crate) generation: u32,
    pub(crate) due: Option<SystemTime>,
    pub(crate) redriven_at: Option<SystemTime>,
    /// The original's, empty if it had none.
    pub(crate) transport_id: Option<Bytes>,
    /// Full names and raw values of what was moved aside.
    pub(crate) moved: Vec<(String, Bytes)>,
    /// The rest: source and record.
    story: Headers,
}

impl Marks {
    /// Takes our headers out of `headers`, and puts those that were moved aside back in.
    pub(crate) fn take_from(headers: &mut Headers) -> Self {
        let mut marks = Self::default();
        for (name, value) in headers.take(|name| name.starts_with(PREFIX)) {
            marks.read(headers, name, &value);
        }
        marks
    }

    fn read(&mut self, headers: &mut Headers, name: String, value: &Bytes) {
        match name.as_str() {
            ID => self.id = MessageId::new(decode(value)),
            ATTEMPT => self.attempt = number(value),
            GENERATION => self.generation = number(value),
            DUE => self.due = time(value),
            REDRIVEN_AT => self.redriven_at = seconds(value),
            TRANSPORT_ID => self.transport_id = Some(decode(value)),
            moved if moved.starts_with(MOVED_HEADER) => {
                let original = &moved[MOVED_HEADER.len()..];
                // We never move one of ours, nor a header without a name: forged.
                if !original.is_empty() && !original.starts_with(PREFIX) {
                    let value = decode(value);
                    headers.push(original, value.clone());
                    self.moved.push((name, value));
                }
            }
            moved if moved.starts_with(MOVED_PROPERTY) => self.moved.push((name, decode(value))),
            ERROR | CAUSE | FAILED_AT => self.story.push(name, value.clone()),
            _ => self.story.push(name, decode(value)),
        }
    }

    /// The queue that the original came from, if the copy says so.
    pub(crate) fn source_queue(&self) -> Option<&str> {
        self.story.get_str(QUEUE)
    }

    /// Shows the original's source in place of the copy's.
    pub(crate) fn restore_source(&self, source: &mut Source) {
        let restore = |field: &mut String, name| {
            if let Some(text) = self.story.get_str(name) {
                text.clone_into(field);
            }
        };
        restore(&mut source.queue, QUEUE);
        restore(&mut source.exchange, EXCHANGE);
        restore(&mut source.routing_key, ROUTING_KEY);
        restore(&mut source.stream, STREAM);
        if let Some(sequence) = self.story.get_str(SEQUENCE).and_then(|s| s.parse().ok()) {
            source.sequence = Some(sequence);
        }
    }
}

/// A forged number (negative, huge, text) is no number: 0.
fn number(value: &[u8]) -> u32 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// More than the clocks of two machines differ.
const CLOCKS_APART: Duration = Duration::from_secs(24 * 60 * 60);

/// Milliseconds since 1970; a forged one is none, and the sender's own header counts again.
fn time(value: &[u8]) -> Option<SystemTime> {
    let millis = std::str::from_utf8(value).ok()?.parse().ok()?;
    no_further(LONGEST, UNIX_EPOCH.checked_add(Duration::from_millis(millis))?)
}

/// Seconds since 1970, not in the future: with a forged one a message would be young for ever.
fn seconds(value: &[u8]) -> Option<SystemTime> {
    let seconds = std::str::from_utf8(value).ok()?.parse().ok()?;
    no_further(Duration::ZERO, UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?)
}

/// We write no time further ahead than this; the other machine's clock may be ahead.
fn no_further(ahead: Duration, time: SystemTime) -> Option<SystemTime> {
    (time <= SystemTime::now() + ahead + CLOCKS_APART).then_some(time)
}

/// Percent-encodes everything but visible ASCII, and `%`: any bytes travel as a header value.
///
/// ```
/// use guestlist::broker::copy::{decode, encode};
/// assert_eq!(encode(b"order-17"), "order-17");
/// assert_eq!(encode(b"a\r\n%"), "a%0D%0A%25");
/// assert_eq!(decode(b"a%0D%0A%25"), "a\r\n%");
/// ```
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_graphic() && byte != b'%' {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

/// Undoes [`encode`]; what is not encoded stays as it is.
pub fn decode(text: &[u8]) -> Bytes {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'%', [high, low, after @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                bytes.push(hex(*high) * 16 + hex(*low));
                rest = after;
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    bytes.into()
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit.wrapping_sub(b'A').wrapping_add(10),
    }
}

/// Makes any text safe as a header value and in a log: control characters (a CR or LF would panic
/// in one client and corrupt another's frame) and invisible ones that break lines or turn the
/// direction of writing are escaped, and it ends after at most `max` bytes.
///
/// ```
/// use guestlist::broker::copy::escape;
/// assert_eq!(escape("no\r\nway", 100), "no\\r\\nway");
/// assert_eq!(escape("é é", 3), "é");
/// ```
pub fn escape(text: &str, max: usize) -> String {
    let mut safe = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        let start = safe.len();
        if c.is_control() || is_invisible(c) {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
        if safe.len() > max {
            safe.truncate(start);
            break;
        }
    }
    safe.trim().to_owned()
}

fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}
