//! Processes that are killed and servers that stop, all of them real: nothing is lost, and every run beyond one
//! per id has its reason.
//!
//! `GUESTLIST_KILL_IDS` is the number of ids, and each of them arrives at least twice. The full size is
//! `GUESTLIST_KILL_IDS=5000 scripts/test -- --test it kills:: -- --nocapture`, which prints what the event
//! checker counted.

mod broker;
mod child;
mod crew;
mod inbox;
mod outage;
mod poison;
mod server;
mod steps;
mod stores;

use std::path::PathBuf;
use std::time::Duration;

use guestlist::dedup::protocol::Token;
use guestlist::{DedupKey, MessageId, Scope};
use tokio::time::{Instant, sleep};

/// Of the two processes, at random moments.
const KILLS: usize = 10;
/// Short: what a killed process had in hand is nobody's for this long.
const LEASE: Duration = Duration::from_secs(2);
/// More than a message could meet kills.
const ATTEMPTS: u32 = 20;
/// What has not happened after this long will not happen.
const PATIENCE: Duration = Duration::from_secs(120);
/// Where ids are unique, so that this process can tell their keys.
const SCOPE: &str = "kills";

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run ./scripts/test"))
}

fn size() -> usize {
    std::env::var("GUESTLIST_KILL_IDS")
        .map_or(600, |ids| ids.parse().expect("GUESTLIST_KILL_IDS is a number"))
}

fn ids() -> Vec<String> {
    (0..size()).map(|number| format!("order-{number}")).collect()
}

fn key(id: &str) -> DedupKey {
    Scope::new("", SCOPE).key(&MessageId::new(id.to_owned()).unwrap())
}

/// A name that no other test and no earlier run used; also a schema's and a bucket's.
fn unique(name: &str) -> String {
    format!("{name}_{:016x}", Token::random().bits() >> 64)
}

/// A number below this, at random.
fn below(end: usize) -> usize {
    usize::try_from(Token::random().bits() % end as u128).unwrap()
}

/// Waits for a condition that nothing announces.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let give_up_at = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < give_up_at, "it did not become true that {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// A folder that is gone with the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let path = std::env::temp_dir().join(unique("guestlist-kills"));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
