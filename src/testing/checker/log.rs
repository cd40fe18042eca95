//! [`Log`]: the entries of one or several processes, in one order.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::entry::{Entry, Marker, What};
use super::lines::{self, ParseError};

/// What happened, in order: within one process as it happened, over several as far as their clocks agree.
///
/// ```
/// use guestlist::testing::checker::{Entry, Log, Marker};
/// let a = Log::parse(r#"{"process":"a","at":10,"event":"received","delivery":1}"#)?;
/// let test = Log::from(vec![Entry::marker("a", 20, Marker::ProcessKilled)]);
/// let log = Log::merge([test, a]);
/// assert_eq!(log.entries().iter().map(|entry| entry.at).collect::<Vec<_>>(), [10, 20]);
/// # Ok::<(), guestlist::testing::checker::ParseError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    entries: Vec<Entry>,
    torn: usize,
}

impl Log {
    /// Reads a log of JSON lines, as a [`LogWriter`](super::LogWriter) writes them. Empty lines are skipped.
    /// A last line without its end that cannot be read was torn by a kill, and is left out.
    ///
    /// Each line is an object. Fields that are not named here are ignored; times are whole microseconds.
    ///
    /// | field | of | meaning |
    /// |---|---|---|
    /// | `process` | all | the process's name |
    /// | `at` | all | when, on a clock that all processes share |
    /// | `event` | all | what happened: `received`, `identified`, `claimed`, `duplicate`, `waited`, `started`, `ran`, `failed`, `completed`, `gap`, `released`, `lease_lost`, `forgotten`, `copied`, `acked`, `returned`, `unsettled`, as [`EventKind`](crate::EventKind) says; or a [`Marker`]: `process_started`, `process_killed`, `store_away`, `store_back`, `store_lost`, `store_restarted`, `clock` |
    /// | `delivery` | events | its number in the process |
    /// | `key` | events with an id; `store_lost` of one id | 32 hexadecimal digits |
    /// | `token` | events with a claim | 16 hexadecimal digits, of no other claim |
    /// | `fence` | with `token` | a number that grows with each claim of a key, over lost records too if it can |
    /// | `until` | optional, with `token` | until when the holder takes its lease to last |
    /// | `attempt` | optional | 1 if missing |
    /// | `generation` | optional | how many times it was redriven; 0 if missing |
    /// | `body` | optional | 8 hexadecimal digits of a hash of the body |
    /// | `before` | `claimed` | how the last holder ended: `first`, `failed`, `handed_back`, `vanished` |
    /// | `cause` | `failed`; `acked` as dead letter; optional with `returned` and `unsettled` | the word of a [`Cause`](crate::Cause) |
    /// | `as` | `released` | `failed`, `deferred`, `not_started`, `interrupted`, `dead_lettered` |
    /// | `outcome` | `acked` | `handled`, `handled_unrecorded`, `handled_unchecked`, `duplicate`, `dead_lettered` |
    /// | `disposition` | `returned` | `requeue`, `release`, `reject`, `abandon`, `ack` |
    /// | `after` | optional with `released` and `returned` | the delay; 0 if missing |
    /// | `ahead` | `clock` | by how much the process's clock is ahead; may be negative |
    ///
    /// # Errors
    ///
    /// [`ParseError`] names the line and the field.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut log = Self::default();
        for (number, line) in text.split_inclusive('\n').enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            match lines::parse(number + 1, line) {
                Ok(entry) => log.entries.push(entry),
                Err(_) if !line.ends_with('\n') => log.torn += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(log)
    }

    /// Reads a log from a file. What a kill tore may not even be UTF-8.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or [`parse`](Self::parse) fails: then the error is of the kind
    /// [`InvalidData`](io::ErrorKind::InvalidData) and holds the [`ParseError`].
    pub fn read(path: impl AsRef<Path>) -> io::Result<Self> {
        let bytes = std::fs::read(path)?;
        Self::parse(&String::from_utf8_lossy(&bytes))
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// One log of several: each one's order is kept, and between them the time decides, with what
    /// [`Marker::Clock`] says taken off.
    pub fn merge(logs: impl IntoIterator<Item = Self>) -> Self {
        let mut timed = Vec::new();
        let mut torn = 0;
        for log in logs {
            torn += log.torn;
            let mut last = 0;
            for (at, entry) in log.times().into_iter().zip(log.entries) {
                last = last.max(at);
                timed.push((last, entry));
            }
        }
        // Stable: what one log says at one time stays in its order.
        timed.sort_by_key(|(at, _)| *at);
        Self { entries: timed.into_iter().map(|(_, entry)| entry).collect(), torn }
    }

    /// The entries, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many last lines were torn and left out.
    pub const fn torn(&self) -> usize {
        self.torn
    }

    /// Adds an entry at the end.
    pub fn push(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// The log as JSON lines.
    pub fn to_lines(&self) -> String {
        self.entries.iter().map(|entry| lines::write(entry) + "\n").collect()
    }

    /// The time of each entry on the clock that all processes share.
    pub(super) fn times(&self) -> Vec<u64> {
        let mut ahead: HashMap<Arc<str>, i64> = HashMap::new();
        let shared = |entry: &Entry| {
            if let What::Marker(Marker::Clock(micros)) = entry.what {
                ahead.insert(Arc::clone(&entry.process), micros);
            }
            let ahead = ahead.get(&entry.process).copied().unwrap_or(0);
            entry.at.saturating_add_signed(ahead.saturating_neg())
        };
        self.entries.iter().map(shared).collect()
    }
}

impl From<Vec<Entry>> for Log {
    fn from(entries: Vec<Entry>) -> Self {
        Self { entries, torn: 0 }
    }
}
