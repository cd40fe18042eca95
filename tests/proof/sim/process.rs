//! A process: a consumer that may die at any point at which the outside could see it.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guestlist::dedup::Suspects;
use guestlist::dedup::protocol::Run;
use guestlist::testing::checker::Marker;
use guestlist::{Backoff, CancellationToken, Consumer, Error, Event, EventKind, Observer, Queue};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep, sleep_until};

use super::broker::{Hub, SimBroker};
use super::handler;
use super::log::Fault;
use super::plan::{BACKOFF, MILLI, SECOND};
use super::store::SimStore;
use super::world::{DEAD, ORDERS, World};

pub(super) struct Process {
    pub(super) number: usize,
    pub(super) world: Arc<World>,
    pub(super) stop: CancellationToken,
    dead: AtomicBool,
    frozen_until: Mutex<Instant>,
    cut_off_until: Mutex<Instant>,
    abort: Mutex<Option<AbortHandle>>,
    deliveries: Mutex<BTreeMap<u64, Known>>,
    /// How many suspects run in it.
    pub(super) suspects: AtomicUsize,
}

/// What its own events told of a delivery.
#[derive(Clone, Copy, Default)]
pub(super) struct Known {
    pub(super) claim: Option<Run>,
    pub(super) ran: bool,
    pub(super) gap: bool,
}

impl Process {
    pub(super) fn start(world: &Arc<World>, number: usize) -> (Arc<Self>, JoinHandle<Result<(), Error>>) {
        let now = Mutex::new(Instant::now());
        let process = Arc::new(Self {
            number,
            world: Arc::clone(world),
            stop: CancellationToken::new(),
            dead: AtomicBool::new(false),
            frozen_until: now,
            cut_off_until: Mutex::new(Instant::now()),
            abort: Mutex::default(),
            deliveries: Mutex::default(),
            suspects: AtomicUsize::new(0),
        });
        world.log.step("process starts", number as u64);
        world.log.mark(number, Marker::ProcessStarted);
        let task = tokio::spawn(process.consumer().run_until(process.stop.clone().cancelled_owned()));
        *process.abort.lock().unwrap() = Some(task.abort_handle());
        (process, task)
    }

    fn consumer(self: &Arc<Self>) -> Consumer {
        let plan = &self.world.plan;
        let queue = Queue::new(ORDERS)
            .dead_letter(DEAD)
            .lease(plan.lease)
            .window(plan.window)
            .max_run(plan.max_run)
            .max_attempts(plan.max_attempts)
            .tries(plan.tries)
            .concurrency(plan.concurrency)
            .pause_hold(plan.pause_hold)
            .backoff(Backoff::new(SECOND, 4, BACKOFF))
            .on_store_failure(plan.policy)
            .suspects(Suspects::new())
            .observer(Arc::new(Eye(Arc::clone(self))))
            .handler(handler::of(self));
        let queue = match plan.timeout {
            Some(timeout) => queue.timeout(timeout),
            None => queue,
        };
        Consumer::new(SimBroker::of(Arc::clone(self)))
            .store(SimStore::of(Arc::clone(self)))
            .drain(plan.drain)
            .queue(queue)
    }

    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// Its memory is gone; what it sent is on its way; the broker notices sooner or later.
    pub(super) fn crash(&self) {
        if self.dead.swap(true, Ordering::Relaxed) {
            return;
        }
        self.world.truth.crashed(self.number);
        self.world.log.mark(self.number, Marker::ProcessKilled);
        Hub::lose_sight_of(&self.world, self.number);
        if self.world.plan.in_process {
            self.world.lose_all_records(Some(self.number));
        }
        self.abort();
    }

    /// Its consumer is dropped, the process lives on: what it left in the background goes on.
    pub(super) fn cancel(&self) {
        self.abort();
    }

    fn abort(&self) {
        if let Some(task) = &*self.abort.lock().unwrap() {
            task.abort();
        }
    }

    pub(super) fn freeze(&self, length: Duration) {
        *self.frozen_until.lock().unwrap() = Instant::now() + length;
    }

    pub(super) fn cut_off_from_store(&self, length: Duration) {
        *self.cut_off_until.lock().unwrap() = Instant::now() + length;
    }

    pub(super) fn recover(&self) {
        self.freeze(Duration::ZERO);
        self.cut_off_from_store(Duration::ZERO);
    }

    pub(super) fn is_cut_off(&self) -> bool {
        Instant::now() < *self.cut_off_until.lock().unwrap()
    }

    pub(super) fn is_frozen(&self) -> bool {
        Instant::now() < *self.frozen_until.lock().unwrap()
    }

    /// Goes on when it is not frozen, and never if it is dead.
    pub(super) async fn alive(&self) {
        while self.is_frozen() {
            let then = *self.frozen_until.lock().unwrap();
            sleep_until(then.min(Instant::now() + SECOND)).await;
        }
        if self.is_dead() {
            pending::<()>().await;
        }
    }

    /// A point at which it may die, by this name.
    pub(super) async fn point(&self, name: Fault) {
        self.alive().await;
        if self.world.strikes(self.world.plan.rates.crash) {
            self.world.log.fault(Some(self.number), name);
            self.crash();
            pending::<()>().await;
        }
    }

    pub(super) fn knows(&self, delivery: u64) -> Known {
        self.deliveries.lock().unwrap().get(&delivery).copied().unwrap_or_default()
    }

    fn learn(&self, event: &Event) {
        let mut deliveries = self.deliveries.lock().unwrap();
        let known = deliveries.entry(event.delivery).or_default();
        match event.kind {
            EventKind::Claimed(_) => known.claim = event.run,
            EventKind::Ran => known.ran = true,
            EventKind::Gap => known.gap = true,
            _ => {}
        }
    }
}

/// Sees the events of one process, and may kill it at each.
struct Eye(Arc<Process>);

impl Observer for Eye {
    fn observe(&self, event: &Event) {
        let Self(process) = self;
        if process.is_dead() {
            return;
        }
        process.world.log.event(process.number, event);
        process.learn(event);
        if let (EventKind::Claimed(_), Some(key), Some(run)) = (event.kind, event.key, event.run) {
            process.world.truth.heard(&key, run);
        }
        if process.world.strikes(process.world.plan.rates.crash) {
            process.world.log.fault(Some(process.number), "crash at an event");
            process.crash();
        }
    }
}

/// Keeps one place filled: when its process ends, for whatever reason, another begins.
pub(super) async fn supervise(world: Arc<World>, place: usize) {
    while !world.is_over() {
        let (process, task) = Process::start(&world, world.next_process());
        world.processes.lock().unwrap().insert(place, Arc::clone(&process));
        match task.await {
            Ok(_) => {}
            Err(error) if error.is_cancelled() => {}
            Err(error) => world.truth.violated(format!("a consumer panicked: {error}")),
        }
        world.log.step("process is over", process.number as u64);
        if !world.is_over() {
            sleep(world.rng.duration(10 * MILLI, 10 * SECOND)).await;
        }
    }
}
