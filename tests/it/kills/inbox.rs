//! Two processes that charge accounts through an inbox: killed or not, every charge happens exactly once.

use guestlist::dedup::PostgresStore;
use guestlist::testing::Checker;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection, Row};

use super::broker::{amqp_url, nats_url};
use super::child::Job;
use super::crew::Crew;
use super::{ATTEMPTS, Folder, env, ids, unique};

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
    crew.finish(&ids).await;
    crew.none_is_dead().await;
    for row in sql(&format!("select name, charged from {schema}.accounts")).await {
        let (account, charged): (String, i64) = (row.get(0), row.get(1));
        let asked = ids.iter().filter(|id| id.ends_with(&account)).count();
        assert_eq!(usize::try_from(charged), Ok(asked), "{what}: account {account}");
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
