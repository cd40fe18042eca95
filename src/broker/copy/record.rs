//! [`DeadLetter`]: the story that goes with a dead letter.

use super::history::{self, History, PastFailure};
use super::{CAUSE, CONSUMER, ERROR, FAILED_AT, HEADERS_DROPPED, SYSTEM, TRUNCATED, encode, escape};
use crate::message::Source;
use crate::{Cause, Message, MessageId, defaults};

/// The story of a dead letter: why it is here, and where it came from.
///
/// ```
/// use guestlist::broker::copy::DeadLetter;
/// use guestlist::{Cause, Message};
/// let letter = Message::builder("{}").header("guestlist-cause", "exhausted").header("guestlist-attempt", "5").build();
/// let record = DeadLetter::read(&letter).unwrap();
/// assert_eq!(record.cause, "exhausted");
/// assert_eq!(record.attempts, 5);
/// assert!(record.is_whole());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The cause's name, see [`Cause::name`].
    pub cause: String,
    /// The chain of errors, escaped, at most 1 KiB. Empty if the letter had no room for it.
    pub error: String,
    /// The message's id.
    pub id: Option<MessageId>,
    /// How many times an operator had sent it back to work.
    pub generation: u32,
    /// How many times the id was tried, in this generation.
    pub attempts: u32,
    /// When it first failed, in seconds since 1970, as far as is known; in any generation.
    pub first_failed_at: Option<u64>,
    /// When it failed for good, in seconds since 1970.
    pub failed_at: Option<u64>,
    /// Its last failures, from the oldest on, at most ten. They are what its copies carried and what the process that
    /// parked it had seen itself: over several processes on JetStream, which hands a message out again as it is, some
    /// may be missing. Empty if the letter had no room for them.
    pub history: Vec<PastFailure>,
    /// Where it came from.
    pub source: Source,
    /// The name of the consumer that parked it, if it has one: see [`Consumer::name`](crate::Consumer::name).
    pub consumer: Option<String>,
    /// How many bytes the message had, if the letter's body is only the beginning of it.
    pub truncated: Option<u64>,
    /// Of a body that was cut: the BLAKE3 hash of the whole one, in hex.
    pub body_hash: Option<String>,
    /// How many headers the message had, if the letter has none of them.
    pub headers_dropped: Option<u64>,
}

impl DeadLetter {
    /// With what the message's copies carried of its history.
    pub(crate) fn new(message: &Message, cause: Cause, error: &str) -> Self {
        let record = Self {
            cause: cause.name().to_owned(),
            error: escape(error, defaults::ERROR_TEXT),
            id: message.id().cloned(),
            generation: message.generation(),
            attempts: message.attempt(),
            first_failed_at: None,
            failed_at: Some(history::now()),
            history: Vec::new(),
            source: message.source().clone(),
            consumer: None,
            truncated: None,
            body_hash: None,
            headers_dropped: None,
        };
        record.with_history(History::carried(message))
    }

    pub(crate) fn with_history(self, history: History) -> Self {
        let first_failed_at = history.first_at().or(self.failed_at);
        Self { first_failed_at, history: history.into_entries(), ..self }
    }

    pub(crate) fn with_consumer(self, consumer: Option<&str>) -> Self {
        Self { consumer: consumer.map(|name| escape(name, LONGEST_NAME)), ..self }
    }

    /// Reads the story of a dead letter; `None` if the message is not one.
    pub fn read(letter: &Message) -> Option<Self> {
        let marks = letter.copy_marks();
        let text = |name| marks.story.get_str(name).map(ToOwned::to_owned);
        let history = History::carried(letter);
        Some(Self {
            cause: text(CAUSE)?,
            error: text(ERROR).unwrap_or_default(),
            id: letter.id().cloned(),
            generation: letter.generation(),
            attempts: marks.attempt,
            first_failed_at: history.first_at(),
            failed_at: marks.number(FAILED_AT),
            history: history.into_entries(),
            source: source(letter),
            consumer: text(CONSUMER),
            truncated: marks.number(TRUNCATED),
            body_hash: marks.body_hash(),
            headers_dropped: marks.number(HEADERS_DROPPED),
        })
    }

    /// Whether the letter has all of its message. One that has not must not be worked on again as if it had.
    pub fn is_whole(&self) -> bool {
        self.truncated.is_none() && self.headers_dropped.is_none()
    }

    pub(super) fn headers(&self) -> Vec<(String, String)> {
        let mut headers =
            vec![(CAUSE.to_owned(), self.cause.clone()), (ERROR.to_owned(), self.error.clone())];
        headers.extend(self.failed_at.map(|at| (FAILED_AT.to_owned(), at.to_string())));
        headers.extend(self.consumer.iter().map(|name| (CONSUMER.to_owned(), encode(name.as_bytes()))));
        headers.extend(history::headers(self.first_failed_at, &self.history));
        headers
    }
}

/// Of a consumer's name: the record must fit.
const LONGEST_NAME: usize = 256;

/// The original's. Its broker may be another one than the letter lies at.
fn source(letter: &Message) -> Source {
    let mut source = letter.source().clone();
    let system = letter.copy_marks().story.get_str(SYSTEM);
    let known = ["rabbitmq", "nats", "memory"].into_iter().find(|known| Some(*known) == system);
    source.system = known.unwrap_or(source.system);
    source
}
