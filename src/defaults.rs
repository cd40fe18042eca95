//! Every default, in one place, with its reason.

use std::time::Duration;

/// How long a completed id is remembered: an hour.
///
/// Longer than any sensible redelivery; a window shorter than the time in which a copy can
/// still arrive lets that copy run.
pub const WINDOW: Duration = Duration::from_secs(60 * 60);

/// How long a claim holds without renewal: 30 s. A crashed holder blocks its id for this long.
pub const LEASE: Duration = Duration::from_secs(30);

/// Claims are renewed each lease / 3, so that two renewals in a row may fail.
pub const RENEWALS_PER_LEASE: u32 = 3;

/// A store call may take lease / 6, so that an unknown answer can still be asked again within the lease.
pub const STORE_CALLS_PER_LEASE: u32 = 6;

/// How long a delivery waits in process for another holder of its id, at most: 5 s
/// (less if the lease is shorter).
pub const WAIT: Duration = Duration::from_secs(5);

/// How many times an id is tried, over all consumers and crashes: 5.
pub const MAX_ATTEMPTS: u32 = 5;

/// The first delay between attempts: 1 s.
pub const BACKOFF_BASE: Duration = Duration::from_secs(1);

/// Each delay is this many times the one before: 4.
pub const BACKOFF_FACTOR: u32 = 4;

/// No delay between attempts is longer than this: 5 min.
pub const BACKOFF_CAP: Duration = Duration::from_secs(5 * 60);

/// An id that failed stays on record for this much longer than its longest backoff: an hour. A delivery that is
/// later than that starts counting anew.
pub const BACKOFF_KEPT: Duration = Duration::from_secs(60 * 60);

/// In-process tries within one claim: 1, that is, none but the first.
pub const TRIES: u32 = 1;

/// The first delay between in-process tries: 50 ms. They share one claim and one delivery.
pub const TRIES_BACKOFF_BASE: Duration = Duration::from_millis(50);

/// How long one run may renew its claim: 15 min. A deadlocked handler does not hold its id for ever.
pub const MAX_RUN: Duration = Duration::from_secs(15 * 60);

/// How long a stopping consumer lets running handlers finish: 30 s.
pub const DRAIN: Duration = Duration::from_secs(30);

/// How long deliveries in hand are kept while the store or the dead-letter destination is away: 30 s.
pub const PAUSE_HOLD: Duration = Duration::from_secs(30);

/// The first delay before a paused queue, or a lost connection, is tried again: 100 ms.
pub const RECONNECT_BASE: Duration = Duration::from_millis(100);

/// No delay before such a try is longer than this: 2 s, so that a queue goes on within moments of what it waited for.
pub const RECONNECT_CAP: Duration = Duration::from_secs(2);

/// After this many connections in a row that brought no delivery, were not [`STEADY`] and ended in
/// an error, the consumer gives up with that error (fault F27). With the delays above, of
/// which the jitter takes half: about five minutes.
pub const MAX_REBUILDS: u32 = 300;

/// A connection that has lasted this long was a good one, whether it brought a delivery or not: a minute.
/// Else a quiet queue would be given up after [`MAX_REBUILDS`] restarts of its broker, over the years.
pub const STEADY: Duration = Duration::from_secs(60);

/// Handlers that run at once, for each queue: 16.
pub const CONCURRENCY: usize = 16;

/// The shortest hold step for delayed redelivery over AMQP: 500 ms. A delayed message is late by less than this.
pub const HOLD_SHORTEST: Duration = Duration::from_millis(500);

/// Each hold step is this many times the one before: 4. Fewer queues than with 2, and at most three hops on each.
pub const HOLD_FACTOR: u32 = 4;

/// From this delay on a JetStream message waits in its durable's own stream: a minute.
///
/// A shorter one stays with the server as a `-NAK`, which costs no copy, but a place among the durable's 100,000 unacked.
/// So those last for 1,600 failures a second, and waiting for another holder of an id copies nothing with the default
/// [`LEASE`]. A longer one is a copy, unless that is not confirmed: then it is a `-NAK` as well.
pub const LONG_DELAY: Duration = Duration::from_secs(60);

/// How long a copy may take to be confirmed: 5 s. Then the answer is unknown, and it is published again.
pub const CONFIRM: Duration = Duration::from_secs(5);

/// The most bytes of an error's text in a dead letter: 1 KiB. AMQP headers are not split over
/// frames, and NATS counts them in the payload limit.
pub const ERROR_TEXT: usize = 1024;

/// The most failures in a dead letter's history: the last ten.
pub const HISTORY_FAILURES: usize = 10;

/// The most bytes of a dead letter's history, header name and encoding included: 4 KiB.
pub const HISTORY: usize = 4096;

/// What a process remembers of the failures of ids that are not done, for each queue: 8 MiB, some 3,000 full histories.
/// The oldest go first.
pub const HISTORY_MEMORY: u64 = 8 * 1024 * 1024;

/// The longest message id, in bytes: 4 KiB. A longer one is an invalid id, not a hash of itself.
pub const MAX_ID: usize = 4096;

/// The ids a memory store remembers: a million (about 500 bytes each). It is loud when it forgets early.
pub const MEMORY_STORE_IDS: u64 = 1_000_000;

/// The prefetch for a concurrency: half as many again, so that a slot that falls free finds work.
///
/// ```
/// assert_eq!(guestlist::defaults::prefetch(16), 24);
/// ```
pub fn prefetch(concurrency: usize) -> u16 {
    u16::try_from(concurrency.saturating_mul(3).div_ceil(2)).unwrap_or(u16::MAX)
}

/// What the keys of a `RedisStore` begin with.
pub const REDIS_PREFIX: &str = "guestlist:";

/// Connecting to Redis, with TLS and login, may take this long: 3 s.
pub const REDIS_CONNECT: Duration = Duration::from_secs(3);

/// An answer of Redis that takes longer is not waited for, and the connection is replaced: 3 s.
///
/// Below the default deadline of a store call (5 s, see [`STORE_CALLS_PER_LEASE`]), above what Redis may stall
/// for a slow disk (2 s with `appendfsync everysec`).
pub const REDIS_ANSWER: Duration = Duration::from_secs(3);
