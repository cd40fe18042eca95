//! For your own tests: the contracts that every broker and every store keep, a recorder of events, a [`checker`] of
//! their logs, a store that fails as told.
//!
//! Feature `testing`. Nothing here is for production: a broken promise panics.

pub mod broker_contract;
pub mod checker;
mod faulty_store;
mod recorder;
pub mod store_contract;

pub use self::checker::Checker;
pub use self::faulty_store::{Fault, FaultyStore};
pub use self::recorder::Recorder;
pub use crate::random::seeded::{SeededRandomness, seed_randomness};
