//! The transactional inbox: a handler's writes, and the memory that its message is done, in one transaction.
//!
//! Without it there is one gap: a crash after the handler's writes and before the id is remembered runs the
//! handler again. With it, both become true in one commit, or neither does.
//!
//! # What it promises
//!
//! *Effectively once*, for the effects that a handler has **through its transaction**, in **that database**:
//!
//! 1. Of all the runs of an id within the window, over all consumers, crashes, copies and unknown answers, at most
//!    one commits; a message that is acked as handled has committed.
//! 2. A handler that fails, panics, times out or is cancelled leaves nothing behind: its transaction is rolled
//!    back. Each in-process try has a transaction of its own.
//! 3. A holder whose claim was taken by another cannot commit, however late it wakes up.
//! 4. An unknown answer to a commit is looked up, never guessed.
//!
//! It does not promise exactly-once *delivery*: the handler may be called many times. Nor anything for effects
//! elsewhere: a mail that the handler sends is sent by each run; write it to a table in the transaction
//! and send it from there. A database that loses commits in a failover loses the effect and the memory of it together, and
//! the broker may have been told by then: see `docs/stores/postgres.md`.
//!
//! # How
//!
//! The claim is made and committed before, as without an inbox: attempts survive a crash, copies see that the id is
//! in progress, and nobody waits for a row. Inside dedup and retry, the layer begins a transaction for each
//! try, and lends it to the handler. When that returns `Ok`, the last statement of the transaction completes the
//! claim *if it is still this run's*, by its token; then it commits. No such claim: it rolls back, and the delivery is
//! abandoned. Dedup's own `complete` then finds the id done by its own run, and the delivery is acked.
//!
//! # Example
//!
//! ```no_run
//! # #[cfg(feature = "postgres")] mod example {
//! use guestlist::dedup::PostgresStore;
//! use guestlist::inbox::{PostgresInbox, PostgresTransaction};
//! use guestlist::prelude::*;
//! use sqlx::PgPool;
//!
//! #[derive(serde::Deserialize)]
//! struct Charge { account: String, cents: i64 }
//!
//! async fn charge(Json(c): Json<Charge>, mut tx: PostgresTransaction) -> Result<(), Failure> {
//!     sqlx::query("UPDATE accounts SET cents = cents - $1 WHERE name = $2")
//!         .bind(c.cents)
//!         .bind(c.account)
//!         .execute(&mut *tx)
//!         .await?;
//!     Ok(()) // commits
//! }
//!
//! # pub async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let url = "postgres://app@db.internal/shop";
//! let inbox = PostgresInbox::new(PostgresStore::connect(url).await?, PgPool::connect(url).await?).await?;
//! Consumer::connect("amqp://localhost").await?
//!     .queue(Queue::new("charges").dead_letter("charges.dead").inbox(inbox).handler(charge))
//!     .run_until(guestlist::signal())
//!     .await?;
//! # Ok(()) }
//! # }
//! ```

mod layer;
#[cfg(feature = "postgres")]
mod postgres;
mod service;

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use self::layer::InboxLayer;
#[cfg(feature = "postgres")]
pub use self::postgres::{Isolation, PostgresInbox, PostgresTransaction};
pub use self::service::InboxService;
use crate::dedup::DedupStore;
use crate::dedup::protocol::Run;
use crate::{BoxError, DedupKey, Message};

/// A database in which a claim can be completed by a transaction of the handler's.
///
/// # Contract
///
/// 1. [`store`](Self::store) keeps the claims in that very database.
/// 2. [`InboxTransaction::commit`] is one transaction with what the handler did: either all of it and the record is
///    `Done`, or nothing and the record is as it was.
/// 3. It commits only if at that instant the record is `Claimed` by the claim's token; the check and the change are one
///    statement, whose lock on the record lasts as long as the transaction.
#[async_trait]
pub trait Inbox: fmt::Debug + Send + Sync + 'static {
    /// The store of the claims.
    fn store(&self) -> Arc<dyn DedupStore>;

    /// Begins the transaction of one try.
    ///
    /// # Errors
    ///
    /// The database did not answer, or has no connection left. The handler does not run; the delivery comes again,
    /// and no attempt is spent.
    async fn begin(&self, claim: InboxClaim) -> Result<Box<dyn InboxTransaction>, BoxError>;
}

/// The claim that a transaction completes.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct InboxClaim {
    /// The key.
    pub key: DedupKey,
    /// Who holds it.
    pub run: Run,
    /// How long it is remembered as done.
    pub window: Duration,
}

/// What an [`InboxTransaction`] lends to the handler of this message: for the argument type of an inbox of your own.
pub fn loan<T: Any + Send + Sync>(message: &Message) -> Option<Arc<T>> {
    Arc::clone(message.run()?.loan()?).downcast().ok()
}

/// A transaction of one try. Dropped, it is rolled back.
#[async_trait]
pub trait InboxTransaction: Send {
    /// What the handler's argument is made of: it takes the transaction out, and puts it back when it is dropped.
    fn loan(&self) -> Arc<dyn Any + Send + Sync>;

    /// Completes the claim and commits.
    ///
    /// # Errors
    ///
    /// [`CommitError`] says what is known of the effects.
    ///
    /// # Cancel safety
    ///
    /// Dropped midway, the transaction is committed as a whole or not at all, and the record tells which.
    async fn commit(self: Box<Self>) -> Result<(), CommitError>;

    /// Undoes it all; ends when that is done, or when it will be done without further help.
    async fn rollback(self: Box<Self>);
}

/// Why a transaction did not, or may not have, become true.
#[derive(Debug)]
#[non_exhaustive]
pub enum CommitError {
    /// The claim is another's by now. Rolled back.
    Lost,
    /// Rolled back for a reason that may pass: a conflict with another transaction, a lost connection.
    RolledBack(BoxError),
    /// Nobody could say in time whether it was committed. The record will tell the next claim.
    Unknown(BoxError),
    /// The handler did with its transaction what it must not: it keeps it elsewhere, or ended it by itself. What it
    /// did may or may not be committed.
    Misused(&'static str),
}

impl fmt::Display for CommitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost => f.write_str("the claim is another's by now; the transaction was rolled back"),
            Self::RolledBack(_) => f.write_str("the transaction was rolled back"),
            Self::Unknown(_) => f.write_str("it is not known whether the transaction was committed"),
            Self::Misused(how) => f.write_str(how),
        }
    }
}

impl std::error::Error for CommitError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::RolledBack(error) | Self::Unknown(error) => Some(&**error),
            Self::Lost | Self::Misused(_) => None,
        }
    }
}
