//! The brokers, as somebody who knows nothing of this crate uses them.

use std::time::Duration;

use guestlist::broker::amqp::lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use guestlist::broker::amqp::lapin::types::{AMQPValue, FieldTable};
use guestlist::broker::amqp::lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use guestlist::broker::nats::async_nats;
use guestlist::broker::nats::async_nats::jetstream::consumer::{AckPolicy, pull};
use guestlist::broker::nats::async_nats::jetstream::message::PublishMessage;
use guestlist::broker::nats::async_nats::jetstream::stream::{Config, RetentionPolicy};
use guestlist::broker::nats::async_nats::jetstream::{self, Context};

use super::env;

/// Where the id is. Not `Nats-Msg-Id`, by which the server itself would drop copies.
pub(super) const ID: &str = "order-id";

/// How soon JetStream delivers again what a killed process had in hand.
const ACK_WAIT: Duration = Duration::from_secs(3);

pub(super) enum Plain {
    Amqp { channel: Channel, _connection: Connection },
    Nats(Context),
}

pub(super) fn dead(queue: &str) -> String {
    format!("{queue}-dead")
}

pub(super) fn amqp_url() -> String {
    env("GUESTLIST_AMQP_URL")
}

pub(super) fn nats_url() -> String {
    env("GUESTLIST_NATS_URL")
}

impl Plain {
    pub(super) async fn connect(url: &str) -> Self {
        if url.starts_with("nats") {
            return Self::Nats(jetstream::new(async_nats::connect(url).await.unwrap()));
        }
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self::Amqp { channel, _connection: connection }
    }

    /// The queue and the place for its dead letters.
    pub(super) async fn declare(&self, queue: &str) {
        match self {
            Self::Amqp { channel, .. } => {
                declare(channel, queue).await;
                declare(channel, &dead(queue)).await;
            }
            Self::Nats(context) => {
                let source = context.create_stream(stream(queue, RetentionPolicy::WorkQueue)).await.unwrap();
                source.create_consumer(durable(queue)).await.unwrap();
                context.create_stream(stream(&dead(queue), RetentionPolicy::Limits)).await.unwrap();
            }
        }
    }

    /// Each body is its own id. All are confirmed when this ends.
    pub(super) async fn publish(&self, queue: &str, ids: &[String]) {
        match self {
            Self::Amqp { channel, .. } => {
                let mut confirms = Vec::new();
                for id in ids {
                    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
                    let confirm = channel.basic_publish(
                        "".into(),
                        queue.into(),
                        options,
                        id.as_bytes(),
                        properties(id),
                    );
                    confirms.push(confirm.await.unwrap());
                }
                for confirm in confirms {
                    assert!(confirm.await.unwrap().is_ack(), "not confirmed");
                }
            }
            Self::Nats(context) => {
                let mut acks = Vec::new();
                for id in ids {
                    let message = PublishMessage::build().header(ID, id.as_str()).payload(id.clone().into());
                    acks.push(context.send_publish(queue.to_owned(), message).await.unwrap());
                }
                for ack in acks {
                    ack.await.unwrap();
                }
            }
        }
    }

    /// How many messages there are. RabbitMQ does not count those that a consumer has in hand.
    pub(super) async fn left(&self, queue: &str) -> u64 {
        match self {
            Self::Amqp { channel, .. } => {
                let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
                let found = channel.queue_declare(queue.into(), options, FieldTable::default()).await;
                found.unwrap().message_count().into()
            }
            Self::Nats(context) => context.get_stream(queue).await.unwrap().cached_info().state.messages,
        }
    }

    pub(super) async fn delete(&self, queue: &str) {
        for queue in [queue, &dead(queue)] {
            match self {
                Self::Amqp { channel, .. } => {
                    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
                }
                Self::Nats(context) => {
                    context.delete_stream(queue).await.unwrap();
                }
            }
        }
    }
}

async fn declare(channel: &Channel, queue: &str) {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    // The servers' own limits drop messages without a word.
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(i32::MAX));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), options, arguments).await.unwrap();
}

fn properties(id: &str) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert(ID.into(), AMQPValue::LongString(id.into()));
    BasicProperties::default().with_headers(headers).with_delivery_mode(2)
}

fn stream(name: &str, retention: RetentionPolicy) -> Config {
    Config { name: name.to_owned(), subjects: vec![name.to_owned()], retention, ..Config::default() }
}

fn durable(name: &str) -> pull::Config {
    pull::Config {
        durable_name: Some(name.to_owned()),
        ack_policy: AckPolicy::Explicit,
        filter_subject: name.to_owned(),
        ack_wait: ACK_WAIT,
        max_ack_pending: 10_000,
        ..pull::Config::default()
    }
}
