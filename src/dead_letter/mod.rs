//! What cannot be handled goes somewhere known, with its story.
//!
//! # What it promises
//!
//! 1. A permanent failure (spent attempts included) is copied to the destination: confirmed *and routed*.
//!    Only then is the claim released as dead-lettered, and the delivery acked.
//! 2. While the copy is not confirmed, nothing is acked: the claim stays, the copy is published again with backoff, and
//!    the queue pauses. After `pause_hold` the delivery is abandoned, and comes again.
//!    A copy that is too large for the destination will not be taken later either: its message stays with its queue,
//!    cause `too_large`, and comes again every five minutes; the queue goes on.
//! 3. Nothing is published for a claim that is lost.
//! 4. The copy's story ([`DeadLetter`](crate::broker::copy::DeadLetter)) is bounded and escaped; body and
//!    application headers are the sender's.
//!
//! A crash between the copy and the ack may make a second copy, with the same id.

mod layer;
mod past;
pub(crate) mod redaction;
mod service;

pub use self::layer::{DeadLetterLayer, Oversized};
pub use self::redaction::{Field, Redact};
pub use self::service::DeadLetterService;
