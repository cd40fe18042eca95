//! [`DeadLetterLayer`].

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tower_layer::Layer;

use super::past::Past;
use super::redaction::{Field, Redact, Redaction};
use super::service::{DeadLetterService, Letterbox};
use crate::broker::{Broker, Destination};
use crate::dedup;
use crate::defaults;
use crate::events::Events;
use crate::pause::Gate;

/// [`Layer`] that applies [`DeadLetterService`]. See the [module docs](super).
#[derive(Clone)]
pub struct DeadLetterLayer {
    broker: Arc<dyn Broker>,
    to: Option<Destination>,
    pause_hold: Duration,
    oversized: Oversized,
    redaction: Option<Redaction>,
    consumer: Option<String>,
    past: Past,
    gate: Gate,
    events: Events,
}

/// What becomes of a message that its dead-letter destination does not take, even without the history and the error's text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Oversized {
    /// It stays with its queue, cause `too_large`, and comes again every five minutes until somebody takes it out or
    /// the destination takes more. Nothing is lost; the default.
    #[default]
    Keep,
    /// As much of it is parked as the destination takes: half of the body, a quarter, and so on; without the message's headers
    /// if they alone are too large. The letter says so ([`DeadLetter::truncated`](crate::broker::copy::DeadLetter::truncated)
    /// and its neighbours), and has a hash of the whole body. **The rest is lost.**
    Truncate,
}

impl DeadLetterLayer {
    /// Failed messages go to `to`, by `broker`.
    pub fn new(broker: Arc<dyn Broker>, to: impl Into<Destination>) -> Self {
        Self::to(broker, Some(to.into()))
    }

    /// Failed messages are rejected: the source broker's own policy decides what becomes of them.
    pub(crate) fn to(broker: Arc<dyn Broker>, to: Option<Destination>) -> Self {
        let (gate, events) = (Gate::default(), Events::default());
        let past = Past::new(dedup::retain(defaults::WINDOW, defaults::BACKOFF_CAP));
        let (oversized, pause_hold) = (Oversized::default(), defaults::PAUSE_HOLD);
        Self { broker, to, pause_hold, oversized, redaction: None, consumer: None, past, gate, events }
    }

    /// How long a delivery is kept while the destination is away.
    #[must_use]
    pub fn with_pause_hold(mut self, hold: Duration) -> Self {
        self.pause_hold = hold;
        self
    }

    /// What becomes of a message that the destination does not take.
    #[must_use]
    pub fn with_oversized(mut self, oversized: Oversized) -> Self {
        self.oversized = oversized;
        self
    }

    /// Asks this function about each header's value before it lies with the dead letters, and about each error's text:
    /// see [`Queue::redact`](crate::Queue::redact).
    #[must_use]
    pub fn with_redaction(self, redact: impl Fn(Field<'_>, &[u8]) -> Redact + Send + Sync + 'static) -> Self {
        self.redacted_by(Some(Redaction::new(redact)))
    }

    pub(crate) fn redacted_by(mut self, redaction: Option<Redaction>) -> Self {
        self.redaction = redaction;
        self
    }

    /// What the dead letters say who parked them.
    #[must_use]
    pub fn with_consumer(mut self, name: impl Into<String>) -> Self {
        self.consumer = Some(name.into());
        self
    }

    /// For how long this process remembers how an id failed.
    pub(crate) fn with_kept(mut self, kept: Duration) -> Self {
        self.past = Past::new(kept);
        self
    }

    pub(crate) fn with_gate(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    pub(crate) fn with_events(mut self, events: Events) -> Self {
        self.events = events;
        self
    }
}

impl fmt::Debug for DeadLetterLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetterLayer")
            .field("broker", &self.broker)
            .field("to", &self.to)
            .finish_non_exhaustive()
    }
}

impl<S> Layer<S> for DeadLetterLayer {
    type Service = DeadLetterService<S>;

    fn layer(&self, inner: S) -> DeadLetterService<S> {
        let this = self.clone();
        let box_ = Letterbox {
            broker: this.broker,
            to: this.to,
            pause_hold: this.pause_hold,
            oversized: this.oversized,
            redaction: this.redaction,
            consumer: this.consumer,
            past: this.past,
            gate: this.gate,
            events: this.events,
        };
        DeadLetterService::new(inner, box_)
    }
}
