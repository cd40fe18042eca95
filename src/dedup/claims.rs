//! The claims in hand of one queue: asked for, renewed by one sweep, completed, released.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::guard::{HeldClaim, Unanswered};
use super::protocol::{Ask, Before, Claim, Fence, Held, Release, Run};
use super::store::{DedupStore, StoreError};
use super::suspects::SuspectPermit;
use crate::backoff::Backoff;
use crate::clock::{after, from_now};
use crate::defaults;
use crate::events::{Claimant, EventKind, Events};
use crate::pause::{Away, Gate};
use crate::settlement::{Completion, Renewal, completion, ours_to_settle, renewal};
use crate::{DedupKey, Message};

/// How many renewals are on their way to a remote store at once.
const RENEWALS_AT_ONCE: usize = 64;

/// A run that is this far past `max_run` and has not returned blocks its thread: others are dropped at that time.
const STUCK: Duration = Duration::from_secs(1);

/// For how long a store that did not answer is taken to be away, in a queue that does not pause.
const AWAY: Duration = Duration::from_secs(1);

/// The lengths that a queue's claims go by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lengths {
    pub(crate) lease: Duration,
    pub(crate) window: Duration,
    /// The longest backoff that is planned for its failures.
    pub(crate) backoff: Duration,
    pub(crate) max_run: Duration,
    pub(crate) pause_hold: Duration,
}

impl Lengths {
    pub(crate) fn retain(&self) -> Duration {
        retain(self.window, self.backoff)
    }

    /// Below lease / 3 by law, so that an unknown answer can be asked again within the lease.
    pub(crate) fn store_call(&self) -> Duration {
        self.lease / defaults::STORE_CALLS_PER_LEASE
    }

    fn renewal(&self) -> Duration {
        self.lease / defaults::RENEWALS_PER_LEASE
    }
}

/// How long an id that is not done stays on record. A window shorter than a backoff must not make
/// the store forget the attempts meanwhile: the message would be tried for ever.
pub(crate) fn retain(window: Duration, longest_backoff: Duration) -> Duration {
    window.max(longest_backoff.saturating_add(defaults::BACKOFF_KEPT))
}

/// The claims in hand of one queue.
pub(crate) struct Claims {
    pub(crate) store: Arc<dyn DedupStore>,
    pub(crate) lengths: Lengths,
    pub(crate) gate: Gate,
    pub(crate) events: Events,
    /// The queue pauses while the store is away; otherwise it goes on without dedup.
    pauses: bool,
    /// Without pausing: until when the store is taken to be away without asking it.
    away_until: Mutex<Option<Instant>>,
    /// What ends claims after whoever held them is gone; a consumer waits for it when it stops.
    background: TaskTracker,
    /// In the order of claiming: so are they renewed.
    table: Mutex<BTreeMap<u64, Arc<Lease>>>,
    next_slot: AtomicU64,
    sweeping: AtomicBool,
}

/// The holder's own view of one lease.
pub(crate) struct Lease {
    pub(crate) key: DedupKey,
    pub(crate) run: Run,
    pub(crate) message: Message,
    pub(crate) cancel: Option<CancellationToken>,
    /// The instant before the last confirmed request was sent, plus the lease.
    ends: Mutex<Instant>,
    lost: AtomicBool,
    /// Completing or releasing: a renewal that is still on its way means nothing any more.
    ending: AtomicBool,
    /// While the handler runs: when its renewals end, so that a deadlocked one does not hold its id for ever.
    run_ends: Mutex<Option<Instant>>,
}

/// Why there is no answer to a claim.
pub(crate) struct NoAnswer(pub(crate) StoreError);

impl Claims {
    pub(crate) fn new(
        store: Arc<dyn DedupStore>,
        lengths: Lengths,
        pauses: bool,
        gate: Gate,
        events: Events,
        background: TaskTracker,
    ) -> Self {
        Self {
            store,
            lengths,
            gate,
            events,
            pauses,
            away_until: Mutex::default(),
            background,
            table: Mutex::default(),
            next_slot: AtomicU64::new(0),
            sweeping: AtomicBool::new(false),
        }
    }

    /// Claims. A queue that pauses goes on asking with the same token while the store is away:
    /// until it answers, the consumer gives up, or the pause has lasted too long. One that does
    /// not pause asks twice, and then takes the store to be away for a moment.
    ///
    /// The answer comes with the instant before the question: the lease counts from there.
    pub(crate) async fn ask(
        self: &Arc<Self>,
        key: DedupKey,
        ask: &Ask,
        permit: Option<SuspectPermit>,
    ) -> Result<(Claim, Instant, Option<SuspectPermit>), NoAnswer> {
        if let Some(store) = self.store.in_process() {
            let asked = Instant::now();
            return Ok((store.claim_now(&key, ask), asked, permit));
        }
        if self.known_to_be_away() {
            return Err(NoAnswer(StoreError::new("the dedup store did not answer a moment ago")));
        }
        let mut unanswered = Unanswered::new(Arc::clone(self), key, ask.token, permit);
        let (claim, asked) = self.ask_until_answered(&key, ask).await?;
        Ok((claim, asked, unanswered.answered()))
    }

    async fn ask_until_answered(&self, key: &DedupKey, ask: &Ask) -> Result<(Claim, Instant), NoAnswer> {
        // A second of grace: with a consumer around, it gives up first.
        let give_up_at = from_now(self.lengths.pause_hold.saturating_add(Duration::from_secs(1)));
        let mut failures = 0;
        loop {
            let asked = Instant::now();
            let error = match self.in_time(self.store.claim(key, ask)).await {
                Ok(claim) => {
                    self.store_is_back();
                    return Ok((claim, asked));
                }
                Err(error) => error,
            };
            failures += 1;
            tracing::warn!(target: "guestlist", %error, failures, "the dedup store did not answer a claim");
            // One lost answer is no outage.
            if failures > 1 && !self.store_is_away() {
                return Err(NoAnswer(error));
            }
            tokio::select! {
                biased;
                () = self.gate.given_up() => return Err(NoAnswer(error)),
                () = sleep_until(give_up_at) => {
                    // Nobody may be left to ask: without a consumer around, the next delivery must find
                    // the gate open, and asks.
                    self.gate.open(Away::Store);
                    return Err(NoAnswer(error));
                }
                () = sleep(Backoff::reconnect().delay(failures)) => {}
            }
        }
    }

    fn store_is_back(&self) {
        self.gate.open(Away::Store);
        if !self.pauses {
            *lock(&self.away_until) = None;
        }
    }

    /// Says whether to go on asking.
    fn store_is_away(&self) -> bool {
        if self.pauses {
            self.gate.close(Away::Store);
        } else {
            *lock(&self.away_until) = Some(Instant::now() + AWAY);
        }
        self.pauses
    }

    /// One delivery in each moment asks; the others need not wait for the same silence.
    fn known_to_be_away(&self) -> bool {
        let mut away_until = lock(&self.away_until);
        match *away_until {
            Some(until) if Instant::now() < until => true,
            Some(_) => {
                *away_until = Some(Instant::now() + AWAY);
                false
            }
            None => false,
        }
    }

    /// A store call with its deadline.
    async fn in_time<T>(
        &self,
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        match timeout(self.lengths.store_call(), call).await {
            Ok(answer) => answer,
            Err(_) => Err(StoreError::new("the dedup store did not answer in time")),
        }
    }

    /// Takes an acquired claim in hand: it is renewed until it ends.
    pub(crate) fn hold(
        self: &Arc<Self>,
        lease: Lease,
        attempt: u32,
        before: Before,
        permit: Option<SuspectPermit>,
    ) -> HeldClaim {
        let lease = Arc::new(lease);
        let slot = self.next_slot.fetch_add(1, Ordering::Relaxed);
        self.table().insert(slot, Arc::clone(&lease));
        self.start_sweeping();
        self.events.emit(&lease.message, Some(lease.claimant()), EventKind::Claimed(before));
        HeldClaim::new(Arc::clone(self), lease, slot, attempt, before, permit)
    }

    /// Whoever ends a claim takes it out of the sweep first.
    pub(crate) fn let_go(&self, slot: u64, lease: &Lease) {
        lease.ending.store(true, Ordering::Release);
        self.table().remove(&slot);
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Lease>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the id as done, asking until the lease ends if need be, and at least once: a lease
    /// that has ended by our own view is asked for as well.
    pub(crate) async fn complete(&self, lease: &Lease) -> Completion {
        let window = self.lengths.window;
        let held = match self.store.in_process() {
            Some(store) => Some(store.complete_now(&lease.key, lease.run, window)),
            None => self.until_lease_ends(lease, || self.store.complete(&lease.key, lease.run, window)).await,
        };
        let completion = completion(held, lease.in_force(), lease.lost());
        match completion {
            Completion::Lost => self.lose(lease),
            Completion::Recorded if held == Some(Held::Gone) => self.forgotten(lease),
            Completion::Recorded | Completion::Gap => {}
        }
        completion
    }

    /// Gives a claim up; says whether that is how it ended. If not, another holder has it, or
    /// there was no answer by the end of the lease, and another may have it.
    pub(crate) async fn release(&self, lease: &Lease, why: Release) -> bool {
        let held = match self.store.in_process() {
            Some(store) => Some(store.release_now(&lease.key, lease.run, why)),
            None => self.until_lease_ends(lease, || self.store.release(&lease.key, lease.run, why)).await,
        };
        match held {
            Some(Held::Yes) => {
                self.events.emit(&lease.message, Some(lease.claimant()), EventKind::Released(why));
            }
            // The store lost the record; the delivery may still end as planned.
            Some(Held::Gone) => self.forgotten(lease),
            Some(Held::Lost) | None => self.lose(lease),
        }
        ours_to_settle(held)
    }

    /// Asks the same question until there is an answer or the lease ends; at least once.
    async fn until_lease_ends<T, F>(&self, lease: &Lease, mut question: impl FnMut() -> F) -> Option<T>
    where
        F: Future<Output = Result<T, StoreError>> + Send,
    {
        let mut failures = 0;
        loop {
            match self.in_time(question()).await {
                Ok(answer) => return Some(answer),
                Err(error) => {
                    tracing::warn!(target: "guestlist", %error, "the dedup store did not answer; asking again until the lease ends");
                }
            }
            failures += 1;
            sleep(Backoff::reconnect().delay(failures)).await;
            if !lease.in_force() {
                return None;
            }
        }
    }

    /// A claim whose answer never came is released by its token alone, in the background, until
    /// the store answers or the lease must have ended. The suspect permit goes with it.
    pub(crate) fn release_unanswered(
        self: Arc<Self>,
        key: DedupKey,
        token: super::protocol::Token,
        permit: Option<SuspectPermit>,
    ) {
        let run = Run { token, fence: Fence(0) };
        let claims = Arc::clone(&self);
        self.in_background(async move {
            let ends = from_now(claims.lengths.lease);
            let mut failures = 0;
            while claims.in_time(claims.store.release(&key, run, Release::NotStarted)).await.is_err() {
                failures += 1;
                sleep(Backoff::reconnect().delay(failures)).await;
                if Instant::now() >= ends {
                    break;
                }
            }
            drop(permit);
        });
    }

    /// In a task that outlives whoever asks for it. Without a runtime, the lease ends the claim.
    pub(super) fn in_background(&self, ending: impl Future<Output = ()> + Send + 'static) {
        if let Ok(runtime) = Handle::try_current() {
            self.background.spawn_on(ending, &runtime);
        }
    }

    /// One task renews all claims. It is begun before there is any, by a poll that runs no
    /// handler: begun beside one that blocks its thread, it would wait for that thread, since
    /// what a task spawned last is no other thread's to take.
    pub(crate) fn start_sweeping(self: &Arc<Self>) {
        // Read first: it runs already, but for the first time.
        if self.sweeping.load(Ordering::Acquire) || self.sweeping.swap(true, Ordering::AcqRel) {
            return;
        }
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(sweep(Arc::downgrade(self), self.lengths.renewal()))),
            // No runtime: nobody renews, and the lease decides.
            Err(_) => self.sweeping.store(false, Ordering::Release),
        }
    }

    async fn renew_all(self: &Arc<Self>, held: Vec<Arc<Lease>>) {
        let mut renewals = JoinSet::new();
        for lease in held {
            if self.store.in_process().is_some() {
                self.renew(&lease).await;
                continue;
            }
            if renewals.len() >= RENEWALS_AT_ONCE {
                renewals.join_next().await;
            }
            let claims = Arc::clone(self);
            renewals.spawn(async move { claims.renew(&lease).await });
        }
        while renewals.join_next().await.is_some() {}
    }

    async fn renew(&self, lease: &Lease) {
        if lease.ending() {
            return;
        }
        if lease.overrun_by(Duration::ZERO) {
            // A run without end: its renewals stop, and the lease runs out.
            lease.message.forsake();
        } else {
            let asked = Instant::now();
            match self.ask_renewal(lease).await {
                Ok(held) => {
                    if held == Held::Gone {
                        self.forgotten(lease);
                    }
                    match renewal(held, lease.ending()) {
                        Renewal::Extended => lease.extend(after(asked, self.lengths.lease)),
                        Renewal::Lost => self.lose(lease),
                        Renewal::Unchanged => {}
                    }
                }
                Err(error) => tracing::warn!(target: "guestlist", %error, "a claim could not be renewed"),
            }
        }
        if !lease.ending() && !lease.in_force() {
            self.lose(lease);
        }
    }

    async fn ask_renewal(&self, lease: &Lease) -> Result<Held, StoreError> {
        match self.store.in_process() {
            Some(store) => Ok(store.renew_now(&lease.key, lease.run, self.lengths.lease)),
            None => self.in_time(self.store.renew(&lease.key, lease.run, self.lengths.lease)).await,
        }
    }

    fn forgotten(&self, lease: &Lease) {
        self.events.emit(&lease.message, Some(lease.claimant()), EventKind::Forgotten);
    }

    fn lose(&self, lease: &Lease) {
        if lease.lose() {
            self.events.emit(&lease.message, Some(lease.claimant()), EventKind::LeaseLost);
        }
    }
}

/// Renews the claims of a queue, at a steady beat, until the queue is gone.
async fn sweep(claims: Weak<Claims>, every: Duration) {
    let mut beats = interval(every.max(Duration::from_millis(1)));
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let _again = SweepAgain(Weak::clone(&claims));
    loop {
        beats.tick().await;
        let Some(claims) = claims.upgrade() else { return };
        let held: Vec<Arc<Lease>> = claims.table().values().cloned().collect();
        let stuck = held.iter().filter(|lease| lease.overrun_by(STUCK)).count();
        claims.gate.set_stuck(stuck as u64);
        claims.renew_all(held).await;
    }
}

/// Its runtime has ended before its queue: the next runtime begins another.
struct SweepAgain(Weak<Claims>);

impl Drop for SweepAgain {
    fn drop(&mut self) {
        if let Some(claims) = self.0.upgrade() {
            claims.sweeping.store(false, Ordering::Release);
        }
    }
}

impl std::fmt::Debug for Claims {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Claims")
            .field("store", &self.store)
            .field("held", &self.table().len())
            .finish_non_exhaustive()
    }
}

impl Lease {
    pub(crate) fn new(
        key: DedupKey,
        run: Run,
        message: Message,
        ends: Instant,
        cancel: Option<CancellationToken>,
    ) -> Self {
        let (ends, run_ends) = (Mutex::new(ends), Mutex::new(None));
        let (lost, ending) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { key, run, message, cancel, ends, lost, ending, run_ends }
    }

    /// Whether the holder may act on it: publish, settle, start the handler.
    pub(crate) fn in_force(&self) -> bool {
        !self.lost() && Instant::now() < *lock(&self.ends)
    }

    /// What events say of it.
    pub(crate) fn claimant(&self) -> Claimant {
        Claimant { run: self.run, lease_ends: *lock(&self.ends) }
    }

    pub(crate) fn lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// The handler starts: it may run until then.
    pub(crate) fn run_until(&self, end: Option<Instant>) {
        *lock(&self.run_ends) = end;
    }

    pub(super) fn set_ending(&self, ending: bool) {
        self.ending.store(ending, Ordering::Release);
    }

    fn ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    fn overrun_by(&self, time: Duration) -> bool {
        lock(&self.run_ends).is_some_and(|end| Instant::now() >= after(end, time))
    }

    fn extend(&self, ends: Instant) {
        *lock(&self.ends) = ends;
    }

    /// Says whether this was news. The handler is told, and the broker's heartbeats stop.
    fn lose(&self) -> bool {
        let news = !self.lost.swap(true, Ordering::AcqRel);
        if news {
            self.message.forsake();
            if let Some(cancel) = &self.cancel {
                cancel.cancel();
            }
        }
        news
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("key", &self.key).field("lost", &self.lost()).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
