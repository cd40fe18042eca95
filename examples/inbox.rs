//! Charges accounts, each exactly once, in a database of yours:
//! `cargo run --features postgres --example inbox -- postgres://postgres@localhost/postgres`
//!
//! The charges arrive over the in-memory broker: twice each, and the handler fails every other time, after it has
//! written. With `AMQP` or `NATS` instead, only the line that makes the broker changes. Everything is made in the
//! schema `guestlist_example`, which is dropped at the end.

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use guestlist::Consumer;
use guestlist::broker::memory::MemoryBroker;
use guestlist::dedup::PostgresStore;
use guestlist::inbox::{PostgresInbox, PostgresTransaction};
use guestlist::prelude::*;
use sqlx::{Executor, PgPool};

#[derive(serde::Deserialize)]
struct Charge {
    account: String,
    cents: i64,
}

static RUNS: AtomicU32 = AtomicU32::new(0);

/// What it writes through `tx` becomes true together with the memory that the message is done, or not at all.
async fn charge(Json(charge): Json<Charge>, mut tx: PostgresTransaction) -> Result<(), Failure> {
    sqlx::query("UPDATE guestlist_example.accounts SET cents = cents - $1 WHERE name = $2")
        .bind(charge.cents)
        .bind(&charge.account)
        .execute(&mut *tx)
        .await?;
    if RUNS.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
        return Err("the line broke after the write".into()); // rolled back, and tried again
    }
    Ok(()) // the claim is completed, then all of it is committed, then the message is acked
}

async fn accounts(pool: &PgPool) -> Result<(), sqlx::Error> {
    pool.execute("CREATE SCHEMA guestlist_example").await?;
    pool.execute("CREATE TABLE guestlist_example.accounts (name text PRIMARY KEY, cents bigint NOT NULL)")
        .await?;
    pool.execute(
        "INSERT INTO guestlist_example.accounts SELECT 'account-' || i, 10000 FROM generate_series(1, 5) i",
    )
    .await?;
    Ok(())
}

fn charges() -> Result<MemoryBroker, Box<dyn Error>> {
    let broker = MemoryBroker::new();
    broker.declare("charges");
    broker.declare("charges.dead");
    for number in 1..=5 {
        for _ in 0..2 {
            let body = format!(r#"{{"account": "account-{number}", "cents": 2500}}"#);
            let id = format!("charge-{number}");
            broker.send("charges", Message::builder(body).transport_id(id))?;
        }
    }
    Ok(broker)
}

async fn consume(url: &str, pool: &PgPool, broker: MemoryBroker) -> Result<(), Box<dyn Error>> {
    let claims = PostgresStore::builder(url)?.schema("guestlist_example");
    claims.migrate().await?; // in production: a step of the deployment
    let inbox = PostgresInbox::new(claims.connect().await?, pool.clone()).await?;
    let queue = Queue::new("charges")
        .dead_letter("charges.dead")
        .window(DAY)
        .backoff(Backoff::new(Duration::from_millis(100), 2, Duration::from_secs(1)))
        .max_attempts(10)
        .inbox(inbox)
        .handler(charge);
    let drained = broker.clone();
    let stop = async move {
        if let Err(error) = drained.drained("charges").await {
            eprintln!("{error}");
        }
    };
    Consumer::new(broker).queue(queue).run_until(stop).await?;
    Ok(())
}

/// Whether every account was charged exactly once.
async fn show(pool: &PgPool) -> Result<bool, sqlx::Error> {
    let rows: Vec<(String, i64)> =
        sqlx::query_as("SELECT name, cents FROM guestlist_example.accounts ORDER BY name")
            .fetch_all(pool)
            .await?;
    for (name, cents) in &rows {
        println!("{name}: {cents}");
    }
    println!("{} runs for 5 charges, which arrived twice", RUNS.load(Ordering::Relaxed));
    Ok(rows.iter().all(|(_, cents)| *cents == 7500))
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let Some(url) = std::env::args().nth(1) else {
        eprintln!("usage: inbox postgres://USER@HOST/DATABASE");
        return Ok(ExitCode::FAILURE);
    };
    let pool = PgPool::connect(&url).await?;
    accounts(&pool).await?;
    let consumed = consume(&url, &pool, charges()?).await;
    let once = show(&pool).await?;
    pool.execute("DROP SCHEMA guestlist_example CASCADE").await?;
    consumed?;
    Ok(if once { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
