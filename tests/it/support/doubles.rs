//! Doubles of a test's own: an observer that acts, a store that is late, a broker that remembers copies.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use guestlist::broker::memory::MemoryBroker;
use guestlist::broker::{Broker, BrokerError, Copy, Destination, Features, QueueSpec, Subscription};
use guestlist::dedup::protocol::{Ask, Claim, Held, Record, Release, Run};
use guestlist::dedup::{DedupStore, MemoryStore, StoreError, StoreFeatures};
use guestlist::testing::Recorder;
use guestlist::{DedupKey, Event, EventKind, Observer};
use tokio::time::sleep;

/// Logs every event, and acts at the first one that is wanted: the point at which something breaks.
pub(crate) struct Tripwire {
    log: Recorder,
    at: fn(&EventKind) -> bool,
    act: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Tripwire {
    pub(crate) fn observer(
        log: &Recorder,
        at: fn(&EventKind) -> bool,
        act: impl FnOnce() + Send + 'static,
    ) -> Arc<dyn Observer> {
        Arc::new(Self { log: log.clone(), at, act: Mutex::new(Some(Box::new(act))) })
    }
}

impl Observer for Tripwire {
    fn observe(&self, event: &Event) {
        self.log.observe(event);
        if (self.at)(&event.kind)
            && let Some(act) = self.act.lock().unwrap().take()
        {
            act();
        }
    }
}

/// A store behind a slow network: each call takes effect, and is answered, this much later,
/// whether or not anybody still waits for the answer.
#[derive(Clone, Debug)]
pub(crate) struct LateStore {
    inner: MemoryStore,
    late: Arc<AtomicU64>,
}

impl LateStore {
    pub(crate) fn new(inner: MemoryStore) -> Self {
        Self { inner, late: Arc::default() }
    }

    pub(crate) fn set_late(&self, late: Duration) {
        self.late.store(u64::try_from(late.as_millis()).unwrap(), Ordering::SeqCst);
    }

    async fn later<T: Send + 'static>(
        &self,
        call: impl FnOnce(MemoryStore) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let late = Duration::from_millis(self.late.load(Ordering::SeqCst));
        let inner = self.inner.clone();
        let answer = tokio::spawn(async move {
            sleep(late).await;
            call(inner)
        });
        answer.await.map_err(|_| StoreError::new("the store is gone"))
    }
}

#[async_trait]
impl DedupStore for LateStore {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        let (key, ask) = (*key, *ask);
        self.later(move |store| store.in_process().unwrap().claim_now(&key, &ask)).await
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        let key = *key;
        self.later(move |store| store.in_process().unwrap().renew_now(&key, run, lease)).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        let key = *key;
        self.later(move |store| store.in_process().unwrap().complete_now(&key, run, window)).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        let key = *key;
        self.later(move |store| store.in_process().unwrap().release_now(&key, run, why)).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        self.inner.inspect(key).await
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        self.inner.forget(key).await
    }

    fn features(&self) -> StoreFeatures {
        StoreFeatures::SHARED
    }
}

/// Passes everything on, and keeps the ids of the copies that were published.
#[derive(Clone, Debug)]
pub(crate) struct CopySpy {
    inner: MemoryBroker,
    ids: Arc<Mutex<Vec<String>>>,
}

impl CopySpy {
    pub(crate) fn new(inner: MemoryBroker) -> Self {
        Self { inner, ids: Arc::default() }
    }

    pub(crate) fn ids(&self) -> Vec<String> {
        self.ids.lock().unwrap().clone()
    }
}

#[async_trait]
impl Broker for CopySpy {
    fn system(&self) -> &'static str {
        self.inner.system()
    }

    fn features(&self) -> Features {
        self.inner.features()
    }

    fn default_scope(&self, queue: &QueueSpec) -> String {
        self.inner.default_scope(queue)
    }

    async fn prepare(&self, queue: &QueueSpec) -> Result<(), BrokerError> {
        self.inner.prepare(queue).await
    }

    async fn subscribe(&self, queue: &QueueSpec) -> Result<Box<dyn Subscription>, BrokerError> {
        self.inner.subscribe(queue).await
    }

    async fn publish(&self, to: &Destination, copy: &Copy<'_>) -> Result<(), BrokerError> {
        self.ids.lock().unwrap().push(copy.id().to_owned());
        self.inner.publish(to, copy).await
    }

    async fn close(&self) {}
}
