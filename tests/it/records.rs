//! What goes with a dead letter: its history, what is redacted, and what gives way if it is too large.

use std::time::Duration;

use guestlist::broker::copy::{DeadLetter, ERROR, HISTORY, PREFIX};
use guestlist::broker::memory::PublishFault;
use guestlist::broker::{Broker, Copy};
use guestlist::dead_letter::{Field, Oversized, Redact};
use guestlist::{Failure, Message};
use tokio::time::sleep;

use crate::support::{DEAD, Lab, LogCapture, ORDERS, SECOND, until};

fn only_letter(lab: &Lab) -> DeadLetter {
    let mut letters = lab.letters();
    assert_eq!(letters.len(), 1);
    letters.remove(0)
}

fn attempts(letter: &DeadLetter) -> Vec<(u32, u32)> {
    letter.history.iter().map(|failure| (failure.generation, failure.attempt)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_message_that_fails_twelve_times_shows_its_last_ten_failures() {
    let lab = Lab::new();
    lab.send("order-1");
    let handler = lab.handler(async |run| match run.attempt {
        5 => {
            sleep(Duration::from_secs(3600)).await;
            Ok(())
        }
        12 => panic!("at last"),
        attempt => Err(format!("no {attempt}\r\n").into()),
    });
    let queue = lab.queue().max_attempts(12).timeout(SECOND).handler(handler);
    let process = lab.start_with(queue, |consumer| consumer.name("till 7"));
    lab.drained().await;
    let letter = only_letter(&lab);
    assert_eq!(attempts(&letter), (3..=12).map(|attempt| (0, attempt)).collect::<Vec<_>>());
    let story = |n: usize| (letter.history[n].cause.as_str(), letter.history[n].error.as_str());
    assert_eq!(story(0), ("transient", "no 3\\r\\n"));
    assert_eq!(story(2).0, "timeout");
    assert_eq!(story(9), ("panic", "the handler panicked: at last"), "why the last attempt failed");
    assert_eq!((letter.cause.as_str(), letter.attempts), ("exhausted", 12), "and what became of the message");
    assert!(letter.first_failed_at <= Some(letter.history[0].at) && letter.first_failed_at.is_some());
    assert_eq!(letter.consumer.as_deref(), Some("till 7"));
    assert_eq!(letter.id.unwrap().as_str(), Some("order-1"));
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_redriven_messages_history_goes_on() {
    let lab = Lab::new();
    lab.send("order-1");
    let handler = lab.handler(async |_| Err(Failure::transient("no")));
    let process = lab.start(lab.queue().max_attempts(2).handler(handler.clone()));
    lab.drained().await;
    process.stop().await.unwrap();
    let letter = lab.broker.messages(DEAD).unwrap().remove(0);
    // By another process: only the letter knows.
    let process = lab.start(lab.queue().max_attempts(2).handler(handler));
    lab.broker.publish(&ORDERS.into(), &Copy::redrive(&letter, "letter", 1)).await.unwrap();
    until("it is parked again", || lab.letters().len() == 2).await;
    let again = lab.letters().remove(1);
    assert_eq!(attempts(&again), [(0, 1), (0, 2), (1, 1), (1, 2)]);
    assert_eq!((again.generation, again.attempts), (1, 2));
    assert_eq!(again.first_failed_at, lab.letters()[0].first_failed_at);
    process.stop().await.unwrap();
}

/// The destination is away for long: its message is refused again and again, and its story is not flooded.
#[tokio::test(start_paused = true)]
async fn a_story_is_not_flooded_while_the_destination_is_away() {
    let lab = Lab::new();
    lab.send("order-1");
    lab.broker.fail_publishes(2000, PublishFault::Nacked);
    let handler = lab.handler(async |_| Err(Failure::transient("the real reason")));
    let process = lab.start(lab.queue().max_attempts(2).handler(handler));
    lab.drained().await;
    let letter = only_letter(&lab);
    assert_eq!(letter.history[0].error, "the real reason");
    assert!(letter.history.len() <= 4, "{:?}", letter.history);
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_a_parked_message_has_no_failures_of_its_own() {
    let lab = Lab::new();
    lab.send("order-1");
    let handler = lab.handler(async |_| Err(Failure::permanent("never")));
    let process = lab.start(lab.queue().handler(handler));
    until("it is parked", || lab.letters().len() == 1).await;
    lab.send("order-1");
    until("so is its copy", || lab.letters().len() == 2).await;
    assert_eq!(lab.causes(), ["permanent", "parked"]);
    assert_eq!(attempts(&lab.letters()[1]), []);
    process.stop().await.unwrap();
}

const SECRETS: [&str; 4] = ["hunter2", "4111-1111", "s3cret", "aside"];

fn secretive(lab: &Lab) {
    let message = Message::builder("{}")
        .transport_id("order-1")
        .header("Authorization", "hunter2")
        .header("card", "4111-1111")
        .header("boom", "s3cret")
        .header("guestlist-orig-h-CC", "aside")
        .header("tenant", "7");
    lab.broker.send(ORDERS, message).unwrap();
}

fn hide(field: Field<'_>, value: &[u8]) -> Redact {
    match field {
        Field::Header("Authorization" | "CC") => Redact::Remove,
        Field::Header("card") => Redact::Replace("a\r\ncard".to_owned()),
        Field::Header("boom") => panic!("{value:?}"),
        Field::Error => Redact::Replace(String::from_utf8_lossy(value).replace("hunter2", "***")),
        _ => Redact::Keep,
    }
}

#[tokio::test(start_paused = true)]
async fn i16_what_is_redacted_is_neither_with_the_dead_letters_nor_in_the_log() {
    let log = LogCapture::begin();
    let lab = Lab::new();
    secretive(&lab);
    let handler = lab.handler(async |run| match run.attempt {
        1 => Err(Failure::transient("hunter2 was not accepted")),
        _ => Err(Failure::permanent("hunter2 is wrong")),
    });
    let process = lab.start_in_process(lab.queue().redact(hide).handler(handler));
    lab.drained().await;
    process.stop().await.unwrap();

    let letter = lab.broker.messages(DEAD).unwrap().remove(0);
    let headers: Vec<(&str, &[u8])> =
        letter.headers().iter().map(|(name, value)| (name, &value[..])).collect();
    assert_eq!(headers, [("card", &b"a\\r\\ncard"[..]), ("tenant", b"7")]);
    let record = only_letter(&lab);
    assert_eq!(record.error, "*** is wrong");
    assert_eq!(record.history[0].error, "*** was not accepted");
    let log = log.text();
    assert!(
        log.contains("*** was not accepted") && log.contains("the redaction panicked at a header"),
        "{log}"
    );
    for secret in SECRETS {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[tokio::test(start_paused = true)]
async fn a_redaction_that_always_panics_loses_nothing_but_the_values() {
    let lab = Lab::new();
    secretive(&lab);
    let handler = lab.handler(async |_| Err(Failure::permanent("hunter2")));
    let process = lab.start(lab.queue().redact(|_, _| panic!("always")).handler(handler));
    lab.drained().await;
    process.stop().await.unwrap();
    let letter = lab.broker.messages(DEAD).unwrap().remove(0);
    assert_eq!((letter.headers().len(), &letter.payload()[..]), (0, &b"{}"[..]));
    let record = only_letter(&lab);
    assert_eq!((record.cause.as_str(), record.error.as_str()), ("permanent", "(the redaction panicked)"));
    assert_eq!(record.id.unwrap().as_str(), Some("order-1"));
    assert_eq!(lab.journal.attempts("order-1"), [1]);
}

/// A letter of which the destination refuses so many forms; none: it is not taken.
async fn refused(times: usize, oversized: Oversized) -> Option<(DeadLetter, Message)> {
    let lab = Lab::new();
    let message = Message::builder("0123456789").transport_id("order-1").header("tenant", "7");
    lab.broker.fail_publishes(times, PublishFault::TooLarge);
    lab.broker.send(ORDERS, message).unwrap();
    let handler = lab.handler(async |_| Err(Failure::permanent("never")));
    let process = lab.start(lab.queue().oversized(oversized).handler(handler));
    until("it is settled", || {
        let orders = process.orders();
        !orders.dead_letters.is_empty() || orders.failures.contains_key("too_large")
    })
    .await;
    assert_eq!(process.orders().paused_by, None);
    process.stop().await.unwrap();
    let letter = lab.broker.messages(DEAD).unwrap().pop();
    assert_eq!(letter.is_none(), lab.depth() == 1, "parked, or with its queue");
    letter.map(|letter| (DeadLetter::read(&letter).unwrap(), letter))
}

#[tokio::test(start_paused = true)]
async fn a_letter_that_is_too_large_gives_up_its_story_first_and_then_stays_with_its_queue() {
    for (times, history, error) in [(0, 1, "never"), (1, 0, "never"), (2, 0, "")] {
        for oversized in [Oversized::Keep, Oversized::Truncate] {
            let (record, letter) = refused(times, oversized).await.unwrap();
            assert_eq!((record.history.len(), record.error.as_str()), (history, error), "{times}");
            assert!(record.is_whole() && letter.payload() == "0123456789");
            assert_eq!(record.attempts, 1, "what names it is never left out");
        }
    }
    assert_eq!(refused(3, Oversized::Keep).await.map(|(record, _)| record), None);
}

#[tokio::test(start_paused = true)]
async fn a_letter_that_may_be_cut_says_so() {
    for (times, body) in [(3, "01234"), (4, "01"), (6, "")] {
        let (record, letter) = refused(times, Oversized::Truncate).await.unwrap();
        assert_eq!((letter.payload(), record.truncated), (&body.into(), Some(10)));
        assert_eq!(record.body_hash, Some(blake3::hash(b"0123456789").to_string()));
        assert_eq!((letter.headers().len(), record.headers_dropped), (1, None));
        assert!(!record.is_whole());
    }
    let (record, letter) = refused(7, Oversized::Truncate).await.unwrap();
    assert_eq!((letter.headers().len(), record.headers_dropped), (0, Some(1)));
    assert_eq!(
        refused(8, Oversized::Truncate).await.map(|(record, _)| record),
        None,
        "nothing was left to give"
    );
}

#[tokio::test(start_paused = true)]
async fn a_strangers_story_is_a_hint_that_ours_comes_after() {
    let lab = Lab::new();
    let entry = r#"{"attempt":4294967295,"at":4102444800,"cause":"timeout","error":"forged"}"#;
    let near = r#"{"attempt":9,"at":1000000000,"cause":"timeout","error":"a\r\nb"}"#;
    let huge = format!("[{}]", vec![near; 100].join(","));
    for (id, forged) in [("1", format!("[{entry},{near}]")), ("2", huge), ("3", "\r\n\0[[[".to_owned())] {
        let message = Message::builder("{}").transport_id(id).header(HISTORY, forged);
        lab.broker.send(ORDERS, message.header(ERROR, "x").header(format!("{PREFIX}cause"), "y")).unwrap();
    }
    let handler = lab.handler(async |_| Err(Failure::permanent("ours")));
    let process = lab.start(lab.queue().handler(handler));
    lab.drained().await;
    process.stop().await.unwrap();
    let stories: Vec<Vec<String>> = lab
        .letters()
        .into_iter()
        .map(|letter| letter.history.into_iter().map(|failure| failure.error).collect())
        .collect();
    assert_eq!(stories, [vec!["a\\r\\nb", "ours"], vec!["ours"], vec!["ours"]]);
}
