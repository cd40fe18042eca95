//! A server of a test's own, that stops and starts.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, sleep};

use super::*;

pub(super) struct Server {
    port: u16,
    dir: PathBuf,
    child: Child,
}

impl Server {
    pub(super) async fn start() -> Self {
        let dir = std::env::temp_dir().join(format!("guestlist-postgres-{:x}", Token::random().bits()));
        std::fs::create_dir_all(&dir).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = spawn(port, &dir);
        let server = Self { port, dir, child };
        server.ready().await;
        server
    }

    pub(super) fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// As a crash, when it is sudden: nothing is written that was not.
    pub(super) async fn restart(&mut self, sudden: bool) {
        self.end(if sudden { "-QUIT" } else { "-INT" });
        self.child = spawn(self.port, &self.dir);
        self.ready().await;
    }

    fn end(&mut self, signal: &str) {
        let told = Command::new("kill").arg(signal).arg(self.child.id().to_string()).status().unwrap();
        assert!(told.success());
        self.child.wait().unwrap();
    }

    async fn ready(&self) {
        let give_up_at = Instant::now() + 60 * SECOND;
        while PgConnection::connect(&self.url()).await.is_err() {
            assert!(Instant::now() < give_up_at, "the server does not start");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end("-INT");
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn spawn(port: u16, dir: &std::path::Path) -> Child {
    let env =
        |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run ./scripts/test"));
    Command::new(format!("{}/stores", env("GUESTLIST_SCRIPTS")))
        .args(["run", "postgres", &env("GUESTLIST_STORES"), &port.to_string()])
        .arg(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}
