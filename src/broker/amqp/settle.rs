//! Dispositions become frames.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt as _;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicNackOptions, BasicRejectOptions};

use super::connect::REPLY_SUCCESS;
use super::holds::Holds;
use crate::broker::{BrokerError, BrokerErrorKind, Copy};
use crate::delivery::BoxFuture;
use crate::{AckHandle, Disposition, Message, Settle, Settling};

/// How long a delivery whose hold copy failed is kept before the broker gets it back: it comes
/// again at once, and would fail again at once.
const FAILED_COPY_PAUSE: Duration = Duration::from_secs(1);

/// The channel of one subscription, as far as its deliveries are settled by it.
#[derive(Clone)]
pub(super) struct Lane {
    channel: Channel,
    over: Arc<AtomicBool>,
}

impl Lane {
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel, over: Arc::default() }
    }

    pub(super) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// The broker ended the consumer: closes the channel. An ack on it would be taken without
    /// settling anything, and revive the consumer at the broker (RabbitMQ 4.3), which then
    /// delivers to nobody.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Release);
        let _ = self.channel.close(REPLY_SUCCESS, "OK".into()).now_or_never();
    }

    fn open(&self) -> bool {
        !self.over.load(Ordering::Acquire) && self.channel.status().connected()
    }

    pub(super) fn ack(&self, tag: u64) -> Result<(), BrokerError> {
        self.tell(self.channel.basic_ack(tag, BasicAckOptions { multiple: false }))
    }

    /// `nack`, not `reject`: RabbitMQ 4.3 counts a rejected delivery toward the delivery limit.
    pub(super) fn give_back(&self, tag: u64) -> Result<(), BrokerError> {
        self.tell(self.channel.basic_nack(tag, BasicNackOptions { multiple: false, requeue: true }))
    }

    fn reject(&self, tag: u64) -> Result<(), BrokerError> {
        self.tell(self.channel.basic_reject(tag, BasicRejectOptions { requeue: false }))
    }

    /// lapin's futures are lazy; their first poll hands the frame to the thread that writes, and
    /// what follows only waits until it is written. AMQP confirms no ack, so nothing is learned
    /// by waiting, and acks go out pipelined.
    fn tell(&self, frame: impl Future<Output = lapin::Result<()>>) -> Result<(), BrokerError> {
        if self.over.load(Ordering::Acquire) {
            return Err(closed());
        }
        match frame.now_or_never() {
            None | Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(closed().with_source(error)),
        }
    }
}

fn closed() -> BrokerError {
    BrokerError::new(
        BrokerErrorKind::Closed,
        "the channel that the delivery came by is closed: RabbitMQ delivers it again",
    )
}

/// Settles the deliveries of one subscription.
pub(super) struct Settler {
    lane: Lane,
    holds: Arc<Holds>,
}

impl Settler {
    pub(super) fn new(lane: Lane, holds: Holds) -> Self {
        Self { lane, holds: Arc::new(holds) }
    }
}

impl Settle for Settler {
    fn settle(&self, handle: &AckHandle, message: &Message, disposition: Disposition) -> Settling {
        let &AckHandle::Tag(tag) = handle else {
            return Settling::Now(Err(BrokerError::new(
                BrokerErrorKind::Refused,
                "not a delivery of RabbitMQ's",
            )));
        };
        match disposition {
            Disposition::Ack => Settling::Now(self.lane.ack(tag)),
            Disposition::Release { after } if after.is_zero() => Settling::Now(self.lane.give_back(tag)),
            Disposition::Abandon => Settling::Now(self.lane.give_back(tag)),
            Disposition::Reject => Settling::Now(self.lane.reject(tag)),
            // No copy of what is delivered again anyway.
            _ if !self.lane.open() => Settling::Now(Err(closed())),
            Disposition::Requeue { after } => {
                Settling::Later(self.hold(tag, message.clone(), after, |message| Copy::hold(message)))
            }
            Disposition::Release { after } => {
                Settling::Later(self.hold(tag, message.clone(), after, |message| Copy::release(message)))
            }
        }
    }
}

type MakeCopy = for<'a> fn(&'a Message) -> Copy<'a>;

impl Settler {
    /// The original is acked only when its copy is confirmed, and in a queue.
    fn hold(
        &self,
        tag: u64,
        message: Message,
        delay: Duration,
        copy: MakeCopy,
    ) -> BoxFuture<Result<(), BrokerError>> {
        let holds = Arc::clone(&self.holds);
        let original = Original { lane: Some(self.lane.clone()), tag };
        async move {
            match publish(&holds, copy(&message), delay).await {
                Ok(()) => original.ack(),
                Err(error) => {
                    tokio::time::sleep(FAILED_COPY_PAUSE).await;
                    drop(original);
                    Err(error)
                }
            }
        }
        .boxed()
    }
}

/// A message that fits is not refused for the history that we add to it.
async fn publish(holds: &Holds, mut copy: Copy<'_>, delay: Duration) -> Result<(), BrokerError> {
    loop {
        match holds.publish(&copy, delay).await {
            Err(error) if error.is_too_large() && copy.shrink(false, false) => {}
            answer => return answer,
        }
    }
}

/// A delivery that is given back unless it is acked: the future that holds it may be dropped.
struct Original {
    lane: Option<Lane>,
    tag: u64,
}

impl Original {
    fn ack(mut self) -> Result<(), BrokerError> {
        self.lane.take().map_or(Ok(()), |lane| lane.ack(self.tag))
    }
}

impl Drop for Original {
    fn drop(&mut self) {
        if let Some(lane) = &self.lane {
            // A closed channel has given it back already.
            let _ = lane.give_back(self.tag);
        }
    }
}
