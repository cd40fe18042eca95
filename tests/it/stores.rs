//! The stores, each on its own server.

#[cfg(all(feature = "postgres", feature = "testing"))]
mod postgres;
