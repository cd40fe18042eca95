//! A store is chosen by URL.

use std::sync::Arc;

use super::{DedupStore, MemoryStore, StoreError};

const SCHEMES: &str = "memory:, file:, redis://, postgres:// or nats://";

/// Connects to the store at a URL:
///
/// | URL | store | feature |
/// |---|---|---|
/// | `memory:` | a new [`MemoryStore`], in this process alone | – |
/// | `file:PATH` | a folder of this machine | `durable` |
/// | `redis://`, `rediss://`, `redis+sentinel://`, `redis+cluster://` (and `valkey…`) | Redis or Valkey | `redis` |
/// | `postgres://`, `postgresql://` | PostgreSQL | `postgres` |
/// | `nats://host/BUCKET`, `tls://host/BUCKET` | a NATS key-value bucket | `nats` |
///
/// Each store's own `connect` says what its URL may hold. Each call connects anew; queues that name a store by URL
/// ([`Queue::store_url`](crate::Queue::store_url)) share one connection for each URL.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let store = guestlist::dedup::connect("memory:").await.unwrap();
/// assert!(!store.features().shared);
/// let error = guestlist::dedup::connect("mongodb://app:secret@localhost").await.unwrap_err();
/// assert!(error.to_string().contains("mongodb:") && !error.to_string().contains("secret"));
/// # }
/// ```
///
/// # Errors
///
/// The URL is none of these, this build lacks the feature for it, or the store does not answer. The text has
/// no credentials.
///
/// # Cancel safety
///
/// Cancel safe: dropped before it ends, there is no connection.
pub async fn connect(url: &str) -> Result<Arc<dyn DedupStore>, StoreError> {
    match url.split_once(':').map(|(scheme, _)| scheme) {
        Some("memory") => Ok(Arc::new(MemoryStore::new())),
        Some("file") => durable(url).await,
        Some("postgres" | "postgresql") => postgres(url).await,
        Some("nats" | "tls") => nats(url).await,
        Some(scheme) if is_redis(scheme) => redis(url).await,
        // The rest of the URL may hold a password: only the scheme is shown.
        Some(scheme) => Err(StoreError::new(format!("no store speaks `{scheme}:`: use {SCHEMES}"))),
        None => Err(StoreError::new(format!("a store's URL begins with {SCHEMES}"))),
    }
}

/// `redis`, `rediss`, `valkey` and so on, with or without a `+cluster` that its store knows.
fn is_redis(scheme: &str) -> bool {
    let server = scheme.split_once('+').map_or(scheme, |(server, _)| server);
    matches!(server, "redis" | "rediss" | "valkey" | "valkeys")
}

macro_rules! stores {
    ($($name:ident: $feature:literal, $store:ident, $what:literal;)+) => {$(
        #[cfg(feature = $feature)]
        async fn $name(url: &str) -> Result<Arc<dyn DedupStore>, StoreError> {
            Ok(Arc::new(super::$store::connect(url).await?))
        }

        #[cfg(not(feature = $feature))]
        async fn $name(_url: &str) -> Result<Arc<dyn DedupStore>, StoreError> {
            let (what, feature) = ($what, $feature);
            Err(StoreError::new(format!("this build of guestlist keeps no ids in {what}: enable its feature `{feature}`")))
        }
    )+};
}

stores! {
    durable: "durable", DurableStore, "a folder of this machine";
    redis: "redis", RedisStore, "Redis";
    postgres: "postgres", PostgresStore, "PostgreSQL";
    nats: "nats", NatsKvStore, "NATS";
}
