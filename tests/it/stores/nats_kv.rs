//! The store in a NATS bucket, against real servers: the one of `GUESTLIST_NATS_URL`, and private
//! ones that tests may kill and roll back. `./scripts/test` sets all that is needed.

mod bucket;
mod cluster;
mod contract;
mod faults;
mod machine;
mod server;
mod time;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use guestlist::DedupKey;
use guestlist::broker::nats::async_nats::{self, jetstream};
use guestlist::dedup::protocol::{Ask, Before, Claim, Fence, Run, Token};
use guestlist::dedup::store::nats_kv::NatsKvOptions;
use guestlist::dedup::{DedupStore, NatsKvStore};
use tokio::time::{Instant, sleep};

/// What has not happened after this long will not happen.
const PATIENCE: Duration = Duration::from_secs(30);
/// Nothing of this length ends in a test.
const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);
/// How often a store looks at its bucket here.
const OFTEN: Duration = Duration::from_millis(50);

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run ./scripts/test"))
}

fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn options(bucket: &str) -> NatsKvOptions {
    NatsKvStore::options().bucket(bucket).window(HOUR).observe_every(OFTEN)
}

/// Another process's handle on a bucket.
async fn open(bucket: &str) -> NatsKvStore {
    options(bucket).connect(&env("GUESTLIST_NATS_URL")).await.expect("the bucket can be opened")
}

/// A stranger's client.
async fn stranger(url: &str) -> jetstream::Context {
    jetstream::new(
        async_nats::connect(url.split(',').collect::<Vec<_>>()).await.expect("a plain client connects"),
    )
}

fn key() -> DedupKey {
    DedupKey::from_bytes(Token::random().bits().to_le_bytes())
}

fn ask(lease: Duration) -> Ask {
    Ask::new(Token::random(), lease, HOUR)
}

fn alone(lease: Duration) -> Ask {
    Ask { alone: true, ..ask(lease) }
}

/// What the winner of a claim was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Won {
    run: Run,
    attempt: u32,
    before: Before,
}

async fn claim(store: &NatsKvStore, key: &DedupKey, ask: &Ask) -> Claim {
    store.claim(key, ask).await.expect("the store answers")
}

fn won(ask: &Ask, claim: Claim) -> Option<Won> {
    match claim {
        Claim::Acquired { fence, attempt, before, .. } => {
            Some(Won { run: Run { token: ask.token, fence }, attempt, before })
        }
        _ => None,
    }
}

async fn win(store: &NatsKvStore, key: &DedupKey, ask: &Ask) -> Won {
    let answer = claim(store, key, ask).await;
    won(ask, answer).unwrap_or_else(|| panic!("the key is free: {answer:?}"))
}

/// Claims again and again, as whoever waits for an id does.
async fn win_at_last(store: &NatsKvStore, key: &DedupKey, ask: &Ask) -> Won {
    let give_up_at = Instant::now() + PATIENCE;
    loop {
        // While a leader is elected there is no answer.
        if let Ok(answer) = store.claim(key, ask).await
            && let Some(won) = won(ask, answer)
        {
            return won;
        }
        assert!(Instant::now() < give_up_at, "the claim was not won within {PATIENCE:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let begin = Instant::now();
    while !holds().await {
        assert!(begin.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

const fn is_busy(claim: Claim) -> bool {
    matches!(claim, Claim::InProgress { .. })
}

const fn is_done(claim: Claim) -> bool {
    matches!(claim, Claim::Done { .. })
}

const fn fence(won: &Won) -> Fence {
    won.run.fence
}
