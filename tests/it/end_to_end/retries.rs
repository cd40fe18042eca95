//! Retries over every broker: as many as the policy says, when it says, and seen by nobody else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guestlist::broker::amqp::lapin::ExchangeKind;
use guestlist::broker::copy;
use guestlist::prelude::*;
use guestlist::{BoxFuture, Handled, QueueStatus};

use super::{Ledger, Running, third_time_lucky};
use crate::support::ground::{Ground, KEY, Kind, Letter, Sent, over_all_brokers};

/// 200 ms, 600 ms, 1.8 s.
const STEPS: [Duration; 3] =
    [Duration::from_millis(200), Duration::from_millis(600), Duration::from_millis(1800)];
const MAX_ATTEMPTS: u32 = 4;
/// Messages of each sort. Their best counts: a busy machine makes some of them late, a wrong delay all of them.
const SAMPLES: usize = 5;
/// How often the whole measurement is made before its result is believed to be the code's and not the machine's.
const MEASUREMENTS: usize = 3;

fn exact() -> Backoff {
    Backoff::new(STEPS[0], 3, Duration::from_secs(60)).without_jitter()
}

/// What may be added to a delay.
fn tolerance(delay: Duration) -> Duration {
    delay / 10 + Duration::from_millis(100)
}

/// One message's attempts, and when they began.
type Line = Vec<(u32, Instant)>;

/// That of each message, by its body.
#[derive(Clone, Default)]
struct Timeline(Arc<Mutex<HashMap<String, Line>>>);

/// How often a handler is to fail with a message of this body: `<times>-<number>`.
fn failures(body: &str) -> u32 {
    body.split('-').next().unwrap().parse().unwrap()
}

impl Timeline {
    fn handler(&self) -> impl Fn(Message, Attempt) -> BoxFuture<Handled> + Clone + use<> {
        let line = self.clone();
        move |message: Message, Attempt(attempt): Attempt| {
            let body = String::from_utf8(message.payload().to_vec()).unwrap();
            let fails = attempt <= failures(&body);
            line.0.lock().unwrap().entry(body).or_default().push((attempt, Instant::now()));
            let answer = if fails { Err(Failure::transient("not yet")) } else { Ok(()) };
            Box::pin(std::future::ready(answer))
        }
    }

    fn attempts(&self, body: &str) -> Vec<u32> {
        self.0.lock().unwrap()[body].iter().map(|(attempt, _)| *attempt).collect()
    }

    /// How late each message was after its nth failure.
    fn late(&self, n: usize) -> Vec<Duration> {
        let lines = self.0.lock().unwrap();
        let waits = lines.values().filter_map(|line| Some(line.get(n + 1)?.1 - line[n].1));
        waits
            .map(|wait| {
                let late = wait.checked_sub(STEPS[n]);
                late.unwrap_or_else(|| panic!("{wait:?} is earlier than {:?}", STEPS[n]))
            })
            .collect()
    }

    /// Whether the best of the messages kept each delay, within the tolerance.
    fn in_time(&self, kind: Kind) -> bool {
        let mut in_time = true;
        for (n, step) in STEPS.into_iter().enumerate() {
            let mut late = self.late(n);
            late.sort_unstable();
            let (best, median, worst) = (late[0], late[late.len() / 2], late[late.len() - 1]);
            println!(
                "{kind:?}: {step:?} was late by {best:?} at best, {median:?}, {worst:?} at worst, of {}",
                late.len()
            );
            in_time &= best <= tolerance(step);
        }
        in_time
    }
}

/// Five messages each that fail no time, once, twice and three times, and five that always fail.
fn bodies() -> impl Iterator<Item = String> {
    (0..=MAX_ATTEMPTS).flat_map(|times| (0..SAMPLES).map(move |number| format!("{times}-{number}")))
}

/// Attempts and ends are right in every measurement; whether they were in time is the answer.
async fn measure(kind: Kind) -> bool {
    let (ground, line) = (Ground::new(kind, "retries").await, Timeline::default());
    let queue = ground.queue().backoff(exact()).max_attempts(MAX_ATTEMPTS).handler(line.handler());
    let running = Running::start(&ground.url(), queue.concurrency(32), &ground.name).await;
    // The first one has RabbitMQ's hold queues made, which takes time once, and not at each delay.
    ground.send(Sent::new("3-0", "3-0")).await;
    running.until("the first delay is over", |queue| queue.failures.get("transient") >= Some(&2)).await;
    for body in bodies().filter(|body| body != "3-0") {
        ground.send(Sent::new(&body, body.as_str())).await;
    }
    let samples = SAMPLES as u64;
    let all = |queue: &QueueStatus| queue.handled + queue.dead_letters.values().sum::<u64>() >= 5 * samples;
    running.until("each has its end", all).await;
    let status = running.stop().await;

    assert_eq!(
        (status.handled, status.dead_letters.get("exhausted")),
        (4 * samples, Some(&samples)),
        "{status:?}"
    );
    for body in bodies() {
        let attempts: Vec<u32> = (1..=MAX_ATTEMPTS.min(failures(&body) + 1)).collect();
        assert_eq!(line.attempts(&body), attempts, "{kind:?}: {body}");
    }
    ground.is_drained(&STEPS).await;
    let letters = ground.letters().await;
    assert_eq!(letters.len(), SAMPLES, "{kind:?}");
    assert!(
        letters.iter().all(|letter| letter.header(copy::ATTEMPT) == "4" && letter.body.starts_with(b"4-"))
    );
    line.in_time(kind)
}

async fn attempts_are_as_many_as_the_policy_says_and_come_when_it_says(kind: Kind) {
    for _ in 0..MEASUREMENTS {
        if measure(kind).await {
            return;
        }
    }
    panic!("{kind:?}: in none of {MEASUREMENTS} measurements was one message in time at each step");
}

over_all_brokers! { attempts_are_as_many_as_the_policy_says_and_come_when_it_says }

/// One that is handled at its third attempt, one that is parked after its third, one that is parked at once.
async fn three_ends(ground: &Ground, send: impl AsyncFn(Sent)) {
    let ledger = Ledger::default();
    let lucky = third_time_lucky(&ledger);
    let handler = move |message: Message, attempt: Attempt| -> BoxFuture<Handled> {
        match &message.payload()[..] {
            b"refused" => Box::pin(std::future::ready(Err(Failure::permanent("never")))),
            b"unlucky" => Box::pin(std::future::ready(Err(Failure::transient("not yet")))),
            _ => Box::pin(lucky(message, attempt)),
        }
    };
    let backoff = Backoff::new(STEPS[0], 1, STEPS[0]).without_jitter();
    let queue = ground.queue().max_attempts(3).backoff(backoff).handler(handler);
    let running = Running::start(&ground.url(), queue, &ground.name).await;
    for body in ["lucky", "unlucky", "refused"] {
        send(Sent::new(body, body)).await;
    }
    let ended = |queue: &QueueStatus| queue.handled == 1 && queue.dead_letters.values().sum::<u64>() == 2;
    running.until("each has its end", ended).await;
    running.stop().await;
    assert_eq!(ledger.runs("lucky"), 3);
    ground.is_drained(&STEPS).await;
    assert_eq!(ground.letters_count().await, 2);
}

const SENT: [&str; 3] = ["lucky", "unlucky", "refused"];

/// What others see: the originals, once each, with nothing of ours on them.
fn only_originals(what: &str, seen: &[Letter]) {
    let bodies: Vec<_> = seen.iter().map(|message| String::from_utf8_lossy(&message.body)).collect();
    assert_eq!(bodies, SENT, "{what}");
    let ours =
        seen.iter().flat_map(|message| message.headers.keys()).find(|name| name.starts_with(copy::PREFIX));
    assert_eq!(ours, None, "{what}");
}

async fn by_an_exchange(kind: Kind, exchange: ExchangeKind, pattern: &str) {
    let ground = Ground::new(kind, "mine").await;
    let (others, by) = (format!("{}-others", ground.name), format!("{}-{exchange:?}", ground.name));
    ground.declare(&others).await;
    ground.exchange(exchange, &by, pattern, &[&ground.name, &others]).await;
    three_ends(&ground, async |sent| ground.publish(&by, KEY, &sent).await).await;
    only_originals(&format!("{kind:?}, {by}"), &ground.messages(&others).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_queues_of_the_same_exchange_see_neither_retries_nor_dead_letters() {
    tokio::join!(
        by_an_exchange(Kind::Classic, ExchangeKind::Fanout, ""),
        by_an_exchange(Kind::Classic, ExchangeKind::Topic, "#"),
        by_an_exchange(Kind::Quorum, ExchangeKind::Fanout, ""),
        by_an_exchange(Kind::Quorum, ExchangeKind::Topic, "#"),
    );
}

/// A stream that keeps its messages for everybody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_durables_of_the_same_stream_see_neither_retries_nor_dead_letters() {
    let ground = Ground::for_everybody("mine").await;
    let others = ground.another_durable("others").await;
    three_ends(&ground, async |sent| ground.send(sent).await).await;
    assert_eq!(ground.waiting_for(&others).await, SENT.len() as u64);
    only_originals("JetStream", &ground.messages(&ground.name).await);
}
