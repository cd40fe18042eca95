//! A consumer in a task, that can be stopped, and killed.

use guestlist::testing::FaultyStore;
use guestlist::{CancellationToken, Consumer, Error, QueueStatus, Status};
use tokio::task::JoinHandle;

use super::ORDERS;

/// A consumer that runs.
pub(crate) struct Process {
    /// Its way to the store; nobody else's.
    pub(crate) store: FaultyStore,
    pub(crate) status: Status,
    stop: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
}

impl Process {
    pub(crate) fn spawn(store: FaultyStore, consumer: Consumer) -> Self {
        let (status, stop) = (consumer.status(), CancellationToken::new());
        let task = tokio::spawn(consumer.run_until(stop.clone().cancelled_owned()));
        Self { store, status, stop, task }
    }

    /// The counters of the queue `orders`.
    pub(crate) fn orders(&self) -> QueueStatus {
        self.status.queue(ORDERS).unwrap_or_default()
    }

    /// Asks it to stop, as a SIGTERM does.
    pub(crate) fn ask_to_stop(&self) {
        self.stop.cancel();
    }

    /// Stops it gracefully.
    pub(crate) async fn stop(self) -> Result<(), Error> {
        self.stop.cancel();
        self.end().await
    }

    /// Waits for its end.
    pub(crate) async fn end(self) -> Result<(), Error> {
        self.task.await.expect("the consumer's task does not panic")
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Kills it, as a SIGKILL does: what it had in hand is with the broker again, and nothing
    /// that it does while it is taken down reaches the store.
    pub(crate) async fn kill(self) {
        self.store.set_down(true);
        self.task.abort();
        let ended = self.task.await;
        assert!(ended.is_err_and(|error| error.is_cancelled()), "it was alive until it was killed");
    }
}
