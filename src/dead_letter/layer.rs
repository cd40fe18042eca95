//! [`DeadLetterLayer`].

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tower_layer::Layer;

use super::service::{DeadLetterService, Letterbox};
use crate::broker::{Broker, Destination};
use crate::defaults;
use crate::events::Events;
use crate::pause::Gate;

/// [`Layer`] that applies [`DeadLetterService`]. See the [module docs](super).
#[derive(Clone)]
pub struct DeadLetterLayer {
    broker: Arc<dyn Broker>,
    to: Option<Destination>,
    pause_hold: Duration,
    gate: Gate,
    events: Events,
}

impl DeadLetterLayer {
    /// Failed messages go to `to`, by `broker`.
    pub fn new(broker: Arc<dyn Broker>, to: impl Into<Destination>) -> Self {
        Self::to(broker, Some(to.into()))
    }

    /// Failed messages are rejected: the source broker's own policy decides what becomes of them.
    pub(crate) fn to(broker: Arc<dyn Broker>, to: Option<Destination>) -> Self {
        let (gate, events) = (Gate::default(), Events::default());
        Self { broker, to, pause_hold: defaults::PAUSE_HOLD, gate, events }
    }

    /// How long a delivery is kept while the destination is away.
    #[must_use]
    pub fn with_pause_hold(mut self, hold: Duration) -> Self {
        self.pause_hold = hold;
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
            gate: this.gate,
            events: this.events,
        };
        DeadLetterService::new(inner, box_)
    }
}
