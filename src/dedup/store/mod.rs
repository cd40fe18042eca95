//! The contract of a store.

#[cfg(feature = "durable")]
pub mod durable;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod lanes;
mod memory;
#[cfg(feature = "nats")]
pub mod nats_kv;
mod near;
#[cfg(feature = "postgres")]
pub(crate) mod postgres;
#[cfg(feature = "redis")]
mod redis;
mod url;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::futures::Notified;

#[cfg(feature = "durable")]
pub use self::durable::{Durability, DurableStore};
pub use self::memory::MemoryStore;
#[cfg(feature = "nats")]
pub use self::nats_kv::NatsKvStore;
pub use self::near::NearCache;
#[cfg(feature = "postgres")]
pub use self::postgres::{PostgresStore, PostgresStoreBuilder};
#[cfg(feature = "redis")]
pub use self::redis::{RedisStore, RedisStoreBuilder};
pub use self::url::connect;
use super::protocol::{Ask, Claim, Held, Record, Release, Run};
use crate::{BoxError, DedupKey};

/// Where claims and completed ids are kept.
///
/// # Contract
///
/// 1. Each call is one atomic step of the [protocol's machine](super::protocol::Machine) on one
///    key, at an instant of the store's own clock. Never get-then-set.
/// 2. Of any number of concurrent claims of a free key, exactly one is `Acquired`.
/// 3. A call by a token that does not hold the claim changes nothing, and says so.
/// 4. A call repeated with the same token has the same answer and no further effect: that is how a
///    lost answer is resolved.
/// 5. A record that is lost may let an id run again; it never suppresses one. A claim is never evicted.
/// 6. An error says nothing about the effect: it may have happened.
#[async_trait]
pub trait DedupStore: fmt::Debug + Send + Sync + 'static {
    /// Claims a key.
    ///
    /// # Errors
    ///
    /// The store could not be asked, or its answer was lost. Claim again with the same token.
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError>;

    /// Holds a claim for another `lease` from now.
    ///
    /// # Errors
    ///
    /// As for [`claim`](Self::claim): ask again with the same run.
    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError>;

    /// Remembers the key as done for `window` from now.
    ///
    /// # Errors
    ///
    /// As for [`claim`](Self::claim): ask again with the same run.
    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError>;

    /// Gives a claim up.
    ///
    /// # Errors
    ///
    /// As for [`claim`](Self::claim): ask again with the same run.
    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError>;

    /// What is on record for a key.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError>;

    /// Removes what is on record for a key, so that the id runs again; says whether there was anything.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError>;

    /// What this store promises beyond the contract.
    fn features(&self) -> StoreFeatures;

    /// Stores that answer without waiting offer the same calls synchronously; the layer then
    /// neither allocates nor awaits for them.
    fn in_process(&self) -> Option<&dyn InProcessStore> {
        None
    }
}

/// The calls of a [`DedupStore`] that answers at once and never fails.
pub trait InProcessStore: Send + Sync {
    /// See [`DedupStore::claim`].
    fn claim_now(&self, key: &DedupKey, ask: &Ask) -> Claim;
    /// See [`DedupStore::renew`].
    fn renew_now(&self, key: &DedupKey, run: Run, lease: Duration) -> Held;
    /// See [`DedupStore::complete`].
    fn complete_now(&self, key: &DedupKey, run: Run, window: Duration) -> Held;
    /// See [`DedupStore::release`].
    fn release_now(&self, key: &DedupKey, run: Run, why: Release) -> Held;
    /// For how long a claim of this key would be `InProgress`; zero: it may be free.
    fn left_now(&self, key: &DedupKey) -> Duration;
    /// Ends soon after a claim of this key has ended. To be made *before* the claim that it
    /// waits for is asked about, so that nothing is missed in between.
    fn changed(&self, key: &DedupKey) -> Notified<'_>;
}

/// What a store promises beyond its contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreFeatures {
    /// Several processes can share it. Without this, two consumer processes on one queue each
    /// handle their own copies of an id.
    pub shared: bool,
    /// What is remembered outlives the process: bounded retry over crashes (I8, F26) needs this.
    pub survives_restart: bool,
    /// The longest time for which it can keep a record; `None`: any. A queue that needs more is refused at its start,
    /// and a deferral that would need more is cut to an hour less than this.
    pub keeps: Option<Duration>,
}

impl StoreFeatures {
    /// The features of a store in this process's memory.
    pub const IN_MEMORY: Self = Self { shared: false, survives_restart: false, keeps: None };
    /// The features of a store on a server that keeps what it confirmed.
    pub const SHARED: Self = Self { shared: true, survives_restart: true, keeps: None };
}

/// A store did not answer, or not intelligibly.
#[derive(Debug)]
pub struct StoreError {
    what: String,
    source: Option<BoxError>,
}

impl StoreError {
    /// An error; `what` names the act that failed. No ids, no credentials.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None }
    }

    /// With the client's own error behind it.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.source = Some(source.into());
        self
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
