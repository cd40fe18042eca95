//! JetStream, and core NATS.

use std::time::Duration;

use guestlist::State;
use guestlist::broker::NatsOptions;
use guestlist::broker::copy;
use guestlist::broker::nats::async_nats::jetstream::consumer::{AckPolicy, pull};
use guestlist::broker::nats::async_nats::jetstream::message::PublishMessage;
use guestlist::broker::nats::async_nats::jetstream::stream::{Config, RetentionPolicy};
use guestlist::broker::nats::async_nats::jetstream::{self, Context};
use guestlist::broker::nats::async_nats::{self, HeaderMap};
use guestlist::prelude::*;

use super::proxy::Proxy;
use super::{
    Gated, Ledger, Private, Running, body, counting, env, failing_if_bad, handles_each_id_once, run_python,
    shuffled_ids, survives, third_time_lucky, unique, until,
};

/// The duplicate window of the streams here: the server itself swallows a copy within it.
const WINDOW: Duration = Duration::from_millis(100);

pub(super) fn url() -> String {
    env("GUESTLIST_NATS_URL")
}

/// The plain client, as a stranger uses it.
pub(super) struct Stranger(pub(super) Context);

impl Stranger {
    async fn at(url: &str) -> Self {
        Self(jetstream::new(async_nats::connect(url).await.unwrap()))
    }

    pub(super) async fn new() -> Self {
        Self::at(&url()).await
    }

    async fn stream(&self, name: &str, subject: &str) {
        let config = Config {
            name: name.to_owned(),
            subjects: vec![subject.to_owned()],
            retention: RetentionPolicy::Limits,
            duplicate_window: WINDOW,
            ..Config::default()
        };
        self.0.create_stream(config).await.unwrap();
    }

    /// A work queue and its durable, of the same name.
    async fn work_queue(&self, name: &str) {
        let config = Config {
            name: name.to_owned(),
            subjects: vec![name.to_owned()],
            retention: RetentionPolicy::WorkQueue,
            duplicate_window: WINDOW,
            ..Config::default()
        };
        let stream = self.0.create_stream(config).await.unwrap();
        stream.create_consumer(durable(name)).await.unwrap();
    }

    /// Both the source and the place for its dead letters.
    pub(super) async fn with_dead_letters(name: &str) -> Self {
        let stranger = Self::new().await;
        stranger.work_queue(name).await;
        stranger.stream(&dead(name), &dead(name)).await;
        stranger
    }

    pub(super) async fn send(&self, subject: &str, id: &str) {
        loop {
            let message = PublishMessage::build().message_id(id).payload(body(id).into());
            let ack = self.0.send_publish(subject.to_owned(), message).await.unwrap().await.unwrap();
            if !ack.duplicate {
                return;
            }
            // Within the server's own window it is not a copy that anybody sees.
            tokio::time::sleep(WINDOW / 4).await;
        }
    }

    /// How many messages the stream keeps.
    pub(super) async fn kept(&self, stream: &str) -> u64 {
        self.0.get_stream(stream).await.unwrap().cached_info().state.messages
    }

    /// Waits for it: the server answers a question before it has worked off the acks that came earlier.
    async fn keeps(&self, stream: &str, messages: u64) {
        let what = format!("{stream} keeps {messages} messages");
        until(&what, || async { self.kept(stream).await == messages }).await;
    }
}

fn durable(name: &str) -> pull::Config {
    pull::Config {
        durable_name: Some(name.to_owned()),
        ack_policy: AckPolicy::Explicit,
        filter_subject: name.to_owned(),
        ack_wait: Duration::from_secs(30),
        max_ack_pending: 10_000,
        ..pull::Config::default()
    }
}

pub(super) fn dead(name: &str) -> String {
    format!("{name}-dead")
}

fn queue(name: &str) -> Queue {
    Queue::new(name).dead_letter(dead(name)).backoff(Backoff::new(
        Duration::from_millis(100),
        2,
        Duration::from_secs(1),
    ))
}

#[tokio::test]
async fn a_strangers_copies_are_skipped_whoever_publishes_them() {
    for producer in ["async-nats", "nats-py"] {
        let (name, ledger) = (unique("stream"), Ledger::default());
        let stranger = Stranger::with_dead_letters(&name).await;
        let running = Running::start(&url(), queue(&name).handler(counting(&ledger)), &name).await;
        let (ids, copies) = shuffled_ids(producer);
        if producer == "async-nats" {
            for id in &ids {
                stranger.send(&name, id).await;
            }
            for id in &copies {
                stranger.send(&name, id).await;
            }
        } else {
            let lines = format!("{}\n\n{}", ids.join("\n"), copies.join("\n"));
            let sent = run_python("nats_send.py", &[&url(), &name], &lines).await;
            assert_eq!(sent, ids.len() + copies.len(), "the server swallowed a copy");
        }
        handles_each_id_once(running, &ledger).await;
        stranger.keeps(&name, 0).await;
    }
}

#[tokio::test]
async fn i1_a_failed_message_is_with_the_dead_letters_as_it_was_sent() {
    let (name, ledger) = (unique("fails"), Ledger::default());
    let stranger = Stranger::with_dead_letters(&name).await;
    let handler = failing_if_bad(&ledger, || Failure::transient("no\r\nluck"));
    let running = Running::start(&url(), queue(&name).max_attempts(3).handler(handler), &name).await;
    let mut headers = HeaderMap::new();
    headers.insert("tenant", "7");
    headers.insert("Nats-Msg-Id", "bad");
    headers.insert("Nats-Expected-Stream", name.as_str());
    headers.insert("Nats-TTL", "1h");
    let ttl = env("GUESTLIST_BROKERS") == "current";
    if ttl {
        // The current server refuses a TTL into a stream that does not allow it: allow it.
        let mut config = stranger.0.get_stream(&name).await.unwrap().cached_info().config.clone();
        config.allow_message_ttl = true;
        stranger.0.update_stream(config).await.unwrap();
    }
    let publish = stranger.0.publish_with_headers(name.clone(), headers, body("bad").into());
    publish.await.unwrap().await.unwrap();
    for n in 0..20 {
        stranger.send(&name, &format!("good-{n}")).await;
    }
    running.until("the bad one is parked", |queue| queue.dead_letters.get("exhausted") == Some(&1)).await;
    running.until("the good ones are handled", |queue| queue.handled == 20).await;
    running.stop().await;

    assert_eq!(ledger.runs(&body("bad")), 3);
    stranger.keeps(&name, 0).await;
    stranger.keeps(&dead(&name), 1).await;
    let letter = stranger.0.get_stream(&dead(&name)).await.unwrap().get_raw_message(1).await.unwrap();
    assert_eq!(letter.payload, body("bad").as_bytes());
    let header = |name: &str| letter.headers.get(name).map(|value| value.as_str().to_owned());
    assert_eq!(header("tenant").as_deref(), Some("7"));
    assert_eq!(header("Nats-Expected-Stream"), None);
    assert_eq!(header("Nats-TTL"), None);
    assert_ne!(header("Nats-Msg-Id").as_deref(), Some("bad"), "a copy has a transport id of its own");
    assert_eq!(header(copy::CAUSE).as_deref(), Some("exhausted"));
    assert_eq!(header(copy::ERROR).as_deref(), Some("no\\r\\nluck"));
    assert_eq!(header(copy::ID).as_deref(), Some("bad"));
    assert_eq!(header(copy::ATTEMPT).as_deref(), Some("3"));
    assert_eq!(header(copy::STREAM).as_deref(), Some(name.as_str()));
}

#[tokio::test]
async fn f12_without_a_destination_the_message_stays_and_the_queue_pauses_until_it_is_back() {
    let (name, ledger) = (unique("no-dead"), Ledger::default());
    let stranger = Stranger::with_dead_letters(&name).await;
    let handler = failing_if_bad(&ledger, || Failure::permanent("never"));
    let queue = queue(&name)
        .allow_missing_dead_letter()
        .pause_hold(Duration::from_secs(2))
        .lease(Duration::from_secs(3))
        .handler(handler);
    let running = Running::start(&url(), queue, &name).await;
    running.until("it consumes", |queue| queue.state == State::Running).await;
    stranger.0.delete_stream(dead(&name)).await.unwrap();
    stranger.send(&name, "bad").await;
    running.until("the queue is paused", |queue| queue.paused_by.is_some()).await;
    assert!(running.status().dead_letters.is_empty());
    assert_eq!(stranger.kept(&name).await, 1, "the message stays with the source");

    stranger.stream(&dead(&name), &dead(&name)).await;
    stranger.send(&name, "good").await;
    running.until("the bad one is parked", |queue| !queue.dead_letters.is_empty()).await;
    running.until("the good one is handled", |queue| queue.handled == 1).await;
    running.stop().await;
    stranger.keeps(&name, 0).await;
    stranger.keeps(&dead(&name), 1).await;
}

#[tokio::test]
async fn f8_a_cut_connection_loses_nothing_and_repeats_nothing_that_was_completed() {
    let (name, proxy) = (unique("cut"), Proxy::to(&url()).await);
    let stranger = Stranger::with_dead_letters(&name).await;
    let send = async |id: String| stranger.send(&name, &id).await;
    survives(&proxy.url(&url()), queue(&name), &name, send, || async { proxy.cut() }).await;
}

#[tokio::test]
async fn f24_a_durable_that_is_deleted_and_made_again_is_consumed_again() {
    let name = unique("durable");
    let stranger = Stranger::with_dead_letters(&name).await;
    let harm = || async {
        let stream = stranger.0.get_stream(&name).await.unwrap();
        stream.delete_consumer(&name).await.unwrap();
        stream.create_consumer(durable(&name)).await.unwrap();
    };
    let send = async |id: String| stranger.send(&name, &id).await;
    survives(&url(), queue(&name), &name, send, harm).await;
    // On the new durable.
    stranger.keeps(&name, 0).await;
}

#[tokio::test]
async fn f8_a_server_killed_and_started_again_loses_nothing_and_repeats_nothing_that_was_completed() {
    let mut server = Private::start("nats").await;
    let name = unique("killed");
    let stranger = Stranger::at(&server.url()).await;
    stranger.work_queue(&name).await;
    stranger.stream(&dead(&name), &dead(&name)).await;
    let gated = Gated::new();
    let running = Running::start(&server.url(), queue(&name).handler(gated.handler()), &name).await;
    for n in 0..5 {
        stranger.send(&name, &format!("m-{n}")).await;
    }
    until("five handlers run", || async { gated.running() == 5 }).await;
    server.kill().await;
    running.until("the loss was noticed", |queue| queue.rebuilds >= 1).await;
    gated.open();
    running.until("every message is handled", |queue| queue.handled == 5).await;
    server.restart().await;
    running.until("it consumes again", |queue| queue.state == State::Running).await;
    let stranger = Stranger::at(&server.url()).await;
    stranger.send(&name, "after").await;
    running.until("the next one too", |queue| queue.handled == 6).await;
    stranger.keeps(&name, 0).await;
    running.stop().await;
    assert!(gated.ledger.successes().iter().all(|count| *count == 1), "a completed run ran again");
    server.end().await;
}

#[tokio::test]
async fn a_retry_is_seen_by_its_own_durable_alone() {
    let (name, ledger) = (unique("mine"), Ledger::default());
    let (stranger, other) = (Stranger::new().await, unique("other"));
    stranger.stream(&name, &name).await;
    stranger.stream(&dead(&name), &dead(&name)).await;
    let stream = stranger.0.get_stream(&name).await.unwrap();
    for durable in [&name, &other] {
        let config = pull::Config {
            durable_name: Some(durable.clone()),
            ack_policy: AckPolicy::Explicit,
            filter_subject: name.clone(),
            ..pull::Config::default()
        };
        stream.create_consumer(config).await.unwrap();
    }
    let handler = third_time_lucky(&ledger);
    let running = Running::start(&url(), queue(&name).handler(handler), &name).await;
    stranger.send(&name, "one").await;
    running.until("it is handled at the third attempt", |queue| queue.handled == 1).await;
    running.stop().await;
    assert_eq!(ledger.runs(&body("one")), 3);
    let mut other = stream.get_consumer::<pull::Config>(&other).await.unwrap();
    assert_eq!(other.info().await.unwrap().num_pending, 1, "the other durable sees the original and no copy");
}

#[tokio::test]
async fn core_nats_skips_copies_and_parks_what_fails() {
    let (name, ledger) = (unique("core"), Ledger::default());
    let stranger = Stranger::new().await;
    stranger.stream(&dead(&name), &dead(&name)).await;
    let client = async_nats::connect(url()).await.unwrap();
    let handler = failing_if_bad(&ledger, || Failure::permanent("never"));
    let queue = queue(&name).nats(NatsOptions::new().core().subject(&name)).handler(handler);
    let running = Running::start(&url(), queue, &name).await;
    running.until("it consumes", |queue| queue.state == State::Running).await;
    let send = |id: &'static str| {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", id);
        client.publish_with_headers(name.clone(), headers, body(id).into())
    };
    // Nothing says when the server has the subscription: the first message is sent until it arrives.
    until("the first one is handled", || async {
        send("one").await.unwrap();
        running.status().handled == 1
    })
    .await;
    send("bad").await.unwrap();
    running.until("the bad one is parked", |queue| queue.dead_letters.get("permanent") == Some(&1)).await;
    let queue = running.stop().await;
    assert_eq!(queue.handled, 1, "{queue:?}");
    assert_eq!(ledger.runs(&body("one")), 1);
    assert_eq!(stranger.kept(&dead(&name)).await, 1);
}

/// What the server says of stream, durable and dead letters is compared with the settings.
#[tokio::test]
async fn limits_of_streams_and_durables_are_found() {
    let (name, stranger) = (unique("found"), Stranger::new().await);
    let minute = Duration::from_secs(60);
    let source = Config {
        name: name.clone(),
        subjects: vec![name.clone()],
        max_age: minute,
        max_messages: 500,
        duplicate_window: WINDOW,
        ..Config::default()
    };
    let stream = stranger.0.create_stream(source.clone()).await.unwrap();
    let letters = Config { name: dead(&name), subjects: vec![dead(&name)], max_bytes: 4096, ..source };
    stranger.0.create_stream(letters).await.unwrap();
    stream.create_consumer(pull::Config { max_ack_pending: 99, ..durable(&name) }).await.unwrap();

    let nats = guestlist::broker::nats::Nats::connect(&url()).await.unwrap();
    let checked = Queue::new(&name).dead_letter(dead(&name)).check(&nats).await.unwrap();
    let told: Vec<String> = checked.iter().map(ToString::to_string).collect();
    let expected = [
        "max_ack_pending is 99",
        "drops messages after 60s",
        "oldest messages at 500 messages",
        "dead letters are dropped after 60s",
        "oldest dead letters are dropped at 500 messages or 4096 bytes",
    ];
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for (told, expected) in told.iter().zip(expected) {
        assert!(told.contains(expected) && told.contains(&name), "{told}");
    }
    // A heartbeat each minute does not go with the durable's 30 s.
    let slow = Queue::new(&name).dead_letter(dead(&name)).lease(3 * minute);
    let slow = slow.nats(NatsOptions::new().ack_wait(Duration::from_secs(30)));
    let finding = slow.check(&nats).await.unwrap().remove(0);
    assert_eq!(finding.severity, guestlist::Severity::Refuse);
    let consumer = Consumer::new(nats).queue(slow.handler(async |_: Message| Ok(())));
    let refused = consumer.run_until(std::future::pending()).await.unwrap_err();
    for told in [finding.to_string(), format!("{refused:?}")] {
        assert!(told.contains("ack_wait is 30s") && told.contains("heartbeats of 60s"), "{told}");
    }
}

/// A check asks, and makes nothing.
#[tokio::test]
async fn a_check_makes_nothing() {
    let (name, stranger) = (unique("unmade"), Stranger::new().await);
    let nats = guestlist::broker::nats::Nats::connect(&url()).await.unwrap();
    assert_eq!(Queue::new(&name).declare().dead_letter(dead(&name)).check(&nats).await.unwrap(), []);
    for stream in [&name, &dead(&name)] {
        assert!(stranger.0.get_stream(stream).await.is_err(), "{stream} was made");
    }
}
