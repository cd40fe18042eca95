//! The dedup stores.

#[cfg(feature = "durable")]
mod durable;
