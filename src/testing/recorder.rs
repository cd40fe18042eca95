//! Records the events of a run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
pub struct Recorder(Arc<Mutex<Vec<Event>>>);

impl Recorder {
    /// An empty log.
    pub fn new() -> Self {
        Self::default()
    }

    /// What to give to a queue or a layer.
    pub fn observer(&self) -> Arc<dyn Observer> {
        Arc::new(self.clone())
    }

    /// Everything so far, in order.
    pub fn events(&self) -> Vec<Event> {
        self.lock().clone()
    }

    /// The kinds of everything that happened to one delivery, in order.
    pub fn of_delivery(&self, delivery: u64) -> Vec<EventKind> {
        self.lock().iter().filter(|event| event.delivery == delivery).map(|event| event.kind).collect()
    }

    /// The kinds of everything that happened to one key, in order.
    pub fn of_key(&self, key: DedupKey) -> Vec<EventKind> {
        self.lock().iter().filter(|event| event.key == Some(key)).map(|event| event.kind).collect()
    }

    /// How many events are of a kind that `pick` wants.
    pub fn count(&self, pick: impl Fn(&EventKind) -> bool) -> usize {
        self.lock().iter().filter(|event| pick(&event.kind)).count()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Recorder {
    fn observe(&self, event: &Event) {
        self.lock().push(*event);
    }
}
