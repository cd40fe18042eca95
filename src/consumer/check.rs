//! Whether a queue's settings go with each other and with what the broker says of itself.
//!
//! [`findings`] is a pure function over [`Settings`] and [`Facts`]. What would break a promise refuses the start; what is
//! risky, and may be meant so, is warned about once. Each finding names both numbers, the setting and the fix.
//!
//! | one number | the other | refused or warned about |
//! |---|---|---|
//! | `max_attempts` | 0 | refused: nothing would ever run |
//! | `max_attempts` | 3 | less: warned. A message that kills its process can take a good neighbour's last attempt |
//! | `timeout` | `max_run` | longer: warned, `max_run` ends the handler first |
//! | `tries` × `timeout`, and the pauses between | `max_run` | longer: warned, the last tries never end |
//! | `lease` | 1 s | shorter: warned, a slow answer of the store loses it |
//! | `lease` | `max_run` | longer: warned, a crash blocks an id for longer than any run |
//! | `wait` | `lease` | longer: warned, it is cut to the lease |
//! | `drain` | `timeout` | shorter: warned, each stop interrupts handlers |
//! | `window` | the longest backoff | shorter: warned, a hold copy comes after its original is forgotten |
//! | `window` | `ack_wait` | shorter: warned, so does a redelivery whose ack was lost |
//! | `window` | `max_age` | shorter: warned, a copy may be older than the memory of its original |
//! | `max_run`, `pause_hold` | the broker's limit for a delivery (RabbitMQ: 30 min) | not shorter: warned, the channel is closed |
//! | `ack_wait` | the heartbeat | less than two: refused. Less than three: warned |
//! | `max_ack_pending` | 1,000 | less: warned, messages that wait for a delay occupy it |
//! | the stream's `max_age` | the backoffs of all attempts | shorter: warned, messages are gone before their last attempt |
//! | the stream's limits, discarding old | | warned: messages that were never handled are dropped |
//! | the dead letters' limits, discarding old | | warned: letters are dropped, by age or number |
//! | `reject_failed` | `dead_letter` | both: warned, letters go to `dead_letter` |
//! | `reject_failed` | | alone: warned, native dead-lettering promises less |
//!
//! Typed refusals come before these: see [`ConfigError`](super::ConfigError) (`window` below `lease`, `concurrency` above
//! `prefetch`, hold steps, stores), and the broker's own (a missing queue, `max_deliver`, a filter).

#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use super::config::{ConfigError, QueueConfig};
use crate::broker::{Facts, Kept};
use crate::{Backoff, defaults};

/// Below this, a store that answers slowly once or twice loses the lease: renewals have a sixth of it each.
const SHORT_LEASE: Duration = Duration::from_secs(1);

/// With fewer, a vanished neighbour and one crash of its own spend all of a good message's attempts (the suspect rule).
const FEW_ATTEMPTS: u32 = 3;

/// A wave of failures makes as many messages wait for their delay.
const SMALL_ACK_PENDING: i64 = 1_000;

/// After so many, a delay grows no more: doubled so often it is 2^32 times the first.
const STILL_GROWING: u32 = 33;

/// A heartbeat that is late, or lost once, must not bring the message again.
const FEWEST_HEARTBEATS: u32 = 2;
const ENOUGH_HEARTBEATS: u32 = 3;

/// Something about a queue's settings that is unsafe or risky.
///
/// ```
/// use guestlist::broker::memory::MemoryBroker;
/// use guestlist::prelude::*;
/// use std::time::Duration;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> guestlist::Result {
/// let queue = Queue::new("charges").dead_letter("charges.dead").timeout(Duration::from_secs(3600));
/// let findings = queue.check(&MemoryBroker::new()).await?;
/// assert!(findings[0].to_string().contains("max_run"), "which is 15 minutes");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// The queue.
    pub queue: String,
    /// How bad it is.
    pub severity: Severity,
    /// What it is: both numbers, the setting and the fix.
    pub message: String,
}

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// It may be meant so: the consumer starts, and warns once.
    Warn,
    /// A promise would not hold: the consumer does not start.
    Refuse,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "queue `{}`: {}", self.queue, self.message)
    }
}

impl Finding {
    pub(super) fn refused(queue: &str, error: &ConfigError) -> Self {
        let message = error.to_string();
        let message = message.trim_start_matches(&format!("queue `{queue}` ")).to_owned();
        Self { queue: queue.to_owned(), severity: Severity::Refuse, message }
    }
}

/// Once, at the start.
pub(crate) fn warn(findings: &[Finding]) {
    for Finding { queue, message, .. } in findings.iter().filter(|finding| finding.severity == Severity::Warn)
    {
        tracing::warn!(target: "guestlist", queue, "{message}");
    }
}

/// The numbers of a queue that are compared.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    lease: Duration,
    window: Duration,
    max_run: Duration,
    max_age: Option<Duration>,
    wait: Option<Duration>,
    timeout: Option<Duration>,
    tries: u32,
    max_attempts: u32,
    backoff: Backoff,
    pause_hold: Duration,
    /// Of the consumer, if there is one.
    drain: Option<Duration>,
    heartbeat: Duration,
    rejects: bool,
    dead_letters: bool,
}

impl Settings {
    pub(super) fn of(config: &QueueConfig, drain: Option<Duration>) -> Self {
        let dedup = &config.dedup;
        Self {
            lease: dedup.lease,
            window: dedup.window,
            max_run: dedup.max_run,
            max_age: dedup.max_age,
            wait: dedup.wait,
            timeout: config.timeout,
            tries: config.tries,
            max_attempts: dedup.max_attempts,
            backoff: config.backoff,
            pause_hold: config.pause_hold,
            drain,
            heartbeat: config.spec.heartbeat,
            rejects: config.reject_failed,
            dead_letters: config.spec.dead_letter.is_some(),
        }
    }

    /// What all tries of one attempt may take, with the longest pauses between them.
    fn all_tries(&self) -> Option<Duration> {
        let pauses = (1..self.tries).map(|n| Backoff::tries().without_jitter().delay(n));
        let pauses = pauses.fold(Duration::ZERO, Duration::saturating_add);
        self.timeout.map(|timeout| timeout.saturating_mul(self.tries).saturating_add(pauses))
    }

    /// How long after its first attempt a message may be tried for the last time, by its backoffs alone.
    fn horizon(&self) -> Duration {
        let exact = self.backoff.without_jitter();
        let pauses = self.max_attempts.saturating_sub(1);
        let growing = pauses.min(STILL_GROWING);
        let sum = (1..=growing).map(|n| exact.delay(n)).fold(Duration::ZERO, Duration::saturating_add);
        sum.saturating_add(exact.delay(pauses).saturating_mul(pauses - growing))
    }
}

/// All that there is to say, what refuses the start first.
pub(super) fn findings(queue: &str, settings: &Settings, facts: &Facts) -> Vec<Finding> {
    let found = [
        attempts(settings),
        timeout(settings),
        lease(settings),
        drain(settings),
        window(settings, facts),
        delivery_limit(settings, facts),
        heartbeats(settings, facts),
        pending(facts),
        source(settings, facts),
        letters(facts),
        rejecting(settings, facts),
    ];
    let mut findings: Vec<Finding> = found
        .into_iter()
        .flatten()
        .map(|(severity, message)| Finding { queue: queue.to_owned(), severity, message })
        .collect();
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    findings
}

type Found = Vec<(Severity, String)>;

fn warn_if(risky: bool, message: impl FnOnce() -> String) -> Found {
    if risky { vec![(Severity::Warn, message())] } else { Vec::new() }
}

fn attempts(settings: &Settings) -> Found {
    match settings.max_attempts {
        0 => vec![(
            Severity::Refuse,
            "max_attempts is 0, so no message would ever run: at least 1, better 3".into(),
        )],
        few => warn_if(few < FEW_ATTEMPTS, || {
            format!(
                "max_attempts is {few}, fewer than {FEW_ATTEMPTS}: a message that kills its process can take a good \
                 neighbour's last attempt; allow {FEW_ATTEMPTS} or more"
            )
        }),
    }
}

fn timeout(settings: &Settings) -> Found {
    let (Some(timeout), Some(all)) = (settings.timeout, settings.all_tries()) else { return Vec::new() };
    let Settings { max_run, tries, .. } = settings;
    if timeout > *max_run {
        return warn_if(true, || {
            format!(
                "the timeout of {timeout:?} is longer than max_run, {max_run:?}, which ends the handler first: shorten it, or raise max_run"
            )
        });
    }
    warn_if(all > *max_run, || {
        format!(
            "{tries} tries with a timeout of {timeout:?} each take up to {all:?} with the pauses between them, longer than \
             max_run, {max_run:?}, which ends the last ones: raise max_run, or lower tries or timeout"
        )
    })
}

fn lease(settings: &Settings) -> Found {
    let Settings { lease, max_run, wait, .. } = settings;
    let short = warn_if(*lease < SHORT_LEASE, || {
        format!(
            "the lease of {lease:?} is shorter than {SHORT_LEASE:?}: a store that answers within {:?} is too late, and the \
             message runs again; lengthen the lease",
            *lease / defaults::STORE_CALLS_PER_LEASE
        )
    });
    let long = warn_if(lease > max_run, || {
        format!(
            "the lease of {lease:?} is longer than max_run, {max_run:?}: a crashed process blocks its ids for longer than any \
             run takes; shorten the lease"
        )
    });
    let wait = warn_if(wait.is_some_and(|wait| wait > *lease), || {
        let wait = wait.unwrap_or_default();
        format!("the wait of {wait:?} is longer than the lease, {lease:?}, to which it is cut: shorten it")
    });
    [short, long, wait].concat()
}

fn drain(settings: &Settings) -> Found {
    let (Some(drain), Some(timeout)) = (settings.drain, settings.timeout) else { return Vec::new() };
    warn_if(drain < timeout, || {
        format!(
            "the consumer's drain of {drain:?} is shorter than the timeout, {timeout:?}: each stop may interrupt handlers that \
             would have ended; lengthen the drain, and the time that your supervisor waits"
        )
    })
}

fn window(settings: &Settings, facts: &Facts) -> Found {
    let Settings { window, .. } = settings;
    let shorter_than = |what: &str, length: Option<Duration>, why: &str| {
        let length = length.unwrap_or_default();
        warn_if(*window < length, || {
            format!("the window of {window:?} is shorter than {what}, {length:?}: {why}; lengthen the window")
        })
    };
    [
        shorter_than(
            "the longest backoff",
            Some(settings.backoff.cap()),
            "a copy that waits for its delay comes when its id is forgotten, and runs again",
        ),
        shorter_than(
            "ack_wait",
            facts.ack_wait,
            "a message whose ack was lost comes again when its id is forgotten",
        ),
        shorter_than(
            "max_age",
            settings.max_age,
            "a copy may be that late, when its id is forgotten, and runs again",
        ),
    ]
    .concat()
}

fn delivery_limit(settings: &Settings, facts: &Facts) -> Found {
    let Some(limit) = facts.delivery_timeout else { return Vec::new() };
    let too_long = |setting: &str, length: Duration| {
        warn_if(length >= limit, || {
            format!(
                "{setting} is {length:?}, and the broker gives a delivery up after {limit:?} unless it is set otherwise \
                 (RabbitMQ: consumer_timeout, x-consumer-timeout), which heartbeats do not extend: it closes the channel, and \
                 all that is in hand comes again; shorten {setting}, or raise the broker's limit"
            )
        })
    };
    [too_long("max_run", settings.max_run), too_long("pause_hold", settings.pause_hold)].concat()
}

fn heartbeats(settings: &Settings, facts: &Facts) -> Found {
    let (Some(ack_wait), beat) = (facts.ack_wait, settings.heartbeat) else { return Vec::new() };
    let message = |fewest: u32| {
        format!(
            "ack_wait is {ack_wait:?}, less than {fewest} heartbeats of {beat:?} (a third of the lease): messages come again \
             while they are handled; set ack_wait to {:?}, or shorten the lease",
            beat.saturating_mul(ENOUGH_HEARTBEATS)
        )
    };
    if ack_wait < beat.saturating_mul(FEWEST_HEARTBEATS) {
        return vec![(Severity::Refuse, message(FEWEST_HEARTBEATS))];
    }
    warn_if(ack_wait < beat.saturating_mul(ENOUGH_HEARTBEATS), || message(ENOUGH_HEARTBEATS))
}

fn pending(facts: &Facts) -> Found {
    let Some(limit) = facts.max_ack_pending else { return Vec::new() };
    warn_if(limit < SMALL_ACK_PENDING, || {
        format!(
            "the durable's max_ack_pending is {limit}, less than {SMALL_ACK_PENDING}: messages that wait for a delay occupy it, \
             and a wave of failures stops all deliveries; raise it (nats consumer edit)"
        )
    })
}

fn source(settings: &Settings, facts: &Facts) -> Found {
    let Kept { max_age, .. } = facts.source;
    let horizon = settings.horizon();
    let old = warn_if(max_age.is_some_and(|age| age < horizon), || {
        format!(
            "the stream drops messages after {:?} (its max_age), and the backoffs of {} attempts take {horizon:?}: what fails \
             is gone before it is a dead letter; raise max_age, or shorten the backoff",
            max_age.unwrap_or_default(),
            settings.max_attempts
        )
    });
    let full = facts.source.drops_when_full().map(|limits| {
        let what = format!(
            "the stream drops its oldest messages at {limits}, handled or not: remove the limit, or let it discard new ones"
        );
        (Severity::Warn, what)
    });
    old.into_iter().chain(full).collect()
}

fn letters(facts: &Facts) -> Found {
    let Kept { max_age, .. } = facts.dead_letters;
    let old = max_age.map(|age| {
        format!("dead letters are dropped after {age:?} (the stream's max_age), looked at or not: raise it, or remove it")
    });
    let full = facts.dead_letters.drops_when_full().map(|limits| {
        format!(
            "the oldest dead letters are dropped at {limits}: remove the limit, or let the stream discard new ones, and the \
             queue pauses when it is full"
        )
    });
    old.into_iter().chain(full).map(|message| (Severity::Warn, message)).collect()
}

fn rejecting(settings: &Settings, facts: &Facts) -> Found {
    if settings.rejects && settings.dead_letters {
        return warn_if(true, || {
            "reject_failed and dead_letter are both set: failed messages go to dead_letter; remove reject_failed".into()
        });
    }
    warn_if(settings.rejects, || {
        let end = facts.rejected.unwrap_or("dropped, or left to the broker");
        format!(
            "reject_failed leaves failed messages to the broker: {end}. No story goes with them, and nothing is confirmed; \
             name a dead_letter destination to keep them"
        )
    })
}
