//! One step of the protocol: the machine decides, a compare-and-set by revision writes.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::Inner;
use super::bucket::{Found, Trouble, Written};
use super::record::Stored;
use crate::DedupKey;
use crate::dedup::protocol::{Machine, Micros, Record, State};
use crate::dedup::store::StoreError;

/// After so many writes that others were faster with, or answers from a replica that is behind, the store
/// counts as away.
const MOST_TRIES: u32 = 10;

/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// What is known of a key.
#[derive(Clone, Debug)]
pub(super) struct View {
    revision: u64,
    stored: Option<Stored>,
    /// Known to be so since then.
    since: Instant,
    /// When the server says that it was written; for show only.
    written: Micros,
    basis: Basis,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Basis {
    /// Remembered, or hoped for. A write proves it right or does not happen; nothing is answered from it.
    Guess,
    /// Read from the leader.
    Read,
    /// Read, and its age was checked against the bucket as it is now.
    Dated,
}

impl View {
    /// Most ids are new: to write at once saves the question.
    pub(super) fn absent() -> Self {
        Self { revision: 0, stored: None, since: Instant::now(), written: 0, basis: Basis::Guess }
    }
}

impl Inner {
    /// Takes one step; answers with what is on record after it.
    pub(super) async fn step<A>(
        &self,
        key: &DedupKey,
        mut view: View,
        event: impl Fn(Machine, Option<Record>) -> (Option<Record>, A) + Send + Sync,
    ) -> Result<(A, Option<Record>), StoreError> {
        let mut tries = Tries::default();
        loop {
            let now = self.clock.now();
            let old = self.record(&view);
            let (new, answer) = event(Machine::at(now), old);
            if view.basis != Basis::Dated && old.is_some_and(|record| rests_on_age(&record, now)) {
                view = self.surer(key, view).await?;
                continue;
            }
            if new == old {
                if view.basis != Basis::Guess {
                    return Ok((answer, old));
                }
                view = self.read(key).await?;
                continue;
            }
            let stored = new.map(|new| self.to_store(&new, old, now, view.revision));
            if stored.as_ref().is_some_and(|stored| stored.fence_base().is_some())
                && self.sightings().is_blind()
            {
                // Without a look nobody knows which fences were given out.
                self.look().await?;
                continue;
            }
            let sent = Instant::now();
            match self.write(key, view.revision, stored.as_ref()).await? {
                Written::As { revision } if self.has_old_fence(stored.as_ref(), sent, revision).await? => {
                    // The same once more, with a fence above those of the bucket that was.
                    view.revision = revision;
                    continue;
                }
                Written::As { revision } => {
                    let stored = stored.map(|stored| stored.written_as(revision));
                    return Ok((answer, self.wrote(key, revision, stored)));
                }
                Written::Conflict if view.basis == Basis::Guess => {}
                Written::Conflict | Written::NotNow => tries.again().await?,
            }
            view = self.read(key).await?;
        }
    }

    /// What is on record, in the server's time: all observers see the same.
    pub(super) async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        let view = self.date(self.read(key).await?).await?;
        let live = Machine::at(self.clock.now()).live(self.record(&view));
        Ok(live.and(view.stored).map(|stored| stored.record(view.written)))
    }

    fn record(&self, view: &View) -> Option<Record> {
        view.stored.as_ref().map(|stored| stored.record(self.clock.at(view.since)))
    }

    fn to_store(&self, new: &Record, old: Option<Record>, now: Micros, expected: u64) -> Stored {
        let claimed = matches!(new.state, State::Claimed { .. });
        let is_new = claimed && old.is_none_or(|old| old.run.fence != new.run.fence);
        let base = is_new.then(|| self.fence_base(old.map(|old| old.run.fence), expected));
        Stored::new(new, now, base)
    }

    /// Whether a new claim may have a fence that is not above all others: its revision was given out before, by
    /// a bucket that is gone or has lost its last writes.
    async fn has_old_fence(
        &self,
        stored: Option<&Stored>,
        sent: Instant,
        revision: u64,
    ) -> Result<bool, StoreError> {
        let Some(base) = stored.and_then(Stored::fence_base) else { return Ok(false) };
        if self.sightings().contradicts(sent, revision) {
            self.sightings().lose_sight();
            self.look().await?;
        }
        Ok(base < self.fence_base(None, revision))
    }

    /// Remembers a claim that is ours, so that its renewal and its end need not read it first.
    fn wrote(&self, key: &DedupKey, revision: u64, stored: Option<Stored>) -> Option<Record> {
        let view = View { revision, stored, since: Instant::now(), written: 0, basis: Basis::Guess };
        let record = self.record(&view);
        if let Some(record) = record {
            self.knows_fence(record.run.fence, revision);
        }
        if record.is_some_and(|record| matches!(record.state, State::Claimed { .. })) {
            self.own.insert(*key, view);
        } else {
            self.own.invalidate(key);
        }
        record
    }

    /// The view to begin with, for who holds a claim.
    pub(super) async fn own_or_read(&self, key: &DedupKey) -> Result<View, StoreError> {
        match self.own.get(key) {
            Some(view) => Ok(view),
            None => self.read(key).await,
        }
    }

    /// Reads from the leader. One that was voted out and does not know it may answer, too, and
    /// with less than this process itself has written: then it is asked again.
    pub(super) async fn read(&self, key: &DedupKey) -> Result<View, StoreError> {
        let mut tries = Tries::default();
        loop {
            let (revision, stored, written) = match self.found(key).await? {
                Found::Nothing => (0, None, 0),
                Found::Deleted { revision } => (revision, None, 0),
                Found::Record { revision, stored, at } => {
                    self.knows_fence(stored.fence(), revision);
                    (revision, Some(stored), at)
                }
            };
            if self.is_news(key, revision) {
                let since = self.sightings().since(revision).unwrap_or_else(Instant::now);
                return Ok(View { revision, stored, since, written, basis: Basis::Read });
            }
            // Or the bucket was made anew, or has lost its last writes: then a look shows it.
            self.look().await?;
            if let Err(error) = tries.again().await {
                self.own.invalidate(key);
                return Err(error);
            }
        }
    }

    /// Whether this is not older than what this process wrote. What is not there at all may have expired.
    fn is_news(&self, key: &DedupKey, revision: u64) -> bool {
        let known = self.own.get(key).map_or(0, |own| own.revision);
        if revision == 0 || revision > known {
            self.own.invalidate(key);
        }
        revision == 0 || revision >= known
    }

    async fn found(&self, key: &DedupKey) -> Result<Found, StoreError> {
        let link = self.link().await?;
        match self.names.read(&link, key).await {
            Ok(found) => Ok(found),
            Err(Trouble::NoBucket(_)) => {
                self.reopen(&link).await?;
                Ok(Found::Nothing)
            }
            Err(Trouble::Other(error)) => Err(error),
        }
    }

    async fn write(
        &self,
        key: &DedupKey,
        expected: u64,
        stored: Option<&Stored>,
    ) -> Result<Written, StoreError> {
        let link = self.link().await?;
        match self.names.write(&link, key, expected, stored).await {
            Ok(written) => Ok(written),
            Err(Trouble::NoBucket(_)) => {
                self.reopen(&link).await?;
                Ok(Written::NotNow)
            }
            Err(Trouble::Other(error)) => Err(error),
        }
    }

    /// One step nearer to a view whose age may be judged. What is remembered is read: its revision may stand for
    /// another claim by now, in a bucket that lost its last writes.
    async fn surer(&self, key: &DedupKey, view: View) -> Result<View, StoreError> {
        match view.basis {
            Basis::Guess => self.read(key).await,
            Basis::Read | Basis::Dated => self.date(view).await,
        }
    }

    /// Before a record is judged by its age, the bucket is looked at once more: it may have been made
    /// anew, or have lost its last writes, since the last look.
    async fn date(&self, view: View) -> Result<View, StoreError> {
        self.look().await?;
        let since = self.sightings().since(view.revision).unwrap_or_else(Instant::now);
        Ok(View { since, basis: Basis::Dated, ..view })
    }
}

/// Whether an end has passed that would not have passed for who has just seen the record for the first time.
fn rests_on_age(record: &Record, now: Micros) -> bool {
    let passed = match record.state {
        State::Claimed { deadline } => deadline <= now,
        State::Released { not_before } => not_before > 0 && not_before <= now,
        State::Parked | State::Done => false,
    };
    passed || record.kept_until <= now
}

/// Bounded, with a pause that grows and has jitter.
#[derive(Default)]
struct Tries(u32);

impl Tries {
    async fn again(&mut self) -> Result<(), StoreError> {
        self.0 += 1;
        if self.0 > MOST_TRIES {
            return Err(StoreError::new(
                "the bucket changes under every write, or its leader answers with what is old: ask again",
            ));
        }
        let longest = Duration::from_millis(1 << self.0).min(LONGEST_PAUSE);
        sleep(longest.mul_f64(rand::random())).await;
        Ok(())
    }
}
