//! Waiting for another holder of an id: bounded, without a slot.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tower::ServiceExt;
use tower_service::Service;

use super::service::{Answer, Door, Obstacle};
use super::store::InProcessStore;
use super::suspects::SuspectPermit;
use crate::clock::from_now;
use crate::events::EventKind;
use crate::{BoxError, DedupKey, Failure, Message};

/// The first and the longest pause between two looks at a store that cannot wake its waiters.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

impl Door {
    /// Waits until the obstacle may be gone, takes a slot, and claims again; at most as long as
    /// the queue waits. The slot held so far is given back first: a waiter holds none.
    pub(super) async fn wait_and_claim<S>(
        &self,
        ready: S,
        key: DedupKey,
        message: &Message,
        mut obstacle: Obstacle,
    ) -> Result<(Answer, S), Failure>
    where
        S: Service<Message> + Clone + Send,
        S::Error: Into<BoxError>,
    {
        let spare = ready.clone();
        drop(ready);
        let Ok(_place) = self.places.try_acquire() else {
            return Ok((Answer::Blocked(obstacle), spare));
        };
        self.claims.events.emit(message, None, EventKind::Waited);
        let deadline = from_now(self.settings.wait());
        let mut pause = LOOK_AGAIN.0;
        loop {
            let cleared = timeout_at(deadline, self.cleared(key, obstacle, pause)).await;
            pause = (pause * 2).min(LOOK_AGAIN.1);
            let Ok(permit) = cleared else { return Ok((Answer::Blocked(obstacle), spare)) };
            let Ok(ready) = timeout_at(deadline, slot(spare.clone())).await else {
                return Ok((Answer::Blocked(obstacle), spare));
            };
            match self.claim(key, message, permit).await? {
                Answer::Blocked(still) => obstacle = still,
                answer => return Ok((answer, ready?)),
            }
        }
    }

    /// Ends when it is worth claiming again; with the suspect permit, if that was what was missing.
    async fn cleared(&self, key: DedupKey, obstacle: Obstacle, pause: Duration) -> Option<SuspectPermit> {
        match (obstacle, self.claims.store.in_process()) {
            (Obstacle::Suspect, _) => return self.settings.suspects.acquire().await,
            (Obstacle::InProgress(_), Some(store)) => freed(store, &key).await,
            (Obstacle::InProgress(until), None) => sleep_until(until.min(Instant::now() + pause)).await,
        }
        None
    }
}

/// Ends when the key may be free. Registers for changes before it looks, so that none is missed.
async fn freed(store: &dyn InProcessStore, key: &DedupKey) {
    loop {
        let changed = store.changed(key);
        let left = store.left_now(key);
        if left.is_zero() {
            return;
        }
        tokio::select! {
            biased;
            () = changed => {}
            () = sleep(left) => {}
        }
    }
}

/// A slot is taken before claiming, so that no lease runs while its handler waits for one.
async fn slot<S>(mut service: S) -> Result<S, Failure>
where
    S: Service<Message>,
    S::Error: Into<BoxError>,
{
    match service.ready().await {
        Ok(_) => Ok(service),
        Err(error) => Err(Failure::from_error(error.into())),
    }
}
