//! A store in Redis or Valkey.

mod link;
mod probe;
mod record;
mod steps;
mod target;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use redis::{ErrorKind, RedisError, ServerErrorKind, Value};

use self::link::{Link, says_read_only};
use self::record::Unintelligible;
use self::steps::{Step, Steps};
use self::target::{Address, Extras};
use super::{DedupStore, StoreError, StoreFeatures};
use crate::dedup::protocol::{Ask, Claim, Held, Record, Release, Run};
use crate::{DedupKey, defaults};

/// A store in Redis (5 or newer) or Valkey, shared by all processes that connect to it. Cheap to clone; clones
/// share a connection.
///
/// # What it promises, and what not
///
/// 1. Each call is one step of a Lua script on one key, by the server's clock: one round trip, atomic, also in a
///    cluster. Calls that come together share runs of the script.
/// 2. What is lost lets ids run again and never suppresses one. Replication is asynchronous, so a failover may
///    lose the last claims and completions; so may a crash without `appendfsync always`; a server without
///    persistence forgets everything.
/// 3. Redis must not evict: give it `maxmemory-policy noeviction`. Another policy is warned about when connecting.
/// 4. It connects again by itself, and asks Sentinel for the master of now.
///
/// The [page on Redis](crate::_docs::redis) has the settings, the permissions and what a failover can do.
///
/// ```no_run
/// # async fn example() -> Result<(), guestlist::dedup::StoreError> {
/// use guestlist::dedup::{DedupLayer, RedisStore};
/// let store = RedisStore::connect("redis://localhost").await?;
/// let layer = DedupLayer::new(store, "orders");
/// # drop(layer); Ok(()) }
/// ```
#[derive(Clone)]
pub struct RedisStore {
    link: Link,
    steps: Steps,
}

/// Settings of a [`RedisStore`] that a URL cannot hold.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use guestlist::dedup::RedisStore;
/// let store = RedisStore::builder("rediss+sentinel://app:secret@one,two,three/payments")
///     .prefix("payments:")
///     .sentinel_password("another secret")
///     .root_certificates(std::fs::read("ca.pem")?)
///     .connect()
///     .await?;
/// # drop(store); Ok(()) }
/// ```
#[must_use = "it does nothing until `connect`"]
pub struct RedisStoreBuilder {
    url: String,
    prefix: Option<String>,
    extras: Extras,
}

impl RedisStore {
    /// Connects; the server must answer. The URL is one of
    ///
    /// - `redis://user:password@host:6379/0`: one server,
    /// - `redis+sentinel://user:password@host1:26379,host2:26379/SERVICE/0`: the master of that name; user,
    ///   password and database are Redis's, not Sentinel's,
    /// - `redis+cluster://user:password@host1:6379,host2:6379`: a cluster; some of its nodes are enough,
    ///
    /// with `rediss` for TLS and `valkey` as another word for `redis`. User, password, port and database may be
    /// left out. `?prefix=payments:` sets the [prefix](RedisStoreBuilder::prefix).
    ///
    /// # Errors
    ///
    /// The URL is not like that, or the server cannot be reached (tried once, for at most 3 s), refuses the login
    /// or may not run scripts. The text has neither user nor password.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        Self::builder(url).connect().await
    }

    /// Settings that a URL cannot hold.
    pub fn builder(url: impl Into<String>) -> RedisStoreBuilder {
        RedisStoreBuilder { url: url.into(), prefix: None, extras: Extras::default() }
    }

    /// The Redis key of a dedup key: the prefix and 32 hexadecimal digits.
    pub fn redis_key(&self, key: &DedupKey) -> String {
        format!("{}{key}", self.link.prefix())
    }

    async fn step(&self, what: &'static str, key: &DedupKey, argument: Vec<u8>) -> Result<Value, StoreError> {
        let unanswered = self.link.unanswered();
        let answer = self.steps.step(Step { key: self.redis_key(key), argument }).await?;
        unanswered.answered();
        answer.map_err(|error| failed(what, error))
    }

    async fn held(&self, what: &'static str, key: &DedupKey, argument: Vec<u8>) -> Result<Held, StoreError> {
        match self.step(what, key, argument).await? {
            Value::Int(code) => record::held(code).map_err(|Unintelligible| unintelligible(what)),
            other => Err(not_ours(what, &other)),
        }
    }

    /// Warns if Redis may evict. Asked by INFO, which managed servers allow where they forbid CONFIG.
    async fn check_eviction(&self) {
        let info = self.link.ask(redis::cmd("INFO").arg("memory")).await;
        let policy = info.ok().and_then(|info| redis::from_redis_value::<String>(info).ok());
        let policy = policy.as_deref().and_then(|info| field(info, "maxmemory_policy:"));
        let redis = self.link.target();
        match policy {
            Some("noeviction") => {}
            Some(policy) => tracing::warn!(
                target: "guestlist", %redis, policy,
                "Redis may evict records when its memory is full, and their ids would run again: set maxmemory-policy to noeviction"
            ),
            None => tracing::info!(
                target: "guestlist", %redis,
                "the maxmemory-policy of Redis could not be checked (INFO was refused or does not say): it must be noeviction"
            ),
        }
    }
}

impl RedisStoreBuilder {
    /// What the keys begin with: [`guestlist:`](defaults::REDIS_PREFIX) by default. A part in `{}` puts all keys of a cluster on one node.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// The password of the Sentinels, if they ask for one.
    pub fn sentinel_password(mut self, password: impl Into<String>) -> Self {
        self.extras.sentinel_login = Some((None, password.into()));
        self
    }

    /// The user and password of the Sentinels, if they ask for both.
    pub fn sentinel_login(mut self, user: impl Into<String>, password: impl Into<String>) -> Self {
        self.extras.sentinel_login = Some((Some(user.into()), password.into()));
        self
    }

    /// The certificates (PEM) that vouch for the server, instead of the system's.
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.extras.root_certificates = Some(pem.into());
        self
    }

    /// This client's certificate and key (PEM), if the server asks for one.
    pub fn client_certificate(mut self, certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.extras.client_certificate = Some((certificate.into(), key.into()));
        self
    }

    /// Connects; the server must answer.
    ///
    /// # Errors
    ///
    /// As for [`RedisStore::connect`].
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn connect(self) -> Result<RedisStore, StoreError> {
        let address = Address::parse(&self.url)?;
        let prefix = self.prefix.or_else(|| address.prefix.clone());
        let target = address.target(&self.extras)?;
        let name = target.to_string();
        let prefix = prefix.unwrap_or_else(|| defaults::REDIS_PREFIX.to_owned()).into();
        let link = Link::open(target, prefix).await.map_err(|error| {
            StoreError::new(format!("no connection to {name}: {}", advice(&error))).with_source(error)
        })?;
        let store = RedisStore { steps: Steps::over(link.clone()), link };
        // A wrong database, a forbidden script or a foreign prefix shows here, not with the first message.
        store.inspect(&DedupKey::from_bytes([0; 16])).await?;
        store.check_eviction().await;
        Ok(store)
    }
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

fn failed(what: &str, error: RedisError) -> StoreError {
    StoreError::new(format!("Redis did not {what}: {}", advice(&error))).with_source(error)
}

const RIGHTS: &str = "the user may not; it needs +evalsha +eval +time +get +set +del on the prefix's keys \
    (in a cluster also +ping +cluster|slots, by Sentinel +role)";

/// What to do about it.
fn advice(error: &RedisError) -> &'static str {
    if says_read_only(error) {
        return "it is a read-only replica; connect to the master, by Sentinel if there is one";
    }
    // A command inside a script is refused in other words: Redis', Valkey's.
    let words = ["The user executing the script", "ACL failure in script"];
    let forbidden =
        error.detail().is_some_and(|detail| words.into_iter().any(|words| detail.contains(words)));
    match (error.kind(), error.code()) {
        (ErrorKind::Server(ServerErrorKind::BusyLoading), _) => "it is loading its data",
        _ if forbidden => RIGHTS,
        (ErrorKind::Server(ServerErrorKind::NoPerm), _) => RIGHTS,
        (_, Some("OOM")) => "its memory is full (maxmemory)",
        (_, Some("MISCONF")) => "it refuses writes since it cannot save them; look at its log and disk",
        (_, Some("WRONGTYPE")) => "a key under the prefix holds something else; use a prefix of our own",
        (_, Some("NOAUTH" | "WRONGPASS")) | (ErrorKind::AuthenticationFailed, _) => {
            "user or password are wrong"
        }
        (ErrorKind::Server(ServerErrorKind::ClusterDown), _) => "the cluster is down",
        (ErrorKind::MasterNameNotFoundBySentinel, _) => "no Sentinel knows a master of this name",
        _ if error.is_timeout() => "it did not answer in time",
        _ if error.is_io_error() => "it cannot be reached",
        _ => "it refused",
    }
}

fn unintelligible(what: &str) -> StoreError {
    StoreError::new(format!("Redis did not {what}: its answer makes no sense"))
}

/// The script answers `V` and a number for a record that they cannot read.
fn not_ours(what: &str, answer: &Value) -> StoreError {
    let bytes = if let Value::BulkString(bytes) = answer { &bytes[..] } else { &[] };
    match bytes.strip_prefix(b"V") {
        Some(b"1") => StoreError::new(format!("Redis did not {what}: the record of this key is damaged")),
        Some(version) => StoreError::new(format!(
            "Redis did not {what}: the record of this key is of format {}, this version of guestlist knows format 1 only",
            String::from_utf8_lossy(version)
        )),
        None => unintelligible(what),
    }
}

/// # Cancel safety
///
/// A call that is dropped may or may not have its effect, like one that failed: ask again with the same token.
#[async_trait]
impl DedupStore for RedisStore {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        let what = "claim";
        match self.step(what, key, record::claim_of(ask)).await? {
            Value::BulkString(bytes) if !bytes.starts_with(b"V") => {
                record::claim(&bytes).map_err(|Unintelligible| unintelligible(what))
            }
            other => Err(not_ours(what, &other)),
        }
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.held("renew", key, record::renewal(run, lease)).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.held("complete", key, record::completion(run, window)).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        self.held("release", key, record::release(run, why)).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        let what = "inspect";
        match self.step(what, key, record::inspection()).await? {
            Value::Nil => Ok(None),
            Value::BulkString(bytes) if !bytes.starts_with(b"V") => {
                record::record(&bytes).map(Some).map_err(|Unintelligible| unintelligible(what))
            }
            other => Err(not_ours(what, &other)),
        }
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        // Asked again after a lost answer it says that there was nothing.
        let what = "forget";
        match self.step(what, key, record::removal()).await? {
            Value::Int(code) => Ok(code == 1),
            other => Err(not_ours(what, &other)),
        }
    }

    fn features(&self) -> StoreFeatures {
        StoreFeatures::SHARED
    }
}

/// Hosts, database and prefix; neither user nor password.
impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore")
            .field("redis", &format_args!("{}", self.link.target()))
            .field("prefix", &self.link.prefix())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for RedisStoreBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStoreBuilder").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}
