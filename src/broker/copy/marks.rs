//! [`Marks`]: what is read back from a copy.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::{
    ATTEMPT, BODY_HASH, CAUSE, DUE, ERROR, EXCHANGE, FAILED_AT, FIRST_FAILED_AT, GENERATION, HISTORY, HOLD,
    ID, MOVED_HEADER, MOVED_PROPERTY, PREFIX, QUEUE, REDRIVEN_AT, ROUTING_KEY, SEQUENCE, STREAM, TIMESTAMP,
    TRANSPORT_ID, decode,
};
use crate::MessageId;
use crate::delay::LONGEST;
use crate::message::{Headers, Source};

/// What a copy of ours carries beside the original. Empty on a message fresh from its sender.
#[derive(Default)]
pub(crate) struct Marks {
    pub(crate) id: Option<MessageId>,
    pub(crate) attempt: u32,
    pub(crate) generation: u32,
    pub(crate) due: Option<SystemTime>,
    pub(crate) timestamp: Option<SystemTime>,
    pub(crate) hold: Option<Duration>,
    pub(crate) redriven_at: Option<SystemTime>,
    /// The original's, empty if it had none.
    pub(crate) transport_id: Option<Bytes>,
    /// Full names and raw values of what was moved aside.
    pub(crate) moved: Vec<(String, Bytes)>,
    /// The rest: source and record.
    pub(super) story: Headers,
}

/// The names of what is there: the ids and values are the sender's.
impl fmt::Debug for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let moved: Vec<_> = self.moved.iter().map(|(name, _)| name).collect();
        f.debug_struct("Marks")
            .field("attempt", &self.attempt)
            .field("generation", &self.generation)
            .field("moved", &moved)
            .field("story", &self.story)
            .finish_non_exhaustive()
    }
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
            TIMESTAMP => self.timestamp = time(value),
            HOLD => self.hold = length(value),
            REDRIVEN_AT => self.redriven_at = seconds(value),
            TRANSPORT_ID => self.transport_id = Some(decode(value)),
            moved if moved.starts_with(MOVED_HEADER) => {
                let original = header_name(&moved[MOVED_HEADER.len()..]);
                // We never move one of ours, nor a header without a name: forged.
                if !original.is_empty() && !original.starts_with(PREFIX) {
                    let value = decode(value);
                    self.moved.push((format!("{MOVED_HEADER}{original}"), value.clone()));
                    headers.push(original, value);
                }
            }
            moved if moved.starts_with(MOVED_PROPERTY) => self.moved.push((name, decode(value))),
            ERROR | CAUSE | FAILED_AT | FIRST_FAILED_AT | HISTORY => self.story.push(name, value.clone()),
            _ => self.story.push(name, decode(value)),
        }
    }

    /// A number of the record.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.story.get_str(name).and_then(|text| text.parse().ok())
    }

    /// 64 hex digits; forged ones of another kind are none.
    pub(super) fn body_hash(&self) -> Option<String> {
        let is_hash = |text: &&str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        self.story.get_str(BODY_HASH).filter(is_hash).map(ToOwned::to_owned)
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

/// Undoes what [`Copy::moved`](super::Copy::moved) did to it.
fn header_name(encoded: &str) -> String {
    String::from_utf8(decode(encoded.as_bytes()).into()).unwrap_or_else(|_| encoded.to_owned())
}

/// A forged number (negative, huge, text) is no number: 0.
fn number(value: &[u8]) -> u32 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// More than the clocks of two machines differ.
pub(super) const CLOCKS_APART: Duration = Duration::from_secs(24 * 60 * 60);

/// Milliseconds since 1970; a forged one is none, and the sender's own header counts again.
fn time(value: &[u8]) -> Option<SystemTime> {
    let millis = std::str::from_utf8(value).ok()?.parse().ok()?;
    no_further(LONGEST, UNIX_EPOCH.checked_add(Duration::from_millis(millis))?)
}

/// Milliseconds; a forged one holds nothing up for longer than we would.
fn length(value: &[u8]) -> Option<Duration> {
    let millis = std::str::from_utf8(value).ok()?.parse().ok()?;
    Some(Duration::from_millis(millis).min(LONGEST))
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
