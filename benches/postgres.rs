//! What the Postgres store costs, beside a bare `INSERT … ON CONFLICT` over sqlx's pool on the same server.
//!
//! `GUESTLIST_POSTGRES_URL=postgres://… cargo bench --features postgres --bench postgres`
//!
//! Each line: calls at once, connections, claims (or inserts) per second, and the median and 99th percentile of a
//! call. Keys are new. Then claim + complete, which is what a message costs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guestlist::DedupKey;
use guestlist::dedup::protocol::{Ask, Claim, Run, Token};
use guestlist::dedup::{DedupStore, PostgresStore};
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, Executor};

const HOUR: Duration = Duration::from_secs(3600);
const RUN: Duration = Duration::from_secs(3);
const AT_ONCE: [usize; 3] = [1, 64, 512];
const CONNECTIONS: usize = 4;

/// Runs `call` this many times at once until the time is over.
async fn measure<F: Future<Output = ()> + Send>(
    what: &str,
    at_once: usize,
    call: impl Fn() -> F + Clone + Send + Sync + 'static,
) {
    let end = Instant::now() + RUN;
    let workers: Vec<_> = (0..at_once)
        .map(|_| {
            let call = call.clone();
            tokio::spawn(async move {
                let mut times = Vec::new();
                while Instant::now() < end {
                    let began = Instant::now();
                    call().await;
                    times.push(began.elapsed());
                }
                times
            })
        })
        .collect();
    let mut times = Vec::new();
    for worker in workers {
        times.extend(worker.await.unwrap());
    }
    times.sort();
    let per_second = u128::try_from(times.len()).unwrap() * 1000 / RUN.as_millis();
    let (median, high) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("{what:<28} {at_once:>4} at once {per_second:>8}/s   {median:>10.1?}   {high:>10.1?}");
}

fn key() -> DedupKey {
    DedupKey::from_bytes(Token::random().bits().to_be_bytes())
}

async fn claim(store: &PostgresStore) -> (DedupKey, Run) {
    let (key, ask) = (key(), Ask::new(Token::random(), Duration::from_secs(30), HOUR));
    match store.claim(&key, &ask).await.unwrap() {
        Claim::Acquired { fence, .. } => (key, Run { token: ask.token, fence }),
        other => panic!("{other:?}"),
    }
}

#[tokio::main]
async fn main() {
    let url = std::env::var("GUESTLIST_POSTGRES_URL").expect("GUESTLIST_POSTGRES_URL");
    let connections = u32::try_from(CONNECTIONS).unwrap();
    let pool = PgPoolOptions::new().max_connections(connections).acquire_timeout(HOUR);
    let pool = pool.test_before_acquire(false).connect(&url).await.unwrap();
    for (label, options) in [("synchronous_commit on", ""), ("synchronous_commit off", "off")] {
        println!("{label}, {CONNECTIONS} connections");
        let schema = format!("bench_{:x}", Token::random().bits());
        let mut url = url::Url::parse(&url).unwrap();
        if !options.is_empty() {
            url.query_pairs_mut().append_pair("options[synchronous_commit]", options);
        }
        let builder = PostgresStore::builder(url.as_str()).unwrap().schema(&schema).connections(CONNECTIONS);
        builder.migrate().await.unwrap();
        let store = builder.connect().await.unwrap();
        let table = format!("create table {schema}.raw (id uuid primary key, done bigint)");
        pool.execute(AssertSqlSafe(table)).await.unwrap();
        let raw_pool = PgPoolOptions::new().max_connections(connections).acquire_timeout(HOUR);
        let raw_pool = raw_pool.test_before_acquire(false).connect(url.as_str()).await.unwrap();
        let insert: Arc<str> =
            format!("insert into {schema}.raw values ($1::uuid, $2) on conflict do nothing").into();
        for at_once in AT_ONCE {
            let (pool, insert) = (raw_pool.clone(), Arc::clone(&insert));
            measure("insert on conflict (sqlx)", at_once, move || {
                let (pool, insert) = (pool.clone(), Arc::clone(&insert));
                async move {
                    let id = format!("{:032x}", Token::random().bits());
                    sqlx::query(AssertSqlSafe(insert)).bind(id).bind(1_i64).execute(&pool).await.unwrap();
                }
            })
            .await;
            let of = store.clone();
            measure("claim", at_once, move || {
                let store = of.clone();
                async move {
                    claim(&store).await;
                }
            })
            .await;
            let of = store.clone();
            measure("claim + complete", at_once, move || {
                let store = of.clone();
                async move {
                    let (key, run) = claim(&store).await;
                    store.complete(&key, run, HOUR).await.unwrap();
                }
            })
            .await;
            let (of, done) = (store.clone(), claim(&store).await);
            store.complete(&done.0, done.1, HOUR).await.unwrap();
            measure("a duplicate's claim", at_once, move || {
                let store = of.clone();
                async move {
                    let ask = Ask::new(Token::random(), Duration::from_secs(30), HOUR);
                    let claim = store.claim(&done.0, &ask).await.unwrap();
                    assert!(matches!(claim, Claim::Done { .. }));
                }
            })
            .await;
        }
        raw_pool.close().await;
        pool.execute(AssertSqlSafe(format!("drop schema {schema} cascade"))).await.unwrap();
    }
}
