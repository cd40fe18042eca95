//! [`RetryLayer`].

use tower_layer::Layer;

use super::Retry;
use crate::Backoff;

/// [`Layer`] that applies [`Retry`]. See the [module docs](super).
#[derive(Clone, Copy, Debug)]
pub struct RetryLayer {
    tries: u32,
    backoff: Backoff,
}

impl RetryLayer {
    /// This many tries in all, at least one; 50 ms × 4 up to 2 s between them, full jitter.
    pub const fn new(tries: u32) -> Self {
        Self { tries, backoff: Backoff::tries() }
    }

    /// The delays between tries.
    #[must_use]
    pub const fn with_backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }
}

impl<S> Layer<S> for RetryLayer {
    type Service = Retry<S>;

    fn layer(&self, inner: S) -> Retry<S> {
        Retry::new(inner, self.tries, self.backoff)
    }
}
