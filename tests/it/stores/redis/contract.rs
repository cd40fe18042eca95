//! The contract of all stores.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use guestlist::DedupKey;
use guestlist::dedup::{DedupStore, RedisStore};
use guestlist::testing::store_contract::{Pace, StoreFixture, store_contract};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use super::server::{PATIENCE, Server, until};

/// Stores on a server of their own, since the suite restarts it.
struct OnRedis {
    url: String,
    server: Mutex<Server>,
}

impl OnRedis {
    async fn start() -> Self {
        let server = Server::start("appendfsync always").await;
        Self { url: server.url(), server: Mutex::new(server) }
    }

    /// The suite connects more than a hundred times at once, to a server that waits for its disk: one of them may be longer
    /// in coming than the store waits.
    async fn store(&self) -> RedisStore {
        let give_up_at = Instant::now() + PATIENCE;
        loop {
            match RedisStore::connect(&self.url).await {
                Ok(store) => return store,
                Err(error) => assert!(Instant::now() < give_up_at, "{error:?}"),
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

#[async_trait]
impl StoreFixture for OnRedis {
    async fn open(&self) -> Arc<dyn DedupStore> {
        Arc::new(self.store().await)
    }

    async fn lose(&self, key: &DedupKey) {
        let redis_key = self.store().await.redis_key(key);
        let _: u32 = self.server.lock().await.plain().await.ask(&format!("DEL {redis_key}")).await;
    }

    async fn lose_everything(&self) -> bool {
        let () = self.server.lock().await.plain().await.ask("FLUSHALL").await;
        true
    }

    async fn restart(&self) -> bool {
        let mut server = self.server.lock().await;
        server.stop();
        server.start_again();
        server.answers().await;
        until("its data is loaded", || async { RedisStore::connect(&self.url).await.is_ok() }).await;
        true
    }

    async fn write_unknown_version(&self, key: &DedupKey) -> bool {
        let redis_key = self.store().await.redis_key(key);
        self.server.lock().await.plain().await.set(&redis_key, b"\x02 from the future").await;
        true
    }

    fn pace(&self) -> Pace {
        Pace::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_keeps_the_contract() {
    store_contract(&OnRedis::start().await).await;
}
