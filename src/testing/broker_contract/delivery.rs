//! Cases: what is sent arrives, once, whole, and no more of it at once than asked for.

use std::collections::BTreeSet;
use std::future::{poll_fn, ready};
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::BrokerFixture;
use super::stage::{Inbox, Stage, ack_all, ids, ids_below, settle, settle_by, text_id};
use crate::{Delivery, Disposition, Message};

/// Values that have been broken before: by parsers of headers, by trimming, by percent signs.
pub(super) const ODD_HEADERS: [(&str, &str); 7] = [
    ("x-empty", ""),
    ("x-unicode", "naïve 日本語 🎉"),
    ("x-percent", "100%25%0D%0A%"),
    ("x-structure", r#"a: b, "c"; d={e} \ f"#),
    ("x-spaces", "two  spaces"),
    ("X-MiXeD-CaSe", "Value"),
    ("x-number", "0042"),
];

/// Panics unless `message` has each of these headers once, with its value.
pub(super) fn assert_headers(message: &Message, sent: &[(&str, &str)], where_from: &str) {
    for (name, value) in sent {
        let found: Vec<_> = message.headers().iter().filter(|(n, _)| n == name).collect();
        assert_eq!(found.len(), 1, "{where_from}: header {name} is there {} times", found.len());
        assert_eq!(found[0].1, value.as_bytes(), "{where_from}: header {name} has another value");
    }
}

/// Every message is delivered with its id, headers and body, whatever bytes the body has, and
/// says which system and queue it came from.
pub async fn every_message_arrives_with_its_id_headers_and_body(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "every_message_arrives", 8).await;
    let mut inbox = stage.subscribe().await;
    let every_byte: Vec<u8> = (0..=255).collect();
    let large = vec![b'x'; 200_000];
    let bodies: [&[u8]; 3] = [b"", &every_byte, &large];
    for (id, body) in bodies.iter().enumerate() {
        let id = id.to_string();
        stage.fixture.send(&stage.queue, &id, &[("x-copy-of-id", &id), ("x-kind", "test")], body).await;
    }
    let arrived = inbox.take(bodies.len()).await;
    assert_eq!(ids(&arrived), ids_below(bodies.len()));
    for delivery in &arrived {
        assert_whole(&stage, delivery.message(), &bodies);
    }
    ack_all(arrived).await;
    inbox.close().await;
    stage.end().await;
}

fn assert_whole(stage: &Stage<'_>, message: &Message, bodies: &[&[u8]]) {
    let id = text_id(message);
    let body = bodies.iter().enumerate().find(|(index, _)| index.to_string() == id).map(|(_, body)| *body);
    assert_eq!(Some(&message.payload()[..]), body, "message {id} must have the body that was sent");
    assert_headers(message, &[("x-copy-of-id", &id), ("x-kind", "test")], "as delivered");
    assert_eq!(message.source().system, stage.broker.system());
    assert_eq!(message.source().queue, stage.queue.name, "the source must name the queue");
    assert_eq!(message.attempt(), 1, "the first delivery must be hinted as attempt 1");
    assert!(!message.redelivered(), "the first delivery must not be marked as another");
}

/// Headers arrive as they were sent: empty, not ASCII, with percent signs, quotes, spaces.
pub async fn headers_with_odd_values_survive(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "odd_headers", 8).await;
    let mut inbox = stage.subscribe().await;
    let long = "v".repeat(4_000);
    let sent: Vec<_> = ODD_HEADERS.into_iter().chain([("x-long", long.as_str())]).collect();
    stage.fixture.send(&stage.queue, "odd", &sent, b"{}").await;
    let delivery = inbox.next().await;
    assert_headers(delivery.message(), &sent, "as delivered");
    settle(delivery, Disposition::Ack).await;
    inbox.close().await;
    stage.end().await;
}

/// Messages that were sent while nobody was subscribed wait, and arrive.
pub async fn messages_sent_before_the_subscription_arrive(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "sent_before", 8).await;
    stage.send_many(3).await;
    let mut inbox = stage.subscribe().await;
    let arrived = inbox.take(3).await;
    assert_eq!(ids(&arrived), ids_below(3));
    ack_all(arrived).await;
    inbox.close().await;
    stage.end().await;
}

/// What is acked does not come again, and the queue does not keep it.
pub async fn acked_messages_leave_the_queue_empty(fixture: &dyn BrokerFixture) {
    messages_leave_by(fixture, "acked", Disposition::Ack).await;
}

/// What is rejected does not come again, and the queue does not keep it.
pub async fn rejected_messages_leave_the_queue_empty(fixture: &dyn BrokerFixture) {
    messages_leave_by(fixture, "rejected", Disposition::Reject).await;
}

async fn messages_leave_by(fixture: &dyn BrokerFixture, case: &str, disposition: Disposition) {
    let stage = Stage::new(fixture, case, 4).await;
    let mut inbox = stage.subscribe().await;
    stage.send_many(10).await;
    for _ in 0..10 {
        settle(inbox.next().await, disposition).await;
    }
    inbox.stays_quiet("all were settled").await;
    inbox.close().await;
    stage.depth_becomes(0).await;
    let mut later = stage.subscribe().await;
    later.stays_quiet("all were settled before").await;
    later.close().await;
    stage.end().await;
}

/// No more than the prefetch is delivered and unsettled at once; each settlement makes room.
pub async fn no_more_than_the_prefetch_is_out_at_once(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "prefetch", 2).await;
    let mut inbox = stage.subscribe().await;
    stage.send_many(5).await;
    let mut out = inbox.take(2).await;
    inbox.stays_quiet("two are out and the prefetch is two").await;
    for _ in 2..5 {
        settle(out.remove(0), Disposition::Ack).await;
        out.push(inbox.next().await);
    }
    ack_all(out).await;
    inbox.close().await;
    stage.depth_becomes(0).await;
    stage.end().await;
}

/// A wait for the next delivery that is dropped, at any moment, loses and doubles nothing.
pub async fn a_dropped_poll_loses_nothing(fixture: &dyn BrokerFixture) {
    const MESSAGES: usize = 100;
    let stage = Stage::new(fixture, "dropped_poll", 7).await;
    let mut inbox = stage.subscribe().await;
    let begin = Instant::now();
    let mut seen = BTreeSet::new();
    for id in 0..MESSAGES {
        stage.send(&id.to_string()).await;
        take_by_dropped_polls(&mut inbox, &mut seen).await;
    }
    while seen.len() < MESSAGES {
        assert!(begin.elapsed() < 2 * stage.patience(), "{} of {MESSAGES} messages came", seen.len());
        take_by_dropped_polls(&mut inbox, &mut seen).await;
    }
    inbox.stays_quiet("all were acked").await;
    inbox.close().await;
    stage.end().await;
}

/// Polls once against a future that is ready, and once against one that soon is.
async fn take_by_dropped_polls(inbox: &mut Inbox, seen: &mut BTreeSet<String>) {
    let at_once = tokio::select! { biased; next = inbox.poll(7) => Some(next), () = ready(()) => None };
    let soon = timeout(Duration::from_millis(1), inbox.poll(7)).await.ok();
    for next in [at_once, soon].into_iter().flatten() {
        match next {
            Some(Ok(delivery)) => ack_once(delivery, seen).await,
            end => panic!("a dropped poll ended the subscription: {end:?}"),
        }
    }
}

async fn ack_once(delivery: Delivery, seen: &mut BTreeSet<String>) {
    let id = text_id(delivery.message());
    assert!(seen.insert(id.clone()), "a dropped poll doubled message {id}");
    settle(delivery, Disposition::Ack).await;
}

/// After `cancel` nothing is delivered any more, and those in hand can still be settled.
pub async fn cancel_stops_deliveries_and_spares_those_in_hand(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "cancel_stops", 8).await;
    let mut inbox = stage.subscribe().await;
    stage.send_many(2).await;
    let in_hand = inbox.take(2).await;
    inbox.subscription.cancel().await;
    inbox.ends().await;
    ack_all(in_hand).await;
    inbox.close().await;
    if stage.features.redelivers {
        stage.depth_becomes(0).await;
    }
    stage.end().await;
}

/// `cancel` hands back at once what was buffered and not delivered; `close` loses nothing, and
/// what was acked between the two does not come again.
pub async fn cancelled_and_closed_nothing_is_lost(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "cancelled_and_closed", 8).await;
    let mut first = stage.subscribe().await;
    stage.send_many(6).await;
    let mut in_hand = first.take(2).await;
    let acked = in_hand.remove(0);
    let mut left = ids_below(6);
    left.remove(&text_id(acked.message()));
    first.subscription.cancel().await;
    first.ends().await;

    let mut second = stage.subscribe().await;
    let mut rest = second.take(4).await;
    settle(acked, Disposition::Ack).await;
    let unsettled = in_hand.remove(0).into_parts().1;
    settle_by(unsettled, Disposition::Abandon).await;
    first.close().await;
    rest.push(second.next().await);
    assert_eq!(ids(&rest), left, "all but the acked one must come to the second subscription");
    ack_all(rest).await;
    second.close().await;
    stage.depth_becomes(0).await;
    stage.end().await;
}

/// Two subscriptions to one queue both get deliveries, and none gets the other's.
pub async fn two_subscriptions_share_the_work(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "shared", 4).await;
    let other = fixture.connect().await;
    let mut one = stage.subscribe().await;
    let mut two = stage.subscribe_by(&*other).await;
    stage.send_many(8).await;
    let mut seen = BTreeSet::new();
    let (from_one, from_two) = (one.next_with_room(1).await, two.next_with_room(1).await);
    ack_once(from_one, &mut seen).await;
    ack_once(from_two, &mut seen).await;
    while seen.len() < 8 {
        let next = timeout(stage.patience(), next_of_two(&mut one, &mut two)).await;
        let next = next.unwrap_or_else(|_| panic!("two subscriptions got {seen:?} of 8 messages"));
        ack_once(next, &mut seen).await;
    }
    one.stays_quiet("all were acked").await;
    two.stays_quiet("all were acked").await;
    one.close().await;
    two.close().await;
    other.close().await;
    stage.end().await;
}

async fn next_of_two(one: &mut Inbox, two: &mut Inbox) -> Delivery {
    poll_fn(|cx| {
        for inbox in [&mut *one, &mut *two] {
            match inbox.subscription.poll_next(cx, 1) {
                Poll::Ready(Some(Ok(delivery))) => return Poll::Ready(delivery),
                Poll::Ready(end) => panic!("a shared subscription ended: {end:?}"),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    })
    .await
}
