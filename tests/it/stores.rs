//! The dedup stores: the contract of all stores, and what each has beside it.

mod broken;
#[cfg(feature = "durable")]
mod durable;
mod memory;
mod swap;
