//! Declares or checks what a queue needs. Each question has a channel of its own, since a
//! refusal closes the channel it was asked on.

use std::collections::BTreeMap;
use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::connect::{Link, answered, reply_code, said_no, short};
use crate::broker::{BrokerError, BrokerErrorKind, Declare, QueueKind, QueueSpec};

/// How long the broker may take for one declaration. A quorum queue elects its leader first.
const ANSWER: Duration = Duration::from_secs(15);

pub(super) async fn prepare(link: &Link, queue: &QueueSpec) -> Result<(), BrokerError> {
    source(link, queue).await?;
    // The other steps are made when they are first needed: by then, this one has shown that it can be done.
    hold(link, queue, queue.holds.shortest()).await?;
    dead_letter(link, queue).await
}

/// The name of the queue whose messages come back to `queue` after this step.
pub(super) fn hold_queue(queue: &QueueSpec, step: Duration) -> Result<ShortString, BrokerError> {
    let millis = step.as_millis();
    if millis == 0 {
        return Err(refused(
            "the hold step is shorter than a millisecond: messages would go round without a pause".into(),
        ));
    }
    short("the name of the hold queue", &format!("{}.hold.{millis}ms", queue.name))
}

/// The name of a queue to consume from or to publish to.
pub(super) fn queue_name(what: &str, name: &str) -> Result<ShortString, BrokerError> {
    if name.is_empty() {
        // An empty name would make the broker invent one, or mean the queue declared last.
        return Err(refused(format!("{what} is empty")));
    }
    short(what, name)
}

async fn source(link: &Link, queue: &QueueSpec) -> Result<(), BrokerError> {
    let name = queue_name("the queue's name", &queue.name)?;
    match queue.declare {
        Declare::Check if exists(link, &name).await? => Ok(()),
        Declare::Check => Err(refused(format!(
            "the queue `{name}` does not exist: check the name, declare it, or have it declared with Declare::Create",
        ))),
        Declare::Create => create(link, &name, queue.amqp.kind).await,
    }
}

/// Makes the hold queue of a step, or finds it there as it has to be.
pub(super) async fn hold(link: &Link, queue: &QueueSpec, step: Duration) -> Result<(), BrokerError> {
    let name = hold_queue(queue, step)?;
    let arguments = hold_arguments(queue, step);
    let error = match declare(link, &name, DURABLE, arguments).await? {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    if reply_code(&error) == Some(403) && may_be_seen(link, &name).await? {
        // Declared by those who may; nobody but them can compare its arguments.
        tracing::warn!(target: "guestlist", queue = %name, "the hold queue is there, but may not be checked: see the docs of broker::amqp for its arguments");
        return Ok(());
    }
    let what = match reply_code(&error) {
        Some(406) => format!(
            "the hold queue `{name}` is there with other arguments: delete it when it is empty, or choose another hold step"
        ),
        Some(403) => format!(
            "the hold queue `{name}` may not be declared: declare it for this user, or permit the user to configure and read it, and to write to amq.default"
        ),
        _ => format!("declaring the hold queue `{name}` failed"),
    };
    Err(said_no(what, error))
}

/// A user that may not even ask is no better off than one whose queue is missing.
async fn may_be_seen(link: &Link, name: &ShortString) -> Result<bool, BrokerError> {
    match exists(link, name).await {
        Err(error) if error.kind() == BrokerErrorKind::Refused => Ok(false),
        answer => answer,
    }
}

/// Quorum and at-least-once whatever the source is: a classic queue's dead-letter hop is
/// unconfirmed. Without `reject-publish` at-least-once would silently be at-most-once.
fn hold_arguments(queue: &QueueSpec, step: Duration) -> FieldTable {
    let millis = i64::try_from(step.as_millis()).unwrap_or(i64::MAX);
    table([
        ("x-queue-type", text("quorum")),
        ("x-message-ttl", AMQPValue::LongLongInt(millis)),
        ("x-dead-letter-exchange", text("")),
        ("x-dead-letter-routing-key", text(&queue.name)),
        ("x-dead-letter-strategy", text("at-least-once")),
        ("x-overflow", text("reject-publish")),
    ])
}

async fn dead_letter(link: &Link, queue: &QueueSpec) -> Result<(), BrokerError> {
    let Some(destination) = &queue.dead_letter else { return Ok(()) };
    let name = queue_name("the name of the dead-letter queue", destination.name())?;
    if name.as_str() == queue.name {
        return Err(refused(format!(
            "the queue `{name}` is its own dead-letter queue: failed messages would go round for ever"
        )));
    }
    // Any kind will do, so one that is there is not declared again with arguments of ours.
    if exists(link, &name).await? {
        return Ok(());
    }
    match queue.declare {
        Declare::Create => create(link, &name, QueueKind::Quorum).await,
        Declare::Check if queue.allow_missing_dead_letter => Ok(()),
        Declare::Check => Err(refused(format!(
            "the dead-letter queue `{name}` of `{}` does not exist: declare it, have it declared with Declare::Create, or allow that it is missing",
            queue.name,
        ))),
    }
}

async fn create(link: &Link, name: &ShortString, kind: QueueKind) -> Result<(), BrokerError> {
    let answer = declare(link, name, DURABLE, arguments(kind)).await?;
    let Err(error) = answer else { return Ok(()) };
    let what = match reply_code(&error) {
        Some(406) => format!(
            "the queue `{name}` is there with other arguments than {} has: take it as it is with Declare::Check, choose the other kind, or delete it",
            described(kind),
        ),
        Some(403) => {
            format!("the queue `{name}` may not be declared: the user needs the permission to configure it")
        }
        _ => format!("declaring the queue `{name}` failed"),
    };
    Err(said_no(what, error))
}

/// As good as none. The default of RabbitMQ 4 is 20, after which it drops the message, and waits
/// and drains count too: ours is the limit that dead-letters. Its word for none is -1, which
/// RabbitMQ 3 takes as well, and then drops each message at its first redelivery.
const DELIVERY_LIMIT: i64 = i32::MAX as i64;

fn arguments(kind: QueueKind) -> FieldTable {
    match kind {
        QueueKind::Quorum => table([
            ("x-queue-type", text("quorum")),
            ("x-delivery-limit", AMQPValue::LongLongInt(DELIVERY_LIMIT)),
        ]),
        QueueKind::Classic => table([("x-queue-type", text("classic"))]),
    }
}

fn table<const N: usize>(entries: [(&'static str, AMQPValue); N]) -> FieldTable {
    entries
        .into_iter()
        .map(|(name, value)| (ShortString::from(name), value))
        .collect::<BTreeMap<_, _>>()
        .into()
}

fn described(kind: QueueKind) -> String {
    match kind {
        QueueKind::Quorum => format!("a durable quorum queue with a delivery limit of {DELIVERY_LIMIT}"),
        QueueKind::Classic => "a durable classic queue".to_owned(),
    }
}

pub(super) async fn exists(link: &Link, name: &ShortString) -> Result<bool, BrokerError> {
    match declare(link, name, PASSIVE, FieldTable::default()).await? {
        Ok(()) => Ok(true),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) if reply_code(&error) == Some(404) => {
            // A queue whose node is down is "not found" too, but trying again may help.
            let what = format!("the queue `{name}` cannot be reached");
            Err(BrokerError::new(BrokerErrorKind::Unreachable, what).with_source(error))
        }
        Err(error) if reply_code(&error) == Some(403) => {
            let what = format!(
                "the queue `{name}` may not be asked for: the user needs a permission on it, read for a source or write for a \
                 dead-letter queue (RabbitMQ 4.2.6 and 4.3.0: configure)"
            );
            Err(said_no(what, error))
        }
        Err(error) => Err(said_no(format!("asking for the queue `{name}` failed"), error)),
    }
}

fn is_missing(error: &lapin::Error) -> bool {
    reply_code(error) == Some(404) && error.to_string().contains("no queue")
}

const DURABLE: QueueDeclareOptions = QueueDeclareOptions {
    passive: false,
    durable: true,
    exclusive: false,
    auto_delete: false,
    nowait: false,
};
pub(super) const PASSIVE: QueueDeclareOptions = QueueDeclareOptions { passive: true, ..DURABLE };

/// The inner result is the broker's answer; the outer one says that it could not be asked.
async fn declare(
    link: &Link,
    name: &ShortString,
    options: QueueDeclareOptions,
    arguments: FieldTable,
) -> Result<Result<(), lapin::Error>, BrokerError> {
    let (channel, _) = link.channel().await?;
    let question = async {
        match channel.queue_declare(name.clone(), options, arguments).await {
            Err(error) if reply_code(&error).is_none() => Err(error),
            answer => Ok(answer.map(drop)),
        }
    };
    // The channel closes itself when it is dropped, if the broker has not closed it.
    answered(&format!("declaring or checking the queue `{name}`"), ANSWER, question).await
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn refused(what: String) -> BrokerError {
    BrokerError::new(BrokerErrorKind::Refused, what)
}
