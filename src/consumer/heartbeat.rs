//! Heartbeats to brokers that have a deadline for each delivery.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{MissedTickBehavior, interval};

use crate::Delivery;
use crate::delivery::Heartbeat;

/// One sweep over the deliveries in hand, whether their handlers run, wait or are being parked.
pub(super) struct Heartbeats {
    every: Duration,
    /// Brokers without a deadline need none.
    wanted: bool,
    in_hand: Mutex<BTreeMap<u64, Heartbeat>>,
    next: AtomicU64,
}

/// A delivery in hand: it has its place and its heartbeats until this is dropped.
pub(super) struct InHand {
    heartbeats: Arc<Heartbeats>,
    number: u64,
    _place: OwnedSemaphorePermit,
}

impl Heartbeats {
    pub(super) fn new(every: Duration, wanted: bool) -> Arc<Self> {
        let every = every.max(Duration::from_millis(1));
        let heartbeats = Arc::new(Self { every, wanted, in_hand: Mutex::default(), next: AtomicU64::new(0) });
        if wanted && let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(sweep(Arc::downgrade(&heartbeats), every));
        }
        heartbeats
    }

    pub(super) fn add(self: &Arc<Self>, delivery: &Delivery, place: OwnedSemaphorePermit) -> InHand {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if self.wanted {
            self.lock().insert(number, delivery.heartbeat());
        }
        InHand { heartbeats: Arc::clone(self), number, _place: place }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Heartbeat>> {
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends with the queue.
async fn sweep(heartbeats: Weak<Heartbeats>, every: Duration) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(heartbeats) = heartbeats.upgrade() else { return };
        heartbeats.lock().values().for_each(Heartbeat::beat);
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        if self.heartbeats.wanted {
            self.heartbeats.lock().remove(&self.number);
        }
    }
}

impl fmt::Debug for Heartbeats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heartbeats").field("every", &self.every).finish_non_exhaustive()
    }
}
