//! One hand-over by the broker: a [`Delivery`] is a [`Message`] and the right to settle it once.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::runtime::Handle;

use crate::broker::BrokerError;
use crate::{Disposition, Message};

/// A boxed future, for answers that come later.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + 'static>>;

/// One hand-over by the broker: what arrived, and the right to say once what becomes of it.
#[derive(Debug)]
pub struct Delivery {
    message: Message,
    acker: Acker,
}

impl Delivery {
    /// A delivery of `message` that `to` will be told about under `handle`.
    pub fn new(message: Message, to: Arc<dyn Settle>, handle: AckHandle) -> Self {
        let acker = Acker { to, handle, message: message.clone(), settled: false };
        Self { message, acker }
    }

    /// What arrived.
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// A handle for heartbeats, for as long as the delivery is in hand.
    pub(crate) fn heartbeat(&self) -> Heartbeat {
        self.acker.heartbeat()
    }

    /// The message for the handler, the acker for whoever settles.
    pub fn into_parts(self) -> (Message, Acker) {
        (self.message, self.acker)
    }
}

/// How a broker's client is told what becomes of a delivery. Brokers implement it; everybody
/// else uses [`Acker::settle`].
pub trait Settle: Send + Sync + 'static {
    /// Tells the broker. `message` is what was delivered, for dispositions that need a copy of it.
    fn settle(&self, handle: &AckHandle, message: &Message, disposition: Disposition) -> Settling;

    /// The work goes on: extends the broker's deadline, where it has one. Never blocks.
    fn progress(&self, _handle: &AckHandle) {}
}

/// The answer of [`Settle::settle`]: already known, or on its way.
pub enum Settling {
    /// Known now: no allocation for a plain ack.
    Now(Result<(), BrokerError>),
    /// Known when this future ends.
    Later(BoxFuture<Result<(), BrokerError>>),
}

impl fmt::Debug for Settling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Now(result) => f.debug_tuple("Now").field(result).finish(),
            Self::Later(_) => f.write_str("Later"),
        }
    }
}

/// What the broker's client knows a delivery by. Private to the broker: never an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AckHandle {
    /// A number on a channel.
    Tag(u64),
    /// A subject to reply to.
    Reply(Bytes),
}

/// The right to settle one delivery, once: [`settle`](Acker::settle) takes `self`.
///
/// An acker that is dropped unsettled abandons its delivery, so that the broker delivers it
/// again and no prefetch slot leaks; [`Acker::dropped_unsettled`] counts these.
///
/// ```compile_fail
/// # async fn f(acker: guestlist::Acker) {
/// acker.settle(guestlist::Disposition::Ack).await;
/// acker.settle(guestlist::Disposition::Ack).await; // use of moved value
/// # }
/// ```
pub struct Acker {
    to: Arc<dyn Settle>,
    handle: AckHandle,
    message: Message,
    settled: bool,
}

static DROPPED_UNSETTLED: AtomicU64 = AtomicU64::new(0);

impl Acker {
    /// Tells the broker how the delivery ends.
    ///
    /// # Errors
    ///
    /// The broker could not be told, or refused: expect the delivery again. For `Requeue` and
    /// `Release` on a broker that needs a copy for the delay, the copy may not have been
    /// confirmed; then the original is not acked.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: dropped before it ends, the broker may or may not have been told. The
    /// delivery is never settled twice.
    pub async fn settle(mut self, disposition: Disposition) -> Result<(), BrokerError> {
        self.settled = true;
        match self.to.settle(&self.handle, &self.message, disposition) {
            Settling::Now(answer) => answer,
            Settling::Later(answer) => answer.await,
        }
    }

    /// Extends the broker's deadline for this delivery, where it has one.
    pub fn progress(&self) {
        self.to.progress(&self.handle);
    }

    fn heartbeat(&self) -> Heartbeat {
        Heartbeat { to: Arc::clone(&self.to), handle: self.handle.clone(), message: self.message.clone() }
    }

    /// How many ackers this process dropped unsettled: their deliveries were abandoned.
    pub fn dropped_unsettled() -> u64 {
        DROPPED_UNSETTLED.load(Ordering::Relaxed)
    }
}

impl Drop for Acker {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        DROPPED_UNSETTLED.fetch_add(1, Ordering::Relaxed);
        let settling = self.to.settle(&self.handle, &self.message, Disposition::Abandon);
        // Without a runtime nobody can tell the broker; it finds out when the connection ends.
        if let (Settling::Later(answer), Ok(runtime)) = (settling, Handle::try_current()) {
            runtime.spawn(answer);
        }
    }
}

impl fmt::Debug for Acker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acker").field("handle", &self.handle).finish_non_exhaustive()
    }
}

/// Sends the heartbeats of one delivery while it is in hand.
pub(crate) struct Heartbeat {
    to: Arc<dyn Settle>,
    handle: AckHandle,
    message: Message,
}

impl Heartbeat {
    /// Extends the broker's deadline, unless the lease behind the delivery is lost: then its
    /// time must run out, so that the broker hands it to somebody else.
    pub(crate) fn beat(&self) {
        if !self.message.forsaken() {
            self.to.progress(&self.handle);
        }
    }
}
