//! What an inbox needs to know of a record, when a commit was not answered.

use sqlx::Row;

use super::call::hex_of;
use super::{PostgresStore, error};
use crate::DedupKey;
use crate::dedup::StoreError;
use crate::dedup::protocol::Token;

/// A record, seen with its lock in hand: by a run that may have completed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sighting {
    /// The run has completed it.
    Done,
    /// The run holds it.
    Claimed,
    /// It is no more, or another's, or given up.
    Elsewhere,
    /// A transaction that has not ended holds it.
    Locked,
}

/// The lock, or nothing: a row that is there and cannot be locked is another transaction's.
const SIGHT: &str = "
with locked as materialized (
    select token, state, version from \"{schema}\".\"{table}\" where key = '{key}' for update skip locked
)
select exists (select 1 from locked),
       exists (select 1 from \"{schema}\".\"{table}\" where key = '{key}'),
       (select state from locked where token = '{token}' and version = 1)";

impl PostgresStore {
    /// Looks at a record when no transaction changes it.
    pub(crate) async fn sight(&self, key: &DedupKey, token: Token) -> Result<Sighting, StoreError> {
        let look = self.fill(SIGHT).replace("{key}", &hex_of(key)).replace("{token}", &format!("{token:?}"));
        let rows = self.ask(look).await?;
        let Some(row) = rows.first() else { return Ok(Sighting::Elsewhere) };
        let get =
            || Ok::<_, sqlx::Error>((row.try_get(0)?, row.try_get(1)?, row.try_get::<Option<i16>, _>(2)?));
        Ok(match get().map_err(error::of)? {
            (false, true, _) => Sighting::Locked,
            (_, _, Some(3)) => Sighting::Done,
            (_, _, Some(0)) => Sighting::Claimed,
            _ => Sighting::Elsewhere,
        })
    }

    /// Ends a session if it still is in this very transaction, and waits there for a statement that will not come.
    pub(crate) async fn end_idle_session(&self, session: i32, began: &str) -> Result<(), StoreError> {
        let end = format!(
            "select pg_terminate_backend(pid) from pg_stat_activity
              where pid = {session} and xact_start = '{began}' and state like 'idle in transaction%'"
        );
        self.ask(end).await.map(drop)
    }
}
