//! What a check found: [`Report`].

use std::collections::BTreeMap;
use std::fmt;

use super::entry::{Entry, What};
use crate::DedupKey;

/// A promise that a log can prove broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Invariant {
    /// I1: a delivery is acked for one of the permitted reasons only.
    NoLoss,
    /// I2: at most one unexpired holder of a key; one that lost its lease changes nothing.
    OneAtATime,
    /// I3: no run starts within the window after an id was done.
    Window,
    /// I4: a failure never marks an id as done, and a redrive begins at attempt 1.
    FailureNeverMarks,
    /// I5: the store remembers the id before the delivery is acked as handled.
    CompleteBeforeAck,
    /// I6: a delivery of an id in progress is never acked, and never goes round in a hot loop.
    InProgressNeverAcked,
    /// I7: a store outage follows the queue's policy.
    StoreOutage,
    /// I8: attempts are counted before the run, and bounded.
    BoundedRetry,
    /// I11: the same id with another body is never acked as a duplicate.
    BodyIdentity,
    /// I15: the log tells each delivery's story without a contradiction.
    Observable,
}

impl Invariant {
    /// Its short name: `I1`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoLoss => "I1",
            Self::OneAtATime => "I2",
            Self::Window => "I3",
            Self::FailureNeverMarks => "I4",
            Self::CompleteBeforeAck => "I5",
            Self::InProgressNeverAcked => "I6",
            Self::StoreOutage => "I7",
            Self::BoundedRetry => "I8",
            Self::BodyIdentity => "I11",
            Self::Observable => "I15",
        }
    }

    const fn words(self) -> &'static str {
        match self {
            Self::NoLoss => "no loss",
            Self::OneAtATime => "one at a time",
            Self::Window => "window",
            Self::FailureNeverMarks => "failure never marks",
            Self::CompleteBeforeAck => "complete precedes ack",
            Self::InProgressNeverAcked => "in progress is never acked",
            Self::StoreOutage => "a store outage follows the policy",
            Self::BoundedRetry => "bounded retry",
            Self::BodyIdentity => "body identity",
            Self::Observable => "the log is whole",
        }
    }
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name(), self.words())
    }
}

/// A promise that was broken, and what proves it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Violation {
    /// Which one.
    pub invariant: Invariant,
    /// The id that it happened to.
    pub key: Option<DedupKey>,
    /// How, in words.
    pub what: String,
    /// The entries that prove it, in order.
    pub entries: Vec<Entry>,
}

/// Why an id ran again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The run before failed.
    Retried,
    /// The run before asked for another time.
    Deferred,
    /// The run before was stopped by a drain or a cancel.
    Interrupted,
    /// The run before was turned away before its handler did anything.
    TurnedAway,
    /// The process of the run before was killed, or started again.
    Crashed,
    /// The run before lost its lease: it was too slow, or it vanished without a word.
    LeaseExpired,
    /// The run before succeeded, and the store did not confirm that it remembers it.
    Gap,
    /// An operator sent the id back to work.
    Redriven,
    /// The record had been kept for its time.
    WindowOver,
    /// The store lost its record.
    RecordLost,
    /// One of the two ran without dedup: the store was away, and the policy says to go on.
    Unchecked,
    /// The log does not say.
    Unexplained,
}

impl Reason {
    /// The word in a report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Retried => "retried",
            Self::Deferred => "deferred",
            Self::Interrupted => "interrupted",
            Self::TurnedAway => "turned_away",
            Self::Crashed => "crashed",
            Self::LeaseExpired => "lease_expired",
            Self::Gap => "gap",
            Self::Redriven => "redriven",
            Self::WindowOver => "window_over",
            Self::RecordLost => "record_lost",
            Self::Unchecked => "unchecked",
            Self::Unexplained => "unexplained",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A run beyond the first of its id, and why there was one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExtraRun {
    /// The id.
    pub key: DedupKey,
    /// Why it ran again.
    pub reason: Reason,
    /// The same in words.
    pub what: String,
    /// The run before, what explains the extra one, and the extra one itself, in order.
    pub entries: Vec<Entry>,
}

/// What a log counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Entries of the log, markers included.
    pub entries: usize,
    /// Deliveries.
    pub deliveries: usize,
    /// Ids that were found.
    pub ids: usize,
    /// Runs of handlers, with and without a claim.
    pub runs: usize,
    /// Ids whose handler succeeded at least once.
    pub succeeded: usize,
    /// Deliveries of ids that were done.
    pub duplicates: usize,
    /// Runs that succeeded and may not be remembered.
    pub gaps: usize,
    /// Runs without dedup, of messages with an id.
    pub unchecked: usize,
    /// Runs of messages without an id.
    pub without_id: usize,
    /// Claims that were lost.
    pub lost_leases: usize,
    /// Copies with the dead letters.
    pub dead_letters: usize,
    /// Deliveries that went back to the broker.
    pub returned: usize,
    /// Deliveries that the log does not end: the process was killed, or the log was cut.
    pub unfinished: usize,
}

/// What a [`Checker`](super::Checker) found. Prints as a text for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The broken promises.
    pub violations: Vec<Violation>,
    /// Every run beyond one for each id.
    pub extra_runs: Vec<ExtraRun>,
    /// What the log counts.
    pub counts: Counts,
}

impl Report {
    /// Whether no promise is broken and every extra run is explained.
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty() && self.unexplained().next().is_none()
    }

    /// The extra runs that the log does not explain.
    pub fn unexplained(&self) -> impl Iterator<Item = &ExtraRun> {
        self.extra_runs.iter().filter(|extra| extra.reason == Reason::Unexplained)
    }

    /// How many extra runs had this reason.
    pub fn extra(&self, reason: Reason) -> usize {
        self.extra_runs.iter().filter(|extra| extra.reason == reason).count()
    }

    /// The extra runs, counted by reason.
    pub fn extra_by_reason(&self) -> BTreeMap<Reason, usize> {
        let mut counts = BTreeMap::new();
        for extra in &self.extra_runs {
            *counts.entry(extra.reason).or_default() += 1;
        }
        counts
    }

    /// Passes if the log is clean.
    ///
    /// # Panics
    ///
    /// With the report as its text, if it [is not](Self::is_clean).
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(self.is_clean(), "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { deliveries, ids, runs, succeeded, duplicates, gaps, dead_letters, .. } = self.counts;
        writeln!(f, "{}", if self.is_clean() { "clean" } else { "NOT clean" })?;
        writeln!(
            f,
            "  {ids} ids, {succeeded} of them succeeded; {deliveries} deliveries; {runs} runs, {} of them extra; \
             {duplicates} duplicates; {gaps} gaps; {dead_letters} dead letters",
            self.extra_runs.len()
        )?;
        for (reason, count) in self.extra_by_reason() {
            writeln!(f, "  extra runs, {reason}: {count}")?;
        }
        for Violation { invariant, key, what, entries } in &self.violations {
            write!(f, "broken: {invariant}: ")?;
            finding(f, *key, what, entries)?;
        }
        for ExtraRun { key, reason, what, entries } in self.unexplained() {
            write!(f, "extra run, {reason}: ")?;
            finding(f, Some(*key), what, entries)?;
        }
        Ok(())
    }
}

fn finding(f: &mut fmt::Formatter<'_>, key: Option<DedupKey>, what: &str, entries: &[Entry]) -> fmt::Result {
    match key {
        Some(key) => writeln!(f, "{what} (key {key})")?,
        None => writeln!(f, "{what}")?,
    }
    entries.iter().try_for_each(|entry| writeln!(f, "    {}", Brief(entry)))
}

/// An entry in one readable line.
struct Brief<'a>(&'a Entry);

impl fmt::Display for Brief<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Entry { process, at, what } = self.0;
        write!(f, "{}.{:06} {process} ", at / 1_000_000, at % 1_000_000)?;
        match what {
            What::Marker(marker) => write!(f, "{marker:?}"),
            What::Step(step) => {
                write!(f, "#{} {:?}", step.delivery, step.kind)?;
                if let Some(cause) = step.cause {
                    write!(f, " ({cause})")?;
                }
                if let Some(claim) = step.claim {
                    write!(f, ", fence {}, attempt {}", claim.fence, step.attempt)?;
                }
                if step.generation > 0 {
                    write!(f, ", generation {}", step.generation)?;
                }
                Ok(())
            }
        }
    }
}
