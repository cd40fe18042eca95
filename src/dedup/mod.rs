//! Each id once: claims by lease, remembered completions.
//!
//! # What it promises
//!
//! 1. An id is remembered as done only after the handler returned `Ok`.
//! 2. At most one run of an id holds an unexpired lease, over all consumers that share the store.
//! 3. A delivery of an id that is in progress elsewhere is never acked: it waits, then is handed back.
//! 4. A failed, panicked, cancelled or timed-out handler gives its claim back, so that the next
//!    delivery runs, but not before its backoff is over, and at most `max_attempts` times.
//! 5. Attempts are counted when the id is claimed, so that a message that kills its process is
//!    noticed; ids whose holder vanished run one at a time.
//!
//! It does not promise exactly-once effects: a crash between the handler's `Ok` and `complete` runs the handler
//! again once the lease is over.
//!
//! # Example
//!
//! The layer around any tower service of messages, without the rest of this crate:
//!
//! ```
//! use guestlist::dedup::{DedupLayer, MemoryStore};
//! use guestlist::{HandlerService, Message, Outcome};
//! use tower::{ServiceBuilder, ServiceExt};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! let service = ServiceBuilder::new()
//!     .layer(DedupLayer::new(MemoryStore::new(), "orders"))
//!     .service(HandlerService::new(async |_: Message| Ok(())));
//!
//! let order = || Message::builder("{}").transport_id("order-1").build();
//! assert_eq!(service.clone().oneshot(order()).await.unwrap(), Outcome::Handled);
//! assert_eq!(service.clone().oneshot(order()).await.unwrap(), Outcome::Duplicate);
//! # }
//! ```

mod claims;
mod guard;
mod layer;
pub mod protocol;
mod service;
pub mod store;
mod suspects;
mod wait;

use std::any::Any;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use self::claims::Lease;
pub(crate) use self::claims::retain;
pub(crate) use self::guard::HeldClaim;
pub use self::layer::{DedupLayer, SharedStore, StorePolicy};
use self::protocol::Run;
pub use self::protocol::{Before, Fence, Release};
pub use self::service::Dedup;
pub(crate) use self::service::digest;
#[cfg(feature = "nats")]
pub use self::store::NatsKvStore;
pub use self::store::{
    DedupStore, InProcessStore, MemoryStore, NearCache, StoreError, StoreFeatures, connect,
};
#[cfg(feature = "durable")]
pub use self::store::{Durability, DurableStore};
#[cfg(feature = "postgres")]
pub use self::store::{PostgresStore, PostgresStoreBuilder};
#[cfg(feature = "redis")]
pub use self::store::{RedisStore, RedisStoreBuilder};
pub use self::suspects::Suspects;
use crate::DedupKey;

/// What a handler may know of its run.
#[derive(Clone)]
pub(crate) struct RunContext {
    pub(crate) fence: Fence,
    pub(crate) attempt: u32,
    pub(crate) cancel: Option<CancellationToken>,
    lease: Arc<Lease>,
    /// What an inbox lends to the handler.
    loan: Option<Arc<dyn Any + Send + Sync>>,
}

impl RunContext {
    /// Whether the claim behind the run still holds, by the holder's own view.
    pub(crate) fn in_force(&self) -> bool {
        self.lease.in_force()
    }

    pub(crate) fn key(&self) -> DedupKey {
        self.lease.key
    }

    pub(crate) fn run(&self) -> Run {
        self.lease.run
    }

    pub(crate) fn loan(&self) -> Option<&Arc<dyn Any + Send + Sync>> {
        self.loan.as_ref()
    }

    pub(crate) fn lend(&mut self, loan: Arc<dyn Any + Send + Sync>) {
        self.loan = Some(loan);
    }

    /// While this lives, the claim is not renewed.
    pub(crate) fn ending(&self) -> Ending<'_> {
        self.lease.set_ending(true);
        Ending(&self.lease)
    }
}

/// A claim about to be completed by somebody else's transaction. Dropped, it is renewed again.
pub(crate) struct Ending<'a>(&'a Lease);

impl Ending<'_> {
    /// It is completed.
    pub(crate) fn for_good(self) {
        std::mem::forget(self);
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.set_ending(false);
    }
}
