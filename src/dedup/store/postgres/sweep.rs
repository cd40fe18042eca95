//! Deletes what is past its time.

use std::time::Duration;

use sqlx::Row;
use tokio::time::sleep;

use super::connections::Connections;
use super::names::Names;
use super::{PostgresStore, error};
use crate::dedup::StoreError;

/// The most records in one statement: a few milliseconds' work, so that no claim waits long behind it.
const BATCH: u64 = 500;

/// Locked rows are somebody's at this moment: another sweeper's, or a claim's that takes them over.
///
/// `statement_timestamp()`, which is not later than the clock, since an index cannot be searched by
/// a function whose value changes under way. A record of another format is not ours to judge.
const SWEEP: &str = "
with past as materialized (
    select key from \"{schema}\".\"{table}\"
     where sweep_after < (extract(epoch from statement_timestamp()) * 1000000)::bigint >> 26 and version = 1
     order by sweep_after limit {batch} for update skip locked
), gone as (
    delete from \"{schema}\".\"{table}\" t using past where t.key = past.key returning 1
)
select count(*) from gone";

impl PostgresStore {
    /// Deletes the records that are past their time, in batches of 500, each a transaction of its own; says how many.
    /// A record may stay for a minute after its time. Nothing but space depends on it: what is past its time is no
    /// record to a claim.
    ///
    /// # Errors
    ///
    /// The database could not be asked; what was deleted so far stays deleted.
    ///
    /// # Cancel safety
    ///
    /// Dropped midway, it has deleted some and not others.
    pub async fn sweep(&self) -> Result<u64, StoreError> {
        sweep(&self.connections, &self.names).await
    }

    /// Until the last clone is gone.
    pub(super) fn sweep_in_background(&self, interval: Duration) {
        let (connections, names) = (self.connections.weak(), self.names.clone());
        tokio::spawn(async move {
            loop {
                // The processes of a deployment start together; their sweeps need not.
                sleep(interval.mul_f64(0.5 + crate::random::unit())).await;
                let Some(connections) = connections.upgrade() else { return };
                if let Err(error) = sweep(&connections, &names).await {
                    tracing::warn!(target: "guestlist", %error, "the Postgres store could not be swept");
                }
            }
        });
    }
}

async fn sweep(connections: &Connections, names: &Names) -> Result<u64, StoreError> {
    let statement = names.fill(SWEEP).replace("{batch}", &BATCH.to_string());
    let mut connection = connections.lend();
    let mut total = 0;
    loop {
        let rows = connection.run(statement.clone()).await.map_err(error::of)?;
        let count: i64 = rows.first().map_or(Ok(0), |row| row.try_get(0)).map_err(error::of)?;
        let count = u64::try_from(count).unwrap_or(0);
        total += count;
        if count < BATCH {
            return Ok(total);
        }
    }
}
