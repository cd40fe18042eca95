//! What cannot be handled goes somewhere known, with its story.
//!
//! # What it promises
//!
//! 1. A permanent failure (spent attempts included) is copied to the destination: confirmed *and routed*.
//!    Only then is the claim released as dead-lettered, and the delivery acked.
//! 2. While the copy is not confirmed, nothing is acked: the claim stays, the copy is published again with backoff, and
//!    the queue pauses. After `pause_hold` the delivery is abandoned, and comes again.
//!    A copy that is too large for the destination will not be taken later either: it goes without its history, then without
//!    the error's text. If that is not enough, its message stays with its queue, cause `too_large`, and comes again every
//!    five minutes; the queue goes on. Or a part of it is parked, if the queue says so: [`Oversized`].
//! 3. Nothing is published for a claim that is lost.
//! 4. The copy's story ([`DeadLetter`](crate::broker::copy::DeadLetter)) is bounded and escaped; body and
//!    application headers are the sender's, but for what a redaction of yours takes away ([`Redact`]).
//!
//! A crash between the copy and the ack may make a second copy, with the same id.
//!
//! # Native dead-lettering
//!
//! [`Queue::reject_failed`](crate::Queue::reject_failed) leaves failed messages to the broker. It needs no permission to publish, and
//! promises less:
//!
//! | | a dead-letter destination | `reject_failed`, RabbitMQ | `reject_failed`, JetStream |
//! |---|---|---|---|
//! | the message goes | to the destination | to the queue's dead-letter exchange; without one it is **gone** | **nowhere**: `+TERM` ends it for the durable, and a work queue's stream drops it |
//! | confirmed before the ack | yes | no. From a classic queue, and a quorum queue without `at-least-once`, it may be lost on its way | no |
//! | its story (cause, attempts, error) | in its headers | no, only `x-death` with the reason `rejected` | no; an advisory (`$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.…`) has its number in the stream |
//! | while the place is away | the queue pauses | unseen | does not arise |
//! | spent attempts and parked ids | as any failure | as any failure | as any failure |
//!
//! Whether a queue has a dead-letter exchange cannot be seen over AMQP, so each start with `reject_failed` warns. On RabbitMQ 4.3 a reject
//! counts toward a quorum queue's delivery limit. On core NATS there is nobody to reject to: the message is lost.
//!
//! # The story
//!
//! All headers of a letter: [a table](crate::broker::copy#headers). The history is what the message's copies carried, and what this
//! process saw itself and still remembers ([`HISTORY_MEMORY`](crate::defaults::HISTORY_MEMORY)). Over AMQP each delayed
//! message is a copy, so its history is whole unless a process dies. JetStream hands a message out again as it is: there
//! each process knows only the failures that it saw. Attempts that are in nobody's history show as gaps in the numbers.
//! It goes on when the letter is redriven; each failure says its generation.

mod layer;
mod past;
pub(crate) mod redaction;
mod service;

pub use self::layer::{DeadLetterLayer, Oversized};
pub use self::redaction::{Field, Redact};
pub use self::service::DeadLetterService;
