//! List, redrive and discard dead letters.
//!
//! `cargo run --example dead_letters` shows it in memory. On a broker, with its feature:
//!
//! ```text
//! cargo run --features amqp --example dead_letters -- --broker amqp://localhost --queue charges list
//! … redrive [RATE]      sends all letters back to work, at most RATE a second
//! … discard ID REASON   removes the letter of this id
//! ```
//!
//! `--letters PLACE` names the place of the letters (the queue's name and `.dead` by default), `--store URL` the consumer's store.

use std::process::ExitCode;
use std::sync::Arc;

use guestlist::admin::{Admin, Discard, Filter, Redrive};
use guestlist::broker::memory::MemoryBroker;
use guestlist::prelude::*;
use guestlist::{BoxError, Consumer};

const USAGE: &str = "dead_letters [--broker URL --queue NAME [--letters PLACE] [--store URL] list | redrive [RATE] | discard ID REASON]";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let done = if words.is_empty() { show().await } else { operate(&mut words).await };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:?}");
            ExitCode::FAILURE
        }
    }
}

/// On a broker.
async fn operate(words: &mut Vec<String>) -> Result<(), BoxError> {
    let (broker, name) = (option(words, "--broker").ok_or(USAGE)?, option(words, "--queue").ok_or(USAGE)?);
    let place = option(words, "--letters").unwrap_or_else(|| format!("{name}.dead"));
    let mut queue = Queue::new(name).dead_letter(place);
    if let Some(store) = option(words, "--store") {
        queue = queue.store_url(store);
    }
    let admin = Admin::connect(&broker, queue).await?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["list"] => list(&admin).await?,
        ["redrive"] => redrive(&admin, Redrive::new()).await?,
        ["redrive", rate] => redrive(&admin, Redrive::new().rate(rate.parse()?)).await?,
        ["discard", id, reason] => discard(&admin, Filter::new().letter(id), reason).await?,
        _ => return Err(USAGE.into()),
    }
    admin.close().await;
    Ok(())
}

/// Takes an option and its value out of the words.
fn option(words: &mut Vec<String>, name: &str) -> Option<String> {
    let at = words.iter().position(|word| word == name)?;
    words.remove(at);
    (at < words.len()).then(|| words.remove(at))
}

async fn list(admin: &Admin) -> Result<(), guestlist::Error> {
    let mut letters = admin.letters(Filter::new()).await?;
    while let Some(letter) = letters.next().await {
        let letter = letter?;
        println!("{letter}");
        println!("    {}", letter.record().map_or("", |record| &record.error));
    }
    println!("{}", letters.summary());
    Ok(())
}

/// Ctrl-C ends it between two letters; nothing is lost either way.
async fn redrive(admin: &Admin, how: Redrive) -> Result<(), guestlist::Error> {
    let interrupted = CancellationToken::new();
    let mut walk = admin.redrive(Filter::new(), how.until(interrupted.clone())).await?;
    tokio::spawn(async move {
        guestlist::signal().await;
        interrupted.cancel();
    });
    while let Some(treated) = walk.next().await {
        println!("{}", treated?);
    }
    println!("{}", walk.summary());
    Ok(())
}

async fn discard(admin: &Admin, filter: Filter, reason: &str) -> Result<(), guestlist::Error> {
    let summary = admin.discard(filter, Discard::new(reason)).await?.finish().await?;
    println!("{summary}");
    Ok(())
}

/// In memory: three charges fail while the bank is closed; it opens, and two are redriven; one is paid by hand.
async fn show() -> Result<(), BoxError> {
    let (broker, store) = (MemoryBroker::new(), MemoryStore::new());
    let charges = || Queue::new("charges").declare().dead_letter("charges.dead").store(store.clone());
    broker.declare("charges");
    for charge in ["charge-1", "charge-2", "charge-3"] {
        broker.send("charges", Message::builder("{}").transport_id(charge))?;
    }
    let closed = async |_: Message| -> Result<(), Failure> { Err(Failure::permanent("the bank is closed")) };
    consume(&broker, charges().handler(closed)).await?;

    let admin = Admin::over(Arc::new(broker.clone()), charges()).await?;
    println!("> list");
    list(&admin).await?;
    println!("> discard the letter of charge-1");
    let first = MessageId::new("charge-1").ok_or("an id")?;
    discard(&admin, Filter::new().id(first), "paid by hand").await?;
    println!("> redrive");
    redrive(&admin, Redrive::new().rate(10)).await?;

    consume(&broker, charges().handler(async |_: Message| Ok(()))).await?;
    println!("> the bank is open: {} letters are left", broker.depth("charges.dead")?);
    Ok(())
}

/// Until the queue is empty.
async fn consume(broker: &MemoryBroker, queue: Queue) -> Result<(), BoxError> {
    let drained = async { broker.drained("charges").await.unwrap_or_default() };
    Ok(Consumer::new(broker.clone()).queue(queue).run_until(drained).await?)
}
