//! What truly happened, as no part of the system can know it; and the promises that it broke.

use guestlist::dedup::Release;
use guestlist::dedup::protocol::{Claim, FREE_INTERRUPTIONS, Held};

use super::store::{Row, Stands};

/// The truth about one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(super) struct Story {
    /// A handler returned `Ok`.
    pub(super) succeeded: bool,
    /// How often its handler started since the last fresh start.
    pub(super) starts: u8,
    /// Of those, how many were deferred,
    pub(super) deferred: u8,
    /// and how many interrupted.
    pub(super) interrupted: u8,
    /// Claims acquired since then, without those that were given back as not started.
    pub(super) takes: u8,
    /// For so many ticks no handler may start: it was completed.
    pub(super) window: u8,
    /// For so many ticks no handler may start: it failed.
    pub(super) quiet: u8,
    /// A holder vanished since the last fresh start.
    pub(super) suspect: bool,
    /// An operator sent it back to work in this generation, and no handler has started since.
    pub(super) redriven: Option<u8>,
}

/// A promise that a step broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Flaw {
    ZombieChanges = 1 << 0,
    RunInWindow = 1 << 1,
    RedriveDoesNotRun = 1 << 2,
    AckBeforeComplete = 1 << 3,
    AckInProgress = 1 << 4,
    TooManyStarts = 1 << 5,
    CountedTwice = 1 << 6,
    BackoffSkipped = 1 << 7,
    DoneWorkGivenUp = 1 << 8,
    ZombieSettles = 1 << 9,
}

/// Those broken so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(super) struct Flaws(u16);

impl Flaws {
    pub(super) fn add(&mut self, flaw: Flaw, broken: bool) {
        if broken {
            self.0 |= flaw as u16;
        }
    }

    pub(super) fn has(self, flaw: Flaw) -> bool {
        self.0 & flaw as u16 != 0
    }
}

impl Story {
    /// A claim was answered.
    pub(super) fn claimed(&mut self, token: u8, generation: u8, before: Option<Row>, answer: Claim) {
        if !matches!(answer, Claim::Acquired { .. }) {
            return;
        }
        let again = before.is_some_and(|row| row.token == token);
        let redrive = before.is_some_and(|row| generation == row.generation + 1);
        if !again && (before.is_none() || redrive) {
            self.start_afresh();
        } else if !again {
            self.suspect |= before.is_some_and(Row::is_expired);
        }
        self.takes += u8::from(!again);
    }

    fn start_afresh(&mut self) {
        let Self { succeeded, window, redriven, .. } = *self;
        *self = Self { succeeded, window, redriven, ..Self::default() };
    }

    /// `complete` was answered.
    pub(super) fn completed(&mut self, before: Option<Row>, after: Option<Row>) {
        let was_done = before.is_some_and(|row| row.stands == Stands::Done);
        if let Some(row) = after.filter(|row| row.stands == Stands::Done && !was_done) {
            self.window = row.kept;
            self.suspect = false;
        }
    }

    /// A release was answered.
    pub(super) fn released(&mut self, why: Release, before: Option<Row>, held: Held, backoff: u8) {
        let claimed = before.is_some_and(|row| matches!(row.stands, Stands::Claimed(_)));
        if held != Held::Yes || !claimed {
            return;
        }
        match why {
            Release::NotStarted => self.takes -= 1,
            Release::Failed { not_before } if !not_before.is_zero() => self.quiet = backoff,
            Release::DeadLettered => self.suspect = false,
            Release::Failed { .. } | Release::Deferred { .. } | Release::Interrupted => {}
        }
    }

    /// The store lost the record, or its time was over.
    pub(super) fn forgotten(&mut self) {
        *self = Self { succeeded: self.succeeded, redriven: self.redriven, ..Self::default() };
    }

    /// Handlers may start so often: deferrals do not count, and of interruptions three in a row do not.
    pub(super) fn may_start(&self, max_attempts: u8) -> u8 {
        let spent = max_attempts + self.deferred;
        spent + self.interrupted.min(FREE_INTERRUPTIONS * spent)
    }

    pub(super) fn tick(&mut self) {
        if self.window != super::state::FOREVER {
            self.window = self.window.saturating_sub(1);
        }
        self.quiet = self.quiet.saturating_sub(1);
    }
}
