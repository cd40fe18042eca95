//! Dispositions, as a stranger beside sees them.

use std::time::{Duration, Instant};

use guestlist::broker::amqp::lapin::types::{AMQPValue, FieldTable};
use guestlist::broker::amqp::lapin::{BasicProperties, types};
use guestlist::broker::amqp::split;
use guestlist::broker::{Broker, BrokerErrorKind, QueueKind};
use guestlist::{Acker, Delivery, Disposition, Message};

use super::rabbit::{KINDS, Rabbit, current, delivery, hold_queue, prepared, text};

async fn settle(delivery: Delivery, disposition: Disposition) {
    delivery.into_parts().1.settle(disposition).await.unwrap();
}

#[tokio::test]
async fn a_queue_is_empty_after_all_is_acked() {
    for kind in KINDS {
        let (broker, queue) = prepared("acked", kind).await;
        let rabbit = Rabbit::new().await;
        for id in 0..20 {
            rabbit.send(&queue.name, &id.to_string()).await;
        }
        let mut subscription = broker.subscribe(&queue).await.unwrap();
        for _ in 0..20 {
            settle(delivery(&mut subscription).await, Disposition::Ack).await;
        }
        subscription.close().await;
        assert_eq!(rabbit.ready(&queue.name).await, 0, "{kind:?}");
    }
}

#[tokio::test]
async fn an_abandoned_delivery_comes_again_and_quorum_queues_count_it() {
    for kind in KINDS {
        let (broker, queue) = prepared("abandoned", kind).await;
        Rabbit::new().await.send(&queue.name, "a").await;
        let mut subscription = broker.subscribe(&queue).await.unwrap();
        for before in 0..3_u32 {
            let delivery = delivery(&mut subscription).await;
            let message = delivery.message();
            let counted = kind == QueueKind::Quorum && before > 0;
            assert_eq!(message.broker_deliveries(), counted.then_some(before + 1), "{kind:?}");
            assert_eq!(message.redelivered(), before > 0);
            assert!(message.headers().is_empty(), "the broker's counters are not the sender's headers");
            settle(delivery, Disposition::Abandon).await;
        }
        settle(delivery(&mut subscription).await, Disposition::Ack).await;
        subscription.close().await;
    }
}

#[tokio::test]
async fn the_counters_of_another_queue_do_not_count() {
    let (broker, queue) = prepared("counters", QueueKind::Classic).await;
    let mut headers = FieldTable::default();
    headers.insert("x-delivery-count".into(), AMQPValue::LongLongInt(20));
    headers.insert("x-acquired-count".into(), AMQPValue::LongLongInt(21));
    let properties = BasicProperties::default().with_headers(headers);
    Rabbit::new().await.send_as(&queue.name, properties, b"").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    let delivery = delivery(&mut subscription).await;
    assert_eq!((delivery.message().broker_deliveries(), delivery.message().attempt()), (None, 1));
    settle(delivery, Disposition::Ack).await;
    subscription.close().await;
}

#[tokio::test]
async fn abandoning_reaches_no_delivery_limit_on_rabbitmq_4() {
    if !current() {
        return println!("skipped: RabbitMQ 3 counts what is given back");
    }
    let rabbit = Rabbit::new().await;
    let (broker, mut queue) = prepared("limit", QueueKind::Quorum).await;
    queue.name += ".limited";
    queue.declare = guestlist::broker::Declare::Check;
    let limit = [("x-queue-type", text("quorum")), ("x-delivery-limit", AMQPValue::LongInt(2))];
    rabbit.declare(&queue.name, &limit).await;
    rabbit.send(&queue.name, "a").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    for _ in 0..10 {
        settle(delivery(&mut subscription).await, Disposition::Abandon).await;
    }
    settle(delivery(&mut subscription).await, Disposition::Ack).await;
    subscription.close().await;
}

#[tokio::test]
async fn a_requeued_message_waits_in_the_hold_queue_and_comes_back_as_its_original() {
    for kind in KINDS {
        let (broker, queue) = prepared("requeued", kind).await;
        let rabbit = Rabbit::new().await;
        let mut headers = FieldTable::default();
        headers.insert("kind".into(), text("charge"));
        headers.insert("number".into(), AMQPValue::LongInt(-7));
        headers.insert("CC".into(), AMQPValue::FieldArray(vec![text("test.nobody")].into()));
        let properties = BasicProperties::default()
            .with_message_id("charge-1".into())
            .with_content_type("application/json".into())
            .with_user_id("guest".into())
            .with_expiration("600000".into())
            .with_priority(3)
            .with_timestamp(1_700_000_000)
            .with_headers(headers);
        rabbit.send_as(&queue.name, properties, b"{\"cents\":1}").await;
        let mut subscription = broker.subscribe(&queue).await.unwrap();
        let first = delivery(&mut subscription).await;
        let original = first.message().clone();
        let begin = Instant::now();
        let (_, acker) = first.into_parts();
        acker.settle(Disposition::Requeue { after: Duration::from_secs(1) }).await.unwrap();
        for attempt in 2..=3 {
            let again = delivery(&mut subscription).await;
            let message = again.message();
            assert!(
                begin.elapsed() >= (attempt - 1) * queue.holds.shortest(),
                "{kind:?}: it waited one step"
            );
            assert_eq!(message.id(), original.id());
            assert_eq!(message.payload(), original.payload());
            assert_eq!(sorted(message), sorted(&original), "{kind:?}");
            assert_eq!(message.content_type(), original.content_type());
            assert_eq!(message.priority(), original.priority());
            assert_eq!(message.timestamp(), original.timestamp());
            assert_eq!(message.source(), original.source());
            assert_eq!(message.attempt(), attempt);
            assert!(!message.redelivered(), "it is a copy");
            settle(again, Disposition::Requeue { after: Duration::ZERO }).await;
        }
        settle(delivery(&mut subscription).await, Disposition::Ack).await;
        subscription.close().await;
        for name in [&queue.name, &hold_queue(&queue)] {
            rabbit.ready_becomes(name, 0).await;
        }
    }
}

fn sorted(message: &Message) -> Vec<(&str, &[u8])> {
    let mut headers: Vec<_> = message.headers().iter().map(|(name, value)| (name, &value[..])).collect();
    headers.sort_unstable();
    headers
}

#[tokio::test]
async fn a_release_is_no_attempt() {
    let (broker, queue) = prepared("released", QueueKind::Quorum).await;
    Rabbit::new().await.send(&queue.name, "a").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    for _ in 0..3 {
        let delivery = delivery(&mut subscription).await;
        assert_eq!(delivery.message().attempt(), 1);
        settle(delivery, Disposition::Release { after: Duration::from_secs(1) }).await;
    }
    settle(delivery(&mut subscription).await, Disposition::Ack).await;
    subscription.close().await;
}

#[tokio::test]
async fn if_the_hold_copy_fails_the_original_comes_again_after_a_pause_and_the_hold_queue_is_made_again() {
    let (broker, queue) = prepared("no_hold", QueueKind::Quorum).await;
    let rabbit = Rabbit::new().await;
    rabbit.delete(&hold_queue(&queue)).await;
    rabbit.send(&queue.name, "a").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    let begin = Instant::now();
    let (_, acker) = delivery(&mut subscription).await.into_parts();
    let told = acker.settle(Disposition::Requeue { after: Duration::from_millis(1) }).await;
    assert_eq!(told.unwrap_err().kind(), BrokerErrorKind::NotRouted);
    assert!(begin.elapsed() >= Duration::from_secs(1), "it was over too soon");
    settle(delivery(&mut subscription).await, Disposition::Requeue { after: Duration::from_millis(1) }).await;
    // Not by the copy in it, which is there for 300 ms.
    assert!(rabbit.exists(&hold_queue(&queue)).await, "made again");
    settle(delivery(&mut subscription).await, Disposition::Ack).await;
    subscription.close().await;
    assert_eq!(rabbit.ready(&queue.name).await, 0);
}

#[tokio::test]
async fn a_settlement_that_is_dropped_half_way_gives_the_delivery_back() {
    let (broker, queue) = prepared("dropped", QueueKind::Quorum).await;
    let rabbit = Rabbit::new().await;
    rabbit.delete(&hold_queue(&queue)).await;
    rabbit.send(&queue.name, "a").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    let (_, acker) = delivery(&mut subscription).await.into_parts();
    let told = acker.settle(Disposition::Requeue { after: Duration::from_secs(1) });
    // Dropped in the pause after the copy failed. The clock is asked first: both are over after a long stall.
    tokio::select! {
        biased;
        () = tokio::time::sleep(Duration::from_millis(200)) => {}
        _ = told => panic!("it was over too soon"),
    }
    settle(delivery(&mut subscription).await, Disposition::Ack).await;
    subscription.close().await;
}

#[tokio::test]
async fn an_acker_that_is_dropped_abandons() {
    let (broker, queue) = prepared("dropped_acker", QueueKind::Classic).await;
    Rabbit::new().await.send(&queue.name, "a").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    let counted = Acker::dropped_unsettled();
    drop(delivery(&mut subscription).await);
    assert!(Acker::dropped_unsettled() > counted);
    let again = delivery(&mut subscription).await;
    assert!(again.message().redelivered());
    settle(again, Disposition::Ack).await;
    subscription.close().await;
}

#[tokio::test]
async fn a_rejected_message_goes_where_the_queues_own_policy_says() {
    let rabbit = Rabbit::new().await;
    let (broker, mut queue) = prepared("rejected", QueueKind::Quorum).await;
    let bin = format!("{}.bin", queue.name);
    queue.name += ".with_bin";
    rabbit.declare(&bin, &[]).await;
    let to_bin = [("x-dead-letter-exchange", text("")), ("x-dead-letter-routing-key", text(&bin))];
    rabbit.declare(&queue.name, &to_bin).await;
    rabbit.send(&queue.name, "a").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    settle(delivery(&mut subscription).await, Disposition::Reject).await;
    let binned = rabbit.take(&bin).await;
    assert_eq!(binned.properties.message_id(), &Some("a".into()));
    subscription.close().await;
}

/// So long that a stall is not taken for it.
const LATER: Duration = Duration::from_secs(4);

#[tokio::test]
async fn in_a_loop_of_your_own_a_split_delivery_is_settled_by_its_own_channel() {
    let (_, queue) = prepared("own_loop", QueueKind::Classic).await;
    let rabbit = Rabbit::new().await;
    for id in ["ack", "later", "drop"] {
        rabbit.send(&queue.name, id).await;
    }
    let mut consumer = rabbit.consume(&queue.name).await;
    let mut ids = Vec::new();
    for disposition in [Some(Disposition::Ack), Some(Disposition::Requeue { after: LATER }), None] {
        let (message, acker) = split(next_frame(&mut consumer).await);
        ids.push(message.id().unwrap().as_str().unwrap().to_owned());
        let begin = Instant::now();
        match disposition {
            Some(disposition) => acker.settle(disposition).await.unwrap(),
            None => drop(acker),
        }
        let delayed = matches!(disposition, Some(Disposition::Requeue { .. }));
        assert_eq!(begin.elapsed() >= LATER, delayed);
    }
    assert_eq!(ids, ["ack", "later", "drop"]);
    for _ in 0..2 {
        let (message, acker) = split(next_frame(&mut consumer).await);
        assert!(message.redelivered());
        acker.settle(Disposition::Ack).await.unwrap();
    }
    assert_eq!(rabbit.ready(&queue.name).await, 0);
}

async fn next_frame(
    consumer: &mut guestlist::broker::amqp::lapin::Consumer,
) -> guestlist::broker::amqp::lapin::message::Delivery {
    futures_util::StreamExt::next(consumer).await.unwrap().unwrap()
}

#[tokio::test]
async fn headers_of_every_amqp_type_are_read() {
    let (broker, queue) = prepared("types", QueueKind::Classic).await;
    let rabbit = Rabbit::new().await;
    let inner = FieldTable::from(std::collections::BTreeMap::from([("k".into(), AMQPValue::LongInt(1))]));
    let decimal = types::DecimalValue { scale: 2, value: 150 };
    let cases: [(&str, AMQPValue, &[u8]); 18] = [
        ("bool", AMQPValue::Boolean(true), b"true"),
        ("i8", AMQPValue::ShortShortInt(-8), b"-8"),
        ("u8", AMQPValue::ShortShortUInt(200), b"200"),
        ("i16", AMQPValue::ShortInt(-300), b"-300"),
        ("u16", AMQPValue::ShortUInt(60_000), b"60000"),
        ("i32", AMQPValue::LongInt(-70_000), b"-70000"),
        ("u32", AMQPValue::LongUInt(4_000_000_000), b"4000000000"),
        ("i64", AMQPValue::LongLongInt(i64::MIN), b"-9223372036854775808"),
        ("f32", AMQPValue::Float(1.5), b"1.5"),
        ("f64", AMQPValue::Double(-0.25), b"-0.25"),
        ("decimal", AMQPValue::DecimalValue(decimal), b"1.5"),
        ("text", text("a b"), b"a b"),
        ("not utf-8", AMQPValue::LongString(vec![0xFF, 0, b'x'].into()), b"\xFF\0x"),
        ("list", AMQPValue::FieldArray(vec![text("a"), AMQPValue::LongInt(2)].into()), br#"["a",2]"#),
        ("time", AMQPValue::Timestamp(1_700_000_000), b"1700000000"),
        ("table", AMQPValue::FieldTable(inner), br#"{"k":1}"#),
        ("bytes", AMQPValue::ByteArray(vec![1, 2].into()), b"\x01\x02"),
        ("nothing", AMQPValue::Void, b""),
    ];
    let mut headers = FieldTable::default();
    for (name, value, _) in &cases {
        headers.insert((*name).into(), value.clone());
    }
    // A sender's joke: no clock shows this.
    let properties = BasicProperties::default().with_headers(headers).with_timestamp(u64::MAX);
    rabbit.send_as(&queue.name, properties, b"").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    let delivery = delivery(&mut subscription).await;
    let message = delivery.message();
    for (name, _, bytes) in &cases {
        assert_eq!(message.headers().get(name).map(|value| &value[..]), Some(*bytes), "{name}");
    }
    assert_eq!(message.headers().len(), cases.len());
    assert_eq!((message.id(), message.timestamp()), (None, None));
    settle(delivery, Disposition::Ack).await;
    subscription.close().await;
}
