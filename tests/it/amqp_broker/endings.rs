//! How subscriptions end, and that nothing is lost by it.

use guestlist::broker::amqp::Amqp;
use guestlist::broker::amqp::lapin::types::AMQPValue;
use guestlist::broker::{Broker, BrokerErrorKind, Declare, QueueKind};
use guestlist::{Delivery, Disposition};

use super::proxy::{Proxy, ack_of_nothing};
use super::rabbit::{KINDS, Rabbit, current, delivery, next, prepared, spec, text};

/// Settling must say that the channel is closed.
async fn settles_as_closed(delivery: Delivery, disposition: Disposition) {
    let told = delivery.into_parts().1.settle(disposition).await;
    assert_eq!(told.unwrap_err().kind(), BrokerErrorKind::Closed);
}

#[tokio::test]
async fn a_queue_deleted_under_its_consumer_ends_the_subscription() {
    for kind in KINDS {
        let (broker, queue) = prepared("deleted", kind).await;
        let rabbit = Rabbit::new().await;
        rabbit.send(&queue.name, "a").await;
        let mut subscription = broker.subscribe(&queue).await.unwrap();
        let in_hand = delivery(&mut subscription).await;
        rabbit.delete(&queue.name).await;
        assert!(next(&mut subscription).await.is_none(), "{kind:?}");
        assert!(next(&mut subscription).await.is_none(), "it stays ended");
        settles_as_closed(in_hand, Disposition::Ack).await;
        subscription.close().await;
        let again = broker.subscribe(&queue).await;
        assert_eq!(again.err().unwrap().kind(), BrokerErrorKind::Refused, "the queue is gone");
    }
}

#[tokio::test]
async fn a_channel_closed_by_the_broker_ends_its_subscription_and_no_other() {
    let proxy = Proxy::new().await;
    let broker = Amqp::connect(&proxy.url()).await.unwrap();
    let (_, queue) = prepared("channel", QueueKind::Quorum).await;
    let (_, other) = prepared("other_channel", QueueKind::Quorum).await;
    let rabbit = Rabbit::new().await;
    rabbit.send(&queue.name, "a").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    let mut unharmed = broker.subscribe(&other).await.unwrap();
    let in_hand = delivery(&mut subscription).await;
    proxy.say(ack_of_nothing(1));
    let error = next(&mut subscription).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), BrokerErrorKind::Closed);
    assert!(next(&mut subscription).await.is_none());

    // The next channel must not be settled on in the old one's name.
    let mut again = broker.subscribe(&queue).await.unwrap();
    let redelivered = delivery(&mut again).await;
    settles_as_closed(in_hand, Disposition::Ack).await;
    assert!(redelivered.message().redelivered());
    redelivered.into_parts().1.settle(Disposition::Ack).await.unwrap();

    rabbit.send(&other.name, "b").await;
    delivery(&mut unharmed).await.into_parts().1.settle(Disposition::Ack).await.unwrap();
    for subscription in [subscription, again, unharmed] {
        subscription.close().await;
    }
    assert_eq!(rabbit.ready(&queue.name).await + rabbit.ready(&other.name).await, 0);
}

#[tokio::test]
async fn a_cut_connection_ends_the_subscription_and_a_new_one_gets_everything() {
    for kind in KINDS {
        let proxy = Proxy::new().await;
        let broker = Amqp::connect(&proxy.url()).await.unwrap();
        let queue = spec("cut", kind);
        broker.prepare(&queue).await.unwrap();
        let rabbit = Rabbit::new().await;
        rabbit.send(&queue.name, "a").await;
        let mut subscription = broker.subscribe(&queue).await.unwrap();
        let in_hand = delivery(&mut subscription).await;
        proxy.cut();
        let error = next(&mut subscription).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), BrokerErrorKind::Unreachable);
        assert!(next(&mut subscription).await.is_none());
        settles_as_closed(in_hand, Disposition::Requeue { after: queue.holds.shortest() }).await;
        subscription.close().await;

        let mut again = broker.subscribe(&queue).await.unwrap();
        let redelivered = delivery(&mut again).await;
        assert!(redelivered.message().redelivered());
        redelivered.into_parts().1.settle(Disposition::Ack).await.unwrap();
        again.close().await;
        assert_eq!(rabbit.ready(&queue.name).await, 0, "{kind:?}");
    }
}

#[tokio::test]
async fn cancel_hands_back_what_was_buffered_without_counting_it() {
    let (broker, mut queue) = prepared("cancelled", QueueKind::Quorum).await;
    queue.prefetch = 10;
    let rabbit = Rabbit::new().await;
    for id in 0..10 {
        rabbit.send(&queue.name, &id.to_string()).await;
    }
    for _ in 0..3 {
        let mut subscription = broker.subscribe(&queue).await.unwrap();
        let in_hand = delivery(&mut subscription).await;
        rabbit.ready_becomes(&queue.name, 0).await;
        subscription.cancel().await;
        assert!(next(&mut subscription).await.is_none());
        rabbit.ready_becomes(&queue.name, 9).await;
        in_hand.into_parts().1.settle(Disposition::Abandon).await.unwrap();
        subscription.close().await;
    }
    for _ in 0..10 {
        let message = rabbit.take(&queue.name).await;
        let headers = message.properties.headers().clone().unwrap_or_default();
        let counted = headers.inner().get("x-delivery-count").cloned();
        // RabbitMQ 3 counts whatever is given back.
        assert!(!current() || counted.is_none(), "a handed back message was counted: {counted:?}");
    }
}

#[tokio::test]
async fn close_alone_hands_back_without_counting_too() {
    let (broker, queue) = prepared("closed", QueueKind::Quorum).await;
    let rabbit = Rabbit::new().await;
    for id in 0..5 {
        rabbit.send(&queue.name, &id.to_string()).await;
    }
    let subscription = broker.subscribe(&queue).await.unwrap();
    rabbit.ready_becomes(&queue.name, 0).await;
    subscription.close().await;
    rabbit.ready_becomes(&queue.name, 5).await;
    let message = rabbit.take(&queue.name).await;
    let headers = message.properties.headers().clone().unwrap_or_default();
    assert!(!current() || headers.inner().get("x-delivery-count").is_none());
}

#[tokio::test]
async fn a_consumer_timeout_ends_the_subscription_and_a_late_ack_revives_nobody() {
    if !current() {
        return println!("skipped: a timeout of a queue's own needs RabbitMQ 4.3");
    }
    let (broker, mut queue) = prepared("timeout", QueueKind::Quorum).await;
    queue.name += ".short";
    queue.declare = Declare::Check;
    let rabbit = Rabbit::new().await;
    let short = [("x-queue-type", text("quorum")), ("x-consumer-timeout", AMQPValue::LongInt(1000))];
    rabbit.declare(&queue.name, &short).await;
    rabbit.send(&queue.name, "a").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    let in_hand = delivery(&mut subscription).await;
    assert!(next(&mut subscription).await.is_none());
    settles_as_closed(in_hand, Disposition::Ack).await;
    rabbit.ready_becomes(&queue.name, 1).await;
    rabbit.send(&queue.name, "b").await;
    rabbit.ready_becomes(&queue.name, 2).await;
    subscription.close().await;
}

#[tokio::test]
async fn a_subscription_that_is_dropped_gives_everything_back() {
    let (broker, queue) = prepared("dropped", QueueKind::Classic).await;
    let rabbit = Rabbit::new().await;
    rabbit.send(&queue.name, "a").await;
    rabbit.send(&queue.name, "b").await;
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    let in_hand = delivery(&mut subscription).await;
    drop(subscription);
    drop(in_hand);
    rabbit.ready_becomes(&queue.name, 2).await;
}
