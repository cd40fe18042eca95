//! [`Filter`]: which letters are meant.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Listed;
use crate::{Cause, MessageId};

/// Which letters are meant: those that fit everything that it names. One that names nothing means all.
///
/// ```
/// use guestlist::Cause;
/// use guestlist::admin::Filter;
/// use std::time::Duration;
///
/// let spent = Filter::new().cause(Cause::Exhausted).cause(Cause::CrashSuspected);
/// let stale = Filter::new().older_than(Duration::from_secs(7 * 24 * 3600));
/// let one = Filter::new().letter("8d1f0c3e5b7a92468d1f0c3e5b7a9246");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Filter {
    causes: Vec<Cause>,
    queues: Vec<String>,
    older_than: Option<Duration>,
    younger_than: Option<Duration>,
    id: Option<MessageId>,
    letter: Option<String>,
    recorded: Option<bool>,
    /// Of the queue with these names, and those that do not say whose they are; empty: of all.
    not_of_others: Vec<String>,
}

impl Filter {
    /// All letters.
    pub fn new() -> Self {
        Self::default()
    }

    /// Letters with this cause; called again, with one of these.
    #[must_use]
    pub fn cause(mut self, cause: Cause) -> Self {
        self.causes.push(cause);
        self
    }

    /// Letters whose record names this queue as their source; called again, one of these. The record of a message that was
    /// split by `nats::split` names the durable.
    ///
    /// Where several queues share a place for their letters, [`redrive`](super::Admin::redrive) and
    /// [`discard`](super::Admin::discard) take those of the admin's queue, and those that do not say where they are from,
    /// unless this names a queue.
    #[must_use]
    pub fn from_queue(mut self, queue: impl Into<String>) -> Self {
        self.queues.push(queue.into());
        self
    }

    /// Letters that failed longer ago than this, by this machine's clock when the walk begins. One that does not say
    /// when it failed does not fit.
    #[must_use]
    pub fn older_than(mut self, age: Duration) -> Self {
        self.older_than = Some(age);
        self
    }

    /// Letters that failed at most this long ago. One that does not say when it failed does not fit.
    #[must_use]
    pub fn younger_than(mut self, age: Duration) -> Self {
        self.younger_than = Some(age);
        self
    }

    /// Letters of the message with this id, as the queue's [`Identity`](crate::Identity) finds it.
    #[must_use]
    pub fn id(mut self, id: MessageId) -> Self {
        self.id = Some(id);
        self
    }

    /// The letter with this [id of its own](Listed::id).
    #[must_use]
    pub fn letter(mut self, id: impl Into<String>) -> Self {
        self.letter = Some(id.into());
        self
    }

    /// Letters with a record: those that guestlist put there.
    #[must_use]
    pub fn with_record(mut self) -> Self {
        self.recorded = Some(true);
        self
    }

    /// Letters without a record: whatever else lies there.
    #[must_use]
    pub fn without_record(mut self) -> Self {
        self.recorded = Some(false);
        self
    }

    /// For what changes letters: another queue's are none of our business, unless they are asked for.
    pub(super) fn sparing_others_than(mut self, names: impl IntoIterator<Item = String>) -> Self {
        if self.queues.is_empty() {
            self.not_of_others = names.into_iter().collect();
        }
        self
    }

    pub(super) fn fits(&self, letter: &Listed, begun: SystemTime) -> bool {
        self.fits_name(letter) && self.fits_record(letter) && self.fits_age(letter, begun)
    }

    fn fits_name(&self, letter: &Listed) -> bool {
        self.letter.as_ref().is_none_or(|id| id == letter.id())
            && self.id.as_ref().is_none_or(|id| letter.message_id() == Some(id))
    }

    fn fits_record(&self, letter: &Listed) -> bool {
        let record = letter.record();
        let own = |name: &String| letter.source_queue().is_none_or(|queue| queue == name);
        one_of(&self.not_of_others, own)
            && self.recorded.is_none_or(|recorded| recorded == record.is_some())
            && one_of(&self.causes, |cause| record.is_some_and(|record| record.cause == cause.name()))
            && one_of(&self.queues, |queue| letter.source_queue() == Some(queue))
    }

    fn fits_age(&self, letter: &Listed, begun: SystemTime) -> bool {
        let failed_at = letter.record().and_then(|record| record.failed_at);
        let failed_at = failed_at.and_then(|at| UNIX_EPOCH.checked_add(Duration::from_secs(at)));
        // A clock that was set back makes it young.
        let age = failed_at.map(|at| begun.duration_since(at).unwrap_or_default());
        self.older_than.is_none_or(|than| age.is_some_and(|age| age > than))
            && self.younger_than.is_none_or(|than| age.is_some_and(|age| age <= than))
    }
}

/// None named, or this is one of them.
fn one_of<T>(named: &[T], is: impl Fn(&T) -> bool) -> bool {
    named.is_empty() || named.iter().any(is)
}
