//! The dedup stores: the contract of all stores, and what each has beside it.

mod broken;
mod machine;
#[cfg(feature = "durable")]
mod durable;
mod memory;
mod near;
mod swap;
mod url;
