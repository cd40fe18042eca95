//! RabbitMQ, and other brokers that speak AMQP 0-9-1.
//!
//! ```no_run
//! use guestlist::broker::amqp::Amqp;
//! use guestlist::broker::{Broker, QueueSpec};
//!
//! # async fn f() -> Result<(), guestlist::BoxError> {
//! let broker = Amqp::connect("amqp://guest:guest@localhost").await?;
//! let queue = QueueSpec::new("charges");
//! broker.prepare(&queue).await?;
//! let subscription = broker.subscribe(&queue).await?;
//! # Ok(()) }
//! ```
//!
//! # What it promises
//!
//! 1. A delivery is acked only by [`Disposition::Ack`](crate::Disposition::Ack), or after its copy
//!    in the hold queue was confirmed and routed. A delivery of a channel that is closed is never
//!    settled by another.
//! 2. A copy that is `Ok` is confirmed *and* in a queue: each is published `mandatory`, with
//!    nothing else unconfirmed on its channel. A confirm that does not come in time is *unknown*.
//! 3. A copy is not refused, expired, or sent to more queues for what its sender wrote: body, content
//!    type, correlation and application headers are the original's to the byte; `user_id`,
//!    `expiration`, `CC` and `BCC` are moved aside, the broker's own `x-death` and counters dropped,
//!    and it is persistent.
//! 4. A subscription that is [cancelled](crate::broker::Subscription::cancel) gives back what was
//!    not handled before its channel is closed. RabbitMQ 4.3 counts every delivery of a closed
//!    channel, handled or not, and drops a message at its queue's delivery limit.
//!
//! # Delays
//!
//! AMQP has no delayed redelivery. A delayed message is copied to `<queue>.hold.<step>ms`, a queue
//! that dead-letters it back after that step. The [steps](crate::broker::HoldSteps) are few; a delay
//! that is none of them takes several hops, and is late by less than the shortest step (half a
//! second). What is left of the delay is known to the store, or to the message's own
//! [time](crate::delay). A delay that is drawn at random is drawn among the steps, so it takes one hop.
//!
//! The queue of the shortest step is made at the start, the others when they are first needed, also
//! with [`Declare::Check`](crate::broker::Declare): quorum queues with at-least-once dead-lettering,
//! which takes RabbitMQ 3.10 or later. Where one cannot be made, the shortest one serves. A queue of a
//! step that is used no more still returns what is in it, and can be deleted when it is empty.
//!
//! If the copy fails, the delivery is given back a second later, and the error returned.
//!
//! # Reading dead letters
//!
//! AMQP shows a message only by handing it out. A [walk](crate::broker::Broker::letters) takes the letters in hand without
//! an ack, up to 64 ahead of those it shows, and gives back at its end all that was not removed. So:
//!
//! * What a walk has in hand is hidden from others meanwhile, and what others have in hand from the walk. Two walks at
//!   once share the letters. A walk shows as many letters as were ready when it began; if others read the queue at the
//!   same time, newer ones can be among them.
//! * A classic queue puts each letter back into its place. A quorum queue may put what a walk gives back behind what it
//!   did not show. Quorum queues of RabbitMQ 4 hand out high priorities first; so a letter that comes back with one can be
//!   shown again, in place of another.
//! * RabbitMQ 4.3 counts no delivery for a letter that was given back, but one for each that the end of a connection or
//!   of the process leaves in hand; RabbitMQ 3 and 4.0 to 4.2 count each walk on a quorum queue. At the queue's delivery
//!   limit, on RabbitMQ 4 by default 20, the letter is gone. Queues made by
//!   [`Declare::Create`](crate::broker::Declare::Create) have none to speak of; give one of your own a high limit. A walk
//!   that is dropped gives back by a task of its own, which takes a moment: close walks before the process ends.
//! * A walk holds its letters for as long as it takes. After 30 minutes (`consumer_timeout`) the broker takes them back and
//!   the walk ends with an error; RabbitMQ 4.3 does so on quorum queues only.
//! * A removal is an ack. AMQP confirms none; `Ok` means that the queue has answered a question that was sent after it. A
//!   broker that dies in that moment may show the letter once more: its copy has the same id and generation, and dedup
//!   skips it.
//! * A letter that lapin cannot read ends the walk, and hides those behind it: take it out by another client. It does so
//!   on a connection that only walks use.
//! * A stream queue is refused.
//!
//! # Limits
//!
//! * A queue that was declared elsewhere may have a delivery limit, on RabbitMQ 4 by default one of
//!   20. AMQP cannot read it. At the limit the broker drops the message, or hands it to the queue's
//!   own dead-letter exchange; waits and drains count too. Set a high one, and on RabbitMQ 4 only,
//!   `-1` for none: RabbitMQ 3 takes -1 as well, and drops each message at its first redelivery.
//!   Queues made by [`Declare::Create`](crate::broker::Declare::Create) have a limit of 2147483647.
//! * The broker gives up on a delivery that is unsettled for 30 minutes (`consumer_timeout`).
//!   Heartbeats do not extend it, and AMQP cannot read it: a `max_run` that is not shorter is warned about.
//! * Whether a dead-letter queue that was declared elsewhere drops letters (`x-message-ttl`, `x-max-length`) cannot be read either:
//!   give it neither, or `x-overflow: reject-publish`, and the queue pauses when it is full.
//! * An ack is not confirmed by AMQP. One that is lost with its connection is noticed by a
//!   redelivery, which dedup skips.
//! * lapin cannot read a message with a property or a header's name that is not UTF-8, and ends the
//!   connection; so it does with each redelivery.
//! * A classic queue does not count deliveries:
//!   [`broker_deliveries`](crate::Message::broker_deliveries) is there with quorum queues only.
//!   A quorum queue of RabbitMQ 3 also counts what was given back unhandled.
//!
//! # Permissions
//!
//! | what for | configure | write | read |
//! |---|---|---|---|
//! | consuming | | | the queue |
//! | delays | `<queue>.hold.*` | `amq.default` | `<queue>.hold.*` |
//! | dead letters | | `amq.default`, the dead-letter queue | |
//! | reading them, removing them | | | the dead-letter queue |
//! | [`Declare::Create`](crate::broker::Declare::Create) | the queue, the dead-letter queue | | |
//!
//! Since 4.2.6 RabbitMQ says whether a queue is there only to a user with some permission on it: that is what the one on the
//! dead-letter queue is for, any will do. Versions 4.2.6 and 4.3.0 themselves want configure, on the source as well.
//!
//! A user without the permission to configure the hold queue can have it declared beforehand:
//! durable, with the arguments `x-queue-type: quorum`, `x-message-ttl` (the step in milliseconds),
//! `x-dead-letter-exchange` (empty), `x-dead-letter-routing-key` (the queue),
//! `x-dead-letter-strategy: at-least-once` and `x-overflow: reject-publish`. With others, messages
//! can be lost on their way back, and guestlist cannot see it.
//!
//! # Your own loop
//!
//! [`split`] turns a delivery of lapin's into a message and its acker, for teams that keep their
//! own consumer and take only the layers.

mod connect;
mod holds;
mod letters;
mod publish;
mod settle;
mod source;
mod split;
mod topology;

use async_trait::async_trait;
pub use lapin;

pub use self::connect::{Amqp, ConnectOptions};
pub use self::split::split;
use super::{
    Broker, BrokerError, Copy, Destination, Facts, Features, HoldSteps, Letters, QueueSpec, Subscription,
};
use crate::defaults;

/// RabbitMQ's own default of `consumer_timeout`, since 3.8.17. AMQP cannot read it, nor a queue's `x-consumer-timeout`.
const CONSUMER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30 * 60);

const REJECTED: &str =
    "to the queue's dead-letter exchange, which AMQP cannot see, and without one the message is gone";

#[async_trait]
impl Broker for Amqp {
    fn system(&self) -> &'static str {
        source::SYSTEM
    }

    /// The delay step is that of a queue with the defaults. Whether deliveries are counted depends
    /// on the queue, so they are not.
    fn features(&self) -> Features {
        Features { delay_step: defaults::HOLD_SHORTEST, shows_letters: true, ..Features::new() }
    }

    /// `amqp:{vhost}/{queue}`. Slashes in a vhost's name, but for that of the default one, are
    /// encoded, so that no two queues share a scope.
    fn default_scope(&self, queue: &QueueSpec) -> String {
        let vhost = match self.vhost() {
            "/" => "/".to_owned(),
            other => other.replace('%', "%25").replace('/', "%2F"),
        };
        format!("amqp:{vhost}/{}", queue.name)
    }

    fn hold_steps<'a>(&self, queue: &'a QueueSpec) -> Option<&'a HoldSteps> {
        Some(&queue.holds)
    }

    async fn prepare(&self, queue: &QueueSpec) -> Result<(), BrokerError> {
        topology::prepare(&self.consuming, queue).await
    }

    /// What AMQP cannot ask for is taken to be as it is by default.
    async fn facts(&self, _: &QueueSpec) -> Result<Facts, BrokerError> {
        let (delivery_timeout, rejected) = (Some(CONSUMER_TIMEOUT), Some(REJECTED));
        Ok(Facts { delivery_timeout, rejected, ..Facts::default() })
    }

    async fn subscribe(&self, queue: &QueueSpec) -> Result<Box<dyn Subscription>, BrokerError> {
        Ok(Box::new(source::subscribe(self, queue).await?))
    }

    async fn publish(&self, to: &Destination, copy: &Copy<'_>) -> Result<(), BrokerError> {
        self.publisher.publish(to.name(), copy, defaults::CONFIRM).await
    }

    async fn letters(&self, at: &Destination) -> Result<Box<dyn Letters>, BrokerError> {
        Ok(Box::new(letters::begin(&self.letters, at).await?))
    }

    async fn close(&self) {
        self.letters.close().await;
        self.consuming.close().await;
        self.publisher.close().await;
    }
}
