//! What a broker says of itself, for the check at the start.

use std::time::Duration;

/// What a broker says about a queue, its durable and its dead-letter destination. What it cannot say, or what is not there, is
/// `None`; see [`Broker::facts`](super::Broker::facts).
///
/// ```
/// use guestlist::broker::Facts;
/// use std::time::Duration;
/// let facts = Facts { ack_wait: Some(Duration::from_secs(30)), ..Facts::default() };
/// assert_eq!(facts.delivery_timeout, None);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The deadline of each delivery, which heartbeats extend. JetStream: `ack_wait`, or the shortest of the durable's backoff.
    pub ack_wait: Option<Duration>,
    /// After this long the broker gives a delivery up, heartbeats or not. RabbitMQ: `consumer_timeout`.
    pub delivery_timeout: Option<Duration>,
    /// How many deliveries may be unsettled, those that wait for a delay included. JetStream: the durable's `max_ack_pending`.
    pub max_ack_pending: Option<i64>,
    /// What the source keeps.
    pub source: Kept,
    /// What the dead-letter destination keeps.
    pub dead_letters: Kept,
    /// What becomes of a rejected message, in words.
    pub rejected: Option<&'static str>,
}

/// How much a place keeps; `None`: no limit, or none that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Messages are dropped at this age.
    pub max_age: Option<Duration>,
    /// The most messages.
    pub max_messages: Option<i64>,
    /// The most messages of one subject.
    pub max_messages_per_subject: Option<i64>,
    /// The most bytes.
    pub max_bytes: Option<i64>,
    /// A full place takes nothing new. Else it drops the oldest.
    pub refuses_when_full: bool,
}

impl Kept {
    /// The limits at which the oldest messages go, in words.
    pub(crate) fn drops_when_full(&self) -> Option<String> {
        let limits = [
            (self.max_messages, "messages"),
            (self.max_messages_per_subject, "messages of one subject"),
            (self.max_bytes, "bytes"),
        ];
        let limits: Vec<_> =
            limits.into_iter().filter_map(|(limit, of)| limit.map(|limit| format!("{limit} {of}"))).collect();
        (!limits.is_empty() && !self.refuses_when_full).then(|| limits.join(" or "))
    }
}
