//! Copies become messages of another queue.

use super::{MemoryBroker, PublishFault};
use crate::Message;
use crate::broker::copy::MOVED_PROPERTY;
use crate::broker::{BrokerError, BrokerErrorKind, Copy, Destination};
use crate::dead_letter::Redact;
use crate::message::MessageBuilder;

pub(super) fn publish(broker: &MemoryBroker, to: &Destination, copy: &Copy<'_>) -> Result<(), BrokerError> {
    let fault = broker.shared.faults.next_publish();
    if let None | Some(PublishFault::LostConfirm) = fault {
        broker.send(to.name(), written(copy))?;
    }
    fault.map_or(Ok(()), |fault| Err(error_of(fault, to)))
}

fn error_of(fault: PublishFault, to: &Destination) -> BrokerError {
    let (kind, what) = match fault {
        PublishFault::NotRouted => (BrokerErrorKind::NotRouted, "the copy was not routed"),
        PublishFault::TooLarge => (BrokerErrorKind::TooLarge, "the copy was too large to be taken"),
        PublishFault::Nacked => (BrokerErrorKind::Nacked, "the copy was not taken"),
        PublishFault::LostCopy | PublishFault::LostConfirm => {
            (BrokerErrorKind::Unknown, "the copy was not confirmed in time")
        }
    };
    BrokerError::new(kind, format!("{what} by {:?}: a fault that was asked for", to.name()))
}

/// The copy as it is kept.
fn written(copy: &Copy<'_>) -> MessageBuilder {
    let message = copy.message();
    let mut written = Message::builder(copy.body()).transport_id(copy.id().to_owned());
    if let Some(content_type) = message.content_type() {
        written = written.content_type(content_type);
    }
    if let Some(priority) = message.priority() {
        written = written.priority(priority);
    }
    if let Some(timestamp) = message.timestamp() {
        written = written.timestamp(timestamp);
    }
    for (name, value) in message.headers().iter() {
        written = match copy.redact(name, || value.clone()) {
            Redact::Keep => written.header(name, value.clone()),
            Redact::Remove => written,
            Redact::Replace(text) => written.header(name, text),
        };
    }
    copy.headers().into_iter().chain(moved_properties(copy)).fold(written, add_header)
}

/// What another broker acted on and moved aside stays aside. This broker acts on no header, so
/// those that were moved are among the message's own again.
fn moved_properties(copy: &Copy<'_>) -> impl Iterator<Item = (String, String)> {
    copy.moved([]).into_iter().filter(|(name, _)| name.starts_with(MOVED_PROPERTY))
}

fn add_header(message: MessageBuilder, (name, value): (String, String)) -> MessageBuilder {
    message.header(name, value)
}
