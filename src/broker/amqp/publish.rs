//! Copies: what is put on them, and that they arrive.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldArray, FieldTable, FrameSize, ShortString};
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::connect::{Link, reply_code, said_no};
use super::source::{bytes_of, is_brokers};
use super::topology::queue_name;
use crate::Message;
use crate::broker::{BrokerError, BrokerErrorKind, Copy, copy};
use crate::dead_letter::Redact;

/// How many copies may be on their way at once, each on a channel of its own: lapin attaches a
/// returned message to the wrong confirm when a channel has several unconfirmed.
const CHANNELS: usize = 8;

const PERSISTENT: u8 = 2;

/// Publishes copies, confirmed and routed.
pub(super) struct Publisher {
    link: Link,
    permits: Semaphore,
    idle: Mutex<Vec<Lane>>,
}

/// A channel that confirms, with nothing unconfirmed on it.
struct Lane {
    channel: Channel,
    frame_max: FrameSize,
}

impl Publisher {
    pub(super) fn new(link: Link) -> Self {
        Self { link, permits: Semaphore::new(CHANNELS), idle: Mutex::default() }
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// Publishes to the queue by the default exchange: a copy goes back to one consumer, and
    /// never to whatever else the original exchange feeds.
    pub(super) async fn publish(
        &self,
        queue: &str,
        copy: &Copy<'_>,
        confirm: Duration,
    ) -> Result<(), BrokerError> {
        let name = queue_name("the name of the destination", queue)?;
        let properties = properties(copy);
        let Ok(_permit) = self.permits.acquire().await else { return Err(unknown(queue, confirm)) };
        let lane = self.lane(confirm).await?;
        fits(&properties, lane.frame_max)?;
        let body = copy.body();
        let sent = send(&lane.channel, name, properties, &body);
        // Neither a channel with an open question nor a closed one goes back to the idle ones.
        let answer = match timeout(confirm, sent).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(not_taken(queue, error)),
            Err(_) => return Err(unknown(queue, confirm)),
        };
        self.idle().push(lane);
        judge(queue, &answer)
    }

    async fn lane(&self, limit: Duration) -> Result<Lane, BrokerError> {
        if let Some(lane) = self.idle_lane() {
            return Ok(lane);
        }
        timeout(limit, self.new_lane()).await.unwrap_or_else(|_| {
            let what = format!(
                "RabbitMQ opened no channel to publish by within {limit:?}: blocked by an alarm, or gone"
            );
            Err(BrokerError::new(BrokerErrorKind::Unreachable, what))
        })
    }

    fn idle_lane(&self) -> Option<Lane> {
        let mut idle = self.idle();
        idle.retain(|lane| lane.channel.status().connected());
        idle.pop()
    }

    async fn new_lane(&self) -> Result<Lane, BrokerError> {
        let (channel, frame_max) = self.link.channel().await?;
        match channel.confirm_select(ConfirmSelectOptions::default()).await {
            Ok(()) => Ok(Lane { channel, frame_max }),
            Err(error) => Err(said_no("RabbitMQ does not confirm what is published".to_owned(), error)),
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Lane>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn close(&self) {
        self.idle().clear();
        self.link.close().await;
    }
}

async fn send(
    channel: &Channel,
    queue: ShortString,
    properties: BasicProperties,
    body: &[u8],
) -> lapin::Result<Confirmation> {
    // Without `mandatory` the broker confirms what it had no queue for.
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let exchange = ShortString::default();
    channel.basic_publish(exchange, queue, options, body, properties).await?.await
}

fn judge(queue: &str, answer: &Confirmation) -> Result<(), BrokerError> {
    let (kind, why) = match answer {
        Confirmation::Ack(None) => return Ok(()),
        Confirmation::Ack(Some(_)) => (BrokerErrorKind::NotRouted, "does not exist"),
        Confirmation::Nack(_) => (BrokerErrorKind::Nacked, "took no copy: it is full, or cannot store it"),
        Confirmation::NotRequested => (BrokerErrorKind::Unknown, "did not confirm the copy"),
    };
    Err(BrokerError::new(kind, format!("the queue `{queue}` {why}")))
}

fn not_taken(queue: &str, error: lapin::Error) -> BrokerError {
    let too_large = reply_code(&error) == Some(406) && error.to_string().contains("larger than");
    if too_large {
        let what = format!("the copy for `{queue}` is larger than the broker takes");
        return BrokerError::new(BrokerErrorKind::TooLarge, what).with_source(error);
    }
    said_no(format!("publishing a copy to `{queue}` failed"), error)
}

fn unknown(queue: &str, confirm: Duration) -> BrokerError {
    let what = format!("the copy for `{queue}` was not confirmed within {confirm:?}");
    BrokerError::new(BrokerErrorKind::Unknown, what)
}

/// Properties go in one frame; one that is too large ends the whole connection, and would end the
/// next one too.
fn fits(properties: &BasicProperties, frame_max: FrameSize) -> Result<(), BrokerError> {
    let size = properties.headers().as_ref().map_or(0, table_size) + OTHER_PROPERTIES;
    if size <= usize::try_from(frame_max).unwrap_or(usize::MAX) {
        return Ok(());
    }
    let what =
        format!("the headers of the copy need {size} bytes, and the broker takes {frame_max} in a frame");
    Err(BrokerError::new(BrokerErrorKind::HeadersTooLarge, what))
}

/// Nine short strings of at most 256 bytes each, numbers, and the frame around them.
const OTHER_PROPERTIES: usize = 9 * 256 + 64;

fn table_size(table: &FieldTable) -> usize {
    4 + table.inner().iter().map(|(name, value)| 1 + name.as_str().len() + value_size(value)).sum::<usize>()
}

fn value_size(value: &AMQPValue) -> usize {
    1 + match value {
        AMQPValue::LongString(text) => 4 + text.as_bytes().len(),
        AMQPValue::ShortString(text) => 1 + text.as_str().len(),
        AMQPValue::ByteArray(bytes) => 4 + bytes.as_slice().len(),
        AMQPValue::FieldArray(list) => 4 + list.as_slice().iter().map(value_size).sum::<usize>(),
        AMQPValue::FieldTable(table) => table_size(table),
        _ => 8,
    }
}

/// The properties of a copy: the original's, but for what the broker acts on.
fn properties(copy: &Copy<'_>) -> BasicProperties {
    let message = copy.message();
    let (kept, headers, moved) = match message.native::<BasicProperties>() {
        Some(native) => of_native(native, copy),
        None => of_foreign(copy),
    };
    let mut headers = headers;
    put(&mut headers, copy::COPY_ID, AMQPValue::LongString(copy.id().into()));
    for (name, value) in copy.headers().into_iter().chain(copy.moved(moved)) {
        put(&mut headers, &name, AMQPValue::LongString(value.into()));
    }
    kept.with_headers(headers).with_delivery_mode(PERSISTENT)
}

type Parts = (BasicProperties, FieldTable, Vec<(String, Bytes)>);

macro_rules! keep {
    ($from:ident: $($get:ident $set:ident),*) => {{
        let mut kept = BasicProperties::default();
        $(if let Some(value) = $from.$get() { kept = kept.$set(value.clone()); })*
        kept
    }};
}

fn of_native(native: &BasicProperties, copy: &Copy<'_>) -> Parts {
    // Not user_id (the broker compares it with ours), not expiration (the copy would vanish), not
    // delivery_mode.
    let kept = keep!(native:
        content_type with_content_type, content_encoding with_content_encoding,
        priority with_priority, correlation_id with_correlation_id, reply_to with_reply_to,
        message_id with_message_id, timestamp with_timestamp, kind with_type,
        app_id with_app_id, cluster_id with_cluster_id);
    let mut moved = moved_properties(native);
    let mut headers = FieldTable::default();
    for (name, value) in native.headers().as_ref().map(FieldTable::inner).into_iter().flatten() {
        match fate(name.as_str()) {
            Fate::Kept => put_redacted(&mut headers, copy, name.as_str(), value.clone()),
            Fate::Moved => moved.push((moved_header(name.as_str()), bytes_of(value).into())),
            Fate::Dropped => {}
        }
    }
    (kept, headers, moved)
}

fn moved_properties(native: &BasicProperties) -> Vec<(String, Bytes)> {
    let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
    let transient = native.delivery_mode().filter(|mode| *mode != PERSISTENT);
    [
        ("user_id", text(native.user_id())),
        ("expiration", text(native.expiration())),
        ("delivery_mode", transient.map(|mode| mode.to_string())),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((format!("{}{name}", copy::MOVED_PROPERTY), value?.into())))
    .collect()
}

/// What becomes of a header on a copy.
enum Fate {
    Kept,
    Moved,
    Dropped,
}

fn fate(name: &str) -> Fate {
    match name {
        // Sender-selected queues: the copy would go there again, and count as routed by them.
        "CC" | "BCC" => Fate::Moved,
        // Written anew from what they say.
        ours if ours.starts_with(copy::PREFIX) => Fate::Dropped,
        brokers if is_brokers(brokers) => Fate::Dropped,
        _ => Fate::Kept,
    }
}

fn moved_header(name: &str) -> String {
    format!("{}{name}", copy::MOVED_HEADER)
}

/// A message that came by another broker, or was made by hand.
fn of_foreign(copy: &Copy<'_>) -> Parts {
    let message = copy.message();
    let mut headers = FieldTable::default();
    let mut moved = Vec::new();
    let restored = &message.copy_marks().moved;
    for (name, value) in message.headers().iter() {
        // What an earlier copy moved aside is among the headers, and stays aside.
        if restored.iter().any(|(moved, _)| moved.strip_prefix(copy::MOVED_HEADER) == Some(name)) {
            continue;
        }
        match fate(name) {
            Fate::Kept => {
                put_redacted(&mut headers, copy, name, AMQPValue::LongString(value.to_vec().into()));
            }
            Fate::Moved => moved.push((moved_header(name), value.clone())),
            Fate::Dropped => {}
        }
    }
    (foreign_properties(message), headers, moved)
}

fn foreign_properties(message: &Message) -> BasicProperties {
    let mut kept = BasicProperties::default();
    let short = |text: &str| ShortString::try_new(text).ok();
    if let Some(content_type) = message.content_type().and_then(short) {
        kept = kept.with_content_type(content_type);
    }
    // One that does not fit travels in a header of ours.
    if let Some(id) = message.transport_id().and_then(|id| id.as_str()).and_then(short) {
        kept = kept.with_message_id(id);
    }
    if let Some(priority) = message.priority() {
        kept = kept.with_priority(priority);
    }
    if let Some(at) = message.timestamp().and_then(|at| at.duration_since(UNIX_EPOCH).ok()) {
        kept = kept.with_timestamp(at.as_secs());
    }
    kept
}

fn put_redacted(headers: &mut FieldTable, copy: &Copy<'_>, name: &str, value: AMQPValue) {
    match copy.redact(name, || bytes_of(&value).into()) {
        Redact::Keep => put(headers, name, value),
        Redact::Remove => {}
        Redact::Replace(text) => put(headers, name, AMQPValue::LongString(text.into())),
    }
}

/// AMQP has one value for a name; a second one makes it a list.
fn put(headers: &mut FieldTable, name: &str, value: AMQPValue) {
    let Ok(short) = ShortString::try_new(name) else {
        tracing::warn!(bytes = name.len(), "a header's name is too long for AMQP: the copy goes without it");
        return;
    };
    let value = match headers.inner().get(name) {
        None => value,
        Some(AMQPValue::FieldArray(list)) => {
            let mut list = list.clone();
            list.push(value);
            AMQPValue::FieldArray(list)
        }
        Some(first) => AMQPValue::FieldArray(FieldArray::from(vec![first.clone(), value])),
    };
    headers.insert(short, value);
}
