//! Consumer middleware for message queues: an *idempotent consumer*.
//!
//! Networks hiccup, so senders send twice and brokers deliver twice; when the message says "charge the customer",
//! the second copy must not run. guestlist wraps the handler you have in tower layers: each delivery's id is
//! looked up in a store, duplicates are acked without calling the handler, failures are tried again with
//! a delay, and what cannot be handled goes to the dead letters with its story.
//!
//! ```no_run
//! use guestlist::prelude::*;
//!
//! #[derive(serde::Deserialize)]
//! struct Charge { account: String, cents: i64 }
//!
//! async fn charge(Json(c): Json<Charge>, fence: Fence) -> Result<(), Failure> {
//!     if c.cents <= 0 {
//!         return Err(Failure::permanent("amount must be positive")); // → dead letter
//!     }
//!     bank::charge(&c.account, c.cents, fence).await?;               // any error: transient → retried
//!     Ok(())                                                         // → remembered, then acked
//! }
//!
//! #[tokio::main]
//! async fn main() -> guestlist::Result {
//!     Consumer::connect("amqp://localhost").await?
//!         .queue(Queue::new("charges").window(HOUR).dead_letter("charges.dead").handler(charge))
//!         .run_until(guestlist::signal())
//!         .await
//! }
//! # mod bank {
//! #     pub async fn charge(_: &str, _: i64, _: guestlist::Fence) -> Result<(), std::io::Error> { Ok(()) }
//! # }
//! ```
//!
//! # Where things are
//!
//! - [`Consumer`] and [`Queue`] run a handler over a broker; [`broker`] has the brokers.
//! - [`dedup`] is the heart: the claim protocol and its stores. [`redeliver`], [`delay`], [`dead_letter`], [`retry`],
//!   [`inbox`] and [`trace`] are the other layers; [`Pipeline`] puts them in their one right order.
//! - [`admin`] is the operator's: list, show, redrive and discard dead letters, look ids up.
//! - [`_docs`] has a page for each store, says why things are as they are, and how they were proven.
//!
//! # Features
//!
//! None is on by default. `amqp`: RabbitMQ. `nats`: NATS, the broker and the store in a bucket. `redis`, `postgres`, `durable`: stores
//! in Redis or Valkey, in PostgreSQL (and its transactional inbox), in a folder. `testing`: contract suites and doubles for tests of your
//! own. `full`: all of them. The in-memory broker and store are always there.

pub mod admin;
mod backoff;
pub mod broker;
mod clock;
mod consumer;
pub mod dead_letter;
pub mod dedup;
pub mod defaults;
pub mod delay;
mod delivery;
mod disposition;
mod error;
mod events;
mod failure;
mod handler;
mod identity;
pub mod inbox;
mod message;
mod pause;
mod pipeline;
mod random;
pub mod redeliver;
pub mod retry;
pub mod settlement;
mod signal;
#[cfg(feature = "testing")]
pub mod testing;
pub mod trace;

pub use tokio_util::sync::CancellationToken;

pub use self::backoff::Backoff;
pub use self::consumer::{ConfigError, Consumer, Queue, QueueStatus, State, Status, disposition};
pub use self::dedup::Fence;
pub use self::delivery::{AckHandle, Acker, BoxFuture, Delivery, Settle, Settling};
pub use self::disposition::{Disposition, Outcome};
pub use self::error::{Error, ErrorKind};
pub use self::events::{Event, EventKind, Observer};
pub use self::failure::{Cause, Failure, FailureClass};
pub use self::handler::{
    Arguments, Attempt, FromMessage, Handled, Handler, HandlerFuture, HandlerService, Json, Needs,
};
pub use self::identity::{DedupKey, Identity, MissingId, Scope};
pub use self::message::{Headers, Message, MessageBuilder, MessageId, Source};
pub use self::pipeline::{Inner, InsideDedup, OutsideDedup, Pipeline, Stack};
pub use self::signal::signal;

/// A boxed error: what the services of a stack speak.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What a `main` that runs a consumer returns.
pub type Result<T = (), E = Error> = std::result::Result<T, E>;

/// What most programs need.
pub mod prelude {
    pub use crate::consumer::{Consumer, Queue};
    pub use crate::dedup::{Fence, MemoryStore};
    pub use crate::failure::Failure;
    pub use crate::handler::{Attempt, Json};
    pub use crate::identity::{Identity, MissingId};
    pub use crate::message::{Message, MessageId};
    pub use crate::{Backoff, CancellationToken};

    use std::time::Duration;

    /// A minute.
    pub const MINUTE: Duration = Duration::from_secs(60);
    /// An hour.
    pub const HOUR: Duration = Duration::from_secs(60 * 60);
    /// A day.
    pub const DAY: Duration = Duration::from_secs(24 * 60 * 60);
}

/// Longer texts, compiled and linked with the rest of the docs.
pub mod _docs {
    #[doc = include_str!("../docs/design.md")]
    pub mod design {}
    #[doc = include_str!("../docs/proof.md")]
    pub mod proof {}
    #[doc = include_str!("../docs/stores/near_cache.md")]
    pub mod near_cache {}
    #[doc = include_str!("../docs/stores/postgres.md")]
    #[cfg(feature = "postgres")]
    pub mod postgres {}
    #[doc = include_str!("../docs/stores/redis.md")]
    #[cfg(feature = "redis")]
    pub mod redis {}
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
