//! The store on a Postgres server: `GUESTLIST_POSTGRES_URL`, as a role that may create schemas.

mod contract;
mod faults;
mod machine;
mod server;

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use guestlist::DedupKey;
use guestlist::dedup::protocol::{Ask, Claim, Fence, Held, Record, Release, Run, Token};
use guestlist::dedup::{DedupStore, PostgresStore, PostgresStoreBuilder};
use sqlx::postgres::{PgPool, PgPoolOptions, PgRow};
use sqlx::{AssertSqlSafe, Row};

pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const HOUR: Duration = Duration::from_secs(3600);

/// A schema of a test's own, and the way to it of somebody who is not the store.
pub(super) struct Place {
    pub(super) url: String,
    pub(super) schema: String,
    pub(super) pool: PgPool,
}

pub(super) fn url() -> String {
    std::env::var("GUESTLIST_POSTGRES_URL").expect("GUESTLIST_POSTGRES_URL is set: see scripts/stores")
}

impl Place {
    /// A schema without anything in it yet.
    pub(super) async fn empty() -> Self {
        Self::at(url()).await
    }

    pub(super) async fn at(url: String) -> Self {
        let schema = format!("t_{:032x}", Token::random().bits());
        let pool = PgPoolOptions::new().max_connections(8).connect(&url).await.unwrap();
        Self { url, schema, pool }
    }

    /// A schema with a store's objects.
    pub(super) async fn migrated() -> Self {
        let place = Self::empty().await;
        place.builder().migrate().await.unwrap();
        place
    }

    pub(super) fn builder(&self) -> PostgresStoreBuilder {
        PostgresStore::builder(&self.url).unwrap().schema(&*self.schema).sweep_every(None)
    }

    pub(super) async fn store(&self) -> PostgresStore {
        self.builder().connect().await.unwrap()
    }

    /// SQL with `{s}` for the schema.
    pub(super) async fn sql(&self, text: &str) -> Vec<PgRow> {
        let text = text.replace("{s}", &self.schema);
        sqlx::raw_sql(AssertSqlSafe(text)).fetch_all(&self.pool).await.unwrap()
    }

    pub(super) async fn number(&self, text: &str) -> i64 {
        self.sql(text).await[0].try_get(0).unwrap()
    }

    pub(super) async fn drop(self) {
        self.sql("drop schema if exists {s} cascade").await;
    }
}

/// All of them in one task, first polled in their order.
pub(super) async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<Pin<Box<F>>> = futures.into_iter().map(Box::pin).collect();
    let mut outputs: Vec<Option<F::Output>> = running.iter().map(|_| None).collect();
    poll_fn(|cx| {
        for (future, output) in running.iter_mut().zip(&mut outputs) {
            if output.is_none()
                && let Poll::Ready(ready) = future.as_mut().poll(cx)
            {
                *output = Some(ready);
            }
        }
        if outputs.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    outputs.into_iter().flatten().collect()
}

pub(super) fn key(number: u128) -> DedupKey {
    DedupKey::from_bytes(number.to_be_bytes())
}

pub(super) fn ask() -> Ask {
    Ask::new(Token::random(), 30 * SECOND, HOUR)
}

pub(super) async fn acquired(store: &PostgresStore, key: &DedupKey, ask: &Ask) -> Run {
    match store.claim(key, ask).await.unwrap() {
        Claim::Acquired { fence, .. } => Run { token: ask.token, fence },
        other => panic!("not acquired: {other:?}"),
    }
}

#[tokio::test]
async fn of_a_thousand_claims_of_one_key_one_wins() {
    let place = Place::migrated().await;
    let processes = [place.store().await, place.store().await, place.store().await, place.store().await];
    let claims = (0..1_000).map(|i| {
        let store = processes[i % processes.len()].clone();
        tokio::spawn(async move { store.claim(&key(1), &ask()).await.unwrap() })
    });
    let answers = join_all(claims).await;
    let won = answers.iter().filter(|answer| matches!(answer, Ok(Claim::Acquired { attempt: 1, .. })));
    assert_eq!(won.count(), 1);
    let busy = answers.iter().filter(|answer| matches!(answer, Ok(Claim::InProgress { .. })));
    assert_eq!(busy.count(), 999);
    place.drop().await;
}

/// As above, but where the winner takes over a record that is there.
#[tokio::test]
async fn of_many_claims_of_a_released_key_one_wins() {
    let place = Place::migrated().await;
    let processes = [place.store().await, place.store().await];
    for round in 1..20 {
        let claims = (0..60).map(|i| {
            let store = processes[i % 2].clone();
            tokio::spawn(async move {
                let ask = ask();
                (store.claim(&key(1), &ask).await.unwrap(), ask.token)
            })
        });
        let answers = join_all(claims).await.into_iter().map(Result::unwrap);
        let won: Vec<Run> = answers
            .filter_map(|(claim, token)| match claim {
                Claim::Acquired { fence, attempt, .. } => {
                    assert_eq!(attempt, round);
                    Some(Run { token, fence })
                }
                _ => None,
            })
            .collect();
        assert_eq!(won.len(), 1);
        let failed = Release::Failed { not_before: Duration::ZERO };
        assert_eq!(processes[0].release(&key(1), won[0], failed).await.unwrap(), Held::Yes);
    }
    place.drop().await;
}

#[tokio::test]
async fn a_store_without_its_tables_says_how_to_make_them() {
    let place = Place::empty().await;
    let error = place.builder().connect().await.unwrap_err();
    assert!(error.to_string().contains("migrate()"), "{error}");
    assert!(error.to_string().contains(&place.schema), "{error}");
    place.drop().await;
}

#[tokio::test]
async fn migrations_at_once_and_again_change_nothing() {
    let place = Place::empty().await;
    let migrations = (0..8).map(|_| {
        let builder = place.builder();
        async move { builder.migrate().await }
    });
    for migrated in join_all(migrations).await {
        migrated.unwrap();
    }
    let store = place.store().await;
    let run = acquired(&store, &key(1), &ask()).await;
    place.builder().migrate().await.unwrap();
    assert_eq!(store.complete(&key(1), run, HOUR).await.unwrap(), Held::Yes);
    place.drop().await;
}

/// The function of an earlier release is not replaced: its consumers may still be running.
#[tokio::test]
async fn a_migration_leaves_the_function_of_an_earlier_release_alone() {
    let place = Place::migrated().await;
    let (now, before) = ("\"{s}\".\"claims_step_v2\"", "\"{s}\".\"claims_step_v1\"");
    place.sql(&format!("alter function {now} rename to claims_step_v1")).await;
    let error = place.builder().connect().await.unwrap_err();
    assert!(error.to_string().contains("migrate()"), "{error}");
    place.builder().migrate().await.unwrap();
    acquired(&place.store().await, &key(1), &ask()).await;
    place.sql(&format!("drop function {before}")).await;
    place.drop().await;
}

/// Fences order writes downstream, whatever happened to the records in between.
#[tokio::test]
async fn fences_grow_over_lost_records_and_a_lost_sequence() {
    let place = Place::migrated().await;
    let mut last = Fence(0);
    for loss in ["delete from {s}.claims", "truncate {s}.claims restart identity", "drop schema {s} cascade"]
    {
        let store = place.store().await;
        for number in 0..50 {
            let Run { fence, .. } = acquired(&store, &key(number), &ask()).await;
            assert!(fence > last, "{fence:?} after {last:?}");
            last = fence;
        }
        place.sql(loss).await;
        place.builder().migrate().await.unwrap();
    }
    assert!(acquired(&place.store().await, &key(1), &ask()).await.fence > last);
    place.drop().await;
}

#[tokio::test]
async fn a_record_of_another_version_is_an_error_and_never_done() {
    let place = Place::migrated().await;
    let store = place.store().await;
    let run = acquired(&store, &key(1), &ask()).await;
    store.complete(&key(1), run, HOUR).await.unwrap();
    place.sql("update {s}.claims set version = 2").await;
    let errors = [
        store.claim(&key(1), &ask()).await.err(),
        store.renew(&key(1), run, SECOND).await.err(),
        store.complete(&key(1), run, SECOND).await.err(),
        store.release(&key(1), run, Release::NotStarted).await.err(),
        store.inspect(&key(1)).await.err(),
    ];
    for error in errors {
        assert!(error.expect("an error").to_string().contains("unknown version"));
    }
    place.sql("update {s}.claims set kept_until = 0").await;
    assert_eq!(store.sweep().await.unwrap(), 0, "it is not ours to judge");
    store.forget(&key(1)).await.unwrap();
    acquired(&store, &key(1), &ask()).await;
    place.drop().await;
}

#[tokio::test]
async fn a_sweep_deletes_what_is_past_its_time_and_nothing_else() {
    let place = Place::migrated().await;
    let store = place.store().await;
    let claims = (0..1_300).map(|number| {
        let store = &store;
        async move { acquired(store, &key(number), &ask()).await }
    });
    join_all(claims).await;
    // Long past; only just past, which may stay; not past.
    let hour = "3600000000";
    let now = "(extract(epoch from clock_timestamp()) * 1000000)::bigint";
    let keys = |from: u128, to: u128| format!("key between '{from:032x}' and '{to:032x}'");
    place.sql(&format!("update {{s}}.claims set kept_until = {now} - {hour} where {}", keys(0, 1_199))).await;
    place.sql(&format!("update {{s}}.claims set kept_until = {now} - 1 where {}", keys(1_200, 1_249))).await;
    let other = place.store().await;
    let (one, two) = tokio::join!(store.sweep(), other.sweep());
    let swept = one.unwrap() + two.unwrap();
    assert!((1_200..=1_250).contains(&swept), "{swept}");
    assert_eq!(place.number("select count(*) from {s}.claims").await, 1_300 - i64::try_from(swept).unwrap());
    assert_eq!(store.inspect(&key(1_250)).await.unwrap().map(|record| record.attempt), Some(1));
    // Swept or not, it is no record.
    for number in [0, 1_200] {
        let claim = store.claim(&key(number), &ask()).await.unwrap();
        assert!(matches!(claim, Claim::Acquired { attempt: 1, .. }), "{claim:?}");
    }
    place.drop().await;
}

#[tokio::test]
async fn a_store_sweeps_by_itself_until_it_is_gone() {
    let place = Place::migrated().await;
    let store = place.builder().sweep_every(Duration::from_millis(20)).connect().await.unwrap();
    acquired(&store, &key(1), &ask()).await;
    place.sql("update {s}.claims set kept_until = 1").await;
    let gone = async {
        while place.number("select count(*) from {s}.claims").await > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(30 * SECOND, gone).await.expect("swept");
    place.drop().await;
}

/// The index is on a coarse time, so that a claim and its completion are one index entry, not three.
#[tokio::test]
async fn a_completion_is_a_heap_only_update() {
    let place = Place::migrated().await;
    let store = place.store().await;
    for number in 0..400 {
        let run = acquired(&store, &key(number), &ask()).await;
        store.complete(&key(number), run, HOUR).await.unwrap();
    }
    let statistics = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where schemaname = '{s}'";
    let updated = async {
        loop {
            place.sql("select pg_stat_clear_snapshot()").await;
            let row = &place.sql(statistics).await[0];
            let (all, hot): (i64, i64) = (row.try_get(0).unwrap(), row.try_get(1).unwrap());
            if all >= 400 {
                return (all, hot);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let (all, hot) = tokio::time::timeout(30 * SECOND, updated).await.expect("statistics");
    assert!(hot * 10 >= all * 8, "{hot} of {all}");
    place.drop().await;
}

#[tokio::test]
async fn debug_shows_where_it_is_and_no_password() {
    let place = Place::migrated().await;
    let mut url = url::Url::parse(&place.url).unwrap();
    url.set_password(Some("hunter2")).unwrap();
    let store = PostgresStore::builder(url.as_str()).unwrap().schema(&*place.schema).connect().await.unwrap();
    let shown = format!("{store:?}");
    assert!(shown.contains(&place.schema) && !shown.contains("hunter2"), "{shown}");
    place.drop().await;
}

pub(super) async fn record(store: &PostgresStore, number: u128) -> Option<Record> {
    store.inspect(&key(number)).await.unwrap()
}
