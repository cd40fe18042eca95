//! Rules for one id after the other: its claims in the order of their fences, each compared with the one before.

use super::story::{At, Key, Run};
use super::why::{Origin, Series};
use super::{Invariant, Judge, micros};
use crate::dedup::protocol::{Before, Release};
use crate::{DedupKey, defaults};

impl Judge<'_> {
    pub(super) fn keys(&mut self) {
        let story = self.story;
        for (key, told) in &story.keys {
            self.one_key(*key, told);
        }
    }

    fn one_key(&mut self, key: DedupKey, told: &Key) {
        let series = self.series(key, told);
        for (pair, next_series) in told.runs.windows(2).zip(series.iter().skip(1)) {
            let [last, next] = pair else { continue };
            self.fences(key, last, next);
            self.overlap(key, last, next, next_series);
            self.done(key, last, next);
            self.taken_over(key, told, last, next);
            self.attempt_grows(key, told, last, next, next_series);
            self.fresh_start(key, last, next, next_series);
        }
        self.redrives(key, told, &series);
        self.bodies(key, told, &series);
        self.duplicates(key, told);
        self.unchecked(key, told);
        self.hot_loop(key, &told.waited);
        self.explain(key, told, &series);
    }

    /// A later claim has a higher fence: no two the same, and in one process the log knows the order.
    fn fences(&mut self, key: DedupKey, last: &Run, next: &Run) {
        let backwards =
            self.story.process(last.begun) == self.story.process(next.begun) && next.begun < last.begun;
        if (backwards || last.fence == next.fence) && self.lost_between(key, last, next).is_none() {
            let what = "a later claim has no higher fence";
            self.broken(Invariant::OneAtATime, Some(key), what, &[last.begun, next.begun]);
        }
    }

    /// Nobody claims what another one holds for certain.
    fn overlap(&mut self, key: DedupKey, last: &Run, next: &Run, series: &Series) {
        let held_until = self.surely_held_until(last, next, series);
        let claimed = self.story.time(next.begun);
        let overlap = claimed.saturating_add(self.slack()) < held_until;
        if overlap
            && last.completed.is_none()
            && !self.died_before(last, next)
            && self.lost_between(key, last, next).is_none()
        {
            let what =
                format!("claimed {} before the lease of its holder ended", seconds(held_until - claimed));
            self.broken(Invariant::OneAtATime, Some(key), what, &[last.begun, last.active, next.begun]);
        }
    }

    /// The holder's claim ended with its process, where the store did.
    fn died_before(&self, last: &Run, next: &Run) -> bool {
        let death = self.story.death(last.active, self.slack()).filter(|_| self.settings.own_store);
        death.is_some_and(|death| self.story.may_precede(death, next.begun, self.slack()))
    }

    /// Up to when the holder had the claim, whatever the clocks of others say: to the end of its lease in its
    /// own view, and no longer than to the last thing that it did before it gave the claim up.
    fn surely_held_until(&self, last: &Run, next: &Run, series: &Series) -> u64 {
        let active = self.story.time(last.active);
        let until =
            last.until.unwrap_or_else(|| self.asked(last).saturating_add(micros(self.settings.lease)));
        // A holder that was killed may have released before it could say so.
        let released_unheard = match next.before {
            Some(Before::Failed | Before::HandedBack) => true,
            // A redrive starts afresh on what was released or parked.
            Some(Before::First) => matches!(series.origin, Origin::Same | Origin::Redriven),
            Some(Before::Vanished) | None => false,
        };
        if last.ended() || released_unheard { until.min(active) } else { until }
    }

    /// What is done stays done for the window, for a redrive as well.
    fn done(&mut self, key: DedupKey, last: &Run, next: &Run) {
        let Some(completed) = last.completed else { return };
        if self.window_over(last, next) || self.lost_between(key, last, next).is_some() {
            return;
        }
        let (invariant, what) = match next.before {
            // It was claimed from a holder that had vanished: so that one completed after it had lost the claim.
            Some(Before::Vanished) => {
                (Invariant::OneAtATime, "completed by a holder whose claim somebody else had taken")
            }
            _ => (Invariant::Window, "claimed again within the window after it was done"),
        };
        let entries =
            [last.ran.unwrap_or(completed), completed, next.begun, next.started.unwrap_or(next.begun)];
        self.broken(invariant, Some(key), what, &entries);
    }

    /// A holder whose claim was taken cannot release it any more.
    fn taken_over(&mut self, key: DedupKey, told: &Key, last: &Run, next: &Run) {
        let Some((released, _)) = last.released else { return };
        let late = !self.story.may_precede(released, next.begun, self.slack());
        let taken = next.before == Some(Before::Vanished);
        if late && taken && told.silent == 0 && self.lost_between(key, last, next).is_none() {
            let what = "released by a holder whose claim somebody else had taken";
            self.broken(Invariant::OneAtATime, Some(key), what, &[last.begun, next.begun, released]);
        }
    }

    /// One attempt for each claim, unless it was handed back.
    fn attempt_grows(&mut self, key: DedupKey, told: &Key, last: &Run, next: &Run, series: &Series) {
        if series.origin != Origin::Same
            || last.completed.is_some()
            || self.window_over(last, next)
            || self.lost_between(key, last, next).is_some()
        {
            return;
        }
        if last.released_as(|release| release == Release::DeadLettered) {
            let what = "claimed again while it is with the dead letters";
            let entries = [last.begun, last.last, next.begun, next.started.unwrap_or(next.begun)];
            self.broken(Invariant::BoundedRetry, Some(key), what, &entries);
            return;
        }
        let (fewest, most) = attempts_after(last, next);
        let most = most.saturating_add(told.silent);
        if !(fewest..=most).contains(&next.attempt) {
            let what = format!("attempt {} after attempt {}: {fewest} was next", next.attempt, last.attempt);
            self.broken(Invariant::BoundedRetry, Some(key), what, &[last.begun, last.last, next.begun]);
        }
    }

    /// The attempts begin again only where nothing is known of the id any more, or for a redrive.
    fn fresh_start(&mut self, key: DedupKey, last: &Run, next: &Run, series: &Series) {
        if series.origin == Origin::Unknown && last.completed.is_none() {
            let what =
                "the attempts begin again, and neither a redrive nor the window nor a lost record is why";
            self.broken(Invariant::BoundedRetry, Some(key), what, &[last.begun, last.last, next.begun]);
        }
    }

    /// A redrive begins at attempt 1.
    fn redrives(&mut self, key: DedupKey, told: &Key, series: &[Series]) {
        for (index, run) in told.runs.iter().enumerate().skip(1) {
            let of = &series[index];
            let above =
                of.generation.and_then(|generation| generation.checked_add(1)) == Some(run.generation);
            if above && of.origin == Origin::Same && told.silent == 0 {
                let what = format!("a redrive went on with attempt {}", run.attempt);
                let last = &told.runs[index - 1];
                self.broken(
                    Invariant::FailureNeverMarks,
                    Some(key),
                    what,
                    &[last.begun, last.last, run.begun],
                );
            }
        }
    }

    /// All runs of a record are of one body.
    fn bodies(&mut self, key: DedupKey, told: &Key, series: &[Series]) {
        if !self.settings.compare_bodies {
            return;
        }
        let mut first: Option<(At, u32)> = None;
        for (run, of) in told.runs.iter().zip(series) {
            if of.origin != Origin::Same {
                first = None;
            }
            let (Some(started), Some(body)) = (run.started, run.body) else { continue };
            let (other, expected) = *first.get_or_insert((started, body));
            if expected != body {
                let what = "ran with another body than the one it was first seen with";
                self.broken(Invariant::BodyIdentity, Some(key), what, &[other, started]);
            }
        }
    }

    /// Only a handler that succeeded makes later deliveries duplicates.
    fn duplicates(&mut self, key: DedupKey, told: &Key) {
        if !self.settings.whole {
            return;
        }
        for duplicate in told.duplicates.iter().copied() {
            let ran = |run: &&Run| {
                self.ran(run).is_some_and(|ran| self.story.may_precede(ran, duplicate, self.slack()))
            };
            let ran: Vec<&Run> = told.runs.iter().filter(ran).collect();
            if ran.is_empty() {
                self.no_duplicate(key, told, duplicate);
            } else {
                self.same_body(key, &ran, duplicate);
            }
        }
    }

    /// From when on the id may have been done.
    fn ran(&self, run: &Run) -> Option<At> {
        if self.settings.inbox {
            return run.started.filter(|_| run.failed.is_none());
        }
        run.ran.or(run.completed)
    }

    fn no_duplicate(&mut self, key: DedupKey, told: &Key, duplicate: At) {
        let holds = |run: &&Run| run.begun < duplicate && run.end().is_none_or(|end| end > duplicate);
        if let Some(holder) = told.runs.iter().find(holds) {
            let what = "taken for a duplicate while another delivery was still at it";
            self.broken(Invariant::InProgressNeverAcked, Some(key), what, &[holder.begun, duplicate]);
            return;
        }
        let what = "taken for a duplicate, and no handler had succeeded";
        let last = told.runs.iter().rfind(|run| run.begun < duplicate);
        let entries: Vec<At> =
            last.map(|run| [run.begun, run.last]).into_iter().flatten().chain([duplicate]).collect();
        self.broken(Invariant::FailureNeverMarks, Some(key), what, &entries);
    }

    fn same_body(&mut self, key: DedupKey, ran: &[&Run], duplicate: At) {
        let Some(body) = self.story.step(duplicate).body.filter(|_| self.settings.compare_bodies) else {
            return;
        };
        if ran.iter().all(|run| run.body.is_some_and(|other| other != body)) {
            let what = "taken for a duplicate of an id that was handled with another body";
            let handled = ran.iter().filter_map(|run| run.ran.or(run.completed));
            let entries: Vec<At> = handled.chain([duplicate]).collect();
            self.broken(Invariant::BodyIdentity, Some(key), what, &entries);
        }
    }

    /// A queue that pauses runs nothing without a claim.
    fn unchecked(&mut self, key: DedupKey, told: &Key) {
        for started in told.unchecked.iter().copied().filter(|_| self.settings.pauses) {
            let what = "ran without a claim, and the queue pauses while the store is away";
            self.broken(Invariant::StoreOutage, Some(key), what, &[started]);
        }
    }

    // What the rules ask of two claims.

    /// The record of the first had been kept for its time when the second claimed.
    pub(super) fn window_over(&self, last: &Run, next: &Run) -> bool {
        let changed = match (last.completed, last.ended()) {
            (Some(completed), _) => self.story.time(last.ran.unwrap_or(completed)),
            (None, true) => self.story.time(last.active),
            (None, false) => self.asked(last),
        };
        let again_at = changed.saturating_add(last.released.map_or(0, |(_, why)| backoff(why)));
        let kept_until = again_at.saturating_add(micros(self.settings.window));
        self.story.time(next.begun).saturating_add(self.slack()) >= kept_until
    }

    /// What shows that the store lost the record between the two claims.
    pub(super) fn lost_between(&self, key: DedupKey, last: &Run, next: &Run) -> Option<At> {
        self.story.loss(key, self.story.time(last.begun), self.story.time(next.begun), self.slack())
    }

    /// When the store was asked for a claim, at the earliest: its answer may have been late.
    fn asked(&self, run: &Run) -> u64 {
        let lease = micros(self.settings.lease);
        let late = lease / u64::from(defaults::STORE_CALLS_PER_LEASE);
        run.first_until.map_or_else(
            || self.story.time(run.begun).saturating_sub(late),
            |until| until.saturating_sub(lease),
        )
    }
}

/// What the record is kept through, before its time begins.
fn backoff(why: Release) -> u64 {
    match why {
        Release::Failed { not_before } | Release::Deferred { not_before } => micros(not_before),
        Release::NotStarted | Release::Interrupted | Release::DeadLettered => 0,
    }
}

/// The least and the most that the next attempt can be.
fn attempts_after(last: &Run, next: &Run) -> (u32, u32) {
    let (same, more) = (last.attempt, last.attempt.saturating_add(1));
    match last.released {
        Some((_, Release::Failed { .. })) => (more, more),
        Some((_, Release::Deferred { .. } | Release::NotStarted)) => (same, same),
        Some((_, Release::Interrupted | Release::DeadLettered)) => (same, more),
        // It vanished, or released unheard.
        None => {
            let handed_back = next.before == Some(Before::HandedBack) || next.before == last.before;
            (if handed_back { same } else { more }, more)
        }
    }
}

fn seconds(micros: u64) -> String {
    format!("{}.{:06} s", micros / 1_000_000, micros % 1_000_000)
}
