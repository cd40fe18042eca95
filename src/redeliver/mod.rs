//! Transient failures come again, later.
//!
//! # What it promises
//!
//! 1. A transient failure is planned to be delivered again after the backoff of its attempt, a deferred one after
//!    the delay it asked for.
//! 2. The claim is released with that delay, *before* the delivery is settled: the backoff holds over a
//!    crash, and a second copy does not skip it.
//! 3. It never counts attempts: dedup does, and says when they are spent.
//!
//! A [policy](RedeliverLayer::with_policy) of your own may choose another delay, or none, by the failure's cause or the
//! error's type:
//!
//! ```
//! use guestlist::prelude::*;
//! use guestlist::redeliver::Again;
//! use std::time::Duration;
//!
//! let queue = Queue::new("charges").dead_letter("charges.dead").retry_policy(|failure, attempt| {
//!     match failure.error().downcast_ref::<std::io::Error>() {
//!         Some(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Again::Never,
//!         Some(_) => Again::After(Duration::from_secs(10) * attempt),
//!         None => Again::Backoff,
//!     }
//! });
//! ```
//!
//! The layer only writes the plan into the [`Failure`](crate::Failure); whoever settles carries it out.

mod layer;
mod policy;
mod service;

pub use self::layer::RedeliverLayer;
pub use self::policy::Again;
pub(crate) use self::policy::OwnPolicy;
pub use self::service::Redeliver;
