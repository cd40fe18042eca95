//! The dedup stores: the contract of all stores, and what each has beside it.

mod broken;
#[cfg(feature = "durable")]
mod durable;
mod machine;
mod memory;
#[cfg(feature = "nats")]
mod nats_kv;
mod near;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
mod swap;
mod url;
