//! A queue's messages become a walk.

use std::sync::Arc;

use async_trait::async_trait;

use super::queue::Queue;
use crate::broker::{BrokerError, Letter, Letters, Place};

/// A walk over one queue. It takes nothing out, so there is nothing to give back: a place in the queue is for life, and
/// the walk ends at the last one that was given when it began.
pub(super) struct MemoryLetters {
    queue: Arc<Queue>,
    /// The place that was shown last.
    shown: u64,
    end: u64,
}

impl MemoryLetters {
    pub(super) fn new(queue: Arc<Queue>) -> Self {
        let end = queue.last_place();
        Self { queue, shown: 0, end }
    }
}

#[async_trait]
impl Letters for MemoryLetters {
    async fn next(&mut self) -> Result<Option<Letter>, BrokerError> {
        let found = self.queue.letter_between(self.shown, self.end)?;
        if let Some(letter) = &found {
            self.shown = letter.place.0;
        }
        Ok(found)
    }

    async fn remove(&mut self, place: Place) -> Result<(), BrokerError> {
        self.queue.remove(place.0);
        Ok(())
    }

    async fn close(self: Box<Self>) -> Result<(), BrokerError> {
        Ok(())
    }
}
