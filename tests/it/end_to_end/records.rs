//! What goes with a dead letter over real brokers.

use std::future::poll_fn;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use guestlist::broker::copy::DeadLetter;
use guestlist::broker::{Declare, QueueSpec};
use guestlist::dead_letter::{Field, Redact};
use guestlist::prelude::*;
use tokio::time::timeout;

use super::{PATIENCE, Running};

/// The one letter that lies there, by the eyes of a consumer.
async fn only_letter(url: &str, dead: &str) -> Message {
    let (broker, mut spec) = (guestlist::broker::connect(url).await.unwrap(), QueueSpec::new(dead));
    if url.starts_with("nats") {
        spec.declare = Declare::Create;
    }
    broker.prepare(&spec).await.unwrap();
    let mut subscription = broker.subscribe(&spec).await.unwrap();
    let next = timeout(PATIENCE, poll_fn(|cx| subscription.poll_next(cx, 1))).await;
    let letter = next.expect("a letter in time").expect("no end").expect("no error").message().clone();
    subscription.close().await;
    letter
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// AMQP: its copies carry the history. JetStream: the process remembers it.
async fn a_message_that_fails_twelve_times_shows_its_last_ten_failures(
    url: &str,
    queue: Queue,
    dead: &str,
    name: &str,
    send: impl AsyncFn(&[(&str, String)]),
) {
    let backoff = Backoff::new(Duration::from_millis(100), 1, Duration::from_millis(100)).without_jitter();
    let handler = |Attempt(attempt): Attempt| async move {
        Err(Failure::transient(format!("no {attempt} \"naïve\"\r\n")))
    };
    let queue = queue.max_attempts(12).backoff(backoff).handler(handler);
    let begin = now();
    let running = Running::start(url, queue, name).await;
    send(&[]).await;
    running.until("it is parked", |queue| queue.dead_letters.get("exhausted") == Some(&1)).await;
    running.stop().await;
    let letter = DeadLetter::read(&only_letter(url, dead).await).unwrap();
    let attempts: Vec<u32> = letter.history.iter().map(|failure| failure.attempt).collect();
    assert_eq!(attempts, (3..=12).collect::<Vec<_>>(), "{name}");
    for failure in &letter.history {
        assert_eq!(failure.error, format!("no {} \"naïve\"\\r\\n", failure.attempt));
        assert_eq!((failure.cause.as_str(), failure.generation), ("transient", 0));
        assert!((begin..=now()).contains(&failure.at));
    }
    let (first, last) = (letter.first_failed_at.unwrap(), letter.failed_at.unwrap());
    assert!(begin <= first && first < letter.history[0].at + 1 && first < last, "{first} to {last}");
    assert_eq!(letter.source.queue, name);
    assert!(letter.id.is_some() && letter.is_whole());
}

async fn what_is_redacted_is_not_at_the_destination(
    url: &str,
    queue: Queue,
    dead: &str,
    name: &str,
    send: impl AsyncFn(&[(&str, String)]),
) {
    let hide = |field: Field<'_>, _: &[u8]| match field {
        Field::Header("authorization") => Redact::Remove,
        Field::Header("card") => Redact::Replace("(a\r\ncard)".to_owned()),
        Field::Header("boom") => panic!("not expected"),
        Field::Error => Redact::Replace("(the bank's)".to_owned()),
        _ => Redact::Keep,
    };
    let handler = |Attempt(attempt): Attempt| async move {
        match attempt {
            1 => Err(Failure::transient("hunter2 was refused")),
            _ => Err(Failure::permanent("hunter2 is wrong")),
        }
    };
    let running = Running::start(url, queue.redact(hide).handler(handler), name).await;
    let headers = ["authorization", "card", "boom", "tenant"];
    send(&headers.map(|header| (header, format!("{header} hunter2")))).await;
    running.until("it is parked", |queue| queue.dead_letters.get("permanent") == Some(&1)).await;
    running.stop().await;
    let letter = only_letter(url, dead).await;
    let mut found: Vec<(&str, &[u8])> = letter
        .headers()
        .iter()
        .map(|(name, value)| (name, &value[..]))
        .filter(|(name, _)| headers.contains(name))
        .collect();
    found.sort_unstable();
    assert_eq!(found, [("card", &b"(a\\r\\ncard)"[..]), ("tenant", b"tenant hunter2")], "{name}");
    let record = DeadLetter::read(&letter).unwrap();
    assert_eq!(record.error, "(the bank's)");
    assert_eq!(record.history.len(), 2);
    assert!(record.history.iter().all(|failure| failure.error == "(the bank's)"));
    assert_eq!((record.attempts, record.id.is_some()), (2, true));
}

#[cfg(feature = "amqp")]
mod amqp {
    use super::super::amqp::{KINDS, Stranger, url};
    use super::super::delays::amqp::{queue_of, send};

    macro_rules! over_both_kinds {
        ($($case:ident)+) => {$(
            #[tokio::test]
            async fn $case() {
                for kind in KINDS {
                    let stranger = Stranger::new().await;
                    let (queue, name) = queue_of(&stranger, kind).await;
                    let queue = queue.hold_steps([std::time::Duration::from_millis(100)]);
                    let send = async |headers: &[(&str, String)]| send(&stranger, &name, headers).await;
                    super::$case(&url(), queue, &format!("{name}.dead"), &name, send).await;
                }
            }
        )+};
    }

    over_both_kinds! {
        a_message_that_fails_twelve_times_shows_its_last_ten_failures
        what_is_redacted_is_not_at_the_destination
    }
}

#[cfg(feature = "nats")]
mod nats {
    use guestlist::Queue;

    use super::super::delays::nats::send;
    use super::super::nats::{Stranger, dead, url};
    use super::super::unique;

    macro_rules! over_jetstream {
        ($($case:ident)+) => {$(
            #[tokio::test]
            async fn $case() {
                let name = unique("nats");
                let stranger = Stranger::with_dead_letters(&name).await;
                let queue = Queue::new(name.as_str()).dead_letter(dead(&name));
                let send = async |headers: &[(&str, String)]| send(&stranger, &name, headers).await;
                super::$case(&url(), queue, &dead(&name), &name, send).await;
            }
        )+};
    }

    over_jetstream! {
        a_message_that_fails_twelve_times_shows_its_last_ten_failures
        what_is_redacted_is_not_at_the_destination
    }
}
