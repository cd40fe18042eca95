//! The dedup stores: the contract of all stores, and what each has beside it.

#[cfg(feature = "nats")]
mod nats_kv;
