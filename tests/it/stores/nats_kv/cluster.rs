//! Three servers: their leader is killed while claims go on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use guestlist::dedup::protocol::Held;
use tokio::task::JoinSet;

use super::server::Cluster;
use super::*;

const LEASE: Duration = Duration::from_secs(60);

/// Who holds what by its own view, and what is done.
#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<HashMap<DedupKey, Entry>>>);

#[derive(Default)]
struct Entry {
    held: bool,
    done: bool,
}

impl Ledger {
    fn begins(&self, key: DedupKey) {
        let mut ledger = self.0.lock().unwrap();
        let entry = ledger.entry(key).or_default();
        assert!(!entry.held, "two holders of one key");
        assert!(!entry.done, "a done key runs again");
        entry.held = true;
    }

    /// Before it is asked for: from then on the answer may be lost.
    fn completes(&self, key: DedupKey) {
        self.0.lock().unwrap().entry(key).or_default().held = false;
    }

    fn done(&self, key: DedupKey) {
        self.0.lock().unwrap().entry(key).or_default().done = true;
    }
}

async fn open(cluster: &Cluster) -> NatsKvStore {
    let begin = Instant::now();
    loop {
        // A cluster needs a moment until it has a leader.
        match options("b").replicas(3).connect(&cluster.url()).await {
            Ok(store) => return store,
            Err(error) => assert!(begin.elapsed() < PATIENCE, "{error:?}"),
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Claims and completes new keys until told to stop; asks again with the same token, as the layer does.
async fn work(
    store: NatsKvStore,
    rivals: [NatsKvStore; 2],
    ledger: Ledger,
    stop: Arc<Mutex<bool>>,
) -> Vec<DedupKey> {
    let mut keys = Vec::new();
    while !*stop.lock().unwrap() {
        let key = key();
        let (mine, theirs) = (ask(LEASE), ask(LEASE));
        let (a, b) = tokio::join!(
            until_answered(|| store.claim(&key, &mine)),
            until_answered(|| rivals[keys.len() % 2].claim(&key, &theirs))
        );
        let winners = [won(&mine, a), won(&theirs, b)];
        assert_eq!(winners.iter().flatten().count(), 1, "of two claims one wins: {a:?}, {b:?}");
        let won = winners.into_iter().flatten().next().unwrap();
        ledger.begins(key);
        ledger.completes(key);
        let held = until_answered(|| store.complete(&key, won.run, HOUR)).await;
        assert_eq!(held, Held::Yes, "a holder completes");
        ledger.done(key);
        keys.push(key);
    }
    keys
}

async fn until_answered<T, E: std::fmt::Debug, F: Future<Output = Result<T, E>>>(
    mut question: impl FnMut() -> F,
) -> T {
    let begin = Instant::now();
    loop {
        match question().await {
            Ok(answer) => return answer,
            Err(error) => assert!(begin.elapsed() < 2 * PATIENCE, "no answer: {error:?}"),
        }
        sleep(Duration::from_millis(50)).await;
    }
}

async fn leader(js: &jetstream::Context) -> Option<String> {
    let stream = js.get_stream("KV_b").await.ok()?;
    stream.cached_info().cluster.as_ref()?.leader.clone()
}

async fn leader_at_last(js: &jetstream::Context) -> String {
    let begin = Instant::now();
    loop {
        if let Some(leader) = leader(js).await {
            return leader;
        }
        assert!(begin.elapsed() < PATIENCE, "no leader");
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f19_a_leader_killed_under_load_makes_no_second_holder_and_suppresses_nothing() {
    let mut cluster = Cluster::start().await;
    let stores = [open(&cluster).await, open(&cluster).await];
    let (ledger, stop) = (Ledger::default(), Arc::new(Mutex::new(false)));
    let mut workers = JoinSet::new();
    for i in 0..8 {
        let store = stores[i % 2].clone();
        workers.spawn(work(store, stores.clone(), ledger.clone(), Arc::clone(&stop)));
    }
    let js = stranger(&cluster.url()).await;
    sleep(SECOND).await;
    for _ in 0..2 {
        let name = leader_at_last(&js).await;
        let done = ledger.0.lock().unwrap().len();
        cluster.node(&name).kill();
        until("the work goes on", || async { ledger.0.lock().unwrap().len() > done + 50 }).await;
        cluster.node(&name).run();
        cluster.node(&name).listens().await;
        sleep(SECOND).await;
    }
    *stop.lock().unwrap() = true;
    let mut count = 0;
    while let Some(keys) = workers.join_next().await {
        for key in keys.unwrap() {
            let copy = ask(LEASE);
            assert!(
                is_done(until_answered(|| stores[0].claim(&key, &copy)).await),
                "nothing done is forgotten"
            );
            count += 1;
        }
    }
    assert_eq!(count, ledger.0.lock().unwrap().len());
    assert!(count > 100, "{count} keys");
}
