//! The store's own connections: claims never wait for the application's pool, nor it for them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{AssertSqlSafe, ConnectOptions, PgConnection};
use tokio::time::{Instant, timeout};

use super::error;

/// How long a connection may take to be made, and how long a statement to be answered: a server that
/// hangs must not keep a connection for ever. Longer than the layer waits for a call, whatever its lease.
const ANSWER: Duration = Duration::from_secs(10);

/// A connection older than this is made anew: after a failover the name may stand for another server.
const OLD: Duration = Duration::from_secs(30 * 60);

/// How often a statement is repeated when another transaction got in its way.
const REPEATS: u32 = 3;

/// Clones share the connections.
#[derive(Clone)]
pub(super) struct Connections(Arc<Inner>);

struct Inner {
    options: PgConnectOptions,
    most_idle: usize,
    idle: Mutex<Vec<Connection>>,
}

struct Connection {
    inner: PgConnection,
    made: Instant,
    /// It has answered before; if it does not now, the server may have closed it meanwhile.
    used: bool,
}

impl Connections {
    pub(super) fn new(options: PgConnectOptions, most_idle: usize) -> Self {
        Self(Arc::new(Inner { options, most_idle, idle: Mutex::default() }))
    }

    pub(super) fn options(&self) -> &PgConnectOptions {
        &self.0.options
    }

    pub(super) fn weak(&self) -> WeakConnections {
        WeakConnections(Arc::downgrade(&self.0))
    }

    /// Nothing is done before the first statement.
    pub(super) fn lend(&self) -> Lent {
        Lent { of: self.clone(), connection: None }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_idle(&self) -> Option<Connection> {
        let mut idle = self.idle();
        std::iter::from_fn(|| idle.pop()).find(|connection| connection.made.elapsed() < OLD)
    }

    fn give_back(&self, connection: Connection) {
        let mut idle = self.idle();
        if idle.len() < self.0.most_idle {
            idle.push(connection);
        }
    }

    async fn connect(&self) -> Result<Connection, sqlx::Error> {
        let inner = in_time(self.0.options.connect()).await?;
        Ok(Connection { inner, made: Instant::now(), used: false })
    }
}

/// For a task that ends when nobody uses the store any more.
pub(super) struct WeakConnections(Weak<Inner>);

impl WeakConnections {
    pub(super) fn upgrade(&self) -> Option<Connections> {
        self.0.upgrade().map(Connections)
    }
}

/// A connection while it is used.
///
/// # Cancel safety
///
/// A statement that is dropped before its answer takes the connection with it; the server ends the
/// statement by itself.
pub(super) struct Lent {
    of: Connections,
    connection: Option<Connection>,
}

impl Lent {
    /// Runs a statement. Every statement of the store may be repeated (a step by its token), so it is:
    /// on another connection if this one was closed while it was idle, and when a transaction of somebody
    /// else's got in its way.
    pub(super) async fn run(&mut self, statement: String) -> Result<Vec<PgRow>, sqlx::Error> {
        let statement: Arc<str> = statement.into();
        let mut repeats = 0;
        loop {
            let mut connection = match self.connection.take().or_else(|| self.of.take_idle()) {
                Some(connection) => connection,
                None => self.of.connect().await?,
            };
            let query = sqlx::raw_sql(AssertSqlSafe(Arc::clone(&statement)));
            match in_time(query.fetch_all(&mut connection.inner)).await {
                Err(error) if error::is_hung(&error) => return Err(error),
                Err(error) if error::is_gone(&error) && connection.used => {}
                Err(error) if error::is_gone(&error) => return Err(error),
                Err(error) if error::is_contention(&error) && repeats < REPEATS => {
                    repeats += 1;
                    self.connection = Some(connection);
                }
                answer => {
                    connection.used = true;
                    self.connection = Some(connection);
                    return answer;
                }
            }
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.of.give_back(connection);
        }
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    timeout(ANSWER, answer).await.unwrap_or_else(|_| Err(error::hung()))
}
