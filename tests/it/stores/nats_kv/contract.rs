//! The contract of all stores.

use std::sync::Arc;

use async_trait::async_trait;
use guestlist::testing::store_contract::{LONG, Pace, StoreFixture, store_contract};
use tokio::sync::Mutex;

use super::server::Server;
use super::*;

/// A bucket on a server of its own, which can be restarted.
struct Bucket {
    server: Mutex<Server>,
    url: String,
}

const BUCKET: &str = "contract";

/// Less often than elsewhere: the suite has hundreds of handles.
const OBSERVE: Duration = Duration::from_millis(250);

impl Bucket {
    async fn new() -> Self {
        let server = Server::start().await;
        Self { url: server.url(), server: Mutex::new(server) }
    }
}

#[async_trait]
impl StoreFixture for Bucket {
    async fn open(&self) -> Arc<dyn DedupStore> {
        let options = options(BUCKET).window(LONG).observe_every(OBSERVE);
        Arc::new(options.connect(&self.url).await.expect("the bucket can be opened"))
    }

    async fn lose(&self, key: &DedupKey) {
        let stream = stranger(&self.url).await.get_stream(format!("KV_{BUCKET}")).await.unwrap();
        stream.purge().filter(format!("$KV.{BUCKET}.{key}")).await.unwrap();
    }

    async fn lose_everything(&self) -> bool {
        stranger(&self.url).await.delete_key_value(BUCKET).await.unwrap();
        true
    }

    async fn restart(&self) -> bool {
        self.server.lock().await.restart().await;
        true
    }

    async fn write_unknown_version(&self, key: &DedupKey) -> bool {
        let bucket = stranger(&self.url).await.get_key_value(BUCKET).await.unwrap();
        bucket.put(key.to_string(), vec![255; 60].into()).await.unwrap();
        true
    }

    fn pace(&self) -> Pace {
        let short = Duration::from_millis(500);
        // The look that dates a record may come so late, and its age is known to a thirty-second part.
        Pace { short, late: 2 * OBSERVE + short / 32, longest: LONG, ..Pace::default() }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_keeps_the_contract_of_all_stores() {
    store_contract(&Bucket::new().await).await;
}
