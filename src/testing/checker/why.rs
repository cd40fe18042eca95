//! Why an id ran again.

use super::story::{At, Key, Run};
use super::{ExtraRun, Judge, Reason};
use crate::dedup::protocol::{Before, Release};
use crate::{Cause, DedupKey};

/// The claims of one record, which its attempts count; a claim of it says how it began.
#[derive(Clone, Copy)]
pub(super) struct Series {
    /// How this claim comes to its record.
    pub(super) origin: Origin,
    /// The generation that the record is worked on in, if the log shows its beginning.
    pub(super) generation: Option<u32>,
    /// The first claim of the record.
    first: usize,
    /// How the first claim came to a new record.
    began: Origin,
}

/// How a claim comes to its record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The first of its id.
    First,
    /// It goes on with the record of the claim before.
    Same,
    /// A redrive.
    Redriven,
    /// The record had been kept for its time.
    WindowOver,
    /// The store lost the record: this shows it.
    Lost(At),
    /// A new record, and nobody knows why.
    Unknown,
}

impl Judge<'_> {
    /// Which record each claim belongs to.
    pub(super) fn series(&self, key: DedupKey, told: &Key) -> Vec<Series> {
        let mut all: Vec<Series> = Vec::with_capacity(told.runs.len());
        for (index, run) in told.runs.iter().enumerate() {
            let of = match index.checked_sub(1) {
                None => {
                    let generation = (run.before == Some(Before::First)).then_some(run.generation);
                    Series { origin: Origin::First, generation, first: 0, began: Origin::First }
                }
                Some(before) => self.series_after(key, all[before], &told.runs[before], run, index),
            };
            all.push(of);
        }
        all
    }

    fn series_after(&self, key: DedupKey, series: Series, last: &Run, next: &Run, index: usize) -> Series {
        match self.origin(key, series, last, next) {
            Origin::Same => Series { origin: Origin::Same, ..series },
            origin => Series { origin, generation: Some(next.generation), first: index, began: origin },
        }
    }

    fn origin(&self, key: DedupKey, series: Series, last: &Run, next: &Run) -> Origin {
        // Without a word on the holder before, nothing says that the record is a new one.
        let fresh = match next.before {
            Some(before) => before == Before::First && next.attempt == 1,
            None => next.attempt == 1 && last.attempt > 1,
        };
        if !fresh || restores(last) {
            return Origin::Same;
        }
        let redriven = match series.generation {
            Some(generation) => generation.checked_add(1) == Some(next.generation),
            // The log does not show how the record began.
            None => next.generation > last.generation,
        };
        if redriven {
            Origin::Redriven
        } else if self.window_over(last, next) {
            Origin::WindowOver
        } else if let Some(at) = self.lost_between(key, last, next) {
            Origin::Lost(at)
        } else {
            Origin::Unknown
        }
    }

    /// Every run but the first, with its reason.
    pub(super) fn explain(&mut self, key: DedupKey, told: &Key, series: &[Series]) {
        let started = || told.runs.iter().enumerate().filter_map(|(index, run)| Some((index, run.started?)));
        let mut first = told.unchecked.first().copied();
        let mut last: Option<usize> = None;
        for (index, start) in started() {
            match last {
                Some(last) => self.explain_claimed(key, told, series, last, index, start),
                None => match first.filter(|first| *first < start) {
                    Some(first) => self.extra(
                        key,
                        Reason::Unchecked,
                        "the run before was without dedup",
                        &[first, start],
                    ),
                    None => first = Some(start),
                },
            }
            last = Some(index);
        }
        for start in told.unchecked.iter().copied().filter(|start| Some(*start) != first) {
            let entries: Vec<At> = first.into_iter().chain([start]).collect();
            self.extra(key, Reason::Unchecked, "it ran without dedup", &entries);
        }
    }

    fn explain_claimed(
        &mut self,
        key: DedupKey,
        told: &Key,
        series: &[Series],
        last: usize,
        index: usize,
        start: At,
    ) {
        let of = series[index];
        let (reason, what, evidence) =
            if of.first > last { new_record(of.began) } else { self.same_record(key, told, last, index) };
        let before = &told.runs[last];
        let mut entries =
            vec![before.started.unwrap_or(before.begun), before.last, told.runs[index].begun, start];
        entries.extend(evidence);
        self.extra(key, reason, what, &entries);
    }

    /// Why there was another run of a record: what the claim says of the holder before it, if the log bears it out.
    fn same_record(&self, key: DedupKey, told: &Key, last: usize, index: usize) -> Found {
        let (run, next) = (&told.runs[last], &told.runs[index]);
        let found = match next.before {
            Some(Before::First) => turned_away(run),
            Some(Before::Failed) => retried(run),
            Some(Before::HandedBack) => handed_back(run),
            Some(Before::Vanished) => self.vanished(&told.runs[last..index]),
            None => {
                retried(run).or_else(|| handed_back(run)).or_else(|| self.vanished(&told.runs[last..index]))
            }
        };
        found.or_else(|| turned_away(run)).unwrap_or_else(|| self.not_as_said(key, told, run, next))
    }

    /// The last of these holders that has no end.
    fn vanished(&self, runs: &[Run]) -> Option<Found> {
        let holder = runs.iter().rfind(|run| !run.ended())?;
        // A process that is killed only in play may go on to notice that its lease is over.
        let death = self.story.death(holder.active, self.slack());
        Some(match (holder.gap, death, holder.lost) {
            (Some(gap), ..) => (
                Reason::Gap,
                "the run before succeeded, and the store did not confirm it".to_owned(),
                Some(gap),
            ),
            (None, None, lost) => {
                (Reason::LeaseExpired, "the lease of the run before ran out".to_owned(), lost)
            }
            (None, Some(death), Some(lost)) if self.story.time(lost) <= self.story.time(death) => {
                (Reason::LeaseExpired, "the lease of the run before ran out".to_owned(), Some(lost))
            }
            (None, Some(death), _) => {
                (Reason::Crashed, "the process of the run before ended".to_owned(), Some(death))
            }
        })
    }

    /// The claim says something that the run before does not bear out.
    fn not_as_said(&self, key: DedupKey, told: &Key, last: &Run, next: &Run) -> Found {
        if let Some(lost) = self.lost_between(key, last, next) {
            (Reason::RecordLost, "the store lost a record".to_owned(), Some(lost))
        } else if last.completed.is_some() && self.window_over(last, next) {
            (Reason::WindowOver, "its window was over".to_owned(), None)
        } else if told.silent > 0 && last.completed.is_none() {
            (Reason::Crashed, "a claim that could not be logged came between".to_owned(), None)
        } else {
            (Reason::Unexplained, "the run before does not show why".to_owned(), None)
        }
    }

    fn extra(&mut self, key: DedupKey, reason: Reason, what: impl Into<String>, at: &[At]) {
        let entries = self.entries(at);
        self.report.extra_runs.push(ExtraRun { key, reason, what: what.into(), entries });
    }
}

/// A reason, its words, and the entry that shows it.
type Found = (Reason, String, Option<At>);

/// Whether the claim was, or may have been, undone as if it had never been.
fn restores(last: &Run) -> bool {
    let undone = last.released_as(|release| release == Release::NotStarted);
    // A release may arrive after its holder has given the lease up for lost.
    let open = !last.ended() && last.gap.is_none();
    let unheard = open && (last.started.is_none() || shed(last));
    last.before == Some(Before::First) && (undone || unheard)
}

fn shed(run: &Run) -> bool {
    run.failed.is_some_and(|(_, cause)| cause == Cause::Overloaded)
}

fn new_record(began: Origin) -> Found {
    let (reason, what, evidence) = match began {
        Origin::Redriven => (Reason::Redriven, "an operator sent it back to work", None),
        Origin::WindowOver => (Reason::WindowOver, "its record had been kept for its time", None),
        Origin::Lost(at) => (Reason::RecordLost, "the store lost its record", Some(at)),
        Origin::First | Origin::Same | Origin::Unknown => {
            (Reason::Unexplained, "the store knew nothing of it, and nothing says why", None)
        }
    };
    (reason, what.to_owned(), evidence)
}

fn retried(run: &Run) -> Option<Found> {
    let released =
        run.released.filter(|(_, release)| matches!(release, Release::Failed { .. })).map(|(at, _)| at);
    let (at, why) = match (run.failed, released) {
        (Some((at, cause)), _) => (at, format!(" ({cause})")),
        (None, Some(at)) => (at, String::new()),
        (None, None) => return None,
    };
    Some((Reason::Retried, format!("attempt {} failed{why}", run.attempt), Some(at)))
}

fn handed_back(run: &Run) -> Option<Found> {
    let released =
        |wanted: fn(Release) -> bool| run.released.filter(|(_, release)| wanted(*release)).map(|(at, _)| at);
    let deferred = run.failed.filter(|(_, cause)| *cause == Cause::Deferred).map(|(at, _)| at);
    if let Some(at) = released(|release| matches!(release, Release::Deferred { .. })).or(deferred) {
        return Some((Reason::Deferred, "the run before asked for another time".to_owned(), Some(at)));
    }
    if let Some(at) = released(|release| release == Release::Interrupted) {
        return Some((Reason::Interrupted, "the run before was stopped".to_owned(), Some(at)));
    }
    // Its future was dropped, and the process ended before the release could be logged.
    let dropped = run.released.is_none() && run.failed.is_none() && run.ran.is_none();
    dropped.then(|| (Reason::Interrupted, "the run before was stopped".to_owned(), None))
}

fn turned_away(run: &Run) -> Option<Found> {
    let released = run.released.filter(|(_, release)| *release == Release::NotStarted).map(|(at, _)| at);
    let at = released.or(run.failed.filter(|_| shed(run)).map(|(at, _)| at))?;
    Some((Reason::TurnedAway, "the run before was turned away".to_owned(), Some(at)))
}
