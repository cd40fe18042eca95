//! What holds of every store beyond this process: its URL finds it, and each of its calls may fail once.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use guestlist::DedupKey;
use guestlist::dedup::protocol::{Ask, Claim, Held, Run, Token};
use guestlist::dedup::{DedupStore, connect};

use crate::support::{HOUR, MINUTE, Trial, every_call_fails_once};

#[cfg(any(feature = "redis", feature = "postgres", feature = "nats"))]
fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run by scripts/test"))
}

/// A folder that is gone in the end.
struct Folder(PathBuf);

impl Folder {
    #[cfg(feature = "durable")]
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("guestlist-url-{:?}", Token::random())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What one connection to a URL has done, the next one knows.
async fn is_found_again(url: &str) {
    let key = DedupKey::from_bytes(Token::random().bits().to_le_bytes());
    let ask = Ask::new(Token::random(), MINUTE, HOUR);
    let store = connect(url).await.unwrap();
    assert!(store.features().survives_restart);
    let Claim::Acquired { fence, .. } = store.claim(&key, &ask).await.unwrap() else { panic!("it is new") };
    let run = Run { token: ask.token, fence };
    assert_eq!(store.complete(&key, run, HOUR).await.unwrap(), Held::Yes);
    drop(store);
    let again = open_again(url).await.claim(&key, &Ask { token: Token::random(), ..ask }).await.unwrap();
    assert!(matches!(again, Claim::Done { .. }), "{again:?}");
}

/// A folder is free soon after its store is dropped.
async fn open_again(url: &str) -> Arc<dyn DedupStore> {
    for _ in 0..100 {
        if let Ok(store) = connect(url).await {
            return store;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    connect(url).await.unwrap()
}

async fn every_call_may_fail(url: &str) {
    let store = connect(url).await.unwrap();
    every_call_fails_once(|| std::future::ready(Arc::clone(&store)), Trial::SWIFT).await;
}

macro_rules! stores {
    ($($name:ident if $feature:literal at $url:expr;)+) => {$(
        #[cfg(feature = $feature)]
        mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn it_is_found_by_its_url() {
                let (url, _folder): (String, Option<Folder>) = $url;
                is_found_again(&url).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn every_call_may_fail_once() {
                let (url, _folder): (String, Option<Folder>) = $url;
                every_call_may_fail(&url).await;
            }
        }
    )+};
}

stores! {
    durable if "durable" at {
        let folder = Folder::new();
        (format!("file:{}", folder.0.display()), Some(folder))
    };
    redis if "redis" at (env("GUESTLIST_REDIS_URL"), None);
    postgres if "postgres" at {
        let url = format!("{}?schema=url_{:?}", env("GUESTLIST_POSTGRES_URL"), Token::random());
        guestlist::dedup::PostgresStore::builder(&url).unwrap().migrate().await.unwrap();
        (url, None)
    };
    nats if "nats" at (format!("{}/url-{:?}", env("GUESTLIST_NATS_URL"), Token::random()), None);
}

/// The near cache over Redis: each handle a process with a cache of its own.
#[cfg(feature = "redis")]
mod near_redis {
    use async_trait::async_trait;
    use guestlist::dedup::NearCache;
    use guestlist::testing::store_contract::{Pace, StoreFixture, store_contract};

    use super::*;

    const AGE: Duration = Duration::from_millis(200);

    struct Near(Arc<dyn DedupStore>);

    #[async_trait]
    impl StoreFixture for Near {
        async fn open(&self) -> Arc<dyn DedupStore> {
            Arc::new(NearCache::new(Arc::clone(&self.0)).with_max_age(AGE))
        }

        async fn lose(&self, key: &DedupKey) {
            self.0.forget(key).await.unwrap();
        }

        async fn lose_everything(&self) -> bool {
            false
        }

        fn pace(&self) -> Pace {
            Pace { late: AGE, ..Pace::default() }
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn it_keeps_the_contract() {
        store_contract(&Near(connect(&env("GUESTLIST_REDIS_URL")).await.unwrap())).await;
    }
}
