//! The contract of all stores. A restart drops the store and opens its folder again.

use std::sync::Arc;

use async_trait::async_trait;
use guestlist::testing::store_contract::{
    Pace, StoreFixture, a_record_of_an_unknown_version_is_an_error, store_contract,
};

use super::*;
use crate::stores::swap::Swap;

struct InFolder {
    temp: Temp,
    durability: Durability,
    store: Swap,
    /// Nobody else calls it now, so that it can be opened anew in between.
    alone: bool,
}

impl InFolder {
    fn new(durability: Durability, alone: bool) -> Self {
        let temp = Temp::new();
        let store = Swap::new(opened(&temp.0, durability));
        Self { temp, durability, store, alone }
    }

    /// Does this to the folder while nobody has it.
    fn reopen_after(&self, change: impl FnOnce(&Path)) {
        self.store.reopen(|| {
            until_free(&self.temp.0);
            change(&self.temp.0);
            opened(&self.temp.0, self.durability)
        });
    }
}

/// From within a runtime, which must not be blocked on: in a thread of its own.
fn opened(folder: &Path, durability: Durability) -> DurableStore {
    let open = DurableStore::builder(folder).durability(durability).open();
    let run = || tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(open);
    std::thread::scope(|scope| scope.spawn(run).join().unwrap()).unwrap()
}

#[async_trait]
impl StoreFixture for InFolder {
    async fn open(&self) -> Arc<dyn DedupStore> {
        Arc::new(self.store.clone())
    }

    async fn lose(&self, key: &DedupKey) {
        self.store.forget(key).await.unwrap();
    }

    async fn lose_everything(&self) -> bool {
        self.reopen_after(|folder| fs::remove_dir_all(folder.join("data")).unwrap());
        true
    }

    async fn restart(&self) -> bool {
        self.reopen_after(|_| {});
        true
    }

    async fn write_unknown_version(&self, key: &DedupKey) -> bool {
        if self.alone {
            self.reopen_after(|folder| {
                let database = fjall::Database::builder(folder.join("data")).open().unwrap();
                let records = database.keyspace("records", Default::default).unwrap();
                records.insert(key.as_bytes(), [2; 67]).unwrap();
            });
        }
        self.alone
    }

    fn pace(&self) -> Pace {
        Pace::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_keeps_the_contract() {
    for durability in [Durability::Process, Durability::Power] {
        store_contract(&InFolder::new(durability, false)).await;
    }
}

#[tokio::test]
async fn a_record_of_another_format_is_an_error_until_it_is_forgotten() {
    a_record_of_an_unknown_version_is_an_error(&InFolder::new(Durability::Process, true)).await;
}
