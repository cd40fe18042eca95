//! [`PostgresInbox`].

mod commit;
mod transaction;

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, PgPool};

use self::commit::Completion;
pub use self::transaction::PostgresTransaction;
use self::transaction::Slot;
use super::{CommitError, Inbox, InboxClaim, InboxTransaction};
use crate::dedup::protocol::{Ask, Claim, Release, Run, Token};
use crate::dedup::{DedupStore, PostgresStore, StoreError};
use crate::{BoxError, DedupKey};

/// A session that says nothing for this long within a transaction is ended by the server: a process that
/// stands still must not lock its rows for ever.
const IDLE: Duration = Duration::from_secs(60);

/// How long a rollback is waited for. One behind a long statement goes on without us.
const ROLLBACK: Duration = Duration::from_secs(1);

/// An inbox in a Postgres database: the claims of a [`PostgresStore`], completed by transactions of the application's
/// own pool. Cheap to clone. See the [module docs](super) for what it promises, and an example.
///
/// The pool belongs to `sqlx`, whose major version is part of this crate's public interface. It needs a
/// connection for each handler at once; the claims have connections of their own. Behind a pooler in transaction mode,
/// the inbox's own statements need nothing; a handler's own must not be kept prepared (`.persistent(false)`).
#[derive(Clone)]
pub struct PostgresInbox {
    store: PostgresStore,
    pool: PgPool,
    isolation: Option<Isolation>,
    idle: Duration,
}

/// How much a handler's transaction may see of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isolation {
    /// Each statement sees what was committed before it: the server's own default.
    ReadCommitted,
    /// All statements see one state. See [`PostgresInbox::isolation`] for a limit.
    RepeatableRead,
    /// As if transactions ran one after the other. See [`PostgresInbox::isolation`] for a limit.
    Serializable,
}

impl PostgresInbox {
    /// Completes the claims of `store` in transactions of `pool`, which must lead to the same database.
    ///
    /// # Errors
    ///
    /// One of the two does not answer, or they do not lead to the same claims, or the pool's role may not update them.
    pub async fn new(store: PostgresStore, pool: PgPool) -> Result<Self, StoreError> {
        let inbox = Self { store, pool, isolation: None, idle: IDLE };
        inbox.check().await?;
        Ok(inbox)
    }

    /// The isolation of the transactions: the server's default, unless it is set.
    ///
    /// Above read committed, a transaction cannot complete a claim that was renewed since the transaction's first
    /// statement: it fails with a conflict, and is tried again. So a handler there must be done within a third of
    /// the lease; give the queue a lease of three times the longest run.
    #[must_use]
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.isolation = Some(isolation);
        self
    }

    /// How long a session may say nothing within a transaction before the server ends it: a minute by default. A
    /// process that stands still, or whose network is gone, holds the rows of its transaction for as long. Longer
    /// than a handler waits for anything else; zero: for ever.
    #[must_use]
    pub fn idle_limit(mut self, limit: Duration) -> Self {
        self.idle = limit;
        self
    }

    /// Whether the pool sees a claim that the store makes, and may complete it.
    async fn check(&self) -> Result<(), StoreError> {
        let key = DedupKey::from_bytes(Token::random().bits().to_be_bytes());
        let ask = Ask::new(Token::random(), Duration::from_secs(10), Duration::from_secs(10));
        let Claim::Acquired { fence, .. } = self.store.claim(&key, &ask).await? else {
            return Err(StoreError::new("a new key of the Postgres store is not free"));
        };
        let run = Run { token: ask.token, fence };
        let seen = self.completes(InboxClaim { key, run, window: ask.retain }).await;
        self.store.release(&key, run, Release::NotStarted).await?;
        self.store.forget(&key).await?;
        match seen {
            Ok(true) => Ok(()),
            Ok(false) => Err(StoreError::new(
                "the inbox's pool does not see the claims of its store: both must lead to the same database",
            )),
            Err(error) => {
                Err(StoreError::new("the inbox's pool cannot complete a claim of its store")
                    .with_source(error))
            }
        }
    }

    /// A transaction that completes this claim, rolled back.
    async fn completes(&self, claim: InboxClaim) -> Result<bool, sqlx::Error> {
        let mut transaction = self.pool.begin_with(AssertSqlSafe(self.begin_statement(&claim))).await?;
        let completed = Completion::of(&self.store, &claim).run(&mut transaction).await?;
        transaction.rollback().await?;
        Ok(completed.is_some())
    }

    /// The run is written into the transaction, so that its end by another hand is noticed; all settings end with it.
    fn begin_statement(&self, claim: &InboxClaim) -> String {
        let isolation = match self.isolation {
            None => "",
            Some(Isolation::ReadCommitted) => " isolation level read committed",
            Some(Isolation::RepeatableRead) => " isolation level repeatable read",
            Some(Isolation::Serializable) => " isolation level serializable",
        };
        let (idle, run) = (self.idle.as_millis().min(i32::MAX.unsigned_abs().into()), commit::run_of(claim));
        format!(
            "begin{isolation}; set local idle_in_transaction_session_timeout = {idle}; set local guestlist.run = '{run}'"
        )
    }
}

#[async_trait]
impl Inbox for PostgresInbox {
    fn store(&self) -> Arc<dyn DedupStore> {
        Arc::new(self.store.clone())
    }

    async fn begin(&self, claim: InboxClaim) -> Result<Box<dyn InboxTransaction>, BoxError> {
        let (pool, statement) = (self.pool.clone(), AssertSqlSafe(self.begin_statement(&claim)));
        // In a task, since `sqlx` does not undo a `BEGIN` that nobody waits for any more: the pool would hand out a
        // connection in the middle of a transaction, and somebody else's writes would vanish with it.
        let begun = tokio::spawn(async move { pool.begin_with(statement).await });
        let transaction = begun.await??;
        let slot = Arc::new(Slot::new(transaction));
        Ok(Box::new(Open { slot, store: self.store.clone(), claim }))
    }
}

impl fmt::Debug for PostgresInbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresInbox")
            .field("store", &self.store)
            .field("isolation", &self.isolation)
            .finish_non_exhaustive()
    }
}

/// A transaction that is begun. Whatever drops it rolls it back, also one that a handler has still in hand: that
/// one at the latest when the handler lets go of it.
struct Open {
    slot: Arc<Slot>,
    store: PostgresStore,
    claim: InboxClaim,
}

#[async_trait]
impl InboxTransaction for Open {
    fn loan(&self) -> Arc<dyn Any + Send + Sync> {
        Arc::clone(&self.slot) as _
    }

    async fn commit(self: Box<Self>) -> Result<(), CommitError> {
        let Some(transaction) = self.slot.close() else {
            return Err(CommitError::Misused(
                "the handler returned while its transaction was still in use elsewhere: it must not leave the handler",
            ));
        };
        commit::commit(transaction, &self.store, &self.claim).await
    }

    async fn rollback(self: Box<Self>) {
        if let Some(transaction) = self.slot.close() {
            // A connection that is lost, or late, is the pool's to clean up; the server rolls back in any case.
            let _ = tokio::time::timeout(ROLLBACK, transaction.rollback()).await;
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        drop(self.slot.close());
    }
}
