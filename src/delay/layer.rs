//! [`DelayLayer`].

use tower_layer::Layer;

use super::Delay;

/// [`Layer`] that applies [`Delay`]. See the [module docs](super).
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct DelayLayer;

impl DelayLayer {
    /// Honours [`DELIVER_AT`](super::DELIVER_AT) and [`DELIVER_AFTER`](super::DELIVER_AFTER).
    pub const fn new() -> Self {
        Self
    }
}

impl<S> Layer<S> for DelayLayer {
    type Service = Delay<S>;

    fn layer(&self, inner: S) -> Delay<S> {
        Delay::new(inner)
    }
}
