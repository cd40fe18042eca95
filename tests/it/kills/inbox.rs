//! Two processes that charge accounts through an inbox: killed or not, every charge happens exactly once.

use std::time::Duration;

use guestlist::dedup::PostgresStore;
use guestlist::testing::Checker;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection, Row};
use tokio::time::{Instant, sleep};

use super::broker::{amqp_url, nats_url};
use super::child::Job;
use super::crew::Crew;
use super::{ATTEMPTS, Folder, PATIENCE, env, ids, unique};

pub(super) async fn sql(text: &str) -> Vec<PgRow> {
    let mut connection = PgConnection::connect(&env("GUESTLIST_POSTGRES_URL")).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(text.to_owned())).fetch_all(&mut connection).await.unwrap()
}

/// One account for each last digit of an id, nothing charged yet.
async fn accounts() -> String {
    let schema = unique("kills");
    let store = PostgresStore::builder(&env("GUESTLIST_POSTGRES_URL")).unwrap().schema(&schema);
    store.migrate().await.unwrap();
    sql(&format!(
        "create table {schema}.accounts as select i::text as name, 0::bigint as charged from generate_series(0, 9) i"
    ))
    .await;
    schema
}

/// Of one account.
#[derive(Debug)]
struct Charges {
    account: String,
    found: usize,
    asked: usize,
}

async fn charges(schema: &str, ids: &[String]) -> Vec<Charges> {
    let rows = sql(&format!("select name, charged from {schema}.accounts")).await;
    let of_account = |row: &PgRow| {
        let (account, found): (String, i64) = (row.get(0), row.get(1));
        let asked = ids.iter().filter(|id| id.ends_with(&account)).count();
        Charges { account, found: usize::try_from(found).unwrap(), asked }
    };
    rows.iter().map(of_account).collect()
}

/// A run that was killed between its line in the journal and its commit has charged nothing. On RabbitMQ its message is in
/// a hold queue until the lease ends, and there `Crew::finish` does not count it.
async fn all_are_charged(schema: &str, ids: &[String]) {
    let give_up_at = Instant::now() + PATIENCE;
    loop {
        let mut short = charges(schema, ids).await;
        short.retain(|charges| charges.found < charges.asked);
        if short.is_empty() {
            return;
        }
        assert!(Instant::now() < give_up_at, "not all charges are made: {short:?}");
        sleep(Duration::from_millis(100)).await;
    }
}

async fn charged_exactly_once(what: &str, broker: String) {
    let (folder, ids, schema) = (Folder::new(), ids(), accounts().await);
    let job = Job {
        broker,
        queue: unique("kills"),
        store: env("GUESTLIST_POSTGRES_URL"),
        inbox: Some(schema.clone()),
        attempts: ATTEMPTS,
        folder: folder.0.clone(),
    };
    let mut crew = Crew::start(job, &["one", "two"]).await;
    crew.work_and_die(&ids).await;
    all_are_charged(&schema, &ids).await;
    crew.finish(&ids).await;
    crew.none_is_dead().await;
    for Charges { account, found, asked } in charges(&schema, &ids).await {
        assert_eq!(found, asked, "{what}: account {account}");
    }
    crew.judge(what, Checker::new().inbox(), &ids);
    crew.broker.delete(&crew.job.queue).await;
    sql(&format!("drop schema {schema} cascade")).await;
}

#[tokio::test]
async fn every_charge_over_rabbitmq_happens_exactly_once_whoever_is_killed() {
    charged_exactly_once("RabbitMQ, inbox", amqp_url()).await;
}

#[tokio::test]
async fn every_charge_over_jetstream_happens_exactly_once_whoever_is_killed() {
    charged_exactly_once("JetStream, inbox", nats_url()).await;
}
