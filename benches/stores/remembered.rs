//! What an id costs while it is remembered. Each row is a process of its own, so that nothing was allocated before.

use std::env;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use guestlist::DedupKey;
use guestlist::dedup::protocol::{Ask, Claim, Run, Token};
use guestlist::dedup::{DedupStore, DurableStore, MemoryStore};
use tokio::runtime::Builder;
use tokio::task::JoinSet;

use crate::calls::{LEASE, WINDOW, duplicate, handle};

/// The argument that makes a process such a row.
pub(crate) const ACT: &str = "remember";

/// A row has so many ids as it comes to in this time.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn run(quick: bool) {
    println!("\nremembered ids");
    let rows = [("memory", 1_000_000), ("memory", 10_000_000), ("durable", 1_000_000)];
    for (store, ids) in rows {
        let ids = if quick { ids / 10 } else { ids };
        eprintln!("... {ids} ids, {store}");
        let mut row = Command::new(env::current_exe().unwrap());
        row.args([ACT, store, &ids.to_string()]).stdin(Stdio::null());
        assert!(row.status().unwrap().success(), "the row was ended");
    }
}

pub(crate) fn child(store: &str, ids: &str) {
    let ids = ids.parse().expect("a number of ids");
    match store {
        "memory" => memory(ids),
        _ => Builder::new_multi_thread().worker_threads(2).build().unwrap().block_on(durable(ids)),
    }
}

fn memory(ids: u64) {
    let before = resident();
    let store = MemoryStore::with_capacity(ids);
    let began = Instant::now();
    let mut done = 0;
    while done < ids && began.elapsed() < PATIENCE {
        remember(&store, done);
        done += 1;
    }
    let took = began.elapsed();
    // It also has the store catch up with its own housekeeping.
    assert_eq!(store.forgotten_early(), 0);
    let each = (resident() - before) / done;
    println!(
        "  memory: {done} ids, {each} bytes resident for each; {:.1?} for a claim + complete",
        took / u32::try_from(done).unwrap()
    );
}

fn remember(store: &MemoryStore, number: u64) {
    let store = store.in_process().unwrap();
    let (key, ask) = (key(number), Ask::new(Token::random(), LEASE, WINDOW));
    let claim = store.claim_now(&key, &ask);
    let Claim::Acquired { fence, .. } = claim else { panic!("{claim:?}") };
    store.complete_now(&key, Run { token: ask.token, fence }, WINDOW);
}

async fn durable(ids: u64) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("guestlist-ids-{}", std::process::id()));
    let before = resident();
    let store = DurableStore::open(&folder).await.unwrap();
    let done = fill(&store, ids).await;
    let memory = (resident() - before) >> 20;
    let each = time_of_a_duplicate(&store, done).await;
    store.close().await.unwrap();
    let on_disk = size(&folder) / done;
    let began = Instant::now();
    DurableStore::open(&folder).await.unwrap().close().await.unwrap();
    let reopened = began.elapsed();
    fs::remove_dir_all(&folder).unwrap();
    println!(
        "  durable: {done} ids, {on_disk} bytes on disk for each, journals and all; {memory} MiB resident; \
         {each:.1?} for a duplicate, one at a time; {reopened:.1?} to open it again"
    );
}

/// How many it came to.
async fn fill(store: &DurableStore, ids: u64) -> u64 {
    const BLOCK: u64 = 50_000;
    let (began, mut done) = (Instant::now(), 0);
    while done < ids && began.elapsed() < PATIENCE {
        fill_block(store, done..ids.min(done + BLOCK)).await;
        done = ids.min(done + BLOCK);
    }
    done
}

async fn fill_block(store: &DurableStore, block: Range<u64>) {
    const TASKS: usize = 256;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (store, numbers) = (store.clone(), block.clone().skip(task).step_by(TASKS));
        tasks.spawn(async move {
            for number in numbers {
                handle(&store, &key(number)).await;
            }
        });
    }
    tasks.join_all().await;
}

/// Of ids all over the store.
async fn time_of_a_duplicate(store: &DurableStore, ids: u64) -> Duration {
    const COPIES: u32 = 5_000;
    let began = Instant::now();
    for copy in 0..u64::from(COPIES) {
        duplicate(store, &key(copy * 7_919 % ids)).await;
    }
    began.elapsed() / COPIES
}

/// Spread over all keys, as hashes are.
fn key(number: u64) -> DedupKey {
    DedupKey::from_bytes(
        u128::from(number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835).to_be_bytes(),
    )
}

fn size(folder: &Path) -> u64 {
    let of = |entry: fs::DirEntry| match entry.metadata().unwrap() {
        about if about.is_dir() => size(&entry.path()),
        about => about.len(),
    };
    fs::read_dir(folder).unwrap().map(|entry| of(entry.unwrap())).sum()
}

/// Of this process, in bytes, as Linux counts it.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line VmRSS");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number of kB") * 1024
}
