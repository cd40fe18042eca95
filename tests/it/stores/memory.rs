//! The store in memory: the contract of all stores.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use guestlist::DedupKey;
use guestlist::dedup::{DedupStore, MemoryStore};
use guestlist::testing::FaultyStore;
use guestlist::testing::store_contract::{
    Pace, StoreFixture, it_answers_as_the_machine_does, store_contract,
};

use super::swap::Swap;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Clock {
    Real,
    /// A new store's clock starts at the wall clock's time: behind one that was moved on.
    Paused,
}

/// A store in memory; a restart leaves nothing of it.
struct InMemory {
    store: Swap,
    clock: Clock,
}

impl InMemory {
    fn new(clock: Clock) -> Self {
        Self { store: Swap::new(MemoryStore::new()), clock }
    }
}

#[async_trait]
impl StoreFixture for InMemory {
    async fn open(&self) -> Arc<dyn DedupStore> {
        Arc::new(self.store.clone())
    }

    async fn lose(&self, key: &DedupKey) {
        self.store.forget(key).await.unwrap();
    }

    async fn lose_everything(&self) -> bool {
        if self.clock == Clock::Real {
            self.store.reopen(MemoryStore::new);
        }
        self.clock == Clock::Real
    }

    async fn restart(&self) -> bool {
        self.lose_everything().await
    }

    fn pace(&self) -> Pace {
        Pace { short: Duration::from_millis(100), ..Pace::default() }
    }
}

/// The same through a double that could fail, and does not.
struct Faultless(InMemory);

#[async_trait]
impl StoreFixture for Faultless {
    async fn open(&self) -> Arc<dyn DedupStore> {
        Arc::new(FaultyStore::new(self.0.store.clone()))
    }

    async fn lose(&self, key: &DedupKey) {
        self.0.lose(key).await;
    }

    async fn lose_everything(&self) -> bool {
        self.0.lose_everything().await
    }

    fn pace(&self) -> Pace {
        self.0.pace()
    }
}

#[tokio::test(start_paused = true)]
async fn it_keeps_the_contract_with_a_paused_clock() {
    store_contract(&InMemory::new(Clock::Paused)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn it_keeps_the_contract_in_real_time() {
    store_contract(&InMemory::new(Clock::Real)).await;
}

#[tokio::test(start_paused = true)]
async fn it_keeps_the_contract_through_a_store_that_could_fail() {
    store_contract(&Faultless(InMemory::new(Clock::Paused))).await;
}

#[tokio::test(start_paused = true)]
async fn it_answers_as_the_machine_does_over_many_walks() {
    for _ in 0..40 {
        it_answers_as_the_machine_does(&InMemory::new(Clock::Paused)).await;
    }
}
