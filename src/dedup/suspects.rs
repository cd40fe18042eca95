//! The suspect permit: ids whose holder vanished run one at a time.

use std::sync::{Arc, OnceLock};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Hands out the one suspect permit of a process, first come, first served.
///
/// A message that kills its process takes its neighbours with it. Were all of their ids tried
/// again side by side, each crash would cost each neighbour an attempt; one at a time, a poison
/// costs each good neighbour at most one.
#[derive(Clone, Debug)]
pub struct Suspects(Arc<Semaphore>);

/// The permit, while it is held.
pub(crate) type SuspectPermit = OwnedSemaphorePermit;

impl Suspects {
    /// A permit of its own. Consumers of one process should share one; tests that play several
    /// processes give each its own.
    pub fn new() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }

    /// The permit of this process, for all its queues: the default.
    pub fn of_process() -> Self {
        static PROCESS: OnceLock<Suspects> = OnceLock::new();
        PROCESS.get_or_init(Self::new).clone()
    }

    /// As many permits as anybody wants: what a consumer without this rule would do. For tests
    /// that show why the rule is there.
    #[cfg(feature = "testing")]
    pub fn unlimited() -> Self {
        Self(Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)))
    }

    /// Waits for the permit.
    pub(crate) async fn acquire(&self) -> Option<SuspectPermit> {
        // The semaphore is never closed.
        Arc::clone(&self.0).acquire_owned().await.ok()
    }
}

impl Default for Suspects {
    fn default() -> Self {
        Self::of_process()
    }
}
