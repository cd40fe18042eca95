//! A store's server of a test's own, that stops and starts.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use guestlist::dedup::{PostgresStore, RedisStore};
use redis::AsyncConnectionConfig;
use sqlx::{Connection, PgConnection};

use super::{Folder, env, until};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Redis,
    Postgres,
}

pub(super) struct Server {
    kind: Kind,
    port: String,
    folder: Folder,
    process: Child,
}

impl Server {
    /// Ready for a store.
    pub(super) async fn start(kind: Kind) -> Self {
        let (port, folder) = (free_port(), Folder::new());
        let process = spawn(kind, &port, &folder.0);
        let server = Self { kind, port, folder, process };
        until("the private server answers", || server.answers()).await;
        if kind == Kind::Postgres {
            PostgresStore::builder(&server.url()).unwrap().migrate().await.unwrap();
        }
        server
    }

    pub(super) fn url(&self) -> String {
        match self.kind {
            Kind::Redis => format!("redis://127.0.0.1:{}", self.port),
            Kind::Postgres => format!("postgres://postgres@127.0.0.1:{}/postgres", self.port),
        }
    }

    async fn answers(&self) -> bool {
        match self.kind {
            Kind::Redis => RedisStore::connect(&self.url()).await.is_ok(),
            Kind::Postgres => PgConnection::connect(&self.url()).await.is_ok(),
        }
    }

    /// SIGKILL: nothing is written that was not. PostgreSQL's backends outlive their server by a moment in which they may
    /// answer one more question.
    pub(super) async fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        if self.kind == Kind::Postgres {
            until("the killed server's backends are gone", || std::future::ready(!self.has_backends())).await;
        }
    }

    /// Whether somebody is attached to the shared memory that its pid file names, which is how `scripts/stores` knows too.
    fn has_backends(&self) -> bool {
        let pid_file = std::fs::read_to_string(self.folder.0.join("postgres/data/postmaster.pid")).unwrap();
        let id = pid_file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)).unwrap();
        let segments = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
        segments.lines().any(|segment| {
            let columns: Vec<&str> = segment.split_whitespace().collect();
            columns[1] == id && columns[6] != "0"
        })
    }

    /// Waits until it answers somebody.
    pub(super) async fn start_again(&mut self) {
        self.process = spawn(self.kind, &self.port, &self.folder.0);
        until("the private server answers again", || self.answers()).await;
    }

    /// FLUSHALL, or TRUNCATE.
    pub(super) async fn lose_everything(&self) {
        match self.kind {
            Kind::Redis => {
                // The client's own limits are 1 s to connect and 500 ms for an answer: a busy machine breaks them.
                let patience = Some(Duration::from_secs(20));
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(patience)
                    .set_response_timeout(patience);
                let client = redis::Client::open(self.url()).unwrap();
                let connection = client.get_multiplexed_async_connection_with_config(&config).await;
                let mut connection = connection.unwrap();
                redis::cmd("FLUSHALL").exec_async(&mut connection).await.unwrap();
            }
            Kind::Postgres => {
                let mut connection = PgConnection::connect(&self.url()).await.unwrap();
                sqlx::raw_sql("truncate guestlist.claims").execute(&mut connection).await.unwrap();
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn free_port() -> String {
    let scripts = env("GUESTLIST_SCRIPTS");
    let port = Command::new(format!("{scripts}/brokers")).arg("port").output().unwrap();
    String::from_utf8(port.stdout).unwrap().trim().to_owned()
}

fn spawn(kind: Kind, port: &str, folder: &Path) -> Child {
    let kind = if kind == Kind::Redis { "redis" } else { "postgres" };
    Command::new(format!("{}/stores", env("GUESTLIST_SCRIPTS")))
        .args(["run", kind, &env("GUESTLIST_STORES"), port])
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}
