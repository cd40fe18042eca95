//! Where the database is, and how the store uses it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use sqlx::ConnectOptions;
use sqlx::postgres::PgConnectOptions;
use url::Url;

use super::connections::Connections;
use super::names::Names;
use super::{PostgresStore, error};
use crate::dedup::StoreError;

/// Statements at once: few, since each carries many steps when there are many.
const CONNECTIONS: usize = 4;

/// How often records past their time are looked for.
const SWEEP: Duration = Duration::from_secs(30);

/// What sqlx understands in a URL. It would log any other parameter, with its value.
const KNOWN: [&str; 18] = [
    "statement-cache-capacity",
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

/// Builds a [`PostgresStore`], and the tables that it needs.
///
/// ```no_run
/// use guestlist::dedup::PostgresStore;
/// # async fn example() -> Result<(), guestlist::dedup::StoreError> {
/// let builder = PostgresStore::builder("postgres://app@db.internal/shop")?.schema("shop").table("claims");
/// builder.migrate().await?; // once for each release: in a deployment's own step, or here
/// let store = builder.connect().await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct PostgresStoreBuilder {
    options: PgConnectOptions,
    names: Names,
    connections: usize,
    sweep: Option<Duration>,
}

impl PostgresStoreBuilder {
    pub(super) fn of_url(url: &str) -> Result<Self, StoreError> {
        let mut url = Url::parse(url).map_err(|error| not_a_url().with_source(error))?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(not_a_url());
        }
        let parameters: Vec<(String, String)> = url.query_pairs().into_owned().collect();
        url.set_query(None);
        let mut builder = Self::of_options(PgConnectOptions::new());
        for (name, value) in parameters {
            match name.as_str() {
                "schema" => builder = builder.schema(value),
                "table" => builder = builder.table(value),
                "connections" => builder = builder.connections(number(&value)?),
                known if KNOWN.contains(&known) || known.starts_with("options[") => {
                    url.query_pairs_mut().append_pair(known, &value);
                }
                _ => return Err(unknown_parameter(&name)),
            }
        }
        // The client's own error would quote the URL, with the password in it.
        let options = PgConnectOptions::from_str(url.as_str()).map_err(|_| not_a_url())?;
        Ok(Self { options, ..builder })
    }

    pub(super) fn of_options(options: PgConnectOptions) -> Self {
        Self { options, names: Names::default(), connections: CONNECTIONS, sweep: Some(SWEEP) }
    }

    /// The schema of the store's objects: `guestlist` by default. Lower-case letters, digits, underscores.
    #[must_use]
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.names.schema = schema.into();
        self
    }

    /// The table, after which the sequence and the function are named too: `claims` by default.
    #[must_use]
    pub fn table(mut self, table: impl Into<String>) -> Self {
        self.names.table = table.into();
        self
    }

    /// How many connections the store uses at most: 4 by default, at least 1. They are its own. While
    /// all are busy, calls share statements.
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections.max(1);
        self
    }

    /// How often this handle deletes records past their time: every 30 s by default, `None`: never.
    /// Then somebody has to call [`PostgresStore::sweep`], else the table grows.
    #[must_use]
    pub fn sweep_every(mut self, interval: impl Into<Option<Duration>>) -> Self {
        self.sweep = interval.into();
        self
    }

    /// The SQL that [`migrate`](Self::migrate) applies, for whoever applies migrations by other means.
    /// Each release's SQL may be applied again, and beside running consumers of earlier releases.
    ///
    /// # Errors
    ///
    /// The schema or the table has a name that is not allowed.
    pub fn migration(&self) -> Result<String, StoreError> {
        self.names.check()?;
        Ok(self.names.fill(include_str!("schema.sql")))
    }

    /// Makes the schema, table, index, sequence and function that the store needs, in one transaction, or
    /// brings them up to this release. Several processes may do so at once.
    ///
    /// # Errors
    ///
    /// The database could not be asked, or refused: the role needs CREATE on the database, or on the schema if it
    /// is there.
    ///
    /// # Cancel safety
    ///
    /// Dropped midway, all of it is there or nothing.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        // One simple query is one transaction, and the lock lasts as long.
        let lock = self
            .names
            .fill("select pg_advisory_xact_lock(hashtextextended('guestlist {schema}.{table}', 0));");
        let migration = format!("{lock}\n{}", self.migration()?);
        self.connections_of_its_own().lend().run(migration).await.map_err(error::of)?;
        Ok(())
    }

    /// Connects, and checks that everything is there.
    ///
    /// # Errors
    ///
    /// The server does not answer, refuses the login, is a standby, or lacks what [`migrate`](Self::migrate) makes.
    pub async fn connect(self) -> Result<PostgresStore, StoreError> {
        self.names.check()?;
        let connections = self.connections_of_its_own();
        let store = PostgresStore::of(connections, self.names, self.connections);
        store.check().await?;
        if let Some(interval) = self.sweep {
            store.sweep_in_background(interval);
        }
        Ok(store)
    }

    fn connections_of_its_own(&self) -> Connections {
        // `extra_float_digits` is refused by PgBouncer, and there are no floats. Logged statements would
        // show tokens.
        let options = self.options.clone().extra_float_digits(None).disable_statement_logging();
        Connections::new(options, self.connections)
    }
}

impl fmt::Debug for PostgresStoreBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStoreBuilder")
            .field("host", &self.options.get_host())
            .field("database", &self.options.get_database())
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

fn number(text: &str) -> Result<usize, StoreError> {
    text.parse().map_err(|_| StoreError::new("`connections` in the Postgres store's URL is not a number"))
}

fn not_a_url() -> StoreError {
    StoreError::new(
        "not a URL of a Postgres store: postgres://USER:PASSWORD@HOST:PORT/DATABASE?schema=…&table=…",
    )
}

fn unknown_parameter(name: &str) -> StoreError {
    StoreError::new(format!("the Postgres store's URL has an unknown parameter: `{}`", name.escape_debug()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_where_and_how() {
        let url = "postgres://app:secret@db:6432/shop?schema=s&table=t&connections=2&sslmode=require";
        let builder = PostgresStoreBuilder::of_url(url).unwrap();
        assert_eq!((builder.options.get_host(), builder.options.get_port()), ("db", 6432));
        assert_eq!(builder.options.get_database(), Some("shop"));
        assert_eq!(builder.names, Names { schema: "s".into(), table: "t".into() });
        assert_eq!(builder.connections, 2);
        assert!(!format!("{builder:?}").contains("secret"));
    }

    #[test]
    fn a_url_that_is_not_understood_is_refused_without_its_password() {
        for url in [
            "redis://app:secret@db/0",
            "postgres://app:secret@db/shop?sslmod=require",
            "postgres://app:secret@db/shop?sslmode=sometimes",
            "postgres://app:secret@db:notaport/shop",
            "postgres://app:secret@db/shop?connections=many",
        ] {
            let error = PostgresStoreBuilder::of_url(url).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
        }
    }
}
