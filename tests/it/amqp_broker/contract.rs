//! What every broker promises, kept by both kinds of queue.

use std::sync::Arc;

use async_trait::async_trait;
use guestlist::broker::amqp::lapin::BasicProperties;
use guestlist::broker::amqp::lapin::types::{AMQPValue, FieldTable};
use guestlist::broker::amqp::{Amqp, split};
use guestlist::broker::{Broker, QueueKind, QueueSpec};
use guestlist::testing::broker_contract::{BrokerFixture, broker_contract};
use guestlist::{Disposition, Message};

use super::rabbit::{Rabbit, spec, url};

struct Queues {
    kind: QueueKind,
    rabbit: Rabbit,
}

#[async_trait]
impl BrokerFixture for Queues {
    async fn connect(&self) -> Arc<dyn Broker> {
        Arc::new(Amqp::connect(&url()).await.unwrap())
    }

    fn queue(&self, name: &str, prefetch: u16) -> QueueSpec {
        let mut queue = spec(name, self.kind);
        queue.prefetch = prefetch;
        queue
    }

    async fn send(&self, queue: &QueueSpec, id: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut table = FieldTable::default();
        for (name, value) in headers {
            table.insert((*name).into(), AMQPValue::LongString((*value).into()));
        }
        let properties = BasicProperties::default().with_message_id(id.into()).with_headers(table);
        self.rabbit.send_as(&queue.name, properties.with_delivery_mode(2), body).await;
    }

    async fn depth(&self, queue: &QueueSpec) -> u64 {
        self.rabbit.ready(&queue.name).await
    }

    async fn read_dead_letters(&self, queue: &QueueSpec) -> Vec<Message> {
        let place = queue.dead_letter.as_ref().unwrap();
        let mut letters = Vec::new();
        while let Some(letter) = self.rabbit.get_unacked(place.name()).await {
            let (letter, acker) = split(letter.delivery);
            acker.settle(Disposition::Ack).await.unwrap();
            letters.push(letter);
        }
        letters
    }

    async fn delete_dead_letters(&self, queue: &QueueSpec) {
        self.rabbit.delete(queue.dead_letter.as_ref().unwrap().name()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn quorum_queues_keep_the_contract() {
    broker_contract(&Queues { kind: QueueKind::Quorum, rabbit: Rabbit::new().await }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn classic_queues_keep_the_contract() {
    broker_contract(&Queues { kind: QueueKind::Classic, rabbit: Rabbit::new().await }).await;
}
