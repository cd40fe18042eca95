//! A laboratory for consumers: one broker, one store, a log of every event, a journal of every run.
//!
//! "Processes" are consumers in tasks of one runtime. Each has its own way to the shared store, so that one
//! that is killed stays dead: its releases never arrive.

mod capture;
mod doubles;
#[cfg(all(feature = "amqp", feature = "nats"))]
#[macro_use]
pub(crate) mod ground;
mod journal;
mod process;
mod trial;

use std::collections::BTreeMap;
use std::time::Duration;

use guestlist::broker::copy::DeadLetter;
use guestlist::broker::memory::MemoryBroker;
use guestlist::dedup::protocol::Record;
use guestlist::dedup::{DedupStore, MemoryStore, Suspects};
use guestlist::testing::checker::{Marker, Report};
use guestlist::testing::{Checker, FaultyStore, Recorder};
use guestlist::{
    Backoff, BoxFuture, CancellationToken, Consumer, Event, EventKind, Fence, Handled, Message, MessageId,
    Queue, Scope,
};
use tokio::time::{Instant, sleep, timeout};

pub(crate) use self::capture::LogCapture;
pub(crate) use self::doubles::{CopySpy, LateStore, Tripwire};
pub(crate) use self::journal::{Journal, Run};
pub(crate) use self::process::Process;
pub(crate) use self::trial::{FAULTS, Plot, Trial, every_call_fails_once};

pub(crate) const ORDERS: &str = "orders";
pub(crate) const DEAD: &str = "orders.dead";
pub(crate) const LEASE: Duration = guestlist::defaults::LEASE;
pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const MINUTE: Duration = Duration::from_secs(60);
pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// What the processes of one test share.
#[derive(Clone)]
pub(crate) struct Lab {
    pub(crate) broker: MemoryBroker,
    pub(crate) store: MemoryStore,
    pub(crate) log: Recorder,
    pub(crate) journal: Journal,
}

impl Lab {
    /// A broker with the queue `orders` and its dead letters.
    pub(crate) fn new() -> Self {
        Self::over(MemoryStore::new())
    }

    pub(crate) fn over(store: MemoryStore) -> Self {
        let broker = MemoryBroker::new();
        broker.declare(ORDERS);
        broker.declare(DEAD);
        Self { broker, store, log: Recorder::new(), journal: Journal::default() }
    }

    /// Sends an order whose body is its id.
    pub(crate) fn send(&self, id: &str) {
        self.send_body(id, id);
    }

    pub(crate) fn send_body(&self, id: &str, body: &str) {
        let message = Message::builder(body.to_owned()).transport_id(id.to_owned());
        self.broker.send(ORDERS, message).unwrap();
    }

    /// Sends a dead letter's message back to work, as an operator does.
    pub(crate) fn redrive(&self, id: &str, generation: u32) {
        let message = Message::builder(id.to_owned()).transport_id(format!("redrive-of-{id}"));
        let message = message.header("guestlist-id", id.to_owned());
        self.broker.send(ORDERS, message.header("guestlist-generation", generation.to_string())).unwrap();
    }

    /// The queue `orders`: exact backoff of 1 s × 4, and a suspect permit of its own, since the
    /// other tests of this process are other processes to us.
    pub(crate) fn queue(&self) -> Queue {
        self.queue_named(ORDERS)
    }

    pub(crate) fn queue_named(&self, name: &str) -> Queue {
        Queue::new(name)
            .dead_letter(DEAD)
            .backoff(Backoff::new(SECOND, 4, 5 * MINUTE).without_jitter())
            .suspects(Suspects::new())
            .observer(self.log.observer())
    }

    /// A handler that writes its runs into the journal.
    pub(crate) fn handler<W, F>(
        &self,
        work: W,
    ) -> impl Fn(Message, Fence, guestlist::Attempt, CancellationToken) -> BoxFuture<Handled>
    + Clone
    + Send
    + Sync
    + 'static
    where
        W: Fn(Run) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Handled> + Send + 'static,
    {
        let journal = self.journal.clone();
        move |message, fence, attempt, cancel| {
            let run = Run { message, fence, attempt: attempt.0, cancel };
            let page = journal.begin(&run);
            let handled = work(run);
            Box::pin(async move {
                let handled = handled.await;
                page.end();
                handled
            })
        }
    }

    /// A process that consumes this queue, over a store that is asked as a remote one is.
    pub(crate) fn start(&self, queue: Queue) -> Process {
        self.start_over(FaultyStore::new(self.store.clone()), queue)
    }

    pub(crate) fn start_over(&self, store: FaultyStore, queue: Queue) -> Process {
        Process::spawn(store.clone(), Consumer::new(self.broker.clone()).store(store).queue(queue))
    }

    /// A process whose store is in its own memory: asked without waiting.
    pub(crate) fn start_in_process(&self, queue: Queue) -> Process {
        let consumer = Consumer::new(self.broker.clone()).store(self.store.clone()).queue(queue);
        Process::spawn(FaultyStore::new(self.store.clone()), consumer)
    }

    /// A process whose consumer has settings of its own.
    pub(crate) fn start_with(&self, queue: Queue, settings: impl FnOnce(Consumer) -> Consumer) -> Process {
        let store = FaultyStore::new(self.store.clone());
        let consumer = Consumer::new(self.broker.clone()).store(store.clone()).queue(queue);
        Process::spawn(store, settings(consumer))
    }

    /// Waits until the queue `orders` keeps no message.
    pub(crate) async fn drained(&self) {
        let drained = timeout(12 * HOUR, self.broker.drained(ORDERS)).await;
        drained.expect("the queue is drained within twelve hours").unwrap();
    }

    pub(crate) fn depth(&self) -> usize {
        self.broker.depth(ORDERS).unwrap()
    }

    /// The causes of the dead letters, in order.
    pub(crate) fn causes(&self) -> Vec<String> {
        self.letters().into_iter().map(|letter| letter.cause).collect()
    }

    pub(crate) fn letters(&self) -> Vec<DeadLetter> {
        let letters = self.broker.messages(DEAD).unwrap();
        letters.iter().map(|letter| DeadLetter::read(letter).expect("a dead letter has a story")).collect()
    }

    /// What the store keeps for an order.
    pub(crate) async fn record(&self, id: &str) -> Option<Record> {
        self.store.inspect(&key(ORDERS, id)).await.unwrap()
    }

    pub(crate) async fn forget(&self, id: &str) {
        self.log.mark("store", Marker::StoreLost(Some(key(ORDERS, id))));
        self.store.forget(&key(ORDERS, id)).await.unwrap();
    }

    /// How many events are of this kind.
    pub(crate) fn count(&self, kind: EventKind) -> usize {
        self.log.count(|other| *other == kind)
    }

    /// Proves the log of the whole test right, as far as a log can show it (I15).
    pub(crate) fn check(&self) -> Report {
        self.check_as(Checker::new())
    }

    /// The same for a queue of other settings.
    pub(crate) fn check_as(&self, checker: Checker) -> Report {
        let report = checker.one_clock().check(&self.log.log());
        report.assert_clean();
        report
    }

    /// The events of each delivery, in order.
    pub(crate) fn deliveries(&self) -> BTreeMap<u64, Vec<Event>> {
        let mut deliveries: BTreeMap<u64, Vec<Event>> = BTreeMap::new();
        for event in self.log.events() {
            deliveries.entry(event.delivery).or_default().push(event);
        }
        deliveries
    }
}

/// The key of an id in the default scope of a queue.
pub(crate) fn key(queue: &str, id: &str) -> guestlist::DedupKey {
    Scope::new("", &format!("memory:{queue}")).key(&MessageId::new(id.to_owned()).unwrap())
}

/// Waits until the condition holds: by conditions, never by a guess how long something takes.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    let give_up_at = Instant::now() + 12 * HOUR;
    while !holds() {
        assert!(Instant::now() < give_up_at, "waited twelve hours until {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Time goes by, and every timer on the way is served in its turn; `advance` would skip them.
pub(crate) async fn pass(time: Duration) {
    sleep(time).await;
}
