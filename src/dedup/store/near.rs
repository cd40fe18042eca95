//! Remembers completed ids near by, so that their copies cost no round trip.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use moka::policy::EvictionPolicy;
use moka::sync::{Cache, CacheBuilder};
use tokio::time::Instant;

use super::{DedupStore, StoreError, StoreFeatures};
use crate::DedupKey;
use crate::dedup::SharedStore;
use crate::dedup::protocol::{Ask, Claim, Digest, Held, Record, Release, Run, Token};

/// A record that was found done has an unknown part of its window left: it is remembered for
/// this share of the queue's window, so that no id is suppressed for much longer than its window.
const SHARE_OF_A_WINDOW: u32 = 60;

/// moka's clock is not ours, and only collects garbage: an entry's own time decides.
const GARBAGE_AFTER: Duration = Duration::from_secs(60);

/// Remembers for a short while, in this process's memory, which ids a remote store has called
/// done. A copy of one of them is answered without a round trip. Cheap to clone; clones share what they remember.
///
/// # What it promises, and what not
///
/// 1. It never says that an id is new, or who holds it: only the store does. All it says by itself is `Done`,
///    of an id that the store called done, or whose `complete` the store has confirmed to it.
/// 2. It forgets after [`MAX_AGE`](Self::MAX_AGE), and never later than the window of a `complete` of its own ends. Where it has
///    only seen that an id is done, it cannot know how much of the window is left, and forgets after a sixtieth of
///    the shortest window that it completed an id for (before the first one: of how long the queue keeps an id that is
///    not done, an hour or more), or `MAX_AGE` if that is less: an id may be taken for a copy for that much longer than its
///    window.
/// 3. An id that was sent back to work (a higher generation) is always asked about at the store.
/// 4. What is forgotten or lost in the store may be answered `Done` here for [`MAX_AGE`](Self::MAX_AGE) more: after
///    [`forget`](DedupStore::forget) through this cache it is forgotten at once *here*, and in other processes that have
///    a cache of their own after at most that long.
/// 5. It is full at its capacity, and then forgets what was least lately used: that id costs a round trip again.
///
/// The page [`near_cache`](crate::_docs::near_cache) says when to choose it.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use guestlist::dedup::{NearCache, connect};
/// # let url = "memory:";
/// let store = NearCache::new(connect(url).await.unwrap());
/// assert_eq!(store.hits(), 0);
/// # }
/// ```
#[derive(Clone)]
pub struct NearCache {
    store: Arc<dyn DedupStore>,
    /// The ids that are done.
    done: Cache<DedupKey, Done>,
    /// The claims of this process in progress: what to remember when they are completed.
    claims: Cache<DedupKey, Mine>,
    max_age: Duration,
    shared: Arc<Counts>,
}

struct Counts {
    hits: AtomicU64,
    /// The shortest window that was asked for, in µs. A claim does not say it: what it says is how long an id that
    /// is *not* done is kept, which is never less than an hour.
    window: AtomicU64,
    /// Grows with every `forget`: entries of an earlier age are not believed, so that an answer that
    /// was on its way meanwhile does not bring back what was forgotten.
    age: AtomicU64,
}

impl Default for Counts {
    fn default() -> Self {
        Self { hits: AtomicU64::new(0), window: AtomicU64::new(u64::MAX), age: AtomicU64::new(0) }
    }
}

#[derive(Clone, Copy)]
struct Done {
    until: Instant,
    /// The highest generation that the store was asked about.
    generation: u32,
    digest: Option<Digest>,
    age: u64,
}

#[derive(Clone, Copy)]
struct Mine {
    token: Token,
    generation: u32,
    digest: Option<Digest>,
    /// When its completion was first sent: the window begins no earlier, and maybe no later.
    completing: Option<Instant>,
}

impl NearCache {
    /// The longest that an id is remembered here: one minute.
    pub const MAX_AGE: Duration = Duration::from_secs(60);

    /// How many ids are remembered here, unless told otherwise: 100,000.
    pub const IDS: u64 = 100_000;

    /// Remembers what this store calls done.
    pub fn new(store: impl Into<SharedStore>) -> Self {
        let store = store.into().into_arc();
        Self {
            store,
            done: done(Self::IDS),
            claims: least_recently_used(Self::IDS).build(),
            max_age: Self::MAX_AGE,
            shared: Arc::default(),
        }
    }

    /// Remembers this many ids; forgets what it remembered.
    #[must_use]
    pub fn with_capacity(self, ids: u64) -> Self {
        Self { done: done(ids), claims: least_recently_used(ids).build(), ..self }
    }

    /// Remembers an id for this long at most; no longer than [`MAX_AGE`](Self::MAX_AGE).
    #[must_use]
    pub fn with_max_age(self, age: Duration) -> Self {
        Self { max_age: age.min(Self::MAX_AGE), ..self }
    }

    /// How many claims were answered here, without asking the store.
    pub fn hits(&self) -> u64 {
        self.shared.hits.load(Ordering::Relaxed)
    }

    fn age(&self) -> u64 {
        self.shared.age.load(Ordering::SeqCst)
    }

    fn shortest_window(&self) -> Duration {
        Duration::from_micros(self.shared.window.load(Ordering::Relaxed))
    }

    /// The answer that needs no store.
    fn known(&self, key: &DedupKey, ask: &Ask) -> Option<Claim> {
        let done = self.done.get(key)?;
        // The store may have been told to forget it before it was sent back to work.
        let redriven = ask.generation > done.generation;
        if redriven || done.age != self.age() || Instant::now() >= done.until {
            return None;
        }
        self.shared.hits.fetch_add(1, Ordering::Relaxed);
        Some(Claim::Done { digest: done.digest })
    }

    fn note(&self, key: &DedupKey, ask: &Ask, claim: &Claim, sent: Instant, age: u64) {
        match *claim {
            // Of a higher generation nothing is known: a header is easily forged, and a redriven copy would be taken for done.
            Claim::Done { .. } if ask.generation > 0 => {}
            Claim::Done { digest } => {
                let window = ask.retain.min(self.shortest_window());
                let until = sent + self.max_age.min(window / SHARE_OF_A_WINDOW);
                self.done.insert(*key, Done { until, generation: ask.generation, digest, age });
            }
            Claim::Acquired { digest, .. } => {
                let Ask { token, generation, .. } = *ask;
                self.done.invalidate(key);
                self.claims.insert(*key, Mine { token, generation, digest, completing: None });
            }
            Claim::InProgress { .. } | Claim::Suspect | Claim::Parked { .. } => self.done.invalidate(key),
        }
    }

    /// This process's claim, whose completion is about to be sent.
    fn completing(&self, key: &DedupKey, run: Run) -> Option<(Mine, Instant)> {
        let mine = self.claims.get(key).filter(|mine| mine.token == run.token)?;
        // Asked again, the window began with the first time, whose answer was lost.
        let first = mine.completing.unwrap_or_else(Instant::now);
        self.claims.insert(*key, Mine { completing: Some(first), ..mine });
        Some((mine, first))
    }
}

fn done(ids: u64) -> Cache<DedupKey, Done> {
    least_recently_used(ids).time_to_live(NearCache::MAX_AGE + GARBAGE_AFTER).build()
}

/// moka's default policy would refuse new ids when it is full.
fn least_recently_used<V: Clone + Send + Sync + 'static>(
    ids: u64,
) -> CacheBuilder<DedupKey, V, Cache<DedupKey, V>> {
    Cache::builder().max_capacity(ids).eviction_policy(EvictionPolicy::lru())
}

#[async_trait]
impl DedupStore for NearCache {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        if let Some(done) = self.known(key, ask) {
            return Ok(done);
        }
        let (sent, age) = (Instant::now(), self.age());
        let claim = self.store.claim(key, ask).await?;
        self.note(key, ask, &claim, sent, age);
        Ok(claim)
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.store.renew(key, run, lease).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        let micros = u64::try_from(window.as_micros()).unwrap_or(u64::MAX);
        self.shared.window.fetch_min(micros, Ordering::Relaxed);
        let (mine, age) = (self.completing(key, run), self.age());
        let held = self.store.complete(key, run, window).await?;
        if let (Held::Yes, Some((Mine { generation, digest, .. }, first))) = (held, mine) {
            let until = first + self.max_age.min(window);
            self.done.insert(*key, Done { until, generation, digest, age });
            self.claims.invalidate(key);
        }
        Ok(held)
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        self.claims.invalidate(key);
        self.store.release(key, run, why).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        self.store.inspect(key).await
    }

    /// Other processes with a cache of their own may answer `Done` for [`MAX_AGE`](Self::MAX_AGE) more.
    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        // Also if this is dropped half-way, when the store may have forgotten.
        let _at_last = NextAge(&self.shared.age);
        self.store.forget(key).await
    }

    fn features(&self) -> StoreFeatures {
        self.store.features()
    }
}

/// Begins another age when it is dropped.
struct NextAge<'a>(&'a AtomicU64);

impl Drop for NextAge<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl fmt::Debug for NearCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NearCache")
            .field("store", &self.store)
            .field("remembered", &self.done.entry_count())
            .field("hits", &self.hits())
            .finish_non_exhaustive()
    }
}
