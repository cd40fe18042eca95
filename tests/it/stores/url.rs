//! Stores by URL: which one it is, who shares it, and what an error says.

use std::error::Error as _;
use std::sync::Arc;

use guestlist::broker::memory::MemoryBroker;
use guestlist::dedup::{MemoryStore, connect};
use guestlist::testing::FaultyStore;
use guestlist::{
    CancellationToken, ConfigError, Consumer, Error, ErrorKind, Message, Pipeline, Queue, Status,
};

const SECRET: &str = "hunter2";

/// Everything that an error tells.
fn story(error: &Error) -> String {
    let source = error.source().map(ToString::to_string).unwrap_or_default();
    format!("{error} {error:?} {source}")
}

#[tokio::test]
async fn an_unknown_scheme_is_refused_without_the_credentials() {
    for url in ["mongodb://app:hunter2@localhost", "hunter2", "app:hunter2@localhost", ""] {
        let error = connect(url).await.unwrap_err();
        let scheme = url.split_once(':').map_or("", |(scheme, _)| scheme);
        let story = format!("{error} {error:?}");
        assert!(story.contains(scheme) && story.contains("redis://"), "{story}");
        assert!(!story.contains(SECRET), "{story}");
    }
}

#[tokio::test]
async fn a_store_that_this_build_lacks_is_refused_by_its_feature() {
    let absent: &[(&str, &str, bool)] = &[
        ("file:/tmp/hunter2", "durable", cfg!(feature = "durable")),
        ("redis://app:hunter2@localhost", "redis", cfg!(feature = "redis")),
        ("rediss://app:hunter2@localhost", "redis", cfg!(feature = "redis")),
        ("valkey+sentinel://app:hunter2@one,two/payments", "redis", cfg!(feature = "redis")),
        ("redis+cluster://app:hunter2@one,two", "redis", cfg!(feature = "redis")),
        ("postgres://app:hunter2@localhost/shop", "postgres", cfg!(feature = "postgres")),
        ("postgresql://app:hunter2@localhost/shop", "postgres", cfg!(feature = "postgres")),
        ("nats://app:hunter2@localhost/shop", "nats", cfg!(feature = "nats")),
    ];
    for (url, feature, _) in absent.iter().filter(|(_, _, present)| !present) {
        let error = connect(url).await.unwrap_err();
        assert!(error.to_string().contains(&format!("`{feature}`")), "{error}");
        assert!(!format!("{error} {error:?}").contains(SECRET), "{error:?}");
    }
}

/// Queues of one broker, in one scope, and a consumer of them.
struct Desk {
    broker: MemoryBroker,
    queues: Vec<&'static str>,
}

impl Desk {
    fn new(queues: &[&'static str]) -> Self {
        let broker = MemoryBroker::new();
        for queue in queues {
            broker.declare(queue);
            broker.send(queue, Message::builder("{}").transport_id("order-1")).unwrap();
        }
        broker.declare("dead");
        Self { broker, queues: queues.to_vec() }
    }

    fn queue(&self, nth: usize) -> Queue {
        Queue::new(self.queues[nth]).scope("shop").dead_letter("dead").handler(async |_: Message| Ok(()))
    }

    fn consumer(&self) -> Consumer {
        Consumer::new(self.broker.clone())
    }

    /// Runs until all queues are empty; how many were handled, and how many were duplicates.
    async fn run(&self, consumer: Consumer) -> (u64, u64) {
        let status: Status = consumer.status();
        let stop = CancellationToken::new();
        let task = tokio::spawn(consumer.run_until(stop.clone().cancelled_owned()));
        for queue in &self.queues {
            self.broker.drained(queue).await.unwrap();
        }
        stop.cancel();
        task.await.unwrap().unwrap();
        let sum = |count: fn(&guestlist::QueueStatus) -> u64| status.queues().iter().map(count).sum();
        (sum(|queue| queue.handled), sum(|queue| queue.duplicates))
    }
}

#[tokio::test(start_paused = true)]
async fn queues_with_the_same_url_share_a_store() {
    let desk = Desk::new(&["one", "two"]);
    let consumer = desk.consumer();
    let consumer =
        consumer.queue(desk.queue(0).store_url("memory:")).queue(desk.queue(1).store_url("memory:"));
    assert_eq!(desk.run(consumer).await, (1, 1), "one of the two is a copy");
}

#[tokio::test(start_paused = true)]
async fn queues_with_different_stores_do_not() {
    let desk = Desk::new(&["one", "two", "three"]);
    let consumer = desk
        .consumer()
        .queue(desk.queue(0).store_url("memory:"))
        .queue(desk.queue(1).store(MemoryStore::new()))
        .queue(desk.queue(2));
    assert_eq!(desk.run(consumer).await, (3, 0));
}

#[tokio::test(start_paused = true)]
async fn the_consumers_store_is_for_queues_that_name_none() {
    let desk = Desk::new(&["one", "two"]);
    let store = FaultyStore::new(MemoryStore::new());
    let consumer = desk.consumer().store_url("memory:");
    let consumer = consumer.queue(desk.queue(0)).queue(desk.queue(1).store(store.clone()));
    assert_eq!(desk.run(consumer).await, (2, 0));
    assert!(store.calls() > 0, "the queue's own choice counts");

    let desk = Desk::new(&["one", "two"]);
    let consumer = desk.consumer().store_url("memory:").queue(desk.queue(0)).queue(desk.queue(1));
    assert_eq!(desk.run(consumer).await, (1, 1), "they share it");
}

#[tokio::test(start_paused = true)]
async fn the_last_choice_counts() {
    let desk = Desk::new(&["one"]);
    let store = FaultyStore::new(MemoryStore::new());
    let queue = desk.queue(0).store_url("mongodb://localhost").store(store.clone());
    assert_eq!(desk.run(desk.consumer().queue(queue)).await, (1, 0));
    assert!(store.calls() > 0);
    let error = desk.consumer().queue(desk.queue(0).store(store).store_url("mongodb://localhost"));
    assert_eq!(error.run_until(std::future::pending()).await.unwrap_err().kind(), ErrorKind::Store);
}

#[tokio::test]
async fn a_store_that_cannot_be_connected_to_stops_the_start_and_names_the_queue() {
    let desk = Desk::new(&["one", "two"]);
    let broken = "mongodb://app:hunter2@localhost";
    for consumer in [
        desk.consumer().queue(desk.queue(0)).queue(desk.queue(1).store_url(broken)),
        desk.consumer().queue(desk.queue(0).store_url("memory:")).queue(desk.queue(1)).store_url(broken),
    ] {
        let shown = format!("{consumer:?}");
        let error = consumer.run_until(std::future::pending()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Store);
        let story = story(&error);
        assert!(story.contains("`two`") && story.contains("mongodb"), "{story}");
        assert!(!story.contains(SECRET) && !shown.contains(SECRET), "{story} {shown}");
    }
    for queue in ["one", "two"] {
        assert_eq!(desk.broker.depth(queue).unwrap(), 1, "nothing was consumed");
    }
}

#[test]
fn a_pipeline_refuses_a_store_that_nobody_would_connect_to() {
    let desk = Desk::new(&["one"]);
    let queue = desk.queue(0).store_url("redis://app:hunter2@localhost");
    assert!(!format!("{queue:?}").contains(SECRET), "{queue:?}");
    let error = Pipeline::new(queue, Arc::new(desk.broker)).unwrap_err();
    assert_eq!(error, ConfigError::StoreUrl { queue: "one".to_owned() });
}
