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
#[cfg(feature = "postgres")]
mod postgres_inbox;
#[cfg(feature = "redis")]
mod redis;
#[cfg(any(feature = "redis", feature = "postgres", feature = "nats", feature = "durable"))]
mod servers;
mod swap;
mod url;
