//! PostgreSQL: the store, and the bare pool with as many connections.

use std::sync::Arc;

use guestlist::DedupKey;
use guestlist::dedup::PostgresStore;
use guestlist::dedup::protocol::Token;
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Executor};
use url::Url;

use crate::Bench;
use crate::calls::{Done, WINDOW, claim_and_complete, new_key};
use crate::pairs::{Contender, Group, Target};

/// The store's default.
const CONNECTIONS: usize = 4;

pub(crate) async fn run(bench: &Bench, url: &str) {
    for commit in ["on", "off"] {
        let place = Place::make(url, commit).await;
        bench.measure(&place.new_ids()).await;
        if commit == "on" {
            bench.measure(&place.duplicates().await).await;
        }
        place.remove().await;
    }
}

/// A schema with the store's table and one for the bare pool.
struct Place {
    title: String,
    store: PostgresStore,
    bare: Bare,
}

impl Place {
    async fn make(url: &str, commit: &str) -> Self {
        let mut url = Url::parse(url).unwrap();
        url.query_pairs_mut().append_pair("options[synchronous_commit]", commit);
        let schema = format!("guestlist_bench_{:x}", Token::random().bits());
        let builder = PostgresStore::builder(url.as_str()).unwrap().schema(&schema).connections(CONNECTIONS);
        builder.migrate().await.unwrap();
        let store = builder.connect().await.unwrap();
        let bare = Bare::make(url.as_str(), schema).await;
        let version: String = sqlx::query_scalar("show server_version").fetch_one(&bare.pool).await.unwrap();
        let title = format!("PostgreSQL {version}, synchronous_commit {commit}, {CONNECTIONS} connections");
        Self { title, store, bare }
    }

    fn new_ids(&self) -> Group {
        let bare =
            Contender::new("bare pool: INSERT ON CONFLICT, twice", self.bare.clone(), |bare| async move {
                bare.insert_twice(&new_key()).await;
            });
        let store = Contender::new("PostgresStore", self.store.clone(), |store| async move {
            claim_and_complete(&*store).await;
        });
        Group::of(format!("{}, claim + complete", self.title), store).beside(bare, Target::BareCall)
    }

    async fn duplicates(&self) -> Group {
        let done = Done::new(self.store.clone()).await;
        for key in done.keys() {
            self.bare.insert_twice(key).await;
        }
        let keys = Done::with_keys(self.bare.clone(), done.keys().to_vec());
        let bare = Contender::new("bare pool: SELECT", keys, |bare| async move {
            bare.store.select(bare.any()).await;
        });
        let store = Contender::new("PostgresStore", done, |done| async move { done.duplicate().await });
        Group::of(format!("{}, a duplicate", self.title), store).beside(bare, Target::None)
    }

    async fn remove(self) {
        let drop = format!("drop schema {} cascade", self.bare.schema);
        self.bare.pool.execute(AssertSqlSafe(drop)).await.unwrap();
        self.bare.pool.close().await;
    }
}

/// sqlx's own pool.
#[derive(Clone)]
struct Bare {
    pool: PgPool,
    schema: String,
    take: Arc<str>,
    mark: Arc<str>,
    look: Arc<str>,
}

impl Bare {
    async fn make(url: &str, schema: String) -> Self {
        let connections = u32::try_from(CONNECTIONS).unwrap();
        // Its ping before each statement would be a call more.
        let pool = PgPoolOptions::new().max_connections(connections).test_before_acquire(false);
        let pool = pool.acquire_timeout(WINDOW).connect(url).await.unwrap();
        let table = format!("create table {schema}.bare (id uuid primary key, done boolean not null)");
        pool.execute(AssertSqlSafe(table)).await.unwrap();
        let insert = |done, then| {
            format!("insert into {schema}.bare values ($1::uuid, {done}) on conflict (id) do {then}").into()
        };
        Self {
            pool,
            take: insert(false, "nothing"),
            mark: insert(true, "update set done = excluded.done"),
            look: format!("select done from {schema}.bare where id = $1::uuid").into(),
            schema,
        }
    }

    async fn insert_twice(&self, key: &DedupKey) {
        for statement in [&self.take, &self.mark] {
            let query = sqlx::query(AssertSqlSafe(Arc::clone(statement))).bind(key.to_string());
            assert_eq!(query.execute(&self.pool).await.unwrap().rows_affected(), 1);
        }
    }

    async fn select(&self, key: &DedupKey) {
        let query = sqlx::query_scalar(AssertSqlSafe(Arc::clone(&self.look))).bind(key.to_string());
        let done: bool = query.fetch_one(&self.pool).await.unwrap();
        assert!(done);
    }
}
