//! What becomes of letters: [`Fate`], [`Treated`], [`Summary`].

use std::fmt;

use super::Listed;

/// What became of a letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fate {
    /// Its copy was published, confirmed and routed, and then the letter was removed.
    Redriven,
    /// A copy of it that was redriven before is done: the letter that an interrupted redrive left was removed.
    Finished,
    /// Its id is done, and not by a redrive of it: it stays. See [`Redrive::discard_done`](super::Redrive::discard_done).
    AlreadyDone,
    /// Its id is done, and it was removed as [asked for](super::Redrive::discard_done).
    DoneDiscarded,
    /// The store knows nothing of its id, and it failed longer ago than a done id is remembered: whether its message was
    /// handled meanwhile cannot be told. It stays. See [`Redrive::also_forgotten`](super::Redrive::also_forgotten).
    Forgotten,
    /// A copy of it that was redriven before is at work: it stays until that one is done or back.
    AtWork,
    /// The store knows its id with another body, of another message: it stays.
    Conflict,
    /// The destination takes no copy as large as this: it stays.
    TooLarge,
    /// Its body or headers were cut when it was parked, so it is not what was sent: it stays, unless
    /// [forced](super::Redrive::force).
    Incomplete,
    /// It was removed by [`Admin::discard`](super::Admin::discard).
    Discarded,
}

impl Fate {
    /// The word for logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Redriven => "redriven",
            Self::Finished => "finished",
            Self::AlreadyDone => "already_done",
            Self::DoneDiscarded => "done_discarded",
            Self::Forgotten => "forgotten",
            Self::AtWork => "at_work",
            Self::Conflict => "conflict",
            Self::TooLarge => "too_large",
            Self::Incomplete => "incomplete",
            Self::Discarded => "discarded",
        }
    }

    /// Whether the letter is still where it was.
    pub const fn stays(self) -> bool {
        matches!(
            self,
            Self::AlreadyDone
                | Self::Forgotten
                | Self::AtWork
                | Self::Conflict
                | Self::TooLarge
                | Self::Incomplete
        )
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A letter, and what became of it; in a dry run, what would have.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Treated {
    /// The letter, as it was.
    pub letter: Listed,
    /// What became of it.
    pub fate: Fate,
    /// The generation of the copy that was published.
    pub generation: Option<u32>,
    /// Nothing was published, removed or forgotten.
    pub dry_run: bool,
}

impl fmt::Display for Treated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let would = if self.dry_run { "dry run: " } else { "" };
        write!(f, "{would}{}: {}", self.fate, self.letter)
    }
}

/// What a walk came to, so far: how many letters had each fate. In a dry run, would have had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// Letters that fitted the filter.
    pub matched: u64,
    /// Letters that did not.
    pub passed_over: u64,
    /// See [`Fate::Redriven`].
    pub redriven: u64,
    /// See [`Fate::Finished`].
    pub finished: u64,
    /// See [`Fate::AlreadyDone`].
    pub already_done: u64,
    /// See [`Fate::DoneDiscarded`].
    pub done_discarded: u64,
    /// See [`Fate::Forgotten`].
    pub forgotten: u64,
    /// See [`Fate::AtWork`].
    pub at_work: u64,
    /// See [`Fate::Conflict`].
    pub conflicts: u64,
    /// See [`Fate::TooLarge`].
    pub too_large: u64,
    /// See [`Fate::Incomplete`].
    pub incomplete: u64,
    /// See [`Fate::Discarded`].
    pub discarded: u64,
    /// The walk has met its last letter; not after an error, at a limit, or when it was cancelled.
    pub whole: bool,
}

impl Summary {
    pub(super) fn count(&mut self, fate: Option<Fate>) {
        self.matched += 1;
        match fate {
            None => {}
            Some(Fate::Redriven) => self.redriven += 1,
            Some(Fate::Finished) => self.finished += 1,
            Some(Fate::AlreadyDone) => self.already_done += 1,
            Some(Fate::DoneDiscarded) => self.done_discarded += 1,
            Some(Fate::Forgotten) => self.forgotten += 1,
            Some(Fate::AtWork) => self.at_work += 1,
            Some(Fate::Conflict) => self.conflicts += 1,
            Some(Fate::TooLarge) => self.too_large += 1,
            Some(Fate::Incomplete) => self.incomplete += 1,
            Some(Fate::Discarded) => self.discarded += 1,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} letters", self.matched)?;
        for (count, what) in [
            (self.redriven, "redriven"),
            (self.finished, "finished before"),
            (self.already_done, "done already, left"),
            (self.done_discarded, "done already, removed"),
            (self.forgotten, "forgotten by the store, left"),
            (self.at_work, "at work, left"),
            (self.conflicts, "in conflict, left"),
            (self.too_large, "too large, left"),
            (self.incomplete, "incomplete, left"),
            (self.discarded, "discarded"),
            (self.passed_over, "passed over"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        if self.whole { Ok(()) } else { f.write_str("; there may be more") }
    }
}
