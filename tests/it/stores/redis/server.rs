//! Servers of our own, and a stranger's hands on their data.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use guestlist::DedupKey;
use guestlist::dedup::RedisStore;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, FromRedisValue, RedisResult};
use tokio::time::{sleep, timeout};

/// What has not happened after this long will not happen.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run ./scripts/test"))
}

/// The shared server.
pub(super) fn url() -> String {
    env("GUESTLIST_REDIS_URL")
}

/// The shared server, with a prefix that no other test and no earlier run used.
pub(super) fn own_url() -> String {
    format!("{}?prefix={}:", url(), unique("test"))
}

/// A store on the shared server that no other test knows.
pub(super) async fn own_store() -> RedisStore {
    RedisStore::connect(&own_url()).await.unwrap()
}

pub(super) fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let salt: u64 = rand::random();
    format!("{name}-{salt:016x}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A key that only this number makes.
pub(super) fn key(number: u128) -> DedupKey {
    DedupKey::from_bytes(number.to_be_bytes())
}

/// Waits for a condition that nothing announces.
pub(super) async fn until<F: Future<Output = bool>>(what: &str, holds: impl FnMut() -> F) {
    until_within(PATIENCE, what, holds).await;
}

/// As [`until`], for what takes its time.
pub(super) async fn until_within<F: Future<Output = bool>>(
    patience: Duration,
    what: &str,
    mut holds: impl FnMut() -> F,
) {
    let wait = async {
        while !holds().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(patience, wait).await.unwrap_or_else(|_| panic!("it did not become true that {what}"));
}

/// A connection without the client's own limits, which a busy machine breaks: 1 s to connect, 500 ms for an answer.
pub(super) async fn connect(url: &str) -> RedisResult<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(PATIENCE))
        .set_response_timeout(Some(PATIENCE));
    redis::Client::open(url)?.get_multiplexed_async_connection_with_config(&config).await
}

/// The plain client.
pub(super) struct Plain(MultiplexedConnection);

impl Plain {
    pub(super) async fn connect(url: &str) -> RedisResult<Self> {
        Ok(Self(connect(url).await?))
    }

    pub(super) async fn shared() -> Self {
        Self::connect(&url()).await.unwrap()
    }

    pub(super) async fn try_ask<T: FromRedisValue>(&self, command: &Cmd) -> RedisResult<T> {
        command.query_async(&mut self.0.clone()).await
    }

    /// Asks by words.
    pub(super) async fn ask<T: FromRedisValue>(&self, words: &str) -> T {
        self.try_ask(&command(words)).await.unwrap_or_else(|error| panic!("{words}: {error}"))
    }

    pub(super) async fn set(&self, key: &str, value: &[u8]) {
        let () = self.try_ask(redis::cmd("SET").arg(key).arg(value)).await.unwrap();
    }

    pub(super) async fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.try_ask(redis::cmd("GET").arg(key)).await.unwrap()
    }

    /// The server's clock, in microseconds.
    pub(super) async fn time(&self) -> u64 {
        let (seconds, micros): (u64, u64) = self.ask("TIME").await;
        seconds * 1_000_000 + micros
    }
}

pub(super) fn command(words: &str) -> Cmd {
    let mut words = words.split(' ');
    let mut command = redis::cmd(words.next().unwrap());
    command.arg(words.collect::<Vec<_>>());
    command
}

/// A private server, ended when it is dropped.
pub(super) struct Server {
    pub(super) port: u16,
    kind: &'static str,
    dir: PathBuf,
    config: PathBuf,
    process: Child,
}

impl Server {
    /// Starts one with these lines in its configuration, and waits until it answers.
    pub(super) async fn start(config: &str) -> Self {
        Self::start_as("redis", config).await
    }

    /// Starts a Sentinel.
    pub(super) async fn start_sentinel(config: &str) -> Self {
        Self::start_as("sentinel", config).await
    }

    /// Starts one that speaks TLS too, on the port that is returned, with the certificates of the brokers.
    pub(super) async fn start_with_tls(config: &str) -> (Self, u16) {
        let port = free_port();
        let files = "tls-cert-file server.pem\ntls-key-file server.key\ntls-ca-cert-file ca.pem";
        (Self::start(&format!("tls-port {port}\n{files}\n{config}")).await, port)
    }

    async fn start_as(kind: &'static str, config: &str) -> Self {
        let dir = std::env::temp_dir().join(unique("guestlist-redis"));
        std::fs::create_dir_all(dir.join("redis")).unwrap();
        if config.contains("tls-port") {
            // Where it looks for them, also from within a root folder of its own.
            for name in ["server.pem", "server.key", "ca.pem"] {
                std::fs::write(dir.join("redis").join(name), certificate(name)).unwrap();
            }
        }
        let file = dir.join("more.conf");
        std::fs::write(&file, config).unwrap();
        let port = free_port();
        let process = run(kind, port, &dir, &file);
        let server = Self { port, kind, dir, config: file, process };
        server.answers().await;
        server
    }

    pub(super) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(super) async fn plain(&self) -> Plain {
        Plain::connect(&self.url()).await.unwrap()
    }

    pub(super) async fn store(&self) -> RedisStore {
        RedisStore::connect(&self.url()).await.unwrap()
    }

    /// Waits until it answers, with whatever.
    pub(super) async fn answers(&self) {
        until("the private server answers", || async {
            match Plain::connect(&self.url()).await {
                Ok(plain) => match plain.try_ask::<String>(&command("PING")).await {
                    Ok(_) => true,
                    Err(error) => error.code() == Some("NOAUTH"),
                },
                Err(_) => false,
            }
        })
        .await;
    }

    pub(super) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.process.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "{name} is sent");
    }

    /// Ends it in good order.
    pub(super) fn stop(&mut self) {
        self.signal("TERM");
        self.process.wait().unwrap();
    }

    pub(super) fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Starts it again on its data; it may still be loading when this returns.
    pub(super) fn start_again(&mut self) {
        self.process = run(self.kind, self.port, &self.dir, &self.config);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn run(kind: &str, port: u16, dir: &Path, config: &Path) -> Child {
    let mut command = Command::new(PathBuf::from(env("GUESTLIST_SCRIPTS")).join("stores"));
    command.args(["run", kind, &env("GUESTLIST_STORES"), &port.to_string()]).arg(dir).arg(config);
    let out = std::fs::File::create(dir.join("out")).unwrap();
    command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out);
    command.spawn().unwrap()
}

/// A certificate or key of those that the brokers have.
pub(super) fn certificate(name: &str) -> Vec<u8> {
    std::fs::read(PathBuf::from(env("GUESTLIST_TLS_DIR")).join(name)).unwrap()
}

/// Low enough that a cluster's bus (10000 above) is a port too.
pub(super) fn free_port() -> u16 {
    let script = PathBuf::from(env("GUESTLIST_SCRIPTS")).join("brokers");
    let ports = Command::new(script).args(["port", "8"]).output().unwrap();
    let ports = String::from_utf8(ports.stdout).unwrap();
    let low = ports.lines().map(|port| port.parse().unwrap()).find(|port| *port < 22_000);
    low.unwrap_or_else(free_port)
}
