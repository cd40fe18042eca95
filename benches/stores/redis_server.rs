//! Redis: the store, the near cache over it, and the bare client on a connection of the same kind.

use std::sync::Arc;

use guestlist::DedupKey;
use guestlist::dedup::{NearCache, RedisStore};
use guestlist::defaults::{REDIS_ANSWER, REDIS_CONNECT};
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{AsyncConnectionConfig, Client, Cmd, FromRedisValue, InfoDict, IntoConnectionInfo, Script, cmd};

use crate::Bench;
use crate::calls::{Done, WINDOW, claim_and_complete, new_key};
use crate::pairs::{Contender, Group, Target};

/// As long as the store's own.
const PREFIX: &str = "guestbench:";
/// What a claim and a completion send, beside the key.
const CLAIM: usize = 37;
const COMPLETION: usize = 32;
/// What the store keeps.
const RECORD: [u8; 61] = [b'r'; 61];

pub(crate) async fn run(bench: &Bench, url: &str) {
    let bare = Bare::connect(url).await;
    let version = bare.version().await;
    let store = RedisStore::builder(url).prefix(PREFIX).connect().await.unwrap();
    bench.measure(&new_ids(&version, &bare, store.clone())).await;
    let done = Done::new(store.clone()).await;
    bench.measure(&duplicates(&version, &bare, done).await).await;
    bench.measure(&near(&version, store).await).await;
}

fn new_ids(version: &str, bare: &Bare, store: RedisStore) -> Group {
    let plain = Contender::new("bare client: SET NX, SET", bare.clone(), |bare| async move {
        bare.set_twice().await;
    });
    let scripts =
        Contender::new("bare client: EVALSHA, EVALSHA, equal size", bare.clone(), |bare| async move {
            bare.run_scripts().await;
        });
    let store = Contender::new("RedisStore", store, |store| async move { claim_and_complete(&*store).await });
    Group::of(format!("{version}, claim + complete"), store)
        .beside(plain, Target::BareCall)
        .beside(scripts, Target::EqualScript)
}

async fn duplicates(version: &str, bare: &Bare, done: Done<RedisStore>) -> Group {
    bare.load(READ).await;
    let keys = Done::with_keys(bare.clone(), done.keys().to_vec());
    let script = Contender::new("bare client: EVALSHA of a GET, equal size", keys, |bare| async move {
        bare.store.read(bare.any()).await;
    });
    let store = Contender::new("RedisStore", done, |done| async move { done.duplicate().await });
    Group::of(format!("{version}, a duplicate"), store).beside(script, Target::None)
}

async fn near(version: &str, store: RedisStore) -> Group {
    let remote = Contender::new("RedisStore", Done::new(store.clone()).await, |done| async move {
        done.duplicate().await;
    });
    let near = Contender::new("NearCache", Done::new(NearCache::new(store)).await, |done| async move {
        done.duplicate().await;
    });
    Group::of(format!("{version}, a duplicate, near cache"), near).beside(remote, Target::None)
}

/// Read a record, and answer as for one that is done.
const READ: &str = "redis.call('GET', KEYS[1]) return 'D'";

/// The bare client.
#[derive(Clone)]
struct Bare {
    connection: MultiplexedConnection,
    taking: Arc<str>,
    marking: Arc<str>,
    reading: Arc<str>,
}

impl Bare {
    /// As the store connects.
    async fn connect(url: &str) -> Self {
        let tcp = TcpSettings::default().set_nodelay(true);
        let client = Client::open(url.into_connection_info().unwrap().set_tcp_settings(tcp)).unwrap();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(REDIS_CONNECT))
            .set_response_timeout(Some(REDIS_ANSWER))
            .set_pipeline_buffer_size(1024);
        let connection = client.get_multiplexed_async_connection_with_config(&config).await.unwrap();
        let hash = |text: &str| Script::new(text).get_hash().into();
        // A claim answers with 14 bytes, a completion with a number.
        let (taking, marking) = (write("'acquired so it'"), write("0"));
        let bare = Self { connection, taking: hash(&taking), marking: hash(&marking), reading: hash(READ) };
        bare.load(&taking).await;
        bare.load(&marking).await;
        bare
    }

    async fn load(&self, script: &str) {
        self.ask::<String>(cmd("SCRIPT").arg("LOAD").arg(script)).await;
    }

    async fn version(&self) -> String {
        let info: InfoDict = self.ask(cmd("INFO").arg("server")).await;
        let get = |name| info.get::<String>(name).unwrap_or_default();
        // Valkey calls itself Redis 7.2 too.
        match get("valkey_version") {
            version if version.is_empty() => format!("Redis {}", get("redis_version")),
            version => format!("Valkey {version}"),
        }
    }

    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> T {
        command.query_async(&mut self.connection.clone()).await.unwrap()
    }

    async fn set_twice(&self) {
        let key = format!("{PREFIX}{}", new_key());
        let set = |more: &[&str]| {
            let mut command = cmd("SET");
            command.arg(&key).arg(&RECORD[..]).arg("PX").arg(milliseconds()).arg(more);
            command
        };
        assert!(self.ask::<bool>(&set(&["NX"])).await);
        assert!(self.ask::<bool>(&set(&[])).await);
    }

    async fn run_scripts(&self) {
        let key = new_key();
        let taken: String = self.script(&self.taking, &key, &[b'a'; CLAIM]).await;
        assert_eq!(taken.len(), 14);
        assert_eq!(self.script::<u8>(&self.marking, &key, &[b'a'; COMPLETION]).await, 0);
    }

    async fn read(&self, key: &DedupKey) {
        assert_eq!(self.script::<String>(&self.reading, key, &[b'a'; CLAIM]).await, "D");
    }

    async fn script<T: FromRedisValue>(&self, hash: &str, key: &DedupKey, argument: &[u8]) -> T {
        self.ask(cmd("EVALSHA").arg(hash).arg("1").arg(format!("{PREFIX}{key}")).arg(argument)).await
    }
}

/// Writes a record of the store's size, whatever was there.
fn write(answer: &str) -> String {
    let record = String::from_utf8_lossy(&RECORD);
    format!("redis.call('SET', KEYS[1], '{record}', 'PX', {}) return {answer}", milliseconds())
}

fn milliseconds() -> u128 {
    WINDOW.as_millis()
}
