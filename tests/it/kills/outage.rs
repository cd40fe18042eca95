//! The store stops for a while, or loses everything, in the middle of the work.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guestlist::broker::memory::MemoryBroker;
use guestlist::testing::Recorder;
use guestlist::testing::checker::{Checker, Marker, Reason, Report};
use guestlist::{
    Backoff, CancellationToken, Cause, Consumer, Error, EventKind, Message, Queue, QueueStatus, State, Status,
};
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, sleep};

use super::server::{Kind, Server};
use super::{LEASE, until};

const QUEUE: &str = "orders";
const DEAD: &str = "orders.dead";
const OUTAGE: Duration = Duration::from_secs(10);
/// Generous: a test does not measure how fast a busy machine is.
const RESUMED: Duration = Duration::from_secs(10);

/// How many runs of each id began, and how many came to their end.
#[derive(Clone, Default)]
struct Runs(Arc<Mutex<HashMap<String, (usize, usize)>>>);

impl Runs {
    fn began(&self, id: &str) {
        self.0.lock().unwrap().entry(id.to_owned()).or_default().0 += 1;
    }

    fn ended(&self, id: &str) {
        self.0.lock().unwrap().entry(id.to_owned()).or_default().1 += 1;
    }

    fn count(&self) -> (usize, usize) {
        self.0.lock().unwrap().values().fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
    }

    fn done(&self, id: &str) -> bool {
        self.0.lock().unwrap().get(id).is_some_and(|runs| runs.1 > 0)
    }
}

/// A consumer over a store on a server of its own.
struct Shop {
    broker: MemoryBroker,
    log: Recorder,
    runs: Runs,
    status: Status,
    stop: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
}

impl Shop {
    fn open(store: &Server) -> Self {
        let (broker, log, runs) = (MemoryBroker::new(), Recorder::new(), Runs::default());
        broker.declare(QUEUE);
        broker.declare(DEAD);
        let consumer = Consumer::new(broker.clone()).queue(queue(store, &log, &runs));
        let (status, stop) = (consumer.status(), CancellationToken::new());
        let task = tokio::spawn(consumer.run_until(stop.clone().cancelled_owned()));
        Self { broker, log, runs, status, stop, task }
    }

    fn queue(&self) -> QueueStatus {
        self.status.queue(QUEUE).unwrap_or_default()
    }

    /// No claim is about to start a handler, and no handler runs.
    fn stands_still(&self) -> bool {
        let latest: HashMap<u64, EventKind> =
            self.log.events().iter().map(|event| (event.delivery, event.kind)).collect();
        let (began, ended) = self.runs.count();
        began == ended
            && !latest.values().any(|kind| matches!(kind, EventKind::Claimed(_) | EventKind::Started))
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        until(what, || std::future::ready(holds(self))).await;
    }

    /// Every id has run, nothing is left, and every run beyond one is explained.
    async fn close(self, what: &str, ids: &[String]) -> Report {
        let drained = tokio::time::timeout(super::PATIENCE, self.broker.drained(QUEUE)).await;
        drained.unwrap_or_else(|_| panic!("not drained: {:?}", self.queue())).unwrap();
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
        let lost = ids.iter().filter(|id| !self.runs.done(id)).count();
        assert_eq!((lost, self.broker.depth(DEAD).unwrap()), (0, 0), "{what}: lost, with the dead letters");
        let report = Checker::new().lease(LEASE).check(&self.log.log());
        println!("{what}: {report}");
        report.assert_clean();
        report
    }
}

fn queue(store: &Server, log: &Recorder, runs: &Runs) -> Queue {
    let runs = runs.clone();
    Queue::new(QUEUE)
        .dead_letter(DEAD)
        .store_url(store.url())
        .lease(LEASE)
        .backoff(Backoff::new(Duration::from_millis(100), 1, Duration::from_millis(100)))
        .observer(log.observer())
        .handler(move |message: Message| {
            let runs = runs.clone();
            async move {
                let id = String::from_utf8_lossy(message.payload()).into_owned();
                runs.began(&id);
                sleep(Duration::from_millis(5)).await;
                runs.ended(&id);
                Ok(())
            }
        })
}

fn send(broker: &MemoryBroker, id: &str) {
    broker.send(QUEUE, Message::builder(id.to_owned()).transport_id(id.to_owned())).unwrap();
}

/// Sends new ids, and one in five twice, until it is stopped; what it has sent.
fn load(broker: MemoryBroker, stop: CancellationToken) -> JoinHandle<Vec<String>> {
    tokio::spawn(async move {
        let (mut ids, mut ticks) = (Vec::new(), interval(Duration::from_millis(10)));
        while !stop.is_cancelled() {
            ticks.tick().await;
            let id = format!("order-{}", ids.len());
            for _ in 0..=usize::from(ids.len() % 5 == 0) {
                send(&broker, &id);
            }
            ids.push(id);
        }
        ids
    })
}

/// Nothing runs while the store is away, and the status says why.
async fn stands_still(shop: &Shop, what: &str) {
    let away_since = Instant::now();
    shop.until("the queue is paused", |shop| shop.queue().state == State::Paused).await;
    println!("{what}: paused after {:?}", away_since.elapsed());
    assert_eq!(shop.queue().paused_by, Some(Cause::StoreDown));
    assert!(!shop.status.is_healthy());
    shop.until("what was claimed has run and ended", Shop::stands_still).await;
    let before = shop.runs.count();
    while away_since.elapsed() < OUTAGE {
        assert_eq!(shop.queue().paused_by, Some(Cause::StoreDown), "{what}");
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(shop.runs.count(), before, "{what}: a handler started while the store was away");
}

async fn a_stopped_store_pauses_the_queue(kind: Kind) {
    let what = format!("{kind:?} stopped for {OUTAGE:?}");
    let mut server = Server::start(kind).await;
    let shop = Shop::open(&server);
    let enough = CancellationToken::new();
    let load = load(shop.broker.clone(), enough.clone());
    shop.until("it works", |shop| shop.runs.count().1 >= 100).await;

    server.kill().await;
    shop.log.mark("server", Marker::StoreAway);
    stands_still(&shop, &what).await;
    let before = shop.runs.count().1;
    shop.log.mark("server", Marker::StoreBack);
    server.start_again().await;
    let back_since = Instant::now();
    shop.until("it works again", |shop| shop.runs.count().1 > before).await;
    let resumed = back_since.elapsed();
    println!("{what}: resumed {resumed:?} after its return");
    assert!(resumed < RESUMED, "{what}: resumed {resumed:?} after its return");
    shop.until("the status says so", |shop| shop.status.is_healthy()).await;

    enough.cancel();
    let ids = load.await.unwrap();
    shop.close(&what, &ids).await;
}

async fn a_store_that_loses_everything_suppresses_nothing(kind: Kind) {
    let what = format!("{kind:?} lost everything");
    let server = Server::start(kind).await;
    let shop = Shop::open(&server);
    let ids: Vec<String> = (0..400).map(|number| format!("order-{number}")).collect();
    for id in &ids {
        send(&shop.broker, id);
    }
    shop.until("it is in mid-run", |shop| shop.runs.count().1 >= 100).await;
    server.lose_everything().await;
    shop.log.mark("server", Marker::StoreLost(None));
    for id in &ids {
        send(&shop.broker, id);
    }
    let report = shop.close(&what, &ids).await;
    assert!(report.extra(Reason::RecordLost) >= 50, "{what}: what was done before ran again: {report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_is_killed_pauses_the_queue_until_it_is_back() {
    a_stopped_store_pauses_the_queue(Kind::Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_is_killed_pauses_the_queue_until_it_is_back() {
    a_stopped_store_pauses_the_queue(Kind::Postgres).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flushall_in_mid_run_suppresses_nothing() {
    a_store_that_loses_everything_suppresses_nothing(Kind::Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncate_in_mid_run_suppresses_nothing() {
    a_store_that_loses_everything_suppresses_nothing(Kind::Postgres).await;
}
