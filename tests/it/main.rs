//! All integration tests in one crate: the clients are linked once.

#[cfg(feature = "testing")]
mod admin;
#[cfg(all(feature = "amqp", feature = "testing"))]
mod amqp_broker;
#[cfg(feature = "testing")]
mod bad_input;
#[cfg(feature = "testing")]
mod checks;
#[cfg(feature = "testing")]
mod dedup_layer;
#[cfg(any(feature = "amqp", feature = "nats"))]
mod end_to_end;
#[cfg(feature = "testing")]
mod event_log;
#[cfg(feature = "testing")]
mod faults;
#[cfg(feature = "testing")]
mod handlers;
#[cfg(feature = "testing")]
mod invariants;
#[cfg(all(
    feature = "amqp",
    feature = "nats",
    feature = "redis",
    feature = "postgres",
    feature = "durable",
    feature = "testing"
))]
mod kills;
#[cfg(feature = "testing")]
mod memory_broker;
#[cfg(feature = "testing")]
mod middleware;
#[cfg(all(feature = "nats", feature = "testing"))]
mod nats_broker;
#[cfg(feature = "testing")]
mod records;
#[cfg(feature = "testing")]
mod stopping;
#[cfg(feature = "testing")]
mod stores;
#[cfg(feature = "testing")]
mod strangers;
#[cfg(feature = "testing")]
mod support;
