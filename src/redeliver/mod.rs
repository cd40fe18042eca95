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
//! The layer only writes the plan into the [`Failure`](crate::Failure); whoever settles carries it out.

mod layer;
mod service;

pub use self::layer::RedeliverLayer;
pub use self::service::Redeliver;
