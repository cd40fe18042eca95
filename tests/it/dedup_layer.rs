//! The dedup layer by itself, as a team with a loop of its own uses it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use guestlist::broker::memory::{MemoryBroker, PublishFault};
use guestlist::dedup::protocol::{Ask, Before, Claim, Held, Record, Release, Run, State, Token};
use guestlist::dedup::{DedupLayer, DedupStore, MemoryStore, StoreError, StoreFeatures, Suspects};
use guestlist::testing::{Fault, FaultyStore};
use guestlist::{
    AckHandle, BoxError, CancellationToken, Cause, DedupKey, Delivery, Disposition, Failure, Handled,
    HandlerService, Identity, Message, MessageId, MissingId, Outcome, Pipeline, Queue, Scope, Settle,
    Settling,
};
use tokio::time::{Instant, advance, sleep, timeout};
use tower::{Layer, Service, ServiceExt};

use crate::support::{HOUR, LEASE, MINUTE, SECOND, until};

fn order(id: &str) -> Message {
    Message::builder(id.to_owned()).transport_id(id.to_owned()).build()
}

fn key(id: &str) -> DedupKey {
    Scope::new("", "orders").key(&MessageId::new(id.to_owned()).unwrap())
}

/// Handlers that count their runs.
#[derive(Clone, Default)]
struct Runs(Arc<AtomicU32>);

impl Runs {
    fn count(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }

    fn run(&self) -> u32 {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn around(
        &self,
        layer: &DedupLayer,
    ) -> impl Service<Message, Response = Outcome, Error = BoxError, Future: Send> + Clone + use<> {
        let runs = self.clone();
        layer.layer(HandlerService::new(move |_: Message| {
            runs.run();
            async { Ok(()) }
        }))
    }
}

/// A store that answers each claim after so long, but before its call's deadline is looked at: as
/// if the process had been stopped in between.
#[derive(Clone, Debug)]
struct Stopped {
    store: MemoryStore,
    stop: Duration,
}

#[async_trait]
impl DedupStore for Stopped {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        let claim = self.store.claim(key, ask).await;
        advance(self.stop).await;
        claim
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.store.renew(key, run, lease).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.store.complete(key, run, window).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        self.store.release(key, run, why).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        self.store.inspect(key).await
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        self.store.forget(key).await
    }

    fn features(&self) -> StoreFeatures {
        self.store.features()
    }
}

/// A broker that is told and does nothing.
struct Nobody;

impl Settle for Nobody {
    fn settle(&self, _: &AckHandle, _: &Message, _: Disposition) -> Settling {
        Settling::Now(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn no_handler_starts_and_no_attempt_is_spent_after_the_lease() {
    let store = MemoryStore::new();
    let stopped = Stopped { store: store.clone(), stop: LEASE };
    let layer = DedupLayer::new(stopped, "orders").with_suspects(Suspects::new());
    let runs = Runs::default();
    let (message, acker) = Delivery::new(order("1"), Arc::new(Nobody), AckHandle::Tag(1)).into_parts();
    let answer = runs.around(&layer).oneshot(message).await;
    assert_eq!(acker.conclude(answer).await.unwrap(), Disposition::Abandon);
    assert_eq!(runs.count(), 0);
    let record = store.inspect(&key("1")).await.unwrap().unwrap();
    assert_eq!((record.attempt, record.before), (0, Before::First), "as it was");
    assert!(matches!(record.state, State::Released { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_loop_without_a_consumer_goes_on_when_its_store_is_back() {
    let store = FaultyStore::new(MemoryStore::new());
    let layer = DedupLayer::new(store.clone(), "orders").with_suspects(Suspects::new());
    let runs = Runs::default();
    let mut stack = runs.around(&layer);
    store.set_down(true);
    for id in ["1", "2"] {
        let called = timeout(10 * MINUTE, async { stack.ready().await.unwrap().call(order(id)).await });
        let failure = Failure::from_error(called.await.expect("an answer within minutes").unwrap_err());
        assert_eq!(failure.cause(), Cause::StoreDown);
    }
    store.set_down(false);
    let called = timeout(10 * MINUTE, async { stack.ready().await.unwrap().call(order("3")).await });
    assert_eq!(called.await.expect("it is ready again").unwrap(), Outcome::Handled);
    assert_eq!(runs.count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_loop_without_a_consumer_goes_on_when_its_dead_letters_are_taken_again() {
    let broker = MemoryBroker::new();
    broker.declare("orders.dead");
    broker.fail_publishes(1_000, PublishFault::Nacked);
    let queue = Queue::new("orders").dead_letter("orders.dead").suspects(Suspects::new());
    let pipeline = Pipeline::new(queue, Arc::new(broker.clone())).unwrap();
    let mut stack = pipeline
        .handler(async |order: Message| match &order.payload()[..] {
            b"good" => Ok(()),
            _ => Err(Failure::permanent("bad")),
        })
        .unwrap();
    let called = timeout(10 * MINUTE, async { stack.ready().await?.call(order("bad")).await });
    let answer: Result<Outcome, BoxError> = called.await.expect("an answer within minutes");
    assert_eq!(Failure::from_error(answer.unwrap_err()).cause(), Cause::DeadLetterDown);
    let called = timeout(10 * MINUTE, async { stack.ready().await?.call(order("good")).await });
    let answer: Result<Outcome, BoxError> = called.await.expect("it is ready again");
    assert_eq!(answer.unwrap(), Outcome::Handled);
}

#[tokio::test(start_paused = true)]
async fn lengths_without_an_end_are_as_good_as_any() {
    const EVER: Duration = Duration::MAX;
    for in_process in [true, false] {
        let store = MemoryStore::new();
        let layer = if in_process {
            DedupLayer::new(store.clone(), "orders")
        } else {
            DedupLayer::new(FaultyStore::new(store.clone()), "orders")
        };
        let layer = layer
            .with_suspects(Suspects::new())
            .with_lease(EVER)
            .with_window(EVER)
            .with_max_run(EVER)
            .with_pause_hold(EVER)
            .with_max_age(EVER)
            .with_wait(EVER);
        let runs = Runs::default();
        let stack = runs.around(&layer);
        assert_eq!(stack.clone().oneshot(order("1")).await.unwrap(), Outcome::Handled);
        assert_eq!(stack.clone().oneshot(order("1")).await.unwrap(), Outcome::Duplicate);
        let unidentified = layer.clone().with_missing_id(MissingId::Process);
        let unidentified = runs.around(&unidentified).oneshot(Message::builder("").build()).await;
        assert_eq!(unidentified.unwrap(), Outcome::HandledUnchecked);

        let defer = layer.layer(HandlerService::new(async |_: Message| Err(Failure::defer(EVER))));
        let failure = Failure::from_error(defer.oneshot(order("2")).await.unwrap_err());
        assert_eq!(failure.cause(), Cause::Deferred);
    }
}

#[tokio::test(start_paused = true)]
async fn an_id_source_that_panics_is_a_failure_for_good() {
    let identity = Identity::none().with(|message| {
        let text = std::str::from_utf8(message.payload()).unwrap();
        MessageId::new(text.to_owned())
    });
    let layer =
        DedupLayer::new(MemoryStore::new(), "orders").with_suspects(Suspects::new()).with_identity(identity);
    let runs = Runs::default();
    let stack = runs.around(&layer);
    let bad = Message::builder(&b"\xff"[..]).build();
    let failure = Failure::from_error(stack.clone().oneshot(bad).await.unwrap_err());
    assert_eq!((failure.cause(), failure.class()), (Cause::Panic, guestlist::FailureClass::Permanent));
    assert_eq!(stack.oneshot(Message::builder("good").build()).await.unwrap(), Outcome::Handled);
    assert_eq!(runs.count(), 1);
}

/// A remote store that says `InProgress` and nothing more is not asked without a pause.
#[tokio::test(start_paused = true)]
async fn a_remote_store_is_not_asked_without_a_pause_while_a_holder_works() {
    let store = FaultyStore::new(MemoryStore::new());
    let token = Token::from_bits(1);
    let layer = DedupLayer::new(store.clone(), "orders").with_suspects(Suspects::new()).with_wait(5 * SECOND);
    let holder = Ask::new(token, 10 * SECOND, MINUTE);
    store.claim(&key("1"), &holder).await.unwrap();
    let begin = Instant::now();
    let failure = Runs::default().around(&layer).oneshot(order("1")).await.unwrap_err();
    assert_eq!(Failure::from_error(failure).cause(), Cause::InProgress);
    assert_eq!(begin.elapsed(), 5 * SECOND);
    assert!(store.calls() < 30, "{} calls in five seconds", store.calls());
}

/// Leaves the id as a holder that vanished does.
async fn vanish(store: &MemoryStore, id: &str) {
    let token = Token::random();
    store.claim(&key(id), &Ask::new(token, SECOND, HOUR)).await.unwrap();
    advance(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_dropped_before_its_answer_is_given_back_as_not_started() {
    let store = MemoryStore::new();
    let faulty = FaultyStore::new(store.clone());
    let layer = DedupLayer::new(faulty.clone(), "orders").with_suspects(Suspects::new());
    faulty.fail_call(0, Fault::Hang);
    let runs = Runs::default();
    let call = runs.around(&layer).oneshot(order("1"));
    assert!(timeout(SECOND, call).await.is_err(), "the claim hangs, and its caller goes away");
    assert_eq!(faulty.calls(), 1);
    until("it is released", || faulty.calls() == 2).await;
    let record = store.inspect(&key("1")).await.unwrap().unwrap();
    assert_eq!((record.attempt, record.before), (0, Before::First));
    assert!(matches!(record.state, State::Released { .. }));
    assert_eq!(runs.around(&layer).oneshot(order("1")).await.unwrap(), Outcome::Handled);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_run_is_an_interruption_and_a_dropped_failure_a_failed_attempt() {
    let store = MemoryStore::new();
    let layer = DedupLayer::new(store.clone(), "orders").with_suspects(Suspects::new());
    let stuck = layer.layer(HandlerService::new(async |_: Message| std::future::pending::<Handled>().await));
    assert!(timeout(SECOND, stuck.oneshot(order("1"))).await.is_err());
    let record = store.inspect(&key("1")).await.unwrap().unwrap();
    assert_eq!((record.attempt, record.before, record.interruptions), (0, Before::HandedBack, 1));

    let failing = layer.layer(HandlerService::new(async |_: Message| Err("no".into())));
    let failure = failing.oneshot(order("1")).await.unwrap_err();
    let held = store.inspect(&key("1")).await.unwrap().unwrap();
    assert!(matches!(held.state, State::Claimed { .. }), "the claim travels in the failure");
    drop(failure);
    let record = store.inspect(&key("1")).await.unwrap().unwrap();
    assert_eq!((record.attempt, record.before, record.interruptions), (1, Before::Failed, 0));
}

/// The longest that a suspect is let wait for another, in these tests.
const PATIENT: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn the_suspect_permit_comes_back_with_the_answer_to_the_release_and_not_before() {
    let store = MemoryStore::new();
    vanish(&store, "a").await;
    vanish(&store, "b").await;
    let suspects = Suspects::new();
    let faulty = FaultyStore::new(store.clone());
    let first = DedupLayer::new(faulty.clone(), "orders").with_suspects(suspects.clone()).with_wait(PATIENT);
    // Another queue of the same process, over a store that works.
    let other = DedupLayer::new(FaultyStore::new(store.clone()), "orders");
    let other = other.with_suspects(suspects).with_wait(PATIENT);

    let failing = first.layer(HandlerService::new(async |_: Message| Err("no".into())));
    let failure = failing.oneshot(order("a")).await.unwrap_err();
    faulty.fail_call(0, Fault::BeforeEffect);
    faulty.fail_call(1, Fault::Hang);
    let dropped = Instant::now();
    drop(failure);
    let runs = Runs::default();
    assert_eq!(runs.around(&other).oneshot(order("b")).await.unwrap(), Outcome::Handled);
    assert!(
        dropped.elapsed() >= LEASE / 6,
        "after {:?}: the release had not been answered",
        dropped.elapsed()
    );
    let record = store.inspect(&key("a")).await.unwrap().unwrap();
    assert!(record.suspect && matches!(record.state, State::Released { .. }));
}

#[tokio::test(start_paused = true)]
async fn the_suspect_permit_stays_with_a_handler_that_lost_its_lease_until_it_returns() {
    let store = MemoryStore::new();
    vanish(&store, "a").await;
    vanish(&store, "b").await;
    let suspects = Suspects::new();
    let faulty = FaultyStore::new(store.clone());
    let first = DedupLayer::new(faulty.clone(), "orders").with_suspects(suspects.clone());
    let other = DedupLayer::new(store.clone(), "orders").with_suspects(suspects).with_wait(10 * PATIENT);
    let slow = first.layer(HandlerService::new(async |_: Message, cancel: CancellationToken| {
        cancel.cancelled().await;
        sleep(2 * MINUTE).await;
        Ok(())
    }));
    let begin = Instant::now();
    let slow = tokio::spawn(slow.oneshot(order("a")));
    until("the suspect runs", || faulty.calls() >= 2).await;
    faulty.set_down(true);
    let runs = Runs::default();
    assert_eq!(runs.around(&other).oneshot(order("b")).await.unwrap(), Outcome::Handled);
    assert!(begin.elapsed() >= LEASE + 2 * MINUTE, "after {:?}: the handler still ran", begin.elapsed());
    let _ = slow.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_suspect_that_does_not_get_the_permit_is_handed_back_with_a_delay() {
    let store = MemoryStore::new();
    vanish(&store, "a").await;
    vanish(&store, "b").await;
    let layer = DedupLayer::new(store, "orders").with_suspects(Suspects::new());
    let stuck = layer.layer(HandlerService::new(async |_: Message| std::future::pending::<Handled>().await));
    let stuck = tokio::spawn(stuck.oneshot(order("a")));
    tokio::task::yield_now().await;
    let runs = Runs::default();
    let (message, acker) = Delivery::new(order("b"), Arc::new(Nobody), AckHandle::Tag(1)).into_parts();
    let answer = runs.around(&layer).oneshot(message).await;
    let Disposition::Release { after } = acker.conclude(answer).await.unwrap() else {
        panic!("not released")
    };
    assert!(after >= SECOND && runs.count() == 0);
    // What is not suspect runs beside it.
    assert_eq!(runs.around(&layer).oneshot(order("c")).await.unwrap(), Outcome::Handled);
    stuck.abort();
    assert!(stuck.await.unwrap_err().is_cancelled());
    assert_eq!(runs.around(&layer).oneshot(order("b")).await.unwrap(), Outcome::Handled);
}

/// A hop at a time it would be, if it came back sooner: each one a copy, and a question to the store.
#[tokio::test(start_paused = true)]
async fn what_is_left_of_a_long_delay_is_handed_back_whole() {
    let layer = DedupLayer::new(MemoryStore::new(), "orders");
    let defers = layer.layer(HandlerService::new(async |_: Message| Err(Failure::defer(HOUR))));
    let mut delays = Vec::new();
    for _ in 0..2 {
        let (message, acker) = Delivery::new(order("a"), Arc::new(Nobody), AckHandle::Tag(1)).into_parts();
        let answer = defers.clone().oneshot(message).await;
        let Disposition::Release { after } = acker.conclude(answer).await.unwrap() else {
            panic!("not released")
        };
        delays.push(after);
    }
    assert_eq!(delays[0], HOUR);
    assert!(delays[1] + MINUTE > HOUR && delays[1] < HOUR, "{delays:?}");
}

#[tokio::test(start_paused = true)]
async fn a_waiter_runs_at_once_when_the_holder_fails() {
    let layer = DedupLayer::new(MemoryStore::new(), "orders").with_suspects(Suspects::new());
    let failing = layer.layer(HandlerService::new(async |_: Message| {
        sleep(SECOND).await;
        Err("no".into())
    }));
    let failing = tokio::spawn(async move { drop(failing.oneshot(order("1")).await) });
    tokio::task::yield_now().await;
    let begin = Instant::now();
    assert_eq!(Runs::default().around(&layer).oneshot(order("1")).await.unwrap(), Outcome::Handled);
    assert_eq!(begin.elapsed(), SECOND);
    failing.await.unwrap();
}
