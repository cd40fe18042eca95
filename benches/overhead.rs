//! What each layer costs per delivery: `cargo bench --bench overhead`
//!
//! Prints nanoseconds and allocations for the bare handler and with one layer more in each row, then deliveries per
//! second of a whole consumer. The handler does nothing, so that all of the time is ours or the message's own; one
//! that asks a database takes a thousand times as long.
//!
//! How it measures: every row runs in pairs with the bare handler, which goes first in every other pair, and the
//! order of the rows rotates. A run has a store and a runtime of its own. Both are dropped after the clock of *both*
//! runs of a pair has stopped, and an unmeasured run comes before the next pair: dropping a store gives its pages
//! back, and whoever runs next pays for them. The figures are medians over the pairs. Nothing here fails for being slow.

#![expect(clippy::cast_precision_loss, reason = "counts and nanoseconds far below 2^52")]

use std::any::Any;
use std::future::poll_fn;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guestlist::broker::memory::MemoryBroker;
use guestlist::broker::{Broker, QueueSpec};
use guestlist::dead_letter::DeadLetterLayer;
use guestlist::dedup::{DedupLayer, MemoryStore};
use guestlist::redeliver::RedeliverLayer;
use guestlist::retry::RetryLayer;
use guestlist::trace::TraceLayer;
use guestlist::{BoxError, Consumer, Disposition, Failure, HandlerService, Message, Queue, defaults};
use tokio::runtime::{Builder, Runtime};
use tower::limit::ConcurrencyLimitLayer;
use tower::timeout::TimeoutLayer;
use tower::{Service, ServiceBuilder, ServiceExt};

/// Deliveries in one run.
const DELIVERIES: usize = 10_000;
/// Pairs behind each median.
const PAIRS: usize = 21;
/// The same for whole consumers.
const CONSUMER_DELIVERIES: usize = 30_000;
const CONSUMER_PAIRS: usize = 9;

fn main() {
    println!(
        "nanoseconds a worker spends on one delivery; medians of {PAIRS} pairs of {DELIVERIES} deliveries"
    );
    for workers in [1, 2] {
        for ids in [Ids::New, Ids::Done] {
            layers(Setting { workers, ids });
        }
    }
    println!("\ndeliveries per second over the in-memory broker; medians of {CONSUMER_PAIRS} runs");
    for workers in [1, 2] {
        consumers(workers);
    }
}

/// Whether the ids were seen before.
#[derive(Clone, Copy, PartialEq)]
enum Ids {
    New,
    /// Every delivery is a duplicate.
    Done,
}

#[derive(Clone, Copy)]
struct Setting {
    /// 1: a current-thread runtime.
    workers: usize,
    ids: Ids,
}

// ---------------------------------------------------------------- layers

type Measure = Box<dyn Fn(Setting) -> Sample>;

/// One row of the table: a stack.
struct Row {
    name: &'static str,
    measure: Measure,
}

/// One run, with all that must outlive the other clock of the pair.
struct Sample {
    nanos: f64,
    /// Of the deliveries only, and only on a current-thread runtime: the counter counts per thread.
    allocations: f64,
    _alive: Box<dyn Any>,
}

async fn handler(_: Message) -> Result<(), Failure> {
    Ok(())
}

fn service() -> impl Measured<Response = ()> {
    HandlerService::new(handler)
}

/// What all rows are: the handler's service, or a stack around it.
trait Measured:
    Service<Message, Response: Send, Error = BoxError, Future: Send> + Clone + Send + 'static
{
}

impl<S> Measured for S where
    S: Service<Message, Response: Send, Error = BoxError, Future: Send> + Clone + Send + 'static
{
}

fn rows() -> Vec<Row> {
    let stack = ServiceBuilder::new;
    let dedup = |store| DedupLayer::new(store, "bench");
    let limit = || ConcurrencyLimitLayer::new(defaults::CONCURRENCY);
    let retry = || RetryLayer::new(defaults::TRIES);
    let timeout = || TimeoutLayer::new(Duration::from_secs(20));
    let redeliver = RedeliverLayer::new;
    let dead_letter = || DeadLetterLayer::new(Arc::new(MemoryBroker::new()), "dead");
    let trace = TraceLayer::new;
    let run =
        move |s| stack().layer(dedup(s)).layer(limit()).layer(retry()).layer(timeout()).service(service());
    vec![
        row("bare handler", |_| service()),
        row("+ dedup, memory store", move |s| stack().layer(dedup(s)).service(service())),
        row("+ concurrency limit", move |s| stack().layer(dedup(s)).layer(limit()).service(service())),
        row("+ retry", move |s| stack().layer(dedup(s)).layer(limit()).layer(retry()).service(service())),
        row("+ timeout", run),
        row("+ redeliver", move |s| stack().layer(redeliver()).service(run(s))),
        row("+ dead_letter", move |s| stack().layer(dead_letter()).layer(redeliver()).service(run(s))),
        row("+ trace, off", move |s| {
            stack().layer(trace()).layer(dead_letter()).layer(redeliver()).service(run(s))
        }),
    ]
}

fn row<S: Measured>(name: &'static str, stack: impl Fn(MemoryStore) -> S + 'static) -> Row {
    Row { name, measure: Box::new(move |setting| measure(&stack, setting)) }
}

fn measure<S: Measured>(stack: impl Fn(MemoryStore) -> S, setting: Setting) -> Sample {
    let runtime = runtime(setting.workers);
    let entered = runtime.enter();
    let stack = stack(MemoryStore::new());
    drop(entered);
    if setting.ids == Ids::Done {
        runtime.block_on(deliver(stack.clone(), 0, DELIVERIES));
    }
    let mut took = Duration::ZERO;
    let counted =
        allocation_counter::measure(|| took = runtime.block_on(timed(stack.clone(), setting.workers)));
    Sample {
        nanos: per_delivery(took.as_nanos() as f64) * setting.workers as f64,
        allocations: per_delivery(counted.count_total as f64),
        _alive: Box::new((stack, runtime)),
    }
}

/// Each worker has a caller with its share of the deliveries.
async fn timed<S: Measured>(stack: S, workers: usize) -> Duration {
    let begin = Instant::now();
    if workers == 1 {
        deliver(stack, 0, DELIVERIES).await;
        return begin.elapsed();
    }
    let share = DELIVERIES / workers;
    let callers: Vec<_> =
        (0..workers).map(|n| tokio::spawn(deliver(stack.clone(), n * share, share))).collect();
    for caller in callers {
        caller.await.unwrap();
    }
    begin.elapsed()
}

async fn deliver<S: Measured>(mut stack: S, first: usize, count: usize) {
    for n in first..first + count {
        let answer = stack.ready().await.unwrap().call(message(n)).await;
        drop(black_box(answer.unwrap()));
    }
}

/// Made as a broker would, in the loop: part of every row.
fn message(n: usize) -> Message {
    Message::builder("{}").transport_id(format!("order-{n:08}")).build()
}

fn runtime(workers: usize) -> Runtime {
    let mut builder = if workers == 1 { Builder::new_current_thread() } else { Builder::new_multi_thread() };
    builder.worker_threads(workers).enable_all().build().unwrap()
}

fn per_delivery(total: f64) -> f64 {
    total / DELIVERIES as f64
}

// ---------------------------------------------------------------- pairs

/// What the pairs of one row came to. The first row is paired with itself, as a control.
#[derive(Default)]
struct Pairs {
    nanos: Vec<f64>,
    added: Vec<f64>,
    ratio: Vec<f64>,
    allocations: f64,
}

fn layers(setting: Setting) {
    let rows = rows();
    let mut pairs: Vec<Pairs> = rows.iter().map(|_| Pairs::default()).collect();
    for round in 0..PAIRS {
        for n in 0..rows.len() {
            let row = (n + round) % rows.len();
            pair(&rows[0], &rows[row], setting, round, &mut pairs[row]);
        }
    }
    print_layers(setting, &rows, &pairs);
}

fn pair(bare: &Row, row: &Row, setting: Setting, round: usize, pairs: &mut Pairs) {
    (bare.measure)(setting);
    let (bare, row) = if round.is_multiple_of(2) {
        let bare = (bare.measure)(setting);
        (bare, (row.measure)(setting))
    } else {
        let row = (row.measure)(setting);
        ((bare.measure)(setting), row)
    };
    pairs.nanos.push(row.nanos);
    pairs.added.push(row.nanos - bare.nanos);
    pairs.ratio.push(row.nanos / bare.nanos);
    pairs.allocations = row.allocations;
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn print_layers(setting: Setting, rows: &[Row], pairs: &[Pairs]) {
    let ids = if setting.ids == Ids::New { "new ids" } else { "duplicates only" };
    println!("\n{}, {ids}", runtime_name(setting.workers));
    println!("{:24} {:>8} {:>8} {:>7} {:>12}", "", "ns", "added", "ratio", "allocations");
    for (row, pairs) in rows.iter().zip(pairs) {
        let (nanos, added, ratio) = (median(&pairs.nanos), median(&pairs.added), median(&pairs.ratio));
        // The counter counts the thread that it is called on.
        let allocations =
            if setting.workers == 1 { format!("{:.1}", pairs.allocations) } else { String::new() };
        println!("{:24} {nanos:8.0} {added:+8.0} {ratio:6.1}x {allocations:>12}", row.name);
    }
}

fn runtime_name(workers: usize) -> String {
    if workers == 1 {
        "current-thread runtime".to_owned()
    } else {
        format!("{workers} workers, {workers} callers")
    }
}

// ---------------------------------------------------------------- consumers

const QUEUE: &str = "orders";

/// A hand-written loop without dedup, and a whole consumer, over the same broker.
fn consumers(workers: usize) {
    let (mut bare, mut new, mut done) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..CONSUMER_PAIRS {
        let mut by_hand = || bare.push(per_second(workers, bare_loop));
        let mut consumer = || {
            let store = MemoryStore::new();
            new.push(per_second(workers, |broker| consumer(broker, store.clone())));
            done.push(per_second(workers, |broker| consumer(broker, store.clone())));
        };
        if round.is_multiple_of(2) {
            by_hand();
            consumer();
        } else {
            consumer();
            by_hand();
        }
    }
    println!("\n{}", runtime_name(workers).split(',').next().unwrap_or_default());
    for (name, runs) in [("bare loop", &bare), ("consumer, new ids", &new), ("consumer, duplicates", &done)] {
        let rate = median(runs);
        println!("{name:24} {rate:10.0} {:6.2}x", rate / median(&bare));
    }
}

fn per_second<F: Future<Output = ()> + Send>(workers: usize, consume: impl FnOnce(MemoryBroker) -> F) -> f64 {
    let runtime = runtime(workers);
    let broker = MemoryBroker::new();
    broker.declare(QUEUE);
    for n in 0..CONSUMER_DELIVERIES {
        broker.send(QUEUE, Message::builder("{}").transport_id(format!("order-{n:08}"))).unwrap();
    }
    let begin = Instant::now();
    runtime.block_on(consume(broker));
    CONSUMER_DELIVERIES as f64 / begin.elapsed().as_secs_f64()
}

/// What a team has before: receive, handle, ack, one after the other.
async fn bare_loop(broker: MemoryBroker) {
    let mut service = service();
    let mut subscription = broker.subscribe(&QueueSpec::new(QUEUE)).await.unwrap();
    for _ in 0..CONSUMER_DELIVERIES {
        let delivery = poll_fn(|cx| subscription.poll_next(cx, 1)).await.unwrap().unwrap();
        let (message, acker) = delivery.into_parts();
        service.ready().await.unwrap().call(message).await.unwrap();
        acker.settle(Disposition::Ack).await.unwrap();
    }
}

async fn consumer(broker: MemoryBroker, store: MemoryStore) {
    let queue = Queue::new(QUEUE).declare().dead_letter("orders.dead").handler(handler);
    let consumer = Consumer::new(broker.clone()).store(store).queue(queue);
    consumer.run_until(async { broker.drained(QUEUE).await.unwrap() }).await.unwrap();
}
