//! In-process tries for short hiccups, within one claim and one delivery.
//!
//! # What it promises
//!
//! 1. A transient failure is tried again at once, after a short backoff, up to the number of tries; then the
//!    last failure goes on outward.
//! 2. Permanent and deferred failures go on at once, and so does a shed load.
//! 3. However many tries, it is one attempt: the claim counts, not the try.
//!
//! It belongs inside dedup (one claim covers the tries) and outside a timeout (each try has its own).
//!
//! ```
//! use guestlist::retry::RetryLayer;
//! use guestlist::{Failure, HandlerService, Message};
//! use std::sync::atomic::{AtomicU32, Ordering};
//! use tower::{ServiceBuilder, ServiceExt};
//!
//! static TRIES: AtomicU32 = AtomicU32::new(0);
//!
//! async fn flaky(_: Message) -> Result<(), Failure> {
//!     match TRIES.fetch_add(1, Ordering::Relaxed) {
//!         0 => Err("the bank hung up".into()),
//!         _ => Ok(()),
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! let service = ServiceBuilder::new().layer(RetryLayer::new(3)).service(HandlerService::new(flaky));
//! service.oneshot(Message::builder("").build()).await.unwrap();
//! assert_eq!(TRIES.load(Ordering::Relaxed), 2);
//! # }
//! ```

mod layer;
mod service;

pub use self::layer::RetryLayer;
pub use self::service::Retry;
