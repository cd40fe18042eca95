//! Bad input where the broker or its client has a say in it: what a stranger can put on the wire, and what becomes of
//! it. The table of all bad input is at the top of `tests/it/bad_input.rs`.
//!
//! What ends a client library's connection (see SECURITY.md) is not here, by intention.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use guestlist::broker::amqp::lapin::BasicProperties;
use guestlist::broker::amqp::lapin::types::{AMQPValue, DecimalValue, FieldTable};
use guestlist::broker::copy;
use guestlist::prelude::*;
use guestlist::{BoxFuture, Handled, QueueStatus};

use super::{Ledger, Running, counting};
use crate::support::ground::{Ground, Kind, Letter, Sent, over_all_brokers};

const ORDER_ID: &str = "order-id";
const BACKOFF: Duration = Duration::from_millis(100);

fn policy(ground: &Ground) -> Queue {
    ground.queue().max_attempts(2).backoff(Backoff::new(BACKOFF, 1, BACKOFF).without_jitter())
}

fn ends(queue: &QueueStatus) -> u64 {
    queue.handled + queue.duplicates + queue.dead_letters.values().sum::<u64>()
}

/// Waits until so many deliveries have ended, and stops; nothing is left with the queue, and nothing went round.
async fn all_end(running: Running, ground: &Ground, count: usize) -> QueueStatus {
    let count = count as u64;
    running.until("all have ended", |queue| ends(queue) >= count).await;
    let status = running.stop().await;
    assert_eq!(ends(&status), count, "{:?}: {status:?}", ground.kind);
    ground.is_drained(&[BACKOFF]).await;
    status
}

/// Ids that every broker carries.
fn odd_ids(kind: Kind) -> Vec<String> {
    let mut ids = [
        "*",
        ">",
        ".",
        "a.b.*.>",
        "order 1",
        "order-1",
        "Order-1",
        "order\u{2011}1",
        "\u{43e}rder-1",
        "order-1\u{200b}",
        "\u{202e}order-1",
        "\u{e9}",
        "e\u{301}",
        "order%2D1",
        "../../etc/passwd",
        "';drop table claims;--",
        "%00%0D%0A",
    ]
    .map(str::to_owned)
    .to_vec();
    ids.push("x".repeat(255));
    if kind == Kind::JetStream {
        ids.push("x".repeat(4096));
    } else {
        // NATS ends a header at a line's end, and its client trims spaces.
        ids.extend(["\0", "\r\n", "id\r\nNats-Rollup: all", " order-1", "order-1 "].map(str::to_owned));
    }
    ids
}

async fn ids_of_any_look_are_ids_of_their_own(kind: Kind) {
    let (ground, ledger, ids) = (Ground::new(kind, "odd-ids").await, Ledger::default(), odd_ids(kind));
    let running =
        Running::start(&ground.url(), policy(&ground).handler(counting(&ledger)), &ground.name).await;
    for _ in 0..2 {
        for id in &ids {
            ground.send(Sent::new(id, id.as_str())).await;
        }
    }
    let status = all_end(running, &ground, 2 * ids.len()).await;
    assert_eq!((status.handled, status.duplicates), (ids.len() as u64, ids.len() as u64), "{kind:?}");
    assert_eq!(ledger.successes(), vec![1; ids.len()], "{kind:?}");
}

async fn ids_that_are_missing_empty_or_too_long_are_named(kind: Kind) {
    let (ground, ledger) = (Ground::new(kind, "no-ids").await, Ledger::default());
    let queue = policy(&ground).identity(Identity::default().header(ORDER_ID)).handler(counting(&ledger));
    let running = Running::start(&ground.url(), queue, &ground.name).await;
    ground.send(Sent::without_id("missing")).await;
    ground.send(Sent::new("", "empty")).await;
    ground.send(Sent::without_id("empty").header(ORDER_ID, "")).await;
    ground.send(Sent::without_id("10 KB").header(ORDER_ID, &"7".repeat(10_240))).await;
    let status = all_end(running, &ground, 4).await;
    let parked = |cause: &str| status.dead_letters.get(cause).copied().unwrap_or(0);
    assert_eq!((parked("missing_id"), parked("invalid_id")), (3, 1), "{kind:?}: {status:?}");
    assert!(ledger.successes().is_empty());
}

/// What the handler cannot be given: the body is with the dead letters, byte by byte, after one look at it.
async fn bodies_that_cannot_be_read_are_parked_whole(kind: Kind) {
    let bodies: [Vec<u8>; 9] = [
        vec![],
        b"{".to_vec(),
        b"nul".to_vec(),
        br#""\ud800""#.to_vec(),
        b"\xef\xbb\xbf{}".to_vec(),
        b"\"\xff\"".to_vec(),
        b"{}{}".to_vec(),
        format!("{}{}", "[".repeat(10_000), "]".repeat(10_000)).into(),
        // The brief's 200 MB, made smaller for the broker's sake: a number is read digit by digit either way.
        "9".repeat(900_000).into(),
    ];
    let ground = Ground::new(kind, "bodies").await;
    let handler = async |_: Json<std::collections::BTreeMap<String, u64>>| Ok(());
    let running = Running::start(&ground.url(), policy(&ground).handler(handler), &ground.name).await;
    for (number, body) in bodies.iter().enumerate() {
        let content_type = Some("application/x-\u{7f};;; charset=utf-7".to_owned());
        ground.send(Sent { content_type, ..Sent::new(&number.to_string(), body.clone()) }).await;
    }
    let status = all_end(running, &ground, bodies.len()).await;
    assert_eq!(status.dead_letters.get("undecodable"), Some(&(bodies.len() as u64)), "{kind:?}: {status:?}");
    assert_eq!(status.received, bodies.len() as u64, "{kind:?}: each is delivered once");
    let letters = ground.letters().await;
    for body in &bodies {
        let shown = String::from_utf8_lossy(&body[..body.len().min(40)]);
        assert!(letters.iter().any(|letter| letter.body == *body), "{kind:?}: {shown} is not whole");
    }
    assert!(
        letters.iter().all(|letter| letter.header(copy::ERROR).len() < 200),
        "{kind:?}: the error quotes the body"
    );
}

const FLOOD: usize = 500;

async fn a_flood_of_headers_is_carried_on_the_dead_letter(kind: Kind) {
    let ground = Ground::new(kind, "flood").await;
    let handler = async |_: Message| Err(Failure::permanent("no"));
    let running = Running::start(&ground.url(), policy(&ground).handler(handler), &ground.name).await;
    let flood =
        (0..FLOOD).fold(Sent::new("1", "{}"), |sent, n| sent.header(&format!("flood-{n}"), &"x".repeat(60)));
    ground.send(flood).await;
    let status = all_end(running, &ground, 1).await;
    assert_eq!(status.dead_letters.get("permanent"), Some(&1), "{kind:?}");
    let letter = ground.letters().await.remove(0);
    let kept = letter.headers.iter().filter(|(name, value)| name.starts_with("flood-") && value.len() == 60);
    assert_eq!(kept.count(), FLOOD, "{kind:?}");
}

/// How long it is watched for a hot loop.
const WATCHED: Duration = Duration::from_secs(3);

/// A message that just fits, so that its copy with our own headers does not.
fn large(kind: Kind) -> Sent {
    match kind {
        // Headers are one frame, and the server says how long that may be: 128 KiB.
        Kind::Classic | Kind::Quorum => (0..1_378)
            .fold(Sent::new("large", "{}"), |sent, n| sent.header(&format!("{n:05}"), &"x".repeat(84))),
        // max_payload, 1 MiB, is of headers and body together.
        Kind::JetStream => Sent::new("large", vec![b'x'; 1_048_576 - 100]),
    }
}

async fn what_is_too_large_for_the_dead_letters_stays_and_stops_nobody(kind: Kind) {
    let ground = Ground::new(kind, "large").await;
    let handler = async |message: Message| match message.id().and_then(MessageId::as_str) {
        Some("large") => Err(Failure::permanent("no")),
        _ => Ok(()),
    };
    let running = Running::start(&ground.url(), policy(&ground).handler(handler), &ground.name).await;
    ground.send(large(kind)).await;
    running.until("it was refused", |queue| queue.failures.get("too_large") == Some(&1)).await;
    for n in 0..50 {
        ground.send(Sent::new(&format!("good-{n}"), "{}")).await;
    }
    running.until("the others are handled", |queue| queue.handled == 50).await;
    tokio::time::sleep(WATCHED).await;
    let status = running.stop().await;
    println!("{kind:?}: {} deliveries of 51 messages", status.received);
    assert_eq!((status.paused_by, ground.letters_count().await), (None, 0), "{kind:?}");
    assert!(status.received < 60, "{kind:?}: no hot loop: {status:?}");
    let kept = ground.left().await + ground.held(&[Duration::from_secs(128)]).await;
    assert_eq!(kept, 1, "{kind:?}: it stays with its queue: {status:?}");
}

/// What a stranger may write under our names, or the broker's.
fn forged(kind: Kind) -> Vec<Sent> {
    let long = "9".repeat(5_000);
    let texts = [
        (copy::ATTEMPT, "-1"),
        (copy::ATTEMPT, "4294967295"),
        (copy::ATTEMPT, "many"),
        (copy::ATTEMPT, &long),
        (copy::GENERATION, "-1"),
        (copy::GENERATION, "4294967296"),
        (copy::GENERATION, "7"),
        (copy::DUE, "-1"),
        (copy::DUE, "18446744073709551615"),
        (copy::DUE, "tomorrow"),
        (copy::CAUSE, "permanent"),
        (copy::ERROR, "forged"),
        (copy::FAILED_AT, "-1"),
        (copy::SEQUENCE, "many"),
        ("guestlist-orig-h-guestlist-attempt", "9"),
        ("guestlist-orig-h-", "nameless"),
        ("guestlist-orig-h-tenant", "%ZZ%0"),
        ("guestlist-orig-p-expiration", "1"),
        ("guestlist-orig-p-user_id", "nobody"),
        ("guestlist-nobody-knows", "this"),
        ("x-death", "nine times"),
        ("x-delivery-count", "9"),
        ("x-first-death-queue", "theirs"),
        ("Nats-Num-Delivered", "9"),
    ];
    let mut all: Vec<Sent> = Vec::new();
    for (name, value) in texts {
        all.push(Sent::new(&all.len().to_string(), format!("{} {name}", all.len())).header(name, value));
    }
    if kind != Kind::JetStream {
        for (name, value) in amqp_types() {
            all.push(Sent::new(&all.len().to_string(), format!("{} {name}", all.len())).typed(name, value));
        }
    }
    all
}

/// The same of other types than text.
fn amqp_types() -> Vec<(&'static str, AMQPValue)> {
    let mut death = FieldTable::default();
    death.insert("count".into(), AMQPValue::LongLongInt(i64::MAX));
    death.insert("queue".into(), AMQPValue::LongString("theirs".into()));
    death.insert("reason".into(), AMQPValue::LongString("expired".into()));
    let deaths = AMQPValue::FieldArray(vec![AMQPValue::FieldTable(death.clone())].into());
    vec![
        (copy::ATTEMPT, AMQPValue::LongLongInt(i64::MIN)),
        (copy::ATTEMPT, AMQPValue::LongUInt(u32::MAX)),
        (copy::ATTEMPT, AMQPValue::FieldTable(death)),
        (copy::GENERATION, AMQPValue::Double(0.5)),
        (copy::DUE, AMQPValue::Timestamp(u64::MAX)),
        (copy::CAUSE, AMQPValue::Void),
        ("x-death", deaths),
        ("x-delivery-count", AMQPValue::LongLongInt(i64::MAX)),
        ("x-acquired-count", AMQPValue::LongLongInt(-1)),
    ]
}

/// On JetStream a message that says to be a copy of ours has no transport id of its sender's: it is parked, and the
/// reason named. Whoever forges that loses their own message.
fn passes_for_a_copy(kind: Kind, sent: &Sent) -> bool {
    kind == Kind::JetStream && sent.headers[0].0 == copy::ATTEMPT
}

/// A body, and an attempt at it.
type Tried = (Vec<u8>, u32);

/// The store counts, the letter's story is ours, and no forged number is believed.
async fn forged_headers_change_neither_attempts_nor_the_story(kind: Kind) {
    let (ground, forged) = (Ground::new(kind, "forged").await, forged(kind));
    let attempts: Arc<Mutex<Vec<Tried>>> = Arc::default();
    let seen = Arc::clone(&attempts);
    let handler = move |message: Message, Attempt(attempt): Attempt| -> BoxFuture<Handled> {
        seen.lock().unwrap().push((message.payload().to_vec(), attempt));
        Box::pin(std::future::ready(Err(Failure::transient("ours"))))
    };
    let running = Running::start(&ground.url(), policy(&ground).handler(handler), &ground.name).await;
    for sent in &forged {
        ground.send(sent.clone()).await;
    }
    all_end(running, &ground, forged.len()).await;
    let letters = ground.letters().await;
    let attempts = attempts.lock().unwrap();
    for sent in &forged {
        let what = format!("{kind:?}: {:?}", sent.headers);
        let runs: Vec<u32> =
            attempts.iter().filter(|(body, _)| *body == sent.body).map(|(_, n)| *n).collect();
        let letter = letters.iter().find(|letter| letter.body == sent.body);
        let letter = letter.unwrap_or_else(|| panic!("no letter: {what}"));
        if passes_for_a_copy(kind, sent) {
            assert_eq!((runs, letter.header(copy::CAUSE)), (vec![], "missing_id"), "{what}");
        } else {
            assert_eq!(runs, [1, 2], "{what}");
            tells_our_story(&ground, &what, letter);
        }
    }
}

fn tells_our_story(ground: &Ground, what: &str, letter: &Letter) {
    for (name, value) in [
        (copy::CAUSE, "exhausted"),
        (copy::ERROR, "ours"),
        (copy::ATTEMPT, "2"),
        (copy::QUEUE, ground.name.as_str()),
    ] {
        assert_eq!(letter.header(name), value, "{what}: {name}");
    }
    assert!(letter.header(copy::FAILED_AT).parse::<u64>().is_ok(), "{what}");
}

over_all_brokers! {
    ids_of_any_look_are_ids_of_their_own
    ids_that_are_missing_empty_or_too_long_are_named
    bodies_that_cannot_be_read_are_parked_whole
    a_flood_of_headers_is_carried_on_the_dead_letter
    what_is_too_large_for_the_dead_letters_stays_and_stops_nobody
    forged_headers_change_neither_attempts_nor_the_story
}

/// An id in a header need not be text on RabbitMQ: its value is read as text, and nothing is no id.
#[tokio::test]
async fn an_id_header_of_any_amqp_type_is_an_id_or_named_as_missing() {
    let table = FieldTable::from(std::collections::BTreeMap::from([("k".into(), AMQPValue::LongInt(1))]));
    let ids = [
        (AMQPValue::LongInt(7), "handled"),
        (AMQPValue::LongString("7".into()), "duplicate"),
        (AMQPValue::LongLongInt(7), "duplicate"),
        (AMQPValue::LongLongInt(-7), "handled"),
        (AMQPValue::FieldTable(table), "handled"),
        (AMQPValue::LongString(r#"{"k":1}"#.into()), "duplicate"),
        (AMQPValue::FieldArray(vec![AMQPValue::LongInt(7)].into()), "handled"),
        (AMQPValue::Boolean(true), "handled"),
        (AMQPValue::Double(0.5), "handled"),
        (AMQPValue::DecimalValue(DecimalValue { scale: 255, value: u32::MAX }), "handled"),
        (AMQPValue::Timestamp(u64::MAX), "handled"),
        (AMQPValue::ByteArray(vec![0, 255].into()), "handled"),
        (AMQPValue::LongString(vec![0, 255].into()), "duplicate"),
        (AMQPValue::Void, "missing_id"),
        (AMQPValue::ByteArray(Vec::new().into()), "missing_id"),
    ];
    let count = |what: &str| ids.iter().filter(|(_, end)| *end == what).count() as u64;
    for kind in [Kind::Classic, Kind::Quorum] {
        let (ground, ledger) = (Ground::new(kind, "typed").await, Ledger::default());
        let queue = policy(&ground).identity(Identity::none().header(ORDER_ID)).handler(counting(&ledger));
        let running = Running::start(&ground.url(), queue, &ground.name).await;
        for (id, _) in &ids {
            ground.send(Sent::without_id("{}").typed(ORDER_ID, id.clone())).await;
        }
        let status = all_end(running, &ground, ids.len()).await;
        let found = (status.handled, status.duplicates, status.dead_letters.get("missing_id").copied());
        let expected = (count("handled"), count("duplicate"), Some(count("missing_id")));
        assert_eq!(found, expected, "{kind:?}: {status:?}");
    }
}

/// Somebody else publishes a victim's id first. RabbitMQ has checked the `user_id`, so an id that has it in it cannot be
/// taken by another user; see SECURITY.md.
#[tokio::test]
async fn an_id_with_the_validated_user_in_it_cannot_be_burnt_by_another() {
    let by_user = Identity::none().with(|message| {
        let user = message.native::<BasicProperties>()?.user_id().as_ref().map(ToString::to_string);
        let id = message.transport_id()?.as_str()?;
        MessageId::new(serde_json::to_vec(&(user, id)).unwrap())
    });
    for kind in [Kind::Classic, Kind::Quorum] {
        let (ground, ledger) = (Ground::new(kind, "burnt").await, Ledger::default());
        let queue = policy(&ground).identity(by_user.clone()).handler(counting(&ledger));
        let running = Running::start(&ground.url(), queue, &ground.name).await;
        ground.send(Sent::new("order-1", "the attacker's")).await;
        running.until("the attacker's is handled", |queue| queue.handled == 1).await;
        let victims = Sent { user_id: Some("guest".to_owned()), ..Sent::new("order-1", "the victim's") };
        ground.send(victims.clone()).await;
        ground.send(victims).await;
        let status = all_end(running, &ground, 3).await;
        assert_eq!((status.handled, status.duplicates), (2, 1), "{kind:?}: {status:?}");
        assert_eq!(ledger.runs("the victim's"), 1, "{kind:?}");
    }
}
