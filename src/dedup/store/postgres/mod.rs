//! A store in a Postgres database.

mod builder;
mod call;
mod connections;
mod error;
mod names;
mod sight;
mod steps;
mod sweep;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::Row;

pub use self::builder::PostgresStoreBuilder;
use self::call::Call;
pub(crate) use self::call::{NOW, hex_of as key_of, micros};
use self::connections::Connections;
use self::names::Names;
pub(crate) use self::sight::Sighting;
use self::steps::Steps;
use super::{DedupStore, StoreError, StoreFeatures};
use crate::DedupKey;
use crate::dedup::protocol::{Ask, Claim, Held, Record, Release, Run};

/// For how long a claim asks again for a record that another transaction holds: an inbox's takes moments, unless
/// something is wrong with it.
const CLAIM: Duration = Duration::from_millis(250);

/// The same for whoever holds the claim. The layer's own deadline is sooner, as a rule.
const HELD: Duration = Duration::from_secs(10);

/// A store in a Postgres database, 12 or later. Cheap to clone; clones share connections.
///
/// Each call is one statement: a call of a function that the migration installs, which takes one step of the
/// protocol on one row. The clock is the server's, the fence comes from a sequence.
///
/// # What it promises, and what not
///
/// 1. What is confirmed is as durable as a commit on that server: see `synchronous_commit`, and what a
///    failover to an asynchronous standby can lose, in [the store's page](crate::_docs::postgres).
///    A lost record lets a copy run again; it suppresses nothing.
/// 2. Records past their time are deleted by a task in the background, in small batches.
/// 3. While all of its connections are busy, calls share statements, so that a burst costs few commits.
/// 4. It works behind a pooler in transaction mode without a setting: it keeps no state in a session and
///    prepares no statement.
/// 5. It does not make a handler's own effects happen once. The [inbox](crate::inbox) does, for effects in this database.
///
/// ```no_run
/// use guestlist::dedup::PostgresStore;
/// use guestlist::prelude::*;
/// # async fn handler(_: Message) -> Result<(), Failure> { Ok(()) }
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let store = PostgresStore::connect("postgres://app@db.internal/shop").await?;
/// let consumer = Consumer::connect("amqp://localhost").await?.store(store);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct PostgresStore {
    connections: Connections,
    names: Names,
    steps: Steps,
}

impl PostgresStore {
    /// Connects to the store at this URL, with the other settings as they are by default.
    ///
    /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE`, also `postgresql://`. What is left out is taken from the
    /// environment (`PGHOST`, `PGUSER`, …) and `~/.pgpass`. Parameters: `schema`, `table` and `connections` as in
    /// [`PostgresStoreBuilder`]; `sslmode`, `sslrootcert`, `sslcert`, `sslkey`, `host` (a folder: its socket),
    /// `application_name`, `options` as in libpq. Any other is an error.
    ///
    /// # Errors
    ///
    /// The URL is not understood, or as for [`PostgresStoreBuilder::connect`].
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        Self::builder(url)?.connect().await
    }

    /// Starts a store at this URL, of the form that [`connect`](Self::connect) takes.
    ///
    /// # Errors
    ///
    /// The URL is not understood.
    pub fn builder(url: &str) -> Result<PostgresStoreBuilder, StoreError> {
        PostgresStoreBuilder::of_url(url)
    }

    /// Starts a store by the options of `sqlx`, which stands in this crate's public interface here and in the
    /// [inbox](crate::inbox): its major version is part of ours.
    pub fn builder_of(options: sqlx::postgres::PgConnectOptions) -> PostgresStoreBuilder {
        PostgresStoreBuilder::of_options(options)
    }

    fn of(connections: Connections, names: Names, most: usize) -> Self {
        let steps = Steps::new(connections.clone(), names.clone(), most);
        Self { connections, names, steps }
    }

    /// Whether all is there, and writable.
    async fn check(&self) -> Result<(), StoreError> {
        let look = self.names.fill(
            "select to_regclass('\"{schema}\".\"{table}\"') is not null
                and to_regclass('\"{schema}\".\"{table}_fence\"') is not null
                and to_regproc('\"{schema}\".\"{table}_step_v2\"') is not null, pg_is_in_recovery()",
        );
        let rows = self.ask(look).await?;
        let [row] = rows.as_slice() else {
            return Err(StoreError::new("the Postgres server answered nothing"));
        };
        let (there, standby): (bool, bool) =
            (row.try_get(0).map_err(error::of)?, row.try_get(1).map_err(error::of)?);
        let Names { schema, table } = &self.names;
        if standby {
            return Err(StoreError::new("the Postgres server is a standby: the store needs the primary"));
        }
        if !there {
            return Err(StoreError::new(format!(
                "the Postgres database has no claims of this format in `{schema}.{table}`: run `PostgresStore::builder(url)?.migrate()`, or apply the SQL of `migration()`"
            )));
        }
        Ok(())
    }

    /// A text in which `{schema}` and `{table}` stand for the names.
    pub(crate) fn fill(&self, text: &str) -> String {
        self.names.fill(text)
    }

    async fn ask(&self, statement: String) -> Result<Vec<sqlx::postgres::PgRow>, StoreError> {
        self.connections.lend().run(statement).await.map_err(error::of)
    }

    async fn held(&self, call: Call) -> Result<Held, StoreError> {
        self.steps.step(call, HELD).await?.held()
    }
}

#[async_trait]
impl DedupStore for PostgresStore {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        self.steps.step(Call::claim(key, ask), CLAIM).await?.claim()
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.held(Call::renew(key, run, lease)).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.held(Call::complete(key, run, window)).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        self.held(Call::release(key, run, why)).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        let (columns, now, key) = (call::RECORD, call::NOW, call::hex_of(key));
        let look = format!("select {columns}, {now} from \"{{schema}}\".\"{{table}}\" where key = '{key}'");
        let rows = self.ask(self.names.fill(&look)).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let (record, now) = call::record_of(row)?;
        Ok((now < record.kept_until).then_some(record))
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        let (now, key) = (call::NOW, call::hex_of(key));
        let delete = format!(
            "delete from \"{{schema}}\".\"{{table}}\" where key = '{key}' returning {now} < kept_until"
        );
        let rows = self.ask(self.names.fill(&delete)).await?;
        rows.first().map_or(Ok(false), |row| row.try_get(0).map_err(error::of))
    }

    fn features(&self) -> StoreFeatures {
        StoreFeatures::SHARED
    }
}

impl fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = self.connections.options();
        f.debug_struct("PostgresStore")
            .field("host", &options.get_host())
            .field("database", &options.get_database())
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}
