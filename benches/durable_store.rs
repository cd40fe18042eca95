//! What a claim and its complete cost in a folder, and what an id costs there.
//!
//! ```text
//! cargo bench --features durable --bench durable_store [-- IDS [FOLDER]]
//! ```
//!
//! IDS (a million unless given) ids are claimed and completed by 256 tasks in a folder on the disk of
//! FOLDER (the system's temporary folder unless given).

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use guestlist::dedup::protocol::{Ask, Claim, Run, Token};
use guestlist::dedup::{DedupStore, Durability, DurableStore};
use guestlist::{MessageId, Scope};

const WINDOW: Duration = Duration::from_secs(24 * 3_600);
const LEASE: Duration = Duration::from_secs(30);

#[tokio::main(worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let ids = arguments.first().map_or(1_000_000, |ids| ids.parse().expect("IDS is a number"));
    let parent = arguments.get(1).map_or_else(env::temp_dir, PathBuf::from);
    let folder = parent.join(format!("guestlist-bench-{}", std::process::id()));
    for durability in [Durability::Process, Durability::Power] {
        println!("{durability:?}");
        let store = DurableStore::builder(&folder).durability(durability).open().await.unwrap();
        let few = if durability == Durability::Power { 2_000 } else { 50_000 };
        for (tasks, ids) in [(1, few), (16, few * 4), (256, few * 10)] {
            run(&store, tasks, ids).await;
        }
        store.close().await.unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }
    remember(&folder, ids).await;
    fs::remove_dir_all(&folder).unwrap();
}

/// What so many ids cost.
async fn remember(folder: &Path, ids: u64) {
    println!("{ids} ids");
    let before = resident();
    let store = DurableStore::open(folder).await.unwrap();
    run(&store, 256, ids).await;
    println!(
        "  {:>9} of memory, resident: the store, whatever it remembers",
        mib(resident().saturating_sub(before))
    );
    duplicates(&store, ids).await;
    store.close().await.unwrap();
    let size = size(folder);
    println!("  {:>9} on disk, {} bytes each, journals and all", mib(size), size / ids);
    let began = Instant::now();
    let store = DurableStore::open(folder).await.unwrap();
    println!("  {:>9.0?} to open it again", began.elapsed());
    store.close().await.unwrap();
}

/// So many tasks claim and complete so many ids in all.
async fn run(store: &DurableStore, tasks: u64, ids: u64) {
    let began = Instant::now();
    let scope = Scope::new("bench", &format!("{tasks}"));
    let each = |task| {
        let (store, scope) = (store.clone(), scope.clone());
        tokio::spawn(async move {
            let mut times = Vec::new();
            for number in (task..ids).step_by(usize::try_from(tasks).unwrap()) {
                let began = Instant::now();
                handle(&store, &scope, number).await;
                times.push(began.elapsed());
            }
            times
        })
    };
    let mut times = Vec::new();
    for task in (0..tasks).map(each).collect::<Vec<_>>() {
        times.extend(task.await.unwrap());
    }
    let took = began.elapsed();
    times.sort_unstable();
    let at = |thousandth: usize| times[(times.len() - 1) * thousandth / 1_000];
    println!(
        "  {tasks:>3} tasks: {:>8.0} claims + completes a second; each {:.1?}, of 1,000 the slowest {:.1?}, of all {:.1?}",
        ids as f64 / took.as_secs_f64(),
        at(500),
        at(999),
        at(1_000),
    );
}

async fn handle(store: &DurableStore, scope: &Scope, number: u64) {
    let key = scope.key(&MessageId::new(number.to_string()).unwrap());
    let token = Token::random();
    match store.claim(&key, &Ask::new(token, LEASE, WINDOW)).await.unwrap() {
        Claim::Acquired { fence, .. } => {
            store.complete(&key, Run { token, fence }, WINDOW).await.unwrap();
        }
        other => panic!("{other:?}"),
    }
}

/// Copies of ids all over the store, one at a time.
async fn duplicates(store: &DurableStore, ids: u64) {
    let scope = Scope::new("bench", "256");
    let began = Instant::now();
    for number in (0..ids).step_by(usize::try_from(ids / 10_000).unwrap().max(1)) {
        let key = scope.key(&MessageId::new(number.to_string()).unwrap());
        let claim = store.claim(&key, &Ask::new(Token::random(), LEASE, WINDOW)).await.unwrap();
        assert!(matches!(claim, Claim::Done { .. }), "{claim:?}");
    }
    println!("  {:>9.1?} for a duplicate, one at a time", began.elapsed() / 10_000);
}

fn size(folder: &Path) -> u64 {
    let of = |entry: fs::DirEntry| match entry.metadata().unwrap() {
        about if about.is_dir() => size(&entry.path()),
        about => about.len(),
    };
    fs::read_dir(folder).unwrap().map(|entry| of(entry.unwrap())).sum()
}

/// Of this process, as Linux counts it.
fn resident() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    pages.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or_default() * 4_096
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}
