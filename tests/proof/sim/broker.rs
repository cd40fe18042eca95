//! The broker: `MemoryBroker`, made to behave as RabbitMQ or JetStream does where they differ,
//! and each process's own bad road to it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use guestlist::broker::memory::MemoryBroker;
use guestlist::broker::{
    Broker, BrokerError, BrokerErrorKind, Copy, Destination, Features, QueueSpec, Subscription,
};
use guestlist::{Acker, Disposition, Message};
use tokio::time::{Instant, sleep};

use super::plan::{Kind, MILLI, SECOND};
use super::process::Process;
use super::session::{Session, SimSubscription};
use super::world::{DEAD, ORDERS, World};

/// What all processes share.
pub(super) struct Hub {
    pub(super) queues: MemoryBroker,
    pub(super) kind: Kind,
    /// Messages in a hold queue.
    held: AtomicUsize,
    pub(super) next: AtomicU64,
    pub(super) sessions: Mutex<BTreeMap<u64, Arc<Session>>>,
    out: Mutex<BTreeMap<u64, Out>>,
    down_until: Mutex<Instant>,
}

/// A delivery that is not settled.
struct Out {
    acker: Acker,
    session: u64,
    deadline: Instant,
}

impl Hub {
    pub(super) fn new(kind: Kind) -> Self {
        let queues = MemoryBroker::new();
        queues.declare(ORDERS);
        queues.declare(DEAD);
        Self {
            queues,
            kind,
            held: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            sessions: Mutex::default(),
            out: Mutex::default(),
            down_until: Mutex::new(Instant::now()),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.load(Ordering::Relaxed) == 0 && self.queues.depth(ORDERS).unwrap() == 0
    }

    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn is_down(&self) -> bool {
        Instant::now() < *self.down_until.lock().unwrap()
    }

    pub(super) fn go_down_until(&self, then: Instant) {
        *self.down_until.lock().unwrap() = then;
    }

    /// It starts anew: what was not settled comes again.
    pub(super) fn restart(&self) {
        let sessions: Vec<_> = self.sessions.lock().unwrap().values().cloned().collect();
        for session in &sessions {
            self.break_off(session);
        }
    }

    /// The connections of a process that is dead.
    pub(super) fn lose_sight_of(world: &Arc<World>, process: usize) {
        let delay = world.rng.pick(&[0, 0, 500, 5_000]) * MILLI;
        let world = Arc::clone(world);
        tokio::spawn(async move {
            sleep(delay).await;
            world.broker.break_off_all_of(process);
        });
    }

    pub(super) fn break_off_all_of(&self, process: usize) {
        let sessions: Vec<_> = self.sessions.lock().unwrap().values().cloned().collect();
        sessions
            .iter()
            .filter(|session| session.process == process)
            .for_each(|session| self.break_off(session));
    }

    /// A connection is lost: its deliveries come again, at once, or when their deadline is over.
    pub(super) fn break_off(&self, session: &Session) {
        self.sessions.lock().unwrap().remove(&session.number);
        if self.kind != Kind::JetStream {
            self.out.lock().unwrap().retain(|_, out| out.session != session.number);
        }
        session.break_off();
    }

    /// A delivery goes out: the number it is settled by.
    pub(super) fn out(&self, session: u64, message: &Message, acker: Acker, deadline: Instant) -> u64 {
        let tag = match self.kind {
            // As in the reply subject: the sequence in the stream, whichever delivery of it.
            Kind::JetStream => sequence(message),
            _ => self.number(),
        };
        self.out.lock().unwrap().insert(tag, Out { acker, session, deadline });
        tag
    }

    /// The delivery that this number stands for by now.
    fn take(&self, tag: u64) -> Option<Acker> {
        self.out.lock().unwrap().remove(&tag).map(|out| out.acker)
    }

    pub(super) fn extend(&self, tag: u64, deadline: Instant) {
        if let Some(out) = self.out.lock().unwrap().get_mut(&tag) {
            out.deadline = deadline;
        }
    }

    /// JetStream: those whose deadline is over come again.
    pub(super) fn expire(&self) {
        let now = Instant::now();
        self.out.lock().unwrap().retain(|_, out| now < out.deadline);
    }

    /// Any delivery, taken for lost, comes again while it is still being worked on.
    pub(super) fn redeliver_one(&self, nth: u64) -> bool {
        let mut out = self.out.lock().unwrap();
        let Some(tag) = out.keys().nth(usize::try_from(nth).unwrap_or(0) % out.len().max(1)).copied() else {
            return false;
        };
        drop(out.remove(&tag));
        true
    }
}

fn sequence(message: &Message) -> u64 {
    message.headers().get_str("sequence").and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// A process's road to the hub.
#[derive(Clone)]
pub(super) struct SimBroker {
    pub(super) process: Arc<Process>,
}

impl SimBroker {
    pub(super) fn of(process: Arc<Process>) -> Self {
        Self { process }
    }

    pub(super) fn hub(&self) -> &Hub {
        &self.process.world.broker
    }

    async fn reach(&self) -> Result<(), BrokerError> {
        self.process.alive().await;
        self.process.world.latency().await;
        self.process.alive().await;
        if self.hub().is_down() {
            self.process.world.log.fault(Some(self.process.number), "broker: unreachable");
            return Err(BrokerError::new(BrokerErrorKind::Unreachable, "the broker cannot be reached"));
        }
        Ok(())
    }

    /// The ends of deliveries, as the broker hears of them.
    pub(super) async fn settle(
        self,
        session: u64,
        tag: u64,
        message: Message,
        disposition: Disposition,
    ) -> Result<(), BrokerError> {
        let (process, world) = (&self.process, &self.process.world);
        process.point("crash before a settlement").await;
        if self.hub().kind == Kind::JetStream && disposition == Disposition::Abandon {
            return Ok(());
        }
        world.latency().await;
        process.alive().await;
        let fault = world.strikes(world.plan.rates.settle).then(|| world.rng.below(3));
        let say = |fault| world.log.fault(Some(process.number), fault);
        match fault {
            Some(0) => {
                say("broker: connection lost before a settlement");
                self.lose(session);
                return Err(closed());
            }
            Some(1) if self.hub().kind == Kind::JetStream => {
                say("broker: ack lost");
                return Ok(());
            }
            Some(1) => {
                say("broker: ack lost");
                drop(self.hub().take(tag));
                return Ok(());
            }
            _ => {}
        }
        self.take_effect(tag, &message, disposition).await?;
        process.point("crash after a settlement").await;
        if fault.is_some() {
            say("broker: connection lost after a settlement");
            self.lose(session);
            return Err(closed());
        }
        Ok(())
    }

    fn lose(&self, session: u64) {
        let session = self.hub().sessions.lock().unwrap().get(&session).cloned();
        if let Some(session) = session {
            self.hub().break_off(&session);
        }
    }

    async fn take_effect(&self, tag: u64, message: &Message, end: Disposition) -> Result<(), BrokerError> {
        let delay = match end {
            Disposition::Requeue { after } | Disposition::Release { after } => after,
            _ => Duration::ZERO,
        };
        if self.hub().kind == Kind::Amqp && !delay.is_zero() {
            if !self.hub().out.lock().unwrap().contains_key(&tag) {
                return Err(closed());
            }
            if let Err(error) = self.hold(message, end, delay) {
                sleep(SECOND).await;
                self.process.alive().await;
                drop(self.hub().take(tag));
                return Err(error);
            }
            self.process.point("crash between a hold copy and its ack").await;
            let acker = self.hub().take(tag).ok_or_else(closed)?;
            return acker.settle(Disposition::Ack).await;
        }
        let acker = self.hub().take(tag).ok_or_else(closed)?;
        self.process.world.truth.settled(&self.process, message, end);
        acker.settle(end).await
    }

    /// A copy in a hold queue, confirmed; it comes back later.
    fn hold(&self, message: &Message, end: Disposition, delay: Duration) -> Result<(), BrokerError> {
        let world = &self.process.world;
        let fault = self.publish_fault();
        if let Some(fault @ (BrokerErrorKind::Nacked | BrokerErrorKind::NotRouted)) = fault {
            return Err(BrokerError::new(fault, "the hold copy was not taken"));
        }
        if fault.is_some() && world.rng.chance(500) {
            return Err(BrokerError::new(BrokerErrorKind::Unknown, "the hold copy was lost"));
        }
        self.hub().held.fetch_add(1, Ordering::Relaxed);
        let (world, message) = (Arc::clone(world), message.clone());
        tokio::spawn(async move {
            sleep(delay.max(SECOND)).await;
            let copy = match end {
                Disposition::Requeue { .. } => Copy::hold(&message),
                _ => Copy::release(&message),
            };
            world.broker.queues.publish(&ORDERS.into(), &copy).await.unwrap();
            world.broker.held.fetch_sub(1, Ordering::Relaxed);
        });
        match fault {
            Some(kind) => Err(BrokerError::new(kind, "the hold copy's confirmation was lost")),
            None => Ok(()),
        }
    }

    fn publish_fault(&self) -> Option<BrokerErrorKind> {
        let world = &self.process.world;
        if !world.strikes(world.plan.rates.publish) {
            return None;
        }
        let (kind, name) = world.rng.pick(&[
            (BrokerErrorKind::Nacked, "publish: nacked"),
            (BrokerErrorKind::NotRouted, "publish: returned"),
            (BrokerErrorKind::Unknown, "publish: not confirmed"),
            (BrokerErrorKind::Unknown, "publish: not confirmed"),
        ]);
        world.log.fault(Some(self.process.number), name);
        Some(kind)
    }
}

fn closed() -> BrokerError {
    BrokerError::new(BrokerErrorKind::Closed, "the delivery is no longer out")
}

#[async_trait]
impl Broker for SimBroker {
    fn system(&self) -> &'static str {
        "memory"
    }

    fn features(&self) -> Features {
        let mut features = self.hub().queues.features();
        if self.hub().kind == Kind::JetStream {
            features.ack_deadline = Some(self.process.world.plan.lease);
        }
        features
    }

    fn default_scope(&self, queue: &QueueSpec) -> String {
        self.hub().queues.default_scope(queue)
    }

    async fn prepare(&self, queue: &QueueSpec) -> Result<(), BrokerError> {
        self.reach().await?;
        self.hub().queues.prepare(queue).await
    }

    async fn subscribe(&self, queue: &QueueSpec) -> Result<Box<dyn Subscription>, BrokerError> {
        self.reach().await?;
        let inner = self.hub().queues.subscribe(queue).await?;
        Ok(Box::new(SimSubscription::begin(self.clone(), inner)))
    }

    async fn publish(&self, to: &Destination, copy: &Copy<'_>) -> Result<(), BrokerError> {
        let (process, world) = (&self.process, &self.process.world);
        process.point("crash before a dead letter").await;
        self.reach().await?;
        let fault = self.publish_fault();
        if let Some(fault @ (BrokerErrorKind::Nacked | BrokerErrorKind::NotRouted)) = fault {
            return Err(BrokerError::new(fault, "the letter was not taken"));
        }
        if fault.is_some() && world.rng.chance(500) {
            sleep(5 * SECOND).await;
            return Err(BrokerError::new(BrokerErrorKind::Unknown, "the letter was lost"));
        }
        if world.strikes(world.plan.rates.publish) {
            world.log.fault(Some(process.number), "publish: late");
            sleep(world.rng.duration(MILLI, 5 * SECOND)).await;
            process.alive().await;
        }
        self.hub().queues.publish(to, copy).await?;
        world.truth.letter(copy.message());
        process.point("crash after a dead letter").await;
        match fault {
            Some(kind) => Err(BrokerError::new(kind, "the letter's confirmation was lost")),
            None => Ok(()),
        }
    }

    async fn close(&self) {}
}

impl fmt::Debug for SimBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimBroker")
    }
}
