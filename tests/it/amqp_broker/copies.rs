//! Copies: true to the original, harmless, confirmed and routed.

use std::sync::Arc;
use std::time::Duration;

use guestlist::broker::amqp::lapin::BasicProperties;
use guestlist::broker::amqp::lapin::message::BasicGetMessage;
use guestlist::broker::amqp::lapin::types::{AMQPValue, FieldTable};
use guestlist::broker::copy::{BODY_HASH, DeadLetter, ERROR, HEADERS_DROPPED, HISTORY, TRUNCATED};
use guestlist::broker::{Broker, BrokerError, BrokerErrorKind, Copy, Destination, QueueKind};
use guestlist::dead_letter::{DeadLetterLayer, Field, Oversized, Redact};
use guestlist::{BoxError, Cause, Consumer, Disposition, Failure, Message, Outcome, Queue};
use tower::ServiceExt as _;

use super::rabbit::{KINDS, Rabbit, current, delivery, hold_queue, prepared, text, unique, until};

fn record() -> DeadLetter {
    let letter = Message::builder("").header("guestlist-cause", "exhausted").build();
    DeadLetter::read(&letter).unwrap()
}

fn rich_headers() -> FieldTable {
    let mut headers = FieldTable::default();
    headers.insert("number".into(), AMQPValue::LongLongInt(-5));
    headers.insert("text".into(), text("naïve\r\n"));
    headers.insert("list".into(), AMQPValue::FieldArray(vec![text("a"), AMQPValue::Boolean(true)].into()));
    headers.insert("nothing".into(), AMQPValue::Void);
    headers
}

fn rich() -> BasicProperties {
    BasicProperties::default()
        .with_message_id("charge-1".into())
        .with_content_type("application/json".into())
        .with_content_encoding("identity".into())
        .with_correlation_id("corr".into())
        .with_reply_to("answers".into())
        .with_type("charge".into())
        .with_app_id("shop".into())
        .with_priority(4)
        .with_timestamp(1_700_000_000)
}

#[tokio::test]
async fn a_dead_letter_is_the_original_but_for_what_the_broker_acts_on() {
    for kind in KINDS {
        let (broker, queue) = prepared("dead", kind).await;
        let rabbit = Rabbit::new().await;
        let cc = unique("cc");
        rabbit.declare(&cc, &[]).await;
        let mut sent = rich_headers();
        sent.insert("CC".into(), AMQPValue::FieldArray(vec![text(&cc)].into()));
        sent.insert("x-death".into(), text("forged"));
        let properties = rich().with_headers(sent).with_user_id("guest".into());
        let body = b"\0{\"cents\":1}\xff";
        rabbit.send_as(&queue.name, properties.with_expiration("60000".into()), body).await;
        rabbit.ready_becomes(&cc, 1).await;

        let mut subscription = broker.subscribe(&queue).await.unwrap();
        let delivery = delivery(&mut subscription).await;
        let place = queue.dead_letter.clone().unwrap();
        let letter = record();
        broker.publish(&place, &Copy::dead_letter(delivery.message(), &letter)).await.unwrap();
        delivery.into_parts().1.settle(Disposition::Ack).await.unwrap();
        subscription.close().await;

        let letter = rabbit.take(place.name()).await;
        assert_eq!(letter.data, body);
        let (ours, theirs) = split_headers(letter.properties.headers().as_ref().unwrap());
        assert_eq!(theirs, rich_headers(), "{kind:?}");
        let without_headers = letter.properties.clone().with_headers(FieldTable::default());
        let expected = rich().with_headers(FieldTable::default()).with_delivery_mode(2);
        assert_eq!(without_headers, expected, "{kind:?}");
        let ours = |name: &str| ours.inner().get(name).cloned();
        assert_eq!(ours("guestlist-orig-p-user_id"), Some(text("guest")));
        assert_eq!(ours("guestlist-orig-p-expiration"), Some(text("60000")));
        assert_eq!(ours("guestlist-orig-h-CC"), Some(text(&format!("[\"{cc}\"]"))));
        assert_eq!(ours("guestlist-cause"), Some(text("exhausted")));
        assert_eq!(ours("guestlist-orig-queue"), Some(text(&queue.name)));
        assert_eq!(rabbit.ready(&cc).await, 1, "the copy went to the CC queue again");
    }
}

fn split_headers(headers: &FieldTable) -> (FieldTable, FieldTable) {
    let (mut ours, mut theirs) = (FieldTable::default(), FieldTable::default());
    for (name, value) in headers.inner() {
        // RabbitMQ 3 counts from 0 when a message is got, not consumed.
        if name.as_str() == "x-delivery-count" {
            continue;
        }
        let table = if name.as_str().starts_with("guestlist-") { &mut ours } else { &mut theirs };
        table.insert(name.clone(), value.clone());
    }
    (ours, theirs)
}

#[tokio::test]
async fn an_unroutable_dead_letter_is_not_routed_and_the_source_keeps_the_message() {
    let (broker, queue) = prepared("unroutable", QueueKind::Quorum).await;
    let rabbit = Rabbit::new().await;
    rabbit.send(&queue.name, "a").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    let first = delivery(&mut subscription).await;
    let letter = record();
    let nowhere = Destination::new(unique("nowhere"));
    let told = broker.publish(&nowhere, &Copy::dead_letter(first.message(), &letter)).await;
    assert_eq!(told.unwrap_err().kind(), BrokerErrorKind::NotRouted);
    first.into_parts().1.settle(Disposition::Abandon).await.unwrap();
    subscription.close().await;
    rabbit.ready_becomes(&queue.name, 1).await;
}

#[tokio::test]
async fn a_full_queue_says_no() {
    let (broker, _) = prepared("full", QueueKind::Quorum).await;
    let full = unique("full_queue");
    let limits = [("x-max-length", AMQPValue::LongInt(0)), ("x-overflow", text("reject-publish"))];
    Rabbit::new().await.declare(&full, &limits).await;
    let message = Message::builder("x").build();
    let told = broker.publish(&full.into(), &Copy::hold(&message)).await;
    assert_eq!(told.unwrap_err().kind(), BrokerErrorKind::Nacked);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_copies_at_once_each_gets_its_own_answer() {
    let (broker, queue) = prepared("many", QueueKind::Quorum).await;
    let copies = (0..4000).map(|n| {
        let (broker, queue) = (broker.clone(), queue.name.clone());
        tokio::spawn(async move {
            let message = Message::builder("x").transport_id(n.to_string()).build();
            let routed = n % 5 != 0;
            let to = if routed { queue } else { format!("{queue}.nowhere") };
            let told = broker.publish(&to.into(), &Copy::hold(&message)).await;
            assert_eq!(
                told.as_ref().err().map(BrokerError::kind),
                (!routed).then_some(BrokerErrorKind::NotRouted)
            );
        })
    });
    for copy in copies.collect::<Vec<_>>() {
        copy.await.unwrap();
    }
    assert_eq!(Rabbit::new().await.ready(&queue.name).await, 3200);
}

#[tokio::test]
async fn a_copy_that_is_too_large_is_refused_and_the_next_one_is_not() {
    let (broker, queue) = prepared("large", QueueKind::Classic).await;
    let wide = Message::builder("").header("wide", vec![b'x'; 200_000]).build();
    let told = broker.publish(&queue.name.as_str().into(), &Copy::hold(&wide)).await;
    assert_eq!(told.unwrap_err().kind(), BrokerErrorKind::HeadersTooLarge, "headers go in one frame");
    if current() {
        let heavy = Message::builder(vec![b'x'; 17 * 1024 * 1024]).build();
        let told = broker.publish(&queue.name.as_str().into(), &Copy::hold(&heavy)).await;
        assert_eq!(told.unwrap_err().kind(), BrokerErrorKind::TooLarge, "16 MiB is the limit");
    }
    let nearly = Message::builder("").header("wide", vec![b'x'; 120_000]).build();
    broker.publish(&queue.name.as_str().into(), &Copy::hold(&nearly)).await.unwrap();
    assert_eq!(Rabbit::new().await.ready(&queue.name).await, 1);
}

#[tokio::test]
async fn what_travels_aside_is_redacted_too() {
    let (broker, spec) = prepared("aside", QueueKind::Quorum).await;
    let (rabbit, dead) = (Rabbit::new().await, spec.dead_letter.clone().unwrap());
    let mut headers = FieldTable::default();
    headers.insert("CC".into(), AMQPValue::FieldArray(vec![text("nowhere")].into()));
    let sent = BasicProperties::default().with_user_id("guest".into()).with_expiration("600000".into());
    rabbit.send_as(&spec.name, sent.with_message_id("1".into()).with_headers(headers), b"body").await;
    let hide = |field: Field<'_>, _: &[u8]| match field {
        Field::Header("CC") => Redact::Remove,
        Field::Property("user_id") => Redact::Replace("somebody".to_owned()),
        _ => Redact::Keep,
    };
    let handler = async |_: Message| Err(Failure::permanent("no"));
    let queue = Queue::new(spec.name.as_str()).dead_letter(dead.clone()).redact(hide);
    let consumer =
        Consumer::new(broker).queue(queue.hold_steps([Duration::from_millis(300)]).handler(handler));
    let status = consumer.status();
    let parked = || status.queue(&spec.name).is_some_and(|queue| queue.dead_letters.len() == 1);
    consumer.run_until(until("it is parked", || async { parked() })).await.unwrap();
    let letter = rabbit.take(dead.name()).await;
    let headers = letter.properties.headers().clone().unwrap();
    let aside = |name: &str| headers.inner().get(name).cloned();
    assert_eq!(aside("guestlist-orig-h-CC"), None);
    assert_eq!(aside("guestlist-orig-p-user_id"), Some(text("somebody")));
    assert_eq!(aside("guestlist-orig-p-expiration"), Some(text("600000")));
}

/// The letter of a message with a header of this width; none: it stayed with its queue.
async fn parked_with(width: usize, oversized: Oversized) -> Option<BasicGetMessage> {
    let (broker, spec) = prepared("flood", QueueKind::Classic).await;
    let (rabbit, dead) = (Rabbit::new().await, spec.dead_letter.clone().unwrap());
    let mut headers = FieldTable::default();
    headers.insert("wide".into(), text(&"x".repeat(width)));
    let sent = BasicProperties::default().with_message_id("1".into()).with_headers(headers);
    rabbit.send_as(&spec.name, sent, b"body").await;
    let handler = async |_: Message| Err(guestlist::Failure::permanent("e".repeat(1000)));
    let queue = Queue::new(spec.name.as_str()).dead_letter(dead.clone()).oversized(oversized);
    let consumer =
        Consumer::new(broker).queue(queue.hold_steps([Duration::from_millis(300)]).handler(handler));
    let status = consumer.status();
    let settled = || {
        let queue = status.queue(&spec.name).unwrap_or_default();
        !queue.dead_letters.is_empty() || queue.failures.contains_key("too_large")
    };
    consumer.run_until(until("it is settled", || async { settled() })).await.unwrap();
    let letter = rabbit.get(dead.name()).await;
    let kept = rabbit.ready(&spec.name).await == 1 || rabbit.ready(&hold_queue(&spec)).await == 1;
    assert_ne!(letter.is_some(), kept, "with the dead letters, or with its queue");
    letter
}

#[tokio::test]
async fn headers_that_flood_a_frame_cost_the_story_and_then_the_letter_or_themselves_as_the_queue_says() {
    for (width, history, error) in [(100_000, true, true), (127_200, false, true), (128_100, false, false)] {
        let letter = parked_with(width, Oversized::Keep).await.expect("parked");
        let headers = letter.properties.headers().clone().unwrap();
        let has = |name: &str| headers.inner().contains_key(name);
        assert_eq!((has(HISTORY), has(ERROR), has("wide")), (history, error, true), "{width}");
    }
    assert!(parked_with(128_700, Oversized::Keep).await.is_none());
    let letter = parked_with(128_700, Oversized::Truncate).await.expect("parked");
    let headers = letter.properties.headers().clone().unwrap();
    assert_eq!((headers.inner().get(HEADERS_DROPPED), headers.inner().get("wide")), (Some(&text("1")), None));
    assert_eq!(
        (letter.data.as_slice(), headers.inner().get(TRUNCATED)),
        (&b"body"[..], None),
        "the body fits"
    );
}

/// A stack of one's own whose messages come from elsewhere.
#[tokio::test]
async fn a_body_larger_than_rabbitmq_takes_is_cut_if_it_may_be() {
    if !current() {
        return; // It takes 128 MiB.
    }
    let (broker, spec) = prepared("heavy", QueueKind::Quorum).await;
    let dead = spec.dead_letter.clone().unwrap();
    let whole = vec![b'x'; 17 * 1024 * 1024];
    let message = Message::builder(whole.clone()).transport_id("1").header("tenant", "7").build();
    let layer = DeadLetterLayer::new(Arc::new(broker), dead.clone()).with_oversized(Oversized::Truncate);
    let failing =
        tower::service_fn(async |_: Message| Err::<Outcome, BoxError>(Failure::permanent("no").into_error()));
    let parked = tower::ServiceBuilder::new().layer(layer).service(failing).oneshot(message).await;
    assert_eq!(parked.unwrap(), Outcome::DeadLettered(Cause::Permanent));
    let letter = Rabbit::new().await.take(dead.name()).await;
    let headers = letter.properties.headers().clone().unwrap();
    assert_eq!(letter.data.len(), whole.len() / 2);
    assert_eq!(headers.inner().get(TRUNCATED), Some(&text(&whole.len().to_string())));
    assert_eq!(headers.inner().get(BODY_HASH), Some(&text(&blake3::hash(&whole).to_string())));
    assert_eq!(headers.inner().get("tenant"), Some(&text("7")));
}

#[tokio::test]
async fn a_message_that_just_fits_can_still_be_delayed() {
    let (broker, spec) = prepared("tight", QueueKind::Classic).await;
    let mut headers = FieldTable::default();
    headers.insert("wide".into(), text(&"x".repeat(128_200)));
    let rabbit = Rabbit::new().await;
    let sent = BasicProperties::default().with_message_id("1".into()).with_headers(headers);
    rabbit.send_as(&spec.name, sent, b"body").await;
    let handler = async |guestlist::Attempt(attempt): guestlist::Attempt| match attempt {
        1 => Err(Failure::transient("\"".repeat(1000))),
        _ => Ok(()),
    };
    let queue = Queue::new(spec.name.as_str()).dead_letter(spec.dead_letter.clone().unwrap());
    let queue = queue.hold_steps([Duration::from_millis(300)]).handler(handler);
    let consumer = Consumer::new(broker).queue(queue);
    let status = consumer.status();
    let done = || status.queue(&spec.name).is_some_and(|queue| queue.handled == 1);
    consumer.run_until(until("it is handled", || async { done() })).await.unwrap();
    let queue = status.queue(&spec.name).unwrap();
    assert_eq!((queue.unsettled, queue.received), (0, 2), "{queue:?}");
}

#[tokio::test]
async fn a_message_of_another_broker_is_copied_from_its_headers() {
    let (broker, queue) = prepared("foreign", QueueKind::Classic).await;
    let rabbit = Rabbit::new().await;
    let message = Message::builder("body")
        .transport_id("id-1")
        .content_type("text/plain")
        .header("kind", "charge")
        .header("twice", "a")
        .header("twice", "b")
        .header("BCC", "somebody")
        .header("n".repeat(300), "a name that AMQP cannot carry")
        .build();
    broker.publish(&queue.name.as_str().into(), &Copy::hold(&message)).await.unwrap();
    let copy = rabbit.take(&queue.name).await;
    let (ours, theirs) = split_headers(copy.properties.headers().as_ref().unwrap());
    let mut expected = FieldTable::default();
    expected.insert("kind".into(), text("charge"));
    expected.insert("twice".into(), AMQPValue::FieldArray(vec![text("a"), text("b")].into()));
    assert_eq!(theirs, expected);
    assert_eq!(ours.inner().get("guestlist-orig-h-BCC"), Some(&text("somebody")));
    assert_eq!(copy.data, b"body");
    assert_eq!(copy.properties.message_id(), &Some("id-1".into()));
    assert_eq!(copy.properties.content_type(), &Some("text/plain".into()));
}

#[tokio::test]
async fn copies_survive_a_lost_connection() {
    let proxy = super::proxy::Proxy::new().await;
    let broker = guestlist::broker::amqp::Amqp::connect(&proxy.url()).await.unwrap();
    let queue = super::rabbit::spec("lost", QueueKind::Quorum);
    broker.prepare(&queue).await.unwrap();
    let message = Message::builder("x").build();
    let to = Destination::new(queue.name.as_str());
    broker.publish(&to, &Copy::hold(&message)).await.unwrap();
    proxy.cut();
    super::rabbit::until("a copy is confirmed again", || async {
        broker.publish(&to, &Copy::hold(&message)).await.is_ok()
    })
    .await;
}
