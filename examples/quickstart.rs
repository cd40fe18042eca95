//! Ten seconds of guestlist, no service needed: `cargo run --example quickstart`
//!
//! A stream of orders arrives over the in-memory broker: some twice, one a second time while the first is still being
//! handled, one that fails and works on the second attempt, one that never works. Each order is charged once.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use guestlist::broker::copy::DeadLetter;
use guestlist::broker::memory::MemoryBroker;
use guestlist::prelude::*;
use guestlist::{Cause, Event, EventKind, Observer, Outcome};

#[derive(serde::Deserialize)]
struct Order {
    customer: String,
    cents: i64,
}

/// What the bank was asked to do: the effect that must not happen twice.
#[derive(Clone, Default)]
struct Bank(Arc<Mutex<BTreeMap<String, i64>>>);

impl Bank {
    fn charge(&self, customer: &str, cents: i64) {
        *self.accounts().entry(customer.to_owned()).or_default() += cents;
    }

    fn accounts(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The handler that a team already has.
async fn charge(bank: Bank, order: Order, attempt: u32) -> Result<(), Failure> {
    if order.cents <= 0 {
        return Err(Failure::permanent("the amount must be positive")); // → dead letter
    }
    if order.customer == "bob" && attempt == 1 {
        return Err("the bank's line is busy".into()); // any error: → tried again
    }
    tokio::time::sleep(Duration::from_millis(150)).await;
    bank.charge(&order.customer, order.cents);
    Ok(()) // → remembered, then acked
}

/// (id, body, what a reader should know)
const ORDERS: [(&str, &str, &str); 9] = [
    ("order-1", r#"{"customer": "ann", "cents": 5000}"#, "first copy"),
    ("order-1", r#"{"customer": "ann", "cents": 5000}"#, "a copy, while the first is being handled"),
    ("order-2", r#"{"customer": "bob", "cents": 1999}"#, "will fail once"),
    ("order-3", r#"{"customer": "cyd", "cents": 250}"#, "first copy"),
    ("order-4", r#"{"customer": "dan", "cents": -1}"#, "can never work"),
    ("order-5", r#"{"customer": "eve", "#, "not even JSON"),
    ("order-3", r#"{"customer": "cyd", "cents": 250}"#, "the sender sent it again"),
    ("order-6", r#"{"customer": "fay", "cents": 700}"#, "first copy"),
    ("order-1", r#"{"customer": "ann", "cents": 5000}"#, "and again, by the network"),
];

#[tokio::main]
async fn main() -> guestlist::Result<ExitCode> {
    let (bank, broker, diary) = (Bank::default(), MemoryBroker::new(), Diary);
    broker.declare("orders");

    let charges = bank.clone();
    let consumer = Consumer::new(broker.clone()).queue(
        Queue::new("orders")
            .declare()
            .dead_letter("orders.dead")
            .backoff(Backoff::new(Duration::from_millis(300), 2, Duration::from_secs(1)).without_jitter())
            .observer(Arc::new(diary.clone()))
            .handler(move |Json(order): Json<Order>, Attempt(attempt): Attempt| {
                charge(charges.clone(), order, attempt)
            }),
    );
    let status = consumer.status();

    println!("Nine deliveries of six orders:\n");
    let producer = async {
        for (id, body, remark) in ORDERS {
            println!("  sent      {id}   {remark}");
            broker.send("orders", Message::builder(body).transport_id(id))?;
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
        broker.drained("orders").await
    };
    let sent = Arc::new(Mutex::new(Ok(())));
    let ended = Arc::clone(&sent);
    consumer
        .run_until(async {
            let result = producer.await;
            *ended.lock().unwrap_or_else(PoisonError::into_inner) = result;
        })
        .await?;
    std::mem::replace(&mut *sent.lock().unwrap_or_else(PoisonError::into_inner), Ok(()))?;

    let queue = status.queue("orders").unwrap_or_default();
    let dead_letters = broker.messages("orders.dead")?;
    println!("\n  handled       {:>2}   each once", queue.handled);
    println!("  skipped       {:>2}   copies of orders that were done", queue.duplicates);
    println!(
        "  failed once   {:>2}   and worked on the next attempt",
        queue.failures.get("transient").unwrap_or(&0)
    );
    println!("  dead letters  {:>2}   kept, with their story:", dead_letters.len());
    for letter in &dead_letters {
        if let Some(story) = DeadLetter::read(letter) {
            println!("                     {:<11} {}", story.cause, story.error);
        }
    }
    println!("\n  charged       {:?} (cents)", bank.accounts());
    Ok(check(&bank, &queue, dead_letters.len()))
}

/// The example checks its own totals: a wrong one is exit code 1.
fn check(bank: &Bank, queue: &guestlist::QueueStatus, dead_letters: usize) -> ExitCode {
    let expected = [("ann", 5000), ("bob", 1999), ("cyd", 250), ("fay", 700)];
    let right = bank.accounts().iter().map(|(who, cents)| (who.as_str(), *cents)).eq(expected)
        && (queue.handled, queue.duplicates, dead_letters) == (4, 3, 2)
        && queue.failures.get("transient") == Some(&1);
    println!(
        "\n  {}",
        if right {
            "Each customer was charged exactly once. All totals are right."
        } else {
            "The totals are WRONG."
        }
    );
    if right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints what happens, as it happens.
#[derive(Clone, Default)]
struct Diary;

impl Observer for Diary {
    fn observe(&self, event: &Event) {
        let what = match event.kind {
            EventKind::Started => format!("running, attempt {}", event.attempt),
            EventKind::Waited => "waits: its first copy is being handled".to_owned(),
            EventKind::Acked(Outcome::Handled) => "handled, remembered, acked".to_owned(),
            EventKind::Acked(Outcome::Duplicate) => "skipped: done before".to_owned(),
            EventKind::Acked(Outcome::DeadLettered(cause)) => format!("dead letter: {cause}"),
            EventKind::Failed(Cause::Transient) => "failed: it comes again, later".to_owned(),
            _ => return,
        };
        println!("    #{:<7} {what}", event.delivery);
    }
}
