//! A queue's messages become deliveries.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::time::{Instant, Sleep, sleep_until};

use super::queue::{Next, Queue};
use super::settle::Settler;
use crate::broker::{BrokerError, BrokerErrorKind, Subscription};
use crate::delivery::{AckHandle, BoxFuture, Delivery, Settle};

/// A subscription to one queue. Nothing is buffered here: the poll that returns a delivery is
/// the one that takes it from the queue.
pub(super) struct MemorySubscription {
    queue: Arc<Queue>,
    /// Its number in the queue.
    member: u64,
    settle: Arc<dyn Settle>,
    /// Wakes when the next delayed message is due.
    timer: Option<Pin<Box<Sleep>>>,
    /// It crashed, and said so.
    over: bool,
}

impl MemorySubscription {
    pub(super) fn new(queue: Arc<Queue>, prefetch: u16) -> Self {
        let member = queue.join(prefetch);
        let settle = Arc::new(Settler::new(Arc::clone(&queue)));
        Self { queue, member, settle, timer: None, over: false }
    }

    fn poll_timer(&mut self, due: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        timer.as_mut().poll(cx)
    }

    fn crashed(&mut self) -> Option<Result<Delivery, BrokerError>> {
        let first = !std::mem::replace(&mut self.over, true);
        first.then(|| Err(BrokerError::new(BrokerErrorKind::Closed, "the subscription crashed")))
    }
}

impl Subscription for MemorySubscription {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        _room: usize,
    ) -> Poll<Option<Result<Delivery, BrokerError>>> {
        loop {
            match self.queue.next(self.member, cx.waker()) {
                Next::Message(tag, message) => {
                    let delivery = Delivery::new(message, Arc::clone(&self.settle), AckHandle::Tag(tag));
                    return Poll::Ready(Some(Ok(delivery)));
                }
                Next::Wait(None) => return Poll::Pending,
                Next::Wait(Some(due)) => ready!(self.poll_timer(due, cx)),
                Next::End => return Poll::Ready(None),
                Next::Crashed => return Poll::Ready(self.crashed()),
            }
        }
    }

    fn cancel(&mut self) -> BoxFuture<()> {
        let (queue, member) = (Arc::clone(&self.queue), self.member);
        Box::pin(async move { queue.cancel(member) })
    }

    fn close(self: Box<Self>) -> BoxFuture<()> {
        Box::pin(async move { drop(self) })
    }
}

/// A subscription that is dropped is closed: it has no connection that could linger.
impl Drop for MemorySubscription {
    fn drop(&mut self) {
        self.queue.leave(self.member);
    }
}
