//! RabbitMQ, classic and quorum queues.

use std::time::Duration;

use guestlist::State;
use guestlist::broker::amqp::lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use guestlist::broker::amqp::lapin::types::{AMQPValue, FieldTable, ShortString};
use guestlist::broker::amqp::lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind,
};
use guestlist::broker::copy;
use guestlist::prelude::*;

use super::proxy::Proxy;
use super::{
    Gated, Ledger, Private, Running, body, counting, env, failing_if_bad, handles_each_id_once, run_python,
    shuffled_ids, survives, third_time_lucky, unique, until,
};

pub(super) const KINDS: [&str; 2] = ["classic", "quorum"];

pub(super) fn url() -> String {
    env("GUESTLIST_AMQP_URL")
}

/// The plain client, as a stranger uses it.
pub(super) struct Stranger {
    channel: Channel,
    connection: Connection,
}

impl Stranger {
    async fn at(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { channel, connection }
    }

    pub(super) async fn new() -> Self {
        Self::at(&url()).await
    }

    pub(super) async fn declare(&self, queue: &str, kind: &str) {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
        if kind == "quorum" {
            // A queue of somebody who read the manual: no limit that drops messages.
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(i32::MAX));
        }
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.channel.queue_declare(queue.into(), options, arguments).await.unwrap();
    }

    /// A new exchange that feeds these queues.
    pub(super) async fn fanout(&self, queues: &[&str]) -> String {
        let exchange = unique("exchange");
        let options = ExchangeDeclareOptions { auto_delete: true, ..ExchangeDeclareOptions::default() };
        let name = || ShortString::from(exchange.as_str());
        let made =
            self.channel.exchange_declare(name(), ExchangeKind::Fanout, options, FieldTable::default());
        made.await.unwrap();
        for queue in queues {
            let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
            let bind = self.channel.queue_bind((*queue).into(), name(), "".into(), options, arguments);
            bind.await.unwrap();
        }
        exchange
    }

    async fn delete(&self, queue: &str) {
        self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    }

    pub(super) async fn publish(&self, exchange: &str, key: &str, body: &str, properties: BasicProperties) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let confirm =
            self.channel.basic_publish(exchange.into(), key.into(), options, body.as_bytes(), properties);
        let confirm = confirm.await.unwrap().await.unwrap();
        assert!(confirm.is_ack(), "not confirmed");
    }

    pub(super) async fn send(&self, queue: &str, id: &str) {
        let properties = BasicProperties::default().with_message_id(id.into()).with_delivery_mode(2);
        self.publish("", queue, &body(id), properties).await;
    }

    /// The same of a queue that may not be there: asked by a channel of its own, which that would close.
    pub(super) async fn ready_if_there(&self, queue: &str) -> Option<u32> {
        let channel = self.connection.create_channel().await.unwrap();
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let answer = channel.queue_declare(queue.into(), passive, FieldTable::default()).await;
        answer.ok().map(|queue| queue.message_count())
    }

    /// How many messages are ready.
    pub(super) async fn ready(&self, queue: &str) -> u32 {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        self.channel
            .queue_declare(queue.into(), passive, FieldTable::default())
            .await
            .unwrap()
            .message_count()
    }

    async fn take(&self, queue: &str) -> Option<guestlist::broker::amqp::lapin::message::Delivery> {
        let taken = self.channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.unwrap();
        taken.map(|message| message.delivery)
    }
}

fn queue(name: &str) -> Queue {
    Queue::new(name)
        .dead_letter(format!("{name}.dead"))
        .allow_missing_dead_letter()
        .hold_steps([Duration::from_millis(300)])
        .backoff(Backoff::new(Duration::from_millis(100), 2, Duration::from_secs(1)))
}

#[tokio::test]
async fn a_strangers_copies_are_skipped_whoever_publishes_them() {
    for kind in KINDS {
        for producer in ["lapin", "pika"] {
            let (stranger, name, ledger) = (Stranger::new().await, unique(kind), Ledger::default());
            stranger.declare(&name, kind).await;
            let running = Running::start(&url(), queue(&name).handler(counting(&ledger)), &name).await;
            let (ids, copies) = shuffled_ids(producer);
            let all: Vec<String> = ids.into_iter().chain(copies).collect();
            if producer == "lapin" {
                for id in &all {
                    stranger.send(&name, id).await;
                }
            } else {
                assert_eq!(run_python("pika_send.py", &[&url(), &name], &all.join("\n")).await, all.len());
            }
            handles_each_id_once(running, &ledger).await;
            assert_eq!(stranger.ready(&name).await, 0, "{kind}: the queue is not empty");
        }
    }
}

#[tokio::test]
async fn i1_a_failed_message_is_with_the_dead_letters_as_it_was_sent() {
    for kind in KINDS {
        let (stranger, name, ledger) = (Stranger::new().await, unique("fails"), Ledger::default());
        let dead = format!("{name}.dead");
        stranger.declare(&name, kind).await;
        stranger.declare(&dead, kind).await;
        let handler = failing_if_bad(&ledger, || Failure::transient("no\r\nluck"));
        let running = Running::start(&url(), queue(&name).max_attempts(3).handler(handler), &name).await;
        let mut headers = FieldTable::default();
        headers.insert("tenant".into(), AMQPValue::LongInt(7));
        headers
            .insert("CC".into(), AMQPValue::FieldArray(vec![AMQPValue::LongString("nowhere".into())].into()));
        let sent = BasicProperties::default()
            .with_message_id("bad".into())
            .with_content_type("application/json".into())
            .with_correlation_id("c-1".into())
            .with_user_id("guest".into())
            .with_expiration("600000".into())
            .with_priority(3)
            .with_headers(headers);
        stranger.publish("", &name, &body("bad"), sent).await;
        for n in 0..20 {
            stranger.send(&name, &format!("good-{n}")).await;
        }
        running.until("the bad one is parked", |queue| queue.dead_letters.get("exhausted") == Some(&1)).await;
        running.until("the good ones are handled", |queue| queue.handled == 20).await;
        running.stop().await;

        assert_eq!(ledger.runs(&body("bad")), 3, "{kind}");
        assert_eq!(stranger.ready(&name).await, 0);
        assert_eq!(stranger.ready(&dead).await, 1);
        let letter = stranger.take(&dead).await.unwrap();
        assert_eq!(letter.data, body("bad").as_bytes());
        let properties = letter.properties;
        assert_eq!(properties.message_id().as_ref().map(ShortString::as_str), Some("bad"));
        assert_eq!(properties.content_type().as_ref().map(ShortString::as_str), Some("application/json"));
        assert_eq!(properties.correlation_id().as_ref().map(ShortString::as_str), Some("c-1"));
        assert_eq!(properties.priority(), &Some(3));
        assert_eq!((properties.user_id(), properties.expiration()), (&None, &None));
        let headers = properties.headers().as_ref().unwrap().inner();
        assert_eq!(headers.get("tenant"), Some(&AMQPValue::LongInt(7)));
        assert!(!headers.contains_key("CC"));
        let text = |name: &str| match headers.get(name) {
            Some(AMQPValue::LongString(text)) => text.to_string(),
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(text(copy::CAUSE), "exhausted");
        assert_eq!(text(copy::ERROR), "no\\r\\nluck");
        assert_eq!(text(copy::ATTEMPT), "3");
        assert_eq!(text(copy::QUEUE), name);
    }
}

#[tokio::test]
async fn f12_without_a_destination_the_message_stays_and_the_queue_pauses_until_it_is_back() {
    let (stranger, name, ledger) = (Stranger::new().await, unique("no-dead"), Ledger::default());
    let dead = format!("{name}.dead");
    stranger.declare(&name, "quorum").await;
    stranger.declare(&dead, "quorum").await;
    let handler = failing_if_bad(&ledger, || Failure::permanent("never"));
    let queue = queue(&name).pause_hold(Duration::from_secs(2)).handler(handler);
    let running = Running::start(&url(), queue, &name).await;
    running.until("it consumes", |queue| queue.state == State::Running).await;
    stranger.delete(&dead).await;
    stranger.send(&name, "bad").await;
    running.until("the queue is paused", |queue| queue.paused_by.is_some()).await;
    running.until("the pause is over and it tries again", |queue| queue.received >= 2).await;
    assert!(running.status().dead_letters.is_empty());

    // 3.10 takes offence at a quorum queue that is declared again soon after: a classic one is as good here.
    stranger.declare(&dead, "classic").await;
    stranger.send(&name, "good").await;
    running.until("the bad one is parked", |queue| !queue.dead_letters.is_empty()).await;
    running.until("the good one is handled", |queue| queue.handled == 1).await;
    running.stop().await;
    assert_eq!((stranger.ready(&name).await, stranger.ready(&dead).await), (0, 1));
}

#[tokio::test]
async fn f8_a_cutconnection_loses_nothing_and_repeats_nothing_that_was_completed() {
    for kind in KINDS {
        let (stranger, name, proxy) = (Stranger::new().await, unique("cut"), Proxy::to(&url()).await);
        stranger.declare(&name, kind).await;
        let send = async |id: String| stranger.send(&name, &id).await;
        survives(&proxy.url(&url()), queue(&name), &name, send, || async { proxy.cut() }).await;
        assert_eq!(stranger.ready(&name).await, 0);
    }
}

#[tokio::test]
async fn f24_a_queue_that_is_deleted_and_made_again_is_consumed_again() {
    let (stranger, name) = (Stranger::new().await, unique("deleted"));
    // Classic: 3.10 closes the connection of whoever consumes a quorum queue that was just made again.
    stranger.declare(&name, "classic").await;
    let gated = Gated::new();
    let running = Running::start(&url(), queue(&name).handler(gated.handler()), &name).await;
    stranger.send(&name, "in-hand").await;
    until("the handler runs", || async { gated.running() == 1 }).await;
    stranger.delete(&name).await;
    running.until("the loss was noticed", |queue| queue.rebuilds >= 2).await;
    gated.open();
    running.until("what was in hand is completed", |queue| queue.handled == 1).await;
    stranger.declare(&name, "classic").await;
    // The sender saw an error and sends again: the id is done.
    stranger.send(&name, "in-hand").await;
    stranger.send(&name, "new").await;
    running.until("the new one is handled", |queue| queue.handled == 2).await;
    running.until("the copy is skipped", |queue| queue.duplicates == 1).await;
    running.stop().await;
    assert_eq!(stranger.ready(&name).await, 0);
}

#[tokio::test]
async fn f8_a_broker_killed_and_started_again_loses_nothing_and_repeats_nothing_that_was_completed() {
    let mut broker = Private::start("rabbitmq").await;
    for kind in KINDS {
        let (stranger, name) = (Stranger::at(&broker.url()).await, unique("killed"));
        stranger.declare(&name, kind).await;
        // RabbitMQ 4.3 forgets a quorum queue that is younger than a second when it is killed.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let gated = Gated::new();
        let running = Running::start(&broker.url(), queue(&name).handler(gated.handler()), &name).await;
        for n in 0..5 {
            stranger.send(&name, &format!("m-{n}")).await;
        }
        until("five handlers run", || async { gated.running() == 5 }).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        broker.kill().await;
        running.until("the loss was noticed", |queue| queue.rebuilds >= 1).await;
        gated.open();
        running.until("every message is handled", |queue| queue.handled == 5).await;
        broker.restart().await;
        running.until("the broker delivers again what was not acked", |queue| queue.duplicates == 5).await;
        let stranger = Stranger::at(&broker.url()).await;
        stranger.send(&name, "after").await;
        running.until("the next one too", |queue| queue.handled == 6).await;
        running.stop().await;
        assert!(gated.ledger.successes().iter().all(|count| *count == 1), "a completed run ran again");
        assert_eq!(stranger.ready(&name).await, 0);
    }
    broker.end().await;
}

#[tokio::test]
async fn f8_connections_closed_by_the_broker_lose_nothing_and_repeat_nothing_that_was_completed() {
    let broker = Private::start("rabbitmq").await;
    for kind in KINDS {
        let name = unique("closed");
        Stranger::at(&broker.url()).await.declare(&name, kind).await;
        // The stranger's own connection is closed as well: a new one for each message.
        let send = async |id: String| Stranger::at(&broker.url()).await.send(&name, &id).await;
        let harm = async || {
            broker.control(&["close_all_connections", "maintenance"]).await;
        };
        survives(&broker.url(), queue(&name), &name, send, harm).await;
        assert_eq!(Stranger::at(&broker.url()).await.ready(&name).await, 0);
    }
    broker.end().await;
}

#[tokio::test]
async fn a_message_by_an_exchange_comes_back_to_its_queue_alone() {
    let (stranger, ledger) = (Stranger::new().await, Ledger::default());
    let (name, other) = (unique("mine"), unique("other"));
    for queue in [&name, &other] {
        stranger.declare(queue, "quorum").await;
    }
    let exchange = stranger.fanout(&[&name, &other]).await;
    let handler = third_time_lucky(&ledger);
    let running = Running::start(&url(), queue(&name).handler(handler), &name).await;
    let properties = BasicProperties::default().with_message_id("one".into());
    stranger.publish(&exchange, "the-key", &body("one"), properties).await;
    running.until("it is handled at the third attempt", |queue| queue.handled == 1).await;
    running.stop().await;
    assert_eq!(ledger.runs(&body("one")), 3);
    assert_eq!((stranger.ready(&name).await, stranger.ready(&other).await), (0, 1));
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

/// Native dead-lettering, as the docs say: to the queue's exchange with its own headers and no story of ours; without an
/// exchange, gone.
#[tokio::test]
async fn a_rejected_message_goes_to_the_queues_own_exchange_or_is_gone() {
    let stranger = Stranger::new().await;
    for (kind, to_exchange) in [("classic", true), ("quorum", true), ("classic", false), ("quorum", false)] {
        let (name, native) = (unique("rejects"), unique("native"));
        stranger.declare(&native, "classic").await;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), text(kind));
        if to_exchange {
            arguments.insert("x-dead-letter-exchange".into(), text(""));
            arguments.insert("x-dead-letter-routing-key".into(), text(&native));
        }
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        stranger.channel.queue_declare(name.as_str().into(), options, arguments).await.unwrap();
        let refusing = async |_: Message| -> Result<(), Failure> { Err(Failure::permanent("no")) };
        let queue = Queue::new(&name).reject_failed().hold_steps([Duration::from_millis(300)]);
        let running = Running::start(&url(), queue.handler(refusing), &name).await;
        stranger.send(&name, "bad").await;
        running.until("it has failed", |queue| queue.failures.values().sum::<u64>() >= 1).await;
        running.stop().await;
        until("it has left the queue", || async { stranger.ready(&name).await == 0 }).await;
        until("it is where it should be", || async {
            stranger.ready(&native).await == u32::from(to_exchange)
        })
        .await;
        let Some(letter) = stranger.take(&native).await else { continue };
        assert_eq!(letter.data, body("bad").as_bytes());
        let headers = letter.properties.headers().clone().unwrap_or_default();
        let names: Vec<String> = headers.inner().keys().map(ToString::to_string).collect();
        assert!(names.iter().any(|name| name == "x-death"), "{names:?}");
        assert!(!names.iter().any(|name| name.starts_with("guestlist")), "no story goes with it: {names:?}");
    }
}

/// Exactly the permissions that the docs of `broker::amqp` list, by their regular expressions.
struct Permissions {
    configure: String,
    write: String,
    read: String,
}

impl Permissions {
    fn of(queue: &str) -> Self {
        let (queue, hold) = (queue.replace('.', "\\."), format!("{}\\.hold\\..*", queue.replace('.', "\\.")));
        Self {
            configure: format!("^{hold}$"),
            write: format!("^(amq\\.default|{queue}\\.dead)$"),
            read: format!("^({queue}|{hold})$"),
        }
    }

    async fn set(&self, broker: &Private) {
        let Self { configure, write, read } = self;
        broker.control(&["set_permissions", "-p", "/", "locked", configure, write, read]).await;
    }
}

/// Consumes as that user, to the end of the start: `Ok` once it runs.
async fn starts(url: &str, queue: Queue) -> Result<(), guestlist::Error> {
    let consumer = Consumer::connect(url).await.unwrap().queue(queue.handler(async |_: Message| Ok(())));
    let status = consumer.status();
    let running = async || status.queues().first().is_some_and(|queue| queue.state == State::Running);
    consumer.run_until(until("it runs or has ended", running)).await
}

#[tokio::test]
async fn a_user_with_the_permissions_in_the_docs_consumes_retries_and_dead_letters() {
    let broker = Private::start("rabbitmq").await;
    let (stranger, name) = (Stranger::at(&broker.url()).await, unique("locked"));
    stranger.declare(&name, "quorum").await;
    stranger.declare(&format!("{name}.dead"), "quorum").await;
    broker.control(&["add_user", "locked", "secret"]).await;
    let locked = broker.url().replace("guest:guest", "locked:secret");
    Permissions::of(&name).set(&broker).await;

    let queue =
        || Queue::new(&name).dead_letter(format!("{name}.dead")).hold_steps([Duration::from_millis(300)]);
    starts(&locked, queue()).await.expect("what is there may be used");
    let twice = async |message: Message| -> Result<(), Failure> {
        Err(if message.attempt() == 1 { Failure::transient("again") } else { Failure::permanent("no") })
    };
    let brief = Backoff::new(Duration::from_millis(300), 1, Duration::from_millis(300)).without_jitter();
    let running = Running::start(&locked, queue().backoff(brief).handler(twice), &name).await;
    stranger.send(&name, "m").await;
    running
        .until("it is tried twice and dead-lettered", |queue| queue.dead_letters.values().sum::<u64>() == 1)
        .await;
    running.stop().await;
    until("its letter is there", || async { stranger.ready(&format!("{name}.dead")).await == 1 }).await;

    let all = || Permissions::of(&name);
    let nothing = || "^$".to_owned();
    let lacking = [
        (Permissions { read: nothing(), ..all() }, "read"),
        (Permissions { write: nothing(), ..all() }, "write"),
    ];
    for (permissions, missing) in lacking {
        permissions.set(&broker).await;
        // The hold queue that is there need not be declared again, so its name is another one.
        let error = starts(&locked, queue().hold_steps([Duration::from_millis(400)])).await.unwrap_err();
        let told = format!("{error:?}");
        assert!(told.contains(missing) && told.contains(&name), "{missing}: {told}");
    }
    broker.end().await;
}

/// `consumer_timeout` cannot be read over AMQP: RabbitMQ's default is taken.
#[tokio::test]
async fn a_run_longer_than_the_broker_waits_is_warned_about() {
    let broker = guestlist::broker::amqp::Amqp::connect(&url()).await.unwrap();
    let checked =
        |max_run: u64| Queue::new("q").dead_letter("q.dead").max_run(Duration::from_secs(60 * max_run));
    assert_eq!(checked(29).check(&broker).await.unwrap(), []);
    let findings = checked(45).check(&broker).await.unwrap();
    assert_eq!(findings[0].severity, guestlist::Severity::Warn);
    assert!(findings[0].message.contains("2700s") && findings[0].message.contains("1800s"), "{findings:?}");
}
