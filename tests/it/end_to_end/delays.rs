//! Delays over real brokers: between attempts, and those that a sender asks for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guestlist::delay::{DELIVER_AFTER, DELIVER_AT};
use guestlist::prelude::*;
use guestlist::{BoxFuture, Cause, State};

use super::{Running, unique};

/// No delay that was asked for may be shorter, nor much longer. How much exactly depends on the machine: the figures are printed.
const LATE: Duration = Duration::from_secs(1);
/// How often delays are measured before it is believed that they are too long by the code and not by the machine. The
/// first measurement also has RabbitMQ's hold queues made, which takes time once.
const MEASUREMENTS: usize = 4;

/// The header by which a test tells the messages apart that it sends together.
const SORT: &str = "sort";

/// One attempt: the message's sort, its number, when it started.
type Start = (String, u32, Instant);

/// Every attempt.
#[derive(Clone, Default)]
struct Timeline(Arc<Mutex<Vec<Start>>>);

impl Timeline {
    /// A handler that fails so often, and then succeeds.
    fn failing(
        &self,
        times: u32,
    ) -> impl Fn(Message, Attempt) -> BoxFuture<Result<(), Failure>> + Clone + use<> {
        let line = Arc::clone(&self.0);
        move |message: Message, Attempt(attempt): Attempt| {
            let sort = message.headers().get_str(SORT).unwrap_or_default().to_owned();
            line.lock().unwrap().push((sort, attempt, Instant::now()));
            let answer = if attempt <= times { Err(Failure::transient("not yet")) } else { Ok(()) };
            Box::pin(std::future::ready(answer))
        }
    }

    fn attempts(&self) -> Vec<u32> {
        self.0.lock().unwrap().iter().map(|(_, attempt, _)| *attempt).collect()
    }

    /// The attempts since this was asked before.
    fn take(&self) -> Vec<Start> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A delay that was measured.
struct Wait {
    what: String,
    found: Duration,
    asked: Duration,
}

impl Wait {
    fn new(what: impl Into<String>, found: Duration, asked: Duration) -> Self {
        Self { what: what.into(), found, asked }
    }

    /// By how much it was longer than asked for: it is never shorter.
    fn late(&self) -> Duration {
        let Self { what, found, asked } = self;
        let late = found.checked_sub(*asked);
        let late = late.unwrap_or_else(|| panic!("{what}: {found:?} is earlier than {asked:?}"));
        println!("{what}: asked for {asked:?}, found {found:?}, {late:?} late");
        late
    }
}

/// Measures until the best of each delay is in time: a busy machine makes some of them late, a wrong delay all of them.
async fn in_time(measure: impl AsyncFn() -> Vec<Wait>) {
    let mut best = BTreeMap::new();
    for _ in 0..MEASUREMENTS {
        for wait in measure().await {
            let late = wait.late();
            let best = best.entry(wait.what).or_insert(late);
            *best = late.min(*best);
        }
        if best.values().all(|late| *late < LATE) {
            return;
        }
    }
    panic!("late by {best:?} at best, of {MEASUREMENTS} measurements");
}

/// Once it consumes: what comes before is no delay of a message.
async fn consuming(url: &str, queue: Queue, name: &str) -> Running {
    let running = Running::start(url, queue, name).await;
    running.until("it consumes", |queue| queue.state == State::Running).await;
    running
}

/// Sends by this, and waits until so many more are handled.
async fn until_handled(running: &Running, more: u64, send: impl AsyncFnOnce()) {
    let all = running.status().handled + more;
    send().await;
    running.until("all are handled", |queue| queue.handled == all).await;
}

/// 300 ms, 900 ms, 2.7 s.
fn exact() -> Backoff {
    Backoff::new(Duration::from_millis(300), 3, Duration::from_secs(60)).without_jitter()
}

/// Fails three times and succeeds: four attempts, at the delays of the policy.
pub(super) async fn attempts_come_when_the_policy_says(
    url: &str,
    queue: Queue,
    name: &str,
    send: impl AsyncFn(&[(&str, String)]),
) {
    let line = Timeline::default();
    let running = consuming(url, queue.backoff(exact()).handler(line.failing(3)), name).await;
    in_time(async || {
        until_handled(&running, 1, async || send(&[]).await).await;
        assert_eq!(line.attempts(), [1, 2, 3, 4]);
        let starts = line.take();
        let waits = (1..).zip(starts.windows(2)).map(|(n, pair)| {
            Wait::new(format!("{name}: attempt {}", n + 1), pair[1].2 - pair[0].2, exact().delay(n))
        });
        waits.collect()
    })
    .await;
    running.stop().await;
}

/// Fails for ever: a dead letter after exactly as many attempts as there may be.
pub(super) async fn attempts_end_in_a_dead_letter(
    url: &str,
    queue: Queue,
    name: &str,
    send: impl AsyncFn(&[(&str, String)]),
) {
    let line = Timeline::default();
    let queue = queue.backoff(exact()).max_attempts(3).handler(line.failing(u32::MAX));
    let running = Running::start(url, queue, name).await;
    send(&[]).await;
    running.until("it is with the dead letters", |queue| queue.dead_letters.values().sum::<u64>() == 1).await;
    running.stop().await;
    assert_eq!(line.attempts(), [1, 2, 3]);
}

/// Neither early, nor an attempt, nor in the way of what comes behind it.
pub(super) async fn a_sender_chooses_the_time(
    url: &str,
    queue: Queue,
    name: &str,
    send: impl AsyncFn(&[(&str, String)]),
) {
    let line = Timeline::default();
    let running = consuming(url, queue.handler(line.failing(0)), name).await;
    in_time(async || {
        let begin = Instant::now();
        until_handled(&running, 3, async || {
            let at = std::time::SystemTime::now() + Duration::from_millis(2600);
            let at = at.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
            send(&[(SORT, "at".to_owned()), (DELIVER_AT, format!("{at:.3}"))]).await;
            send(&[(SORT, "after".to_owned()), (DELIVER_AFTER, "1400ms".to_owned())]).await;
            send(&[(SORT, "at once".to_owned())]).await;
        })
        .await;
        assert_eq!(line.attempts(), [1, 1, 1], "a wait is no attempt");
        // The header was rounded to the millisecond, after `begin`.
        let asked = [("at once", 0), ("after", 1400), ("at", 2599)];
        let starts = line.take();
        let waits = asked.map(|(sort, asked)| {
            let (_, _, start) = starts.iter().find(|start| start.0 == sort).unwrap();
            Wait::new(format!("{name}: {sort}"), *start - begin, Duration::from_millis(asked))
        });
        waits.into()
    })
    .await;
    running.stop().await;
}

/// It is parked with what is wrong with it, and never handled.
pub(super) async fn a_time_that_is_none_is_parked(
    url: &str,
    queue: Queue,
    name: &str,
    send: impl AsyncFn(&[(&str, String)]),
) {
    let line = Timeline::default();
    let running = Running::start(url, queue.handler(line.failing(0)), name).await;
    send(&[(DELIVER_AT, "tomorrow, perhaps".to_owned())]).await;
    running.until("it is with the dead letters", |queue| queue.dead_letters.values().sum::<u64>() == 1).await;
    running.stop().await;
    assert_eq!(line.attempts(), [0; 0]);
}

#[tokio::test]
async fn in_memory() {
    in_time(async || vec![a_delay_in_memory().await]).await;
}

async fn a_delay_in_memory() -> Wait {
    use guestlist::Consumer;
    use guestlist::broker::memory::MemoryBroker;

    let broker = MemoryBroker::new();
    for place in ["delays", "delays.dead"] {
        broker.declare(place);
    }
    let line = Timeline::default();
    let queue = Queue::new("delays").dead_letter("delays.dead").max_age(MINUTE).handler(line.failing(0));
    let send = |id: &str, header: &str, value: String| {
        let message =
            Message::builder(id.to_owned()).transport_id(id.to_owned()).header(header.to_owned(), value);
        broker.send("delays", message).unwrap();
    };
    let begin = Instant::now();
    send("later", DELIVER_AFTER, "0.8".to_owned());
    send("never", DELIVER_AFTER, "soon".to_owned());
    let stop = broker.clone();
    let until_empty = async move { stop.drained("delays").await.unwrap() };
    Consumer::new(broker.clone()).queue(queue).run_until(until_empty).await.unwrap();
    assert_eq!(line.attempts(), [1]);
    let letters = broker.messages("delays.dead").unwrap();
    let record = guestlist::broker::copy::DeadLetter::read(&letters[0]).unwrap();
    assert_eq!((letters.len(), record.cause.as_str()), (1, Cause::Undecodable.name()));
    assert!(record.error.contains("deliver-after") && !record.error.contains("soon"), "{}", record.error);
    Wait::new("memory", line.take()[0].2 - begin, Duration::from_millis(800))
}

#[cfg(feature = "amqp")]
pub(super) mod amqp {
    use guestlist::broker::amqp::lapin::BasicProperties;
    use guestlist::broker::amqp::lapin::types::{AMQPValue, FieldTable, ShortString};

    use super::super::amqp::{KINDS, Stranger, url};
    use super::super::until;
    use super::*;

    pub(in super::super) async fn send(stranger: &Stranger, queue: &str, headers: &[(&str, String)]) {
        let mut table = FieldTable::default();
        for (name, value) in headers {
            table.insert(ShortString::from(*name), AMQPValue::LongString(value.as_str().into()));
        }
        let id = unique("m");
        let properties = BasicProperties::default().with_message_id(id.as_str().into()).with_headers(table);
        stranger.publish("", queue, &id, properties).await;
    }

    pub(in super::super) async fn queue_of(stranger: &Stranger, kind: &str) -> (Queue, String) {
        let name = unique(kind);
        stranger.declare(&name, kind).await;
        stranger.declare(&format!("{name}.dead"), kind).await;
        (Queue::new(name.as_str()).dead_letter(format!("{name}.dead")), name)
    }

    macro_rules! over_both_kinds {
        ($($case:ident)+) => {$(
            #[tokio::test]
            async fn $case() {
                for kind in KINDS {
                    let stranger = Stranger::new().await;
                    let (queue, name) = queue_of(&stranger, kind).await;
                    super::$case(&url(), queue, &name, async |headers| send(&stranger, &name, headers).await).await;
                }
            }
        )+};
    }

    over_both_kinds! {
        attempts_come_when_the_policy_says
        attempts_end_in_a_dead_letter
        a_sender_chooses_the_time
        a_time_that_is_none_is_parked
    }

    /// A long delay is kept by the broker in the longest step that fits, and holds up nothing.
    #[tokio::test]
    async fn a_long_delay_waits_in_a_long_step() {
        let stranger = Stranger::new().await;
        let (queue, name) = queue_of(&stranger, "quorum").await;
        let line = Timeline::default();
        let running = Running::start(&url(), queue.handler(line.failing(0)), &name).await;
        send(&stranger, &name, &[(DELIVER_AFTER, "3h".to_owned())]).await;
        send(&stranger, &name, &[(DELIVER_AFTER, "300 days".to_owned())]).await;
        send(&stranger, &name, &[]).await;
        running.until("the one that is due is handled", |queue| queue.handled == 1).await;
        for step in [8_192_000, 2_097_152_000_u64] {
            let hold = format!("{name}.hold.{step}ms");
            until("it waits there", || async { stranger.ready_if_there(&hold).await == Some(1) }).await;
        }
        running.stop().await;
        assert_eq!(line.attempts().len(), 1);
    }

    /// The step of a delay cannot be made: the shortest one serves, and nothing is lost.
    #[tokio::test]
    async fn without_a_queue_for_its_step_a_message_goes_round_by_the_shortest() {
        let stranger = Stranger::new().await;
        let (queue, name) = queue_of(&stranger, "quorum").await;
        // Of other arguments than ours: it can be neither made nor used.
        stranger.declare(&format!("{name}.hold.2000ms"), "classic").await;
        let line = Timeline::default();
        let running = consuming(&url(), queue.handler(line.failing(0)), &name).await;
        in_time(async || {
            let begin = Instant::now();
            let delayed = [(DELIVER_AFTER, "2s".to_owned())];
            until_handled(&running, 1, async || send(&stranger, &name, &delayed).await).await;
            let starts = line.take();
            assert_eq!(starts.len(), 1);
            vec![Wait::new("by the shortest step", starts[0].2 - begin, Duration::from_secs(2))]
        })
        .await;
        running.stop().await;
        assert_eq!(stranger.ready(&format!("{name}.hold.2000ms")).await, 0);
    }

    /// A delay drawn at random is a step, so it takes one hop and one claim.
    #[tokio::test]
    async fn a_random_delay_takes_one_hop() {
        let stranger = Stranger::new().await;
        let (queue, name) = queue_of(&stranger, "classic").await;
        let (line, log) = (Timeline::default(), guestlist::testing::Recorder::new());
        let random = Backoff::new(Duration::from_secs(3), 1, Duration::from_secs(3));
        let queue = queue.backoff(random).observer(log.observer()).handler(line.failing(2));
        let running = Running::start(&url(), queue, &name).await;
        send(&stranger, &name, &[]).await;
        running.until("it is handled", |queue| queue.handled == 1).await;
        running.stop().await;
        assert_eq!(line.attempts(), [1, 2, 3]);
        let deliveries = log.count(|kind| *kind == guestlist::EventKind::Received);
        assert_eq!(deliveries, 3, "no hop but those between the attempts");
    }
}

#[cfg(feature = "nats")]
pub(super) mod nats {
    use guestlist::broker::NatsOptions;
    use guestlist::broker::nats::async_nats::HeaderMap;
    use guestlist::broker::nats::async_nats::jetstream::message::PublishMessage;

    use super::super::nats::{Stranger, dead, url};
    use super::*;

    pub(in super::super) async fn send(stranger: &Stranger, subject: &str, headers: &[(&str, String)]) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.as_str());
        }
        let id = unique("m");
        let message = PublishMessage::build().headers(map).message_id(&id).payload(id.clone().into());
        stranger.0.send_publish(subject.to_owned(), message).await.unwrap().await.unwrap();
    }

    /// By `-NAK`, and by copies in the durable's own stream.
    macro_rules! over_jetstream {
        ($($case:ident)+) => {$(
            #[tokio::test]
            async fn $case() {
                let copies = NatsOptions::new().long_delay(Duration::from_millis(500));
                for options in [NatsOptions::new(), copies] {
                    let name = unique("nats");
                    let stranger = Stranger::with_dead_letters(&name).await;
                    let queue = Queue::new(name.as_str()).dead_letter(dead(&name)).nats(options);
                    super::$case(&url(), queue, &name, async |headers| send(&stranger, &name, headers).await).await;
                }
            }
        )+};
    }

    over_jetstream! {
        attempts_come_when_the_policy_says
        attempts_end_in_a_dead_letter
        a_sender_chooses_the_time
        a_time_that_is_none_is_parked
    }
}
