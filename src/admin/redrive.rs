//! [`Redrive`]: letters go back to work.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, sleep_until};

use super::decide::{Decision, Facts, Wish, decide};
use super::walk::{Act, Bounds};
use super::{Fate, Listed, Treated};
use crate::broker::{Broker, Copy, Destination, Letters};
use crate::dedup::protocol::Record;
use crate::dedup::{self, DedupStore};
use crate::{CancellationToken, Cause, Error};

/// How letters are sent back to work. By default: each to its own queue, as fast as the broker confirms, all of them, and
/// none whose message was handled meanwhile.
#[derive(Clone, Debug, Default)]
pub struct Redrive {
    rate: Option<u32>,
    pub(super) to: Option<Destination>,
    pub(super) wish: Wish,
    pub(super) dry_run: bool,
    pub(super) bounds: Bounds,
}

impl Redrive {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// At most this many letters a second, evenly: so that those who are working keep room. 0 is refused.
    #[must_use]
    pub fn rate(mut self, letters_per_second: u32) -> Self {
        self.rate = Some(letters_per_second);
        self
    }

    /// To this place instead of the queue. Whoever consumes it looks the id up in a scope of its own.
    #[must_use]
    pub fn to(mut self, place: impl Into<Destination>) -> Self {
        self.to = Some(place.into());
        self
    }

    /// Only says what would become of each letter: nothing is published, removed or forgotten.
    #[must_use]
    pub fn dry_run(mut self) -> Self {
        self.dry_run = true;
        self
    }

    /// Ends after this many were redriven.
    #[must_use]
    pub fn limit(mut self, letters: u64) -> Self {
        self.bounds.limit = Some(letters);
        self
    }

    /// Ends between two letters when this is cancelled.
    #[must_use]
    pub fn until(mut self, cancelled: CancellationToken) -> Self {
        self.bounds.until = cancelled;
        self
    }

    /// Removes letters whose id is done already, instead of leaving them. Never one with the cause `id_conflict`: it is
    /// another message than the one that is done.
    #[must_use]
    pub fn discard_done(mut self) -> Self {
        self.wish.discard_done = true;
        self
    }

    /// Sends letters back of whose ids the store knows nothing any more as well, instead of [leaving them](Fate::Forgotten).
    ///
    /// What that can repeat: the effects of a message that was sent again and handled, or whose redriven copy was handled
    /// before a redrive was interrupted, longer ago than the queue's [window](crate::Queue::window).
    #[must_use]
    pub fn also_forgotten(mut self) -> Self {
        self.wish.forgotten = true;
        self
    }

    /// Sends each letter back whatever is on record for its id, and also if it was [cut](super::Fate::Incomplete): forgets
    /// the record first, then publishes.
    ///
    /// What that can repeat: the effects of a message that is done already; of one that is at work at this moment, whose
    /// claim is forgotten under its handler's hands; and, killed between the two steps or before the letter is removed
    /// and started again, of the one letter in flight. Killed between the two steps, it should not be started again
    /// within a [minute](crate::dedup::NearCache::MAX_AGE) where other processes have a
    /// [`NearCache`](crate::dedup::NearCache): how high a generation they have seen is forgotten as well.
    #[must_use]
    pub fn force(mut self) -> Self {
        self.wish.force = true;
        self
    }

    /// The rate, if it is one.
    pub(super) fn pace(&self) -> Option<Pace> {
        let rate = self.rate.map_or(Some(None), |rate| NonZeroU32::new(rate).map(Some))?;
        Some(Pace { between: rate.map(|rate| Duration::from_secs(1) / rate.get()), next: Instant::now() })
    }
}

/// How far a redrive may be behind its rate and still catch up: timers are as coarse as a millisecond.
const CATCH_UP: Duration = Duration::from_millis(100);

/// When the next letter may go.
#[derive(Debug)]
pub(super) struct Pace {
    between: Option<Duration>,
    next: Instant,
}

impl Pace {
    async fn ready(&self) {
        if self.between.is_some() {
            sleep_until(self.next).await;
        }
    }

    /// A letter went.
    fn went(&mut self) {
        if let Some(between) = self.between {
            // From when it was due: what a slow confirmation or a coarse timer cost is caught up, in small.
            let now = Instant::now();
            self.next = (self.next + between).max(now.checked_sub(CATCH_UP).unwrap_or(now));
        }
    }
}

/// Sends one letter after the other back to work.
pub(super) struct Redriver {
    pub(super) broker: Arc<dyn Broker>,
    /// `None`: nobody but the consumer's process can ask it.
    pub(super) store: Option<Arc<dyn DedupStore>>,
    pub(super) to: Destination,
    /// How long the queue remembers what is done.
    pub(super) window: Duration,
    pub(super) wish: Wish,
    pub(super) dry_run: bool,
    pub(super) pace: Pace,
}

#[async_trait]
impl Act for Redriver {
    type Item = Treated;

    async fn ready(&mut self) {
        if !self.dry_run {
            self.pace.ready().await;
        }
    }

    /// record → decision → copy, confirmed and routed → only then the letter goes.
    async fn treat(
        &mut self,
        letter: Listed,
        letters: &mut dyn Letters,
    ) -> Result<(Treated, Option<Fate>), Error> {
        let record = self.record(&letter).await?;
        let decision = decide(self.facts(&letter, record.as_ref()), record.as_ref(), self.wish);
        let fate =
            if self.dry_run { would(decision) } else { self.carry_out(decision, &letter, letters).await? };
        let generation = match decision {
            Decision::Publish(generation) | Decision::ForgetAndPublish(generation)
                if fate == Fate::Redriven =>
            {
                Some(generation)
            }
            _ => None,
        };
        let treated = Treated { letter, fate, generation, dry_run: self.dry_run };
        if !self.dry_run {
            self.tell(&treated);
        }
        Ok((treated, Some(fate)))
    }
}

impl Redriver {
    /// What is on record for the letter's id.
    async fn record(&self, letter: &Listed) -> Result<Option<Record>, Error> {
        let (Some(store), Some(key)) = (&self.store, letter.key()) else {
            return Ok(None);
        };
        let found = store.inspect(&key).await;
        found.map_err(|error| {
            Error::of_letter(letter.id(), "was not redriven: its store does not answer", error)
        })
    }

    fn facts(&self, letter: &Listed, record: Option<&Record>) -> Facts {
        let cause = letter.record().map(|record| record.cause.as_str());
        let on_record = record.and_then(|record| record.digest);
        // Where there is no id, or no store that could be asked, nothing is ever on record.
        let looked_up = self.store.is_some() && letter.key().is_some();
        Facts {
            generation: letter.generation(),
            cut: letter.record().is_some_and(|record| !record.is_whole()),
            stale: looked_up && letter.age().is_none_or(|age| age >= self.window),
            id_conflict: cause == Some(Cause::IdConflict.name()),
            other_body: on_record.is_some_and(|digest| digest != dedup::digest(letter.message())),
        }
    }

    async fn carry_out(
        &mut self,
        decision: Decision,
        letter: &Listed,
        letters: &mut dyn Letters,
    ) -> Result<Fate, Error> {
        let fate = match decision {
            Decision::Leave(fate) => return Ok(fate),
            Decision::Remove(fate) => fate,
            Decision::Publish(generation) => self.publish(letter, generation).await?,
            Decision::ForgetAndPublish(generation) => {
                self.forget(letter).await?;
                self.publish(letter, generation).await?
            }
        };
        if !fate.stays() {
            let what = "was treated, but its removal was not confirmed: it may still be there";
            letters
                .remove(letter.place())
                .await
                .map_err(|error| Error::of_letter(letter.id(), what, error))?;
        }
        Ok(fate)
    }

    async fn forget(&self, letter: &Listed) -> Result<(), Error> {
        if let (Some(store), Some(key)) = (&self.store, letter.key()) {
            let what = "was not redriven: its record could not be forgotten";
            store.forget(&key).await.map_err(|error| Error::of_letter(letter.id(), what, error))?;
        }
        Ok(())
    }

    async fn publish(&mut self, letter: &Listed, generation: u32) -> Result<Fate, Error> {
        let mut copy = Copy::redrive(letter.message(), letter.id(), generation);
        self.pace.went();
        loop {
            match self.broker.publish(&self.to, &copy).await {
                Ok(()) => return Ok(Fate::Redriven),
                // A message that fits is not refused for the history that we add to it.
                Err(error) if error.is_too_large() && copy.shrink(false, false) => {}
                // The next one may be smaller.
                Err(error) if error.is_too_large() => return Ok(Fate::TooLarge),
                Err(error) => {
                    let what = format!("was not seen to arrive at `{}`, and stays", self.to.name());
                    return Err(Error::of_letter(letter.id(), &what, error));
                }
            }
        }
    }

    fn tell(&self, treated: &Treated) {
        let Treated { letter, fate, generation, .. } = treated;
        tracing::info!(
            target: "guestlist", letter = letter.id(), key = letter.key().map(tracing::field::display),
            cause = letter.cause(), fate = fate.name(), generation, to = self.to.name(),
            "a letter was to be redriven"
        );
    }
}

/// What a dry run says.
fn would(decision: Decision) -> Fate {
    match decision {
        Decision::Publish(_) | Decision::ForgetAndPublish(_) => Fate::Redriven,
        Decision::Remove(fate) | Decision::Leave(fate) => fate,
    }
}
