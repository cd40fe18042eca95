//! Proves the promises of a run from the log of its events, and explains every run beyond one per id.
//!
//! Each process writes a log of its events: a [`Recorder`](super::Recorder) keeps it in memory, a
//! [`LogWriter`] writes JSON lines that survive a kill. A test, or an operator, adds [`Marker`]s for what no
//! process can know: that another one was killed, that the store lost its records. A [`Checker`] reads the
//! log, or the [merged](Log::merge) logs of several processes, and gives a [`Report`]:
//!
//! - *Violations*: each broken promise, by the name of its [`Invariant`], with the entries that prove it.
//! - *Extra runs*: each run beyond the first of its id, with its [`Reason`]: retried, crashed, the lease ran
//!   out, the record was lost … One that the log does not explain is a finding, too.
//!
//! It works for every broker and store, and for a system of your own: all it knows is the log.
//!
//! ```
//! use guestlist::prelude::*;
//! use guestlist::Consumer;
//! use guestlist::broker::memory::MemoryBroker;
//! use guestlist::testing::checker::{Checker, Reason};
//! use guestlist::testing::Recorder;
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> guestlist::Result {
//! let (broker, recorder) = (MemoryBroker::new(), Recorder::new());
//! broker.declare("orders");
//! broker.declare("orders.dead");
//! broker.send("orders", Message::builder("{}").transport_id("order-1")).unwrap();
//! broker.send("orders", Message::builder("{}").transport_id("order-1")).unwrap();
//!
//! let queue = Queue::new("orders").dead_letter("orders.dead").observer(recorder.observer());
//! let queue = queue.handler(async |Attempt(attempt): Attempt| {
//!     if attempt == 1 { Err("not yet".into()) } else { Ok(()) }
//! });
//! let stop = CancellationToken::new();
//! let consumer = Consumer::new(broker.clone()).queue(queue).run_until(stop.clone().cancelled_owned());
//! tokio::join!(async { consumer.await.unwrap() }, async {
//!     broker.drained("orders").await.unwrap();
//!     stop.cancel();
//! });
//!
//! let report = Checker::new().one_clock().check(&recorder.log());
//! report.assert_clean();
//! assert_eq!((report.counts.runs, report.counts.duplicates), (2, 1));
//! assert_eq!(report.extra(Reason::Retried), 1);
//! # Ok(())
//! # }
//! ```
//!
//! # Order and clocks
//!
//! Each process's log is in order. Between processes the fences of a key say which claim came first, and
//! what a claim says of the holder before it says how that one had ended; neither needs a clock. Only lengths
//! of time (a lease, the window, an outage) are read from the entries' times, and [`Checker::slack`]
//! says how far these may be apart; within it nothing is held against anybody.
//!
//! # What it cannot see
//!
//! A log proves what happened, not what should have: progress (I9), scopes (I10) and memory (I12) have
//! tests of their own. A claim of a process that was killed before it could log it is not in the log;
//! the checker allows for as many as there are deliveries cut off at that point.

mod deliveries;
mod entry;
mod keys;
mod lines;
mod log;
mod report;
mod story;
#[cfg(test)]
mod tests;
mod times;
mod why;
mod writer;

use std::time::Duration;

pub use self::entry::{ClaimMark, Entry, Marker, Step, What};
pub use self::lines::ParseError;
pub use self::log::Log;
pub use self::report::{Counts, ExtraRun, Invariant, Reason, Report, Violation};
pub use self::writer::LogWriter;

use self::story::{At, Story};
use crate::{DedupKey, EventKind, defaults};

/// Checks logs. Its settings are those of the queue whose log it is; they begin as a queue's do.
/// See the [module docs](self) for an example.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "settings that do not depend on each other")]
pub struct Checker {
    lease: Duration,
    window: Duration,
    max_attempts: Option<u32>,
    pauses: bool,
    compare_bodies: bool,
    inbox: bool,
    own_store: bool,
    whole: bool,
    slack: Duration,
    returns: usize,
}

impl Default for Checker {
    fn default() -> Self {
        Self::new()
    }
}

impl Checker {
    /// How far the times of two processes may be apart: 1 s. The clocks of one machine agree far
    /// better, those of several with NTP mostly do.
    pub const SLACK: Duration = Duration::from_secs(1);

    /// How often a second deliveries of one id may go back to the broker while another one has it: 100.
    pub const RETURNS: usize = 100;

    /// The settings of a queue that has none of its own: [`LEASE`](defaults::LEASE),
    /// [`WINDOW`](defaults::WINDOW), [`MAX_ATTEMPTS`](defaults::MAX_ATTEMPTS), pauses while the store is away.
    pub const fn new() -> Self {
        Self {
            lease: defaults::LEASE,
            window: defaults::WINDOW,
            max_attempts: Some(defaults::MAX_ATTEMPTS),
            pauses: true,
            compare_bodies: true,
            inbox: false,
            own_store: false,
            whole: true,
            slack: Self::SLACK,
            returns: Self::RETURNS,
        }
    }

    /// The queue's lease.
    #[must_use]
    pub const fn lease(self, lease: Duration) -> Self {
        Self { lease, ..self }
    }

    /// The queue's window.
    #[must_use]
    pub const fn window(self, window: Duration) -> Self {
        Self { window, ..self }
    }

    /// How many attempts the queue allows; `None`: the log is of queues that differ, and this is not checked.
    #[must_use]
    pub const fn max_attempts(self, max: Option<u32>) -> Self {
        Self { max_attempts: max, ..self }
    }

    /// The queue goes on without dedup while the store is away
    /// ([`StorePolicy::Process`](crate::dedup::StorePolicy::Process)).
    #[must_use]
    pub const fn runs_without_store(self) -> Self {
        Self { pauses: false, ..self }
    }

    /// Takes no notice of bodies that differ, even where the log has them.
    #[must_use]
    pub const fn any_body(self) -> Self {
        Self { compare_bodies: false, ..self }
    }

    /// The queue has an [inbox](crate::inbox): an id is done when its transaction commits, which is after its handler
    /// returned and a moment before the log says so. A copy may be a duplicate in that moment, or for ever if the
    /// process was killed in it.
    #[must_use]
    pub const fn inbox(self) -> Self {
        Self { inbox: true, ..self }
    }

    /// The store is one process's own, as `DurableStore` is: a claim ends with its process, however much of its lease
    /// is left.
    #[must_use]
    pub const fn store_of_one_process(self) -> Self {
        Self { own_store: true, ..self }
    }

    /// The log begins in the middle: ids may have been handled, and claimed, before it.
    #[must_use]
    pub const fn begins_late(self) -> Self {
        Self { whole: false, ..self }
    }

    /// How far the times of two processes may be apart; [`SLACK`](Self::SLACK) unless said otherwise.
    #[must_use]
    pub const fn slack(self, slack: Duration) -> Self {
        Self { slack, ..self }
    }

    /// All times are of one clock: no slack. For logs of a [`Recorder`](super::Recorder).
    #[must_use]
    pub const fn one_clock(self) -> Self {
        self.slack(Duration::ZERO)
    }

    /// How often a second deliveries of one id may go back to the broker while another one has it;
    /// [`RETURNS`](Self::RETURNS) unless said otherwise.
    #[must_use]
    pub const fn returns_per_second(self, returns: usize) -> Self {
        Self { returns, ..self }
    }

    /// Checks a log. Costs time in proportion to its length.
    pub fn check(&self, log: &Log) -> Report {
        let story = Story::of(log, micros(self.slack));
        let mut judge = Judge { settings: self, story: &story, report: Report::default() };
        judge.report.counts = count(&story);
        judge.deliveries();
        judge.keys();
        judge.outages();
        judge.report
    }
}

/// A check under way. Its rules are in `deliveries` (one delivery after the other), `keys` (one id after the
/// other), `why` (extra runs) and `times` (outages, hot loops).
struct Judge<'a> {
    settings: &'a Checker,
    story: &'a Story<'a>,
    report: Report,
}

impl Judge<'_> {
    fn broken(&mut self, invariant: Invariant, key: Option<DedupKey>, what: impl Into<String>, at: &[At]) {
        let entries = self.entries(at);
        self.report.violations.push(Violation { invariant, key, what: what.into(), entries });
    }

    /// Each entry once, in the order of the log.
    fn entries(&self, at: &[At]) -> Vec<Entry> {
        let mut at = at.to_vec();
        at.sort_unstable();
        at.dedup();
        at.into_iter().map(|at| self.story.entries[at].clone()).collect()
    }

    fn slack(&self) -> u64 {
        micros(self.settings.slack)
    }
}

fn micros(length: Duration) -> u64 {
    u64::try_from(length.as_micros()).unwrap_or(u64::MAX)
}

fn count(story: &Story<'_>) -> Counts {
    let steps = || story.entries.iter().filter_map(Entry::as_step);
    let kinds = |wanted: fn(&EventKind) -> bool| steps().filter(|step| wanted(&step.kind)).count();
    let is_end = |kind| matches!(kind, EventKind::Acked(_) | EventKind::Returned(_) | EventKind::Unsettled);
    let starts = |with_key: bool| {
        let bare = steps().filter(|step| step.kind == EventKind::Started && step.claim.is_none());
        bare.filter(|step| step.key.is_some() == with_key).count()
    };
    let ended = |steps: &[At]| steps.iter().any(|at| is_end(story.step(*at).kind));
    Counts {
        entries: story.entries.len(),
        deliveries: story.deliveries.len(),
        ids: story.keys.len(),
        runs: kinds(|kind| *kind == EventKind::Started),
        succeeded: succeeded(steps()),
        duplicates: kinds(|kind| *kind == EventKind::Duplicate),
        gaps: kinds(|kind| *kind == EventKind::Gap),
        unchecked: starts(true),
        without_id: starts(false),
        lost_leases: kinds(|kind| *kind == EventKind::LeaseLost),
        dead_letters: kinds(|kind| *kind == EventKind::Copied),
        returned: kinds(|kind| matches!(kind, EventKind::Returned(_))),
        unfinished: story.deliveries.iter().filter(|delivery| !ended(&delivery.steps)).count(),
    }
}

fn succeeded<'a>(steps: impl Iterator<Item = &'a Step>) -> usize {
    let ran = steps.filter(|step| step.kind == EventKind::Ran).filter_map(|step| step.key);
    ran.collect::<std::collections::HashSet<_>>().len()
}
