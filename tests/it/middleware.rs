//! Tower layers around a handler, and the stack without a consumer.

use std::future::{Ready, pending, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use guestlist::dedup::{DedupLayer, Release, Suspects};
use guestlist::retry::RetryLayer;
use guestlist::testing::{Checker, FaultyStore};
use guestlist::{BoxError, BoxFuture, Cause, EventKind, Failure, HandlerService, Message, Outcome, Pipeline};
use tokio::time::{Instant, sleep};
use tower::limit::ConcurrencyLimitLayer;
use tower::load_shed::LoadShedLayer;
use tower::timeout::TimeoutLayer;
use tower::{Service, ServiceBuilder, ServiceExt};

use crate::support::{DEAD, HOUR, LEASE, Lab, ORDERS, SECOND, pass, until};

/// How many run at once, and the most there were.
#[derive(Clone, Default)]
struct Crowd(Arc<[AtomicUsize; 2]>);

impl Crowd {
    async fn during(&self, work: impl Future<Output = ()>) {
        let inside = self.0[0].fetch_add(1, Ordering::SeqCst) + 1;
        self.0[1].fetch_max(inside, Ordering::SeqCst);
        work.await;
        self.0[0].fetch_sub(1, Ordering::SeqCst);
    }

    fn most(&self) -> usize {
        self.0[1].load(Ordering::SeqCst)
    }
}

#[tokio::test(start_paused = true)]
async fn towers_timeout_around_a_handler_is_a_timeout_and_counts_as_an_attempt() {
    let lab = Lab::new();
    lab.send("order-1");
    let handler = lab.handler(async |run| {
        sleep(if run.attempt < 3 { HOUR } else { SECOND }).await;
        Ok(())
    });
    let service =
        ServiceBuilder::new().layer(TimeoutLayer::new(5 * SECOND)).service(HandlerService::new(handler));
    let process = lab.start(lab.queue().service(service));
    lab.drained().await;
    assert_eq!(lab.journal.attempts("order-1"), [1, 2, 3]);
    assert_eq!(process.orders().failures.get("timeout"), Some(&2));
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn towers_concurrency_limit_around_a_handler_limits_it() {
    let lab = Lab::new();
    for number in 0..20 {
        lab.send(&format!("order-{number}"));
        lab.send(&format!("order-{number}"));
    }
    let crowd = Crowd::default();
    let inside = crowd.clone();
    let handler = lab.handler(move |_| {
        let inside = inside.clone();
        async move {
            inside.during(sleep(SECOND)).await;
            Ok(())
        }
    });
    let service =
        ServiceBuilder::new().layer(ConcurrencyLimitLayer::new(2)).service(HandlerService::new(handler));
    let start = Instant::now();
    let process = lab.start(lab.queue().service(service));
    lab.drained().await;
    assert_eq!((crowd.most(), process.orders().handled, process.orders().duplicates), (2, 20, 20));
    assert!(start.elapsed() < 60 * SECOND, "{:?}", start.elapsed());
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_load_that_is_shed_is_not_an_attempt_and_comes_again() {
    let lab = Lab::new();
    for number in 0..10 {
        lab.send(&format!("order-{number}"));
    }
    let handler = lab.handler(async |_| {
        sleep(SECOND).await;
        Ok(())
    });
    let service = ServiceBuilder::new()
        .layer(LoadShedLayer::new())
        .layer(ConcurrencyLimitLayer::new(2))
        .service(HandlerService::new(handler));
    let process = lab.start(lab.queue().max_attempts(2).service(service));
    lab.drained().await;
    let orders = process.orders();
    assert_eq!(orders.handled, 10);
    assert!(orders.failures["overloaded"] > 10, "{orders:?}");
    assert!(orders.failures["overloaded"] < 10 * 6 * 10, "no hot loop: {orders:?}");
    assert!(lab.journal.all().iter().all(|run| run.attempt == 1), "{:?}", lab.journal.all());
    assert!(lab.count(EventKind::Released(Release::NotStarted)) > 10);
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn in_process_tries_share_one_claim_and_one_attempt() {
    let lab = Lab::new();
    lab.send("order-1");
    let tries = lab.journal.clone();
    let handler = lab.handler(move |run| {
        let nth_try = tries.runs(&run.id());
        async move { if nth_try < 4 { Err("busy".into()) } else { Ok(()) } }
    });
    let process = lab.start(lab.queue().tries(3).handler(handler));
    lab.drained().await;
    assert_eq!(lab.journal.attempts("order-1"), [1, 1, 1, 2]);
    process.stop().await.unwrap();
    lab.check();
}

/// A service of a user's own, that panics where a handler could not.
#[derive(Clone)]
enum Panics {
    InCall,
    InFuture,
}

impl Service<Message> for Panics {
    type Response = ();
    type Error = BoxError;
    type Future = BoxFuture<Result<(), BoxError>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Message) -> Self::Future {
        match self {
            Self::InCall => panic!("on purpose"),
            Self::InFuture => Box::pin(async { panic!("on purpose") }),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_service_of_ones_own_is_a_failed_attempt_with_its_backoff() {
    for service in [Panics::InCall, Panics::InFuture] {
        let lab = Lab::new();
        lab.send("order-1");
        let process = lab.start(lab.queue().max_attempts(3).service(service));
        let start = Instant::now();
        lab.drained().await;
        assert!(start.elapsed() >= 5 * SECOND, "the backoff is kept: {:?}", start.elapsed());
        assert_eq!(process.orders().failures.get("panic"), Some(&2));
        assert_eq!((lab.causes(), lab.letters()[0].attempts), (vec!["exhausted".to_owned()], 3));
        process.stop().await.unwrap();
        lab.check_as(Checker::new().max_attempts(Some(3)));
    }
}

/// A service that is never ready again.
#[derive(Clone)]
struct Broken;

impl Service<Message> for Broken {
    type Response = ();
    type Error = BoxError;
    type Future = Ready<Result<(), BoxError>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Err("broken".into()))
    }

    fn call(&mut self, _: Message) -> Self::Future {
        panic!("called without being ready");
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_not_ready_is_not_called_and_loses_nothing() {
    let lab = Lab::new();
    lab.send("order-1");
    let process = lab.start(lab.queue().service(Broken));
    let failed = || process.orders().failures.get("transient").copied().unwrap_or(0);
    until("it has failed three times", || failed() >= 3).await;
    assert!(!process.has_ended() && lab.depth() == 1);
    let before = failed();
    pass(60 * SECOND).await;
    assert!(failed() - before < 100, "no hot loop: {} times in a minute", failed() - before);
    assert!(lab.record("order-1").await.is_none_or(|record| record.attempt == 0), "it was never tried");
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn without_a_consumer_a_dropped_failure_gives_its_claim_back_as_failed() {
    let lab = Lab::new();
    let stack = ServiceBuilder::new()
        .layer(DedupLayer::new(lab.store.clone(), "orders").with_suspects(Suspects::new()))
        .layer(RetryLayer::new(2))
        .service(HandlerService::new(
            lab.handler(async |run| if run.attempt == 1 { Err("busy".into()) } else { Ok(()) }),
        ));
    let order = || Message::builder("").transport_id("order-1").build();
    let error = stack.clone().oneshot(order()).await.unwrap_err();
    assert_eq!(lab.store.in_progress(), 1, "the claim travels in the failure");
    drop(error);
    assert_eq!(lab.store.in_progress(), 0);
    assert_eq!(stack.clone().oneshot(order()).await.unwrap(), Outcome::Handled);
    assert_eq!(stack.oneshot(order()).await.unwrap(), Outcome::Duplicate);
    assert_eq!(lab.journal.attempts("order-1"), [1, 1, 2]);
}

#[tokio::test(start_paused = true)]
async fn without_a_consumer_a_dropped_call_gives_its_claim_back() {
    let lab = Lab::new();
    let store = FaultyStore::new(lab.store.clone());
    let queue = lab.queue().store(store);
    let stack = Pipeline::new(queue, Arc::new(lab.broker.clone())).unwrap();
    let stack = stack
        .handler(lab.handler(async |run| if run.attempt == 1 { pending().await } else { Ok(()) }))
        .unwrap();
    let order = || Message::builder("").transport_id("order-1").build();
    let call = tokio::time::timeout(SECOND, stack.clone().oneshot(order())).await;
    assert!(call.is_err(), "it never ends");
    until("the claim is back", || lab.store.in_progress() == 0).await;
    let record = lab.record("order-1").await.unwrap();
    assert_eq!(record.attempt, 0, "an interruption spends no attempt");
}

#[tokio::test(start_paused = true)]
async fn without_a_consumer_conclude_settles_as_the_stack_answered() {
    let lab = Lab::new();
    lab.send("order-1");
    let spec = {
        let mut spec = guestlist::broker::QueueSpec::new(ORDERS);
        spec.dead_letter = Some(DEAD.into());
        spec
    };
    let broker: Arc<dyn guestlist::broker::Broker> = Arc::new(lab.broker.clone());
    let queue = lab.queue().store(lab.store.clone()).max_attempts(2);
    let handler = lab.handler(|_| ready(Err("busy".into())));
    let stack = Pipeline::new(queue, Arc::clone(&broker)).unwrap().handler(handler).unwrap();
    let mut subscription = broker.subscribe(&spec).await.unwrap();
    for _ in 0..2 {
        let next = std::future::poll_fn(|cx| subscription.poll_next(cx, 1)).await;
        let (message, acker) = next.unwrap().unwrap().into_parts();
        let answer = stack.clone().oneshot(message).await;
        acker.conclude(answer).await.unwrap();
    }
    assert_eq!((lab.depth(), lab.causes()), (0, vec![Cause::Exhausted.name().to_owned()]));
    assert_eq!(lab.journal.attempts("order-1"), [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_deferral_keeps_its_delay_and_spends_no_attempt() {
    let lab = Lab::new();
    lab.send("order-1");
    lab.send("order-1");
    let journal = lab.journal.clone();
    let handler = lab.handler(move |run| {
        let nth_run = journal.runs(&run.id());
        async move { if nth_run < 4 { Err(Failure::defer(2 * LEASE)) } else { Ok(()) } }
    });
    let process = lab.start(lab.queue().handler(handler));
    lab.drained().await;
    let runs = lab.journal.of("order-1");
    assert_eq!(lab.journal.attempts("order-1"), [1, 1, 1, 1]);
    for pair in runs.windows(2) {
        let pause = pair[1].began - pair[0].began;
        assert!(pause >= 2 * LEASE && pause <= 2 * LEASE + Duration::from_secs(1), "{pause:?}");
    }
    process.stop().await.unwrap();
    lab.check();
}
