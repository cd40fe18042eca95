//! [`InboxService`]: begin → lend → run → complete and commit, or roll back.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tower_service::Service;

use super::{CommitError, Inbox, InboxClaim};
use crate::dedup::{Release, RunContext};
use crate::delivery::BoxFuture;
use crate::pipeline::InsideDedup;
use crate::settlement::Plan;
use crate::{BoxError, Cause, Failure, FailureClass, Message, defaults};

/// Middleware that runs each try in a transaction, which completes the claim. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct InboxService<S> {
    inner: S,
    inbox: Arc<dyn Inbox>,
    window: Duration,
}

impl<S> InboxService<S> {
    pub(super) fn new(inner: S, inbox: Arc<dyn Inbox>, window: Duration) -> Self {
        Self { inner, inbox, window }
    }
}

impl<S> Service<Message> for InboxService<S>
where
    S: Service<Message> + Clone + Send + 'static,
    S::Response: InsideDedup + Send,
    S::Error: Into<BoxError> + Send,
    S::Future: Send + 'static,
{
    type Response = ();
    type Error = BoxError;
    type Future = BoxFuture<Result<(), BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, message: Message) -> Self::Future {
        // The clone may not be ready; the service that was polled is. Move that one.
        let clone = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, clone);
        let (inbox, window) = (Arc::clone(&self.inbox), self.window);
        Box::pin(async move { in_transaction(ready, &*inbox, window, message).await })
    }
}

async fn in_transaction<S>(
    mut ready: S,
    inbox: &dyn Inbox,
    window: Duration,
    message: Message,
) -> Result<(), BoxError>
where
    S: Service<Message>,
    S::Error: Into<BoxError>,
{
    let run = message.run().cloned().ok_or_else(|| unclaimed().into_error())?;
    let claim = InboxClaim { key: run.key(), run: run.run(), window };
    let transaction = inbox.begin(claim).await.map_err(|error| not_begun(error).into_error())?;
    // To wait for a connection may take long.
    if !run.in_force() {
        transaction.rollback().await;
        return Err(lost("the claim ran out before the transaction began").into_error());
    }
    match ready.call(message.lending(transaction.loan())).await {
        Ok(_) => commit(&run, transaction).await.map_err(Failure::into_error),
        Err(error) => {
            let error = error.into();
            transaction.rollback().await;
            Err(error)
        }
    }
}

async fn commit(run: &RunContext, transaction: Box<dyn super::InboxTransaction>) -> Result<(), Failure> {
    // From here on a renewal means nothing: the transaction holds the record, and once it is committed
    // a renewal would take what is done for a lost lease.
    let ending = run.ending();
    match transaction.commit().await {
        Ok(()) => {
            ending.for_good();
            Ok(())
        }
        Err(error) => Err(not_committed(error)),
    }
}

fn not_committed(error: CommitError) -> Failure {
    match error {
        CommitError::Lost => lost(error),
        CommitError::RolledBack(_) => Failure::new(FailureClass::Transient, Cause::Transient, error),
        // Nothing may be said to the broker: it may be done. Whoever claims the id next finds out.
        CommitError::Unknown(_) => Failure::planned(Cause::StoreDown, Plan::abandon(FAILED), error),
        CommitError::Misused(_) => Failure::permanent(error),
    }
}

/// Of a run that did not commit: another one may come at once.
const FAILED: Release = Release::Failed { not_before: Duration::ZERO };

fn lost(why: impl Into<BoxError>) -> Failure {
    Failure::planned(Cause::LeaseLost, Plan::abandon(FAILED), why)
}

/// The handler did not run.
fn not_begun(error: BoxError) -> Failure {
    Failure::planned(Cause::StoreDown, Plan::hand_back(defaults::BACKOFF_BASE), error)
}

fn unclaimed() -> Failure {
    Failure::permanent("an inbox needs a claim, and this message runs without dedup")
}
