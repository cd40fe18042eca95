//! One queue and its dead letters on a real broker, as somebody who knows nothing of this crate uses them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use guestlist::Queue;
use guestlist::broker::amqp::lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use guestlist::broker::amqp::lapin::types::{AMQPValue, FieldTable, ShortString};
use guestlist::broker::amqp::lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind,
};
use guestlist::broker::nats::async_nats::jetstream::consumer::{AckPolicy, pull};
use guestlist::broker::nats::async_nats::jetstream::message::PublishMessage;
use guestlist::broker::nats::async_nats::jetstream::stream::{Config, RetentionPolicy};
use guestlist::broker::nats::async_nats::jetstream::{self, Context};
use guestlist::broker::nats::async_nats::{self, HeaderMap, HeaderName, HeaderValue};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

/// What is tested over each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Classic,
    Quorum,
    JetStream,
}

/// How soon JetStream delivers again what nobody settled, unless a test says otherwise.
const ACK_WAIT: Duration = Duration::from_secs(30);

/// The key by which messages are sent to the exchange.
pub(crate) const KEY: &str = "work.new";

/// So short that the server swallows no copy of ours nor of a stranger's.
const DUPLICATES: Duration = Duration::from_millis(100);

/// Makes a test for each of them out of an `async fn(Kind)`.
macro_rules! over_all_brokers {
    ($($case:ident)+) => {
        over_all_brokers!(classic Classic: $($case)+);
        over_all_brokers!(quorum Quorum: $($case)+);
        over_all_brokers!(jetstream JetStream: $($case)+);
    };
    ($module:ident $kind:ident: $($case:ident)+) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case($crate::support::ground::Kind::$kind).await;
                }
            )+
        }
    };
}
pub(crate) use over_all_brokers;

pub(crate) struct Ground {
    pub(crate) kind: Kind,
    /// Of the queue; on JetStream also of its stream, subject and durable.
    pub(crate) name: String,
    client: Client,
}

enum Client {
    Amqp { channel: Channel, connection: Box<Connection>, asking: Mutex<Option<Channel>> },
    Nats(Context),
}

/// What a stranger sends: the id as the broker's own clients send one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sent {
    pub(crate) id: Option<String>,
    pub(crate) headers: Vec<(String, AMQPValue)>,
    pub(crate) body: Vec<u8>,
    pub(crate) content_type: Option<String>,
    pub(crate) user_id: Option<String>,
    /// AMQP's; NATS has none from the sender.
    pub(crate) timestamp: Option<SystemTime>,
}

/// What lies with the dead letters, name by name as it came over the wire.
#[derive(Clone, Debug)]
pub(crate) struct Letter {
    pub(crate) body: Vec<u8>,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) content_type: Option<String>,
}

impl Letter {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("(none)", String::as_str)
    }
}

impl Sent {
    pub(crate) fn new(id: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { id: Some(id.to_owned()), ..Self::without_id(body) }
    }

    pub(crate) fn without_id(body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..Self::default() }
    }

    pub(crate) fn header(self, name: &str, value: &str) -> Self {
        self.typed(name, AMQPValue::LongString(value.into()))
    }

    /// A header of this AMQP type.
    pub(crate) fn typed(mut self, name: &str, value: AMQPValue) -> Self {
        self.headers.push((name.to_owned(), value));
        self
    }
}

/// A name that no other test and no earlier run used.
fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    format!("{name}-{now}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn dead(queue: &str) -> String {
    format!("{queue}-dead")
}

pub(crate) fn url(kind: Kind) -> String {
    let name = if kind == Kind::JetStream { "GUESTLIST_NATS_URL" } else { "GUESTLIST_AMQP_URL" };
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run ./scripts/test"))
}

impl Ground {
    /// A new queue, and a place for its dead letters. On RabbitMQ it hangs on a topic exchange.
    pub(crate) async fn new(kind: Kind, name: &str) -> Self {
        Self::with_ack_wait(kind, name, ACK_WAIT).await
    }

    pub(crate) async fn with_ack_wait(kind: Kind, name: &str, ack_wait: Duration) -> Self {
        let ground = Self { kind, name: unique(name), client: Client::connect(kind).await };
        let (name, letters) = (ground.name.as_str(), dead(&ground.name));
        match &ground.client {
            Client::Amqp { .. } => {
                ground.declare(name).await;
                ground.declare(&letters).await;
                ground.exchange(ExchangeKind::Topic, &ground.exchange_name(), "work.*", &[name]).await;
            }
            Client::Nats(_) => ground.streams(RetentionPolicy::WorkQueue, ack_wait).await,
        }
        ground
    }

    /// A stream that keeps its messages whoever has acked them, so that it may have other durables.
    pub(crate) async fn for_everybody(name: &str) -> Self {
        let kind = Kind::JetStream;
        let ground = Self { kind, name: unique(name), client: Client::connect(kind).await };
        ground.streams(RetentionPolicy::Limits, ACK_WAIT).await;
        ground
    }

    async fn streams(&self, retention: RetentionPolicy, ack_wait: Duration) {
        let source = self.context().create_stream(stream(&self.name, retention)).await.unwrap();
        source.create_consumer(durable(&self.name, &self.name, ack_wait)).await.unwrap();
        self.context().create_stream(stream(&dead(&self.name), RetentionPolicy::Limits)).await.unwrap();
    }

    /// Its name. It sees what the queue's own durable sees.
    pub(crate) async fn another_durable(&self, name: &str) -> String {
        let stream = self.context().get_stream(&self.name).await.unwrap();
        stream.create_consumer(durable(name, &self.name, ACK_WAIT)).await.unwrap();
        name.to_owned()
    }

    /// How many messages this durable has not acked, delivered or not.
    pub(crate) async fn waiting_for(&self, durable: &str) -> u64 {
        let stream = self.context().get_stream(&self.name).await.unwrap();
        let mut durable = stream.get_consumer::<pull::Config>(durable).await.unwrap();
        let info = durable.info().await.unwrap();
        info.num_pending + u64::try_from(info.num_ack_pending).unwrap()
    }

    pub(crate) fn exchange_name(&self) -> String {
        format!("{}-exchange", self.name)
    }

    /// An exchange with these queues bound to it.
    pub(crate) async fn exchange(&self, kind: ExchangeKind, name: &str, pattern: &str, queues: &[&str]) {
        let (channel, options) =
            (self.channel(), ExchangeDeclareOptions { auto_delete: true, ..Default::default() });
        channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await.unwrap();
        for queue in queues {
            let (bind, none) = (QueueBindOptions::default(), FieldTable::default());
            channel.queue_bind((*queue).into(), name.into(), pattern.into(), bind, none).await.unwrap();
        }
    }

    pub(crate) fn url(&self) -> String {
        url(self.kind)
    }

    pub(crate) fn queue(&self) -> Queue {
        Queue::new(self.name.as_str()).dead_letter(dead(&self.name))
    }

    /// A queue of this kind, beside.
    pub(crate) async fn declare(&self, queue: &str) {
        let mut arguments = FieldTable::default();
        let kind = if self.kind == Kind::Classic { "classic" } else { "quorum" };
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
        if self.kind == Kind::Quorum {
            // The servers' own limits drop messages without a word.
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(i32::MAX));
        }
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.channel().queue_declare(queue.into(), options, arguments).await.unwrap();
    }

    pub(crate) fn channel(&self) -> &Channel {
        match &self.client {
            Client::Amqp { channel, .. } => channel,
            Client::Nats(_) => panic!("JetStream has no channels"),
        }
    }

    pub(crate) fn context(&self) -> &Context {
        match &self.client {
            Client::Nats(context) => context,
            Client::Amqp { .. } => panic!("RabbitMQ has no streams of this kind"),
        }
    }

    /// Sends it to the queue; confirmed when this ends.
    pub(crate) async fn send(&self, sent: Sent) {
        match &self.client {
            Client::Amqp { .. } => self.publish(&self.exchange_name(), KEY, &sent).await,
            Client::Nats(context) => publish(context, &self.name, &sent).await,
        }
    }

    /// By an exchange.
    pub(crate) async fn publish(&self, exchange: &str, key: &str, sent: &Sent) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let to = (ShortString::from(exchange), ShortString::from(key));
        let confirm = self.channel().basic_publish(to.0, to.1, options, &sent.body, properties(sent));
        let confirm = confirm.await.unwrap().await.unwrap();
        assert!(confirm.is_ack() && confirm.take_message().is_none(), "{sent:?} must be taken");
    }

    /// How many messages the queue has. RabbitMQ does not count those that a consumer has in hand: ask when it has stopped.
    pub(crate) async fn left(&self) -> u64 {
        match self.kind {
            Kind::JetStream => self.waiting_for(&self.name).await,
            Kind::Classic | Kind::Quorum => self.ready(&self.name).await.unwrap(),
        }
    }

    /// Nothing is left, once the last acks have arrived: neither with the queue nor in the hold queues of these steps.
    pub(crate) async fn is_drained(&self, steps: &[Duration]) {
        let give_up_at = Instant::now() + Duration::from_secs(10);
        loop {
            let left = (self.left().await, self.held(steps).await);
            if left == (0, 0) {
                return;
            }
            assert!(Instant::now() < give_up_at, "{:?}: left with the queue and held: {left:?}", self.kind);
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// How many messages lie in any queue or stream; none: there is no such thing.
    pub(crate) async fn ready(&self, name: &str) -> Option<u64> {
        match &self.client {
            Client::Amqp { connection, asking, .. } => {
                let mut asking = asking.lock().await;
                let channel = match asking.take() {
                    Some(channel) => channel,
                    None => new_channel(connection).await,
                };
                let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
                let found = channel.queue_declare(name.into(), passive, FieldTable::default()).await;
                let found = found.ok()?;
                // A "no" has closed it.
                *asking = Some(channel);
                Some(found.message_count().into())
            }
            Client::Nats(context) => {
                let stream = context.get_stream(name).await.ok()?;
                Some(stream.cached_info().state.messages)
            }
        }
    }

    /// How many messages wait in the hold queues of these steps.
    pub(crate) async fn held(&self, steps: &[Duration]) -> u64 {
        let mut held = 0;
        if self.kind != Kind::JetStream {
            for step in steps {
                let name = format!("{}.hold.{}ms", self.name, step.as_millis());
                held += self.ready(&name).await.unwrap_or(0);
            }
        }
        held
    }

    pub(crate) async fn letters_count(&self) -> u64 {
        self.ready(&dead(&self.name)).await.unwrap()
    }

    /// Every dead letter, oldest first. RabbitMQ's are taken out by this.
    pub(crate) async fn letters(&self) -> Vec<Letter> {
        self.messages(&dead(&self.name)).await
    }

    /// Every message of this queue or stream.
    pub(crate) async fn messages(&self, name: &str) -> Vec<Letter> {
        match &self.client {
            Client::Amqp { channel, .. } => taken(channel, name).await,
            Client::Nats(context) => kept(context, name).await,
        }
    }
}

impl Client {
    async fn connect(kind: Kind) -> Self {
        if kind == Kind::JetStream {
            return Self::Nats(jetstream::new(async_nats::connect(url(kind)).await.unwrap()));
        }
        let connection = Connection::connect(&url(kind), ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self::Amqp { channel, connection: Box::new(connection), asking: Mutex::default() }
    }
}

/// Its number may be that of a channel that was closed a moment ago, and then the client sometimes answers with the
/// other's error.
async fn new_channel(connection: &Connection) -> Channel {
    let mut errors = 0;
    loop {
        match connection.create_channel().await {
            Ok(channel) => return channel,
            Err(error) => assert!(errors < 10, "{error}"),
        }
        errors += 1;
        sleep(Duration::from_millis(10)).await;
    }
}

fn properties(sent: &Sent) -> BasicProperties {
    let mut headers = FieldTable::default();
    for (name, value) in &sent.headers {
        headers.insert(name.as_str().into(), value.clone());
    }
    let mut properties = BasicProperties::default().with_headers(headers).with_delivery_mode(2);
    if let Some(id) = &sent.id {
        properties = properties.with_message_id(id.as_str().into());
    }
    if let Some(content_type) = &sent.content_type {
        properties = properties.with_content_type(content_type.as_str().into());
    }
    if let Some(user) = &sent.user_id {
        properties = properties.with_user_id(user.as_str().into());
    }
    if let Some(at) = sent.timestamp {
        properties = properties.with_timestamp(at.duration_since(UNIX_EPOCH).unwrap().as_secs());
    }
    properties
}

/// Text is all that NATS knows.
async fn publish(context: &Context, subject: &str, sent: &Sent) {
    let mut headers = HeaderMap::new();
    let mut put = |name: &str, value: &str| {
        let value = value.parse::<HeaderValue>().unwrap();
        headers.append(name.parse::<HeaderName>().unwrap(), value);
    };
    for (name, value) in &sent.headers {
        let AMQPValue::LongString(text) = value else { panic!("{name} is no text") };
        put(name, std::str::from_utf8(text.as_bytes()).unwrap());
    }
    if let Some(content_type) = &sent.content_type {
        put("Content-Type", content_type);
    }
    if let Some(id) = &sent.id {
        put("Nats-Msg-Id", id);
    }
    loop {
        let message = PublishMessage::build().headers(headers.clone()).payload(sent.body.clone().into());
        let ack = context.send_publish(subject.to_owned(), message).await.unwrap().await.unwrap();
        if !ack.duplicate {
            return;
        }
        // Within the server's own window it is not a copy that anybody sees.
        sleep(DUPLICATES / 4).await;
    }
}

async fn taken(channel: &Channel, queue: &str) -> Vec<Letter> {
    let mut letters = Vec::new();
    while let Some(got) = channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.unwrap() {
        let (body, properties) = (got.delivery.data, got.delivery.properties);
        let table = properties.headers().as_ref().map(FieldTable::inner).into_iter().flatten();
        let mut headers: BTreeMap<_, _> =
            table.map(|(name, value)| (name.to_string(), text_of(value))).collect();
        if let Some(id) = properties.message_id() {
            headers.insert("message-id".to_owned(), id.to_string());
        }
        let content_type = properties.content_type().as_ref().map(ToString::to_string);
        letters.push(Letter { body, headers, content_type });
    }
    letters
}

fn text_of(value: &AMQPValue) -> String {
    match value {
        AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
        other => format!("{other:?}"),
    }
}

async fn kept(context: &Context, name: &str) -> Vec<Letter> {
    let stream = context.get_stream(name).await.unwrap();
    let state = stream.cached_info().state.clone();
    let mut letters = Vec::new();
    for sequence in state.first_sequence.max(1)..=state.last_sequence {
        let message = stream.get_raw_message(sequence).await.unwrap();
        let text =
            |values: &[HeaderValue]| values.iter().map(HeaderValue::as_str).collect::<Vec<_>>().join("|");
        let headers: BTreeMap<_, _> =
            message.headers.iter().map(|(name, values)| (name.to_string(), text(values))).collect();
        let content_type = headers.get("Content-Type").cloned();
        letters.push(Letter { body: message.payload.to_vec(), headers, content_type });
    }
    letters
}

fn stream(name: &str, retention: RetentionPolicy) -> Config {
    Config {
        name: name.to_owned(),
        subjects: vec![name.to_owned()],
        retention,
        duplicate_window: DUPLICATES,
        ..Config::default()
    }
}

fn durable(name: &str, subject: &str, ack_wait: Duration) -> pull::Config {
    pull::Config {
        durable_name: Some(name.to_owned()),
        ack_policy: AckPolicy::Explicit,
        filter_subject: subject.to_owned(),
        ack_wait,
        max_ack_pending: 10_000,
        ..pull::Config::default()
    }
}
