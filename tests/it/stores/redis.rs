//! `RedisStore` on real servers: Redis (`GUESTLIST_STORES=distribution`) or Valkey (`current`).

mod faults;
mod formats;
mod machine;
mod server;
