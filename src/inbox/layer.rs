//! [`InboxLayer`].

use std::sync::Arc;
use std::time::Duration;

use tower_layer::Layer;

use super::{Inbox, InboxService};

/// [`Layer`] that applies [`InboxService`]. See the [module docs](super).
///
/// It belongs inside dedup and retry, so that each try has a transaction of its own, and outside a timeout, so that a
/// timeout rolls back. [`Queue::inbox`](crate::Queue::inbox) puts it there.
#[derive(Clone, Debug)]
pub struct InboxLayer {
    inbox: Arc<dyn Inbox>,
    window: Duration,
}

impl InboxLayer {
    /// Completes in this inbox, for this window: the same as the dedup layer's, whose store must be the inbox's.
    pub fn new(inbox: Arc<dyn Inbox>, window: Duration) -> Self {
        Self { inbox, window }
    }
}

impl<S> Layer<S> for InboxLayer {
    type Service = InboxService<S>;

    fn layer(&self, inner: S) -> InboxService<S> {
        InboxService::new(inner, Arc::clone(&self.inbox), self.window)
    }
}
