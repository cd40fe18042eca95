//! Dispositions become changes of the queue.

use std::sync::Arc;
use std::time::Duration;

use super::queue::{Fate, Queue};
use crate::broker::{BrokerError, BrokerErrorKind};
use crate::delivery::{AckHandle, Settle, Settling};
use crate::{Disposition, Message};

/// Settles the deliveries of one subscription.
pub(super) struct Settler {
    queue: Arc<Queue>,
}

impl Settler {
    pub(super) fn new(queue: Arc<Queue>) -> Self {
        Self { queue }
    }

    fn tell(&self, handle: &AckHandle, fate: Fate) -> Result<(), BrokerError> {
        match handle {
            AckHandle::Tag(tag) if self.queue.settle(*tag, fate) => Ok(()),
            _ => Err(closed()),
        }
    }
}

impl Settle for Settler {
    fn settle(&self, handle: &AckHandle, _message: &Message, disposition: Disposition) -> Settling {
        Settling::Now(self.tell(handle, fate_of(disposition)))
    }
}

fn fate_of(disposition: Disposition) -> Fate {
    match disposition {
        Disposition::Ack => Fate::Acked,
        Disposition::Requeue { after } | Disposition::Release { after } => Fate::Again(after),
        Disposition::Reject => Fate::Rejected,
        Disposition::Abandon => Fate::Again(Duration::ZERO),
    }
}

fn closed() -> BrokerError {
    let what = "the delivery could not be settled: its subscription or queue is gone";
    BrokerError::new(BrokerErrorKind::Closed, what)
}
