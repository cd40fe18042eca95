//! [`TraceLayer`].

use tower_layer::Layer;

use super::Trace;

/// [`Layer`] that applies [`Trace`]. See the [module docs](super).
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct TraceLayer;

impl TraceLayer {
    /// A span at level info, target `guestlist`.
    pub const fn new() -> Self {
        Self
    }
}

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Trace<S> {
        Trace::new(inner)
    }
}
