//! Cases: copies are confirmed, routed, and tell where they came from.

use crate::broker::copy::DeadLetter;
use crate::broker::{BrokerErrorKind, Copy, Destination};
use crate::message::Source;
use crate::{Cause, Delivery, Disposition, Message};

use super::BrokerFixture;
use super::delivery::{ODD_HEADERS, assert_headers};
use super::stage::{Stage, settle, text_id};

const BODY: &[u8] = b"\0dead\r\n\xff";

/// Sends a message with odd headers, and receives it.
async fn deliver_odd(stage: &Stage<'_>) -> (super::stage::Inbox, Delivery) {
    let mut inbox = stage.subscribe().await;
    stage.fixture.send(&stage.queue, "odd", &ODD_HEADERS, BODY).await;
    let delivery = inbox.next().await;
    (inbox, delivery)
}

pub(super) fn record(message: &Message) -> DeadLetter {
    DeadLetter::new(message, Cause::Exhausted, "no\r\nluck: ünlucky")
}

pub(super) fn place(stage: &Stage<'_>) -> Destination {
    let place = stage.queue.dead_letter.clone();
    place.unwrap_or_else(|| panic!("the fixture's queue must have a dead-letter destination"))
}

pub(super) async fn publish(stage: &Stage<'_>, message: &Message) {
    let record = record(message);
    let copy = Copy::dead_letter(message, &record);
    let answer = stage.broker.publish(&place(stage), &copy).await;
    answer.unwrap_or_else(|error| panic!("a copy with a place to go must be confirmed: {error:?}"));
}

/// A copy to the dead-letter destination is confirmed when it is there: body and headers of the
/// original, its id, and a [`DeadLetter`] that can be read back.
pub async fn a_dead_letter_is_confirmed_and_tells_its_story(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "dead_letter", 8).await;
    let (inbox, delivery) = deliver_odd(&stage).await;
    publish(&stage, delivery.message()).await;
    let letters = fixture.read_dead_letters(&stage.queue).await;
    assert_eq!(letters.len(), 1, "one copy was confirmed, so one dead letter must be there");
    assert_is_letter_of(&letters[0], delivery.message());
    settle(delivery, Disposition::Ack).await;
    inbox.close().await;
    stage.end().await;
}

fn assert_is_letter_of(letter: &Message, original: &Message) {
    assert_eq!(letter.payload(), original.payload(), "the body must be the original's");
    assert_eq!(letter.id(), original.id(), "the id must be the original's");
    assert_eq!(letter.headers().len(), original.headers().len(), "no header may come or go");
    assert_headers(letter, &ODD_HEADERS, "on the dead letter");
    let story = DeadLetter::read(letter).unwrap_or_else(|| panic!("the dead letter has no story"));
    let written = record(original);
    assert_eq!(story.cause, written.cause);
    assert_eq!(story.error, written.error);
    assert_eq!(story.attempts, written.attempts);
    assert!(story.failed_at.is_some(), "the story must say when");
    assert_eq!(story.source.queue, original.source().queue, "the story must name the queue");
    assert_eq!(story.source.stream, original.source().stream);
    assert_eq!(story.source.sequence, original.source().sequence);
}

/// Publishing the same copy again is harmless: confirmed both times, and there.
pub async fn the_same_copy_published_twice_is_there(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "published_twice", 8).await;
    let (inbox, delivery) = deliver_odd(&stage).await;
    publish(&stage, delivery.message()).await;
    publish(&stage, delivery.message()).await;
    let letters = fixture.read_dead_letters(&stage.queue).await;
    assert!(!letters.is_empty(), "a copy that was confirmed twice must be there");
    for letter in &letters {
        assert_is_letter_of(letter, delivery.message());
    }
    settle(delivery, Disposition::Ack).await;
    inbox.close().await;
    stage.end().await;
}

/// A copy that has no place to go is not confirmed: `NotRouted` or `Refused`. Its original can
/// be abandoned and parked later, when the place is there again.
pub async fn a_copy_without_a_place_is_refused_and_nothing_is_lost(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "no_place", 8).await;
    let (mut inbox, delivery) = deliver_odd(&stage).await;
    assert_not_routed(&stage, &Destination::new("guestlist-contract-nowhere"), delivery.message()).await;
    fixture.delete_dead_letters(&stage.queue).await;
    assert_not_routed(&stage, &place(&stage), delivery.message()).await;
    settle(delivery, Disposition::Abandon).await;

    let again = inbox.next().await;
    let prepared = stage.broker.prepare(&stage.queue).await;
    prepared.unwrap_or_else(|error| panic!("prepare must make what is missing: {error:?}"));
    publish(&stage, again.message()).await;
    assert_eq!(fixture.read_dead_letters(&stage.queue).await.len(), 1);
    settle(again, Disposition::Ack).await;
    inbox.close().await;
    stage.end().await;
}

async fn assert_not_routed(stage: &Stage<'_>, to: &Destination, message: &Message) {
    let record = record(message);
    let answer = stage.broker.publish(to, &Copy::dead_letter(message, &record)).await;
    match answer.map_err(|error| error.kind()) {
        Err(BrokerErrorKind::NotRouted | BrokerErrorKind::Refused) => {}
        other => panic!("a copy to nowhere must be NotRouted or Refused, was {other:?}"),
    }
}

/// Ids with line ends, zeros, bytes that are not UTF-8, percent signs, and of 4 KiB come back
/// from a copy as they were.
pub async fn ids_of_any_bytes_survive_on_copies(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "odd_ids", 8).await;
    let odd: [&[u8]; 6] = [
        b"a\r\nb",
        b"\0",
        b"\xff\xfe",
        b"100%25 \"x\"",
        " ünï ".as_bytes(),
        &[b'\xf0'; crate::defaults::MAX_ID],
    ];
    for id in odd {
        let source = Source::new(stage.broker.system(), stage.queue.name.clone());
        publish(&stage, &Message::builder(BODY).transport_id(id.to_vec()).source(source).build()).await;
    }
    let letters = fixture.read_dead_letters(&stage.queue).await;
    for id in odd {
        let found: Vec<_> = letters.iter().map(text_id).collect();
        let there = letters.iter().any(|letter| is_letter_with(letter, id));
        assert!(there, "no letter has the id {}: found {found:?}", id.escape_ascii());
    }
    stage.end().await;
}

/// A letter shows the id as its own and as the transport's, though the copy had another one there.
fn is_letter_with(letter: &Message, id: &[u8]) -> bool {
    [letter.id(), letter.transport_id()].iter().all(|found| found.is_some_and(|found| found.as_bytes() == id))
}

/// A message without an id has none on its copy either: the copy's own is not taken for it.
pub async fn a_copy_gives_no_message_an_id(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "no_id", 8).await;
    let source = Source::new(stage.broker.system(), stage.queue.name.clone());
    publish(&stage, &Message::builder(BODY).source(source).build()).await;
    let letters = fixture.read_dead_letters(&stage.queue).await;
    let found = letters.first().unwrap_or_else(|| panic!("a copy that was confirmed must be there"));
    let ids = (found.id().map(|_| "an id"), found.transport_id().map(|_| "a transport's id"));
    assert_eq!(ids, (None, None), "the message had none");
    stage.end().await;
}
