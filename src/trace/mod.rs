//! A span for each delivery, with OpenTelemetry's messaging field names.
//!
//! Fields: `messaging.system`, `messaging.operation.name` and `.type` (`process`), `messaging.destination.name` (the queue; on
//! NATS the subject), `messaging.consumer.group.name` (NATS: the durable), `messaging.rabbitmq.destination.routing_key`,
//! `messaging.message.body.size`, `guestlist.delivery`; and at the end `guestlist.attempt`, `guestlist.key` (the hashed
//! id) and `guestlist.outcome`, or `error.type` with the [cause](crate::Cause::name). Ids and bodies are not among them:
//! logs are not a data store.
//!
//! Names from OpenTelemetry's semantic conventions for messaging spans, version 1.38.

mod layer;
mod service;

pub use self::layer::TraceLayer;
pub use self::service::Trace;
