//! A stranger's eyes and hands: the plain client beside the one under test.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use guestlist::Delivery;
use guestlist::broker::amqp::Amqp;
use guestlist::broker::amqp::lapin::message::BasicGetMessage;
use guestlist::broker::amqp::lapin::options::*;
use guestlist::broker::amqp::lapin::types::{AMQPValue, FieldTable};
use guestlist::broker::amqp::lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use guestlist::broker::{
    AmqpOptions, Broker, BrokerError, Declare, HoldSteps, QueueKind, QueueSpec, Subscription,
};
use tokio::time::{sleep, timeout};

/// What has not happened after this long will not happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const KINDS: [QueueKind; 2] = [QueueKind::Classic, QueueKind::Quorum];

pub(crate) fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run ./scripts/test"))
}

pub(crate) fn url() -> String {
    env("GUESTLIST_AMQP_URL")
}

/// Whether the broker is the current generation (4.3), not the distribution's (3.10).
pub(crate) fn current() -> bool {
    env("GUESTLIST_BROKERS") == "current"
}

/// A name that no other test and no earlier run used: RabbitMQ 3.10 closes connections when a
/// queue is declared again soon after it was deleted.
pub(crate) fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    format!("test.{name}.{now}.{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A queue of this kind with a short hold step, to be declared.
pub(crate) fn spec(name: &str, kind: QueueKind) -> QueueSpec {
    let mut queue = QueueSpec::new(unique(name));
    queue.declare = Declare::Create;
    queue.prefetch = 8;
    queue.holds = HoldSteps::new([Duration::from_millis(300)]);
    queue.dead_letter = Some(format!("{}.dead", queue.name).into());
    if kind == QueueKind::Classic {
        queue.amqp = AmqpOptions::classic();
    }
    queue
}

pub(crate) fn hold_queue(queue: &QueueSpec) -> String {
    format!("{}.hold.{}ms", queue.name, queue.holds.shortest().as_millis())
}

/// The broker under test, and a queue that is declared.
pub(crate) async fn prepared(name: &str, kind: QueueKind) -> (Amqp, QueueSpec) {
    let broker = Amqp::connect(&url()).await.unwrap();
    let queue = spec(name, kind);
    broker.prepare(&queue).await.unwrap();
    (broker, queue)
}

pub(crate) async fn next(subscription: &mut Box<dyn Subscription>) -> Option<Result<Delivery, BrokerError>> {
    let next = poll_fn(|cx| subscription.poll_next(cx, 64));
    timeout(PATIENCE, next).await.expect("a delivery, an error or the end was due")
}

pub(crate) async fn delivery(subscription: &mut Box<dyn Subscription>) -> Delivery {
    next(subscription).await.expect("a delivery was due, not the end").unwrap()
}

/// Waits for a condition that nothing announces.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let wait = async {
        while !holds().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("it did not become true that {what}"));
}

/// The plain client.
pub(crate) struct Rabbit {
    connection: Connection,
    channel: Channel,
}

impl Rabbit {
    pub(crate) async fn new() -> Self {
        let connection = Connection::connect(&url(), ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { connection, channel }
    }

    pub(crate) async fn declare(&self, queue: &str, arguments: &[(&str, AMQPValue)]) {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let mut table = FieldTable::default();
        for (name, value) in arguments {
            table.insert((*name).into(), value.clone());
        }
        self.channel.queue_declare(queue.into(), options, table).await.unwrap();
    }

    pub(crate) async fn delete(&self, queue: &str) {
        self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    }

    /// Whether the queue is there. Asked on a channel of its own, which a "no" closes.
    pub(crate) async fn exists(&self, queue: &str) -> bool {
        let channel = self.connection.create_channel().await.unwrap();
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(queue.into(), passive, FieldTable::default()).await.is_ok()
    }

    /// How many messages are ready.
    pub(crate) async fn ready(&self, queue: &str) -> u64 {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = self.channel.queue_declare(queue.into(), passive, FieldTable::default()).await.unwrap();
        queue.message_count().into()
    }

    pub(crate) async fn ready_becomes(&self, queue: &str, count: u64) {
        until(&format!("{queue} has {count} ready"), || async { self.ready(queue).await == count }).await;
    }

    pub(crate) async fn send(&self, queue: &str, id: &str) {
        let properties = BasicProperties::default().with_message_id(id.into()).with_delivery_mode(2);
        self.send_as(queue, properties, b"{}").await;
    }

    pub(crate) async fn send_as(&self, queue: &str, properties: BasicProperties, body: &[u8]) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let sent = self.channel.basic_publish("".into(), queue.into(), options, body, properties);
        let confirmed = sent.await.unwrap().await.unwrap();
        assert!(confirmed.is_ack() && confirmed.take_message().is_none(), "{queue} must take it");
    }

    /// Takes the next message out of the queue, waiting for it.
    pub(crate) async fn take(&self, queue: &str) -> BasicGetMessage {
        must_have(queue, || self.get(queue)).await
    }

    /// The same, to be acked.
    pub(crate) async fn take_unacked(&self, queue: &str) -> BasicGetMessage {
        must_have(queue, || self.get_unacked(queue)).await
    }

    /// The next message, taken out of the queue, if there is one.
    pub(crate) async fn get(&self, queue: &str) -> Option<BasicGetMessage> {
        self.channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.unwrap()
    }

    /// The next message, if there is one; to be acked.
    pub(crate) async fn get_unacked(&self, queue: &str) -> Option<BasicGetMessage> {
        self.channel.basic_get(queue.into(), BasicGetOptions { no_ack: false }).await.unwrap()
    }

    pub(crate) async fn consume(&self, queue: &str) -> guestlist::broker::amqp::lapin::Consumer {
        let options = BasicConsumeOptions::default();
        self.channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap()
    }
}

async fn must_have<F: Future<Output = Option<BasicGetMessage>>>(
    queue: &str,
    get: impl Fn() -> F,
) -> BasicGetMessage {
    let wait = async {
        loop {
            if let Some(message) = get().await {
                return message;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{queue} must have a message"))
}

pub(crate) fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}
