//! F26: a message that takes its process along, each time it is tried.

use std::time::Duration;

use guestlist::testing::Checker;
use guestlist::testing::checker::What;
use guestlist::{Cause, EventKind, Outcome};
use tokio::time::{Instant, sleep};

use super::broker::{amqp_url, dead, nats_url};
use super::child::{Job, POISON};
use super::crew::Crew;
use super::{Folder, PATIENCE, env, unique};

const GOOD: usize = 100;
const ATTEMPTS: u32 = 4;

async fn a_poison_is_parked(what: &str, broker: String, store: fn(&Folder) -> String, checker: Checker) {
    let folder = Folder::new();
    let (store, path) = (store(&folder), folder.0.clone());
    let job = Job { broker, queue: unique("poison"), store, inbox: None, attempts: ATTEMPTS, folder: path };
    let good: Vec<String> = (0..GOOD).map(|number| format!("order-{number}")).collect();
    let mut all = good.clone();
    all.insert(GOOD / 2, POISON.to_owned());

    let mut crew = Crew::start(job, &["one"]).await;
    crew.ready().await;
    crew.publish(&all).await;
    let deaths = until_parked(&mut crew, &good).await;
    crew.ready().await;
    crew.finish(&good).await;

    assert_eq!(deaths, ATTEMPTS as usize, "{what}: it died once for each attempt");
    assert_eq!(crew.broker.left(&dead(&crew.job.queue)).await, 1, "{what}: the poison, and nothing else");
    assert_eq!(suspected(&crew), 1, "{what}");
    crew.judge(what, checker, &good);
    crew.broker.delete(&crew.job.queue).await;
}

/// Starts the process again whenever it died; how many times it did.
async fn until_parked(crew: &mut Crew, good: &[String]) -> usize {
    let mut deaths = 0;
    let give_up_at = Instant::now() + PATIENCE;
    while crew.job.missing(good) > 0 || crew.broker.left(&dead(&crew.job.queue)).await == 0 {
        assert!(Instant::now() < give_up_at, "not parked after {deaths} deaths");
        deaths += crew.revive();
        sleep(Duration::from_millis(10)).await;
    }
    deaths
}

fn suspected(crew: &Crew) -> usize {
    let parked = EventKind::Acked(Outcome::DeadLettered(Cause::CrashSuspected));
    let log = crew.log();
    log.entries()
        .iter()
        .filter(|entry| matches!(&entry.what, What::Step(step) if step.kind == parked))
        .count()
}

fn durable(folder: &Folder) -> String {
    format!("file:{}", folder.0.join("store").display())
}

fn redis(_: &Folder) -> String {
    format!("{}?prefix={}:", env("GUESTLIST_REDIS_URL"), unique("poison"))
}

#[tokio::test]
async fn f26_a_poison_on_rabbitmq_is_parked_with_the_durable_store() {
    a_poison_is_parked("RabbitMQ, durable", amqp_url(), durable, Checker::new().store_of_one_process()).await;
}

#[tokio::test]
async fn f26_a_poison_on_rabbitmq_is_parked_with_redis() {
    a_poison_is_parked("RabbitMQ, Redis", amqp_url(), redis, Checker::new()).await;
}

#[tokio::test]
async fn f26_a_poison_on_jetstream_is_parked_with_the_durable_store() {
    a_poison_is_parked("JetStream, durable", nats_url(), durable, Checker::new().store_of_one_process())
        .await;
}

#[tokio::test]
async fn f26_a_poison_on_jetstream_is_parked_with_redis() {
    a_poison_is_parked("JetStream, Redis", nats_url(), redis, Checker::new()).await;
}
