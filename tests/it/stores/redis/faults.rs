//! What can happen to a server, a connection and a user's rights.

use std::time::Duration;

use futures_util::future::join_all;
use guestlist::dedup::protocol::{Ask, Before, Claim, Fence, Held, Run, Token};
use guestlist::dedup::{DedupStore, RedisStore, StoreError};
use tokio::time::{Instant, timeout};

use super::proxy::Proxy;
use super::server::{PATIENCE, Plain, Server, command, key, own_store, until};
use crate::support::LogCapture;

const HOUR: Duration = Duration::from_secs(3600);

fn ask(token: u128) -> Ask {
    Ask::new(Token::from_bits(token), HOUR, HOUR)
}

/// Claims a key that is free.
async fn acquire(store: &RedisStore, number: u128) -> Run {
    match store.claim(&key(number), &ask(number)).await.unwrap() {
        Claim::Acquired { fence, .. } => Run { token: Token::from_bits(number), fence },
        other => panic!("{number} is not free: {other:?}"),
    }
}

pub(super) async fn finish(store: &RedisStore, number: u128) {
    let run = acquire(store, number).await;
    assert_eq!(store.complete(&key(number), run, HOUR).await.unwrap(), Held::Yes);
}

pub(super) async fn is_done(store: &RedisStore, number: u128) -> bool {
    matches!(store.claim(&key(number), &ask(99)).await, Ok(Claim::Done { .. }))
}

fn text(error: &StoreError) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    format!("{error} ({})", source.unwrap_or_default())
}

#[tokio::test]
async fn a_restart_in_mid_use_is_survived() {
    let mut server = Server::start("appendfsync always").await;
    let (store, other) = (server.store().await, server.store().await);
    finish(&store, 1).await;
    let run = acquire(&store, 2).await;
    server.stop();
    let error = store.claim(&key(3), &ask(3)).await.unwrap_err();
    assert!(error.to_string().starts_with("Redis did not claim: "), "{error}");
    server.start_again();
    server.answers().await;

    until("both handles answer again", || async { is_done(&store, 1).await && is_done(&other, 1).await })
        .await;
    let claim = other.claim(&key(2), &ask(5)).await.unwrap();
    assert!(matches!(claim, Claim::InProgress { .. }), "{claim:?}");
    assert_eq!(store.complete(&key(2), run, HOUR).await.unwrap(), Held::Yes);
}

#[tokio::test]
async fn a_killed_server_that_wrote_before_it_answered_forgets_nothing() {
    let mut server = Server::start("appendfsync always").await;
    let store = server.store().await;
    for number in 1..50 {
        finish(&store, number).await;
    }
    server.kill();
    server.start_again();
    server.answers().await;
    for number in 1..50 {
        until("it is remembered", || is_done(&store, number)).await;
    }
}

/// It loads for 6 s, longer than the pause between two attempts to connect (up to 2 s) and an attempt together: the calls
/// meanwhile fail, they neither hang nor run.
#[tokio::test]
async fn a_server_that_is_loading_is_an_outage() {
    let mut server = Server::start("key-load-delay 20000\nloading-process-events-interval-bytes 1024").await;
    let (store, plain) = (server.store().await, server.plain().await);
    for number in 1..300 {
        finish(&store, number).await;
    }
    let _: String = plain.ask("BGREWRITEAOF").await;
    until("the file is written anew", || async {
        let info: String = plain.ask("INFO persistence").await;
        info.contains("aof_rewrite_in_progress:0") && info.contains("aof_rewrite_scheduled:0")
    })
    .await;
    server.stop();
    server.start_again();
    until("it says that it loads", || async {
        let claim = store.claim(&key(1), &ask(99)).await;
        assert!(!matches!(claim, Ok(Claim::Acquired { .. })), "not before it has loaded");
        claim.is_err_and(|error| error.to_string().contains("it is loading its data"))
    })
    .await;
    until("it is remembered", || is_done(&store, 1)).await;
}

#[tokio::test]
async fn losing_everything_only_runs_again() {
    let server = Server::start("").await;
    let (store, plain) = (server.store().await, server.plain().await);
    finish(&store, 1).await;
    let held = acquire(&store, 2).await;
    let () = plain.ask("FLUSHALL").await;

    let again = acquire(&store, 1).await;
    assert!(again.fence > held.fence, "fences grow over a flush: {again:?}, {held:?}");
    assert_eq!(store.complete(&key(2), held, HOUR).await.unwrap(), Held::Gone);
    assert!(is_done(&store, 2).await, "the work was done, and is on record again");
}

#[tokio::test]
async fn a_server_that_does_not_know_the_script_learns_it() {
    let server = Server::start("").await;
    let (store, plain) = (server.store().await, server.plain().await);
    finish(&store, 1).await;
    let () = plain.ask("SCRIPT FLUSH").await;
    assert!(is_done(&store, 1).await);
    finish(&store, 2).await;
    let stats: String = plain.ask("INFO commandstats").await;
    let by_text = stats.lines().find_map(|line| line.strip_prefix("cmdstat_eval:calls=")).unwrap();
    let by_text: u32 = by_text.split(',').next().unwrap().parse().unwrap();
    assert_eq!(by_text, 3, "the probe, once, and once after the flush: {stats}");
}

#[tokio::test]
async fn many_steps_at_once_are_few_commands() {
    let server = Server::start("").await;
    let (store, plain) = (server.store().await, server.plain().await);
    join_all((0..500).map(|number| finish(&store, number))).await;
    let stats: String = plain.ask("INFO commandstats").await;
    let calls = |name: &str| -> u32 {
        let line = stats.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split(',').next().unwrap().parse().unwrap()
    };
    assert_eq!(calls("cmdstat_set:calls="), 32 + 1000, "the probe's, a claim and a completion each: {stats}");
    let runs = calls("cmdstat_evalsha:calls=") + calls("cmdstat_eval:calls=");
    assert!((16..200).contains(&runs), "{runs} runs of the script, of at most 64 steps each");
}

/// A server closes idle connections (`timeout`), so does a firewall: that must not cost a claim.
#[tokio::test]
async fn a_closed_connection_is_nobodys_concern() {
    let server = Server::start("").await;
    let (store, plain) = (server.store().await, server.plain().await);
    // The pause before the next connection doubles with each of these, from 100 ms; a call waits 3 s for it.
    for number in 1..4 {
        let killed: u32 = plain.ask("CLIENT KILL TYPE normal SKIPME yes").await;
        assert_eq!(killed, 1);
        finish(&store, number).await;
    }
}

#[tokio::test]
async fn calls_in_flight_on_a_killed_connection_end() {
    let server = Server::start("").await;
    let (store, plain) = (server.store().await, server.plain().await);
    let calls = (1..200).map(|number| {
        let store = store.clone();
        tokio::spawn(async move { store.claim(&key(number), &ask(number)).await })
    });
    let calls: Vec<_> = calls.collect();
    let _: u32 = plain.ask("CLIENT KILL TYPE normal SKIPME yes").await;
    for (number, call) in (1..).zip(calls) {
        let claim = timeout(PATIENCE, call).await.unwrap().unwrap();
        let claim = match claim {
            Ok(claim) => claim,
            // An error says nothing about the effect: claim again with the same token.
            Err(_) => store.claim(&key(number), &ask(number)).await.unwrap(),
        };
        assert!(matches!(claim, Claim::Acquired { attempt: 1, before: Before::First, .. }), "{claim:?}");
    }
}

#[tokio::test]
async fn a_frozen_server_is_an_outage_and_not_a_hang() {
    let server = Server::start("").await;
    let store = server.store().await;
    server.signal("STOP");
    let started = Instant::now();
    let error = store.claim(&key(1), &ask(1)).await.unwrap_err();
    assert!(error.to_string().contains("did not answer in time"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    server.signal("CONT");
    until("it goes on", || async { store.claim(&key(1), &ask(1)).await.is_ok() }).await;
}

/// The other side is gone without a word, as after a machine's death: nothing closes the connection.
#[tokio::test]
async fn a_connection_into_the_void_is_replaced() {
    let server = Server::start("").await;
    let proxy = Proxy::to(server.port).await;
    let store = RedisStore::connect(&proxy.url()).await.unwrap();
    finish(&store, 1).await;

    proxy.swallow_what_is_connected();
    let error = store.claim(&key(1), &ask(9)).await.unwrap_err();
    assert!(error.to_string().contains("did not answer in time"), "{error}");
    until("it goes on by another connection", || is_done(&store, 1)).await;
}

/// As the layer does with a short lease: its deadline ends long before ours.
#[tokio::test]
async fn a_connection_into_the_void_is_replaced_also_for_impatient_callers() {
    let server = Server::start("").await;
    finish(&server.store().await, 1).await;
    for _ in 0..3 {
        if is_soon_replaced(&server).await {
            return;
        }
    }
    panic!("it is not replaced before the calls of those who gave up are over");
}

/// Whether who comes after impatient callers has an answer before their calls are over (3 s after they were sent). `false`
/// may also mean that the machine stood still.
async fn is_soon_replaced(server: &Server) -> bool {
    let proxy = Proxy::to(server.port).await;
    let store = RedisStore::connect(&proxy.url()).await.unwrap();
    assert!(is_done(&store, 1).await);

    proxy.swallow_what_is_connected();
    let impatient = Duration::from_millis(300);
    // More of them than round trips at once: none may stand in the way of who comes after.
    let calls = (10..30).map(|number| {
        let store = store.clone();
        async move { timeout(impatient, store.claim(&key(number), &ask(9))).await }
    });
    assert!(join_all(calls).await.iter().any(Result::is_err), "nobody waited in vain");
    let Ok(Ok(claim)) = timeout(Duration::from_secs(2), store.claim(&key(1), &ask(9))).await else {
        return false;
    };
    assert!(matches!(claim, Claim::Done { .. }), "{claim:?}");
    true
}

#[test]
fn a_call_may_be_dropped_outside_of_any_runtime() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (server, proxy, store) = runtime.block_on(async {
        let server = Server::start("").await;
        let proxy = Proxy::to(server.port).await;
        let store = RedisStore::connect(&proxy.url()).await.unwrap();
        (server, proxy, store)
    });
    proxy.swallow_what_is_connected();
    let (key, ask) = (key(1), ask(1));
    let mut call = store.claim(&key, &ask);
    let unanswered = runtime.block_on(async { timeout(Duration::from_millis(300), &mut call).await });
    assert!(unanswered.is_err());
    drop(call);
    let claim = runtime.block_on(store.claim(&key, &ask)).unwrap();
    assert!(matches!(claim, Claim::Acquired { .. }), "{claim:?}");
    drop((server, proxy));
}

#[tokio::test]
async fn a_dropped_call_harms_nobody() {
    let store = own_store().await;
    for number in 1..200 {
        let (key, ask) = (key(number), ask(number));
        let patience = Duration::from_micros(u64::try_from(number).unwrap());
        let _ = timeout(patience, store.claim(&key, &ask)).await;
        let claim = store.claim(&key, &ask).await.unwrap();
        assert!(matches!(claim, Claim::Acquired { attempt: 1, .. }), "{claim:?}");
    }
}

/// A master that failed over answers on the old connection, read-only, for as long as one lets it.
#[tokio::test]
async fn a_master_that_became_a_replica_is_left() {
    let (old, new) = (Server::start("").await, Server::start("").await);
    let proxy = Proxy::to(old.port).await;
    let store = RedisStore::connect(&proxy.url()).await.unwrap();
    finish(&store, 1).await;

    let () = old.plain().await.ask(&format!("REPLICAOF 127.0.0.1 {}", new.port)).await;
    // At once, so that one run of the script makes them all.
    let (keys, ask_two) = ([key(2), key(3)], ask(2));
    for claim in join_all(keys.iter().map(|key| store.claim(key, &ask_two))).await {
        let error = claim.unwrap_err();
        assert!(error.to_string().contains("read-only replica"), "{}", text(&error));
    }
    // What stands for the name of the master leads elsewhere now.
    proxy.lead_to(new.port);
    until("it follows the name", || async { store.claim(&key(2), &ask(2)).await.is_ok() }).await;
    let () = old.plain().await.ask("REPLICAOF NO ONE").await;
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let server = Server::start("").await;
    let (store, plain) = (server.store().await, server.plain().await);
    let refusals = [
        ("maxmemory 1", "maxmemory 0", "its memory is full (maxmemory)"),
        ("min-replicas-to-write 1", "min-replicas-to-write 0", "it refused"),
    ];
    for (cause, cure, advice) in refusals {
        let () = plain.ask(&format!("CONFIG SET {cause}")).await;
        let error = store.claim(&key(1), &ask(1)).await.unwrap_err();
        assert!(error.to_string().contains(advice), "{}", text(&error));
        let () = plain.ask(&format!("CONFIG SET {cure}")).await;
        store.claim(&key(1), &ask(1)).await.unwrap();
    }
}

#[tokio::test]
async fn a_policy_that_evicts_is_warned_about() {
    let server = Server::start("maxmemory-policy allkeys-lru").await;
    let logs = LogCapture::begin();
    server.store().await;
    assert!(logs.text().contains("WARN") && logs.text().contains("noeviction"), "{}", logs.text());
    assert!(logs.text().contains("policy=\"allkeys-lru\""), "{}", logs.text());
    drop(logs);

    let () = server.plain().await.ask("CONFIG SET maxmemory-policy noeviction").await;
    let logs = LogCapture::begin();
    server.store().await;
    assert!(!logs.text().contains("noeviction"), "{}", logs.text());
}

/// Exactly the permissions that `docs/stores/redis.md` lists.
const RIGHTS: &str = "on >secret ~guestlist:* +evalsha +eval +time +get +set +del";

#[tokio::test]
async fn a_user_needs_no_more_than_the_page_lists() {
    let server = Server::start("").await;
    let plain = server.plain().await;
    let () = plain.ask(&format!("ACL SETUSER app {RIGHTS}")).await;
    let url = format!("redis://app:secret@127.0.0.1:{}", server.port);
    let logs = LogCapture::begin();
    let store = RedisStore::connect(&url).await.unwrap();
    assert!(logs.text().contains("could not be checked"), "{}", logs.text());
    drop(logs);
    finish(&store, 1).await;
    assert!(is_done(&store, 1).await);
    assert!(store.forget(&key(1)).await.unwrap());
    assert_eq!(store.inspect(&key(1)).await.unwrap(), None);

    for right in RIGHTS.split(' ').filter_map(|right| right.strip_prefix('+')) {
        let () = plain.ask("SCRIPT FLUSH").await;
        let () = plain.ask(&format!("ACL SETUSER app -{right}")).await;
        let calls = [
            store.inspect(&key(2)).await.map(drop),
            store.claim(&key(2), &ask(2)).await.map(drop),
            store.forget(&key(2)).await.map(drop),
        ];
        let refused = calls.into_iter().find_map(Result::err);
        let refused = refused.unwrap_or_else(|| panic!("{right} is not needed"));
        assert!(refused.to_string().contains("the user may not"), "{right}: {}", text(&refused));
        let () = plain.ask(&format!("ACL SETUSER app +{right}")).await;
    }
    let with_info = Plain::connect(&url).await.unwrap();
    assert!(with_info.try_ask::<String>(&command("INFO memory")).await.is_err());
}

#[tokio::test]
async fn a_wrong_password_is_told_without_telling_it() {
    let server = Server::start("requirepass right").await;
    let port = server.port;
    for url in [format!("redis://:wr0ng@127.0.0.1:{port}"), format!("redis://wr0ng@127.0.0.1:{port}")] {
        let error = RedisStore::connect(&url).await.unwrap_err();
        let told = format!("{} {error:?}", text(&error));
        assert!(told.contains("user or password are wrong"), "{told}");
        assert!(!told.contains("wr0ng"), "{told}");
    }
    let store = RedisStore::connect(&format!("redis://:right@127.0.0.1:{port}/3")).await.unwrap();
    let shown = format!("{store:?}");
    assert!(!shown.contains("right"), "{shown}");
    assert!(shown.contains(&format!("127.0.0.1:{port}/3")), "{shown}");
}

/// The client's own manager stays broken for ever after a handshake that was refused.
#[tokio::test]
async fn a_refused_login_is_tried_again() {
    let mut server = Server::start("requirepass right").await;
    let store = RedisStore::connect(&format!("redis://:right@127.0.0.1:{}", server.port)).await.unwrap();
    let plain = Plain::connect(&format!("redis://:right@127.0.0.1:{}", server.port)).await.unwrap();
    let () = plain.ask("CONFIG SET requirepass other").await;
    let _: u32 = plain.ask("CLIENT KILL TYPE normal SKIPME yes").await;
    let error = store.claim(&key(1), &ask(1)).await.unwrap_err();
    assert!(error.to_string().contains("user or password are wrong"), "{}", text(&error));
    let () = plain.ask("CONFIG SET requirepass right").await;
    until("it logs in again", || async { store.claim(&key(1), &ask(1)).await.is_ok() }).await;
    server.kill();
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_at_once() {
    let error = RedisStore::connect("redis://user:secret@127.0.0.1:1").await.unwrap_err();
    assert_eq!(error.to_string(), "no connection to redis://127.0.0.1:1/0: it cannot be reached");
}

#[tokio::test]
async fn two_handles_share_what_they_know_and_prefixes_do_not() {
    let server = Server::start("").await;
    let (one, two) = (server.store().await, server.store().await);
    let apart = RedisStore::builder(server.url()).prefix("other:").connect().await.unwrap();
    let run = acquire(&one, 1).await;
    assert!(matches!(two.claim(&key(1), &ask(2)).await.unwrap(), Claim::InProgress { .. }));
    assert_eq!(two.complete(&key(1), run, HOUR).await.unwrap(), Held::Yes);
    assert!(is_done(&one, 1).await);
    let claim = apart.claim(&key(1), &ask(3)).await.unwrap();
    assert!(matches!(claim, Claim::Acquired { fence: Fence(fence), .. } if fence > run.fence.0), "{claim:?}");
    let keys: Vec<String> = server.plain().await.ask("KEYS *").await;
    assert!(keys.contains(&one.redis_key(&key(1))) && keys.contains(&apart.redis_key(&key(1))), "{keys:?}");
}
