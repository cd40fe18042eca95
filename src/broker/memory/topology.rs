//! Declares what a queue needs, or checks that it is there.

use super::MemoryBroker;
use crate::broker::{BrokerError, BrokerErrorKind, Declare, Destination, QueueSpec};

pub(super) fn prepare(broker: &MemoryBroker, queue: &QueueSpec) -> Result<(), BrokerError> {
    match queue.declare {
        Declare::Create => declare_all(broker, queue),
        Declare::Check => check_all(broker, queue)?,
    }
    Ok(())
}

fn declare_all(broker: &MemoryBroker, queue: &QueueSpec) {
    broker.declare(&queue.name);
    if let Some(place) = &queue.dead_letter {
        broker.declare(place.name());
    }
}

fn check_all(broker: &MemoryBroker, queue: &QueueSpec) -> Result<(), BrokerError> {
    let place = queue.dead_letter.as_ref().filter(|_| !queue.allow_missing_dead_letter);
    for name in [Some(queue.name.as_str()), place.map(Destination::name)].into_iter().flatten() {
        broker.find(name, BrokerErrorKind::Refused)?;
    }
    Ok(())
}

pub(super) fn missing(queue: &str, kind: BrokerErrorKind) -> BrokerError {
    let fix = "declare it with MemoryBroker::declare or Declare::Create";
    BrokerError::new(kind, format!("there is no queue {queue:?}: {fix}"))
}
