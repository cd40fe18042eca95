//! The loop of one queue: subscribe, pull, hand over, and begin again when the broker goes away.

use std::future::poll_fn;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::config::QueueConfig;
use super::heartbeat::{Heartbeats, InHand};
use super::settle::{Interrupted, conclude};
use super::status::{Counters, State};
use crate::backoff::Backoff;
use crate::broker::{Broker, BrokerError, Subscription};
use crate::events::{EventKind, Events};
use crate::pause::Gate;
use crate::pipeline::Stack;
use crate::settlement::Plan;
use crate::{Acker, BoxError, Cause, Delivery, Error, Failure, Message, defaults};

/// How long futures that are dropped at the end of a drain, and what they hand back, may take.
const CUT: Duration = Duration::from_secs(5);

/// One queue on its way from the broker to its stack.
pub(crate) struct Line {
    pub(crate) config: QueueConfig,
    broker: Arc<dyn Broker>,
    gate: Gate,
    events: Events,
    counters: Arc<Counters>,
    drain: Duration,
    heartbeats: Arc<Heartbeats>,
    /// One for each delivery in hand.
    places: Arc<Semaphore>,
    /// The tasks of the deliveries in hand, over all subscriptions: a handler outlives its connection.
    tasks: TaskTracker,
    /// Claims that are ended after their tasks are gone.
    background: TaskTracker,
    /// The drain is over: futures are dropped.
    cut: CancellationToken,
}

/// Why a subscription ended.
enum End {
    /// The consumer stops.
    Stopped,
    /// The store or the dead-letter destination has been away too long.
    Paused,
    /// The broker ended it.
    Broken(Option<BrokerError>),
}

impl Line {
    pub(crate) fn new(
        config: QueueConfig,
        broker: Arc<dyn Broker>,
        gate: Gate,
        background: TaskTracker,
        counters: Arc<Counters>,
        drain: Duration,
    ) -> Self {
        Self {
            heartbeats: Heartbeats::new(config.spec.heartbeat, broker.features().ack_deadline.is_some()),
            places: Arc::new(Semaphore::new(usize::from(config.spec.prefetch))),
            events: Events::new(config.observer.clone()),
            tasks: TaskTracker::new(),
            cut: CancellationToken::new(),
            config,
            broker,
            gate,
            background,
            counters,
            drain,
        }
    }

    /// Consumes until `stopping`; subscribes anew, with backoff, whenever the broker goes away.
    ///
    /// # Errors
    ///
    /// [`defaults::MAX_REBUILDS`] subscriptions in a row ended soon, in an error, and brought nothing.
    pub(crate) async fn run<S: Stack>(self, mut stack: S, stopping: CancellationToken) -> Result<(), Error> {
        self.counters.gate(self.gate.clone());
        // Dropped with the whole consumer, the tasks in hand end too, and hand back what they hold.
        let _cut_on_drop = self.cut.clone().drop_guard();
        let mut failures = 0;
        loop {
            let received = self.counters.received();
            let (end, lasted) = self.session(&mut stack, &stopping).await;
            if self.counters.received() > received || lasted >= defaults::STEADY {
                failures = 0;
            }
            match end {
                End::Stopped => return Ok(()),
                End::Paused => self.counters.set(State::Paused),
                End::Broken(error) => {
                    failures += 1;
                    self.broken(error, failures)?;
                }
            }
            tokio::select! {
                biased;
                () = stopping.cancelled() => return self.finish().await,
                () = sleep(Backoff::reconnect().delay(failures.max(3))) => {}
            }
        }
    }

    /// One subscription, from its beginning to its end, and how long it lasted.
    async fn session<S: Stack>(&self, stack: &mut S, stopping: &CancellationToken) -> (End, Duration) {
        self.gate.reset();
        let mut subscription = tokio::select! {
            biased;
            () = stopping.cancelled() => {
                let _ = self.finish().await;
                return (End::Stopped, Duration::ZERO);
            }
            subscribed = self.subscribe() => match subscribed {
                Ok(subscription) => subscription,
                Err(error) => return (End::Broken(Some(error)), Duration::ZERO),
            },
        };
        self.counters.set(State::Running);
        let began = Instant::now();
        let end = self.pull(&mut *subscription, stack, stopping).await;
        let lasted = began.elapsed();
        match &end {
            End::Stopped => self.stop(subscription).await,
            End::Paused => self.give_up(subscription, stopping).await,
            // Handlers go on; their ackers are dead, and a redelivery finds them done.
            End::Broken(_) => subscription.close().await,
        }
        (end, lasted)
    }

    /// Checks again that all is there: a queue may have been deleted, and with it ours around it.
    async fn subscribe(&self) -> Result<Box<dyn Subscription>, BrokerError> {
        self.broker.prepare(&self.config.spec).await?;
        self.broker.subscribe(&self.config.spec).await
    }

    /// delivery → readiness → a task; until something ends it.
    async fn pull<S: Stack>(
        &self,
        subscription: &mut dyn Subscription,
        stack: &mut S,
        stopping: &CancellationToken,
    ) -> End {
        let ended = async {
            tokio::select! {
                biased;
                () = stopping.cancelled() => End::Stopped,
                () = self.gate.closed_for(self.config.pause_hold) => End::Paused,
            }
        };
        tokio::pin!(ended);
        loop {
            let received = tokio::select! {
                biased;
                end = &mut ended => return end,
                received = self.receive(subscription) => received,
            };
            let (in_hand, delivery) = match received {
                ControlFlow::Continue(received) => received,
                ControlFlow::Break(end) => return end,
            };
            let (message, acker) = delivery.into_parts();
            // The delivery first, then the slot: a slot held while waiting for a delivery would
            // starve those that wait for one inside the stack.
            let ready = tokio::select! {
                biased;
                end = &mut ended => {
                    self.hand_back(&end, message, acker).await;
                    return end;
                }
                ready = stack.ready() => ready.map(drop),
            };
            match ready {
                Ok(()) => self.hand_over(stack, message, acker, in_hand),
                // A service that is not ready must not be called.
                Err(error) => self.refuse(error, message, acker, in_hand),
            }
        }
    }

    /// The next delivery, and a place for it.
    async fn receive(&self, subscription: &mut dyn Subscription) -> ControlFlow<End, (InHand, Delivery)> {
        let place = self.place().await;
        let room = self.places.available_permits() + 1;
        match poll_fn(|cx| subscription.poll_next(cx, room)).await {
            Some(Ok(delivery)) => {
                self.counters.receive();
                self.events.emit(delivery.message(), None, EventKind::Received);
                ControlFlow::Continue((self.heartbeats.add(&delivery, place), delivery))
            }
            Some(Err(error)) => ControlFlow::Break(End::Broken(Some(error))),
            None => ControlFlow::Break(End::Broken(None)),
        }
    }

    async fn place(&self) -> OwnedSemaphorePermit {
        match Arc::clone(&self.places).acquire_owned().await {
            Ok(place) => place,
            Err(_) => unreachable!("the semaphore is never closed"),
        }
    }

    /// A delivery that never reached the stack.
    async fn hand_back(&self, end: &End, message: Message, acker: Acker) {
        if let End::Stopped = end {
            let answer = Err(Interrupted.into());
            conclude(&self.events, &self.counters, &message, acker, answer).await;
        } else {
            // Paused: dropped after the subscription is cancelled, so that it does not come straight back.
            let given_up = self.gate.given_up();
            let (events, counters) = (self.events.clone(), Arc::clone(&self.counters));
            self.tasks.spawn(async move {
                given_up.await;
                conclude(&events, &counters, &message, acker, Err(Interrupted.into())).await;
            });
        }
    }

    /// The stack's service is out of order, perhaps for good: the delivery comes again, not tried.
    fn refuse(&self, error: BoxError, message: Message, acker: Acker, in_hand: InHand) {
        let plan = Plan::hand_back(defaults::RECONNECT_CAP);
        let answer = Err(Failure::planned(Cause::Transient, plan, error).into_error());
        let (events, counters) = (self.events.clone(), Arc::clone(&self.counters));
        self.tasks.spawn(async move {
            conclude(&events, &counters, &message, acker, answer).await;
            drop(in_hand);
        });
    }

    /// Runs the stack for one delivery in a task of its own, and settles it there.
    fn hand_over<S: Stack>(&self, stack: &mut S, message: Message, acker: Acker, in_hand: InHand) {
        let call = stack.call(message.clone());
        let (events, counters, cut) = (self.events.clone(), Arc::clone(&self.counters), self.cut.clone());
        self.tasks.spawn(async move {
            let answer = {
                tokio::pin!(call);
                tokio::select! {
                    biased;
                    answer = &mut call => answer,
                    () = cut.cancelled() => Err(Interrupted.into()),
                }
                // The future is dropped here: a claim that it held is released before the settling.
            };
            conclude(&events, &counters, &message, acker, answer).await;
            drop(in_hand);
        });
    }

    /// Three steps: no more deliveries; let the running finish; hand back the rest.
    async fn stop(&self, mut subscription: Box<dyn Subscription>) {
        self.counters.set(State::Draining);
        subscription.cancel().await;
        if self.gate.is_closed() {
            // Deliveries that wait for what is away have nothing to finish.
            self.gate.give_up();
        }
        self.drain_tasks().await;
        subscription.close().await;
        self.counters.set(State::Stopped);
    }

    /// A stop while there is no subscription.
    async fn finish(&self) -> Result<(), Error> {
        self.drain_tasks().await;
        self.counters.set(State::Stopped);
        Ok(())
    }

    async fn drain_tasks(&self) {
        self.tasks.close();
        if timeout(self.drain, self.tasks.wait()).await.is_err() {
            tracing::warn!(
                target: "guestlist", queue = self.config.spec.name, drain = ?self.drain,
                "handlers are still running at the end of the drain; they are interrupted and their messages handed back"
            );
            self.cut.cancel();
            if timeout(CUT, self.tasks.wait()).await.is_err() {
                tracing::warn!(target: "guestlist", queue = self.config.spec.name, "a handler blocks its thread and cannot be interrupted");
            }
        }
        // The runtime may end with the consumer: a release that is not heard by then would cost the
        // id its lease, and look like a crash to whoever claims it next.
        self.background.close();
        let _ = timeout(CUT, self.background.wait()).await;
    }

    /// The pause has lasted too long: what is in hand goes back to the broker, which keeps it.
    async fn give_up(&self, mut subscription: Box<dyn Subscription>, stopping: &CancellationToken) {
        subscription.cancel().await;
        self.gate.give_up();
        self.tasks.close();
        // Running handlers are not interrupted by a pause; their deliveries are settled when they end.
        let stopped = tokio::select! {
            biased;
            () = stopping.cancelled() => true,
            _ = timeout(self.drain, self.tasks.wait()) => false,
        };
        if stopped {
            self.drain_tasks().await;
        }
        self.tasks.reopen();
        subscription.close().await;
    }

    /// Counts and reports; after too many in a row, the error.
    fn broken(&self, error: Option<BrokerError>, failures: u32) -> Result<(), Error> {
        self.counters.rebuild();
        self.counters.set(State::Reconnecting);
        let queue = &self.config.spec.name;
        match &error {
            Some(error) => {
                tracing::warn!(target: "guestlist", queue, failures, ?error, "the subscription broke; subscribing again");
            }
            None => {
                tracing::warn!(target: "guestlist", queue, failures, "the broker ended the subscription; subscribing again");
            }
        }
        if failures < defaults::MAX_REBUILDS {
            return Ok(());
        }
        self.counters.set(State::Failed);
        Err(Error::gave_up(queue, failures, error))
    }
}
