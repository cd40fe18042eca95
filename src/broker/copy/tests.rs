use proptest::collection::vec;
use proptest::prelude::*;

use super::history::{History, Noted, PastFailure};
use super::text::is_invisible;
use super::*;
use crate::Cause;
use crate::message::{Headers, Source};

fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..max)
}

/// Texts of all kinds: controls, line separators, marks that turn the direction of writing.
fn text(max: usize) -> impl Strategy<Value = String> {
    let odd = prop_oneof![
        Just('\r'),
        Just('\n'),
        Just('\0'),
        Just('\u{1b}'),
        Just('\u{85}'),
        Just('\u{2028}'),
        Just('\u{202e}'),
        Just('\u{feff}'),
        Just(' '),
        Just('🎉'),
    ];
    vec(prop_oneof![any::<char>(), odd], 0..max).prop_map(|chars| chars.into_iter().collect())
}

fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The copy as it comes back: its own headers among ours, its own transport id.
fn come_back(message: &Message, copy: &Copy<'_>) -> Message {
    let mut back = Message::builder(message.payload().clone()).transport_id(copy.id().to_owned());
    for (name, value) in message.headers().iter() {
        back = back.header(name, value.clone());
    }
    for (name, value) in copy.headers().into_iter().chain(copy.moved([])) {
        back = back.header(name, value);
    }
    let routing_key = "the hold queue".to_owned();
    back.source(Source { routing_key, ..Source::new("memory", "the hold queue") }).build()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_bytes_come_back_from_their_encoding(bytes in bytes(300)) {
        let text = encode(&bytes);
        prop_assert!(is_plain(&text));
        prop_assert!(text.len() <= 3 * bytes.len());
        prop_assert_eq!(&decode(text.as_bytes())[..], &bytes[..]);
    }

    /// A stranger's header may look like our encoding and not be it.
    #[test]
    fn decoding_takes_any_bytes_and_makes_no_more_of_them(bytes in bytes(300)) {
        prop_assert!(decode(&bytes).len() <= bytes.len());
    }

    #[test]
    fn an_escaped_text_is_printable_bounded_and_trimmed(text in text(200), max in 0..300_usize) {
        let safe = escape(&text, max);
        prop_assert!(safe.len() <= max);
        prop_assert!(!safe.chars().any(|c| c.is_control() || is_invisible(c)), "{safe:?}");
        prop_assert_eq!(safe.trim(), &safe);
        prop_assert_eq!(escape(&safe, max), safe, "escaping again changes nothing");
    }

    #[test]
    fn our_headers_are_plain_whatever_the_message_holds(
        id in bytes(100),
        transport in bytes(100),
        (queue, key, stream) in (text(30), text(30), text(30)),
        error in text(1_500),
        moved in bytes(50),
    ) {
        let source = Source {
            routing_key: key, stream, sequence: Some(u64::MAX), ..Source::new("memory", queue)
        };
        let message = Message::builder("body")
            .transport_id(transport)
            .header(ID, encode(&id))
            .header("guestlist-orig-h-Nats-TTL", encode(&moved))
            .source(source)
            .build();
        let record = DeadLetter::new(&message, Cause::Permanent, &error);
        for copy in [Copy::hold(&message), Copy::dead_letter(&message, &record)] {
            prop_assert_eq!(copy.id().len(), 32);
            let moved = copy.moved([("guestlist-orig-p-expiration".to_owned(), id.clone().into())]);
            for (name, value) in copy.headers().iter().chain(&moved) {
                prop_assert!(name.starts_with(PREFIX) && is_plain(name), "{name}");
                let free_text = name == ERROR || name == HISTORY;
                prop_assert!(is_plain(value) || free_text, "{name}: {value}");
                prop_assert!(!value.chars().any(char::is_control), "{name}: {value}");
                prop_assert!(name != ERROR || value.len() <= defaults::ERROR_TEXT);
            }
        }
    }

    #[test]
    fn a_copy_of_a_copy_is_still_the_original(
        id in vec(any::<u8>(), 1..100),
        header in bytes(50),
        (queue, exchange, key, stream) in (text(20), text(20), text(20), text(20)),
        sequence in proptest::option::of(any::<u64>()),
        generation in any::<u32>(),
    ) {
        // A queue has a name, and what came by no exchange came by a key.
        let key = if exchange.is_empty() { format!("k{key}") } else { key };
        let queue = format!("q{queue}");
        let source = Source { exchange, routing_key: key, stream, sequence, ..Source::new("rabbitmq", queue) };
        let original = Message::builder("body")
            .transport_id(id)
            .header("tenant", header.clone())
            .header(GENERATION, generation.to_string())
            .header("guestlist-orig-p-expiration", "60000")
            .header("guestlist-orig-h-CC", encode(&header))
            .source(source.clone())
            .build();
        let once = come_back(&original, &Copy::hold(&original));
        let twice = come_back(&once, &Copy::hold(&once));
        for copy in [&once, &twice] {
            prop_assert_eq!(copy.id(), original.id());
            prop_assert_eq!(copy.transport_id(), original.transport_id());
            prop_assert_eq!(copy.generation(), generation);
            prop_assert_eq!(copy.headers().get("tenant").unwrap(), &header);
            prop_assert_eq!(copy.headers().get("CC").unwrap(), &header);
            prop_assert_eq!(Copy::hold(copy).moved([]), Copy::hold(&original).moved([]));
            let found = copy.source();
            prop_assert_eq!(&found.queue, &source.queue);
            prop_assert_eq!(&found.exchange, &source.exchange);
            prop_assert_eq!(&found.routing_key, &source.routing_key);
            prop_assert_eq!(&found.stream, &source.stream);
            prop_assert_eq!(found.sequence, source.sequence);
        }
        let (first, second) = (Copy::hold(&original), Copy::hold(&once));
        prop_assert_eq!(first.id(), second.id(), "the same copy has the same id");
        prop_assert_ne!(first.id().as_bytes(), original.id().unwrap().as_bytes());
    }

    #[test]
    fn no_header_of_ours_in_a_strangers_hand_makes_reading_panic(
        headers in vec((name(), bytes(40)), 0..40),
    ) {
        let message = headers.iter().fold(Message::builder(""), |message, (name, value)| {
            message.header(name.clone(), value.clone())
        }).build();
        prop_assert!(message.headers().iter().all(|(name, _)| !name.starts_with(PREFIX) && !name.is_empty()));
        let _ = DeadLetter::read(&message);
        let copy = Copy::hold(&message);
        let ours = copy.headers();
        for (index, (name, _)) in ours.iter().enumerate() {
            prop_assert!(!ours[..index].iter().any(|(other, _)| other == name), "{name} is there twice");
        }
    }
}

fn name() -> impl Strategy<Value = String> {
    let ours = prop_oneof![
        Just(ID),
        Just(ATTEMPT),
        Just(GENERATION),
        Just(CAUSE),
        Just(ERROR),
        Just(FAILED_AT),
        Just(FIRST_FAILED_AT),
        Just(HISTORY),
        Just(TRUNCATED),
        Just(QUEUE),
        Just(SEQUENCE),
        Just(TRANSPORT_ID),
        Just("guestlist-"),
        Just("guestlist-new-in-2030"),
        Just("guestlist-orig-h-"),
        Just("guestlist-orig-h-guestlist-id"),
        Just("guestlist-orig-h-guestlist-orig-h-guestlist-attempt"),
        Just("guestlist-orig-p-"),
    ];
    prop_oneof![ours.prop_map(str::to_owned), "[a-z]{1,5}", Just("guestlist-orig-h-x".to_owned())]
}

#[test]
fn forged_numbers_are_no_numbers() {
    for forged in ["-1", "", " 1", "1e3", "4294967296", "999999999999999999999", "five", "\u{ff11}"] {
        let message = Message::builder("").header(ATTEMPT, forged).header(GENERATION, forged).build();
        assert_eq!((message.attempt(), message.generation()), (1, 0), "{forged}");
    }
    let message = Message::builder("").header(ATTEMPT, "4294967295").build();
    assert_eq!(message.attempt(), u32::MAX);
}

#[test]
fn a_header_moved_aside_cannot_bring_in_one_of_ours() {
    let message = Message::builder("")
        .header("guestlist-orig-h-guestlist-id", "victim")
        .header("guestlist-orig-h-", "nameless")
        .header("guestlist-orig-h-CC", "kept")
        .build();
    let names: Vec<&str> = message.headers().iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["CC"]);
    let moved = Copy::hold(&message).moved([]);
    assert_eq!(moved, [("guestlist-orig-h-CC".to_owned(), "kept".to_owned())]);
}

#[test]
fn a_flood_of_moved_headers_is_copied_in_no_time() {
    let flood = |message: crate::MessageBuilder, number: u32| {
        message.header(format!("guestlist-orig-h-{number}"), number.to_string())
    };
    let message = (0..50_000).fold(Message::builder(""), flood).build();
    let begin = std::time::Instant::now();
    assert_eq!(Copy::hold(&message).moved([]).len(), 50_000);
    // Each compared with each other would take minutes.
    assert!(begin.elapsed() < std::time::Duration::from_secs(5));
}

#[test]
fn what_is_moved_twice_travels_once() {
    let message = Message::builder("").header("guestlist-orig-h-CC", "a%20b").build();
    let again = ("guestlist-orig-h-CC".to_owned(), Bytes::from("a b"));
    let other = ("guestlist-orig-h-CC".to_owned(), Bytes::from("c"));
    let moved = Copy::hold(&message).moved([again, other]);
    let texts: Vec<&str> = moved.iter().map(|(_, value)| value.as_str()).collect();
    assert_eq!(texts, ["a%20b", "c"]);
}

#[test]
fn an_id_that_is_too_long_does_not_swell_its_copies_and_stays_too_long() {
    let long = vec![0xff; 1_000_000];
    let message = Message::builder("").transport_id(long).build();
    let copy = Copy::hold(&message);
    let size: usize = copy.headers().iter().map(|(name, value)| name.len() + value.len()).sum();
    assert!(size < 8 * defaults::MAX_ID, "{size} bytes");
    let back = come_back(&message, &copy);
    assert!(
        crate::identity::too_long(back.id().unwrap()),
        "a redrive is parked again, not run under another id"
    );
    let size_again: usize = Copy::hold(&back).headers().iter().map(|(_, value)| value.len()).sum();
    assert!(size_again < 8 * defaults::MAX_ID);
}

#[test]
fn an_id_of_the_longest_length_travels_whole() {
    let message = Message::builder("").transport_id(vec![0; defaults::MAX_ID]).build();
    let back = come_back(&message, &Copy::hold(&message));
    assert_eq!(back.id(), message.id());
    assert!(!crate::identity::too_long(back.id().unwrap()));
}

#[test]
fn a_dead_letters_story_is_read_back() {
    let message = Message::builder("").transport_id("1").source(Source::new("memory", "orders")).build();
    let record = DeadLetter::new(&message, Cause::Exhausted, "it\r\nfailed");
    let back = come_back(&message, &Copy::dead_letter(&message, &record));
    let read = DeadLetter::read(&back).unwrap();
    assert_eq!((read.cause.as_str(), read.error.as_str(), read.attempts), ("exhausted", "it\\r\\nfailed", 1));
    assert_eq!(read.failed_at, record.failed_at);
    assert_eq!(read.source.queue, "orders");
    // It is put back to work and fails again: one story, the last one.
    let again = DeadLetter::new(&back, Cause::Permanent, "no");
    let letter = come_back(&back, &Copy::dead_letter(&back, &again));
    assert_eq!(DeadLetter::read(&letter).unwrap().cause, "permanent");
    assert_eq!(DeadLetter::read(&come_back(&letter, &Copy::hold(&letter))), None, "at work it is no letter");
}

#[test]
fn copies_have_ids_by_what_makes_them_copies() {
    let order = || Message::builder("body").transport_id("1");
    let id = |message: &Message| Copy::hold(message).id().to_owned();
    let original = order().build();
    assert_eq!(id(&original), id(&order().build()));
    assert_ne!(id(&original), id(&order().header(GENERATION, "1").build()));
    assert_ne!(id(&original), id(&order().source(Source::new("memory", "other")).build()));
    assert_ne!(id(&original), id(&Message::builder("body").transport_id("2").build()));
    let record = DeadLetter::new(&original, Cause::Permanent, "");
    assert_ne!(id(&original), Copy::dead_letter(&original, &record).id());
    // Without an id, the body makes it.
    assert_ne!(id(&Message::builder("a").build()), id(&Message::builder("b").build()));
}

#[test]
fn no_copy_gives_its_message_an_id_that_it_did_not_have() {
    let nameless = Message::builder("body").header("tenant", "7").build();
    let once = come_back(&nameless, &Copy::hold(&nameless));
    let twice = come_back(&once, &Copy::hold(&once));
    for copy in [once, twice] {
        assert_eq!((copy.id(), copy.transport_id()), (None, None), "its copy's own is nobody's id");
    }
}

/// A queue may not take the transport's id for one: on copies it stays what it was.
#[test]
fn a_transports_id_that_nobody_looked_for_does_not_become_the_id_of_its_copies() {
    let message = Message::builder("body").transport_id("constant").build();
    let copy = come_back(&message, &Copy::hold(&message));
    assert_eq!(copy.logical_id(), None);
    assert_eq!(copy.transport_id(), message.transport_id());
    let id = MessageId::new("17").unwrap();
    let key = crate::Scope::new("", "orders").key(&id);
    message.identify(crate::identity::Identified { id: id.clone(), key, digest: None });
    let copy = come_back(&message, &Copy::hold(&message));
    assert_eq!(copy.logical_id(), Some(&id));
    assert_eq!(copy.transport_id(), message.transport_id());
}

fn failure(attempt: u32, error: &str) -> PastFailure {
    let message = Message::builder("").header(ATTEMPT, attempt.saturating_sub(1).to_string()).build();
    PastFailure::new(&message, Cause::CrashSuspected, error)
}

/// What the wire has of a history.
fn size(history: &History) -> usize {
    history
        .headers()
        .iter()
        .filter(|(name, _)| name == HISTORY)
        .map(|(name, value)| name.len() + value.len() + 4)
        .sum()
}

/// A message that came with this history.
fn with_history(value: impl Into<Bytes>) -> Message {
    Message::builder("").header(HISTORY, value).build()
}

/// Headers of a stranger: broken, huge, or nearly ours.
fn forged_history() -> impl Strategy<Value = Vec<u8>> {
    let entry = (text(300), any::<u32>(), any::<u64>(), text(20)).prop_map(|(error, attempt, at, cause)| {
        let (at, cause) = (if attempt % 2 == 0 { at } else { at % 2_000_000_000 }, if at % 2 == 0 { "timeout" } else { &cause });
        serde_json::json!({ "attempt": attempt, "at": at, "cause": cause, "error": error, "generation": attempt })
    });
    let list =
        vec(entry, 0..20).prop_map(|entries| serde_json::Value::Array(entries).to_string().into_bytes());
    let odd = prop_oneof![
        Just(r#"[{"attempt":-1,"at":1,"cause":"timeout"}]"#),
        Just(r#"[{"attempt":1,"at":1,"cause":"a\r\nb","error":7}]"#),
        Just("{}"),
        Just("[[[[[[[[[["),
        Just("null"),
        Just(""),
    ];
    prop_oneof![list, bytes(300), odd.prop_map(|text| text.as_bytes().to_vec()), Just(vec![b'['; 200_000])]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn a_history_is_bounded_and_always_has_the_newest(
        forged in forged_history(),
        errors in vec(text(400), 1..14),
        quotes in any::<bool>(),
    ) {
        let mut history = History::carried(&with_history(forged));
        prop_assert!(size(&history) <= defaults::HISTORY);
        for (attempt, error) in (1..).zip(&errors) {
            let error = if quotes { "\"\\".repeat(300) } else { error.clone() };
            let newest = failure(attempt, &error);
            history.add(newest.clone());
            prop_assert!(size(&history) <= defaults::HISTORY, "{} bytes", size(&history));
            let headers = history.headers();
            let back = headers.iter().fold(Message::builder(""), |back, (name, value)| back.header(name.clone(), value.clone()));
            let back = History::carried(&back.build());
            prop_assert_eq!(&back, &History::carried(&back_of(&back)), "it stays as it is");
            let entries = back.into_entries();
            prop_assert_eq!(entries.last(), Some(&newest));
            prop_assert!(entries.len() <= 10);
            for (name, value) in &headers {
                prop_assert!(!value.chars().any(char::is_control), "{name}: {value}");
            }
        }
    }

    #[test]
    fn merged_histories_are_bounded_and_in_order(one in forged_history(), other in forged_history()) {
        let mut merged = History::carried(&with_history(one));
        merged.merge(&History::carried(&with_history(other)));
        prop_assert!(size(&merged) <= defaults::HISTORY);
        let first = merged.first_at();
        let times: Vec<u64> = merged.into_entries().iter().map(|entry| entry.at).collect();
        prop_assert!(times.is_sorted() && times.len() <= 10);
        prop_assert!(first <= times.first().copied().or(first));
    }
}

fn back_of(history: &History) -> Message {
    let headers = history.headers();
    headers.into_iter().fold(Message::builder(""), |back, (name, value)| back.header(name, value)).build()
}

#[test]
fn ten_failures_of_the_longest_kind_have_room() {
    let mut history = History::default();
    for attempt in u32::MAX - 11..=u32::MAX {
        history.add(PastFailure { generation: u32::MAX, ..failure(attempt, &"\"".repeat(1000)) });
    }
    assert_eq!(back_of(&history).copy_marks().story.len(), 2);
    assert_eq!(history.into_entries().len(), defaults::HISTORY_FAILURES);
}

#[test]
fn a_history_of_the_future_is_forged() {
    let now = std::time::SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    for (at, known) in [(now, 1), (now + 3600, 1), (now + 3 * 86_400, 0), (u64::MAX, 0)] {
        let entry = format!(r#"[{{"attempt":1,"at":{at},"cause":"timeout"}}]"#);
        let message =
            Message::builder("").header(HISTORY, entry).header(FIRST_FAILED_AT, at.to_string()).build();
        let history = History::carried(&message);
        assert_eq!(history.first_at().is_some(), known == 1, "{at}");
        assert_eq!(history.into_entries().len(), known, "{at}");
    }
}

#[test]
fn two_accounts_of_one_story_become_one() {
    let at = |attempt, at| PastFailure { at, ..failure(attempt, "no") };
    let history = |entries: &[PastFailure]| {
        let mut history = History::default();
        for entry in entries {
            history.add(entry.clone());
        }
        history
    };
    let mut merged = history(&[at(1, 10), at(3, 30)]);
    merged.merge(&history(&[at(2, 20), at(3, 30), at(5, 50)]));
    assert_eq!(merged.first_at(), Some(10));
    let attempts: Vec<u32> = merged.into_entries().iter().map(|entry| entry.attempt).collect();
    assert_eq!(attempts, [1, 2, 3, 5], "the fourth died with its process");
}

#[test]
fn refusals_that_spend_no_attempt_leave_one_entry() {
    let mut history = History::default();
    for error in ["first", "6 attempts were made", "6 attempts were made, again"] {
        history.add(failure(if error == "first" { 1 } else { 6 }, error));
    }
    let errors: Vec<String> = history.into_entries().into_iter().map(|entry| entry.error).collect();
    assert_eq!(errors, ["first", "6 attempts were made, again"]);
}

/// One that failed, with a story.
fn failed(error: &str) -> Message {
    let message = Message::builder("body").transport_id("1").header("tenant", "7").build();
    let mut history = History::default();
    history.add(failure(1, error));
    message.note(Noted { error: error.to_owned(), history });
    message
}

#[test]
fn a_history_goes_on_over_holds_dead_letters_and_redrives() {
    let once = come_back(&failed("no"), &Copy::hold(&failed("no")));
    let released = come_back(&once, &Copy::release(&once));
    let record = DeadLetter::new(&released, Cause::Exhausted, "no more");
    let letter = come_back(&released, &Copy::dead_letter(&released, &record));
    let read = DeadLetter::read(&letter).unwrap();
    assert_eq!((read.history.len(), read.history[0].error.as_str()), (1, "no"));
    assert_eq!(read.first_failed_at, Some(read.history[0].at));
    let redriven = come_back(&letter, &Copy::redrive(&letter, "letter", 1));
    assert_eq!(DeadLetter::read(&redriven), None);
    let mut history = History::carried(&redriven);
    history.add(PastFailure::new(&redriven, Cause::Timeout, "again"));
    let known: Vec<(u32, u32)> =
        history.into_entries().iter().map(|entry| (entry.generation, entry.attempt)).collect();
    assert_eq!(known, [(0, 1), (1, 1)]);
}

#[test]
fn the_story_gives_way_to_the_message_and_the_body_to_its_headers() {
    let message = failed("no");
    let record =
        DeadLetter::new(&message, Cause::Permanent, "no").with_history(History::carried(&back_of(&{
            let mut history = History::default();
            history.add(failure(1, "no"));
            history
        })));
    let mut copy = Copy::dead_letter(&message, &record);
    let has = |copy: &Copy<'_>, name: &str| copy.headers().iter().any(|(other, _)| other == name);
    assert!(has(&copy, HISTORY) && has(&copy, ERROR));
    assert!(copy.shrink(false, false) && !has(&copy, HISTORY) && has(&copy, ERROR));
    assert!(copy.shrink(false, false) && !has(&copy, ERROR));
    assert!(
        !copy.shrink(false, false) && copy.is_whole() && !has(&copy, TRUNCATED),
        "that is all without a cut"
    );
    for left in [2, 1, 0] {
        assert!(copy.shrink(true, false));
        assert_eq!(copy.body(), &"body"[..left]);
        assert!(matches!(copy.redact("tenant", Bytes::new), Redact::Keep));
    }
    assert!(copy.shrink(true, false) && matches!(copy.redact("tenant", Bytes::new), Redact::Remove));
    assert!(!copy.shrink(true, false), "nothing is left to give");
    let letter = come_back(&Message::builder(copy.body()).build(), &copy);
    let read = DeadLetter::read(&letter).unwrap();
    assert_eq!((read.truncated, read.headers_dropped, read.is_whole()), (Some(4), Some(1), false));
    assert_eq!(read.body_hash, Some(blake3::hash(b"body").to_string()));
    assert_eq!((read.id, read.first_failed_at.is_some()), (MessageId::new("1"), true), "what names it stays");
}

#[test]
fn what_is_made_of_a_part_says_that_it_is_one() {
    let message = failed("no");
    let record = DeadLetter::new(&message, Cause::Permanent, "no");
    let mut copy = Copy::dead_letter(&message, &record);
    while copy.shrink(true, false) {}
    let letter = come_back(&Message::builder("").build(), &copy);
    let redriven = come_back(&letter, &Copy::redrive(&letter, "letter", 1));
    let held = come_back(&redriven, &Copy::hold(&redriven));
    let again = come_back(&held, &Copy::dead_letter(&held, &record));
    let (read, first) = (DeadLetter::read(&again).unwrap(), DeadLetter::read(&letter).unwrap());
    assert_eq!((read.truncated, read.headers_dropped, &read.body_hash), (Some(4), Some(1), &first.body_hash));
    for forged in ["", "x", "-1", "zz\r\n"] {
        let message = Message::builder("").header(TRUNCATED, forged).header(BODY_HASH, forged).build();
        assert!(
            Copy::hold(&message).headers().iter().all(|(name, _)| name != TRUNCATED && name != BODY_HASH)
        );
    }
}

#[test]
fn headers_that_are_too_large_alone_do_not_cost_the_body() {
    let message = Message::builder("body").header("wide", "w").header("guestlist-orig-h-CC", "c").build();
    let mut copy = Copy::hold(&message);
    assert!(copy.shrink(true, true) && !copy.shrink(true, true));
    assert_eq!((copy.body(), copy.moved([])), (Bytes::from("body"), Vec::new()));
}

#[test]
fn a_message_without_a_body_is_not_said_to_be_cut() {
    let empty = Message::builder("").build();
    let mut copy = Copy::hold(&empty);
    assert!(!copy.shrink(true, false) && copy.is_whole());
}

#[test]
fn a_redaction_sees_the_senders_values_and_nothing_of_ours() {
    let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&asked);
    let redaction = Redaction::new(move |field, value| {
        seen.lock().unwrap().push((format!("{field:?}"), String::from_utf8_lossy(value).into_owned()));
        match field {
            Field::Header("CC") => Redact::Replace("x\r\ny".to_owned()),
            Field::Property("expiration") => Redact::Remove,
            Field::Header("boom") => panic!("a value that was not expected"),
            _ => Redact::Keep,
        }
    });
    let message = Message::builder("body")
        .header(ID, "17")
        .header(GENERATION, "3")
        .header("guestlist-orig-h-CC", "secret%20cc")
        .header("guestlist-orig-p-expiration", "60000")
        .header("guestlist-orig-p-user_id", "guest")
        .build();
    let record = DeadLetter::new(&message, Cause::Permanent, "no");
    let plain = Copy::dead_letter(&message, &record);
    let copy = Copy::dead_letter(&message, &record).redacted(Some(&redaction));
    assert_eq!(copy.headers(), plain.headers());
    assert_eq!(
        copy.moved([]),
        [
            ("guestlist-orig-h-CC".to_owned(), encode(b"x\\r\\ny")),
            ("guestlist-orig-p-user_id".to_owned(), "guest".to_owned()),
        ]
    );
    assert!(matches!(copy.redact("boom", || "secret".into()), Redact::Remove), "who panics shows nothing");
    assert!(matches!(copy.redact("tenant", || "7".into()), Redact::Keep));
    let asked = asked.lock().unwrap();
    assert!(asked.contains(&(r#"Header("CC")"#.to_owned(), "secret cc".to_owned())), "{asked:?}");
    assert!(!asked.iter().any(|(field, _)| field.contains("guestlist")), "{asked:?}");
}

/// Held, released or parked again, a redriven message is as young as its redrive made it.
#[test]
fn the_time_of_a_redrive_stays_on_every_copy_until_the_next_one() {
    let original = Message::builder("{}").transport_id("order-1").build();
    assert_eq!(original.redriven_at(), None);
    let redriven = come_back(&original, &Copy::redrive(&original, "a letter", 1));
    let at = redriven.redriven_at().expect("a redrive says when");
    assert!(SystemTime::now().duration_since(at).is_ok_and(|ago| ago < std::time::Duration::from_secs(60)));
    assert_eq!((redriven.generation(), redriven.attempt()), (1, 1));
    let record = DeadLetter::new(&redriven, crate::Cause::Exhausted, "no");
    for copy in [Copy::hold(&redriven), Copy::release(&redriven), Copy::dead_letter(&redriven, &record)] {
        assert_eq!(come_back(&redriven, &copy).redriven_at(), Some(at), "{copy:?}");
    }
    let earlier = Message::builder("{}").header(REDRIVEN_AT, "1000").build();
    let again = come_back(&earlier, &Copy::redrive(&earlier, "a letter", 2));
    assert!(again.redriven_at() >= Some(at), "the last redrive counts");
}

#[test]
fn i16_what_a_copy_carries_aside_shows_no_value() {
    const CARD: &str = "4111111111111111";
    let mut headers = Headers::new();
    for name in ["guestlist-id", "guestlist-orig-id", "guestlist-orig-h-CC", "guestlist-orig-p-user-id"] {
        headers.push(name, CARD);
    }
    let shown = format!("{:?}", Marks::take_from(&mut headers));
    assert!(shown.contains("guestlist-orig-h-CC") && !shown.contains("4111"), "{shown}");
}
