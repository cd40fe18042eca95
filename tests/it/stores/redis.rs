//! `RedisStore` on real servers: Redis (`GUESTLIST_STORES=distribution`) or Valkey (`current`).

mod cluster;
mod contract;
mod faults;
mod formats;
mod machine;
mod proxy;
mod server;
