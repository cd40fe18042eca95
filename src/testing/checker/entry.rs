//! [`Entry`]: one line of a log.

use std::sync::Arc;

use tokio::time::Instant;

use crate::dedup::protocol::Run;
use crate::{Cause, DedupKey, Event, EventKind};

/// One thing that happened in one process. Holds no payload, header, raw id or token.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// The process that it happened in. Two processes must not have the same name; one that is started
    /// again may keep its name.
    pub process: Arc<str>,
    /// When, in microseconds on a clock that all processes of the log share, more or less:
    /// see [`Checker::slack`](super::Checker::slack).
    pub at: u64,
    /// What happened.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum What {
    /// A transition of a delivery.
    Step(Step),
    /// Something that only a test or an operator knows.
    Marker(Marker),
}

/// A transition of a delivery: an [`Event`] that can leave its process.
///
/// For a system of your own, made with [`Step::new`]:
///
/// ```
/// use guestlist::testing::checker::{ClaimMark, Step};
/// use guestlist::{DedupKey, EventKind};
/// let key = DedupKey::from_bytes([7; 16]);
/// let step = Step::new(1, EventKind::Started).key(key).claim(ClaimMark::new(1, 10)).attempt(2);
/// assert_eq!((step.delivery, step.attempt), (1, 2));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Step {
    /// The delivery's number in its process.
    pub delivery: u64,
    /// The hashed id, once it is known.
    pub key: Option<DedupKey>,
    /// The claim, while there is one.
    pub claim: Option<ClaimMark>,
    /// The attempt, from 1.
    pub attempt: u32,
    /// How many times an operator sent the id back to work.
    pub generation: u32,
    /// Some bits of a hash of the body, if bodies are compared.
    pub body: Option<u32>,
    /// Why the delivery was returned, or could not be settled.
    pub cause: Option<Cause>,
    /// What happened.
    pub kind: EventKind,
}

/// A claim, as a log names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClaimMark {
    /// A hash of the claim's token: the same for the same claim, another for any other. It does not prove
    /// ownership, as the token does.
    pub token: u64,
    /// The fence: a later claim of a key has a higher one.
    pub fence: u64,
    /// Until when the holder itself takes its lease to last, on the clock of [`Entry::at`].
    pub until: Option<u64>,
}

/// What only a test or an operator knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Marker {
    /// The process was started. A [`LogWriter`](super::LogWriter) writes it itself.
    ProcessStarted,
    /// The process was killed, or has ended: its claims in hand are nobody's.
    ProcessKilled,
    /// From here on the store answers nobody.
    StoreAway,
    /// The store answers again.
    StoreBack,
    /// The store lost its record of this key, or all records: a flush, a stale replica, an eviction.
    StoreLost(Option<DedupKey>),
    /// The store was started again. If it keeps nothing over a restart, write [`StoreLost`](Self::StoreLost), too.
    StoreRestarted,
    /// From here on this process's times are this many microseconds ahead of the others'
    /// (negative: behind), and the checker takes them off.
    Clock(i64),
}

impl Entry {
    /// A transition.
    pub fn step(process: impl Into<Arc<str>>, at: u64, step: Step) -> Self {
        Self { process: process.into(), at, what: What::Step(step) }
    }

    /// A marker.
    pub fn marker(process: impl Into<Arc<str>>, at: u64, marker: Marker) -> Self {
        Self { process: process.into(), at, what: What::Marker(marker) }
    }

    /// An event of this process; `micros` says what its instants are on the clock of the log.
    pub fn from_event(process: impl Into<Arc<str>>, event: &Event, micros: impl Fn(Instant) -> u64) -> Self {
        let claim = event.run.map(|run| ClaimMark {
            until: event.lease_ends.map(&micros),
            ..ClaimMark::new(token_mark(run), run.fence.0)
        });
        let step = Step {
            delivery: event.delivery,
            key: event.key,
            claim,
            attempt: event.attempt,
            generation: event.generation,
            body: event.body,
            cause: event.cause,
            kind: event.kind,
        };
        Self::step(process, micros(event.at), step)
    }

    pub(super) fn as_step(&self) -> Option<&Step> {
        match &self.what {
            What::Step(step) => Some(step),
            What::Marker(_) => None,
        }
    }
}

impl Step {
    /// A transition of the delivery of this number: the first attempt, without key or claim.
    pub const fn new(delivery: u64, kind: EventKind) -> Self {
        let (key, claim, body, cause) = (None, None, None, None);
        Self { delivery, key, claim, attempt: 1, generation: 0, body, cause, kind }
    }

    /// Of this key.
    #[must_use]
    pub const fn key(self, key: DedupKey) -> Self {
        Self { key: Some(key), ..self }
    }

    /// Under this claim.
    #[must_use]
    pub const fn claim(self, claim: ClaimMark) -> Self {
        Self { claim: Some(claim), ..self }
    }

    /// Of this attempt.
    #[must_use]
    pub const fn attempt(self, attempt: u32) -> Self {
        Self { attempt, ..self }
    }

    /// Of an id that was sent back to work so many times.
    #[must_use]
    pub const fn generation(self, generation: u32) -> Self {
        Self { generation, ..self }
    }

    /// With a body of this hash.
    #[must_use]
    pub const fn body(self, body: u32) -> Self {
        Self { body: Some(body), ..self }
    }

    /// For this reason.
    #[must_use]
    pub const fn cause(self, cause: Cause) -> Self {
        Self { cause: Some(cause), ..self }
    }
}

impl ClaimMark {
    /// A claim of this token's hash (any number that no other claim has) and fence.
    pub const fn new(token: u64, fence: u64) -> Self {
        Self { token, fence, until: None }
    }

    /// Whose holder takes it to last until then.
    #[must_use]
    pub const fn until(self, until: u64) -> Self {
        Self { until: Some(until), ..self }
    }
}

impl Marker {
    /// The word in a log.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ProcessStarted => "process_started",
            Self::ProcessKilled => "process_killed",
            Self::StoreAway => "store_away",
            Self::StoreBack => "store_back",
            Self::StoreLost(_) => "store_lost",
            Self::StoreRestarted => "store_restarted",
            Self::Clock(_) => "clock",
        }
    }
}

/// One way: who reads a log must not be able to end a claim.
fn token_mark(run: Run) -> u64 {
    let mut hash = blake3::Hasher::new_derive_key("guestlist 2026 token mark");
    hash.update(&run.token.bits().to_le_bytes());
    let mut bits = [0; 8];
    bits.copy_from_slice(&hash.finalize().as_bytes()[..8]);
    u64::from_le_bytes(bits)
}
