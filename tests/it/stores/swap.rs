//! A handle on a store that is opened again behind it, as a file or a server's data is.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use guestlist::DedupKey;
use guestlist::dedup::protocol::{Ask, Claim, Held, Record, Release, Run};
use guestlist::dedup::{DedupStore, StoreError, StoreFeatures};

/// Passes each call to the store that is there now. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Swap(Arc<RwLock<Option<Arc<dyn DedupStore>>>>);

impl Swap {
    pub(crate) fn new(store: impl DedupStore) -> Self {
        Self(Arc::new(RwLock::new(Some(Arc::new(store)))))
    }

    /// Opens another one in the place of this one, which is dropped first: two may not be allowed.
    pub(crate) fn reopen<S: DedupStore>(&self, open: impl FnOnce() -> S) {
        let mut place = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *place = None;
        *place = Some(Arc::new(open()));
    }

    fn now(&self) -> Arc<dyn DedupStore> {
        let place = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(place.as_ref().expect("a store is there unless opening it has failed"))
    }
}

#[async_trait]
impl DedupStore for Swap {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        self.now().claim(key, ask).await
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.now().renew(key, run, lease).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.now().complete(key, run, window).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        self.now().release(key, run, why).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        self.now().inspect(key).await
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        self.now().forget(key).await
    }

    fn features(&self) -> StoreFeatures {
        self.now().features()
    }
}
