use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

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
                let free_text = name == ERROR;
                prop_assert!(is_plain(value) || free_text, "{name}: {value}");
                prop_assert!(!value.chars().any(char::is_control), "{name}: {value}");
                prop_assert!(!free_text || value.len() <= defaults::ERROR_TEXT);
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

/// Held, released or parked again, a redriven message is as young as its redrive made it.
#[test]
fn the_time_of_a_redrive_stays_on_every_copy_until_the_next_one() {
    let original = Message::builder("{}").transport_id("order-1").build();
    assert_eq!(original.redriven_at(), None);
    let redriven = come_back(&original, &Copy::redrive(&original, "a letter", 1));
    let at = redriven.redriven_at().expect("a redrive says when");
    assert!(SystemTime::now().duration_since(at).is_ok_and(|ago| ago < Duration::from_secs(60)));
    assert_eq!((redriven.generation(), redriven.attempt()), (1, 1));
    let record = DeadLetter::new(&redriven, crate::Cause::Exhausted, "no");
    for copy in [Copy::hold(&redriven), Copy::release(&redriven), Copy::dead_letter(&redriven, &record)] {
        assert_eq!(come_back(&redriven, &copy).redriven_at(), Some(at), "{copy:?}");
    }
    let earlier = Message::builder("{}").header(REDRIVEN_AT, "1000").build();
    let again = come_back(&earlier, &Copy::redrive(&earlier, "a letter", 2));
    assert!(again.redriven_at() >= Some(at), "the last redrive counts");
}
