//! Messages that are to be handled later: scheduled delivery, on any broker.
//!
//! A sender writes one header: [`deliver-at`](DELIVER_AT) with a time (RFC 3339, `2027-01-01T00:00:00Z`, or seconds
//! since 1970), or [`deliver-after`](DELIVER_AFTER) with a length (`90s`, `1h 30m`, ISO 8601's `PT90S`, or plain
//! seconds, `1.5`).
//!
//! # What it promises
//!
//! 1. A message whose time has not come is handed back to the broker with the rest of its delay. It is not claimed, no
//!    attempt is spent, and no handler or slot is used.
//! 2. It is never handled early, as far as the clocks agree. `deliver-at` is judged by this machine's wall clock
//!    against the *sender's*, `deliver-after` against the clock of the server or consumer that saw the message first: the one place
//!    where two machines' clocks are compared. In a [loop of your own](crate::broker) over lapin a redelivered message is taken
//!    to have waited.
//! 3. Under light load it is late by less than a second: on AMQP by less than the shortest
//!    [hold step](crate::broker::HoldSteps), elsewhere by milliseconds.
//! 4. From no delay up to 366 days. A time that is further away, or that cannot be read, makes a dead letter, cause
//!    `undecodable`: a typo must not run at once, nor never.
//!
//! `deliver-after` counts from when the broker stored the message where the broker says when that was (JetStream, the
//! in-memory broker); on AMQP from when a consumer first sees it, which our own copy then carries along. The header
//! stays on the message: once its time has come, it means nothing.
//!
//! A queue's `max_age` counts from the time that was asked for.
//!
//! Outside of dedup (what is not due must not claim) and inside of `dead_letter` (what cannot be read is parked).
//!
//! # Example
//!
//! ```
//! use guestlist::broker::memory::MemoryBroker;
//! use guestlist::{Consumer, Message, Queue};
//! use std::time::{Duration, SystemTime};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> guestlist::Result {
//! let broker = MemoryBroker::new();
//! broker.declare("reminders");
//! let reminder = Message::builder("tea").transport_id("r-1").header("deliver-after", "100ms");
//! broker.send("reminders", reminder).unwrap();
//!
//! let queue = Queue::new("reminders").reject_failed().handler(async |reminder: Message| {
//!     let stored = reminder.timestamp().unwrap();
//!     assert!(stored + Duration::from_millis(100) <= SystemTime::now());
//!     Ok(())
//! });
//! let stop = broker.clone();
//! Consumer::new(broker)
//!     .queue(queue)
//!     .run_until(async move { stop.drained("reminders").await.unwrap() })
//!     .await
//! # }
//! ```

mod due;
mod layer;
mod service;

use std::time::Duration;

pub use self::layer::DelayLayer;
pub use self::service::{Delay, DelayFuture};

/// The longest delay: a year, and a leap day.
pub(crate) const LONGEST: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// The header with the time from which a message may be handled.
pub const DELIVER_AT: &str = "deliver-at";

/// The header with the length of time after which a message may be handled.
pub const DELIVER_AFTER: &str = "deliver-after";
