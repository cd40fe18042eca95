//! A store in a bucket of NATS `JetStream`.

mod bucket;
mod options;
mod record;
mod sightings;
mod step;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use tokio::time::{Instant, MissedTickBehavior, interval};

use self::bucket::Names;
use self::options::Settings;
pub use self::options::{BUCKET, NatsKvOptions, OBSERVE_EVERY};
use self::record::micros;
use self::sightings::{Look, Sightings};
use self::step::View;
use super::{DedupStore, StoreError, StoreFeatures};
use crate::DedupKey;
use crate::broker::nats::{Link, Nats};
use crate::dedup::protocol::{Ask, Claim, Fence, Held, Machine, Micros, Record, Release, Run};

/// Claims of this process whose revision is remembered. One that is forgotten costs one more question.
const OWN_CLAIMS: u64 = 100_000;

#[doc = include_str!("../../../../docs/stores/nats_kv.md")]
#[derive(Clone)]
pub struct NatsKvStore(Arc<Inner>);

struct Inner {
    nats: Nats,
    names: Names,
    settings: Settings,
    window: Duration,
    in_files: bool,
    clock: Clock,
    sightings: Mutex<Sightings>,
    /// Looks come one after another, so that their order is known.
    looking: tokio::sync::Mutex<()>,
    watching: AtomicBool,
    fence_base: AtomicU64,
    highest_fence: AtomicU64,
    own: Cache<DedupKey, View>,
}

impl NatsKvStore {
    /// Connects to `nats://host/bucket` (or `tls://`), and opens or makes the bucket.
    ///
    /// Servers of a cluster are separated by commas, the bucket follows the last. Without one it is
    /// [`BUCKET`]. `user:password@` and `token@` before the host are understood. The query may set
    /// [`window`](NatsKvOptions::window), [`replicas`](NatsKvOptions::replicas) and
    /// [`observe`](NatsKvOptions::observe_every):
    /// `nats://a:4222,nats://b:4222/shop?window=24h&replicas=3`.
    ///
    /// # Errors
    ///
    /// The URL is none, the server does not answer or has no `JetStream`, the user lacks a permission, or
    /// the bucket is there with another window or is otherwise unfit. The text names what to change.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped before it ends, at most the bucket has been made.
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        Self::options().connect(url).await
    }

    /// Starts a store with more than a URL: a connection that is there already, with credentials files,
    /// nkeys and certificates.
    pub fn options() -> NatsKvOptions {
        NatsKvOptions::default()
    }

    /// How long the bucket remembers: its `max_age`. No queue on it may have a longer window.
    pub fn window(&self) -> Duration {
        self.0.window
    }

    async fn open(nats: &Nats, bucket: &str, mut settings: Settings) -> Result<Self, StoreError> {
        let (names, clock) = (Names::new(bucket), Clock::start());
        let link = link(nats).await?;
        let opened = names.open(&link, &settings).await?;
        names.rehearse(&link).await?;
        // Made again, the bucket is to be as it was.
        settings.window = Some(opened.window);
        let store = Self(Arc::new(Inner {
            nats: nats.clone(),
            names,
            window: opened.window,
            in_files: opened.in_files,
            clock,
            sightings: Mutex::new(Sightings::new(settings.observe_every)),
            settings,
            looking: tokio::sync::Mutex::new(()),
            watching: AtomicBool::new(false),
            fence_base: AtomicU64::new(opened.made),
            highest_fence: AtomicU64::new(0),
            own: Cache::builder().max_capacity(OWN_CLAIMS).eviction_policy(EvictionPolicy::lru()).build(),
        }));
        store.0.look().await?;
        store.watch();
        Ok(store)
    }

    fn watch(&self) {
        watch(&self.0);
    }

    /// A record that the server drops before its time would let an id run again too early, a claim even
    /// beside its holder.
    fn fits(&self, what: &str, length: Duration) -> Result<(), StoreError> {
        if length <= self.0.window {
            return Ok(());
        }
        Err(StoreError::new(format!(
            "the {what} of {length:?} is longer than the bucket `{}` remembers ({:?}, its max_age): use a bucket of \
             that window",
            self.0.names.bucket(),
            self.0.window
        )))
    }
}

impl Inner {
    fn sightings(&self) -> MutexGuard<'_, Sightings> {
        self.sightings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn link(&self) -> Result<Link, StoreError> {
        link(&self.nats).await
    }

    /// The bucket is gone: it is made again, and what it knew runs again.
    async fn reopen(&self, link: &Link) -> Result<(), StoreError> {
        let opened = self.names.open(link, &self.settings).await?;
        if self.fence_base.fetch_max(opened.made, Ordering::Relaxed) < opened.made {
            tracing::warn!(
                target: "guestlist",
                bucket = self.names.bucket(),
                "the bucket was gone and is made again: ids that it remembered run again"
            );
        }
        Ok(())
    }

    /// What a new claim's fence is above its revision, so that it is greater than the last one on record.
    ///
    /// It is the time at which the bucket was made: revisions begin anew with each bucket, and
    /// there are fewer of them than microseconds.
    fn fence_base(&self, before: Option<Fence>, expected: u64) -> u64 {
        let needed = before.map_or(0, |fence| fence.0.saturating_sub(expected));
        self.fence_base.load(Ordering::Relaxed).max(needed)
    }

    /// Learns from a fence that was given out as this revision. The base may be that of a bucket
    /// made later than the one that was opened; none is made in the future.
    fn knows_fence(&self, fence: Fence, revision: u64) {
        self.highest_fence.fetch_max(fence.0, Ordering::Relaxed);
        let base = fence.0.saturating_sub(revision);
        if base <= self.clock.now() {
            self.fence_base.fetch_max(base, Ordering::Relaxed);
        }
    }

    /// Revisions may have begun anew, or have gone back to what this look shows.
    fn begin_anew(&self, look: &Look) {
        self.own.invalidate_all();
        let beyond = self.highest_fence.load(Ordering::Relaxed).saturating_sub(look.last);
        self.fence_base.fetch_max(look.made.max(beyond), Ordering::Relaxed);
    }

    /// Looks at the bucket's last revision, unless somebody else does so after this was asked for.
    async fn look(&self) -> Result<(), StoreError> {
        let asked = Instant::now();
        let _turn = self.looking.lock().await;
        if self.sightings().looked_since(asked) {
            return Ok(());
        }
        let began = Instant::now();
        match self.answered_look().await {
            Ok(look) => {
                if !self.sightings().saw(look.clone(), began, Instant::now()) {
                    self.begin_anew(&look);
                }
                Ok(())
            }
            Err(error) => {
                self.sightings().lose_sight();
                Err(error)
            }
        }
    }

    /// A connection that breaks ends it: the answer will not come, and the next look must not wait for it.
    async fn answered_look(&self) -> Result<Look, StoreError> {
        let link = self.link().await?;
        tokio::select! {
            look = self.names.look(&link) => look,
            () = link.loss() => Err(StoreError::new("the connection to the store is lost")),
        }
    }

    /// What ends when the connection that there is now breaks: the server may come back with less.
    async fn loss(&self) -> impl Future<Output = ()> + Send + use<> {
        let loss = self.link().await.ok().map(|link| link.loss());
        async move {
            match loss {
                Some(loss) => loss.await,
                None => std::future::pending().await,
            }
        }
    }
}

async fn link(nats: &Nats) -> Result<Link, StoreError> {
    nats.link().await.map_err(|error| StoreError::new("cannot reach the store").with_source(error))
}

/// Looks at the bucket at a steady beat, until the store is gone.
fn watch(inner: &Arc<Inner>) {
    if !inner.watching.swap(true, Ordering::AcqRel) {
        tokio::spawn(beat(Arc::downgrade(inner), inner.settings.observe_every));
    }
}

async fn beat(inner: Weak<Inner>, every: Duration) {
    let _again = WatchAgain(Weak::clone(&inner));
    let mut beats = interval(every);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut blind = false;
    loop {
        let breaking = match inner.upgrade() {
            Some(inner) => inner.loss().await,
            None => return,
        };
        let broke = tokio::select! {
            _ = beats.tick() => false,
            () = breaking => true,
        };
        let Some(inner) = inner.upgrade() else { return };
        if broke {
            inner.sightings().lose_sight();
        }
        let looked = inner.look().await;
        if let (Err(error), false) = (&looked, blind) {
            tracing::warn!(
                target: "guestlist",
                error = error as &dyn std::error::Error,
                "the store cannot be observed: leases and backoffs are judged anew once it can"
            );
        }
        blind = looked.is_err();
    }
}

/// Its runtime has ended before its store: the next runtime begins another.
struct WatchAgain(Weak<Inner>);

impl Drop for WatchAgain {
    fn drop(&mut self) {
        if let Some(inner) = self.0.upgrade() {
            inner.watching.store(false, Ordering::Release);
        }
    }
}

#[async_trait]
impl DedupStore for NatsKvStore {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        self.fits("window", ask.retain)?;
        self.fits("lease", ask.lease)?;
        self.watch();
        let view = self.0.own.get(key).unwrap_or_else(View::absent);
        let claim = |machine: Machine, record| machine.claim(record, ask);
        Ok(match self.0.step(key, view, claim).await? {
            (Claim::Acquired { attempt, before, digest, .. }, Some(record)) => {
                // Only the write has told the fence.
                Claim::Acquired { fence: record.run.fence, attempt, before, digest }
            }
            (answer, _) => answer,
        })
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.fits("lease", lease)?;
        let view = self.0.own_or_read(key).await?;
        let renew = |machine: Machine, record| machine.renew(record, run, lease);
        Ok(self.0.step(key, view, renew).await?.0)
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.fits("window", window)?;
        let view = self.0.own_or_read(key).await?;
        let complete = |machine: Machine, record| machine.complete(record, run, window);
        Ok(self.0.step(key, view, complete).await?.0)
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        let view = self.0.own_or_read(key).await?;
        let release = |machine: Machine, record| machine.release(record, run, why);
        Ok(self.0.step(key, view, release).await?.0)
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        self.0.inspect(key).await
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        let view = self.0.read(key).await?;
        let forget = |machine: Machine, record| (None, machine.live(record).is_some());
        Ok(self.0.step(key, view, forget).await?.0)
    }

    fn features(&self) -> StoreFeatures {
        StoreFeatures { shared: true, survives_restart: self.0.in_files }
    }
}

impl fmt::Debug for NatsKvStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsKvStore")
            .field("nats", &self.0.nats)
            .field("bucket", &self.0.names.bucket())
            .field("window", &self.0.window)
            .finish_non_exhaustive()
    }
}

/// This process's clock: tokio's, so that no step of the wall clock moves it. It starts at the wall
/// clock's time, so that what `inspect` shows can be read.
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
        self.at(Instant::now())
    }

    fn at(&self, instant: Instant) -> Micros {
        self.started_at.saturating_add(micros(instant.duration_since(self.started)))
    }
}
