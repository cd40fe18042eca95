//! The claim protocol as a pure state machine: no I/O, no clock, no randomness.
//!
//! Every store keeps a [`Record`] per key and changes it by one atomic step:
//! `(record, event, now) → (record, answer)`. In memory the step is this very code under a lock;
//! a script or a statement in a server does the same, and the contract suite holds it to this
//! machine. The layer, the simulation and the model share its words.
//!
//! ```text
//! Absent ─claim─▶ Claimed ─complete─▶ Done        (a duplicate: acked)
//!                  │   ▲
//!            release   └claim── Released          (tried again, after `not_before`)
//!                  └──────────▶ Parked            (with the dead letters)
//! ```
//!
//! An expired `Claimed` stays on record, and *held*, until another claim takes it: its holder
//! may still be the only one.
//!
//! ```
//! use guestlist::dedup::protocol::{Ask, Before, Claim, Machine, Token};
//! use std::time::Duration;
//!
//! let ask = Ask::new(Token::from_bits(1), Duration::from_secs(30), Duration::from_secs(3600));
//! let (record, answer) = Machine::at(1_000).claim(None, &ask);
//! assert!(matches!(answer, Claim::Acquired { attempt: 1, before: Before::First, .. }));
//!
//! let other = Ask::new(Token::from_bits(2), Duration::from_secs(30), Duration::from_secs(3600));
//! let (_, answer) = Machine::at(2_000).claim(record, &other);
//! assert!(matches!(answer, Claim::InProgress { .. }));
//! ```

#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

/// The store's time in microseconds. Only one store's times are ever compared with each other.
pub type Micros = u64;

/// 128 random bits by which a holder proves that a claim is its own.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(u128);

impl Token {
    /// A new token, from a cryptographic generator.
    pub fn random() -> Self {
        Self(crate::random::bits())
    }

    /// A token of these bits; for stores that read one back, and for tests.
    pub const fn from_bits(bits: u128) -> Self {
        Self(bits)
    }

    /// Its bits.
    pub const fn bits(self) -> u128 {
        self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A number that grows with every claim of a key. Hand it downstream, where a write of an
/// older fence can be refused. It orders; it never proves ownership.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence(pub u64);

/// 128 bits of a hash of the body, by which a reused id is noticed.
pub type Digest = u128;

/// Who holds a claim: compared by the token alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The proof.
    pub token: Token,
    /// The order.
    pub fence: Fence,
}

/// What a claim asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The claimant's token: a claim repeated with it is the same claim.
    pub token: Token,
    /// How long the claim holds without renewal.
    pub lease: Duration,
    /// How long the record is kept from its last change, or from the end of its backoff: the queue's window.
    pub retain: Duration,
    /// How many times an operator sent the id back to work.
    pub generation: u32,
    /// The body's digest, if the queue compares bodies.
    pub digest: Option<Digest>,
    /// The claimant holds the suspect permit.
    pub alone: bool,
}

impl Ask {
    /// Asks for a message that was never redriven, without a digest or the suspect permit.
    pub const fn new(token: Token, lease: Duration, retain: Duration) -> Self {
        Self { token, lease, retain, generation: 0, digest: None, alone: false }
    }
}

/// How the last holder of an id ended, for the one who claims it next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Before {
    /// There was none.
    First,
    /// It failed.
    Failed,
    /// It handed the id back: deferred, or interrupted.
    HandedBack,
    /// It vanished: its lease ran out.
    Vanished,
}

/// The answer to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Claim {
    /// The claim is yours.
    Acquired {
        /// Your fence.
        fence: Fence,
        /// Your attempt, from 1: it is counted already.
        attempt: u32,
        /// How the holder before you ended.
        before: Before,
        /// The digest on record.
        digest: Option<Digest>,
    },
    /// Somebody holds it, or its backoff is not over.
    InProgress {
        /// How long at most, unless it is renewed.
        left: Duration,
        /// The digest on record.
        digest: Option<Digest>,
    },
    /// An earlier holder vanished: claim again with the suspect permit ([`Ask::alone`]).
    Suspect,
    /// A copy is with the dead letters, in this or a higher generation.
    Parked {
        /// The digest on record.
        digest: Option<Digest>,
    },
    /// Done within the window: a duplicate.
    Done {
        /// The digest on record.
        digest: Option<Digest>,
    },
}

impl Claim {
    /// The digest on record.
    pub const fn digest(&self) -> Option<Digest> {
        match *self {
            Self::Acquired { digest, .. }
            | Self::InProgress { digest, .. }
            | Self::Parked { digest }
            | Self::Done { digest } => digest,
            Self::Suspect => None,
        }
    }
}

/// The answer to renew, complete and release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Held {
    /// It was yours, and it is done.
    Yes,
    /// It is not yours, or no more: nothing was changed.
    Lost,
    /// The store has no record of the key. After `complete` there is one now: `Done`.
    Gone,
}

/// Why a claim is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Release {
    /// The handler failed; the next attempt not before this long from now.
    Failed {
        /// The backoff.
        not_before: Duration,
    },
    /// The handler asked for another time; the attempt is given back.
    Deferred {
        /// The delay.
        not_before: Duration,
    },
    /// The handler did not start: everything is as it was before the claim.
    NotStarted,
    /// The handler was stopped by a drain or a cancel: the attempt is given back three times in
    /// a row, then it counts.
    Interrupted,
    /// A copy is with the dead letters, confirmed.
    DeadLettered,
}

/// How many interruptions in a row give the attempt back.
pub const FREE_INTERRUPTIONS: u8 = 3;

/// What a store keeps for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The holder, or the last one.
    pub run: Run,
    /// How many attempts are counted.
    pub attempt: u32,
    /// Claimed: what the holder was told. Released: what the next one will be told.
    pub before: Before,
    /// Where the key stands.
    pub state: State,
    /// The generation it was last worked on in.
    pub generation: u32,
    /// A holder vanished since the last fresh start: it is claimed only by the suspect permit.
    pub suspect: bool,
    /// Interruptions in a row.
    pub interruptions: u8,
    /// The digest of the body first seen.
    pub digest: Option<Digest>,
    /// How long the record is kept from its last change, or from the end of its backoff.
    pub retain: Duration,
    /// Until when it is kept.
    pub kept_until: Micros,
}

/// Where a key stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Held until the deadline, and after it until somebody else takes it.
    Claimed {
        /// The end of the lease.
        deadline: Micros,
    },
    /// Free from then on.
    Released {
        /// The end of the backoff.
        not_before: Micros,
    },
    /// With the dead letters.
    Parked,
    /// Handled; remembered as long as the record is kept.
    Done,
}

/// The machine at an instant of the store's clock.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    now: Micros,
}

impl Machine {
    /// The machine at this instant.
    pub const fn at(now: Micros) -> Self {
        Self { now }
    }

    /// Claims. The record to keep comes back with the answer; `None` only if nothing was there
    /// and nothing is to be kept.
    pub fn claim(self, record: Option<Record>, ask: &Ask) -> (Option<Record>, Claim) {
        let past = record;
        let Some(record) = self.live(record) else {
            return self.start(ask, past);
        };
        match record.state {
            State::Claimed { .. } if record.run.token == ask.token => self.claim_again(record, ask),
            State::Claimed { deadline } if self.now < deadline => self.busy(record, deadline),
            State::Done => (Some(record), Claim::Done { digest: record.digest }),
            _ if Some(ask.generation) == record.generation.checked_add(1) => self.start(ask, Some(record)),
            State::Parked => (Some(record), Claim::Parked { digest: record.digest }),
            // The run that released it: a claim of its own that came late is not a new one.
            State::Released { not_before } if record.run.token == ask.token => self.busy(record, not_before),
            State::Released { not_before } if self.now < not_before => self.busy(record, not_before),
            State::Released { .. } if record.suspect && !ask.alone => (Some(record), Claim::Suspect),
            State::Released { .. } => self.take(record, record.before, ask),
            State::Claimed { .. } if !ask.alone => (Some(record), Claim::Suspect),
            State::Claimed { .. } => self.take(Record { suspect: true, ..record }, Before::Vanished, ask),
        }
    }

    /// Renews a claim.
    pub fn renew(self, record: Option<Record>, run: Run, lease: Duration) -> (Option<Record>, Held) {
        self.if_mine(record, run, |record| match record.state {
            State::Claimed { .. } => Some(State::Claimed { deadline: self.after(lease) }),
            _ => None,
        })
    }

    /// Remembers the id as done, for `window`. On no record at all it does so too, and says
    /// `Gone`: the work is done, and the holder knows whether its lease held.
    pub fn complete(self, record: Option<Record>, run: Run, window: Duration) -> (Option<Record>, Held) {
        let done = |record: Record| Record {
            state: State::Done,
            suspect: false,
            retain: window,
            kept_until: self.after(window),
            ..record
        };
        match self.live(record) {
            None => {
                let fence = record.map_or(run.fence, |past| past.run.fence.max(run.fence));
                (Some(done(blank(Run { fence, ..run }, window))), Held::Gone)
            }
            Some(record) if record.run.token != run.token => (Some(record), Held::Lost),
            Some(record) => match record.state {
                State::Claimed { .. } => (Some(done(record)), Held::Yes),
                State::Done => (Some(record), Held::Yes),
                State::Released { .. } | State::Parked => (Some(record), Held::Lost),
            },
        }
    }

    /// Gives a claim up.
    pub fn release(self, record: Option<Record>, run: Run, why: Release) -> (Option<Record>, Held) {
        match self.live(record) {
            None => (record, Held::Gone),
            Some(record) if record.run.token != run.token => (Some(record), Held::Lost),
            Some(record) => match record.state {
                State::Claimed { .. } => (Some(self.kept(released(record, why, self))), Held::Yes),
                // Asked again, since the answer was lost.
                State::Released { .. } | State::Parked => (Some(record), Held::Yes),
                State::Done => (Some(record), Held::Lost),
            },
        }
    }

    /// For how long a claim would be answered `InProgress`, unless something changes; zero: it would not.
    pub fn left(self, record: Option<Record>) -> Duration {
        let until = match self.live(record).map(|record| record.state) {
            Some(State::Claimed { deadline }) => deadline,
            Some(State::Released { not_before }) => not_before,
            Some(State::Parked | State::Done) | None => 0,
        };
        Duration::from_micros(until.saturating_sub(self.now))
    }

    /// A record that is past its time is none, but for its fence: no claim's is ever lower.
    pub fn live(self, record: Option<Record>) -> Option<Record> {
        record.filter(|record| self.now < record.kept_until)
    }

    /// Attempt 1: no record, or one past its time, of which only the fence counts; or a redrive,
    /// which starts without suspicion or backoff.
    fn start(self, ask: &Ask, last: Option<Record>) -> (Option<Record>, Claim) {
        let last_fence = last.map_or(Fence(0), |record| record.run.fence);
        let blank = blank(Run { token: ask.token, fence: last_fence }, ask.retain);
        self.take(Record { generation: ask.generation, ..blank }, Before::First, ask)
    }

    /// The claim is counted here, before the handler runs.
    fn take(self, record: Record, before: Before, ask: &Ask) -> (Option<Record>, Claim) {
        let record = self.kept(Record {
            run: Run { token: ask.token, fence: self.next_fence(record.run.fence) },
            attempt: record.attempt.saturating_add(1),
            before,
            state: State::Claimed { deadline: self.after(ask.lease) },
            digest: record.digest.or(ask.digest),
            retain: ask.retain,
            ..record
        });
        (Some(record), acquired(&record))
    }

    /// The same claim again, since its answer was lost: nothing is counted, the deadline is set anew.
    fn claim_again(self, record: Record, ask: &Ask) -> (Option<Record>, Claim) {
        let record =
            self.kept(Record { state: State::Claimed { deadline: self.after(ask.lease) }, ..record });
        (Some(record), acquired(&record))
    }

    fn busy(self, record: Record, until: Micros) -> (Option<Record>, Claim) {
        let left = Duration::from_micros(until.saturating_sub(self.now));
        (Some(record), Claim::InProgress { left, digest: record.digest })
    }

    /// Changes the state of a record that is the run's own, or says why not.
    fn if_mine(
        self,
        record: Option<Record>,
        run: Run,
        change: impl FnOnce(&Record) -> Option<State>,
    ) -> (Option<Record>, Held) {
        match self.live(record) {
            None => (record, Held::Gone),
            Some(record) if record.run.token != run.token => (Some(record), Held::Lost),
            Some(record) => match change(&record) {
                Some(state) => (Some(self.kept(Record { state, ..record })), Held::Yes),
                None => (Some(record), Held::Lost),
            },
        }
    }

    /// Grows over a lost record, a restart and a flush: the clock is in it.
    fn next_fence(self, last: Fence) -> Fence {
        Fence(self.now.max(last.0.saturating_add(1)))
    }

    /// Kept for `retain` from this change on, and a claim at least to its deadline. A released one for `retain` from
    /// the end of its backoff: that is when its message comes back, and must find its attempts and its mark.
    fn kept(self, record: Record) -> Record {
        let kept_until = match record.state {
            State::Claimed { deadline } => self.after(record.retain).max(deadline),
            State::Released { not_before } => Self::at(self.now.max(not_before)).after(record.retain),
            State::Parked | State::Done => self.after(record.retain),
        };
        Record { kept_until, ..record }
    }

    /// A computed length of zero is not "no lease": it is one microsecond.
    fn after(self, length: Duration) -> Micros {
        let micros = u64::try_from(length.as_micros()).unwrap_or(u64::MAX);
        self.now.saturating_add(micros.max(1))
    }
}

fn acquired(record: &Record) -> Claim {
    let Record { run, attempt, before, digest, .. } = *record;
    Claim::Acquired { fence: run.fence, attempt, before, digest }
}

fn blank(run: Run, retain: Duration) -> Record {
    Record {
        run,
        attempt: 0,
        before: Before::First,
        state: State::Released { not_before: 0 },
        generation: 0,
        suspect: false,
        interruptions: 0,
        digest: None,
        retain,
        kept_until: 0,
    }
}

/// What a release leaves behind.
fn released(record: Record, why: Release, machine: Machine) -> Record {
    let given_back = record.attempt.saturating_sub(1);
    let again_at = |not_before: Duration| State::Released {
        not_before: if not_before.is_zero() { 0 } else { machine.after(not_before) },
    };
    match why {
        Release::Failed { not_before } => {
            Record { state: again_at(not_before), before: Before::Failed, interruptions: 0, ..record }
        }
        Release::Deferred { not_before } => Record {
            state: again_at(not_before),
            before: Before::HandedBack,
            attempt: given_back,
            interruptions: 0,
            ..record
        },
        Release::NotStarted => Record { state: again_at(Duration::ZERO), attempt: given_back, ..record },
        Release::Interrupted => {
            let free = record.interruptions < FREE_INTERRUPTIONS;
            Record {
                state: again_at(Duration::ZERO),
                before: Before::HandedBack,
                attempt: if free { given_back } else { record.attempt },
                interruptions: record.interruptions.saturating_add(1),
                ..record
            }
        }
        Release::DeadLettered => Record { state: State::Parked, suspect: false, ..record },
    }
}
