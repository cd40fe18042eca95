//! One structured event for each transition of a delivery, so that a run can be proven right
//! from its log.

use std::fmt;
use std::sync::Arc;

use tokio::time::Instant;

use crate::dedup::protocol::{Before, Release, Run};
use crate::identity::Identified;
use crate::{Cause, DedupKey, Disposition, Message, Outcome};

/// A transition of one delivery. Holds no payload, header or raw id.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Event {
    /// When, by tokio's clock.
    pub at: Instant,
    /// The delivery's number in this process.
    pub delivery: u64,
    /// The hashed id, once it is known.
    pub key: Option<DedupKey>,
    /// The claim, while there is one.
    pub run: Option<Run>,
    /// When the claim ends unless it is renewed, in its claimant's own view: never later than in the store's.
    pub lease_ends: Option<Instant>,
    /// The attempt: counted by the store under a claim, else a hint.
    pub attempt: u32,
    /// How many times an operator sent the id back to work.
    pub generation: u32,
    /// 32 bits of a hash of key and body, if the queue compares bodies: two bodies of one id
    /// are told apart by it. Not a secret: who guesses the body can confirm the guess.
    pub body: Option<u32>,
    /// Why a delivery was returned, or could not be settled.
    pub cause: Option<Cause>,
    /// What happened.
    pub kind: EventKind,
}

/// What happened to a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EventKind {
    /// It arrived from the broker.
    Received,
    /// Its id was found.
    Identified,
    /// Its id was claimed; the attempt is counted.
    Claimed(Before),
    /// Its id is done already.
    Duplicate,
    /// It waits for another claimant of its id.
    Waited,
    /// The handler started.
    Started,
    /// The handler returned `Ok`.
    Ran,
    /// The handler failed.
    Failed(Cause),
    /// The store remembers the id.
    Completed,
    /// The handler succeeded and the store did not answer: a dedup gap.
    Gap,
    /// The claim was given up.
    Released(Release),
    /// The claim was lost.
    LeaseLost,
    /// The store has no record of a claim in hand: it lost it.
    Forgotten,
    /// A copy is with the dead letters, confirmed and routed.
    Copied,
    /// The broker was told to forget it, for this reason.
    Acked(Outcome),
    /// The broker was told to deliver it again, or nothing.
    Returned(Disposition),
    /// The broker could not be told.
    Unsettled,
}

impl EventKind {
    /// The word for logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Received => "received",
            Self::Identified => "identified",
            Self::Claimed(_) => "claimed",
            Self::Duplicate => "duplicate",
            Self::Waited => "waited",
            Self::Started => "started",
            Self::Ran => "ran",
            Self::Failed(_) => "failed",
            Self::Completed => "completed",
            Self::Gap => "gap",
            Self::Released(_) => "released",
            Self::LeaseLost => "lease_lost",
            Self::Forgotten => "forgotten",
            Self::Copied => "copied",
            Self::Acked(_) => "acked",
            Self::Returned(Disposition::Abandon) => "abandoned",
            Self::Returned(_) => "returned",
            Self::Unsettled => "unsettled",
        }
    }
}

/// Is told of every event, at once and in order. Must not block.
pub trait Observer: Send + Sync + 'static {
    /// An event happened.
    fn observe(&self, event: &Event);
}

/// The claim that an event is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claimant {
    pub(crate) run: Run,
    pub(crate) lease_ends: Instant,
}

/// Where the events of a queue go: to `tracing` (target `guestlist::event`, level trace) and to an observer.
#[derive(Clone, Default)]
pub(crate) struct Events(Option<Arc<dyn Observer>>);

impl Events {
    pub(crate) fn new(observer: Option<Arc<dyn Observer>>) -> Self {
        Self(observer)
    }

    pub(crate) fn emit(&self, message: &Message, claimant: Option<Claimant>, kind: EventKind) {
        self.tell(message, claimant, None, kind);
    }

    /// How a delivery ended that was not acked, and why.
    pub(crate) fn emit_because(&self, message: &Message, cause: Option<Cause>, kind: EventKind) {
        self.tell(message, None, cause, kind);
    }

    fn tell(&self, message: &Message, claimant: Option<Claimant>, cause: Option<Cause>, kind: EventKind) {
        if self.0.is_none() && !tracing::enabled!(target: "guestlist::event", tracing::Level::TRACE) {
            return;
        }
        let found = message.identified();
        let event = Event {
            at: Instant::now(),
            delivery: message.delivery_number(),
            key: found.map(|found| found.key),
            run: claimant.map(|claimant| claimant.run),
            lease_ends: claimant.map(|claimant| claimant.lease_ends),
            attempt: message.attempt(),
            generation: message.generation(),
            body: found.and_then(Identified::body_mark),
            cause,
            kind,
        };
        event.trace();
        if let Some(observer) = &self.0 {
            observer.observe(&event);
        }
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

impl Event {
    fn trace(&self) {
        tracing::trace!(
            target: "guestlist::event",
            event = self.kind.name(),
            detail = ?self.kind,
            delivery = self.delivery,
            key = self.key.map(tracing::field::display),
            // Not the token: it proves ownership.
            fence = self.run.map(|run| run.fence.0),
            attempt = self.attempt,
            cause = self.cause.map(Cause::name),
        );
    }
}
