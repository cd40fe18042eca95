//! The contract of all stores.

use std::sync::Arc;

use async_trait::async_trait;
use guestlist::testing::store_contract::{
    Pace, StoreFixture, it_answers_as_the_machine_does, store_contract,
};
use tokio::sync::Mutex;

use super::server::Server;
use super::*;

/// A place on a server of its own, or on the shared one, which is not ours to restart.
struct OnPostgres {
    place: Place,
    server: Option<Mutex<Server>>,
}

impl OnPostgres {
    async fn shared() -> Self {
        Self { place: Place::migrated().await, server: None }
    }

    async fn of_its_own() -> Self {
        let server = Server::start().await;
        let place = Place::at(server.url()).await;
        place.builder().migrate().await.unwrap();
        Self { place, server: Some(Mutex::new(server)) }
    }
}

#[async_trait]
impl StoreFixture for OnPostgres {
    async fn open(&self) -> Arc<dyn DedupStore> {
        // The cases run side by side with two handles each: with more connections, the server would have none left.
        Arc::new(self.place.builder().connections(1).connect().await.unwrap())
    }

    async fn lose(&self, key: &DedupKey) {
        let key = u128::from_be_bytes(*key.as_bytes());
        self.place.sql(&format!("delete from {{s}}.claims where key = '{key:032x}'")).await;
    }

    async fn lose_everything(&self) -> bool {
        self.place.sql("truncate {s}.claims").await;
        true
    }

    async fn restart(&self) -> bool {
        let Some(server) = &self.server else { return false };
        server.lock().await.restart(true).await;
        true
    }

    async fn write_unknown_version(&self, key: &DedupKey) -> bool {
        acquired(&self.place.store().await, key, &ask()).await;
        let key = u128::from_be_bytes(*key.as_bytes());
        self.place.sql(&format!("update {{s}}.claims set version = 2 where key = '{key:032x}'")).await;
        true
    }

    fn pace(&self) -> Pace {
        let longest = Duration::from_micros(1 << 62);
        Pace { short: Duration::from_millis(500), longest, ..Pace::default() }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_keeps_the_contract_over_a_crash_of_the_server() {
    store_contract(&OnPostgres::of_its_own().await).await;
}

#[tokio::test]
async fn it_answers_as_the_machine_does_at_the_servers_own_clock() {
    let fixture = OnPostgres::shared().await;
    it_answers_as_the_machine_does(&fixture).await;
    fixture.place.drop().await;
}
