//! A log, told by delivery and by key.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::entry::{Entry, Marker, Step, What};
use super::log::Log;
use crate::dedup::protocol::{Before, Release};
use crate::{Cause, DedupKey, EventKind};

/// The place of an entry in its log.
pub(super) type At = usize;

/// A log, sorted for the rules.
pub(super) struct Story<'a> {
    pub(super) entries: &'a [Entry],
    /// The time of each entry, on the clock that all processes share.
    times: Vec<u64>,
    pub(super) deliveries: Vec<Delivery>,
    pub(super) keys: BTreeMap<DedupKey, Key>,
    /// The processes that log the arrival of deliveries.
    pub(super) receivers: HashSet<Arc<str>>,
    /// Where the store lost a record, or (without a key) all of them.
    losses: Vec<(At, Option<DedupKey>)>,
    /// Where a process ended, or began again.
    deaths: Vec<At>,
    /// Whether the store is away, for whom, from where on.
    pub(super) outages: Vec<Outage>,
}

/// One delivery.
#[derive(Default)]
pub(super) struct Delivery {
    pub(super) steps: Vec<At>,
}

/// One id.
#[derive(Default)]
pub(super) struct Key {
    /// In the order of their fences.
    pub(super) runs: Vec<Run>,
    /// Starts without a claim.
    pub(super) unchecked: Vec<At>,
    pub(super) duplicates: Vec<At>,
    /// Deliveries that came back since another one had the id.
    pub(super) waited: Vec<At>,
    /// How many claims may have been made that the log does not show.
    pub(super) silent: u32,
}

/// One claim, from its acquisition to its end. A handler may have run under it, or not.
pub(super) struct Run {
    pub(super) fence: u64,
    pub(super) attempt: u32,
    pub(super) generation: u32,
    pub(super) body: Option<u32>,
    /// The first entry: the claim.
    pub(super) begun: At,
    pub(super) before: Option<Before>,
    pub(super) started: Option<At>,
    pub(super) ran: Option<At>,
    pub(super) failed: Option<(At, Cause)>,
    pub(super) completed: Option<At>,
    pub(super) gap: Option<At>,
    pub(super) released: Option<(At, Release)>,
    pub(super) lost: Option<At>,
    pub(super) copied: Option<At>,
    /// The last entry that is not an end.
    pub(super) active: At,
    pub(super) last: At,
    /// When the claim was asked for at the earliest, plus the lease.
    pub(super) first_until: Option<u64>,
    /// The latest end of the lease that its holder knew of.
    pub(super) until: Option<u64>,
}

/// The store is away.
pub(super) struct Outage {
    pub(super) begin: At,
    pub(super) end: Option<At>,
    /// `None`: for all.
    pub(super) of: Option<Arc<str>>,
}

impl<'a> Story<'a> {
    pub(super) fn of(log: &'a Log, slack: u64) -> Self {
        let mut story = Self {
            entries: log.entries(),
            times: log.times(),
            deliveries: Vec::new(),
            keys: BTreeMap::new(),
            receivers: HashSet::new(),
            losses: Vec::new(),
            deaths: Vec::new(),
            outages: Vec::new(),
        };
        story.tell_deliveries();
        story.tell_keys();
        story.tell_markers();
        story.sort_runs(slack);
        story
    }

    /// The step at a place of which it is known that it has one.
    pub(super) fn step(&self, at: At) -> &'a Step {
        match &self.entries[at].what {
            What::Step(step) => step,
            What::Marker(_) => unreachable!("deliveries and keys are made of steps"),
        }
    }

    pub(super) fn time(&self, at: At) -> u64 {
        self.times[at]
    }

    pub(super) fn process(&self, at: At) -> &Arc<str> {
        &self.entries[at].process
    }

    /// Whether the first may have come before the second: in one process the log knows, else the times
    /// say so, give or take `slack`.
    pub(super) fn may_precede(&self, first: At, second: At, slack: u64) -> bool {
        if self.process(first) == self.process(second) {
            return first < second;
        }
        self.time(first) <= self.time(second).saturating_add(slack)
    }

    /// What shows that the store lost the record of this key between two times.
    pub(super) fn loss(&self, key: DedupKey, from: u64, to: u64, slack: u64) -> Option<At> {
        let between = |at: At| {
            let time = self.time(at);
            from <= time.saturating_add(slack) && time <= to.saturating_add(slack)
        };
        let of_key = |lost: &Option<DedupKey>| lost.is_none_or(|lost| lost == key);
        self.losses.iter().find(|(at, lost)| of_key(lost) && between(*at)).map(|(at, _)| *at)
    }

    /// Where the process of this entry ended after it.
    pub(super) fn death(&self, of: At, slack: u64) -> Option<At> {
        let process = self.process(of);
        // Who kills a process writes it into a log of its own, so that the order is by time.
        let late = |at: At| {
            self.entries[at].what == What::Marker(Marker::ProcessKilled)
                && self.time(at).saturating_add(slack) >= self.time(of)
        };
        self.deaths.iter().copied().find(|at| self.process(*at) == process && (*at > of || late(*at)))
    }

    /// A number that a process counts anew after a restart begins a new delivery where it is received again.
    fn tell_deliveries(&mut self) {
        let mut open: HashMap<(&str, u64), usize> = HashMap::new();
        for (at, entry) in self.entries.iter().enumerate() {
            let Some(step) = entry.as_step() else {
                if entry.what == What::Marker(Marker::ProcessStarted) {
                    open.retain(|(process, _), _| *process != &*entry.process);
                }
                continue;
            };
            let id = (&*entry.process, step.delivery);
            if step.kind == EventKind::Received {
                open.remove(&id);
                self.receivers.insert(Arc::clone(&entry.process));
            }
            let number = *open.entry(id).or_insert_with(|| {
                self.deliveries.push(Delivery::default());
                self.deliveries.len() - 1
            });
            self.deliveries[number].steps.push(at);
        }
    }

    fn tell_keys(&mut self) {
        let mut runs: BTreeMap<(DedupKey, u64), Run> = BTreeMap::new();
        for (at, entry) in self.entries.iter().enumerate() {
            let Some((step, key)) = entry.as_step().and_then(|step| Some((step, step.key?))) else {
                continue;
            };
            let told = self.keys.entry(key).or_default();
            match step.kind {
                EventKind::Duplicate => told.duplicates.push(at),
                EventKind::Started if step.claim.is_none() => told.unchecked.push(at),
                EventKind::Returned(_) if step.cause.is_none_or(|cause| cause == Cause::InProgress) => {
                    told.waited.push(at);
                }
                _ => {}
            }
            if let Some(claim) = step.claim {
                let run = runs.entry((key, claim.token)).or_insert_with(|| Run::begun(at, claim.fence, step));
                run.tell(at, step);
            }
        }
        for ((key, _), run) in runs {
            self.keys.entry(key).or_default().runs.push(run);
        }
        self.count_silent_claims();
    }

    /// A delivery that asked for its claim, and did not live to say what the answer was.
    fn count_silent_claims(&mut self) {
        for delivery in &self.deliveries {
            let steps = || delivery.steps.iter().map(|at| self.step(*at));
            let answered = |kind| matches!(kind, EventKind::Claimed(_) | EventKind::Duplicate);
            let key = steps().find_map(|step| step.key);
            let Some(key) = key.filter(|_| !steps().any(|step| answered(step.kind))) else { continue };
            let heard = steps().any(|step| match step.kind {
                EventKind::Returned(_) => step.cause == Some(Cause::InProgress),
                EventKind::Acked(_) => !steps().any(|step| step.kind == EventKind::Started),
                _ => false,
            });
            if !heard && let Some(told) = self.keys.get_mut(&key) {
                told.silent += 1;
            }
        }
    }

    fn tell_markers(&mut self) {
        let logs: HashSet<&Arc<str>> = self
            .entries
            .iter()
            .filter(|entry| entry.as_step().is_some())
            .map(|entry| &entry.process)
            .collect();
        for (at, entry) in self.entries.iter().enumerate() {
            let of = logs.contains(&entry.process).then(|| Arc::clone(&entry.process));
            match &entry.what {
                What::Marker(Marker::StoreLost(key)) => self.losses.push((at, *key)),
                What::Marker(Marker::ProcessKilled | Marker::ProcessStarted) => self.deaths.push(at),
                What::Marker(Marker::StoreAway) => self.outages.push(Outage { begin: at, end: None, of }),
                What::Marker(Marker::StoreBack) => {
                    let open = |outage: &&mut Outage| outage.end.is_none() && outage.of == of;
                    self.outages.iter_mut().filter(open).for_each(|outage| outage.end = Some(at));
                }
                What::Step(step) if step.kind == EventKind::Forgotten => self.losses.push((at, step.key)),
                _ => {}
            }
        }
    }

    /// By fence; that holds over lost records, too, in a store whose fences grow with its clock. Where the
    /// times say clearly that they began again, by what was lost in between first.
    fn sort_runs(&mut self, slack: u64) {
        let (losses, times) = (&self.losses, &self.times);
        let flushed = |at: At| losses.iter().filter(|(loss, key)| key.is_none() && *loss < at).count();
        let backwards = |runs: &[Run]| {
            runs.windows(2).any(|pair| times[pair[1].begun].saturating_add(slack) < times[pair[0].begun])
        };
        for key in self.keys.values_mut() {
            key.runs.sort_by_key(|run| (run.fence, run.begun));
            if backwards(&key.runs) {
                key.runs.sort_by_cached_key(|run| (flushed(run.begun), run.fence, run.begun));
            }
        }
    }
}

impl Run {
    fn begun(at: At, fence: u64, step: &Step) -> Self {
        Self {
            fence,
            attempt: step.attempt,
            generation: step.generation,
            body: step.body,
            begun: at,
            before: None,
            started: None,
            ran: None,
            failed: None,
            completed: None,
            gap: None,
            released: None,
            lost: None,
            copied: None,
            active: at,
            last: at,
            first_until: step.claim.and_then(|claim| claim.until),
            until: None,
        }
    }

    fn tell(&mut self, at: At, step: &Step) {
        self.until = self.until.max(step.claim.and_then(|claim| claim.until));
        self.last = at;
        match step.kind {
            EventKind::Claimed(before) => self.before = self.before.or(Some(before)),
            EventKind::Started => self.started = self.started.or(Some(at)),
            EventKind::Ran => self.ran = self.ran.or(Some(at)),
            EventKind::Failed(cause) => self.failed = self.failed.or(Some((at, cause))),
            EventKind::Copied => self.copied = self.copied.or(Some(at)),
            EventKind::Completed => self.completed = self.completed.or(Some(at)),
            EventKind::Gap => self.gap = self.gap.or(Some(at)),
            EventKind::Released(release) => self.released = self.released.or(Some((at, release))),
            EventKind::LeaseLost => self.lost = self.lost.or(Some(at)),
            _ => {}
        }
        let active = matches!(
            step.kind,
            EventKind::Claimed(_)
                | EventKind::Started
                | EventKind::Ran
                | EventKind::Failed(_)
                | EventKind::Copied
        );
        if active {
            self.active = at;
        }
    }

    /// Whether the store confirmed its end.
    pub(super) const fn ended(&self) -> bool {
        self.completed.is_some() || self.released.is_some()
    }

    /// Where the store confirmed its end, or its holder gave it up.
    pub(super) fn end(&self) -> Option<At> {
        self.completed.or(self.released.map(|(at, _)| at)).or(self.gap).or(self.lost)
    }

    pub(super) fn released_as(&self, wanted: impl Fn(Release) -> bool) -> bool {
        self.released.is_some_and(|(_, release)| wanted(release))
    }
}
