//! A store in this process's memory.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use moka::Expiry;
use moka::notification::RemovalCause;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::Instant;

use super::{DedupStore, InProcessStore, StoreError, StoreFeatures};
use crate::dedup::protocol::{Ask, Claim, Held, Machine, Micros, Record, Release, Run, State};
use crate::{DedupKey, defaults};

const SHARDS: usize = 64;

/// A shard is swept of claims past their time when it has grown to this many, and twice what was left.
const SWEEP_FROM: usize = 1024;

/// moka collects this much later than the record says, since its clock is not ours: the
/// record's own time decides.
const GARBAGE_AFTER: Duration = Duration::from_secs(60);

/// A store in this process's memory. Cheap to clone; clones share what they remember.
///
/// # What it promises, and what not
///
/// 1. Claims are never evicted; ids that are done, parked, or wait for their next attempt only when there are more than
///    it may remember: the least recently used go first, each is counted
///    ([`forgotten_early`](Self::forgotten_early)) and warned about. A copy of a forgotten id runs again, and one that
///    waits begins with its first attempt; nothing is lost. A message deferred for a year has a place here for a year.
/// 2. It forgets everything at a restart. A copy that arrives afterwards runs again, and a
///    message that kills the process is not recognized as such.
/// 3. Two processes do not share it. If both consume one queue, a message and its copy may
///    reach one each, and both run.
///
/// It costs about 500 bytes for each remembered id.
///
/// ```
/// use guestlist::dedup::MemoryStore;
/// let store = MemoryStore::with_capacity(50_000);
/// assert_eq!(store.forgotten_early(), 0);
/// ```
#[derive(Clone)]
pub struct MemoryStore(Arc<Inner>);

struct Inner {
    /// Claims in progress: few, and never evicted.
    shards: Box<[Shard]>,
    /// Everything else: `Done`, `Released`, `Parked`; bounded.
    settled: Cache<DedupKey, Record>,
    clock: Clock,
    forgotten: Arc<AtomicU64>,
}

#[derive(Default)]
struct Shard {
    claims: Mutex<Claims>,
    changed: Notify,
}

#[derive(Default)]
struct Claims {
    by_key: HashMap<DedupKey, Record>,
    sweep_at: usize,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// A store for a [million ids](defaults::MEMORY_STORE_IDS).
    pub fn new() -> Self {
        Self::with_capacity(defaults::MEMORY_STORE_IDS)
    }

    /// A store for this many ids beside those in progress.
    pub fn with_capacity(ids: u64) -> Self {
        let clock = Clock::start();
        let forgotten = Arc::new(AtomicU64::new(0));
        let settled = settled_records(ids, clock, Arc::clone(&forgotten));
        let shards = (0..SHARDS).map(|_| Shard::default()).collect();
        Self(Arc::new(Inner { shards, settled, clock, forgotten }))
    }

    /// How many ids were forgotten before their time, since the store was full.
    pub fn forgotten_early(&self) -> u64 {
        self.0.settled.run_pending_tasks();
        self.0.forgotten.load(Ordering::Relaxed)
    }

    /// How many claims are in progress.
    pub fn in_progress(&self) -> usize {
        self.0.shards.iter().map(|shard| shard.lock().by_key.len()).sum()
    }

    /// One atomic step: the key's shard is locked from the look to the write.
    fn step<A>(
        &self,
        key: &DedupKey,
        step: impl FnOnce(Machine, Option<Record>) -> (Option<Record>, A),
    ) -> A {
        let Inner { settled, clock, .. } = &*self.0;
        let mut claims = self.shard(key).lock();
        let now = clock.now();
        let claimed = claims.by_key.get(key).copied();
        let old = claimed.or_else(|| settled.get(key));
        let (new, answer) = step(Machine::at(now), old);
        if new != old {
            // Taking out of moka what is not in it would cost a third of a claim.
            let settled_before = claimed.is_none() && old.is_some();
            claims.write(settled, settled_before, *key, new, now);
        }
        answer
    }

    fn shard(&self, key: &DedupKey) -> &Shard {
        &self.0.shards[usize::from(key.as_bytes()[0]) % SHARDS]
    }

    /// A step that may end a claim: whoever waits for the key looks again.
    fn ending<A>(
        &self,
        key: &DedupKey,
        step: impl FnOnce(Machine, Option<Record>) -> (Option<Record>, A),
    ) -> A {
        let answer = self.step(key, step);
        self.shard(key).changed.notify_waiters();
        answer
    }
}

impl Shard {
    /// A panic elsewhere leaves the map as it was: every write is a single insert or remove.
    fn lock(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claims {
    fn write(
        &mut self,
        settled: &Cache<DedupKey, Record>,
        settled_before: bool,
        key: DedupKey,
        record: Option<Record>,
        now: Micros,
    ) {
        match record {
            Some(record @ Record { state: State::Claimed { .. }, .. }) => {
                self.sweep(now);
                self.by_key.insert(key, record);
                if settled_before {
                    settled.invalidate(&key);
                }
            }
            Some(record) => {
                settled.insert(key, record);
                self.by_key.remove(&key);
            }
            None => {
                settled.invalidate(&key);
                self.by_key.remove(&key);
            }
        }
    }

    /// Claims whose holders vanished and whose time is long over are garbage.
    fn sweep(&mut self, now: Micros) {
        if self.by_key.len() >= self.sweep_at.max(SWEEP_FROM) {
            self.by_key.retain(|_, record| now < record.kept_until);
            self.sweep_at = self.by_key.len() * 2;
        }
    }
}

/// moka's default policy *rejects new entries* when it is full, so that dedup would silently
/// stop: LRU instead, and every unexpired id that it evicts is counted.
fn settled_records(ids: u64, clock: Clock, forgotten: Arc<AtomicU64>) -> Cache<DedupKey, Record> {
    let listener = move |_: Arc<DedupKey>, record: Record, cause: RemovalCause| {
        if cause == RemovalCause::Size && clock.now() < record.kept_until {
            warn_of_forgetting(forgotten.fetch_add(1, Ordering::Relaxed) + 1, ids);
        }
    };
    Cache::builder()
        .max_capacity(ids)
        .eviction_policy(EvictionPolicy::lru())
        .eviction_listener(listener)
        .expire_after(KeptUntil(clock))
        .build()
}

/// Loud, but not once per message: at 1, 2, 4, 8, …
fn warn_of_forgetting(count: u64, capacity: u64) {
    if count.is_power_of_two() {
        tracing::warn!(
            target: "guestlist",
            count,
            capacity,
            "the memory store is full and forgets ids before their window is over: their copies would run again; give it a larger capacity or the queue a shorter window"
        );
    }
}

/// Tells moka when a record is garbage.
struct KeptUntil(Clock);

impl KeptUntil {
    fn left(&self, record: &Record) -> Duration {
        Duration::from_micros(record.kept_until.saturating_sub(self.0.now())).saturating_add(GARBAGE_AFTER)
    }
}

impl Expiry<DedupKey, Record> for KeptUntil {
    fn expire_after_create(&self, _: &DedupKey, record: &Record, _: std::time::Instant) -> Option<Duration> {
        Some(self.left(record))
    }

    fn expire_after_update(
        &self,
        _: &DedupKey,
        record: &Record,
        _: std::time::Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(self.left(record))
    }
}

/// The store's clock: tokio's, which tests can pause and which no step of the wall clock moves;
/// it starts at the wall clock's time, so that fences grow over a restart.
#[derive(Clone, Copy)]
struct Clock {
    started: Instant,
    started_at: Micros,
}

impl Clock {
    fn start() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { started: Instant::now(), started_at: micros(wall) }
    }

    fn now(&self) -> Micros {
        self.started_at.saturating_add(micros(self.started.elapsed()))
    }
}

fn micros(duration: Duration) -> Micros {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl InProcessStore for MemoryStore {
    fn claim_now(&self, key: &DedupKey, ask: &Ask) -> Claim {
        self.step(key, |machine, record| machine.claim(record, ask))
    }

    fn renew_now(&self, key: &DedupKey, run: Run, lease: Duration) -> Held {
        self.step(key, |machine, record| machine.renew(record, run, lease))
    }

    fn complete_now(&self, key: &DedupKey, run: Run, window: Duration) -> Held {
        self.ending(key, |machine, record| machine.complete(record, run, window))
    }

    fn release_now(&self, key: &DedupKey, run: Run, why: Release) -> Held {
        self.ending(key, |machine, record| machine.release(record, run, why))
    }

    fn left_now(&self, key: &DedupKey) -> Duration {
        self.step(key, |machine, record| (record, machine.left(record)))
    }

    fn changed(&self, key: &DedupKey) -> Notified<'_> {
        self.shard(key).changed.notified()
    }
}

#[async_trait]
impl DedupStore for MemoryStore {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        Ok(self.claim_now(key, ask))
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        Ok(self.renew_now(key, run, lease))
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        Ok(self.complete_now(key, run, window))
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        Ok(self.release_now(key, run, why))
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        Ok(self.step(key, |machine, record| (record, machine.live(record))))
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        Ok(self.ending(key, |machine, record| (None, machine.live(record).is_some())))
    }

    fn features(&self) -> StoreFeatures {
        StoreFeatures::IN_MEMORY
    }

    fn in_process(&self) -> Option<&dyn InProcessStore> {
        Some(self)
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore")
            .field("in_progress", &self.in_progress())
            .field("remembered", &self.0.settled.entry_count())
            .finish_non_exhaustive()
    }
}
