//! Everything that happened in one run, in order: what a seed is judged and replayed by.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Mutex;
use std::time::Duration;

use guestlist::dedup::protocol::Run;
use guestlist::testing::checker;
use guestlist::{DedupKey, Event, EventKind};
use tokio::time::Instant;

use super::store::{Answer, Op};

/// A fault, by the name under which it is counted.
pub(super) type Fault = &'static str;

#[derive(Debug)]
#[expect(dead_code, reason = "read by its Debug")]
enum What {
    Event { delivery: u64, key: Option<DedupKey>, run: Option<Run>, attempt: u32, kind: EventKind },
    Store { id: Option<usize>, op: Op, answer: Answer },
    Handler { id: usize, attempt: u32, does: &'static str },
    Fault(Fault),
    Step(&'static str, u64),
    Violation(String),
}

#[derive(Debug)]
struct Entry {
    at: Duration,
    process: Option<usize>,
    what: What,
}

/// More than any run needs: one that writes more goes round in circles.
const MOST: usize = 200_000;

pub(super) struct Log {
    began: Instant,
    entries: Mutex<Vec<Entry>>,
    /// Deliveries are numbered over all runs of the process; here from one.
    deliveries: Mutex<BTreeMap<u64, u64>>,
    /// The events and markers alone, for the checker.
    checked: Mutex<checker::Log>,
}

impl Log {
    pub(super) fn begin() -> Self {
        Self {
            began: Instant::now(),
            entries: Mutex::default(),
            deliveries: Mutex::default(),
            checked: Mutex::default(),
        }
    }

    fn push(&self, process: Option<usize>, what: What) {
        let mut entries = self.entries.lock().unwrap();
        entries.push(Entry { at: self.began.elapsed(), process, what });
        if entries.len() > MOST {
            let last: Vec<_> = entries.drain(MOST - 100..).collect();
            drop(entries);
            panic!("a run without end: {last:#?}");
        }
    }

    pub(super) fn event(&self, process: usize, event: &Event) {
        let delivery = {
            let mut deliveries = self.deliveries.lock().unwrap();
            let next = deliveries.len() as u64 + 1;
            *deliveries.entry(event.delivery).or_insert(next)
        };
        let Event { key, run, attempt, kind, .. } = *event;
        self.push(Some(process), What::Event { delivery, key, run, attempt, kind });
        let mut event = *event;
        event.delivery = delivery;
        let entry = checker::Entry::from_event(name(process), &event, |at| self.micros(at));
        self.checked.lock().unwrap().push(entry);
    }

    pub(super) fn store(&self, process: usize, id: Option<usize>, op: Op, answer: Answer) {
        self.push(Some(process), What::Store { id, op, answer });
    }

    pub(super) fn handler(&self, process: usize, id: usize, attempt: u32, does: &'static str) {
        self.push(Some(process), What::Handler { id, attempt, does });
    }

    pub(super) fn fault(&self, process: Option<usize>, fault: Fault) {
        self.push(process, What::Fault(fault));
    }

    pub(super) fn step(&self, step: &'static str, number: u64) {
        self.push(None, What::Step(step, number));
    }

    pub(super) fn violation(&self, what: &str) {
        self.push(None, What::Violation(what.to_owned()));
    }

    /// What no process can know.
    pub(super) fn mark(&self, process: usize, marker: checker::Marker) {
        let entry = checker::Entry::marker(name(process), self.micros(Instant::now()), marker);
        self.checked.lock().unwrap().push(entry);
    }

    pub(super) fn checked(&self) -> checker::Log {
        self.checked.lock().unwrap().clone()
    }

    fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX)
    }

    pub(super) fn faults(&self) -> BTreeMap<Fault, u64> {
        let mut counts = BTreeMap::new();
        for entry in self.entries.lock().unwrap().iter() {
            if let What::Fault(fault) = entry.what {
                *counts.entry(fault).or_default() += 1;
            }
        }
        counts
    }

    pub(super) fn fault_list(&self) -> String {
        self.text(|what| matches!(what, What::Fault(_)))
    }

    pub(super) fn whole(&self) -> String {
        self.text(|_| true)
    }

    fn text(&self, wanted: impl Fn(&What) -> bool) -> String {
        let mut text = String::new();
        for Entry { at, process, what } in self.entries.lock().unwrap().iter().filter(|e| wanted(&e.what)) {
            let process = process.map_or("    ".to_owned(), |number| format!("p{number:<3}"));
            let _ = writeln!(text, "{:>10.3} {process} {what:?}", at.as_secs_f64());
        }
        text
    }
}

fn name(process: usize) -> String {
    format!("p{process}")
}
