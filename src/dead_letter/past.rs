//! [`Past`]: what this process remembers of the failures of ids that are not done.

use std::sync::Arc;
use std::time::Duration;

use moka::policy::EvictionPolicy;
use moka::sync::Cache;

use crate::broker::copy::escape;
use crate::broker::copy::history::{History, Noted, PastFailure};
use crate::dead_letter::redaction::Redaction;
use crate::{Cause, DedupKey, Failure, Message, defaults};

/// A delivery that the broker hands out again carries no story, only copies do: `nak` has no room for one. So each
/// process keeps what it saw itself.
#[derive(Clone)]
pub(super) struct Past(Cache<DedupKey, Arc<History>>);

impl Past {
    /// Each story is kept for this long after its last failure, as an id's attempts are.
    pub(super) fn new(kept: Duration) -> Self {
        let weight = |_: &DedupKey, story: &Arc<History>| u32::try_from(story.size()).unwrap_or(u32::MAX);
        let stories = Cache::builder()
            .max_capacity(defaults::HISTORY_MEMORY)
            .weigher(weight)
            .eviction_policy(EvictionPolicy::lru())
            // moka takes no more than a thousand years.
            .time_to_live(kept.min(LONGEST));
        Self(stories.build())
    }

    /// Adds a failure to the message's story.
    pub(super) fn note(
        &self,
        message: &Message,
        failure: &Failure,
        redaction: Option<&Redaction>,
    ) -> Arc<Noted> {
        let error = match redaction {
            Some(redaction) => redaction.error(failure.chain()),
            None => failure.chain(),
        };
        let error = escape(&error, defaults::ERROR_TEXT);
        let history = self.history(message, failure, &error);
        message.note(Noted { error, history })
    }

    fn history(&self, message: &Message, failure: &Failure, error: &str) -> History {
        let mut history = History::carried(message);
        // Without a claim nobody has seen that it is this id's: another body may bear it.
        let key = failure.claim().and(message.identified()).map(|found| found.key);
        if let Some(remembered) = key.and_then(|key| self.0.get(&key)) {
            history.merge(&remembered);
        }
        // A copy of what is parked already did not fail anew.
        if failure.cause() != Cause::Parked {
            history.add(PastFailure::new(message, failure.origin(), error));
        }
        if let Some(key) = key {
            self.0.insert(key, Arc::new(history.clone()));
        }
        history
    }
}

const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
