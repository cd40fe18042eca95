//! A store whose calls fail as told.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use crate::DedupKey;
use crate::dedup::protocol::{Ask, Claim, Held, Record, Release, Run};
use crate::dedup::{DedupStore, StoreError, StoreFeatures};

/// A fault of one store call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The call never reached the store.
    BeforeEffect,
    /// The call took effect, and its answer was lost.
    AfterEffect,
    /// The call takes effect, and its answer never comes.
    Hang,
    /// The call takes this long before it takes effect.
    Slow(Duration),
}

/// Wraps a store, and fails the calls it is told to: faults are counted out, not sampled. It
/// answers asynchronously, as a remote store does, whatever is inside. Clones share all.
///
/// ```
/// use guestlist::dedup::MemoryStore;
/// use guestlist::testing::{Fault, FaultyStore};
/// let store = FaultyStore::new(MemoryStore::new());
/// store.fail_call(2, Fault::AfterEffect); // the third call from now
/// store.set_down(true);                   // and from now on, no call arrives
/// ```
#[derive(Clone, Debug)]
pub struct FaultyStore {
    inner: Arc<dyn DedupStore>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    faults: Mutex<VecDeque<Option<Fault>>>,
    calls: AtomicUsize,
    down: AtomicBool,
}

impl FaultyStore {
    /// A store that works, so far.
    pub fn new(inner: impl DedupStore) -> Self {
        Self::over(Arc::new(inner))
    }

    /// As [`new`](Self::new), for a store that is shared.
    pub fn over(inner: Arc<dyn DedupStore>) -> Self {
        Self { inner, shared: Arc::default() }
    }

    /// The call after the next `skip` calls fails so.
    pub fn fail_call(&self, skip: usize, fault: Fault) {
        let mut faults = self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.len() <= skip {
            faults.resize(skip + 1, None);
        }
        faults[skip] = Some(fault);
    }

    /// While down, no call reaches the store.
    pub fn set_down(&self, down: bool) {
        self.shared.down.store(down, Ordering::SeqCst);
    }

    /// How many calls were made.
    pub fn calls(&self) -> usize {
        self.shared.calls.load(Ordering::SeqCst)
    }

    fn up(&self) -> Result<(), StoreError> {
        let down = self.shared.down.load(Ordering::SeqCst);
        if down { Err(StoreError::new("the store is down")) } else { Ok(()) }
    }

    async fn call<T>(
        &self,
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        self.shared.calls.fetch_add(1, Ordering::SeqCst);
        let next = self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        self.up()?;
        match next.flatten() {
            None => call.await,
            Some(Fault::BeforeEffect) => Err(StoreError::new("the call was lost")),
            Some(Fault::AfterEffect) => {
                call.await?;
                Err(StoreError::new("the answer was lost"))
            }
            Some(Fault::Hang) => {
                call.await?;
                std::future::pending().await
            }
            Some(Fault::Slow(delay)) => {
                tokio::time::sleep(delay).await;
                call.await
            }
        }
    }
}

#[async_trait]
impl DedupStore for FaultyStore {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        self.call(self.inner.claim(key, ask)).await
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.call(self.inner.renew(key, run, lease)).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.call(self.inner.complete(key, run, window)).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        self.call(self.inner.release(key, run, why)).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        // An operator's calls are not counted among a delivery's.
        self.up()?;
        self.inner.inspect(key).await
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        self.up()?;
        self.inner.forget(key).await
    }

    fn features(&self) -> StoreFeatures {
        self.inner.features()
    }
}
