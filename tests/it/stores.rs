//! The dedup stores: the contract of all stores, and what each has beside it.

mod broken;
mod memory;
#[cfg(feature = "postgres")]
mod postgres;
mod swap;
