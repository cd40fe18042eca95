//! Records the events of a run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::checker::{Entry, Log, Marker};
use crate::{DedupKey, Event, EventKind, Observer};

/// Keeps every event, in order. Give it to [`Queue::observer`](crate::Queue::observer). Clones share the log.
///
/// ```
/// use guestlist::prelude::*;
/// use guestlist::testing::Recorder;
/// let recorder = Recorder::new();
/// let queue = Queue::new("orders").observer(recorder.observer());
/// assert!(recorder.events().is_empty());
/// ```
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Mutex<Vec<Record>>>);

#[derive(Debug)]
struct Record {
    process: Arc<str>,
    at: Instant,
    what: Recorded,
}

#[derive(Debug)]
enum Recorded {
    Event(Event),
    Marker(Marker),
}

/// Plays the part of one process of several.
struct OfProcess {
    process: Arc<str>,
    recorder: Recorder,
}

/// What a process is called that has no name.
const PROCESS: &str = "process";

impl Recorder {
    /// An empty log.
    pub fn new() -> Self {
        Self::default()
    }

    /// What to give to a queue or a layer.
    pub fn observer(&self) -> Arc<dyn Observer> {
        Arc::new(self.clone())
    }

    /// The same for one of several processes that share the log, played in one.
    pub fn observer_of(&self, process: impl Into<Arc<str>>) -> Arc<dyn Observer> {
        Arc::new(OfProcess { process: process.into(), recorder: self.clone() })
    }

    /// Marks something that happened to a process or to the store.
    pub fn mark(&self, process: impl Into<Arc<str>>, marker: Marker) {
        let mut records = self.lock();
        // Under the lock, so that the log is in the order of its times.
        let at = Instant::now();
        records.push(Record { process: process.into(), at, what: Recorded::Marker(marker) });
    }

    /// Everything so far, for a [`Checker`](super::checker::Checker). Times count from the first entry.
    pub fn log(&self) -> Log {
        let records = self.lock();
        let origin = records.iter().map(|record| record.at).min();
        let micros = |at: Instant| {
            let since = origin.map_or_else(Default::default, |origin| at.saturating_duration_since(origin));
            u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
        };
        let entry = |record: &Record| match &record.what {
            Recorded::Event(event) => Entry::from_event(Arc::clone(&record.process), event, micros),
            Recorded::Marker(marker) => {
                Entry::marker(Arc::clone(&record.process), micros(record.at), *marker)
            }
        };
        Log::from(records.iter().map(entry).collect::<Vec<_>>())
    }

    /// Every event so far, in order.
    pub fn events(&self) -> Vec<Event> {
        self.lock().iter().filter_map(Record::event).copied().collect()
    }

    /// The kinds of everything that happened to one delivery, in order.
    pub fn of_delivery(&self, delivery: u64) -> Vec<EventKind> {
        self.events().iter().filter(|event| event.delivery == delivery).map(|event| event.kind).collect()
    }

    /// The kinds of everything that happened to one key, in order.
    pub fn of_key(&self, key: DedupKey) -> Vec<EventKind> {
        self.events().iter().filter(|event| event.key == Some(key)).map(|event| event.kind).collect()
    }

    /// How many events are of a kind that `pick` wants.
    pub fn count(&self, pick: impl Fn(&EventKind) -> bool) -> usize {
        self.lock().iter().filter_map(Record::event).filter(|event| pick(&event.kind)).count()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Record>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, process: Arc<str>, event: &Event) {
        self.lock().push(Record { process, at: event.at, what: Recorded::Event(*event) });
    }
}

impl Record {
    fn event(&self) -> Option<&Event> {
        match &self.what {
            Recorded::Event(event) => Some(event),
            Recorded::Marker(_) => None,
        }
    }
}

impl Observer for Recorder {
    fn observe(&self, event: &Event) {
        self.record(PROCESS.into(), event);
    }
}

impl Observer for OfProcess {
    fn observe(&self, event: &Event) {
        self.recorder.record(Arc::clone(&self.process), event);
    }
}
