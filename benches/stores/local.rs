//! The stores without a server.

use std::fs;
use std::path::Path;

use guestlist::dedup::{Durability, DurableStore, MemoryStore};

use crate::Bench;
use crate::calls::claim_and_complete;
use crate::pairs::{Contender, Group};

pub(crate) async fn run(bench: &Bench) {
    bench.measure(&memory()).await;
    for durability in [Durability::Process, Durability::Power] {
        durable(bench, durability).await;
    }
}

fn memory() -> Group {
    let call = Contender::new("MemoryStore", MemoryStore::new(), |store| async move {
        claim_and_complete(&*store).await;
    });
    Group::of(
        "memory, claim + complete; it answers at once, so that no more are in flight than the 2 threads have",
        call,
    )
}

async fn durable(bench: &Bench, durability: Durability) {
    // Where the build is, since a temporary folder may be in memory.
    let folder =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("guestlist-bench-{}", std::process::id()));
    let store = DurableStore::builder(&folder).durability(durability).open().await.unwrap();
    let call = Contender::new("DurableStore", store.clone(), |store| async move {
        claim_and_complete(&*store).await;
    });
    let title = format!("folder, claim + complete; {durability:?}: what an answer survives");
    bench.measure(&Group::of(title, call)).await;
    store.close().await.unwrap();
    fs::remove_dir_all(&folder).unwrap();
}
