//! [`Listed`]: a letter as an operator sees it.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use jiff::Timestamp;

use crate::broker::copy::{DeadLetter, escape};
use crate::broker::{Letter, Place};
use crate::identity::Ids;
use crate::{DedupKey, Message, MessageId};

/// The longest name that is shown of what may be forged.
const NAME: usize = 64;

/// A dead letter, or whatever else lies among them.
///
/// `Debug` and `Display` are for terminals and logs: the letter's own id, the hashed id, cause, attempts, generation,
/// source, time and size. Never the body, a header's value, the message's id or the error's text: those have a method each.
#[derive(Clone)]
pub struct Listed {
    letter: Letter,
    record: Option<DeadLetter>,
    id: Option<MessageId>,
    key: Option<DedupKey>,
}

impl Listed {
    pub(super) fn new(letter: Letter, ids: &Ids) -> Self {
        let record = DeadLetter::read(&letter.message);
        let id = ids.find(&letter.message);
        let key = id.as_ref().map(|id| ids.scope.key(id));
        Self { letter, record, id, key }
    }

    /// The letter's own id, which names it in a [`Filter`](super::Filter). It says nothing of the message's.
    pub fn id(&self) -> &str {
        &self.letter.id
    }

    /// Why it is here; `None`: somebody else put it here.
    pub fn record(&self) -> Option<&DeadLetter> {
        self.record.as_ref()
    }

    /// The message: headers, source, and the body.
    pub fn message(&self) -> &Message {
        &self.letter.message
    }

    /// The body, as the sender wrote it.
    pub fn body(&self) -> &Bytes {
        self.message().payload()
    }

    /// The message's id, as the queue's [`Identity`](crate::Identity) finds it; `None`: none, or one that is too long.
    pub fn message_id(&self) -> Option<&MessageId> {
        self.id.as_ref()
    }

    /// The id hashed, as it stands in the store and in events.
    pub fn key(&self) -> Option<DedupKey> {
        self.key
    }

    /// How many times an operator had sent it back to work when it failed.
    pub fn generation(&self) -> u32 {
        self.message().generation()
    }

    /// How long ago it failed, or was sent at most, by this machine's clock.
    pub(super) fn age(&self) -> Option<Duration> {
        let failed = self.record.as_ref().and_then(|record| record.failed_at);
        let failed = failed.and_then(|at| UNIX_EPOCH.checked_add(Duration::from_secs(at)));
        let since = failed.or_else(|| self.message().timestamp())?;
        // In the future: the clocks differ, and it is new.
        Some(SystemTime::now().duration_since(since).unwrap_or_default())
    }

    pub(super) fn place(&self) -> Place {
        self.letter.place
    }

    pub(super) fn source_queue(&self) -> Option<&str> {
        self.message().copy_marks().source_queue()
    }

    /// The cause's name, which a stranger may have written.
    pub(super) fn cause(&self) -> Option<String> {
        self.record.as_ref().map(|record| escape(&record.cause, NAME))
    }
}

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { letter, record, key, .. } = self;
        write!(f, "{}", letter.id)?;
        match record {
            Some(record) => {
                write!(f, " cause={} attempts={}", escape(&record.cause, NAME), record.attempts)?;
                if let Some(at) = record.failed_at.and_then(time) {
                    write!(f, " failed={at}")?;
                }
            }
            None => f.write_str(" no record")?,
        }
        if let Some(queue) = self.source_queue() {
            write!(f, " queue={}", escape(queue, NAME))?;
        }
        write!(f, " generation={} bytes={}", self.generation(), self.body().len())?;
        match key {
            Some(key) => write!(f, " key={key}"),
            None => f.write_str(" no id"),
        }
    }
}

fn time(seconds: u64) -> Option<Timestamp> {
    Timestamp::from_second(i64::try_from(seconds).ok()?).ok()
}

impl fmt::Debug for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listed({self})")
    }
}
