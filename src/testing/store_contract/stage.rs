//! The stage of a case: a key nobody has used, two handles, and waits that end.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{LONG, Pace, StoreFixture};
use crate::DedupKey;
use crate::dedup::protocol::{Ask, Before, Claim, Digest, Fence, Held, Record, Release, Run, Token};
use crate::dedup::{DedupStore, StoreError};

/// What has not happened this long after it was due will not happen.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) const ME: u128 = 1;
pub(super) const OTHER: u128 = 2;
pub(super) const THIRD: u128 = 3;

/// The generation of the messages of a case, unless it says otherwise: one that can be gone below.
pub(super) const GENERATION: u32 = 3;

pub(super) const FAILED: Release = Release::Failed { not_before: Duration::ZERO };
pub(super) const DEFERRED: Release = Release::Deferred { not_before: Duration::ZERO };
/// Every way to give a claim up that leaves the key free at once.
pub(super) const RELEASES: [Release; 4] = [FAILED, DEFERRED, Release::NotStarted, Release::Interrupted];

/// Asks by this token for times that do not end.
pub(super) const fn ask(token: u128) -> Ask {
    Ask {
        token: Token::from_bits(token),
        lease: LONG,
        retain: LONG,
        generation: GENERATION,
        digest: None,
        alone: false,
    }
}

/// As [`ask`], with the suspect permit.
pub(super) const fn alone(token: u128) -> Ask {
    Ask { alone: true, ..ask(token) }
}

/// A key that nobody has used.
pub(super) fn fresh_key() -> DedupKey {
    DedupKey::from_bytes(Token::random().bits().to_le_bytes())
}

/// What the winner of a claim was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Won {
    pub(super) fence: Fence,
    pub(super) attempt: u32,
    pub(super) before: Before,
    pub(super) digest: Option<Digest>,
}

impl Won {
    pub(super) fn of(claim: Claim) -> Option<Self> {
        match claim {
            Claim::Acquired { fence, attempt, before, digest } => {
                Some(Self { fence, attempt, before, digest })
            }
            _ => None,
        }
    }

    /// The attempt, and how the holder before ended.
    pub(super) const fn told(&self) -> (u32, Before) {
        (self.attempt, self.before)
    }
}

/// One key, whose calls go over either handle in turn.
pub(super) struct Key {
    pub(super) id: DedupKey,
    pub(super) pace: Pace,
    handles: [Arc<dyn DedupStore>; 2],
    turn: AtomicUsize,
    /// The fence of each token's last claim: a holder hands it in with its calls.
    fences: Mutex<HashMap<u128, Fence>>,
}

impl Key {
    /// A key that is kept for [`LONG`].
    pub(super) async fn new(fixture: &dyn StoreFixture) -> Self {
        Self::over([fixture.open().await, fixture.open().await], fixture.pace())
    }

    /// A key that is kept for a short time from its last change. Ask with [`Key::briefly`].
    pub(super) async fn kept_briefly(fixture: &dyn StoreFixture) -> Self {
        let pace = fixture.pace();
        let handles = [fixture.open_for(pace.short).await, fixture.open_for(pace.short).await];
        Self::over(handles, pace)
    }

    fn over(handles: [Arc<dyn DedupStore>; 2], pace: Pace) -> Self {
        Self { id: fresh_key(), pace, handles, turn: AtomicUsize::new(0), fences: Mutex::default() }
    }

    /// Another key over the same handles.
    pub(super) fn another(&self) -> Self {
        Self::over(self.handles.clone(), self.pace)
    }

    /// This very key over the same handles.
    pub(super) fn of(&self, id: DedupKey) -> Self {
        Self { id, ..self.another() }
    }

    /// A lease that the case waits for.
    pub(super) fn short(&self, ask: Ask) -> Ask {
        Ask { lease: self.pace.short, ..ask }
    }

    /// A claim, lease and record, for a key that is [`kept_briefly`](Self::kept_briefly).
    pub(super) fn briefly(&self, ask: Ask) -> Ask {
        Ask { lease: self.pace.short, retain: self.pace.short, ..ask }
    }

    /// The handle whose turn it is.
    pub(super) fn handle(&self) -> &Arc<dyn DedupStore> {
        &self.handles[self.turn.fetch_add(1, Ordering::Relaxed) % 2]
    }

    pub(super) async fn claim(&self, ask: Ask) -> Claim {
        let claim = answered("claim", self.handle().claim(&self.id, &ask).await);
        if let Some(won) = Won::of(claim) {
            self.fences().insert(ask.token.bits(), won.fence);
        }
        claim
    }

    /// Claims, and must get it.
    pub(super) async fn acquire(&self, ask: Ask) -> Won {
        let claim = self.claim(ask).await;
        Won::of(claim).unwrap_or_else(|| panic!("{ask:?} must be acquired, not {claim:?}"))
    }

    /// Claims again and again while the answer is `InProgress`, and not for ever.
    pub(super) async fn claim_at_last(&self, ask: Ask) -> Claim {
        self.claim_until(ask, |claim| !matches!(claim, Claim::InProgress { .. })).await
    }

    /// As [`claim_at_last`](Self::claim_at_last), and must get it.
    pub(super) async fn acquire_at_last(&self, ask: Ask) -> Won {
        let claim = self.claim_at_last(ask).await;
        Won::of(claim).unwrap_or_else(|| panic!("{ask:?} must be acquired at last, not {claim:?}"))
    }

    /// Claims again and again until it is acquired: also over what a handle may remember for a
    /// while of a record that is no more.
    pub(super) async fn acquire_in_the_end(&self, ask: Ask) -> Won {
        let claim = self.claim_until(ask, |claim| Won::of(*claim).is_some()).await;
        Won::of(claim).unwrap_or_else(|| unreachable!("it waited for that"))
    }

    /// Claims until the answer is wanted; panics if that takes too long.
    pub(super) async fn claim_until(&self, ask: Ask, wanted: impl Fn(&Claim) -> bool) -> Claim {
        let give_up_at = Instant::now() + self.patience();
        loop {
            let claim = self.claim(ask).await;
            if wanted(&claim) {
                return claim;
            }
            assert!(Instant::now() < give_up_at, "{ask:?} is still answered {claim:?}");
            sleep(self.poll()).await;
        }
    }

    pub(super) async fn renew(&self, token: u128, lease: Duration) -> Held {
        answered("renew", self.handle().renew(&self.id, self.run(token), lease).await)
    }

    pub(super) async fn complete(&self, token: u128) -> Held {
        self.complete_for(token, LONG).await
    }

    pub(super) async fn complete_for(&self, token: u128, window: Duration) -> Held {
        answered("complete", self.handle().complete(&self.id, self.run(token), window).await)
    }

    pub(super) async fn release(&self, token: u128, why: Release) -> Held {
        answered("release", self.handle().release(&self.id, self.run(token), why).await)
    }

    /// Releases, and must be the holder.
    pub(super) async fn give_up(&self, token: u128, why: Release) {
        let held = self.release(token, why).await;
        assert_eq!(held, Held::Yes, "{why:?} by the holder");
    }

    /// Completes, and must be the holder.
    pub(super) async fn finish(&self, token: u128) {
        assert_eq!(self.complete(token).await, Held::Yes, "complete by the holder");
    }

    pub(super) async fn inspect(&self) -> Option<Record> {
        answered("inspect", self.handle().inspect(&self.id).await)
    }

    /// What is on record, a moment before something that must not change it: a time that is set
    /// anew would show.
    pub(super) async fn snapshot(&self) -> Option<Record> {
        let record = self.inspect().await;
        moment().await;
        record
    }

    /// What is on record, which must be something.
    pub(super) async fn record(&self) -> Record {
        self.inspect().await.unwrap_or_else(|| panic!("there must be a record"))
    }

    pub(super) async fn forget(&self) -> bool {
        let there = answered("forget", self.handle().forget(&self.id).await);
        moment().await;
        there
    }

    /// The record vanishes behind the store's back.
    pub(super) async fn lose(&self, fixture: &dyn StoreFixture) {
        fixture.lose(&self.id).await;
        moment().await;
    }

    /// Waits until inspect shows nothing any more; panics if that takes too long.
    pub(super) async fn vanishes(&self) {
        let give_up_at = Instant::now() + self.patience();
        while let Some(record) = self.inspect().await {
            assert!(Instant::now() < give_up_at, "the record is still there: {record:?}");
            sleep(self.poll()).await;
        }
        // The other handle may notice it so much later.
        sleep(self.pace.late).await;
    }

    /// Waits until what was asked for a [short](Pace::short) time is over, by every clock.
    pub(super) async fn pass(&self) {
        sleep(self.pace.short + self.pace.resolution + self.pace.short / 10).await;
    }

    /// Panics if something due this long after `sent` has happened by now too early. The clocks
    /// agree to a thousandth: they may be slewed.
    pub(super) fn not_before(&self, sent: Instant, due: Duration, what: &str) {
        let elapsed = sent.elapsed();
        let by_their_clock = elapsed + elapsed / 1_000 + self.pace.resolution;
        assert!(by_their_clock >= due, "{what}: {elapsed:?} after it was asked for {due:?}");
    }

    /// The run of a token: with the fence it was told, or any.
    pub(super) fn run(&self, token: u128) -> Run {
        let fence = self.fences().get(&token).copied().unwrap_or(Fence(0));
        Run { token: Token::from_bits(token), fence }
    }

    fn fences(&self) -> std::sync::MutexGuard<'_, HashMap<u128, Fence>> {
        self.fences.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn patience(&self) -> Duration {
        self.pace.short + self.pace.late + PATIENCE
    }

    fn poll(&self) -> Duration {
        self.pace.short / 16
    }
}

/// Moves a clock that may be paused: a fence that grows by it alone, since the record is lost, grows when it does.
pub(super) async fn moment() {
    sleep(Duration::from_millis(1)).await;
}

/// The answer; a store that is up has one.
pub(super) fn answered<T>(call: &str, answer: Result<T, StoreError>) -> T {
    answer.unwrap_or_else(|error| panic!("{call} must be answered: {error:?}"))
}

/// The states in which a key can be, for rules that hold in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stand {
    Claimed,
    Expired,
    Released,
    BackingOff,
    Suspect,
    Parked,
    Done,
}

impl Stand {
    pub(super) const ALL: [Self; 7] = [
        Self::Claimed,
        Self::Expired,
        Self::Released,
        Self::BackingOff,
        Self::Suspect,
        Self::Parked,
        Self::Done,
    ];

    /// Brings a new key there: `ME` is on record, with attempt 2 (suspect: 3).
    pub(super) async fn set(self, key: &Key) {
        key.acquire(ask(THIRD)).await;
        key.give_up(THIRD, FAILED).await;
        match self {
            Self::Claimed => {
                key.acquire(ask(ME)).await;
            }
            Self::Expired => {
                key.acquire(key.short(ask(ME))).await;
                key.pass().await;
            }
            Self::Suspect => {
                key.acquire(key.short(ask(OTHER))).await;
                key.pass().await;
                key.acquire_at_last(alone(ME)).await;
                key.give_up(ME, FAILED).await;
            }
            Self::Released => Self::held_then(key, FAILED).await,
            Self::BackingOff => Self::held_then(key, Release::Failed { not_before: LONG }).await,
            Self::Parked => Self::held_then(key, Release::DeadLettered).await,
            Self::Done => {
                key.acquire(ask(ME)).await;
                key.finish(ME).await;
            }
        }
    }

    async fn held_then(key: &Key, why: Release) {
        key.acquire(ask(ME)).await;
        key.give_up(ME, why).await;
    }
}
