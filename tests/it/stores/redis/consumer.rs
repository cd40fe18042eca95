//! A whole consumer over Redis.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guestlist::broker::memory::MemoryBroker;
use guestlist::{CancellationToken, Consumer, Message, Queue};
use tokio::time::{sleep, timeout};

use super::server::{PATIENCE, Server};

const QUEUE: &str = "orders";
const ORDERS: usize = 400;

/// How often each order was handled.
type Runs = Arc<Mutex<HashMap<String, u32>>>;

/// Orders, each sent twice, and a consumer of them that remembers by this URL.
fn consumer(broker: &MemoryBroker, runs: &Runs, store: &str) -> Consumer {
    broker.declare(QUEUE);
    broker.declare("orders.dead");
    for copy in 0..2 {
        for order in 0..ORDERS {
            let id = format!("order-{}", (order + copy * 7) % ORDERS);
            broker.send(QUEUE, Message::builder(id.clone()).transport_id(id)).unwrap();
        }
    }
    let runs = Arc::clone(runs);
    let handler = move |message: Message| {
        let runs = Arc::clone(&runs);
        async move {
            sleep(Duration::from_millis(5)).await;
            let id = String::from_utf8(message.payload().to_vec()).unwrap();
            *runs.lock().unwrap().entry(id).or_default() += 1;
            Ok(())
        }
    };
    Consumer::new(broker.clone())
        .store_url(store)
        .queue(Queue::new(QUEUE).dead_letter("orders.dead").handler(handler))
}

/// Runs until the queue is empty, with something done when half the orders were handled.
async fn run(broker: &MemoryBroker, runs: &Runs, consumer: Consumer, halfway: impl AsyncFnOnce()) {
    let stop = CancellationToken::new();
    let task = tokio::spawn(consumer.run_until(stop.clone().cancelled_owned()));
    super::server::until("half are handled", || async { runs.lock().unwrap().len() >= ORDERS / 2 }).await;
    halfway().await;
    timeout(PATIENCE, broker.drained(QUEUE)).await.expect("it goes on to the end").unwrap();
    stop.cancel();
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn each_order_is_handled_once() {
    let (server, broker, runs) = (Server::start("").await, MemoryBroker::new(), Runs::default());
    let consumer = consumer(&broker, &runs, &server.url());
    let status = consumer.status();
    run(&broker, &runs, consumer, async || {}).await;
    assert!(runs.lock().unwrap().values().all(|count| *count == 1), "{runs:?}");
    assert_eq!(runs.lock().unwrap().len(), ORDERS);
    assert_eq!(status.queue(QUEUE).unwrap().duplicates, ORDERS as u64);
}

#[tokio::test]
async fn flushall_in_mid_run_only_runs_again() {
    let (server, broker, runs) = (Server::start("").await, MemoryBroker::new(), Runs::default());
    let consumer = consumer(&broker, &runs, &server.url());
    let plain = server.plain().await;
    run(&broker, &runs, consumer, async || plain.ask("FLUSHALL").await).await;
    let runs = runs.lock().unwrap();
    assert_eq!(runs.len(), ORDERS, "nothing is lost");
    assert!(runs.values().all(|count| (1..=2).contains(count)), "{runs:?}");
}

#[tokio::test]
async fn a_restart_in_mid_run_is_waited_for() {
    let (mut server, broker, runs) =
        (Server::start("appendfsync always").await, MemoryBroker::new(), Runs::default());
    let consumer = consumer(&broker, &runs, &server.url());
    run(&broker, &runs, consumer, async || {
        server.stop();
        server.start_again();
    })
    .await;
    assert_eq!(runs.lock().unwrap().len(), ORDERS);
    assert!(runs.lock().unwrap().values().all(|count| *count == 1), "{runs:?}");
}
