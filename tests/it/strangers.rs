//! Messages of strangers: what becomes of each is computed beside the stack, from the promises, and compared.
//!
//! `bad_input` has the names of the ends; here each message goes its whole way, twice, and its dead letter must be
//! true to it: the same id, body and headers.

use std::sync::LazyLock;
use std::time::Duration;

use guestlist::broker::copy::{ATTEMPT, DeadLetter};
use guestlist::broker::memory::PublishFault;
use guestlist::dedup::MemoryStore;
use guestlist::prelude::*;
use guestlist::{Cause, EventKind, Handled, MessageBuilder, Outcome};
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::time::Instant;

use crate::support::{DEAD, Lab, ORDERS, Process, until};

type Headers = Vec<(String, Vec<u8>)>;

/// A message as a stranger sends it.
#[derive(Clone)]
struct Bad {
    id: Option<Vec<u8>>,
    headers: Headers,
    body: Vec<u8>,
}

impl Bad {
    fn message(&self) -> MessageBuilder {
        let message = Message::builder(self.body.clone()).transport_id(self.id.clone().unwrap_or_default());
        let add = |message: MessageBuilder, (name, value): &(String, Vec<u8>)| {
            message.header(name.clone(), value.clone())
        };
        self.headers.iter().fold(message, add)
    }
}

impl std::fmt::Debug for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let short = |bytes: &[u8]| bytes[..bytes.len().min(60)].escape_ascii().to_string();
        writeln!(f, "id {:?}, body {}", self.id.as_deref().map(short), short(&self.body))?;
        self.headers.iter().try_for_each(|(name, value)| writeln!(f, "  {name:?}: {}", short(value)))
    }
}

fn odd_id() -> impl Strategy<Value = Option<Vec<u8>>> {
    let known = prop_oneof![
        Just(b"".to_vec()),
        Just(b"\0".to_vec()),
        Just(b"a\r\nguestlist-id: b".to_vec()),
        Just(b"*".to_vec()),
        Just(b">".to_vec()),
        Just(b"orders.*.>".to_vec()),
        Just(b" ".to_vec()),
        Just(b"\xff\xfe".to_vec()),
        Just(b"100%25".to_vec()),
        Just("\u{202e}1-redro".as_bytes().to_vec()),
        Just(vec![b'x'; 255]),
        Just(vec![0xf0; guestlist::defaults::MAX_ID]),
        Just(vec![b'x'; guestlist::defaults::MAX_ID + 1]),
        Just(vec![b'x'; 10 * 1024]),
    ];
    prop_oneof![
        2 => Just(None),
        6 => known.prop_map(Some),
        3 => vec(any::<u8>(), 1..40).prop_map(Some),
    ]
}

/// The names that something in the stack looks at, and others.
fn name() -> impl Strategy<Value = String> {
    let known = prop_oneof![
        Just("guestlist-id"),
        Just(ATTEMPT),
        Just("guestlist-generation"),
        Just("guestlist-cause"),
        Just("guestlist-error"),
        Just("guestlist-failed-at"),
        Just("guestlist-orig-queue"),
        Just("guestlist-orig-system"),
        Just("guestlist-orig-exchange"),
        Just("guestlist-orig-routing-key"),
        Just("guestlist-orig-stream"),
        Just("guestlist-orig-sequence"),
        Just("guestlist-orig-id"),
        Just("guestlist-orig-h-"),
        Just("guestlist-orig-h-CC"),
        Just("guestlist-orig-h-guestlist-id"),
        Just("guestlist-orig-p-expiration"),
        Just("guestlist-"),
        Just("guestlist-from-2030"),
        Just("ce-id"),
        Just("ce-source"),
        Just("cloudEvents:id"),
        Just("x-death"),
        Just("x-delivery-count"),
        Just("Nats-Msg-Id"),
        Just("Nats-Rollup"),
        Just(""),
        Just("a\r\nb"),
    ];
    prop_oneof![5 => known.prop_map(str::to_owned), 1 => ".{0,8}"]
}

fn value() -> impl Strategy<Value = Vec<u8>> {
    let known = prop_oneof![
        Just("-1"),
        Just("0"),
        Just("1"),
        Just("4"),
        Just("5"),
        Just("4294967295"),
        Just("4294967296"),
        Just("18446744073709551616"),
        Just("1e3"),
        Just("five"),
        Just(""),
        Just("%"),
        Just("%0D%0A"),
        Just("a\r\nx: y"),
        Just("orders.dead"),
    ];
    prop_oneof![
        4 => known.prop_map(|text| text.as_bytes().to_vec()),
        2 => vec(any::<u8>(), 0..30),
        1 => Just(vec![b'x'; 5_000]),
    ]
}

fn headers() -> impl Strategy<Value = Headers> {
    let flood = (name(), value()).prop_map(|header| vec![header; 300]);
    prop_oneof![30 => vec((name(), value()), 0..6), 1 => flood]
}

/// JSON that nests deeper than a stack is high.
static NESTED: LazyLock<Vec<u8>> = LazyLock::new(|| [vec![b'['; 10_000], vec![b']'; 10_000]].concat());

fn body() -> impl Strategy<Value = Vec<u8>> {
    let order = |cents: i64| format!(r#"{{"cents": {cents}}}"#).into_bytes();
    prop_oneof![
        40 => (0..3_i64).prop_map(order),
        2 => Just(order(3)),
        10 => Just(br#"{"cents": "#.to_vec()),
        10 => Just(br#"{"cents": 1e400}"#.to_vec()),
        10 => Just(br#"{"cents": 0, "note": "\ud800"}"#.to_vec()),
        10 => Just(b"".to_vec()),
        10 => Just(NESTED.clone()),
        10 => vec(any::<u8>(), 0..40),
    ]
}

fn bad() -> impl Strategy<Value = Bad> {
    (odd_id(), headers(), body()).prop_map(|(id, headers, body)| Bad { id, headers, body })
}

fn policy() -> impl Strategy<Value = MissingId> {
    prop_oneof![Just(MissingId::DeadLetter), Just(MissingId::Process), Just(MissingId::HashBody)]
}

#[derive(serde::Deserialize)]
struct Order {
    cents: i64,
}

/// Each ending that a handler has.
async fn handle(Json(order): Json<Order>) -> Handled {
    match order.cents {
        0 => Ok(()),
        1 => Err("the bank is closed".into()),
        2 => Err(Failure::permanent("no\r\nsuch\0account \u{202e}")),
        3 => panic!("a handler that\r\npanics"),
        _ => Err(Failure::permanent("an order of the generator's own making")),
    }
}

const ATTEMPTS: usize = guestlist::defaults::MAX_ATTEMPTS as usize;

/// How many deliveries are left to one that has had so many; it is delivered once in any case.
fn left_after(attempts: usize) -> usize {
    ATTEMPTS.saturating_sub(attempts).max(1)
}

/// Where a queue of this policy finds its ids.
fn identity(policy: MissingId) -> Identity {
    match policy {
        MissingId::HashBody => Identity::default().body_hash(),
        _ => Identity::default(),
    }
}

/// What is to become of a message: how it ends, and after how many deliveries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fate {
    outcome: Outcome,
    deliveries: usize,
}

impl Fate {
    const fn at_once(outcome: Outcome) -> Self {
        Self { outcome, deliveries: 1 }
    }

    const fn parked(cause: Cause) -> Self {
        Self::at_once(Outcome::DeadLettered(cause))
    }

    /// By the promises; the handler and the body are the generator's.
    fn of(message: &Message, policy: MissingId) -> Self {
        let claimed = match identity(policy).find(message) {
            Some(id) if id.as_bytes().len() > guestlist::defaults::MAX_ID => {
                return Self::parked(Cause::InvalidId);
            }
            None if policy == MissingId::DeadLetter => return Self::parked(Cause::MissingId),
            id => id.is_some(),
        };
        let Ok(order) = serde_json::from_slice::<Order>(message.payload()) else {
            return Self::parked(Cause::Undecodable);
        };
        match order.cents {
            0 if claimed => Self::at_once(Outcome::Handled),
            0 => Self::at_once(Outcome::HandledUnchecked),
            1 | 3 => Self {
                outcome: Outcome::DeadLettered(Cause::Exhausted),
                // The store counts. Without a claim nobody does, and the hint in a header ends it sooner: it is
                // added to the deliveries.
                deliveries: if claimed { ATTEMPTS } else { left_after(message.attempt() as usize - 1) },
            },
            _ => Self::parked(Cause::Permanent),
        }
    }

    /// Of the very same message once more.
    fn again(self, message: &Message, policy: MissingId) -> Self {
        match self.outcome {
            Outcome::Handled => Self::at_once(Outcome::Duplicate),
            Outcome::DeadLettered(Cause::Undecodable | Cause::Permanent | Cause::Exhausted)
                if identity(policy).find(message).is_some() =>
            {
                Self::parked(Cause::Parked)
            }
            _ => self,
        }
    }
}

/// What became of what was sent since `events` were logged.
fn fate_since(lab: &Lab, events: usize) -> Fate {
    let events = &lab.log.events()[events..];
    let ends = events.iter().filter_map(|event| match event.kind {
        EventKind::Acked(outcome) => Some(outcome),
        _ => None,
    });
    let ends: Vec<_> = ends.collect();
    assert_eq!(ends.len(), 1, "one end, and it has a name: {ends:?}");
    let deliveries = events.iter().filter(|event| event.kind == EventKind::Received).count();
    Fate { outcome: ends[0], deliveries }
}

/// A copy shows the same id; or what is too long, cut, and still too long.
fn is_same(found: Option<&MessageId>, original: Option<&MessageId>) -> bool {
    let too_long = |id: &&MessageId| id.as_bytes().len() > guestlist::defaults::MAX_ID;
    match (found.filter(too_long), original.filter(too_long)) {
        (Some(found), Some(original)) => original.as_bytes().starts_with(found.as_bytes()),
        _ => found == original,
    }
}

fn assert_is_copy(letter: &Message, original: &Message, policy: MissingId, cause: Cause) {
    assert!(letter.payload() == original.payload(), "the same body");
    assert!(letter.headers() == original.headers(), "the sender's headers, no more and no fewer");
    assert!(is_same(letter.transport_id(), original.transport_id()), "{letter:?} of {original:?}");
    let (found, id) = (identity(policy).find(letter), identity(policy).find(original));
    assert!(is_same(found.as_ref(), id.as_ref()), "a redrive is of the same id: {letter:?} of {original:?}");
    assert_eq!(letter.generation(), original.generation());
    let story = DeadLetter::read(letter).expect("it has a story");
    assert_eq!(story.cause, cause.name());
    assert!(!story.error.chars().any(char::is_control), "{:?}", story.error);
    assert!(story.error.len() <= guestlist::defaults::ERROR_TEXT);
}

/// Sends it, and waits for its end.
async fn end_of(lab: &Lab, message: MessageBuilder) -> Fate {
    let events = lab.log.events().len();
    lab.broker.send(ORDERS, message).unwrap();
    lab.drained().await;
    until("it has ended", || lab.log.events().len() > events && ended(lab)).await;
    fate_since(lab, events)
}

/// Looks whether its end is the right one, and its copy true to it.
async fn send(lab: &Lab, bad: &Bad, policy: MissingId, expected: Fate) {
    let before = lab.broker.depth(DEAD).unwrap();
    assert_eq!(end_of(lab, bad.message()).await, expected);
    let letters = lab.broker.messages(DEAD).unwrap().split_off(before);
    match (expected.outcome, &letters[..]) {
        (Outcome::DeadLettered(cause), [letter]) => {
            assert_is_copy(letter, &bad.message().build(), policy, cause);
        }
        (Outcome::DeadLettered(_), _) => panic!("{} letters", letters.len()),
        _ => assert_eq!(letters.len(), 0),
    }
}

/// The last event is an end.
fn ended(lab: &Lab) -> bool {
    lab.log.events().last().is_some_and(|event| matches!(event.kind, EventKind::Acked(_)))
}

fn start(lab: &Lab, policy: MissingId) -> Process {
    lab.start_in_process(lab.queue().missing_id(policy).handler(handle))
}

/// The whole way of one message, twice, over a clock of its own.
fn two_copies_of(bad: &Bad, policy: MissingId) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(async {
        let lab = Lab::over(MemoryStore::with_capacity(100));
        let process = start(&lab, policy);
        let message = bad.message().build();
        let fate = Fate::of(&message, policy);
        send(&lab, bad, policy, fate).await;
        send(&lab, bad, policy, fate.again(&message, policy)).await;
        process.stop().await.unwrap();
        lab.check();
    });
}

proptest! {
    // Two of each: ten thousand messages.
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    #[test]
    fn every_message_has_a_named_end_and_a_copy_that_is_true_to_it(bad in bad(), policy in policy()) {
        two_copies_of(&bad, policy);
    }
}

fn order(id: &[u8]) -> MessageBuilder {
    Message::builder(r#"{"cents": 0}"#).transport_id(id.to_vec())
}

#[tokio::test(start_paused = true)]
async fn each_policy_for_missing_ids_holds_for_each_way_to_have_none() {
    let missing = Outcome::DeadLettered(Cause::MissingId);
    let policies = [
        (MissingId::DeadLetter, [missing, missing]),
        (MissingId::Process, [Outcome::HandledUnchecked, Outcome::HandledUnchecked]),
        (MissingId::HashBody, [Outcome::Handled, Outcome::Duplicate]),
    ];
    let ways: [fn(MessageBuilder) -> MessageBuilder; 5] = [
        |none| none,
        |empty| empty.transport_id(""),
        |empty| empty.header("guestlist-id", ""),
        |half| half.header("ce-id", "17"),
        |half| half.header("ce-source", "/shop").header("ce-id", ""),
    ];
    for (policy, expected) in policies {
        for way in ways {
            let lab = Lab::new();
            let process = start(&lab, policy);
            let send = || end_of(&lab, way(order(b"")));
            assert_eq!([send().await.outcome, send().await.outcome], expected, "{policy:?}");
            process.stop().await.unwrap();
            lab.check();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_letter_without_an_id_has_none_where_it_is_consumed_next() {
    let lab = Lab::new();
    let process = start(&lab, MissingId::DeadLetter);
    end_of(&lab, order(b"")).await;
    process.stop().await.unwrap();
    lab.broker.declare("hopeless");
    let queue = lab.queue_named(DEAD).dead_letter("hopeless").handler(handle);
    let process = lab.start_in_process(queue);
    lab.broker.drained(DEAD).await.unwrap();
    let letter = &lab.broker.messages("hopeless").unwrap()[0];
    assert_eq!(DeadLetter::read(letter).unwrap().cause, "missing_id", "its copy's id is not its own");
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_id_may_have_4096_bytes_and_not_one_more_whatever_brings_it() {
    let lab = Lab::new();
    let process = start(&lab, MissingId::Process);
    // "1:s " is what an event's source adds.
    let sources: [fn(Vec<u8>) -> MessageBuilder; 3] = [
        |id| order(&id),
        |id| order(b"").header("guestlist-id", id),
        |id| order(b"").header("ce-source", "s").header("ce-id", id[4..].to_vec()),
    ];
    for (letter, source) in (b'a'..).zip(sources) {
        let id = |length| vec![letter; length];
        assert_eq!(end_of(&lab, source(id(4096))).await, Fate::at_once(Outcome::Handled));
        assert_eq!(end_of(&lab, source(id(4096))).await, Fate::at_once(Outcome::Duplicate));
        assert_eq!(end_of(&lab, source(id(4097))).await, Fate::parked(Cause::InvalidId));
    }
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn look_alikes_are_ids_of_their_own() {
    let alike: [&[u8]; 17] = [
        b"order-1",
        b"Order-1",
        b"order-1 ",
        b" order-1",
        b"order-1\0",
        b"order-1\r\n",
        b"order%2D1",
        b"order-\xff1",
        "order\u{2011}1".as_bytes(),
        "\u{43e}rder-1".as_bytes(),
        "order-\u{ff11}".as_bytes(),
        "order-1\u{200b}".as_bytes(),
        "\u{feff}order-1".as_bytes(),
        "\u{202e}order-1".as_bytes(),
        "\u{e9}".as_bytes(),
        "e\u{301}".as_bytes(),
        b"order-*",
    ];
    let lab = Lab::new();
    let process = start(&lab, MissingId::DeadLetter);
    for expected in [Outcome::Handled, Outcome::Duplicate] {
        for id in alike {
            assert_eq!(end_of(&lab, order(id)).await.outcome, expected, "{}", id.escape_ascii());
        }
    }
    process.stop().await.unwrap();
    lab.check();
}

/// A body of its own for each copy, so that its end can be told from the others'.
fn forged(id: &str, generation: u32) -> MessageBuilder {
    let message = Message::builder(format!("{id} of generation {generation}")).transport_id(id.to_owned());
    message.header("guestlist-generation", generation.to_string()).header(ATTEMPT, "0")
}

/// Headers can be forged: the store counts, and only what looks like a redrive starts afresh.
#[tokio::test(start_paused = true)]
async fn a_generation_exactly_one_above_starts_afresh_and_no_other_does() {
    let lab = Lab::new();
    let handler = lab.handler(async |_| Err(Failure::permanent("never")));
    let process = lab.start_in_process(lab.queue().handler(handler));
    let parked = Fate::parked(Cause::Parked);
    let ran = Fate::parked(Cause::Permanent);
    assert_eq!(end_of(&lab, forged("order-1", 0)).await, ran);
    for (generation, expected) in
        [(0, parked), (2, parked), (3, parked), (u32::MAX, parked), (1, ran), (1, parked), (0, parked)]
    {
        assert_eq!(end_of(&lab, forged("order-1", generation)).await, expected, "{generation}");
    }
    // Numbers that are none are generation 0, not another one above.
    for text in ["-1", "2.0", "4294967298", "two", "", "\u{662}"] {
        let message = Message::builder("").transport_id("order-1").header("guestlist-generation", text);
        assert_eq!(end_of(&lab, message).await, parked, "{text}");
    }
    // After the highest one there is none.
    assert_eq!(end_of(&lab, forged("order-2", u32::MAX)).await, ran);
    assert_eq!(end_of(&lab, forged("order-2", 0)).await, parked);
    assert_eq!(lab.journal.attempts("order-1"), [1, 1]);
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_generation_one_above_neither_repeats_what_is_done_nor_runs_beside_what_runs() {
    let lab = Lab::new();
    let handler = lab.handler(async |_| {
        tokio::time::sleep(Duration::from_secs(2)).await;
        Ok(())
    });
    let process = lab.start_in_process(lab.queue().handler(handler));
    lab.broker.send(ORDERS, forged("order-1", 0)).unwrap();
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    lab.broker.send(ORDERS, forged("order-1", 1)).unwrap();
    lab.drained().await;
    assert_eq!(end_of(&lab, forged("order-1", 1)).await, Fate::at_once(Outcome::Duplicate));
    assert_eq!(lab.journal.runs("order-1"), 1);
    assert_eq!((process.orders().handled, process.orders().duplicates), (1, 2));
    process.stop().await.unwrap();
    lab.check();
}

/// The documented exception, and its limit: attempts and backoff start afresh, once for each generation.
#[tokio::test(start_paused = true)]
async fn forged_generations_cost_at_most_one_fresh_start_each() {
    let lab = Lab::new();
    let handler = lab.handler(async |_| Err("not yet".into()));
    let process = lab.start_in_process(lab.queue().handler(handler));
    lab.broker.send(ORDERS, forged("order-1", 0)).unwrap();
    until("it has failed", || lab.count(EventKind::Failed(Cause::Transient)) == 1).await;
    for _ in 0..10 {
        lab.broker.send(ORDERS, forged("order-1", 1)).unwrap();
        lab.broker.send(ORDERS, forged("order-1", 3)).unwrap();
    }
    lab.drained().await;
    let mut attempts = lab.journal.attempts("order-1");
    assert_eq!(attempts.remove(0), 1);
    assert_eq!(attempts, [1, 2, 3, 4, 5], "of all the copies together");
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_forged_generation_does_not_turn_another_body_into_a_duplicate() {
    let lab = Lab::new();
    let handler = lab.handler(async |run| match run.id().as_str() {
        "parked" if run.message.generation() == 0 => Err(Failure::permanent("never")),
        _ => Ok(()),
    });
    let process = lab.start_in_process(lab.queue().compare_bodies().handler(handler));
    let conflict = Fate::parked(Cause::IdConflict);
    assert_eq!(end_of(&lab, forged("done", 0)).await, Fate::at_once(Outcome::Handled));
    for generation in [1, 2, u32::MAX] {
        assert_eq!(end_of(&lab, forged("done", generation)).await, conflict, "{generation}");
    }
    assert_eq!(end_of(&lab, forged("parked", 0)).await, Fate::parked(Cause::Permanent));
    assert_eq!(end_of(&lab, forged("parked", 2)).await, conflict);
    // It looks like a redrive, whose body an operator may have mended: it runs, and is what counts now.
    assert_eq!(end_of(&lab, forged("parked", 1)).await, Fate::at_once(Outcome::Handled));
    assert_eq!(end_of(&lab, forged("parked", 0)).await, conflict);
    process.stop().await.unwrap();
    lab.check();
}

/// Else one stranger's message, just small enough to be delivered, would stop the queue.
#[tokio::test(start_paused = true)]
async fn a_message_too_large_for_the_dead_letters_stays_and_stops_nobody() {
    let lab = Lab::new();
    let process = start(&lab, MissingId::DeadLetter);
    // Each time it is published whole, without its history, and without the error's text.
    lab.broker.fail_publishes(3 * 12, PublishFault::TooLarge);
    lab.broker.send(ORDERS, Message::builder(r#"{"cents": 2}"#).transport_id("large")).unwrap();
    lab.broker.send(ORDERS, Message::builder("large, and nameless")).unwrap();
    until("neither was taken", || process.orders().failures.get("too_large") == Some(&2)).await;
    assert_eq!(process.orders().paused_by, None);
    let begin = Instant::now();
    for number in 0..100 {
        lab.broker.send(ORDERS, order(&[b'n', number])).unwrap();
    }
    until("the others are handled", || process.orders().handled == 100).await;
    assert!(begin.elapsed() < Duration::from_secs(1));
    lab.drained().await;
    let minutes = begin.elapsed().as_secs() / 60;
    assert!((20..=60).contains(&minutes), "no hot loop: a dozen refusals took {minutes} min");
    let mut causes = lab.causes();
    causes.sort_unstable();
    assert_eq!(causes, ["exhausted", "missing_id"], "taken in the end, and not run more than five times");
    process.stop().await.unwrap();
    lab.check();
}
