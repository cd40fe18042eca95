//! Every cause that a message can be parked for, over every broker: the letter says why, how often it was tried and
//! where it came from, and is the message that was sent; the original is acked.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use guestlist::broker::copy;
use guestlist::dedup::protocol::{Ask, Token};
use guestlist::dedup::{DedupStore, Suspects};
use guestlist::prelude::*;
use guestlist::testing::Recorder;
use guestlist::{Cause, EventKind, Handled, Scope};
use serde::Deserialize;
use tokio::time::sleep;

use super::{Ledger, Running, counting};
use crate::support::ground::{Ground, KEY, Kind, Letter, Sent, over_all_brokers};

/// Where a message without a transport id may still have one.
const ORDER_ID: &str = "order-id";
const TIMEOUT: Duration = Duration::from_millis(200);
const BACKOFF: Duration = Duration::from_millis(100);
const MAX_RUN: Duration = Duration::from_millis(300);
const MAX_AGE: Duration = Duration::from_millis(500);
const HOUR: Duration = Duration::from_secs(3600);

/// Why something is with the dead letters.
struct Case {
    /// What the handler is told to do, and the id, unless the case is about that.
    what: &'static str,
    cause: Cause,
    /// The number on the letter: that of the last claim, or 1 if there was none.
    attempt: u32,
    error: &'static str,
}

const fn case(what: &'static str, cause: Cause, attempt: u32, error: &'static str) -> Case {
    Case { what, cause, attempt, error }
}

/// Of a queue that tries twice. What the last attempt failed of is in the error: a panic, a timeout and an error are
/// all `exhausted`.
const CASES: [Case; 11] = [
    case("refuse", Cause::Permanent, 1, "no such account"),
    case("refuse", Cause::Parked, 1, "this id is with the dead letters; a redrive would run it again"),
    case("fail", Cause::Exhausted, 2, "the bank is\\r\\naway"),
    case("panic", Cause::Exhausted, 2, "the handler panicked: two and two is five"),
    case("hang", Cause::Exhausted, 2, "request timed out"),
    case("crashed", Cause::CrashSuspected, 3, "2 attempts were made, and the last holder vanished"),
    case("unreadable", Cause::Undecodable, 1, "the body is JSON that ends early (line 1, column 1)"),
    case("without an id", Cause::MissingId, 1, "no id: none of the queue's id sources found one"),
    case("with a long id", Cause::InvalidId, 1, "the id has 5000 bytes, more than 4096"),
    case("with another body", Cause::IdConflict, 1, "this id was seen with another body"),
    case("with an id that panics", Cause::Panic, 1, "an id source of the queue panicked"),
];

#[derive(Deserialize)]
struct Task {
    what: String,
}

async fn work(Json(task): Json<Task>) -> Handled {
    match task.what.as_str() {
        "refuse" => Err(Failure::permanent("no such account")),
        "fail" => Err(Failure::transient("the bank is\r\naway")),
        "panic" => panic!("two and two is five"),
        "hang" => std::future::pending().await,
        _ => Ok(()),
    }
}

fn body(what: &str) -> String {
    match what {
        "unreadable" => "{".to_owned(),
        what => format!(r#"{{"what": "{what}", "text": "né\u0000 "}}"#),
    }
}

/// As its sender made it.
fn message(what: &str) -> Sent {
    let sent = match what {
        "without an id" => Sent::without_id(body(what)),
        "with a long id" => Sent::without_id(body(what)).header(ORDER_ID, &"7".repeat(5000)),
        "with an id that panics" => Sent::new(what, body(what)).header("boom", "now"),
        what => Sent::new(what, body(what)),
    };
    Sent { content_type: Some("application/json".to_owned()), ..sent.header("tenant", "17") }
}

fn identity() -> Identity {
    Identity::none().header(ORDER_ID).with(|message| {
        assert!(message.headers().get("boom").is_none(), "boom");
        message.transport_id().cloned()
    })
}

fn policy(ground: &Ground) -> Queue {
    ground.queue().max_attempts(2).backoff(Backoff::new(BACKOFF, 1, BACKOFF).without_jitter())
}

/// An id whose holders vanished, twice: as a store remembers it.
async fn crash_twice(store: &MemoryStore, id: &str) {
    let key = Scope::new("", "causes").key(&MessageId::new(id.to_owned()).unwrap());
    for _ in 0..2 {
        let lease = Duration::from_millis(10);
        let ask = Ask { alone: true, ..Ask::new(Token::random(), lease, HOUR) };
        store.claim(&key, &ask).await.unwrap();
        sleep(lease * 2).await;
    }
}

/// The letter is the message, and says why it is here.
fn judge(ground: &Ground, case: &Case, letter: &Letter) {
    let (what, header) = (format!("{:?}, {}", ground.kind, case.what), |name| letter.header(name).to_owned());
    assert_eq!(String::from_utf8_lossy(&letter.body), body(case.what), "{what}");
    assert_eq!(header("tenant"), "17", "{what}");
    assert_eq!(letter.content_type.as_deref(), Some("application/json"), "{what}");
    assert_eq!(header(copy::CAUSE), case.cause.name(), "{what}");
    assert_eq!(header(copy::ATTEMPT), case.attempt.to_string(), "{what}");
    assert_eq!(header(copy::ERROR), case.error, "{what}");
    assert_eq!(id_on(letter), id_of(case.what), "{what}");
    comes_from(ground, &what, letter);
    let failed_at = UNIX_EPOCH + Duration::from_secs(header(copy::FAILED_AT).parse().unwrap());
    assert!(SystemTime::now().duration_since(failed_at).unwrap() < HOUR, "{what}: {failed_at:?}");
}

/// The id that dedup found, or the transport's where dedup did not get that far.
fn id_on(letter: &Letter) -> String {
    let known = letter.headers.get(copy::ID).or_else(|| letter.headers.get(copy::TRANSPORT_ID));
    let id = copy::decode(known.map_or("", String::as_str).as_bytes());
    String::from_utf8(id.to_vec()).unwrap()
}

fn id_of(what: &str) -> String {
    if ["without an id", "with a long id"].contains(&what) { String::new() } else { what.to_owned() }
}

fn comes_from(ground: &Ground, what: &str, letter: &Letter) {
    let (name, exchange) = (ground.name.as_str(), ground.exchange_name());
    let expected = match ground.kind {
        Kind::JetStream => [
            (copy::SYSTEM, "nats"),
            (copy::QUEUE, name),
            (copy::STREAM, name),
            (copy::ROUTING_KEY, name),
            (copy::EXCHANGE, "(none)"),
        ],
        _ => [
            (copy::SYSTEM, "rabbitmq"),
            (copy::QUEUE, name),
            (copy::EXCHANGE, &exchange),
            (copy::ROUTING_KEY, KEY),
            (copy::STREAM, "(none)"),
        ],
    };
    for (field, value) in expected {
        assert_eq!(letter.header(field), value, "{what}: {field}");
    }
    let sequence = letter.header(copy::SEQUENCE).parse::<u64>().is_ok();
    assert_eq!(sequence, ground.kind == Kind::JetStream, "{what}: the sequence");
}

/// Waits for so many dead letters; then nothing is left with the queue.
async fn parks(running: Running, ground: &Ground, count: usize) -> Vec<Letter> {
    let all = |queue: &guestlist::QueueStatus| queue.dead_letters.values().sum::<u64>() >= count as u64;
    running.until("all are with the dead letters", all).await;
    let status = running.stop().await;
    ground.is_drained(&[BACKOFF]).await;
    let letters = ground.letters().await;
    assert_eq!(letters.len(), count, "{:?}: {status:?}", ground.kind);
    letters
}

async fn every_cause_is_told_by_a_letter_that_is_true_to_its_message(kind: Kind) {
    let (ground, store, log) = (Ground::new(kind, "causes").await, MemoryStore::new(), Recorder::new());
    crash_twice(&store, "crashed").await;
    let queue = policy(&ground)
        .store(store)
        .scope("causes")
        .suspects(Suspects::new())
        .identity(identity())
        .compare_bodies()
        .timeout(TIMEOUT)
        .observer(log.observer())
        .handler(work);
    let running = Running::start(&ground.url(), queue, &ground.name).await;
    ground.send(Sent::new("with another body", body("do nothing"))).await;
    for what in CASES.iter().map(|case| case.what).filter(|what| *what != "with another body") {
        ground.send(message(what)).await;
        if what == "refuse" {
            // The second one of this id is to find the first one parked.
            running.until("it is parked", |queue| queue.dead_letters.contains_key("permanent")).await;
        }
    }
    running.until("the first body is handled", |queue| queue.handled == 1).await;
    ground.send(message("with another body")).await;

    let letters = parks(running, &ground, CASES.len()).await;
    for case in &CASES {
        let of_case = |letter: &&Letter| {
            letter.body == body(case.what).as_bytes() && letter.header(copy::CAUSE) == case.cause.name()
        };
        let letter = letters.iter().find(of_case);
        let letter = letter.unwrap_or_else(|| panic!("{kind:?}: no letter of {}: {letters:#?}", case.what));
        judge(&ground, case, letter);
    }
    for (cause, times) in
        [(Cause::Transient, 2), (Cause::Panic, 2), (Cause::Timeout, 2), (Cause::Undecodable, 1)]
    {
        let failed = log.count(|kind| *kind == EventKind::Failed(cause));
        assert_eq!(failed, times, "{kind:?}: attempts that failed of {cause}");
    }
}

async fn a_handler_that_overruns_its_max_run_ends_as_exhausted_and_says_so(kind: Kind) {
    let (ground, log) = (Ground::new(kind, "max-run").await, Recorder::new());
    let never = async |_: Message| std::future::pending::<Handled>().await;
    let queue = policy(&ground).max_run(MAX_RUN).observer(log.observer()).handler(never);
    let running = Running::start(&ground.url(), queue, &ground.name).await;
    ground.send(message("run for ever")).await;
    let letters = parks(running, &ground, 1).await;
    let case = case("run for ever", Cause::Exhausted, 2, "the handler ran longer than max_run");
    judge(&ground, &case, &letters[0]);
    assert_eq!(log.count(|kind| *kind == EventKind::Failed(Cause::MaxRun)), 2, "{kind:?}");
}

/// JetStream says when a message arrived; RabbitMQ does not, so there it is the sender's word that counts.
async fn what_is_older_than_max_age_is_expired_and_not_handled(kind: Kind) {
    let (ground, ledger) = (Ground::new(kind, "expired").await, Ledger::default());
    let sent = Sent { timestamp: Some(SystemTime::now() - HOUR), ..message("too late") };
    ground.send(sent).await;
    if kind == Kind::JetStream {
        // The server's clock is not ours to set: the message has to become this old.
        sleep(MAX_AGE * 2).await;
    }
    let queue = policy(&ground).max_age(MAX_AGE).handler(counting(&ledger));
    let running = Running::start(&ground.url(), queue, &ground.name).await;
    let letters = parks(running, &ground, 1).await;
    judge(&ground, &case("too late", Cause::Expired, 1, "older than the queue's max_age"), &letters[0]);
    assert!(ledger.successes().is_empty(), "{kind:?}");
}

over_all_brokers! {
    every_cause_is_told_by_a_letter_that_is_true_to_its_message
    a_handler_that_overruns_its_max_run_ends_as_exhausted_and_says_so
    what_is_older_than_max_age_is_expired_and_not_handled
}
