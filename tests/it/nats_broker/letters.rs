//! Walks over dead letters: what the contract cannot see of a stream that somebody else made.

use std::time::SystemTime;

use guestlist::admin::{Admin, Discard, Filter, Redrive, Summary};
use guestlist::broker::copy::DeadLetter;
use guestlist::broker::{Letter, Letters};
use guestlist::dedup::MemoryStore;

use super::*;

/// A stream of dead letters, made by a stranger.
struct Letterbox {
    js: jetstream::Context,
    nats: Nats,
    stream: String,
    subject: String,
}

impl Letterbox {
    async fn new(change: impl FnOnce(&mut stream::Config)) -> Self {
        Self::at(&env("GUESTLIST_NATS_URL"), change).await
    }

    async fn at(url: &str, change: impl FnOnce(&mut stream::Config)) -> Self {
        let (js, stream) = (stranger_at(url).await, unique("letters"));
        let subject = format!("{stream}.dead");
        let mut config = stream::Config {
            name: stream.clone(),
            subjects: vec![format!("{stream}.>")],
            ..stream::Config::default()
        };
        change(&mut config);
        js.create_stream(config).await.expect("made");
        Self { js, nats: Nats::connect(url).await.expect("connects"), stream, subject }
    }

    fn place(&self) -> Destination {
        Destination::new(self.subject.as_str())
    }

    async fn send(&self, body: &str) {
        send(&self.js, &self.subject, body).await;
    }

    async fn walk(&self) -> Box<dyn Letters> {
        self.nats.letters(&self.place()).await.expect("a walk begins")
    }

    async fn bodies(&self) -> Vec<String> {
        bodies(&rest(&mut self.walk().await).await)
    }

    async fn stored(&self) -> u64 {
        stored(&self.js, &self.stream).await
    }
}

async fn step(walk: &mut Box<dyn Letters>) -> Result<Option<Letter>, BrokerError> {
    timeout(PATIENCE, walk.next()).await.expect("a walk must not hang")
}

async fn one(walk: &mut Box<dyn Letters>) -> Letter {
    step(walk).await.expect("no error").expect("a letter is due")
}

async fn rest(walk: &mut Box<dyn Letters>) -> Vec<Letter> {
    let mut rest = Vec::new();
    while let Some(letter) = step(walk).await.expect("no error") {
        rest.push(letter);
    }
    rest
}

fn bodies(letters: &[Letter]) -> Vec<String> {
    letters.iter().map(|letter| String::from_utf8_lossy(letter.message.payload()).into_owned()).collect()
}

#[tokio::test]
async fn a_letter_shows_all_that_the_stream_keeps_of_it() {
    let (letterbox, begin) = (Letterbox::new(|_| {}).await, SystemTime::now());
    letterbox.send("first").await;
    let headers = b"Nats-Msg-Id:order-17\r\nh: 1\r\nh:2 \r\ncontent-type: text/plain\r\nempty:\r\n";
    send_raw(&env("GUESTLIST_NATS_URL"), &letterbox.subject, b"", headers, b"\0\xff");
    until("both are stored", || async { letterbox.stored().await == 2 }).await;
    let letters = rest(&mut letterbox.walk().await).await;
    let message = &letters[1].message;
    assert_eq!(message.transport_id().expect("an id").as_bytes(), b"order-17");
    let headers: Vec<_> = message.headers().iter().map(|(name, value)| (name, value.clone())).collect();
    let expected =
        [("Nats-Msg-Id", "order-17"), ("h", "1"), ("h", "2"), ("content-type", "text/plain"), ("empty", "")];
    assert_eq!(headers, expected.map(|(name, value)| (name, value.into())));
    assert_eq!((message.content_type(), &message.payload()[..]), (Some("text/plain"), &b"\0\xff"[..]));
    let source = message.source();
    assert_eq!((source.stream.as_str(), source.sequence), (letterbox.stream.as_str(), Some(2)));
    assert_eq!(source.routing_key, letterbox.subject);
    let at = message.timestamp().expect("a time");
    assert!(begin - POLL <= at && at <= SystemTime::now(), "{at:?}");
}

#[tokio::test]
async fn headers_that_the_client_cannot_read_hide_neither_their_letter_nor_those_behind_it() {
    let letterbox = Letterbox::new(|_| {}).await;
    let odd: [&[u8]; 6] = [
        b"h: \xff\r\n",
        b"a b: c\r\n",
        b"no colon\r\n",
        b"\xff: v\r\n",
        b": nameless\r\n",
        b"\xff\0\r\n\xfe",
    ];
    for block in odd {
        send_raw(
            &env("GUESTLIST_NATS_URL"),
            &letterbox.subject,
            b"",
            &[block, b"ok: yes\r\n"].concat(),
            b"odd",
        );
    }
    letterbox.send("last").await;
    let letters = rest(&mut letterbox.walk().await).await;
    assert_eq!(bodies(&letters), ["odd", "odd", "odd", "odd", "odd", "odd", "last"]);
    for letter in &letters[..odd.len() - 1] {
        assert_eq!(letter.message.headers().get_str("ok"), Some("yes"), "the readable ones are shown");
    }
    assert_eq!(&letters[0].message.headers().get("h").expect("shown")[..], b"\xff");
    let mut walk = letterbox.walk().await;
    for letter in &letters {
        walk.remove(letter.place).await.expect("it can be removed");
    }
    assert_eq!(letterbox.stored().await, 0);
}

#[tokio::test]
async fn only_the_letters_of_the_subject_are_shown_and_a_gap_ends_nothing() {
    let letterbox = Letterbox::new(|_| {}).await;
    for n in 0..4 {
        letterbox.send(&n.to_string()).await;
        send(&letterbox.js, &format!("{}.other", letterbox.stream), "other").await;
    }
    let stream = letterbox.js.get_stream(&letterbox.stream).await.expect("there");
    stream.delete_message(1).await.expect("deleted");
    stream.delete_message(5).await.expect("deleted");
    assert_eq!(letterbox.bodies().await, ["1", "3"]);
}

#[tokio::test]
async fn what_somebody_else_removed_meanwhile_is_no_error() {
    let letterbox = Letterbox::new(|_| {}).await;
    for n in 0..3 {
        letterbox.send(&n.to_string()).await;
    }
    let mut walk = letterbox.walk().await;
    let first = one(&mut walk).await;
    letterbox.js.get_stream(&letterbox.stream).await.expect("there").purge().await.expect("purged");
    walk.remove(first.place).await.expect("gone is gone");
    assert!(step(&mut walk).await.expect("no error").is_none());
}

#[tokio::test]
async fn a_stream_that_lets_nothing_be_deleted_shows_its_letters_and_names_the_setting() {
    let letterbox = Letterbox::new(|config| config.deny_delete = true).await;
    letterbox.send("kept").await;
    let mut walk = letterbox.walk().await;
    let letter = one(&mut walk).await;
    let refusal = refusal(walk.remove(letter.place).await);
    assert!(refusal.contains("deny_delete") && refusal.contains(&letterbox.stream), "{refusal}");
    assert_eq!(letterbox.bodies().await, ["kept"]);
}

/// A queue whose dead letters are here, its admin, and the name of the stream that redriven ones go to.
async fn shop(letterbox: &Letterbox, name: &str) -> (Admin, String) {
    let mut spec = queue("shop");
    name.clone_into(&mut spec.name);
    letterbox.nats.prepare(&spec).await.expect("prepared");
    let queue = Queue::new(name).dead_letter(letterbox.subject.as_str()).store(MemoryStore::new());
    let durable = name.replace('.', "_");
    let admin = Admin::over(Arc::new(nats().await), queue).await.expect("an admin");
    (admin, format!("guestlist-{durable}-{durable}-{}", durable.len()))
}

async fn redrive(admin: &Admin) -> Summary {
    admin.redrive(Filter::new(), Redrive::new()).await.expect("begins").finish().await.expect("ends")
}

#[tokio::test]
async fn i1_two_strangers_letters_that_say_the_same_go_back_as_two() {
    let letterbox = Letterbox::new(|_| {}).await;
    let (admin, own) = shop(&letterbox, &unique("twins")).await;
    for _ in 0..2 {
        letterbox.send("the same").await;
    }
    let summary = redrive(&admin).await;
    assert_eq!((summary.redriven, letterbox.stored().await), (2, 0), "{summary}");
    assert_eq!(stored(&letterbox.js, &own).await, 2, "both are there, and none was taken for the other");
}

#[tokio::test]
async fn i1_letters_that_cannot_be_removed_are_not_sent_back_again_and_again() {
    let letterbox = Letterbox::new(|config| config.deny_delete = true).await;
    let (admin, own) = shop(&letterbox, &unique("kept")).await;
    letterbox.send("kept").await;
    for dry in [false, true] {
        let (how, discard) = (Redrive::new(), Discard::new("tidying up"));
        let (how, discard) = if dry { (how.dry_run(), discard.dry_run()) } else { (how, discard) };
        let redriven = admin.redrive(Filter::new(), how).await.map(drop);
        let discarded = admin.discard(Filter::new(), discard).await.map(drop);
        for refused in [redriven, discarded] {
            let error = refused.expect_err("refused before anything is done");
            assert_eq!(error.broker(), Some(BrokerErrorKind::Refused), "{error:?}");
            assert!(format!("{error:?}").contains("deny_delete"), "{error:?}");
        }
    }
    assert_eq!(stored(&letterbox.js, &own).await, 0, "nothing was sent");
    let mut letters = admin.letters(Filter::new()).await.expect("they can be read");
    let letter = letters.next().await.expect("one").expect("shown");
    assert!(admin.show(letter.id()).await.is_ok());
}

#[tokio::test]
async fn a_letter_of_a_loop_of_ones_own_goes_back_though_it_names_the_durable() {
    let letterbox = Letterbox::new(|_| {}).await;
    let name = unique("shop.charges");
    let (admin, own) = shop(&letterbox, &name).await;
    send(&letterbox.js, &name, "declined").await;
    let durable = name.replace('.', "_");
    let reader = letterbox.js.get_consumer_from_stream::<consumer::pull::Config, _, _>(&durable, &durable);
    let mut messages =
        reader.await.expect("the durable").fetch().max_messages(1).messages().await.expect("fetches");
    let (failed, acker) = split(messages.next().await.expect("one").expect("read"));
    assert_eq!(failed.source().queue, durable, "a loop of one's own knows no other name");
    let told = Message::builder("").header("guestlist-cause", "permanent").build();
    let record = DeadLetter::read(&told).expect("a record");
    letterbox
        .nats
        .publish(&letterbox.place(), &Copy::dead_letter(&failed, &record))
        .await
        .expect("published");
    acker.settle(Disposition::Ack).await.expect("acked");
    let summary = redrive(&admin).await;
    assert_eq!((summary.redriven, letterbox.stored().await), (1, 0), "{summary}");
    assert_eq!(stored(&letterbox.js, &own).await, 1);
}

#[tokio::test]
async fn a_place_that_is_none_is_refused_by_name() {
    let nats = nats().await;
    for subject in ["letters.*", "letters.>", "letters nobody", "", "nobody.keeps.these.letters"] {
        let refusal = refusal(nats.letters(&Destination::new(subject)).await.map(drop));
        assert!(refusal.contains(&format!("`{subject}`")), "{refusal}");
    }
}

#[tokio::test]
async fn a_server_without_jetstream_says_so_when_it_is_asked_for_letters() {
    let server = Server::start("accounts: { A: { users: [ { user: a, password: a } ] } }\n").await;
    let nats = Nats::connect(&server.url().replace("://", "://a:a@")).await.expect("connects");
    let error = nats.letters(&Destination::new("dead")).await.map(drop).expect_err("no JetStream");
    assert!(format!("{error:?}").contains("not enabled"), "{error:?}");
}

#[tokio::test]
async fn the_largest_letter_is_shown_whole() {
    let letterbox = Letterbox::new(|_| {}).await;
    let body = "x".repeat(1024 * 1024);
    letterbox.send(&body).await;
    assert_eq!(letterbox.bodies().await, [body]);
}

#[tokio::test]
async fn a_reader_of_the_same_stream_keeps_its_messages_and_a_walk_shows_what_is_left() {
    let letterbox = Letterbox::new(|config| config.retention = stream::RetentionPolicy::WorkQueue).await;
    for n in 0..6 {
        letterbox.send(&n.to_string()).await;
    }
    let config = consumer::pull::Config { durable_name: Some("reader".into()), ..Default::default() };
    let reader = letterbox.js.create_consumer_on_stream(config, &letterbox.stream).await.expect("made");
    let mut fetched = reader.fetch().max_messages(2).messages().await.expect("fetches");
    let (acked, in_hand) = (fetched.next().await, fetched.next().await);
    acked.expect("one").expect("read").double_ack().await.expect("acked");
    let mut walk = letterbox.walk().await;
    let letters = rest(&mut walk).await;
    assert_eq!(bodies(&letters), ["1", "2", "3", "4", "5"], "also what the reader has in hand");
    walk.remove(letters[4].place).await.expect("removed");
    let mut left = reader.fetch().max_messages(9).messages().await.expect("fetches");
    let mut read = Vec::new();
    while let Some(message) = left.next().await {
        read.push(String::from_utf8_lossy(&message.expect("read").payload).into_owned());
    }
    assert_eq!(read, ["2", "3", "4"], "a walk takes nothing from a reader");
    drop(in_hand);
}

#[tokio::test]
async fn f8_a_walk_over_a_killed_server_says_so_and_every_letter_is_there() {
    let mut server = Server::start("").await;
    let letterbox = Letterbox::at(&server.url(), |_| {}).await;
    for n in 0..5 {
        letterbox.send(&n.to_string()).await;
    }
    let mut walk = letterbox.walk().await;
    let first = one(&mut walk).await;
    server.kill();
    let error = step(&mut walk).await.expect_err("the server is gone");
    assert_eq!(error.kind(), BrokerErrorKind::Unreachable);
    let removed = timeout(PATIENCE, walk.remove(first.place)).await.expect("no hang");
    assert_eq!(kind_of(removed), BrokerErrorKind::Unreachable);
    let away = timeout(PATIENCE, letterbox.nats.letters(&letterbox.place())).await.expect("no hang");
    assert_eq!(kind_of(away.map(drop)), BrokerErrorKind::Unreachable);
    server.restart().await;
    until("the client is back", || async { letterbox.nats.letters(&letterbox.place()).await.is_ok() }).await;
    // What was asked for while the server was away reaches it later: that removal may have happened.
    let left = letterbox.bodies().await;
    assert!(left == ["0", "1", "2", "3", "4"] || left == ["1", "2", "3", "4"], "{left:?}");
}
