//! A cluster of three nodes, and a master with a replica that Sentinels watch.

use std::time::Duration;

use futures_util::future::join_all;
use guestlist::dedup::protocol::{Ask, Claim, Held, Token};
use guestlist::dedup::{DedupStore, RedisStore};

use super::server::{Plain, Server, key, until, until_within};

const HOUR: Duration = Duration::from_secs(3600);

/// A Sentinel that was held up itself trusts no clock for 30 s, and it looks at some things every 10 s only.
const SENTINELS: Duration = Duration::from_secs(60);

fn ask(token: u128) -> Ask {
    Ask::new(Token::from_bits(token), HOUR, HOUR)
}

async fn finish(store: &RedisStore, number: u128) {
    let claim = store.claim(&key(number), &ask(number)).await.unwrap();
    let Claim::Acquired { fence, .. } = claim else { panic!("{number} is not free: {claim:?}") };
    let run = guestlist::dedup::protocol::Run { token: Token::from_bits(number), fence };
    assert_eq!(store.complete(&key(number), run, HOUR).await.unwrap(), Held::Yes);
}

async fn is_done(store: &RedisStore, number: u128) -> bool {
    matches!(store.claim(&key(number), &ask(99)).await, Ok(Claim::Done { .. }))
}

struct Cluster(Vec<Server>);

impl Cluster {
    async fn start() -> Self {
        // No test waits until a node is taken for lost; one that is only slow must not be.
        let config = "cluster-enabled yes\ncluster-node-timeout 15000\nappendfsync always";
        let nodes =
            vec![Server::start(config).await, Server::start(config).await, Server::start(config).await];
        for (node, slots) in nodes.iter().zip(["0 5460", "5461 10922", "10923 16383"]) {
            let plain = node.plain().await;
            let () = plain.ask(&format!("CLUSTER ADDSLOTSRANGE {slots}")).await;
            let () = plain.ask(&format!("CLUSTER MEET 127.0.0.1 {}", nodes[0].port)).await;
        }
        let cluster = Self(nodes);
        cluster.agrees().await;
        cluster
    }

    async fn agrees(&self) {
        for node in &self.0 {
            until("the cluster is well", || async {
                let Ok(plain) = Plain::connect(&node.url()).await else { return false };
                let info: String = plain.ask("CLUSTER INFO").await;
                info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3")
            })
            .await;
        }
    }

    /// By one of its nodes: the others are found.
    async fn store(&self) -> RedisStore {
        RedisStore::connect(&format!("redis+cluster://127.0.0.1:{}", self.0[1].port)).await.unwrap()
    }

    async fn slot_of(&self, store: &RedisStore, number: u128) -> u16 {
        self.0[0].plain().await.ask(&format!("CLUSTER KEYSLOT {}", store.redis_key(&key(number)))).await
    }

    /// The first number of at least this, whose key this node has.
    async fn number_on(&self, node: usize, store: &RedisStore, from: u128) -> u128 {
        for number in from.. {
            if usize::from(self.slot_of(store, number).await / 5461).min(2) == node {
                return number;
            }
        }
        unreachable!("every node has keys")
    }
}

/// As behind a proxy of a cluster that looks like one server: it runs no script for the keys of two slots.
#[tokio::test]
async fn keys_of_several_slots_behind_one_address_go_one_by_one() {
    let node = Server::start("cluster-enabled yes").await;
    let plain = node.plain().await;
    let () = plain.ask("CLUSTER ADDSLOTSRANGE 0 16383").await;
    until("the cluster is well", || async {
        plain.ask::<String>("CLUSTER INFO").await.contains("cluster_state:ok")
    })
    .await;
    let store = RedisStore::connect(&node.url()).await.unwrap();
    for numbers in [1..40, 40..80] {
        join_all(numbers.map(|number| finish(&store, number))).await;
    }
    let stats: String = plain.ask("INFO commandstats").await;
    let count = |of: &str, what: &str| -> u32 {
        let line = stats.lines().find(|line| line.starts_with(of)).unwrap();
        let count = line.split(what).nth(1).unwrap();
        count.split(',').next().unwrap().parse().unwrap()
    };
    assert_eq!(count("cmdstat_set:", "calls="), 32 + 2 * 79, "the probe's, and two for each id: {stats}");
    assert_eq!(count("cmdstat_eval:", "rejected_calls="), 1, "the probe: {stats}");
    assert_eq!(count("cmdstat_evalsha:", "rejected_calls="), 0, "{stats}");
}

#[tokio::test]
async fn a_cluster_is_one_store() {
    let cluster = Cluster::start().await;
    let (store, other) = (cluster.store().await, cluster.store().await);
    for number in 1..60 {
        finish(&store, number).await;
    }
    for number in 1..60 {
        assert!(is_done(&other, number).await);
        assert!(other.inspect(&key(number)).await.unwrap().is_some());
    }
    for node in &cluster.0 {
        let keys: u32 = node.plain().await.ask("DBSIZE").await;
        assert!(keys > 5, "each node has its share, {keys}");
    }
    assert!(store.forget(&key(1)).await.unwrap());
    assert!(!other.forget(&key(1)).await.unwrap());
    assert!(format!("{store:?}").contains("redis+cluster://127.0.0.1:"), "{store:?}");
}

/// As `docs/stores/redis.md` lists them.
const RIGHTS: &str = "on >secret ~guestlist:* +evalsha +eval +time +get +set +del";

#[tokio::test]
async fn a_user_of_a_cluster_needs_no_more_than_the_page_lists() {
    let cluster = Cluster::start().await;
    for node in &cluster.0 {
        let () = node.plain().await.ask(&format!("ACL SETUSER app {RIGHTS} +ping +cluster|slots")).await;
    }
    let url = format!("redis+cluster://app:secret@127.0.0.1:{}", cluster.0[0].port);
    let store = RedisStore::connect(&url).await.unwrap();
    for number in 1..20 {
        finish(&store, number).await;
        assert!(is_done(&store, number).await);
    }
}

#[tokio::test]
async fn a_slot_that_moves_is_followed() {
    let cluster = Cluster::start().await;
    let store = cluster.store().await;
    let number = cluster.number_on(0, &store, 1).await;
    let slot = cluster.slot_of(&store, number).await;
    let new: String = cluster.0[2].plain().await.ask("CLUSTER MYID").await;
    for node in [2, 0, 1] {
        let () = cluster.0[node].plain().await.ask(&format!("CLUSTER SETSLOT {slot} NODE {new}")).await;
    }
    finish(&store, number).await;
    assert!(is_done(&store, number).await);
    let keys: u32 = cluster.0[2].plain().await.ask("DBSIZE").await;
    assert_eq!(keys, 1);
}

#[tokio::test]
async fn a_lost_node_is_an_outage_of_its_keys_only_until_it_is_back() {
    let mut cluster = Cluster::start().await;
    // Otherwise Redis stops the whole cluster when a part is missing.
    for node in &cluster.0 {
        let () = node.plain().await.ask("CONFIG SET cluster-require-full-coverage no").await;
    }
    let store = cluster.store().await;
    let (here, there) = (cluster.number_on(2, &store, 1).await, cluster.number_on(0, &store, 1).await);
    finish(&store, here).await;
    finish(&store, there).await;

    cluster.0[2].kill();
    assert!(store.claim(&key(here), &ask(99)).await.is_err(), "neither acquired nor done");
    until("the others go on", || is_done(&store, there)).await;
    let more = cluster.number_on(0, &store, there + 1).await;
    finish(&store, more).await;

    cluster.0[2].start_again();
    until("its keys are known again", || is_done(&store, here)).await;
}

/// A master, a replica, and the Sentinel that watches them.
struct Watched {
    master: Server,
    replica: Server,
    sentinel: Server,
}

impl Watched {
    async fn start() -> Self {
        let master = Server::start("").await;
        let replica =
            Server::start(&format!("replicaof 127.0.0.1 {}\nrepl-diskless-sync-delay 0", master.port)).await;
        // A master that is only slow must not be taken for lost.
        let sentinel = Server::start_sentinel(&format!(
            "sentinel monitor payments 127.0.0.1 {} 1\nsentinel down-after-milliseconds payments 5000\nsentinel failover-timeout payments 3000",
            master.port
        ))
        .await;
        let watched = Self { master, replica, sentinel };
        let sentinel = watched.sentinel.plain().await;
        until_within(SENTINELS, "the Sentinel knows the replica", || async {
            let replicas: Vec<redis::Value> = sentinel.ask("SENTINEL REPLICAS payments").await;
            !replicas.is_empty()
        })
        .await;
        watched
    }

    fn url(&self) -> String {
        // The first is not there.
        format!("redis+sentinel://127.0.0.1:1,127.0.0.1:{}/payments", self.sentinel.port)
    }
}

#[tokio::test]
async fn a_failover_by_sentinel_is_followed_and_suppresses_nothing() {
    let mut watched = Watched::start().await;
    let store = RedisStore::connect(&watched.url()).await.unwrap();
    finish(&store, 1).await;
    let replica = watched.replica.plain().await;
    until("the replica knows it too", || async { replica.get(&store.redis_key(&key(1))).await.is_some() })
        .await;
    let before = match store.claim(&key(2), &ask(2)).await.unwrap() {
        Claim::Acquired { fence, .. } => fence,
        other => panic!("{other:?}"),
    };

    // This is not replicated: a claim of a key that only the old master knows.
    watched.replica.signal("STOP");
    finish(&store, 3).await;
    watched.master.kill();
    watched.replica.signal("CONT");

    until_within(SENTINELS, "the replica is the master", || async {
        store.claim(&key(4), &ask(4)).await.is_ok()
    })
    .await;
    assert!(is_done(&store, 1).await, "what was replicated is known");
    match store.claim(&key(3), &ask(33)).await.unwrap() {
        Claim::Acquired { fence, attempt, .. } => assert!(fence > before && attempt == 1, "it runs again"),
        Claim::Done { .. } => {}
        other => panic!("{other:?}"),
    }

    // The old master comes back, is made a replica, and nobody talks to it.
    watched.master.start_again();
    let old = || async { Plain::connect(&watched.master.url()).await };
    until_within(SENTINELS, "the old master is a replica", || async {
        let Ok(plain) = old().await else { return false };
        let role: redis::RedisResult<String> = plain.try_ask(redis::cmd("INFO").arg("replication")).await;
        role.is_ok_and(|role| role.contains("role:slave"))
    })
    .await;
    finish(&store, 5).await;
    let again = RedisStore::connect(&watched.url()).await.unwrap();
    assert!(is_done(&again, 5).await);
}

#[tokio::test]
async fn a_user_by_sentinel_needs_no_more_than_the_page_lists() {
    let watched = Watched::start().await;
    let () = watched.master.plain().await.ask(&format!("ACL SETUSER app {RIGHTS} +role")).await;
    let sentinel = watched.sentinel.plain().await;
    let () = sentinel.ask("ACL SETUSER watcher on >other +role +sentinel|masters").await;
    let () = sentinel.ask("ACL SETUSER default off").await;
    let url = watched.url().replace("//", "//app:secret@");
    let told = RedisStore::connect(&url).await.unwrap_err().to_string();
    assert!(!told.contains("secret"), "{told}");
    let store = RedisStore::builder(url).sentinel_login("watcher", "other").connect().await.unwrap();
    finish(&store, 1).await;
}

#[tokio::test]
async fn a_master_that_no_sentinel_knows_is_told() {
    let watched = Watched::start().await;
    let url = watched.url().replace("/payments", "/shipping");
    let error = RedisStore::connect(&url).await.unwrap_err();
    assert!(error.to_string().contains("no Sentinel knows a master of this name"), "{error}");
}
