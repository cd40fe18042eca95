//! Completing the claim and committing, and what to think of a commit without an answer.
//!
//! # Why the record tells the truth
//!
//! The transaction's last statement before `COMMIT` is the update of the claim's record. It was answered before `COMMIT` is
//! sent, so from then on, until the transaction has ended, its session holds the lock on that row. Hence:
//!
//! - Lost before the update was answered: `COMMIT` was never sent, so the transaction cannot commit.
//! - Lost after: whoever *gets the lock* of the row looks at it after the transaction has ended. If the record is
//!   `Done` by this run's token it was committed, since nothing but this transaction writes that; if it is still
//!   `Claimed` by the token it was not, and no late `COMMIT` can change that any more. A plain read would not do: the
//!   session may yet be committing.
//! - A session that never gets the `COMMIT` (the network broke before it) keeps the lock, idle in its transaction.
//!   It is ended by its process id and the start of its transaction, which no other transaction shares. It is not
//!   ended while it is busy: it may be waiting for a synchronous standby, and to cut that short would
//!   confirm what a failover can lose. If all fails, `idle_in_transaction_session_timeout` ends it.
//!
//! Only `ERROR` says that a commit failed. `FATAL` says that the session ended, perhaps just after it.

use std::time::Duration;

use sqlx::postgres::{PgConnection, PgDatabaseError, PgSeverity};
use sqlx::{AssertSqlSafe, Postgres, Row, Transaction};
use tokio::time::{Instant, sleep};

use super::super::{CommitError, InboxClaim};
use crate::dedup::PostgresStore;
use crate::dedup::store::postgres::{NOW, Sighting, key_of, micros};

/// For how long a commit without an answer is looked into.
const LOOK: Duration = Duration::from_secs(10);

/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// The statement that completes a claim in somebody else's transaction.
///
/// By the simple protocol: one round trip, and no prepared statement that a pooler could not find again. The
/// token is not in its text, which the pool may log: the transaction carries it. A transaction that is not the
/// one that was begun carries none, and finds no claim.
pub(super) struct Completion(String);

/// A transaction that has completed its claim and may be committing.
pub(super) struct Completed {
    session: i32,
    began: String,
}

/// The run's token, as the transaction carries it.
const RUN: &str = "nullif(current_setting('guestlist.run', true), '')";

/// Who holds the claim, as the transaction carries it.
pub(super) fn run_of(claim: &InboxClaim) -> String {
    format!("{:?}", claim.run.token)
}

impl Completion {
    pub(super) fn of(store: &PostgresStore, claim: &InboxClaim) -> Self {
        let (key, window) = (key_of(&claim.key), micros(claim.window));
        Self(store.fill(&format!(
            "update \"{{schema}}\".\"{{table}}\"
                set state = 3, until = 0, suspect = false, retain = {window},
                    kept_until = {NOW} + greatest({window}, 1)
              where key = '{key}' and token = {RUN}::uuid and state = 0 and version = 1 and kept_until > {NOW}
             returning pg_backend_pid(), transaction_timestamp()::text"
        )))
    }

    /// None: there is no such claim, or the transaction is not the one that was begun.
    pub(super) async fn run(self, connection: &mut PgConnection) -> Result<Option<Completed>, sqlx::Error> {
        let row = sqlx::raw_sql(AssertSqlSafe(self.0)).fetch_optional(connection).await?;
        row.map(|row| Ok(Completed { session: row.try_get(0)?, began: row.try_get(1)? })).transpose()
    }
}

pub(super) async fn commit(
    mut transaction: Transaction<'static, Postgres>,
    store: &PostgresStore,
    claim: &InboxClaim,
) -> Result<(), CommitError> {
    let completed = match Completion::of(store, claim).run(&mut transaction).await {
        Ok(Some(completed)) => completed,
        Ok(None) => return Err(not_completed(transaction).await),
        // `COMMIT` was not sent.
        Err(error) => return Err(CommitError::RolledBack(error.into())),
    };
    match transaction.commit().await {
        Ok(()) => Ok(()),
        Err(error) if says_not_committed(&error) => Err(CommitError::RolledBack(error.into())),
        Err(error) => look_it_up(error, &completed, store, claim).await,
    }
}

/// Whose fault it is that the claim could not be completed.
async fn not_completed(mut transaction: Transaction<'static, Postgres>) -> CommitError {
    let look = sqlx::raw_sql(AssertSqlSafe(format!("select {RUN} is not null")));
    let whole = look.fetch_one(&mut *transaction).await.and_then(|row| row.try_get::<bool, _>(0));
    // Failed or not, nothing of it is committed.
    let _ = transaction.rollback().await;
    match whole {
        Ok(true) => CommitError::Lost,
        Ok(false) => CommitError::Misused(
            "the handler committed or rolled back its transaction by itself: what it did is not tied to its message",
        ),
        Err(error) => CommitError::RolledBack(error.into()),
    }
}

/// The server refused, and goes on with the session: a deferred constraint, a serialization failure.
fn says_not_committed(error: &sqlx::Error) -> bool {
    let answer = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    answer.is_some_and(|answer| answer.severity() == PgSeverity::Error)
}

async fn look_it_up(
    error: sqlx::Error,
    completed: &Completed,
    store: &PostgresStore,
    claim: &InboxClaim,
) -> Result<(), CommitError> {
    tracing::warn!(target: "guestlist", %error, "a commit was not answered; looking it up");
    let give_up_at = Instant::now() + LOOK;
    while Instant::now() < give_up_at {
        match store.sight(&claim.key, claim.run.token).await {
            Ok(Sighting::Done) => return Ok(()),
            Ok(Sighting::Claimed) => return Err(CommitError::RolledBack(error.into())),
            Ok(Sighting::Elsewhere) => return Err(CommitError::Lost),
            Ok(Sighting::Locked) => {
                if let Err(error) = store.end_idle_session(completed.session, &completed.began).await {
                    tracing::warn!(target: "guestlist", %error, "a session in doubt could not be ended");
                }
            }
            Err(error) => tracing::warn!(target: "guestlist", %error, "a commit could not be looked up"),
        }
        sleep(PAUSE).await;
    }
    Err(CommitError::Unknown(error.into()))
}
