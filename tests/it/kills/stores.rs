//! Two processes on one queue that share a store.

use guestlist::testing::Checker;

use super::broker::{amqp_url, nats_url};
use super::child::Job;
use super::crew::Crew;
use super::{ATTEMPTS, Folder, env, ids, unique, until};

/// A tenth of the ids, a kill, and so on.
async fn ten_kills(what: &str, broker: String, store: String) {
    let (folder, ids) = (Folder::new(), ids());
    let path = folder.0.clone();
    let job = Job { broker, queue: unique("kills"), store, inbox: None, attempts: ATTEMPTS, folder: path };
    let mut crew = Crew::start(job, &["one", "two"]).await;
    crew.work_and_die(&ids).await;
    all_have_succeeded(&crew, &ids).await;
    crew.finish(&ids).await;
    crew.none_is_dead().await;
    let report = crew.judge(what, Checker::new(), &ids);
    assert_eq!((report.counts.ids, report.counts.succeeded), (ids.len(), ids.len()));
    assert!(report.counts.unfinished > 0, "no kill hit anything");
    assert!(report.counts.duplicates > ids.len(), "the copies were skipped");
    crew.broker.delete(&crew.job.queue).await;
}

/// Of a run that was killed between its line in the journal and its event no log tells. On RabbitMQ its message is in a hold
/// queue until the lease ends, and there `Crew::finish` does not count it.
async fn all_have_succeeded(crew: &Crew, ids: &[String]) {
    until("every id has run to its end, by the logs too", || async {
        crew.job.missing(ids) == 0 && Checker::new().check(&crew.log()).counts.succeeded == ids.len()
    })
    .await;
}

fn redis() -> String {
    format!("{}?prefix={}:", env("GUESTLIST_REDIS_URL"), unique("kills"))
}

/// Its bucket keeps records for longer than the queue asks.
fn nats_kv() -> String {
    format!("{}/{}?window=2h", nats_url(), unique("kills"))
}

/// A schema that is gone in the end.
struct Schema(String);

impl Schema {
    async fn new() -> Self {
        let schema = unique("kills");
        let builder = guestlist::dedup::PostgresStore::builder(&env("GUESTLIST_POSTGRES_URL")).unwrap();
        builder.schema(&schema).migrate().await.unwrap();
        Self(schema)
    }

    fn url(&self) -> String {
        format!("{}?schema={}", env("GUESTLIST_POSTGRES_URL"), self.0)
    }

    async fn drop(self) {
        super::inbox::sql(&format!("drop schema {} cascade", self.0)).await;
    }
}

#[tokio::test]
async fn two_processes_on_rabbitmq_share_redis_and_are_killed() {
    ten_kills("RabbitMQ, Redis", amqp_url(), redis()).await;
}

#[tokio::test]
async fn two_processes_on_rabbitmq_share_nats_kv_and_are_killed() {
    ten_kills("RabbitMQ, NATS KV", amqp_url(), nats_kv()).await;
}

#[tokio::test]
async fn two_processes_on_rabbitmq_share_postgres_and_are_killed() {
    let schema = Schema::new().await;
    ten_kills("RabbitMQ, Postgres", amqp_url(), schema.url()).await;
    schema.drop().await;
}

#[tokio::test]
async fn two_processes_on_jetstream_share_redis_and_are_killed() {
    ten_kills("JetStream, Redis", nats_url(), redis()).await;
}

#[tokio::test]
async fn two_processes_on_jetstream_share_nats_kv_and_are_killed() {
    ten_kills("JetStream, NATS KV", nats_url(), nats_kv()).await;
}

#[tokio::test]
async fn two_processes_on_jetstream_share_postgres_and_are_killed() {
    let schema = Schema::new().await;
    ten_kills("JetStream, Postgres", nats_url(), schema.url()).await;
    schema.drop().await;
}
