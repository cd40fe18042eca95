//! Cases: what is not done comes again, when it should, as what it was.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::BrokerFixture;
use super::delivery::{ODD_HEADERS, assert_headers};
use super::stage::{Inbox, Stage, ack_all, ids, ids_below, settle, settle_by, text_id};
use crate::{Acker, Delivery, Disposition};

/// The delay that is asked of a broker whose delays are exact.
const DELAY: Duration = Duration::from_millis(500);
/// How much earlier than asked a message may come, since clocks are read in milliseconds.
const TOLERANCE: Duration = Duration::from_millis(20);
/// What comes within this comes at once.
const PROMPT: Duration = Duration::from_secs(5);
/// A broker with a longer ack deadline than this is not kept waiting for it.
const LONG_DEADLINE: Duration = Duration::from_secs(5);

/// What was delivered and not settled comes again after the subscription is closed.
pub async fn unsettled_messages_come_again_after_close(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "unsettled", 8).await;
    let mut first = stage.subscribe().await;
    stage.send_many(3).await;
    let ackers: Vec<Acker> =
        first.take(3).await.into_iter().map(|delivery| delivery.into_parts().1).collect();
    first.close().await;
    let mut second = stage.subscribe().await;
    let again = second.take(3).await;
    assert_eq!(ids(&again), ids_below(3));
    ack_all(again).await;
    // Dropped only now: they must not have been what gave the messages back.
    drop(ackers);
    second.close().await;
    stage.depth_becomes(0).await;
    stage.end().await;
}

/// What is abandoned comes again, marked as delivered before.
pub async fn abandoned_messages_come_again(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "abandoned", 8).await;
    let mut inbox = stage.subscribe().await;
    stage.send("left").await;
    settle(inbox.next().await, Disposition::Abandon).await;
    assert_comes_again(&mut inbox, "left").await;
    inbox.close().await;
    stage.end().await;
}

/// An acker that is dropped unsettled abandons its delivery, and is counted.
pub async fn a_dropped_acker_abandons_and_is_counted(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "dropped_acker", 8).await;
    let mut inbox = stage.subscribe().await;
    stage.send("dropped").await;
    let counted = Acker::dropped_unsettled();
    drop(inbox.next().await);
    assert!(Acker::dropped_unsettled() > counted, "a dropped acker must be counted");
    assert_comes_again(&mut inbox, "dropped").await;
    inbox.close().await;
    stage.end().await;
}

async fn assert_comes_again(inbox: &mut Inbox, id: &str) {
    let again = inbox.next().await;
    assert_eq!(text_id(again.message()), id);
    assert!(again.message().redelivered(), "a second delivery must be marked as redelivered");
    settle(again, Disposition::Ack).await;
    inbox.stays_quiet("it was acked").await;
}

/// After `Requeue { after }` a message comes not before that delay. A broker with a step of
/// delay may deliver it once per step until then.
pub async fn a_requeued_message_comes_again_after_its_delay(fixture: &dyn BrokerFixture) {
    comes_again_after_its_delay(fixture, "requeued", |after| Disposition::Requeue { after }).await;
}

/// `Release { after }` keeps its delay as `Requeue` does.
pub async fn a_released_message_comes_again_after_its_delay(fixture: &dyn BrokerFixture) {
    comes_again_after_its_delay(fixture, "released", |after| Disposition::Release { after }).await;
}

async fn comes_again_after_its_delay(
    fixture: &dyn BrokerFixture,
    case: &str,
    disposition: fn(Duration) -> Disposition,
) {
    let stage = Stage::new(fixture, case, 8).await;
    let step = stage.delay_step();
    let mut inbox = stage.subscribe().await;
    stage.send("late").await;
    let mut delivery = inbox.next().await;
    // Two steps and a bit, so that a broker with steps has to be asked again.
    let mut left = if step.is_zero() { DELAY } else { step * 2 + step / 4 };
    while !left.is_zero() {
        let begin = Instant::now();
        settle(delivery, disposition(left)).await;
        delivery = inbox.next().await;
        let waited = begin.elapsed() + TOLERANCE;
        let earliest = if step.is_zero() { left } else { left.min(step) };
        assert!(waited >= earliest, "asked for {left:?} with a step of {step:?}, it came after {waited:?}");
        left = left.saturating_sub(waited);
    }
    settle(delivery, Disposition::Ack).await;
    inbox.stays_quiet("it was acked").await;
    inbox.close().await;
    stage.depth_becomes(0).await;
    stage.end().await;
}

/// `Release` without a delay hands a message back at once, not when a deadline or step ends.
pub async fn a_message_released_without_delay_comes_again_at_once(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "released_at_once", 8).await;
    let mut inbox = stage.subscribe().await;
    stage.send("back").await;
    let delivery = inbox.next().await;
    let begin = Instant::now();
    settle(delivery, Disposition::Release { after: Duration::ZERO }).await;
    let again = inbox.next().await;
    let prompt = stage.features.ack_deadline.map_or(PROMPT, |deadline| PROMPT.min(deadline * 3 / 4));
    assert!(begin.elapsed() < prompt, "released without a delay, it came after {:?}", begin.elapsed());
    settle(again, Disposition::Ack).await;
    inbox.close().await;
    stage.end().await;
}

/// A message that comes again, by a copy or not, shows the original's id, headers, body and
/// source, and hints at its attempt: at one less if a delay was over before its copy was there.
pub async fn a_requeued_message_is_its_original_again(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "original_again", 8).await;
    let mut inbox = stage.subscribe().await;
    stage.fixture.send(&stage.queue, "first/ö", &ODD_HEADERS, b"\0body\xff").await;
    let mut delivery = inbox.next().await;
    let original = delivery.message().clone();
    for attempt in 2..=4 {
        settle(delivery, Disposition::Requeue { after: Duration::from_millis(1) }).await;
        delivery = inbox.next().await;
        while delivery.message().attempt() + 1 < attempt {
            // The copy of an earlier requeue that was not confirmed in time came beside the message itself.
            settle(delivery, Disposition::Ack).await;
            delivery = inbox.next().await;
        }
        let again = delivery.message();
        assert!(again.attempt() <= attempt, "delivered {attempt} times, it says {}", again.attempt());
        assert_eq!(again.id(), original.id(), "the id must be the original's");
        assert_eq!(again.transport_id(), original.transport_id());
        assert_eq!(again.payload(), original.payload(), "the body must be the original's");
        assert_eq!(again.source(), original.source(), "the source must be the original's");
        assert_eq!(again.headers().len(), original.headers().len(), "no header may come or go");
        assert_headers(again, &ODD_HEADERS, "delivered again");
    }
    settle(delivery, Disposition::Ack).await;
    inbox.close().await;
    stage.end().await;
}

/// While one message waits for its time, others are delivered.
pub async fn a_delayed_message_holds_up_no_other(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "holds_up_no_other", 8).await;
    let mut inbox = stage.subscribe().await;
    stage.send("late").await;
    put_off(inbox.next().await).await;
    stage.send("prompt").await;
    let other = timeout(stage.patience(), async {
        loop {
            // A broker with a short step may deliver the late one in between.
            let delivery = inbox.next().await;
            match text_id(delivery.message()).as_str() {
                "late" => put_off(delivery).await,
                _ => break delivery,
            }
        }
    });
    let other = other.await.unwrap_or_else(|_| panic!("a delayed message held up another"));
    assert_eq!(text_id(other.message()), "prompt");
    settle(other, Disposition::Ack).await;
    inbox.close().await;
    stage.end().await;
}

async fn put_off(delivery: Delivery) {
    settle(delivery, Disposition::Requeue { after: Duration::from_secs(60) }).await;
}

/// While `progress` is called, a delivery in hand is not given to anybody else, though the
/// broker's deadline passes. Nothing to show where the deadline is none, or over 5 s.
pub async fn progress_extends_the_deadline(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "progress", 8).await;
    let Some(deadline) = stage.features.ack_deadline.filter(|deadline| *deadline <= LONG_DEADLINE) else {
        return stage.end().await;
    };
    let mut inbox = stage.subscribe().await;
    stage.send("long").await;
    let acker = inbox.next().await.into_parts().1;
    for _ in 0..10 {
        acker.progress();
        sleep(deadline / 4).await;
    }
    acker.progress();
    inbox.stays_quiet("it is in hand and progressing").await;
    settle_by(acker, Disposition::Ack).await;
    inbox.close().await;
    stage.depth_becomes(0).await;
    stage.end().await;
}
