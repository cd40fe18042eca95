//! The dedup store: the crate's own [`Machine`] over one compact row per key, and the planted
//! bugs that a store could have.

use std::time::Duration;

use guestlist::dedup::Release;
use guestlist::dedup::protocol::{Ask, Before, Claim, Fence, Held, Machine, Record, Run, State, Token};

use super::bugs::Bug;
use super::state::{FOREVER, LEASE};

/// A tick, as the machine counts time.
const TICK: u64 = 1_000_000;
/// "Now", for the machine: a row's times count from here, in every state.
const NOW: u64 = 1_000 * TICK;

/// A [`Record`], with its times as ticks from now. The fence is not in it: it decides nothing,
/// and is checked where it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Row {
    pub(super) token: u8,
    pub(super) attempt: u8,
    pub(super) before: Before,
    pub(super) stands: Stands,
    pub(super) generation: u8,
    pub(super) suspect: bool,
    pub(super) interruptions: u8,
    /// Ticks until it is forgotten.
    pub(super) kept: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stands {
    /// For so many ticks; zero: the lease is over, and nobody has taken it yet.
    Claimed(u8),
    /// Free in so many ticks.
    Released(u8),
    Parked,
    Done,
}

/// The store of one model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Store {
    pub(super) window: u8,
    pub(super) bug: Option<Bug>,
}

impl Store {
    pub(super) fn claim(self, row: &mut Option<Row>, token: u8, generation: u8, alone: bool) -> Claim {
        let mut ask = Ask::new(Token::from_bits(u128::from(token)), ticks(LEASE), ticks(self.window));
        ask.generation = u32::from(generation);
        ask.alone = alone;
        let before = self.tampered_before_claim(self.record(*row));
        let (after, answer) = Machine::at(NOW).claim(before, &ask);
        if let (Some(before), Claim::Acquired { fence, .. }) = (before, answer)
            && before.run.token != ask.token
        {
            assert!(fence > before.run.fence, "a fence grows with every claim");
        }
        let (after, answer) = self.tampered_after_claim(before, after, answer, &ask);
        *row = after.and_then(compact);
        plain(answer)
    }

    pub(super) fn renew(self, row: &mut Option<Row>, token: u8) -> Held {
        let (after, held) = Machine::at(NOW).renew(self.record(*row), run(token), ticks(LEASE));
        *row = after.and_then(compact);
        held
    }

    pub(super) fn complete(self, row: &mut Option<Row>, token: u8) -> Held {
        let token = self.believed(*row, token, Bug::CompleteIgnoresToken);
        let (after, held) = Machine::at(NOW).complete(self.record(*row), run(token), ticks(self.window));
        *row = after.and_then(compact);
        held
    }

    pub(super) fn release(self, row: &mut Option<Row>, token: u8, why: Release) -> Held {
        let token = self.believed(*row, token, Bug::ReleaseIgnoresToken);
        let mut before = self.record(*row);
        if let (Some(record), Some(Bug::InterruptionsAreFree)) = (&mut before, self.bug)
            && record.run == run(token)
        {
            record.interruptions = 0;
        }
        let (mut after, held) = Machine::at(NOW).release(before, run(token), why);
        if let (Some(record), Held::Yes, Release::Failed { .. }) = (&mut after, held, why) {
            match self.bug {
                Some(Bug::FailureClearsSuspicion) => record.suspect = false,
                Some(Bug::CountsAfterTheRun) => record.attempt += 1,
                _ => {}
            }
        }
        *row = after.and_then(compact);
        held
    }

    /// Whether a claim would be answered with something else than "in progress".
    pub(super) fn free(self, row: Option<Row>) -> bool {
        Machine::at(NOW).left(self.record(row)).is_zero()
    }

    fn record(self, row: Option<Row>) -> Option<Record> {
        row.map(|row| record(row, self.window))
    }

    fn believed(self, row: Option<Row>, token: u8, bug: Bug) -> u8 {
        row.filter(|_| self.bug == Some(bug)).map_or(token, |row| row.token)
    }

    fn tampered_before_claim(self, record: Option<Record>) -> Option<Record> {
        let mut record = record?;
        match (self.bug, record.state) {
            (Some(Bug::ForgetsAtExpiry), State::Claimed { deadline }) if deadline <= NOW => {
                record.attempt = 0;
            }
            (Some(Bug::ExpiredStaysHeld), State::Claimed { deadline }) if deadline <= NOW => {
                record.state = State::Claimed { deadline: NOW + 1 };
            }
            (Some(Bug::SkipsBackoff), State::Released { .. }) => {
                record.state = State::Released { not_before: 0 };
            }
            _ => {}
        }
        Some(record)
    }

    fn tampered_after_claim(
        self,
        before: Option<Record>,
        mut after: Option<Record>,
        mut answer: Claim,
        ask: &Ask,
    ) -> (Option<Record>, Claim) {
        let (Some(bug), Some(record)) = (self.bug, &mut after) else { return (after, answer) };
        match (bug, &mut answer, before) {
            (Bug::RedriveKeepsCount, Claim::Acquired { attempt, .. }, Some(before))
                if ask.generation > before.generation =>
            {
                record.attempt += before.attempt;
                *attempt = record.attempt;
            }
            (Bug::CountsRefusedSuspects, Claim::Suspect, _) => record.attempt += 1,
            (Bug::CountsAfterTheRun, Claim::Acquired { .. }, before)
                if before.is_none_or(|before| before.run.token != ask.token) =>
            {
                record.attempt -= 1;
            }
            _ => {}
        }
        (after, answer)
    }
}

impl Row {
    /// One tick later; `None`: it is past its time.
    pub(super) fn tick(mut self) -> Option<Self> {
        self.stands = match self.stands {
            Stands::Claimed(left) => Stands::Claimed(left.saturating_sub(1)),
            Stands::Released(left) => Stands::Released(left.saturating_sub(1)),
            ended => ended,
        };
        if self.kept != FOREVER {
            self.kept -= 1;
        }
        (self.kept > 0).then_some(self)
    }

    /// Its lease is over, and nobody has taken it.
    pub(super) fn is_expired(self) -> bool {
        self.stands == Stands::Claimed(0)
    }
}

fn run(token: u8) -> Run {
    Run { token: Token::from_bits(u128::from(token)), fence: Fence(NOW - TICK) }
}

fn ticks(ticks: u8) -> Duration {
    match ticks {
        FOREVER => Duration::from_secs(1_000_000),
        ticks => Duration::from_micros(u64::from(ticks) * TICK),
    }
}

fn record(row: Row, window: u8) -> Record {
    let at = |left: u8| NOW + u64::from(left) * TICK;
    Record {
        run: run(row.token),
        attempt: u32::from(row.attempt),
        before: row.before,
        state: match row.stands {
            Stands::Claimed(left) => State::Claimed { deadline: at(left) },
            Stands::Released(left) => State::Released { not_before: at(left) },
            Stands::Parked => State::Parked,
            Stands::Done => State::Done,
        },
        generation: u32::from(row.generation),
        suspect: row.suspect,
        interruptions: row.interruptions,
        digest: None,
        retain: ticks(window),
        kept_until: NOW + u64::try_from(ticks(row.kept).as_micros()).expect("few ticks"),
    }
}

fn compact(record: Record) -> Option<Row> {
    let left = |until: u64| small(until.saturating_sub(NOW) / TICK);
    let kept = record.kept_until.saturating_sub(NOW) / TICK;
    let kept = if kept > 1_000 { FOREVER } else { small(kept) };
    let row = Row {
        token: u8::try_from(record.run.token.bits()).expect("a small token"),
        attempt: small(record.attempt.into()),
        before: record.before,
        stands: match record.state {
            State::Claimed { deadline } => Stands::Claimed(left(deadline)),
            State::Released { not_before } => Stands::Released(left(not_before)),
            State::Parked => Stands::Parked,
            State::Done => Stands::Done,
        },
        generation: small(record.generation.into()),
        suspect: record.suspect,
        interruptions: record.interruptions,
        kept,
    };
    (kept > 0).then_some(row)
}

/// An answer without what a worker does not look at, so that it is not part of the state.
fn plain(answer: Claim) -> Claim {
    match answer {
        Claim::Acquired { attempt, before, .. } => {
            Claim::Acquired { fence: Fence(0), attempt, before, digest: None }
        }
        Claim::InProgress { .. } => Claim::InProgress { left: Duration::ZERO, digest: None },
        other => other,
    }
}

fn small(number: u64) -> u8 {
    u8::try_from(number).expect("the model's numbers are small")
}
