//! A broker is chosen by URL.

use std::sync::Arc;

use super::Broker;
use super::memory::MemoryBroker;
use crate::Error;

/// Connects to the broker at a URL: `amqp://`, `amqps://`, `nats://`, `tls://` (NATS), or `memory:` (a new, empty one).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let broker = guestlist::broker::connect("memory:").await.unwrap();
/// assert_eq!(broker.system(), "memory");
/// let error = guestlist::broker::connect("kafka://localhost").await.unwrap_err();
/// assert!(format!("{error:?}").contains("kafka"));
/// # }
/// ```
///
/// # Errors
///
/// The URL is none of these, this build lacks the feature for it, or the broker does not answer.
///
/// # Cancel safety
///
/// Cancel safe: dropped before it ends, there is no connection.
pub async fn connect(url: &str) -> Result<Arc<dyn Broker>, Error> {
    match url.split_once(':').map(|(scheme, _)| scheme) {
        Some("memory") => Ok(Arc::new(MemoryBroker::new())),
        Some("amqp" | "amqps") => amqp(url).await,
        Some("nats" | "tls") => nats(url).await,
        // The rest of the URL may hold a password: only the scheme is shown.
        Some(scheme) => Err(Error::url(format!(
            "no broker speaks `{scheme}:`: use amqp://, amqps://, nats://, tls:// or memory:"
        ))),
        None => Err(Error::url("a broker's URL begins with amqp://, amqps://, nats://, tls:// or memory:")),
    }
}

#[cfg(feature = "amqp")]
async fn amqp(url: &str) -> Result<Arc<dyn Broker>, Error> {
    Ok(Arc::new(super::amqp::Amqp::connect(url).await?))
}

#[cfg(not(feature = "amqp"))]
#[expect(clippy::unused_async, reason = "the other build awaits")]
async fn amqp(_url: &str) -> Result<Arc<dyn Broker>, Error> {
    Err(Error::url("this build of guestlist does not speak AMQP: enable its feature `amqp`"))
}

#[cfg(feature = "nats")]
async fn nats(url: &str) -> Result<Arc<dyn Broker>, Error> {
    Ok(Arc::new(super::nats::Nats::connect(url).await?))
}

#[cfg(not(feature = "nats"))]
#[expect(clippy::unused_async, reason = "the other build awaits")]
async fn nats(_url: &str) -> Result<Arc<dyn Broker>, Error> {
    Err(Error::url("this build of guestlist does not speak NATS: enable its feature `nats`"))
}
