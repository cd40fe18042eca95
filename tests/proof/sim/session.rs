//! One subscription, which the world may break off.

use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use guestlist::broker::{BrokerError, BrokerErrorKind, Subscription};
use guestlist::{AckHandle, BoxFuture, Delivery, Disposition, Message, Settle, Settling};
use tokio::time::Instant;

use super::broker::SimBroker;
use super::plan::MILLI;

/// The broker's end of a subscription.
pub(super) struct Session {
    pub(super) number: u64,
    pub(super) process: usize,
    state: Mutex<State>,
}

struct State {
    /// `None`: it is broken, or closed.
    inner: Option<Box<dyn Subscription>>,
    said: bool,
    waker: Option<Waker>,
}

impl Session {
    pub(super) fn break_off(&self) {
        let (inner, waker) = {
            let mut state = self.state.lock().unwrap();
            (state.inner.take(), state.waker.take())
        };
        drop(inner);
        waker.into_iter().for_each(Waker::wake);
    }
}

/// The consumer's end of it.
pub(super) struct SimSubscription {
    road: SimBroker,
    session: Arc<Session>,
    settle: Arc<dyn Settle>,
}

impl SimSubscription {
    pub(super) fn begin(road: SimBroker, inner: Box<dyn Subscription>) -> Self {
        let state = Mutex::new(State { inner: Some(inner), said: false, waker: None });
        let number = road.hub().number();
        let session = Arc::new(Session { number, process: road.process.number, state });
        road.hub().sessions.lock().unwrap().insert(number, Arc::clone(&session));
        let settle = Arc::new(Settler { road: road.clone(), session: number });
        Self { road, session, settle }
    }

    /// `None`: it comes later, out of its order.
    fn hand_out(&self, delivery: Delivery) -> Option<Delivery> {
        let world = &self.road.process.world;
        let (message, acker) = delivery.into_parts();
        if world.strikes(world.plan.rates.deliver) {
            world.log.fault(Some(self.road.process.number), "broker: delivered out of order");
            let after = world.rng.duration(MILLI, world.plan.lease);
            tokio::spawn(acker.settle(Disposition::Release { after }));
            return None;
        }
        let deadline = Instant::now() + world.plan.lease;
        let tag = self.road.hub().out(self.session.number, &message, acker, deadline);
        Some(Delivery::new(message, Arc::clone(&self.settle), AckHandle::Tag(tag)))
    }
}

impl Subscription for SimSubscription {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        room: usize,
    ) -> Poll<Option<Result<Delivery, BrokerError>>> {
        if self.road.process.is_dead() {
            return Poll::Pending;
        }
        loop {
            let polled = {
                let mut state = self.session.state.lock().unwrap();
                state.waker = Some(cx.waker().clone());
                let Some(inner) = &mut state.inner else {
                    let first = !std::mem::replace(&mut state.said, true);
                    return Poll::Ready(first.then(|| Err(broken())));
                };
                inner.poll_next(cx, room)
            };
            match std::task::ready!(polled) {
                Some(Ok(delivery)) => {
                    if let Some(delivery) = self.hand_out(delivery) {
                        return Poll::Ready(Some(Ok(delivery)));
                    }
                }
                other => return Poll::Ready(other),
            }
        }
    }

    fn cancel(&mut self) -> BoxFuture<()> {
        let (road, session) = (self.road.clone(), Arc::clone(&self.session));
        Box::pin(async move {
            road.process.world.latency().await;
            road.process.alive().await;
            let cancelled = session.state.lock().unwrap().inner.as_mut().map(|inner| inner.cancel());
            if let Some(cancelled) = cancelled {
                cancelled.await;
            }
        })
    }

    fn close(self: Box<Self>) -> BoxFuture<()> {
        Box::pin(async move {
            self.road.process.world.latency().await;
            self.road.process.alive().await;
            drop(self);
        })
    }
}

/// A process that is dead closes nothing: the broker has to notice.
impl Drop for SimSubscription {
    fn drop(&mut self) {
        if !self.road.process.is_dead() {
            self.road.hub().break_off(&self.session);
        }
    }
}

fn broken() -> BrokerError {
    BrokerError::new(BrokerErrorKind::Closed, "the connection was lost")
}

struct Settler {
    road: SimBroker,
    session: u64,
}

impl Settle for Settler {
    fn settle(&self, handle: &AckHandle, message: &Message, disposition: Disposition) -> Settling {
        let &AckHandle::Tag(tag) = handle else { return Settling::Now(Err(broken())) };
        let settling = self.road.clone().settle(self.session, tag, message.clone(), disposition);
        Settling::Later(Box::pin(settling))
    }

    fn progress(&self, handle: &AckHandle) {
        let process = &self.road.process;
        let (world, &AckHandle::Tag(tag)) = (&process.world, handle) else { return };
        let lost = world.strikes(world.plan.rates.settle);
        if !process.is_dead() && !process.is_frozen() && !lost {
            self.road.hub().extend(tag, Instant::now() + world.plan.lease);
        }
    }
}
