//! Logs made by hand: good ones, and ones that break exactly one promise.

mod invariants;
mod lines;
mod reasons;
mod simulated;

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Checker, ClaimMark, Entry, Log, Marker, Reason, Report, Step};
use crate::dedup::protocol::{Before, Release};
use crate::{Cause, DedupKey, Disposition, EventKind, Outcome};

pub(super) const KEY: DedupKey = DedupKey::from_bytes([1; 16]);
pub(super) const SECOND: u64 = 1_000_000;
pub(super) const LEASE: u64 = 30 * SECOND;
pub(super) const HOUR: u64 = 3600 * SECOND;
pub(super) const FAILED: Release = Release::Failed { not_before: Duration::ZERO };
pub(super) const AGAIN: Disposition = Disposition::Requeue { after: Duration::ZERO };
pub(super) const LATER: Disposition = Disposition::Release { after: Duration::from_secs(1) };

/// Writes a log by hand: `delivery` says whose story goes on, the rest what happens in it.
#[derive(Default)]
pub(super) struct Tape {
    log: Log,
    now: u64,
    at: (&'static str, u64),
    steps: BTreeMap<(&'static str, u64), Step>,
}

impl Tape {
    pub(super) fn new() -> Self {
        Self { now: 100 * SECOND, ..Self::default() }
    }

    /// A delivery arrives, and its id is found.
    pub(super) fn arrives(&mut self, process: &'static str, number: u64) -> &mut Self {
        self.at = (process, number);
        self.steps.insert(self.at, Step::new(number, EventKind::Received));
        self.says(EventKind::Received);
        self.with(|step| step.key(KEY)).says(EventKind::Identified)
    }

    /// Goes on with a delivery that arrived before.
    pub(super) fn delivery(&mut self, process: &'static str, number: u64) -> &mut Self {
        self.at = (process, number);
        self
    }

    /// The process counts its deliveries anew, or a stranger's log begins here.
    pub(super) fn with(&mut self, change: impl FnOnce(Step) -> Step) -> &mut Self {
        let step = self.steps.remove(&self.at).expect("it has arrived");
        self.steps.insert(self.at, change(step));
        self
    }

    pub(super) fn after(&mut self, micros: u64) -> &mut Self {
        self.now += micros;
        self
    }

    /// By a claim whose fence is its token's hash as well.
    pub(super) fn claims(&mut self, before: Before, fence: u64, attempt: u32) -> &mut Self {
        self.claims_as(ClaimMark::new(fence, fence), before, attempt)
    }

    pub(super) fn claims_as(&mut self, claim: ClaimMark, before: Before, attempt: u32) -> &mut Self {
        let claim = claim.until(self.now + LEASE);
        self.with(|step| step.claim(claim).attempt(attempt)).says(EventKind::Claimed(before))
    }

    pub(super) fn renews(&mut self) -> &mut Self {
        let until = self.now + LEASE;
        self.with(|step| step.claim(step.claim.expect("it has a claim").until(until)))
    }

    pub(super) fn says(&mut self, kind: EventKind) -> &mut Self {
        let step = Step { kind, ..self.steps[&self.at] };
        self.log.push(Entry::step(self.at.0, self.now, step));
        self
    }

    pub(super) fn all(&mut self, kinds: &[EventKind]) -> &mut Self {
        for kind in kinds {
            self.says(*kind);
        }
        self
    }

    pub(super) fn returns(&mut self, cause: Cause, disposition: Disposition) -> &mut Self {
        let step = Step { kind: EventKind::Returned(disposition), ..self.steps[&self.at] }.cause(cause);
        self.log.push(Entry::step(self.at.0, self.now, step));
        self
    }

    pub(super) fn mark(&mut self, process: &'static str, marker: Marker) -> &mut Self {
        self.log.push(Entry::marker(process, self.now, marker));
        self
    }

    /// Claimed for the first time, run, remembered, acked.
    pub(super) fn handles(&mut self, before: Before, fence: u64, attempt: u32) -> &mut Self {
        self.claims(before, fence, attempt).all(&[
            EventKind::Started,
            EventKind::Ran,
            EventKind::Completed,
            EventKind::Acked(Outcome::Handled),
        ])
    }

    /// Claimed, run, failed, released, to come again.
    pub(super) fn fails(&mut self, before: Before, fence: u64, attempt: u32) -> &mut Self {
        self.claims(before, fence, attempt)
            .all(&[EventKind::Started, EventKind::Failed(Cause::Transient), EventKind::Released(FAILED)])
            .returns(Cause::Transient, AGAIN)
    }

    /// Claimed, run, failed for good, parked, acked.
    pub(super) fn parks(&mut self, before: Before, fence: u64, attempt: u32, cause: Cause) -> &mut Self {
        self.claims(before, fence, attempt).all(&[
            EventKind::Started,
            EventKind::Failed(cause),
            EventKind::Copied,
            EventKind::Released(Release::DeadLettered),
            EventKind::Acked(Outcome::DeadLettered(cause)),
        ])
    }

    pub(super) fn is_duplicate(&mut self) -> &mut Self {
        self.all(&[EventKind::Duplicate, EventKind::Acked(Outcome::Duplicate)])
    }

    pub(super) fn log(&self) -> Log {
        self.log.clone()
    }

    /// Checked with no slack; a panic that shows the report unless it is clean.
    pub(super) fn clean(&self) -> Report {
        self.clean_as(Checker::new().one_clock())
    }

    pub(super) fn clean_as(&self, checker: Checker) -> Report {
        let report = checker.check(&self.log);
        report.assert_clean();
        report
    }

    /// The names of the broken promises.
    pub(super) fn broken(&self) -> Vec<&'static str> {
        self.broken_as(Checker::new().one_clock())
    }

    pub(super) fn broken_as(&self, checker: Checker) -> Vec<&'static str> {
        let report = checker.check(&self.log);
        for violation in &report.violations {
            assert!(!violation.entries.is_empty(), "{report}");
        }
        report.violations.iter().map(|violation| violation.invariant.name()).collect()
    }

    /// The reason of the only extra run of a clean log.
    pub(super) fn reason(&self) -> Reason {
        let report = self.clean();
        assert_eq!(report.extra_runs.len(), 1, "{report}");
        report.extra_runs[0].reason
    }
}
