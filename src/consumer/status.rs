//! Counters and health, readable at any time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::pause::{Away, Gate};
use crate::{Cause, Failure, Outcome};

/// A view of a running consumer. Cheap to clone; still readable when the consumer has ended.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<BTreeMap<String, Arc<Counters>>>>);

impl Status {
    /// Every queue, by name.
    pub fn queues(&self) -> Vec<QueueStatus> {
        self.lock().iter().map(|(name, counters)| counters.snapshot(name)).collect()
    }

    /// One queue.
    pub fn queue(&self, name: &str) -> Option<QueueStatus> {
        self.lock().get(name).map(|counters| counters.snapshot(name))
    }

    /// Whether every queue consumes, and no handler is stuck.
    pub fn is_healthy(&self) -> bool {
        self.queues().iter().all(|queue| queue.state == State::Running && queue.stuck == 0)
    }

    /// Counters for a new queue; `None` if there is one of that name.
    pub(super) fn add(&self, name: &str) -> Option<Arc<Counters>> {
        let mut queues = self.lock();
        if queues.contains_key(name) {
            return None;
        }
        let counters = Arc::new(Counters::default());
        queues.insert(name.to_owned(), Arc::clone(&counters));
        Some(counters)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Counters>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a queue is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// Not consuming yet.
    #[default]
    Starting,
    /// Consuming.
    Running,
    /// Not pulling: its store or its dead-letter destination is away.
    Paused,
    /// Its subscription broke; a new one is being made.
    Reconnecting,
    /// Stopping: running handlers finish.
    Draining,
    /// Stopped.
    Stopped,
    /// Given up.
    Failed,
}

/// The counters of one queue, since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueStatus {
    /// The queue.
    pub name: String,
    /// What it is doing.
    pub state: State,
    /// Why it is paused, if it is: `store_down` or `dead_letter_down`.
    pub paused_by: Option<Cause>,
    /// Deliveries that arrived.
    pub received: u64,
    /// Handled and remembered.
    pub handled: u64,
    /// Dedup gaps: handled, and the store did not confirm it.
    pub dedup_gaps: u64,
    /// Handled without dedup.
    pub unchecked: u64,
    /// Skipped: done before.
    pub duplicates: u64,
    /// With the dead letters, by cause.
    pub dead_letters: BTreeMap<&'static str, u64>,
    /// Not done, to come again, by cause.
    pub failures: BTreeMap<&'static str, u64>,
    /// Deliveries whose end the broker could not be told.
    pub unsettled: u64,
    /// Subscriptions that broke.
    pub rebuilds: u64,
    /// Runs that are past `max_run` and have not returned, now, or up to a third of the lease ago: each blocks its thread,
    /// which nobody can end, and keeps its place in the concurrency. If its id is suspect it keeps the suspect permit as well,
    /// and all other suspect ids of this process wait.
    pub stuck: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    state: Mutex<State>,
    gate: OnceLock<Gate>,
    received: AtomicU64,
    handled: AtomicU64,
    gaps: AtomicU64,
    unchecked: AtomicU64,
    duplicates: AtomicU64,
    dead_letters: Mutex<BTreeMap<&'static str, u64>>,
    failures: Mutex<BTreeMap<&'static str, u64>>,
    unsettled: AtomicU64,
    rebuilds: AtomicU64,
}

impl Counters {
    pub(super) fn set(&self, state: State) {
        *lock(&self.state) = state;
    }

    pub(super) fn gate(&self, gate: Gate) {
        let _ = self.gate.set(gate);
    }

    pub(super) fn receive(&self) {
        self.received.fetch_add(1, Relaxed);
    }

    pub(super) fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    pub(super) fn rebuild(&self) {
        self.rebuilds.fetch_add(1, Relaxed);
    }

    pub(super) fn unsettled(&self) {
        self.unsettled.fetch_add(1, Relaxed);
    }

    pub(super) fn count(&self, answer: &Result<Outcome, Failure>) {
        let counter = match answer {
            Ok(Outcome::Handled) => &self.handled,
            Ok(Outcome::HandledUnrecorded) => &self.gaps,
            Ok(Outcome::HandledUnchecked) => &self.unchecked,
            Ok(Outcome::Duplicate) => &self.duplicates,
            Ok(Outcome::DeadLettered(cause)) => return count(&self.dead_letters, *cause),
            Err(failure) => return count(&self.failures, failure.cause()),
        };
        counter.fetch_add(1, Relaxed);
    }

    fn snapshot(&self, name: &str) -> QueueStatus {
        let paused_by = self.gate.get().and_then(Gate::away).map(|away| match away {
            Away::Store => Cause::StoreDown,
            Away::DeadLetters => Cause::DeadLetterDown,
        });
        let state = *lock(&self.state);
        QueueStatus {
            name: name.to_owned(),
            state: if state == State::Running && paused_by.is_some() { State::Paused } else { state },
            paused_by,
            received: self.received(),
            handled: self.handled.load(Relaxed),
            dedup_gaps: self.gaps.load(Relaxed),
            unchecked: self.unchecked.load(Relaxed),
            duplicates: self.duplicates.load(Relaxed),
            dead_letters: lock(&self.dead_letters).clone(),
            failures: lock(&self.failures).clone(),
            unsettled: self.unsettled.load(Relaxed),
            rebuilds: self.rebuilds.load(Relaxed),
            stuck: self.gate.get().map_or(0, Gate::stuck),
        }
    }
}

fn count(causes: &Mutex<BTreeMap<&'static str, u64>>, cause: Cause) {
    *lock(causes).entry(cause.name()).or_default() += 1;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
