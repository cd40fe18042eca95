//! Walks over dead letters: what the contract cannot see of a queue that somebody else declared.

use futures_util::future::join_all;
use guestlist::Message;
use guestlist::broker::amqp::Amqp;
use guestlist::broker::amqp::lapin::message::Delivery;
use guestlist::broker::amqp::lapin::options::BasicNackOptions;
use guestlist::broker::amqp::lapin::types::AMQPValue;
use guestlist::broker::copy::DeadLetter;
use guestlist::broker::{Broker, BrokerError, BrokerErrorKind, Copy, Destination, Letter, Letters};
use tokio::time::timeout;

use super::proxy::Proxy;
use super::rabbit::{PATIENCE, Rabbit, current, text, unique, url};

const COUNT: usize = 20;
const KINDS: [&str; 2] = ["classic", "quorum"];

/// Letters in a queue with the broker's own defaults: on RabbitMQ 4 a quorum queue has a delivery limit of 20.
struct Letterbox {
    rabbit: Rabbit,
    broker: Amqp,
    name: String,
}

impl Letterbox {
    async fn new(kind: &str) -> Self {
        Self::with(kind, COUNT).await
    }

    async fn with(kind: &str, count: usize) -> Self {
        let (rabbit, name) = (Rabbit::new().await, unique("letters"));
        rabbit.declare(&name, &[("x-queue-type", text(kind))]).await;
        let letters: Vec<_> = (0..count).map(|n| n.to_string()).collect();
        join_all(letters.iter().map(|letter| rabbit.send(&name, letter))).await;
        rabbit.ready_becomes(&name, count as u64).await;
        Self { rabbit, broker: Amqp::connect(&url()).await.unwrap(), name }
    }

    fn place(&self) -> Destination {
        Destination::new(self.name.as_str())
    }

    async fn walk(&self) -> Box<dyn Letters> {
        self.walk_by(&self.broker).await
    }

    async fn walk_by(&self, broker: &Amqp) -> Box<dyn Letters> {
        broker.letters(&self.place()).await.unwrap()
    }

    async fn keeps(&self, count: usize) {
        self.rabbit.ready_becomes(&self.name, count as u64).await;
    }
}

async fn step(walk: &mut Box<dyn Letters>) -> Result<Option<Letter>, BrokerError> {
    timeout(PATIENCE, walk.next()).await.expect("a walk must not hang")
}

async fn take(walk: &mut Box<dyn Letters>, count: usize) -> Vec<Letter> {
    let mut taken = Vec::new();
    for _ in 0..count {
        taken.push(step(walk).await.unwrap().expect("a letter is due"));
    }
    taken
}

/// The error that ends a walk; what had arrived before may be shown first.
async fn end(walk: &mut Box<dyn Letters>) -> BrokerError {
    loop {
        match step(walk).await {
            Err(error) => return error,
            Ok(letter) => assert!(letter.is_some(), "an error is due, not the end"),
        }
    }
}

async fn rest(walk: &mut Box<dyn Letters>) -> Vec<Letter> {
    let mut rest = Vec::new();
    while let Some(letter) = step(walk).await.unwrap() {
        rest.push(letter);
    }
    rest
}

fn ids(letters: &[Letter]) -> Vec<usize> {
    let id = |letter: &Letter| letter.message.transport_id().unwrap().as_str().unwrap().parse().unwrap();
    letters.iter().map(id).collect()
}

fn all() -> Vec<usize> {
    (0..COUNT).collect()
}

/// By more consumers than a quorum queue's client takes returns of at once: 32.
const MANY: usize = 3000;

async fn counted(rabbit: &Rabbit, queue: &str) -> usize {
    let mut counted = 0;
    while let Some(letter) = rabbit.get(queue).await {
        let headers = letter.delivery.properties.headers().as_ref();
        counted +=
            usize::from(headers.is_some_and(|headers| headers.inner().contains_key("x-delivery-count")));
    }
    counted
}

/// RabbitMQ 3 counts whatever comes again, and has no limit unless it is told one.
#[tokio::test]
async fn walks_over_many_letters_are_not_counted_as_deliveries() {
    if !current() {
        return;
    }
    let letterbox = Letterbox::with("quorum", MANY).await;
    for removed in [false, true] {
        let mut walk = letterbox.walk().await;
        let letters = take(&mut walk, MANY - usize::from(!removed)).await;
        if removed {
            walk.remove(letters[7].place).await.unwrap();
            walk.remove(letters[MANY - 1].place).await.unwrap();
        }
        walk.close().await.unwrap();
    }
    letterbox.keeps(MANY - 2).await;
    let walk = letterbox.walk().await;
    drop(walk);
    letterbox.keeps(MANY - 2).await;
    let mut walk = letterbox.walk().await;
    take(&mut walk, MANY - 2).await;
    drop(walk);
    letterbox.keeps(MANY - 2).await;
    assert_eq!(counted(&letterbox.rabbit, &letterbox.name).await, 0);
}

#[tokio::test]
async fn a_walk_over_many_letters_shows_each_once_and_others_can_read_them_soon_after() {
    for kind in KINDS {
        let letterbox = Letterbox::with(kind, MANY).await;
        for _ in 0..2 {
            let mut walk = letterbox.walk().await;
            let mut shown = ids(&rest(&mut walk).await);
            walk.close().await.unwrap();
            shown.sort_unstable();
            assert!(shown.into_iter().eq(0..MANY), "{kind}");
        }
        letterbox.keeps(MANY).await;
    }
}

#[tokio::test]
async fn thirty_walks_keep_every_letter_and_its_place() {
    for kind in KINDS {
        let letterbox = Letterbox::new(kind).await;
        for _ in 0..30 {
            let mut walk = letterbox.walk().await;
            assert_eq!(ids(&rest(&mut walk).await), all(), "{kind}");
            walk.close().await.unwrap();
        }
        letterbox.keeps(COUNT).await;
    }
}

#[tokio::test]
async fn thirty_dropped_walks_keep_every_letter() {
    for kind in KINDS {
        let letterbox = Letterbox::new(kind).await;
        for n in 0..30 {
            let mut walk = letterbox.walk().await;
            take(&mut walk, n % COUNT).await;
            drop(walk);
            letterbox.keeps(COUNT).await;
        }
        let mut walk = letterbox.walk().await;
        let mut shown = ids(&rest(&mut walk).await);
        walk.close().await.unwrap();
        if kind == "quorum" {
            // What was given back is behind what was not shown.
            shown.sort_unstable();
        }
        assert_eq!(shown, all(), "{kind}");
    }
}

#[tokio::test]
async fn what_a_closed_walk_gives_back_is_there_for_others_at_once() {
    for kind in KINDS {
        let letterbox = Letterbox::new(kind).await;
        for _ in 0..30 {
            let mut walk = letterbox.walk().await;
            take(&mut walk, COUNT).await;
            walk.close().await.unwrap();
            let mut other = letterbox.walk_by(&letterbox.broker).await;
            assert_eq!(ids(&rest(&mut other).await).len(), COUNT, "{kind}");
            other.close().await.unwrap();
        }
    }
}

#[tokio::test]
async fn f8_a_walk_whose_connection_is_cut_says_so_and_every_letter_is_there() {
    for kind in KINDS {
        let (letterbox, proxy) = (Letterbox::with(kind, MANY).await, Proxy::new().await);
        let broker = Amqp::connect(&proxy.url()).await.unwrap();
        let mut walk = letterbox.walk_by(&broker).await;
        let letters = take(&mut walk, 5).await;
        proxy.cut();
        assert_eq!(end(&mut walk).await.kind(), BrokerErrorKind::Unreachable, "{kind}");
        assert_eq!(step(&mut walk).await.unwrap_err().kind(), BrokerErrorKind::Unreachable, "it stays over");
        let removed = timeout(PATIENCE, walk.remove(letters[0].place)).await.expect("no hang");
        assert_eq!(removed.unwrap_err().kind(), BrokerErrorKind::Unreachable, "nothing was removed");
        timeout(PATIENCE, walk.close()).await.expect("no hang").unwrap_err();
        letterbox.keeps(MANY).await;
        // The same broker begins another one.
        let mut again = letterbox.walk_by(&broker).await;
        assert_eq!(rest(&mut again).await.len(), MANY);
        again.close().await.unwrap();
    }
}

#[tokio::test]
async fn two_walks_at_once_share_the_letters_and_lose_none() {
    for kind in KINDS {
        let letterbox = Letterbox::with(kind, MANY).await;
        let mut first = letterbox.walk().await;
        let mut shown = ids(&take(&mut first, 5).await);
        let mut second = letterbox.walk().await;
        shown.extend(ids(&rest(&mut second).await));
        shown.extend(ids(&rest(&mut first).await));
        shown.sort_unstable();
        assert!(shown.into_iter().eq(0..MANY), "{kind}: each letter by one of them");
        second.close().await.unwrap();
        first.close().await.unwrap();
        letterbox.keeps(MANY).await;
    }
}

#[tokio::test]
async fn a_reader_of_the_same_queue_keeps_its_share_and_nothing_is_lost_or_shown_twice() {
    for kind in KINDS {
        let letterbox = Letterbox::with(kind, MANY).await;
        let mut walk = letterbox.walk().await;
        let mut seen = ids(&take(&mut walk, 3).await);
        let mut others = Vec::new();
        for _ in 0..5 {
            others.push(id_of(&letterbox.rabbit.take(&letterbox.name).await.delivery));
        }
        // In hand when the walk comes by: not shown.
        let in_hand = letterbox.rabbit.get_unacked(&letterbox.name).await.unwrap();
        seen.extend(ids(&rest(&mut walk).await));
        walk.close().await.unwrap();
        letterbox.keeps(MANY - 6).await;
        others.push(id_of(&in_hand.delivery));
        let mut both: Vec<usize> = seen.into_iter().chain(others).collect();
        both.sort_unstable();
        assert!(both.into_iter().eq(0..MANY), "{kind}");
    }
}

fn id_of(letter: &Delivery) -> usize {
    letter.properties.message_id().as_ref().unwrap().as_str().parse().unwrap()
}

#[tokio::test]
async fn a_walk_ends_when_others_took_the_rest() {
    for kind in KINDS {
        let letterbox = Letterbox::new(kind).await;
        let mut walk = letterbox.walk().await;
        take(&mut walk, 1).await;
        while letterbox.rabbit.get(&letterbox.name).await.is_some() {}
        assert!(step(&mut walk).await.unwrap().is_none());
        letterbox.rabbit.send(&letterbox.name, "late").await;
        assert!(step(&mut walk).await.unwrap().is_none(), "over is over");
        walk.close().await.unwrap();
        letterbox.keeps(2).await;
    }
}

#[tokio::test]
async fn a_queue_deleted_under_a_walk_ends_it() {
    for kind in KINDS {
        let letterbox = Letterbox::with(kind, MANY).await;
        let mut walk = letterbox.walk().await;
        let letters = take(&mut walk, 3).await;
        letterbox.rabbit.delete(&letterbox.name).await;
        end(&mut walk).await;
        let removed = timeout(PATIENCE, walk.remove(letters[0].place)).await.expect("no hang");
        removed.unwrap_err();
        end(&mut walk).await;
    }
}

/// The first removals may be Ok: the letter is gone, and RabbitMQ tells the consumer soon after. RabbitMQ 3.10 never tells
/// one of a quorum queue.
#[tokio::test]
async fn a_walk_sees_that_its_queue_was_made_anew() {
    for kind in KINDS.into_iter().filter(|kind| *kind == "classic" || current()) {
        let letterbox = Letterbox::new(kind).await;
        let mut walk = letterbox.walk().await;
        let letters = take(&mut walk, COUNT).await;
        letterbox.rabbit.delete(&letterbox.name).await;
        letterbox.rabbit.declare(&letterbox.name, &[("x-queue-type", text(kind))]).await;
        letterbox.rabbit.send(&letterbox.name, "new").await;
        let mut seen = None;
        for letter in &letters {
            seen = seen.or(walk.remove(letter.place).await.err());
        }
        let error = seen.expect("the reading was ended");
        assert_eq!(error.kind(), BrokerErrorKind::Closed, "{kind}: {error:?}");
        letterbox.keeps(1).await;
    }
}

/// Two letters that RabbitMQ has taken back, since they were held for too long: the first was got, the other came by a
/// consumer. Says how a removal of one of them ended, and how many of what is left count as failed deliveries.
async fn removed_too_late(got: bool) -> (BrokerErrorKind, usize) {
    for patience in [1500, 5000, 12_000] {
        if let Some(end) = removed_after(patience, got).await {
            return end;
        }
    }
    panic!("two letters are not taken within 12 s")
}

/// Nothing if the letters were taken back before the first removal: the machine is busy.
async fn removed_after(patience: i32, got: bool) -> Option<(BrokerErrorKind, usize)> {
    let (rabbit, name) = (Rabbit::new().await, unique("letters_timeout"));
    let impatient = ("x-consumer-timeout", AMQPValue::LongInt(patience));
    rabbit.declare(&name, &[("x-queue-type", text("quorum")), impatient]).await;
    rabbit.send(&name, "0").await;
    rabbit.send(&name, "1").await;
    rabbit.ready_becomes(&name, 2).await;
    let broker = Amqp::connect(&url()).await.unwrap();
    let mut walk = broker.letters(&Destination::new(name.as_str())).await.unwrap();
    let first = step(&mut walk).await.ok()??;
    let second = step(&mut walk).await.ok()??;
    let (early, late) = if got { (second, first) } else { (first, second) };
    walk.remove(early.place).await.ok()?;
    taken_back(&rabbit, &name).await;
    let removed = walk.remove(late.place).await;
    drop(walk);
    rabbit.ready_becomes(&name, 1).await;
    Some((removed.unwrap_err().kind(), counted(&rabbit, &name).await))
}

/// Waits until the broker has taken the letter back from the walk. A busy 4.3 misses the time for it until something is
/// asked of the queue: so this asks for the letter itself, and gives it back.
async fn taken_back(rabbit: &Rabbit, queue: &str) {
    rabbit
        .take_unacked(queue)
        .await
        .acker
        .nack(BasicNackOptions { multiple: false, requeue: true })
        .await
        .unwrap();
    rabbit.ready_becomes(queue, 1).await;
}

#[tokio::test]
async fn i1_what_the_broker_has_taken_back_is_not_said_to_be_removed() {
    if !current() {
        return;
    }
    // The broker closes the channel for the ack. Its reason is not heard by a question that is asked a moment too late.
    let (kind, _) = removed_too_late(true).await;
    assert!(matches!(kind, BrokerErrorKind::Refused | BrokerErrorKind::Unreachable), "{kind:?}");
    // An ack revives the consumer, and what it is handed then is counted. One that crosses the broker's word cannot be
    // held back.
    let seen_before_the_ack = async {
        loop {
            let (kind, counted) = removed_too_late(false).await;
            assert_eq!(kind, BrokerErrorKind::Closed, "nobody else says it");
            if counted == 0 {
                break;
            }
        }
    };
    let within = timeout(2 * PATIENCE, seen_before_the_ack).await;
    within.expect("it must be seen before the ack, unless both are on their way at once");
}

#[tokio::test]
async fn a_removal_that_is_ok_is_known_to_the_broker() {
    for kind in KINDS {
        let letterbox = Letterbox::new(kind).await;
        let mut walk = letterbox.walk().await;
        let letters = take(&mut walk, COUNT).await;
        for letter in &letters[..COUNT / 2] {
            walk.remove(letter.place).await.unwrap();
        }
        // As if the process died: nothing is given back, nothing is said.
        std::mem::forget(walk);
        letterbox.broker.close().await;
        letterbox.keeps(COUNT / 2).await;
        let again = Amqp::connect(&url()).await.unwrap();
        let mut walk = letterbox.walk_by(&again).await;
        assert_eq!(ids(&rest(&mut walk).await), all()[COUNT / 2..], "{kind}");
        walk.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_stream_is_refused_and_no_consumer_is_disturbed() {
    let (rabbit, name) = (Rabbit::new().await, unique("letters_stream"));
    rabbit.declare(&name, &[("x-queue-type", text("stream"))]).await;
    let broker = Amqp::connect(&url()).await.unwrap();
    let error = broker.letters(&Destination::new(name.as_str())).await.err().unwrap();
    assert_eq!(error.kind(), BrokerErrorKind::Refused, "{error:?}");
    assert!(error.to_string().contains(&name), "{error}");
    rabbit.delete(&name).await;
}

#[tokio::test]
async fn a_letter_is_named_by_its_copys_id_and_not_by_its_senders() {
    let (rabbit, name) = (Rabbit::new().await, unique("letters_id"));
    rabbit.declare(&name, &[("x-queue-type", text("quorum"))]).await;
    let (broker, place) = (Amqp::connect(&url()).await.unwrap(), Destination::new(name.as_str()));
    let mut expected = Vec::new();
    for generation in ["0", "1"] {
        let failed = Message::builder("{}")
            .transport_id("4111111111111111")
            .header("guestlist-generation", generation);
        let failed = failed.header("guestlist-cause", "exhausted").build();
        let copy_of_it = DeadLetter::read(&failed).unwrap();
        let copy = Copy::dead_letter(&failed, &copy_of_it);
        broker.publish(&place, &copy).await.unwrap();
        expected.push(copy.id().to_owned());
    }
    let mut walk = broker.letters(&place).await.unwrap();
    let letters = rest(&mut walk).await;
    walk.close().await.unwrap();
    let shown: Vec<_> = letters.iter().map(|letter| letter.id.clone()).collect();
    assert_eq!(shown, expected);
}
