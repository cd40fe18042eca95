//! The in-memory broker: the contract of all brokers, and what it has beside it.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use guestlist::broker::copy::DeadLetter;
use guestlist::broker::memory::{MemoryBroker, PublishFault};
use guestlist::broker::{Broker, BrokerErrorKind, Copy, Declare, Destination, QueueSpec, Subscription};
use guestlist::testing::broker_contract::{BrokerFixture, broker_contract};
use guestlist::{Acker, Delivery, Disposition, Message, MessageBuilder};
use tokio::time::{Instant, timeout};

struct InMemory(MemoryBroker);

#[async_trait]
impl BrokerFixture for InMemory {
    async fn connect(&self) -> Arc<dyn Broker> {
        Arc::new(self.0.clone())
    }

    fn queue(&self, name: &str, prefetch: u16) -> QueueSpec {
        let mut queue = QueueSpec::new(name);
        queue.declare = Declare::Create;
        queue.prefetch = prefetch;
        queue.dead_letter = Some(format!("{name}.dead").into());
        queue
    }

    async fn send(&self, queue: &QueueSpec, id: &str, headers: &[(&str, &str)], body: &[u8]) {
        let message = Message::builder(body.to_vec()).transport_id(id.to_owned());
        let message = headers.iter().fold(message, add_header);
        self.0.send(&queue.name, message).unwrap();
    }

    async fn depth(&self, queue: &QueueSpec) -> u64 {
        self.0.depth(&queue.name).unwrap() as u64
    }

    async fn read_dead_letters(&self, queue: &QueueSpec) -> Vec<Message> {
        self.0.messages(queue.dead_letter.as_ref().unwrap().name()).unwrap()
    }

    async fn delete_dead_letters(&self, queue: &QueueSpec) {
        self.0.delete(queue.dead_letter.as_ref().unwrap().name());
    }
}

fn add_header(message: MessageBuilder, (name, value): &(&str, &str)) -> MessageBuilder {
    message.header(*name, (*value).to_owned())
}

#[tokio::test]
async fn it_keeps_the_contract_in_real_time() {
    broker_contract(&InMemory(MemoryBroker::new())).await;
}

#[tokio::test(start_paused = true)]
async fn it_keeps_the_contract_with_a_paused_clock() {
    broker_contract(&InMemory(MemoryBroker::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_keeps_the_contract_with_two_threads() {
    broker_contract(&InMemory(MemoryBroker::new())).await;
}

const QUEUE: &str = "orders";

/// A broker with one queue of these messages, whose ids are their bodies.
fn broker_with(messages: &[&str]) -> MemoryBroker {
    let broker = MemoryBroker::new();
    broker.declare(QUEUE);
    for &id in messages {
        broker.send(QUEUE, Message::builder(id.to_owned()).transport_id(id.to_owned())).unwrap();
    }
    broker
}

async fn subscribe(broker: &MemoryBroker) -> Box<dyn Subscription> {
    broker.subscribe(&QueueSpec::new(QUEUE)).await.unwrap()
}

async fn next(subscription: &mut Box<dyn Subscription>) -> Delivery {
    let next = timeout(Duration::from_secs(20), poll_fn(|cx| subscription.poll_next(cx, 1)));
    next.await.expect("a delivery was due").expect("the subscription ended").unwrap()
}

async fn settle(delivery: Delivery, disposition: Disposition) -> Result<(), BrokerErrorKind> {
    delivery.into_parts().1.settle(disposition).await.map_err(|error| error.kind())
}

fn body(delivery: &Delivery) -> &str {
    std::str::from_utf8(delivery.message().payload()).unwrap()
}

#[tokio::test]
async fn messages_come_in_the_order_of_sending_and_keep_their_place() {
    let broker = broker_with(&["1", "2", "3"]);
    let mut subscription = subscribe(&broker).await;
    let (first, second) = (next(&mut subscription).await, next(&mut subscription).await);
    assert_eq!((body(&first), body(&second)), ("1", "2"));
    settle(second, Disposition::Abandon).await.unwrap();
    settle(first, Disposition::Abandon).await.unwrap();
    for expected in ["1", "2", "3"] {
        let delivery = next(&mut subscription).await;
        assert_eq!(body(&delivery), expected);
        settle(delivery, Disposition::Ack).await.unwrap();
    }
}

#[tokio::test]
async fn deliveries_are_counted_and_marked() {
    let broker = broker_with(&["1"]);
    let mut subscription = subscribe(&broker).await;
    for count in 1..=3 {
        let delivery = next(&mut subscription).await;
        assert_eq!(delivery.message().broker_deliveries(), Some(count));
        assert_eq!(delivery.message().redelivered(), count > 1);
        assert_eq!(delivery.message().attempt(), count);
    }
}

#[tokio::test]
async fn a_crash_brings_back_what_was_in_hand() {
    let broker = broker_with(&["1", "2"]);
    let mut killed = subscribe(&broker).await;
    settle(next(&mut killed).await, Disposition::Ack).await.unwrap();
    let _in_hand = next(&mut killed).await;
    broker.crash(QUEUE).unwrap();
    let mut other = subscribe(&broker).await;
    let again = next(&mut other).await;
    assert_eq!((body(&again), again.message().redelivered()), ("2", true));
}

#[tokio::test]
async fn after_a_crash_old_deliveries_change_nothing_and_say_closed() {
    let late = [
        Disposition::Ack,
        Disposition::Reject,
        Disposition::Abandon,
        Disposition::Requeue { after: Duration::ZERO },
        Disposition::Release { after: Duration::from_secs(1) },
    ];
    for late in late {
        let broker = broker_with(&["1"]);
        let mut killed = subscribe(&broker).await;
        let old = next(&mut killed).await;
        broker.crash(QUEUE).unwrap();
        let mut other = subscribe(&broker).await;
        let newer = next(&mut other).await;
        assert_eq!(settle(old, late).await, Err(BrokerErrorKind::Closed), "{late:?}");
        assert_eq!(broker.depth(QUEUE).unwrap(), 1, "{late:?}");
        settle(newer, Disposition::Ack).await.unwrap();
        assert_eq!(broker.depth(QUEUE).unwrap(), 0, "{late:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_crash_and_a_deletion_wake_who_waits() {
    let broker = broker_with(&[]);
    let mut killed = subscribe(&broker).await;
    let waiting = tokio::spawn(async move {
        let first = poll_fn(|cx| killed.poll_next(cx, 1)).await;
        (first, poll_fn(|cx| killed.poll_next(cx, 1)).await)
    });
    tokio::task::yield_now().await;
    broker.crash(QUEUE).unwrap();
    let (first, second) = within(waiting).await.unwrap();
    assert_eq!(first.unwrap().unwrap_err().kind(), BrokerErrorKind::Closed);
    assert!(second.is_none(), "the crash is told once");

    let mut deleted = subscribe(&broker).await;
    let waiting = tokio::spawn(async move { poll_fn(|cx| deleted.poll_next(cx, 1)).await });
    tokio::task::yield_now().await;
    broker.delete(QUEUE);
    assert!(within(waiting).await.unwrap().is_none());
}

#[tokio::test]
async fn a_deleted_queue_is_another_when_declared_again() {
    let broker = broker_with(&["1"]);
    let mut subscription = subscribe(&broker).await;
    let old = next(&mut subscription).await;
    broker.delete(QUEUE);
    assert_eq!(broker.depth(QUEUE).unwrap_err().kind(), BrokerErrorKind::Refused);
    broker.declare(QUEUE);
    broker.send(QUEUE, Message::builder("2")).unwrap();
    assert_eq!(settle(old, Disposition::Ack).await, Err(BrokerErrorKind::Closed));
    assert!(poll_fn(|cx| subscription.poll_next(cx, 1)).await.is_none());
    assert_eq!(broker.depth(QUEUE).unwrap(), 1);
}

#[tokio::test]
async fn a_dropped_subscription_is_closed() {
    let broker = broker_with(&["1"]);
    let mut dropped = subscribe(&broker).await;
    let _in_hand = next(&mut dropped).await;
    drop(dropped);
    let mut other = subscribe(&broker).await;
    assert_eq!(body(&next(&mut other).await), "1");
}

#[tokio::test(start_paused = true)]
async fn delays_of_hours_take_no_time_and_are_exact() {
    let broker = broker_with(&["1", "2"]);
    let mut subscription = subscribe(&broker).await;
    let begin = Instant::now();
    let delay = Duration::from_secs(24 * 3600);
    for times in [2, 1] {
        let delivery = next(&mut subscription).await;
        settle(delivery, Disposition::Requeue { after: times * delay }).await.unwrap();
    }
    for (expected, times) in [("2", 1), ("1", 2)] {
        let delivery = poll_fn(|cx| subscription.poll_next(cx, 1)).await.unwrap().unwrap();
        assert_eq!((body(&delivery), begin.elapsed()), (expected, times * delay));
        settle(delivery, Disposition::Ack).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_shorter_delay_is_seen_by_who_waits_for_a_longer_one() {
    let broker = broker_with(&["long", "short"]);
    let mut waiting = subscribe(&broker).await;
    let long = next(&mut waiting).await;
    let short = next(&mut waiting).await.into_parts().1;
    settle(long, Disposition::Requeue { after: Duration::from_secs(60) }).await.unwrap();
    let begin = Instant::now();
    let later = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        short.settle(Disposition::Requeue { after: Duration::from_secs(1) }).await.unwrap();
    });
    assert_eq!(body(&next(&mut waiting).await), "short");
    assert_eq!(begin.elapsed(), Duration::from_secs(2));
    later.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_delay_without_end_is_no_panic() {
    let broker = broker_with(&["1"]);
    let mut subscription = subscribe(&broker).await;
    let delivery = next(&mut subscription).await;
    settle(delivery, Disposition::Requeue { after: Duration::MAX }).await.unwrap();
    assert_eq!(broker.depth(QUEUE).unwrap(), 1);
    let waited = timeout(Duration::from_secs(60), poll_fn(|cx| subscription.poll_next(cx, 1))).await;
    assert!(waited.is_err());
}

#[tokio::test(start_paused = true)]
async fn drained_waits_for_the_last_ack() {
    let broker = broker_with(&["1", "2"]);
    let mut subscription = subscribe(&broker).await;
    let (one, two) = (next(&mut subscription).await, next(&mut subscription).await);
    let drained = tokio::spawn({
        let broker = broker.clone();
        async move { broker.drained(QUEUE).await }
    });
    settle(one, Disposition::Ack).await.unwrap();
    tokio::time::advance(Duration::from_secs(60)).await;
    assert!(!drained.is_finished(), "one message is still in hand");
    settle(two, Disposition::Ack).await.unwrap();
    within(drained).await.unwrap().unwrap();
    within(broker.drained(QUEUE)).await.unwrap();
}

#[tokio::test]
async fn a_lost_ack_is_told_as_done_and_the_message_comes_again() {
    let broker = broker_with(&["1"]);
    broker.lose_acks(QUEUE, 1).unwrap();
    let mut subscription = subscribe(&broker).await;
    settle(next(&mut subscription).await, Disposition::Ack).await.unwrap();
    let again = next(&mut subscription).await;
    assert!(again.message().redelivered());
    settle(again, Disposition::Ack).await.unwrap();
    assert_eq!(broker.depth(QUEUE).unwrap(), 0);
}

#[tokio::test]
async fn publishing_fails_as_often_and_as_it_was_asked_to() {
    let broker = broker_with(&[]);
    broker.fail_publishes(2, PublishFault::NotRouted);
    broker.fail_publishes(1, PublishFault::Nacked);
    broker.fail_publishes(1, PublishFault::LostCopy);
    broker.fail_publishes(1, PublishFault::LostConfirm);
    let expected = [
        (Err(BrokerErrorKind::NotRouted), 0),
        (Err(BrokerErrorKind::NotRouted), 0),
        (Err(BrokerErrorKind::Nacked), 0),
        (Err(BrokerErrorKind::Unknown), 0),
        (Err(BrokerErrorKind::Unknown), 1),
        (Ok(()), 2),
    ];
    let message = Message::builder("{}").transport_id("1").build();
    for (answer, depth) in expected {
        let published = broker.publish(&Destination::new(QUEUE), &Copy::hold(&message)).await;
        assert_eq!(published.map_err(|error| error.kind()), answer);
        assert_eq!(broker.depth(QUEUE).unwrap(), depth);
    }
}

#[tokio::test]
async fn looking_at_messages_changes_nothing_and_sees_all() {
    let broker = broker_with(&["out", "delayed", "waiting"]);
    let mut subscription = subscribe(&broker).await;
    let out = next(&mut subscription).await;
    let delayed = next(&mut subscription).await;
    settle(delayed, Disposition::Requeue { after: Duration::from_secs(60) }).await.unwrap();
    for _ in 0..2 {
        let seen = broker.messages(QUEUE).unwrap();
        let bodies: Vec<_> = seen.iter().map(|message| message.payload().clone()).collect();
        assert_eq!(bodies, ["out", "delayed", "waiting"]);
    }
    settle(out, Disposition::Ack).await.unwrap();
    assert_eq!(broker.messages(QUEUE).unwrap().len(), 2);
}

#[tokio::test]
async fn all_that_a_sender_sets_arrives_also_on_a_copy() {
    let broker = broker_with(&[]);
    let sent_at = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
    let sent = Message::builder("{}").transport_id("1").content_type("application/json").priority(7);
    broker.send(QUEUE, sent.timestamp(sent_at).header("twice", "1").header("twice", "2")).unwrap();
    let mut subscription = subscribe(&broker).await;
    let delivery = next(&mut subscription).await;
    broker.publish(&Destination::new(QUEUE), &Copy::hold(delivery.message())).await.unwrap();
    let copy = next(&mut subscription).await;
    for message in [delivery.message(), copy.message()] {
        assert_eq!(message.id().unwrap().as_bytes(), b"1");
        assert_eq!(message.content_type(), Some("application/json"));
        assert_eq!(message.priority(), Some(7));
        assert_eq!(message.timestamp(), Some(sent_at));
        let twice: Vec<_> = message.headers().iter().map(|(_, value)| value.clone()).collect();
        assert_eq!(twice, ["1", "2"]);
    }
    assert_eq!(copy.message().attempt(), 2);
}

/// What AMQP moved aside on a message that was carried over to this broker.
#[tokio::test]
async fn what_another_broker_moved_aside_is_kept_on_copies_of_copies() {
    let broker = broker_with(&[]);
    let moved = Message::builder("{}").transport_id("1").header("guestlist-orig-h-CC", "other");
    broker.send(QUEUE, moved.header("guestlist-orig-p-expiration", "5000")).unwrap();
    let mut message = broker.messages(QUEUE).unwrap().remove(0);
    for _ in 0..2 {
        assert_eq!(message.headers().get_str("CC"), Some("other"));
        assert_eq!(message.headers().len(), 1);
        let copy = Copy::hold(&message);
        assert!(copy.moved([]).iter().any(|moved| moved.1 == "5000"));
        broker.publish(&Destination::new(QUEUE), &copy).await.unwrap();
        message = broker.messages(QUEUE).unwrap().pop().unwrap();
    }
}

#[tokio::test]
async fn a_message_of_a_stranger_is_no_dead_letter() {
    let broker = broker_with(&["1"]);
    assert_eq!(DeadLetter::read(&broker.messages(QUEUE).unwrap()[0]), None);
}

#[tokio::test]
async fn without_a_runtime_a_dropped_acker_gives_its_message_back() {
    let broker = broker_with(&["1"]);
    let mut subscription = subscribe(&broker).await;
    let acker: Acker = next(&mut subscription).await.into_parts().1;
    std::thread::spawn(move || drop(acker)).join().unwrap();
    assert_eq!(body(&next(&mut subscription).await), "1");
}

async fn within<F: IntoFuture>(future: F) -> F::Output {
    timeout(Duration::from_secs(3600), future.into_future()).await.expect("it did not end")
}
