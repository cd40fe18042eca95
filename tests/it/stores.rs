//! The stores, each on a server of its own kind.

#[cfg(feature = "redis")]
mod redis;
