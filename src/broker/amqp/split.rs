//! For a consumer loop of your own: one delivery of lapin's as a message and its acker.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use lapin::message;
use lapin::options::{BasicAckOptions, BasicNackOptions, BasicRejectOptions};

use super::source::{SYSTEM, message_of};
use crate::broker::{BrokerError, BrokerErrorKind};
use crate::delivery::BoxFuture;
use crate::message::Source;
use crate::{AckHandle, Acker, Delivery, Disposition, Message, Settle, Settling};

/// Splits a delivery of your own lapin consumer into the message for the layers and the acker for
/// what they decide.
///
/// A delay is waited out in [`Acker::settle`], and then the delivery is given back by
/// `basic.nack(requeue)`: meanwhile it holds one of your prefetch slots, and a crash cuts the delay
/// short. [`Amqp`](super::Amqp) has hold queues instead, and hands deliveries back when it stops;
/// in a loop of your own that is yours to do. The queue's name is not in a delivery, so it is
/// missing in [`Message::source`].
///
/// ```no_run
/// # async fn f(delivery: lapin::message::Delivery) -> Result<(), Box<dyn std::error::Error>> {
/// use guestlist::Disposition;
/// use guestlist::broker::amqp;
/// let (message, acker) = amqp::split(delivery);
/// // … call the layers with the message …
/// acker.settle(Disposition::Ack).await?;
/// # Ok(()) }
/// ```
pub fn split(delivery: message::Delivery) -> (Message, Acker) {
    let handle = AckHandle::Tag(delivery.delivery_tag);
    let to = Arc::new(OwnLoop(delivery.acker.clone()));
    let message = message_of(Source::new(SYSTEM, ""), delivery);
    Delivery::new(message, to, handle).into_parts()
}

struct OwnLoop(lapin::Acker);

impl Settle for OwnLoop {
    fn settle(&self, _: &AckHandle, _: &Message, disposition: Disposition) -> Settling {
        match disposition {
            Disposition::Ack => Settling::Now(tell(self.0.ack(BasicAckOptions::default()))),
            Disposition::Reject => Settling::Now(tell(self.0.reject(BasicRejectOptions { requeue: false }))),
            Disposition::Abandon => Settling::Now(give_back(&self.0)),
            Disposition::Requeue { after } | Disposition::Release { after } if after.is_zero() => {
                Settling::Now(give_back(&self.0))
            }
            Disposition::Requeue { after } | Disposition::Release { after } => {
                Settling::Later(give_back_later(self.0.clone(), after))
            }
        }
    }
}

fn give_back(acker: &lapin::Acker) -> Result<(), BrokerError> {
    tell(acker.nack(BasicNackOptions { multiple: false, requeue: true }))
}

fn give_back_later(acker: lapin::Acker, after: Duration) -> BoxFuture<Result<(), BrokerError>> {
    let unsettled = Unsettled(acker);
    async move {
        tokio::time::sleep(after).await;
        give_back(&unsettled.0)
    }
    .boxed()
}

/// Gives the delivery back if the delay is cut short by a dropped future.
struct Unsettled(lapin::Acker);

impl Drop for Unsettled {
    fn drop(&mut self) {
        // Once it is settled, lapin's acker ignores this.
        let _ = give_back(&self.0);
    }
}

/// The first poll sends the frame; see `Lane::tell` in `settle.rs`.
fn tell(frame: impl Future<Output = lapin::Result<bool>>) -> Result<(), BrokerError> {
    let closed = || {
        BrokerError::new(
            BrokerErrorKind::Closed,
            "the channel that the delivery came by is closed, or the delivery was settled before",
        )
    };
    match frame.now_or_never() {
        None | Some(Ok(true)) => Ok(()),
        Some(Ok(false)) => Err(closed()),
        Some(Err(error)) => Err(closed().with_source(error)),
    }
}
