//! [`RedeliverLayer`].

use tower_layer::Layer;

use super::Redeliver;
use crate::Backoff;

/// [`Layer`] that applies [`Redeliver`]. See the [module docs](super).
#[derive(Clone, Copy, Debug)]
pub struct RedeliverLayer {
    backoff: Backoff,
}

impl RedeliverLayer {
    /// Transient failures come again after the default backoff: 1 s × 4 up to 5 min, full jitter.
    pub const fn new() -> Self {
        Self { backoff: Backoff::attempts() }
    }

    /// The delays between attempts.
    #[must_use]
    pub const fn with_backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }
}

impl Default for RedeliverLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for RedeliverLayer {
    type Service = Redeliver<S>;

    fn layer(&self, inner: S) -> Redeliver<S> {
        Redeliver::new(inner, self.backoff)
    }
}
