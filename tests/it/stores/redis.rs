//! `RedisStore` on real servers: Redis (`GUESTLIST_STORES=distribution`) or Valkey (`current`).

mod cluster;
mod consumer;
mod contract;
mod faults;
mod formats;
mod machine;
mod proxy;
mod server;
mod sharded;
mod tls;
