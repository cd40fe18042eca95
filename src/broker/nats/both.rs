//! A durable and the stream of our own beside it, pulled as one subscription that shares its room.

use std::array;
use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::join;
use tokio::time::{Instant, Sleep, sleep};

use super::again::Own;
use super::connect::Link;
use super::requests::Patience;
use super::settle::{InHand, Settler};
use super::source::{Arrived, Pull};
use super::topology::Durable;
use crate::Delivery;
use crate::broker::{BrokerError, QueueSpec, Subscription};
use crate::delivery::BoxFuture;

/// With fewer places than this, one that waits for a message in vain is missed.
const FEW: usize = 8;

/// How often the one that has no messages looks for some, while the other one has.
const LOOK: Duration = Duration::from_millis(100);

/// A durable and its own stream. What both may still bring is never more than there is room for.
pub(super) struct Both {
    source: Pull,
    again: Option<Pull>,
    in_hand: Arc<InHand>,
    /// Who is asked first, and has the last place.
    turn: Side,
    look: Look,
    ended: bool,
}

/// When the one without messages looks for some, beside one that has.
struct Look {
    timer: Pin<Box<Sleep>>,
}

impl Look {
    fn new() -> Self {
        Self { timer: Box::pin(sleep(Duration::ZERO)) }
    }

    /// If not, the task is woken when it is.
    fn due(&mut self, cx: &mut Context<'_>) -> bool {
        let due = self.timer.as_mut().poll(cx).is_ready();
        if due {
            self.timer.as_mut().reset(Instant::now() + LOOK);
            let _ = self.timer.as_mut().poll(cx);
        }
        due
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Again,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Again,
            Self::Again => Self::Source,
        }
    }
}

impl Both {
    pub(super) async fn start(
        link: &Link,
        spec: &QueueSpec,
        durable: &Durable,
        own: Option<Own>,
        limit: Duration,
    ) -> Result<Self, BrokerError> {
        let in_hand = Arc::new(InHand::new(spec.prefetch));
        let settler = || Settler::new(link.client.clone(), spec.nats.double_ack, limit);
        let (mut of_source, mut again) = (settler(), None);
        if let Some(own) = own {
            let holds = Arc::new(own.holds);
            of_source = of_source.holding(&holds, spec.nats.long_delay, Some(durable));
            let of_copies = settler().holding(&holds, spec.nats.long_delay, None);
            let pull = Pull::start(link, spec, &own.durable, of_copies, &in_hand).await?;
            again = Some(pull.of_copies(holds));
        }
        let source = Pull::start(link, spec, durable, of_source, &in_hand).await?;
        Ok(Self { source, again, in_hand, turn: Side::Source, look: Look::new(), ended: false })
    }

    fn pull(&mut self, side: Side) -> Option<&mut Pull> {
        match side {
            Side::Source => Some(&mut self.source),
            Side::Again => self.again.as_mut(),
        }
    }

    fn order(&self) -> array::IntoIter<Side, 2> {
        [self.turn, self.turn.other()].into_iter()
    }

    fn poll_delivery(&mut self, cx: &mut Context<'_>, room: usize) -> Poll<Result<Delivery, BrokerError>> {
        loop {
            self.ask(cx, room)?;
            match self.poll_arrived(cx)? {
                Poll::Ready(Arrived::Delivery(delivery)) => return Poll::Ready(Ok(delivery)),
                Poll::Ready(Arrived::Word) => {}
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Whoever brings something, the other one is next.
    fn poll_arrived(&mut self, cx: &mut Context<'_>) -> Poll<Result<Arrived, BrokerError>> {
        for side in self.order() {
            let Some(pull) = self.pull(side) else { continue };
            if let Poll::Ready(arrived) = pull.poll(cx) {
                self.turn = side.other();
                return Poll::Ready(arrived);
            }
        }
        Poll::Pending
    }

    /// Who has no messages keeps one place, to learn of the first, and no longer than a moment while the other one has
    /// messages. Who has messages gets the rest; with messages on both sides, each half.
    fn ask(&mut self, cx: &mut Context<'_>, room: usize) -> Result<(), BrokerError> {
        let free = room.min(self.in_hand.free(cx));
        let Self { source, again: Some(again), .. } = self else {
            return self.source.ask(cx, free, Patience::Alone);
        };
        match (source.busy(), again.busy()) {
            _ if free == 0 => Ok(()),
            (true, false) => ask_and_look(cx, source, again, free, &mut self.look),
            (false, true) => ask_and_look(cx, again, source, free, &mut self.look),
            (_, busy) if free == 1 => match self.turn {
                Side::Source => ask_for_the_last_place(cx, source, again, busy),
                Side::Again => ask_for_the_last_place(cx, again, source, busy),
            },
            (_, true) => ask_each(cx, source, again, free, free / 2, Patience::Short),
            (_, false) => ask_each(
                cx,
                source,
                again,
                free,
                1,
                if free < FEW { Patience::Short } else { Patience::Shared },
            ),
        }
    }
}

/// Asks for no more than the other one leaves.
fn ask_beside(
    cx: &mut Context<'_>,
    pull: &mut Pull,
    other: &Pull,
    share: usize,
    free: usize,
    patience: Patience,
) -> Result<(), BrokerError> {
    pull.ask(cx, share.min(free.saturating_sub(other.wanted())), patience)
}

/// One of the two has messages. Now and then the other one gets a place first, for no longer than a look takes.
fn ask_and_look(
    cx: &mut Context<'_>,
    busy: &mut Pull,
    idle: &mut Pull,
    free: usize,
    look: &mut Look,
) -> Result<(), BrokerError> {
    if look.due(cx) {
        ask_beside(cx, idle, busy, 1, free, Patience::Glance)?;
    }
    ask_beside(cx, busy, idle, free, free, Patience::Short)
}

fn ask_each(
    cx: &mut Context<'_>,
    source: &mut Pull,
    again: &mut Pull,
    free: usize,
    for_again: usize,
    patience: Patience,
) -> Result<(), BrokerError> {
    ask_beside(cx, source, again, free - for_again, free, patience)?;
    ask_beside(cx, again, source, for_again, free, patience)
}

/// Only one of two can have it. With messages waiting on the other side it does not wait for one.
fn ask_for_the_last_place(
    cx: &mut Context<'_>,
    first: &mut Pull,
    other: &Pull,
    both_busy: bool,
) -> Result<(), BrokerError> {
    let patience = if both_busy { Patience::Glance } else { Patience::Short };
    ask_beside(cx, first, other, 1, 1, patience)
}

impl Subscription for Both {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        room: usize,
    ) -> Poll<Option<Result<Delivery, BrokerError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let polled = self.poll_delivery(cx, room);
        // Without the other one, what is left would be half a subscription, and look like a whole one.
        self.ended = matches!(polled, Poll::Ready(Err(_)));
        polled.map(Some)
    }

    fn cancel(&mut self) -> BoxFuture<()> {
        self.ended = true;
        let source = self.source.cancel();
        match self.again.as_mut().map(Pull::cancel) {
            Some(again) => Box::pin(async move {
                join(source, again).await;
            }),
            None => source,
        }
    }

    fn close(mut self: Box<Self>) -> BoxFuture<()> {
        self.cancel()
    }
}
