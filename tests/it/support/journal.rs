//! What the handlers of a test did.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guestlist::{CancellationToken, Fence, Message};
use tokio::time::Instant;

/// What a handler is told of its run.
#[derive(Clone)]
pub(crate) struct Run {
    pub(crate) message: Message,
    pub(crate) fence: Fence,
    pub(crate) attempt: u32,
    pub(crate) cancel: CancellationToken,
}

impl Run {
    pub(crate) fn id(&self) -> String {
        self.message.id().and_then(|id| id.as_str()).unwrap_or_default().to_owned()
    }
}

/// One run of a handler.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) id: String,
    pub(crate) queue: String,
    pub(crate) attempt: u32,
    pub(crate) fence: Fence,
    pub(crate) began: Instant,
    /// `None`: it still runs, or its future was dropped.
    pub(crate) ended: Option<Instant>,
}

/// Every run of every handler, in the order in which they began.
#[derive(Clone, Default)]
pub(crate) struct Journal(Arc<Mutex<Vec<Entry>>>);

/// The right to write down the end of one run.
pub(crate) struct Page {
    journal: Journal,
    number: usize,
}

impl Journal {
    pub(crate) fn begin(&self, run: &Run) -> Page {
        let entry = Entry {
            id: run.id(),
            queue: run.message.source().queue.clone(),
            attempt: run.attempt,
            fence: run.fence,
            began: Instant::now(),
            ended: None,
        };
        let mut entries = self.lock();
        entries.push(entry);
        Page { journal: self.clone(), number: entries.len() - 1 }
    }

    pub(crate) fn all(&self) -> Vec<Entry> {
        self.lock().clone()
    }

    pub(crate) fn of(&self, id: &str) -> Vec<Entry> {
        self.lock().iter().filter(|entry| entry.id == id).cloned().collect()
    }

    /// How many runs of this id began.
    pub(crate) fn runs(&self, id: &str) -> usize {
        self.of(id).len()
    }

    /// How many runs of this id came to their end.
    pub(crate) fn ended(&self, id: &str) -> usize {
        self.of(id).iter().filter(|entry| entry.ended.is_some()).count()
    }

    pub(crate) fn attempts(&self, id: &str) -> Vec<u32> {
        self.of(id).iter().map(|entry| entry.attempt).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Page {
    pub(crate) fn end(self) {
        self.journal.lock()[self.number].ended = Some(Instant::now());
    }
}
