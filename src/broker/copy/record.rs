//! [`DeadLetter`]: the story that goes with a dead letter.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{CAUSE, ERROR, FAILED_AT, escape};
use crate::message::Source;
use crate::{Cause, Message, defaults};

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

    pub(super) fn headers(&self) -> Vec<(String, String)> {
        let mut headers =
            vec![(CAUSE.to_owned(), self.cause.clone()), (ERROR.to_owned(), self.error.clone())];
        if let Some(at) = self.failed_at {
            headers.push((FAILED_AT.to_owned(), at.to_string()));
        }
        headers
    }
}
