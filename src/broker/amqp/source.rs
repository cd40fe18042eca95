//! Frames become deliveries.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::{FutureExt as _, Stream as _, StreamExt as _};
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Consumer, ErrorKind, message};
use tokio::time::timeout;

use super::connect::{Amqp, FAREWELL, REPLY_SUCCESS, answered, reply_code, said_no};
use super::holds::Holds;
use super::settle::{Lane, Settler};
use super::topology::queue_name;
use crate::broker::{BrokerError, BrokerErrorKind, QueueSpec, Subscription, copy};
use crate::delivery::BoxFuture;
use crate::message::{MessageBuilder, Source};
use crate::{AckHandle, Delivery, Message, Settle};

/// The value of OpenTelemetry's `messaging.system`.
pub(super) const SYSTEM: &str = "rabbitmq";

/// How long the broker may take to begin.
const ANSWER: Duration = Duration::from_secs(15);

pub(super) async fn subscribe(amqp: &Amqp, queue: &QueueSpec) -> Result<AmqpSubscription, BrokerError> {
    let name = queue_name("the queue's name", &queue.name)?;
    let holds = Holds::new(Arc::clone(&amqp.publisher), queue);
    let (channel, _) = amqp.consuming.channel().await?;
    let lane = Lane::new(channel);
    let consumer =
        answered(&format!("consuming `{}`", queue.name), ANSWER, consume(&lane, name, queue)).await?;
    Ok(AmqpSubscription {
        queue: queue.name.clone(),
        consumer: Some(consumer),
        settler: Arc::new(Settler::new(lane.clone(), holds)),
        lane,
    })
}

async fn consume(lane: &Lane, name: ShortString, queue: &QueueSpec) -> lapin::Result<Consumer> {
    // 0 would be no bound at all, and lapin buffers whatever comes.
    let prefetch = queue.prefetch.max(1);
    lane.channel().basic_qos(prefetch, BasicQosOptions { global: false }).await?;
    let options = BasicConsumeOptions::default();
    lane.channel().basic_consume(name, ShortString::default(), options, FieldTable::default()).await
}

/// A consumer on a channel of its own.
pub(super) struct AmqpSubscription {
    queue: String,
    // None: cancelled, failed or ended.
    consumer: Option<Consumer>,
    lane: Lane,
    settler: Arc<dyn Settle>,
}

impl Subscription for AmqpSubscription {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        _room: usize,
    ) -> Poll<Option<Result<Delivery, BrokerError>>> {
        loop {
            let Some(consumer) = &mut self.consumer else { return Poll::Ready(None) };
            match Pin::new(consumer).poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                // Of a channel that has died since: the broker delivers it again.
                Poll::Ready(Some(Ok(frame))) if !frame.acker.usable() => {}
                Poll::Ready(Some(Ok(frame))) => return Poll::Ready(Some(Ok(self.delivery(frame)))),
                Poll::Ready(Some(Err(error))) => {
                    self.end();
                    return Poll::Ready(Some(Err(lost(&self.queue, error))));
                }
                Poll::Ready(None) => {
                    self.end();
                    return Poll::Ready(None);
                }
            }
        }
    }

    fn cancel(&mut self) -> BoxFuture<()> {
        let Some(consumer) = self.consumer.take() else { return std::future::ready(()).boxed() };
        let lane = self.lane.clone();
        async move {
            // A broker that does not answer gets everything back when the channel ends.
            let _ = timeout(FAREWELL, hand_back(&lane, consumer)).await;
        }
        .boxed()
    }

    fn close(mut self: Box<Self>) -> BoxFuture<()> {
        async move {
            self.cancel().await;
            let bye = self.lane.channel().close(REPLY_SUCCESS, "OK".into());
            let _ = timeout(FAREWELL, bye).await;
        }
        .boxed()
    }
}

impl AmqpSubscription {
    fn delivery(&self, frame: message::Delivery) -> Delivery {
        let handle = AckHandle::Tag(frame.delivery_tag);
        let source = Source::new(SYSTEM, self.queue.as_str());
        Delivery::new(message_of(source, frame), Arc::clone(&self.settler), handle)
    }

    fn end(&mut self) {
        self.consumer = None;
        self.lane.end();
    }
}

/// Cancels first: what is given back before comes straight back, and closing the channel would
/// count it as a failed delivery (RabbitMQ 4.3).
async fn hand_back(lane: &Lane, mut consumer: Consumer) {
    let cancelled = lane.channel().basic_cancel(consumer.tag(), BasicCancelOptions::default()).await;
    if cancelled.is_err() {
        return;
    }
    while let Some(Ok(frame)) = consumer.next().await {
        let _ = lane.give_back(frame.delivery_tag);
    }
}

fn lost(queue: &str, error: lapin::Error) -> BrokerError {
    let what = format!("consuming `{queue}` ended");
    match error.kind() {
        ErrorKind::ParsingError(_) => BrokerError::new(
            BrokerErrorKind::Unreachable,
            format!("{what}: lapin cannot read a frame, most likely a message with a property or a header's name that is not UTF-8"),
        )
        .with_source(error),
        // The channel only: a consumer timeout (before 4.3), a queue that was deleted.
        _ if error.is_amqp_soft_error() && reply_code(&error) != Some(403) => {
            BrokerError::new(BrokerErrorKind::Closed, what).with_source(error)
        }
        _ => said_no(what, error),
    }
}

/// A frame as a message.
pub(super) fn message_of(source: Source, frame: message::Delivery) -> Message {
    let message::Delivery { exchange, routing_key, redelivered, properties, data, .. } = frame;
    let source = Source { exchange: exchange.to_string(), routing_key: routing_key.to_string(), ..source };
    let builder = Message::builder(data).source(source).redelivered(redelivered);
    let builder = with_properties(builder, &properties);
    let builder = with_count(builder, &properties, redelivered);
    builder.native(Arc::new(properties)).build()
}

fn with_properties(mut builder: MessageBuilder, properties: &BasicProperties) -> MessageBuilder {
    if let Some(id) = properties.message_id() {
        builder = builder.transport_id(id.as_str().to_owned());
    }
    if let Some(content_type) = properties.content_type() {
        builder = builder.content_type(content_type.as_str());
    }
    if let Some(priority) = properties.priority() {
        builder = builder.priority(*priority);
    }
    // The sender's clock, or its joke: some numbers are no time.
    if let Some(at) = properties.timestamp().and_then(seconds) {
        builder = builder.timestamp(at);
    }
    let headers = properties.headers().as_ref().map(FieldTable::inner).into_iter().flatten();
    // A copy's dead-letter history is that of our hold queue, not the sender's.
    let ours = headers.clone().any(|(name, _)| name.as_str().starts_with(copy::PREFIX));
    for (name, value) in headers {
        let name = name.as_str();
        if !(COUNTERS.contains(&name) || ours && is_history(name)) {
            builder = builder.header(name, bytes_of(value));
        }
    }
    builder
}

fn seconds(timestamp: u64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs(timestamp))
}

const COUNTERS: [&str; 2] = ["x-delivery-count", "x-acquired-count"];

/// How often a message was dead-lettered: RabbitMQ writes it, and RabbitMQ 3 goes on counting
/// from what it finds.
fn is_history(name: &str) -> bool {
    name == "x-death" || name.starts_with("x-first-death-") || name.starts_with("x-last-death-")
}

/// What the broker itself wrote on a message, of no meaning for a copy.
pub(super) fn is_brokers(name: &str) -> bool {
    COUNTERS.contains(&name) || is_history(name)
}

/// Both headers count the deliveries before this one; RabbitMQ 4.3 leaves out of the first those
/// that were given back. On a first delivery they are another queue's, copied with the message.
fn with_count(builder: MessageBuilder, properties: &BasicProperties, redelivered: bool) -> MessageBuilder {
    let headers = properties.headers().as_ref().filter(|_| redelivered);
    let before = headers
        .and_then(|headers| COUNTERS.iter().filter_map(|name| integer(headers.inner().get(*name)?)).max());
    match before.and_then(|before| u32::try_from(before).ok()) {
        Some(before) => builder.broker_deliveries(before.saturating_add(1)),
        None => builder,
    }
}

/// Clients write integers in any width.
pub(super) fn integer(value: &AMQPValue) -> Option<i64> {
    match value {
        AMQPValue::ShortShortInt(n) => Some((*n).into()),
        AMQPValue::ShortShortUInt(n) => Some((*n).into()),
        AMQPValue::ShortInt(n) => Some((*n).into()),
        AMQPValue::ShortUInt(n) => Some((*n).into()),
        AMQPValue::LongInt(n) => Some((*n).into()),
        AMQPValue::LongUInt(n) => Some((*n).into()),
        AMQPValue::LongLongInt(n) => Some(*n),
        _ => None,
    }
}

/// A header's value as bytes: text as it is, numbers in decimal, times in seconds, lists and
/// tables as JSON, nothing as nothing.
pub(super) fn bytes_of(value: &AMQPValue) -> Vec<u8> {
    match value {
        AMQPValue::LongString(text) => text.as_bytes().to_vec(),
        AMQPValue::ShortString(text) => text.as_str().as_bytes().to_vec(),
        AMQPValue::ByteArray(bytes) => bytes.as_slice().to_vec(),
        AMQPValue::Void => Vec::new(),
        other => json_of(other).to_string().into_bytes(),
    }
}

fn json_of(value: &AMQPValue) -> serde_json::Value {
    use serde_json::Value;
    match value {
        AMQPValue::Boolean(yes) => Value::Bool(*yes),
        AMQPValue::Float(n) => Value::from(*n),
        AMQPValue::Double(n) => Value::from(*n),
        AMQPValue::DecimalValue(n) => Value::from(f64::from(n.value) / 10f64.powi(n.scale.into())),
        AMQPValue::Timestamp(at) => Value::from(*at),
        AMQPValue::FieldArray(list) => list.as_slice().iter().map(json_of).collect(),
        AMQPValue::FieldTable(table) => {
            table.inner().iter().map(|(name, value)| (name.to_string(), json_of(value))).collect()
        }
        AMQPValue::Void => Value::Null,
        other => match integer(other) {
            Some(number) => Value::from(number),
            None => Value::from(String::from_utf8_lossy(&bytes_of(other))),
        },
    }
}
