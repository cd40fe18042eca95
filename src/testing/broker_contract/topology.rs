//! Cases: what is missing is refused by name at the start, not found out in the night.

use super::BrokerFixture;
use super::stage::{Stage, ack_all, ids, ids_below};
use crate::broker::{BrokerErrorKind, Declare};

/// Panics unless `prepare` refuses, naming `missing`.
async fn assert_refused(stage: &Stage<'_>, missing: &str) {
    match stage.broker.prepare(&stage.queue).await {
        Ok(()) => panic!("prepare must refuse when {missing} is missing"),
        Err(error) => {
            assert_eq!(error.kind(), BrokerErrorKind::Refused, "{error:?}");
            assert!(error.to_string().contains(missing), "the refusal must name {missing}: {error}");
        }
    }
}

/// With `Declare::Check` a queue that is missing is refused, and the refusal names it.
pub async fn a_missing_queue_is_refused_by_name(fixture: &dyn BrokerFixture) {
    let mut stage = Stage::bare(fixture, "missing_queue", 8).await;
    stage.queue.declare = Declare::Check;
    assert_refused(&stage, &stage.queue.name).await;
    stage.end().await;
}

/// With `Declare::Check` a dead-letter destination that is missing is refused, and the refusal
/// names it; unless the spec allows it to be missing.
pub async fn a_missing_dead_letter_destination_is_refused_by_name(fixture: &dyn BrokerFixture) {
    let mut stage = Stage::new(fixture, "missing_dead_letters", 8).await;
    let Some(place) = stage.queue.dead_letter.clone() else {
        panic!("the fixture's queue must have a dead-letter destination");
    };
    fixture.delete_dead_letters(&stage.queue).await;
    stage.queue.declare = Declare::Check;
    assert_refused(&stage, place.name()).await;
    stage.queue.allow_missing_dead_letter = true;
    let allowed = stage.broker.prepare(&stage.queue).await;
    allowed.unwrap_or_else(|error| panic!("the spec allows the destination to be missing: {error:?}"));
    stage.end().await;
}

/// What is there can be declared again and checked, with the messages in it.
pub async fn preparing_twice_changes_nothing(fixture: &dyn BrokerFixture) {
    let mut stage = Stage::new(fixture, "prepared_twice", 8).await;
    let mut inbox = stage.subscribe().await;
    stage.send_many(2).await;
    for declare in [Declare::Create, Declare::Check] {
        stage.queue.declare = declare;
        let again = stage.broker.prepare(&stage.queue).await;
        again.unwrap_or_else(|error| panic!("{declare:?} must accept what Create made: {error:?}"));
    }
    stage.send("2").await;
    let arrived = inbox.take(3).await;
    assert_eq!(ids(&arrived), ids_below(3), "the queue must still be the one that is subscribed to");
    ack_all(arrived).await;
    inbox.close().await;
    stage.end().await;
}

/// Ids of two queues are kept apart unless the configuration says otherwise.
pub async fn each_queue_has_a_scope_of_its_own(fixture: &dyn BrokerFixture) {
    let stage = Stage::bare(fixture, "scope_one", 8).await;
    let other = fixture.queue("scope_two", 8);
    let (one, two) = (stage.broker.default_scope(&stage.queue), stage.broker.default_scope(&other));
    assert_ne!(one, two, "two queues must have two default scopes");
    assert_eq!(one, stage.broker.default_scope(&stage.queue), "the default scope must not change");
    stage.end().await;
}
