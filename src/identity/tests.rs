use std::collections::HashMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::Source;

fn id(bytes: impl Into<Bytes>) -> MessageId {
    MessageId::new(bytes).unwrap()
}

/// One text cut in two at two places: what is put together again must not be taken for the other.
fn cuts() -> impl Strategy<Value = [(String, String); 2]> {
    ("[ab:/\0]{1,6}", any::<proptest::sample::Index>(), any::<proptest::sample::Index>()).prop_map(
        |(text, one, other)| {
            [one, other].map(|at| {
                let (head, tail) = text.split_at(at.index(text.len() + 1));
                (head.to_owned(), tail.to_owned())
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn keys_are_equal_only_if_namespace_scope_and_id_are([a, b] in cuts(), third in "[ab:/\0]{1,2}") {
        let third = id(third);
        let outer = |(namespace, scope): &(String, String)| Scope::new(namespace, scope).key(&third);
        prop_assert_eq!(outer(&a) == outer(&b), a == b);
        let inner = |(scope, name): &(String, String)| {
            MessageId::new(name.clone()).map(|name| Scope::new("", scope).key(&name))
        };
        prop_assert_eq!(inner(&a) == inner(&b), a == b);
    }

    #[test]
    fn ids_of_events_are_equal_only_if_source_and_id_are([a, b] in cuts()) {
        let found = |(source, name): &(String, String)| {
            let event = Message::builder("").header("ce-source", source.clone()).header("ce-id", name.clone());
            Identity::default().find(&event.build())
        };
        let whole = |(source, name): &(String, String)| !source.is_empty() && !name.is_empty();
        prop_assert_eq!(found(&a).is_some(), whole(&a));
        prop_assert_eq!(found(&a) == found(&b), a == b || !whole(&a) && !whole(&b));
    }

    #[test]
    fn ids_of_children_are_equal_only_if_parent_and_name_are([a, b] in cuts()) {
        let child = |(parent, name): &(String, String)| {
            Message::builder("").transport_id(parent.clone()).build().child_id(name)
        };
        prop_assert_eq!(child(&a).is_some(), !a.0.is_empty());
        prop_assert_eq!(child(&a) == child(&b), a == b);
    }

    /// A float has not the digits to tell two long numbers apart.
    #[test]
    fn numbers_in_a_body_are_equal_ids_only_if_they_are_equal(a in "[1-9][0-9]{0,30}", b in "[1-9][0-9]{0,30}") {
        let found = |number: &str| Identity::none().json_pointer("/id").find(&json(&format!(r#"{{"id":{number}}}"#)));
        if let (Some(found_a), Some(found_b)) = (found(&a), found(&b)) {
            prop_assert_eq!(found_a == found_b, a == b);
            prop_assert_eq!(found_a.as_str(), Some(a.as_str()));
        }
    }

    #[test]
    fn no_body_makes_a_pointer_panic(body in vec(any::<u8>(), 0..200), pointer in "[/a-z~0-9]{0,12}") {
        let _ = Identity::none().json_pointer(pointer).find(&Message::builder(body).build());
    }
}

fn json(body: &str) -> Message {
    Message::builder(body.to_owned()).build()
}

#[test]
fn long_numbers_next_to_each_other_are_not_one_id() {
    let found =
        |number: &str| Identity::none().json_pointer("/id").find(&json(&format!(r#"{{"id":{number}}}"#)));
    assert_eq!(found("18446744073709551615").unwrap().as_bytes(), b"18446744073709551615");
    assert_eq!(found("-9223372036854775808").unwrap().as_bytes(), b"-9223372036854775808");
    // As floats these would be equal, and the second message a duplicate of the first.
    assert_eq!((found("18446744073709551617"), found("18446744073709551618")), (None, None));
    assert_eq!(
        (found("0.1"), found("0.10000000000000001"), found("1e2"), found("-0")),
        (None, None, None, None)
    );
}

#[test]
fn only_a_string_or_a_whole_number_in_a_body_is_an_id() {
    let found = |body: &str| Identity::none().json_pointer("/a/id").find(&json(body));
    assert_eq!(found(r#"{"a":{"id":"x"}}"#), Some(id("x")));
    assert_eq!(found(r#"{"a":{"id":"\u0000"}}"#), Some(id("\0")));
    for body in [
        r#"{"a":{"id":""}}"#,
        r#"{"a":{"id":null}}"#,
        r#"{"a":{"id":true}}"#,
        r#"{"a":{"id":["x"]}}"#,
        r#"{"a":{"id":{}}}"#,
        r#"{"a":{}}"#,
        r#"{"a":{"id":"\ud800"}}"#,
        "{",
        "",
        "\u{feff}{}",
    ] {
        assert_eq!(found(body), None, "{body}");
    }
    assert_eq!(found(&format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000))), None);
    assert_eq!(found(&format!(r#"{{"a":{{"id":{}}}}}"#, "9".repeat(3_000_000))), None);
}

#[test]
fn sources_are_asked_in_order_and_an_empty_answer_is_none() {
    let message = Message::builder("body").transport_id("").header("h", "").header("second", "2").build();
    let identity = Identity::default().header("h").header("missing").header("second").body_hash();
    assert_eq!(identity.find(&message), Some(id("2")));
    assert_eq!(Identity::default().header("h").find(&message), None);
    assert_eq!(Identity::none().find(&Message::builder("").transport_id("1").build()), None);
    assert_eq!(Identity::none().with(|_| MessageId::new("w")).find(&message), Some(id("w")));
}

#[test]
fn the_id_on_a_copy_of_ours_comes_first() {
    let copy = Message::builder("").transport_id("copy").header("guestlist-id", "a%00b").build();
    for identity in [Identity::none(), Identity::default(), Identity::none().body_hash()] {
        assert_eq!(identity.find(&copy), Some(id("a\0b")));
    }
    let empty = Message::builder("").transport_id("1").header("guestlist-id", "").build();
    assert_eq!(Identity::default().find(&empty), Some(id("1")));
}

#[test]
fn an_event_has_an_id_by_each_of_its_bindings_and_none_without_its_source() {
    let event =
        |names: [&str; 2]| Message::builder("").header(names[0], "17").header(names[1], "/shop").build();
    let found = |names| Identity::default().find(&event(names));
    let expected = found(["ce-id", "ce-source"]);
    assert!(expected.is_some());
    assert_eq!(found(["cloudEvents:id", "cloudEvents:source"]), expected);
    assert_eq!(found(["cloudEvents_id", "cloudEvents_source"]), expected);
    assert_eq!(found(["ce-id", "source"]), None);
    assert_eq!(found(["id", "ce-source"]), None);
}

#[test]
fn a_place_in_a_stream_is_an_id_where_there_is_one() {
    let identity = Identity::none().stream_sequence();
    let at = |stream: &str, sequence| {
        let source = Source { stream: stream.to_owned(), sequence, ..Source::new("nats", "durable") };
        identity.find(&Message::builder("").source(source).build())
    };
    assert_eq!(at("ORDERS", None), None);
    assert_ne!(at("ORDERS", Some(1)), at("ORDERS", Some(2)));
    assert_ne!(at("ORDERS", Some(1)), at("REFUNDS", Some(1)));
}

#[test]
fn look_alikes_have_keys_of_their_own() {
    let scope = Scope::new("", "orders");
    let alike: [&[u8]; 14] = [
        b"order",
        b"Order",
        b"order ",
        b" order",
        b"order\0",
        b"order\r\n",
        "оrder".as_bytes(),
        "ordеr".as_bytes(),
        "o\u{301}rder".as_bytes(),
        "\u{f3}rder".as_bytes(),
        "order\u{200b}".as_bytes(),
        b"order\xff",
        b"*",
        b">",
    ];
    let mut keys = HashMap::new();
    for bytes in alike {
        let other = keys.insert(scope.key(&id(bytes)), bytes);
        assert_eq!(other, None, "{bytes:?}");
    }
}

#[test]
fn ids_of_any_length_have_keys_of_one_length() {
    let scope = Scope::new("", "orders");
    for length in [1, 63, 64, 65, 255, 10_240, 1_000_000] {
        let key = scope.key(&id(vec![7; length]));
        assert_eq!(key.to_string().len(), 32);
        assert_eq!(DedupKey::from_bytes(*key.as_bytes()), key);
    }
}

/// Keys are in stores: another release must find them again.
#[test]
fn keys_and_ids_stay_the_same_over_releases() {
    assert_eq!(
        Scope::new("shop", "orders").key(&id("order-17")).to_string(),
        "5119b88e58412cac828befac1c2627c0"
    );
    let parent = Message::builder("").transport_id("order-17").build();
    assert_eq!(parent.child_id("receipt").unwrap().as_str(), Some("6cb9db77b3a9b4bfb0de981cc7d10a97"));
    assert_eq!(
        body_hash(&Bytes::from("")).as_str(),
        Some("af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262")
    );
}

#[test]
fn two_queues_that_know_the_same_id_have_children_of_their_own() {
    let child = |scope: &str| {
        let message = Message::builder("").transport_id("1").build();
        let parent = id("1");
        let key = Scope::new("", scope).key(&parent);
        message.identify(Identified { id: parent, key, digest: None });
        message.child_id("receipt").unwrap()
    };
    assert_eq!(child("orders"), child("orders"));
    // Else the receipt of refund 1 would be dropped as a copy of the receipt of order 1.
    assert_ne!(child("orders"), child("refunds"));
}

#[test]
fn debug_shows_no_id() {
    let message = Message::builder("secret").transport_id("secret").header("x", "secret").build();
    let identity =
        Identity::default().header("x").json_pointer("/p").body_hash().stream_sequence().with(|_| None);
    let found = Identified { id: id("secret"), key: Scope::new("", "s").key(&id("secret")), digest: None };
    for text in [format!("{message:?}"), format!("{identity:?}"), format!("{found:?}")] {
        assert!(!text.contains("secret"), "{text}");
    }
}
