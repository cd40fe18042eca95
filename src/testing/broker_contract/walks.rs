//! Cases: a walk over dead letters ends, shows each once, and takes out what it is told to and nothing else.

use std::collections::BTreeSet;

use tokio::time::{Instant, sleep, timeout};

use super::BrokerFixture;
use super::copies::{place, publish, record};
use super::stage::{POLL, Stage, text_id};
use crate::Message;
use crate::broker::copy::DeadLetter;
use crate::broker::{BrokerErrorKind, Letter, Letters};
use crate::message::Source;

/// More than a client fetches at once.
const MANY: usize = 150;

/// A walk with bounded waits.
struct Walk<'a> {
    letters: Box<dyn Letters>,
    stage: &'a Stage<'a>,
}

impl<'a> Walk<'a> {
    async fn begin(stage: &'a Stage<'a>) -> Self {
        let begun = timeout(stage.patience(), stage.broker.letters(&place(stage))).await;
        let letters = begun.unwrap_or_else(|_| panic!("a walk must begin"));
        let letters =
            letters.unwrap_or_else(|error| panic!("a walk over what is there must begin: {error:?}"));
        Self { letters, stage }
    }

    async fn next(&mut self) -> Option<Letter> {
        let next = timeout(self.stage.patience(), self.letters.next()).await;
        let next = next.unwrap_or_else(|_| panic!("a walk must show a letter or end"));
        next.unwrap_or_else(|error| panic!("a walk must go on: {error:?}"))
    }

    /// Goes on to the end, which comes after at most `most` letters.
    async fn rest(&mut self, most: usize) -> Vec<Letter> {
        let mut rest = Vec::new();
        while let Some(letter) = self.next().await {
            rest.push(letter);
            assert!(rest.len() <= most, "a walk over {most} letters must end after them");
        }
        rest
    }

    async fn remove(&mut self, letter: &Letter) {
        let removed = timeout(self.stage.patience(), self.letters.remove(letter.place)).await;
        let removed = removed.unwrap_or_else(|_| panic!("a removal must be confirmed"));
        removed.unwrap_or_else(|error| panic!("a letter that was shown can be removed: {error:?}"));
    }

    async fn close(self) {
        let closed = timeout(self.stage.patience(), self.letters.close()).await;
        let closed = closed.unwrap_or_else(|_| panic!("a walk must close"));
        closed.unwrap_or_else(|error| panic!("a walk must close: {error:?}"));
    }
}

/// All letters, by a walk of their own.
async fn walk_all(stage: &Stage<'_>, most: usize) -> Vec<Letter> {
    let mut walk = Walk::begin(stage).await;
    let all = walk.rest(most).await;
    walk.close().await;
    all
}

/// A failed message of this id; another time, it failed in another generation.
fn failed(stage: &Stage<'_>, id: usize, generation: u32) -> Message {
    let source = Source::new(stage.broker.system(), stage.queue.name.clone());
    let message = Message::builder(format!("body {id}")).transport_id(id.to_string()).source(source);
    message.header("kind", "test").header("guestlist-generation", generation.to_string()).build()
}

async fn put_letters(stage: &Stage<'_>, count: usize) {
    for id in 0..count {
        publish(stage, &failed(stage, id, 0)).await;
    }
}

fn message_ids(letters: &[Letter]) -> Vec<String> {
    letters.iter().map(|letter| text_id(&letter.message)).collect()
}

fn letter_ids(letters: &[Letter]) -> BTreeSet<String> {
    letters.iter().map(|letter| letter.id.clone()).collect()
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|id| id.to_string()).collect()
}

/// Waits until these and no others can be read by others again. Deadlines and broken connections are noticed late.
async fn letters_become(stage: &Stage<'_>, mut expected: Vec<String>) {
    expected.sort();
    let begin = Instant::now();
    loop {
        let mut found = message_ids(&walk_all(stage, expected.len()).await);
        found.sort();
        if found == expected {
            return;
        }
        assert!(
            begin.elapsed() < stage.patience(),
            "there should be the letters {expected:?}, not {found:?}"
        );
        sleep(POLL).await;
    }
}

/// A walk shows every letter once, the oldest first, whole and with its record, and ends. Nothing is gone after it.
pub async fn a_walk_shows_each_letter_once_and_takes_nothing_out(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "walk_shows", 8).await;
    put_letters(&stage, MANY).await;
    let mut walk = Walk::begin(&stage).await;
    let shown = walk.rest(MANY).await;
    assert!(walk.next().await.is_none(), "a walk that is over must stay over");
    walk.close().await;
    assert_eq!(message_ids(&shown), numbers(MANY), "each letter once, from the oldest on");
    assert_eq!(letter_ids(&shown).len(), MANY, "each letter has an id of its own");
    assert_whole(&stage, &shown[3]);
    letters_become(&stage, numbers(MANY)).await;
    stage.end().await;
}

fn assert_whole(stage: &Stage<'_>, letter: &Letter) {
    let (letter, original) = (&letter.message, failed(stage, 3, 0));
    assert_eq!(letter.payload(), original.payload(), "the body must be the original's");
    assert_eq!(letter.transport_id(), original.transport_id(), "the id must be the original's");
    assert_eq!(letter.headers(), original.headers(), "no header may come or go");
    assert_eq!(letter.source().queue, stage.queue.name, "the source must be the original's");
    let story = DeadLetter::read(letter).unwrap_or_else(|| panic!("the letter has no record"));
    assert_eq!((story.cause, story.attempts), (record(&original).cause, record(&original).attempts));
}

/// Where there is no letter, a walk ends at once.
pub async fn a_walk_over_no_letters_ends(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "walk_empty", 8).await;
    assert_eq!(message_ids(&walk_all(&stage, 0).await), numbers(0));
    stage.end().await;
}

/// A letter has the same id in each walk, over each connection: an operator reads it now and uses it later.
pub async fn a_letter_has_the_same_id_in_each_walk(fixture: &dyn BrokerFixture) {
    let mut stage = Stage::new(fixture, "walk_ids", 8).await;
    put_letters(&stage, 3).await;
    let first = letter_ids(&walk_all(&stage, 3).await);
    stage.broker.close().await;
    stage.broker = fixture.connect().await;
    letters_become(&stage, numbers(3)).await;
    assert_eq!(letter_ids(&walk_all(&stage, 3).await), first, "a letter's id must not change");
    stage.end().await;
}

/// Where nobody says which queue a letter is from, none is made up: the place where it lies would be carried on by the
/// next copy, and pass for the queue.
pub async fn a_letter_that_names_no_queue_is_shown_without_one(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "walk_no_queue", 8).await;
    let source = Source::new(stage.broker.system(), "");
    publish(&stage, &Message::builder("{}").transport_id("0").source(source).build()).await;
    let shown = walk_all(&stage, 1).await;
    assert_eq!(message_ids(&shown), ["0"]);
    assert_eq!(shown[0].message.source().queue, "", "the source must not name a queue");
    stage.end().await;
}

/// A walk ends though each letter comes back while it is on: those are for the next walk.
pub async fn a_walk_ends_though_letters_come_back(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "walk_ends", 8).await;
    let count = 12;
    put_letters(&stage, count).await;
    let mut walk = Walk::begin(&stage).await;
    for id in 0..count {
        let letter = walk.next().await.unwrap_or_else(|| panic!("letter {id} of {count} must be shown"));
        assert_eq!(text_id(&letter.message), id.to_string());
        assert_eq!(letter.message.generation(), 0, "a letter that came back must not be met");
        publish(&stage, &failed(&stage, id, 1)).await;
        walk.remove(&letter).await;
    }
    assert!(walk.next().await.is_none(), "a walk must not meet what came back meanwhile");
    walk.close().await;
    letters_become(&stage, numbers(count)).await;
    let left = walk_all(&stage, count).await;
    assert!(
        left.iter().all(|letter| letter.message.generation() == 1),
        "what came back must be what is left"
    );
    stage.end().await;
}

/// A removal takes out the letter that it names and no other: during the walk, and after its last letter.
pub async fn a_removal_removes_exactly_one_letter(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "walk_removes", 8).await;
    put_letters(&stage, 6).await;
    let mut walk = Walk::begin(&stage).await;
    let (_, second) = (walk.next().await, walk.next().await);
    let second = second.unwrap_or_else(|| panic!("the second of 6 letters must be shown"));
    walk.remove(&second).await;
    let rest = walk.rest(4).await;
    assert_eq!(message_ids(&rest), ["2", "3", "4", "5"], "a removal must not skip or repeat a letter");
    walk.remove(&rest[2]).await;
    walk.close().await;
    letters_become(&stage, ["0", "2", "3", "5"].map(ToOwned::to_owned).to_vec()).await;
    stage.end().await;
}

/// A letter that is removed already can be removed again: nothing happens, and nothing else is gone.
pub async fn a_letter_removed_twice_is_no_error(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "walk_removes_twice", 8).await;
    put_letters(&stage, 2).await;
    let mut walk = Walk::begin(&stage).await;
    let first = walk.next().await.unwrap_or_else(|| panic!("the first of 2 letters must be shown"));
    walk.remove(&first).await;
    walk.remove(&first).await;
    walk.close().await;
    letters_become(&stage, vec!["1".to_owned()]).await;
    stage.end().await;
}

/// A walk that is dropped half-way leaves behind all that it did not remove, and others can read it again.
pub async fn a_dropped_walk_leaves_the_rest(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "walk_dropped", 8).await;
    put_letters(&stage, 6).await;
    let mut walk = Walk::begin(&stage).await;
    let first = walk.next().await.unwrap_or_else(|| panic!("the first of 6 letters must be shown"));
    walk.remove(&first).await;
    let (second, third) = (walk.next().await, walk.next().await);
    assert!(second.is_some() && third.is_some(), "6 letters must be shown");
    drop(walk);
    letters_become(&stage, numbers(6).split_off(1)).await;
    stage.end().await;
}

/// A place that is not there is refused, and the refusal names it.
pub async fn a_missing_place_of_letters_is_refused_by_name(fixture: &dyn BrokerFixture) {
    let stage = Stage::new(fixture, "walk_missing", 8).await;
    fixture.delete_dead_letters(&stage.queue).await;
    let place = place(&stage);
    match stage.broker.letters(&place).await {
        Ok(_) => panic!("a walk over a place that is missing must be refused"),
        Err(error) => {
            assert_eq!(error.kind(), BrokerErrorKind::Refused, "{error:?}");
            assert!(
                error.to_string().contains(place.name()),
                "the refusal must name {}: {error}",
                place.name()
            );
        }
    }
    stage.end().await;
}
