//! [`History`]: the failures of a message, as its copies carry them.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::marks::CLOCKS_APART;
use super::{FIRST_FAILED_AT, HISTORY, escape};
use crate::{Cause, Message, defaults};

/// A failed attempt, as a dead letter's history has it.
///
/// An attempt that left none (its process died) shows as a gap in the attempts' numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PastFailure {
    /// How many times an operator had sent the id back to work.
    pub generation: u32,
    /// Which attempt of that generation it was, from 1.
    pub attempt: u32,
    /// When it failed, in seconds since 1970, by the clock of the machine that it failed on.
    pub at: u64,
    /// Why: see [`Cause::name`].
    pub cause: String,
    /// The beginning of the chain of errors, escaped.
    pub error: String,
}

impl PastFailure {
    pub(crate) fn new(message: &Message, cause: Cause, error: &str) -> Self {
        let (generation, attempt) = (message.generation(), message.attempt());
        Self { generation, attempt, at: now(), cause: cause.name().to_owned(), error: short(error) }
    }

    /// Refusals that spend no attempt come again and again with the same number: one entry.
    fn is_again(&self, other: &Self) -> bool {
        (self.generation, self.attempt) == (other.generation, other.attempt)
    }

    fn write(&self) -> Value {
        let mut entry =
            json!({ "attempt": self.attempt, "at": self.at, "cause": self.cause, "error": self.error });
        if self.generation > 0 {
            entry["generation"] = self.generation.into();
        }
        entry
    }

    /// A forged entry is none, or one as short as ours.
    fn read(entry: &Value) -> Option<Self> {
        let number = |name: &str| entry.get(name).and_then(Value::as_u64);
        let text = |name: &str| entry.get(name).and_then(Value::as_str);
        Some(Self {
            generation: u32::try_from(number("generation").unwrap_or(0)).ok()?,
            attempt: u32::try_from(number("attempt")?).ok()?,
            at: number("at").filter(|at| *at <= latest())?,
            cause: text("cause").filter(|cause| is_word(cause))?.to_owned(),
            error: short(text("error").unwrap_or_default()),
        })
    }
}

/// The last failures of a message and when the first one was. A hint: a stranger may have written it, and a process that
/// died has added nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct History {
    first: Option<u64>,
    /// From the oldest on.
    entries: Vec<PastFailure>,
}

impl History {
    /// What the message's copies carried. Whatever a stranger wrote, it is no longer than ours.
    pub(crate) fn carried(message: &Message) -> Self {
        let story = &message.copy_marks().story;
        let first = story.get_str(FIRST_FAILED_AT).and_then(|at| at.parse().ok());
        let entries = story.get(HISTORY).filter(|text| text.len() <= defaults::HISTORY);
        let entries = entries.and_then(|text| serde_json::from_slice(text).ok());
        let Some(Value::Array(entries)) = entries else {
            return Self { first: first.filter(|at| *at <= latest()), entries: Vec::new() };
        };
        let entries = entries.iter().filter_map(PastFailure::read).collect();
        let mut history = Self { first: first.filter(|at| *at <= latest()), entries };
        history.cut();
        history
    }

    /// Both stories as one, by time.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.first = [self.first, other.first].into_iter().flatten().min();
        self.entries.extend(other.entries.iter().cloned());
        let key = |entry: &PastFailure| (entry.at, entry.generation, entry.attempt);
        self.entries.sort_by_key(key);
        self.entries.dedup_by_key(|entry| key(entry));
        self.cut();
    }

    /// The newest failure comes last, whatever times the others claim.
    pub(crate) fn add(&mut self, newest: PastFailure) {
        self.first = self.first_at().into_iter().chain([newest.at]).min();
        self.entries.retain(|entry| !entry.is_again(&newest));
        self.entries.push(newest);
        self.cut();
    }

    fn cut(&mut self) {
        let oldest = self.entries.len().saturating_sub(defaults::HISTORY_FAILURES);
        self.entries.drain(..oldest);
    }

    /// When the message first failed, as far as is known.
    pub(crate) fn first_at(&self) -> Option<u64> {
        self.first.into_iter().chain(self.entries.iter().map(|entry| entry.at)).min()
    }

    pub(crate) fn into_entries(self) -> Vec<PastFailure> {
        self.entries
    }

    pub(super) fn headers(&self) -> Vec<(String, String)> {
        headers(self.first_at(), &self.entries)
    }

    /// About as much as it takes in memory.
    pub(crate) fn size(&self) -> usize {
        let of = |entry: &PastFailure| size_of::<PastFailure>() + entry.cause.len() + entry.error.len();
        size_of::<Self>() + self.entries.iter().map(of).sum::<usize>()
    }
}

/// What a copy carries of a history.
pub(super) fn headers(first: Option<u64>, entries: &[PastFailure]) -> Vec<(String, String)> {
    let first = first.map(|at| (FIRST_FAILED_AT.to_owned(), at.to_string()));
    let list = || Value::Array(entries.iter().map(PastFailure::write).collect()).to_string();
    let list = (!entries.is_empty()).then(|| (HISTORY.to_owned(), list()));
    first.into_iter().chain(list).collect()
}

/// What the dead-letter layer learned of a failed delivery, for the copies that are made of it and for the log.
#[derive(Debug)]
pub(crate) struct Noted {
    /// The chain of errors: redacted, escaped, at most 1 KiB.
    pub(crate) error: String,
    pub(crate) history: History,
}

/// Ten texts of this size and all that is around them stay below [`defaults::HISTORY`].
const SHORT: usize = 256;
/// The longest of our causes has half of this.
const LONGEST_CAUSE: usize = 32;

/// The beginning of a text, by what it takes as JSON.
fn short(text: &str) -> String {
    let safe = escape(text, SHORT);
    let mut size = 0;
    let too_long = |&(_, c): &(usize, char)| {
        size += if matches!(c, '"' | '\\') { 2 } else { c.len_utf8() };
        size > SHORT
    };
    let end = safe.char_indices().find(too_long).map_or(safe.len(), |(end, _)| end);
    safe[..end].trim_end().to_owned()
}

fn is_word(cause: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    (1..=LONGEST_CAUSE).contains(&cause.len()) && cause.bytes().all(is_letter)
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

/// Another machine's clock may be ahead.
fn latest() -> u64 {
    now().saturating_add(CLOCKS_APART.as_secs())
}
