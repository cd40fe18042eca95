//! NATS, against real servers: the one of `GUESTLIST_NATS_URL`, and private ones that tests may
//! kill, freeze and lock down. `./scripts/test` sets all that is needed.

mod again;
mod letters;

use std::future::poll_fn;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::{join, join_all};
use guestlist::broker::nats::async_nats::jetstream::{self, consumer, stream};
use guestlist::broker::nats::async_nats::{Client, HeaderMap, HeaderValue};
use guestlist::broker::nats::{Nats, NatsOptionsBuilder, split};
use guestlist::broker::{
    Broker, BrokerError, BrokerErrorKind, Copy, Declare, Destination, NatsOptions, QueueSpec, Subscription,
    copy,
};
use guestlist::dead_letter::{Field, Oversized, Redact};
use guestlist::{Consumer, Delivery, Disposition, Message, Queue};
use tokio::time::{Instant, sleep, timeout};

/// What has not happened after this long will not happen.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often a condition is asked for.
const POLL: Duration = Duration::from_millis(10);
/// Sooner than by a missing heartbeat.
const PROMPT: Duration = Duration::from_secs(5);
/// Far longer than a test: what comes back earlier was handed back.
const LONG: Duration = Duration::from_secs(60);

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run ./scripts/test"))
}

fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A queue that nobody has used, with a dead-letter subject of its own.
fn queue(name: &str) -> QueueSpec {
    let mut spec = QueueSpec::new(unique(name));
    spec.declare = Declare::Create;
    spec.prefetch = 8;
    spec.nats = NatsOptions::new().ack_wait(LONG);
    spec.dead_letter = Some(format!("{}-dead", spec.name).into());
    spec
}

fn dead(spec: &QueueSpec) -> Destination {
    spec.dead_letter.clone().expect("the spec has a dead-letter destination")
}

async fn nats() -> Nats {
    Nats::connect(&env("GUESTLIST_NATS_URL")).await.expect("the server of GUESTLIST_NATS_URL is there")
}

/// A stranger's client.
async fn stranger() -> jetstream::Context {
    stranger_at(&env("GUESTLIST_NATS_URL")).await
}

async fn stranger_at(url: &str) -> jetstream::Context {
    let client = guestlist::broker::nats::async_nats::connect(url).await.expect("a plain client connects");
    jetstream::new(client)
}

/// Carries one connection to the server, and changes what that says.
async fn between(change: impl Fn(&mut Vec<u8>) + Send + 'static) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("nats://{}", listener.local_addr().expect("bound"));
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.expect("a client");
        let server = env("GUESTLIST_NATS_URL").replace("nats://", "");
        let server = tokio::net::TcpStream::connect(server).await.expect("the server is there");
        let ((mut asked, mut told), (mut said, mut heard)) = (client.into_split(), server.into_split());
        tokio::spawn(async move { tokio::io::copy(&mut asked, &mut heard).await });
        let mut bytes = Vec::with_capacity(1 << 20);
        while let Ok(1..) = said.read_buf(&mut bytes).await {
            change(&mut bytes);
            told.write_all(&bytes).await.expect("told");
            bytes.clear();
        }
    });
    url
}

/// Of equal length, so that the server's own counts hold.
fn swap(said: &mut [u8], from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    while let Some(at) = said.windows(from.len()).position(|bytes| bytes == from) {
        said[at..at + to.len()].copy_from_slice(to);
    }
}

async fn send(js: &jetstream::Context, subject: &str, body: &str) {
    let sent = js.publish(subject.to_owned(), body.to_owned().into()).await.expect("published");
    sent.await.expect("stored");
}

async fn send_with(js: &jetstream::Context, subject: &str, headers: &[(&str, &str)], body: &[u8]) {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, *value);
    }
    let sent =
        js.publish_with_headers(subject.to_owned(), map, body.to_vec().into()).await.expect("published");
    sent.await.expect("stored");
}

async fn poll(from: &mut Box<dyn Subscription>, room: usize) -> Option<Result<Delivery, BrokerError>> {
    timeout(PATIENCE, poll_fn(|cx| from.poll_next(cx, room))).await.expect("something arrives in time")
}

async fn next(from: &mut Box<dyn Subscription>) -> Delivery {
    poll(from, 64).await.expect("not ended").expect("a delivery")
}

async fn take(from: &mut Box<dyn Subscription>, count: usize) -> Vec<Delivery> {
    let mut taken = Vec::new();
    while taken.len() < count {
        taken.push(next(from).await);
    }
    taken
}

/// The error that ends a subscription.
async fn end(from: &mut Box<dyn Subscription>) -> BrokerError {
    let error = poll(from, 64).await.expect("an error comes before the end").expect_err("no delivery is due");
    assert!(poll(from, 64).await.is_none(), "after an error a subscription is dead");
    error
}

async fn settle(delivery: Delivery, disposition: Disposition) {
    delivery.into_parts().1.settle(disposition).await.expect("the server is told");
}

async fn stays_quiet(from: &mut Box<dyn Subscription>) {
    let quiet = timeout(Duration::from_millis(300), poll_fn(|cx| from.poll_next(cx, 64))).await;
    assert!(quiet.is_err(), "nothing is due, yet: {quiet:?}");
}

async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let begin = Instant::now();
    while !holds().await {
        assert!(begin.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        sleep(POLL).await;
    }
}

async fn stored(js: &jetstream::Context, stream: &str) -> u64 {
    js.get_stream(stream).await.expect("the stream is there").cached_info().state.messages
}

async fn ready(name: &str) -> (Nats, QueueSpec, Box<dyn Subscription>, jetstream::Context) {
    let (nats, spec) = (nats().await, queue(name));
    nats.prepare(&spec).await.expect("prepared");
    let inbox = nats.subscribe(&spec).await.expect("subscribed");
    (nats, spec, inbox, stranger().await)
}

fn record() -> copy::DeadLetter {
    let letter = Message::builder("")
        .header(copy::CAUSE, "exhausted")
        .header(copy::ERROR, "e".repeat(1000))
        .header(copy::ATTEMPT, "5")
        .build();
    copy::DeadLetter::read(&letter).expect("a record")
}

async fn park(nats: &Nats, to: &Destination, message: &Message) -> Result<(), BrokerError> {
    nats.publish(to, &Copy::dead_letter(message, &record())).await
}

fn kind_of<T: std::fmt::Debug>(result: Result<T, BrokerError>) -> BrokerErrorKind {
    result.expect_err("an error is due").kind()
}

/// The refusal's text.
fn refusal<T: std::fmt::Debug>(result: Result<T, BrokerError>) -> String {
    let error = result.expect_err("a refusal is due");
    assert_eq!(error.kind(), BrokerErrorKind::Refused, "{error:?}");
    error.to_string()
}

// ---------------------------------------------------------------- private servers

/// A server of the test's own; its data outlives a kill, and goes with the test.
struct Server {
    port: u16,
    dir: PathBuf,
    config: Option<PathBuf>,
    process: Child,
}

impl Server {
    async fn start(config: &str) -> Self {
        let dir = std::env::temp_dir().join(unique("guestlist-nats"));
        std::fs::create_dir_all(&dir).expect("a folder for the server");
        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port();
        let config = (!config.is_empty()).then(|| {
            let path = dir.join("nats.conf");
            std::fs::write(&path, config).expect("the config is written");
            path
        });
        let process = Self::spawn(port, &dir, config.as_deref());
        let server = Self { port, dir, config, process };
        server.listens().await;
        server
    }

    fn spawn(port: u16, dir: &std::path::Path, config: Option<&std::path::Path>) -> Child {
        let mut command = Command::new(PathBuf::from(env("GUESTLIST_SCRIPTS")).join("brokers"));
        command.args(["run", "nats", &env("GUESTLIST_BROKERS"), &port.to_string()]).arg(dir).args(config);
        let out = std::fs::File::create(dir.join("out")).expect("a log");
        command.stdin(Stdio::null()).stdout(out.try_clone().expect("a log")).stderr(out);
        command.spawn().expect("scripts/brokers runs")
    }

    async fn listens(&self) {
        until("the private server listens", || async {
            TcpStream::connect(("127.0.0.1", self.port)).is_ok_and(|mut server| {
                let mut first = [0; 4];
                server.read_exact(&mut first).is_ok() && &first == b"INFO"
            })
        })
        .await;
    }

    fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.process.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "{name} is sent");
    }

    /// Stops the process; it goes on for a moment after the signal.
    async fn freeze(&self) {
        self.signal("STOP");
        let state = format!("/proc/{}/stat", self.process.id());
        until("the server is frozen", || async {
            std::fs::read_to_string(&state).is_ok_and(|state| state.contains(") T "))
        })
        .await;
    }

    fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    async fn restart(&mut self) {
        self.process = Self::spawn(self.port, &self.dir, self.config.as_deref());
        self.listens().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Publishes as no client library would.
fn send_raw(url: &str, subject: &str, status: &[u8], headers: &[u8], body: &[u8]) {
    let address = url.trim_start_matches("nats://");
    let mut server = TcpStream::connect(address).expect("connects");
    let block = [b"NATS/1.0", status, b"\r\n", headers, b"\r\n"].concat();
    let total = block.len() + body.len();
    write!(
        server,
        "CONNECT {{\"verbose\":false,\"headers\":true}}\r\nHPUB {subject} {} {total}\r\n",
        block.len()
    )
    .and_then(|()| server.write_all(&block))
    .and_then(|()| server.write_all(body))
    .and_then(|()| server.write_all(b"\r\nPING\r\n"))
    .expect("sent");
    let mut said = String::new();
    while !said.contains("PONG") {
        let mut some = [0; 1024];
        let read = server.read(&mut some).expect("answers");
        assert!(read > 0, "the server closed: {said}");
        said.push_str(&String::from_utf8_lossy(&some[..read]));
    }
    assert!(!said.contains("-ERR"), "{said}");
}

// ---------------------------------------------------------------- the contract

#[cfg(feature = "testing")]
mod contract {
    use std::sync::Arc;

    use guestlist::broker::Features;
    use guestlist::testing::broker_contract::{BrokerFixture, broker_contract};

    use super::*;

    const ACK_WAIT: Duration = Duration::from_secs(4);

    struct JetStream {
        js: jetstream::Context,
        /// From which delay on a message waits as a copy in the durable's own stream.
        long_delay: Option<Duration>,
    }

    #[async_trait::async_trait]
    impl BrokerFixture for JetStream {
        async fn connect(&self) -> Arc<dyn Broker> {
            Arc::new(nats().await)
        }

        fn queue(&self, name: &str, prefetch: u16) -> QueueSpec {
            let mut spec = queue(name);
            spec.prefetch = prefetch;
            spec.nats = NatsOptions::new().ack_wait(ACK_WAIT);
            spec.nats.long_delay = self.long_delay;
            spec
        }

        async fn send(&self, queue: &QueueSpec, id: &str, headers: &[(&str, &str)], body: &[u8]) {
            let headers: Vec<_> = headers.iter().copied().chain([("Nats-Msg-Id", id)]).collect();
            send_with(&self.js, &queue.name, &headers, body).await;
        }

        async fn depth(&self, queue: &QueueSpec) -> u64 {
            let own = format!("guestlist-{0}-{0}-{1}", queue.name, queue.name.len());
            stored(&self.js, &queue.name).await + stored(&self.js, &own).await
        }

        async fn read_dead_letters(&self, queue: &QueueSpec) -> Vec<Message> {
            letters(dead(queue).name()).await
        }

        async fn delete_dead_letters(&self, queue: &QueueSpec) {
            self.js.delete_stream(dead(queue).name()).await.expect("deleted");
        }

        fn features(&self, broker: &dyn Broker) -> Features {
            let mut features = broker.features();
            features.ack_deadline = Some(ACK_WAIT);
            features
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn jetstream_keeps_the_contract() {
        broker_contract(&JetStream { js: stranger().await, long_delay: None }).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn jetstream_keeps_the_contract_by_copies_too() {
        broker_contract(&JetStream { js: stranger().await, long_delay: Some(Duration::ZERO) }).await;
    }
}

/// All that is there, by a consumer of its own.
async fn letters(subject: &str) -> Vec<Message> {
    let (nats, mut spec) = (nats().await, QueueSpec::new(subject));
    spec.declare = Declare::Create;
    let js = stranger().await;
    nats.prepare(&spec).await.expect("prepared");
    let count = usize::try_from(stored(&js, subject).await).expect("a number");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    let letters = take(&mut inbox, count).await;
    let messages = letters.iter().map(|letter| letter.message().clone()).collect();
    inbox.close().await;
    js.delete_consumer_from_stream(subject, subject).await.expect("deleted");
    messages
}

// ---------------------------------------------------------------- deliveries

#[tokio::test]
async fn a_strangers_id_headers_and_place_are_seen() {
    let (nats, spec, mut inbox, js) = ready("place").await;
    send(&js, &spec.name, "first").await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
    let url = env("GUESTLIST_NATS_URL");
    let headers = b"Nats-Msg-Id:order-17\r\nh: 1\r\nh: 2\r\ncontent-type: text/plain\r\n";
    send_raw(&url, &spec.name, b"", headers, b"\0\xff");

    let delivery = next(&mut inbox).await;
    let message = delivery.message();
    assert_eq!(message.transport_id().expect("an id").as_bytes(), b"order-17");
    assert_eq!(message.id().expect("an id").as_bytes(), b"order-17");
    let repeated: Vec<_> =
        message.headers().iter().filter(|(name, _)| *name == "h").map(|(_, v)| v.clone()).collect();
    assert_eq!(repeated, ["1", "2"]);
    assert_eq!(message.headers().len(), 4);
    assert_eq!(message.content_type(), Some("text/plain"));
    assert_eq!(&message.payload()[..], b"\0\xff");
    let source = message.source();
    assert_eq!((source.stream.as_str(), source.sequence), (spec.name.as_str(), Some(2)));
    assert_eq!(
        (source.routing_key.as_str(), source.queue.as_str()),
        (spec.name.as_str(), spec.name.as_str())
    );
    assert_eq!(source.system, nats.system());
    assert_eq!((message.broker_deliveries(), message.redelivered()), (Some(1), false));
    let age = message.timestamp().expect("a time").elapsed().expect("in the past");
    assert!(age < PATIENCE);

    settle(delivery, Disposition::Requeue { after: Duration::ZERO }).await;
    let again = next(&mut inbox).await;
    assert_eq!((again.message().broker_deliveries(), again.message().redelivered()), (Some(2), true));
    settle(again, Disposition::Ack).await;
    until("acked messages leave", || async { stored(&js, &spec.name).await == 0 }).await;
}

/// A sender may write what he likes into the first line of the headers.
#[tokio::test]
async fn a_message_that_reads_as_a_word_of_the_servers_is_a_message() {
    let (_nats, spec, mut inbox, _) = ready("words").await;
    let words =
        [" 503", " 408 Request Timeout", " 409 Consumer Deleted", " 100 Idle Heartbeat", " 404 No Messages"];
    for word in words {
        send_raw(&env("GUESTLIST_NATS_URL"), &spec.name, word.as_bytes(), b"h: v\r\n", word.as_bytes());
        let delivery = next(&mut inbox).await;
        assert_eq!(delivery.message().payload(), word.as_bytes());
        assert_eq!(delivery.message().headers().get_str("h"), Some("v"));
        settle(delivery, Disposition::Ack).await;
    }
}

#[tokio::test]
async fn without_an_id_header_there_is_no_id() {
    let (_nats, spec, mut inbox, js) = ready("no-id").await;
    send(&js, &spec.name, "x").await;
    send_with(&js, &spec.name, &[("Nats-Msg-Id", "")], b"x").await;
    for delivery in take(&mut inbox, 2).await {
        assert!(delivery.message().id().is_none());
        settle(delivery, Disposition::Ack).await;
    }
}

#[tokio::test]
async fn names_are_made_legal_and_the_subject_stays() {
    let (nats, js) = (nats().await, stranger().await);
    let mut spec = queue("shop.charges");
    spec.dead_letter = Some(format!("{}.dead", spec.name).into());
    nats.prepare(&spec).await.expect("prepared");
    let legal = spec.name.replace('.', "_");
    assert_eq!(nats.default_scope(&spec), format!("nats:{legal}/{legal}"));
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    send(&js, &spec.name, "x").await;
    let delivery = next(&mut inbox).await;
    assert_eq!(delivery.message().source().queue, spec.name);
    assert_eq!(delivery.message().source().stream, legal);
    park(&nats, &dead(&spec), delivery.message()).await.expect("parked");
    assert_eq!(stored(&js, &format!("{legal}_dead")).await, 1);
    settle(delivery, Disposition::Ack).await;
}

#[tokio::test]
async fn a_confirmed_ack_notices_that_the_durable_is_gone() {
    let (nats, mut spec, inbox, js) = ready("double-ack").await;
    inbox.close().await;
    spec.nats = spec.nats.double_ack();
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    send(&js, &spec.name, "1").await;
    send(&js, &spec.name, "2").await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
    assert_eq!(stored(&js, &spec.name).await, 1, "a confirmed ack has happened");
    let late = next(&mut inbox).await;
    js.delete_consumer_from_stream(&spec.name, &spec.name).await.expect("deleted");
    let answer = late.into_parts().1.settle(Disposition::Ack).await;
    assert_eq!(kind_of(answer), BrokerErrorKind::Closed);
    assert_eq!(stored(&js, &spec.name).await, 1);
}

#[tokio::test]
async fn a_confirmed_ack_without_an_answer_is_unknown() {
    let server = Server::start("").await;
    let nats = Nats::options()
        .confirm_timeout(Duration::from_secs(3))
        .connect(&server.url())
        .await
        .expect("connects");
    let mut spec = queue("double-ack-frozen");
    spec.nats = spec.nats.double_ack();
    nats.prepare(&spec).await.expect("prepared");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    send(&stranger_at(&server.url()).await, &spec.name, "x").await;
    let delivery = next(&mut inbox).await;
    let letter = delivery.message().clone();
    server.freeze().await;
    let answer = delivery.into_parts().1.settle(Disposition::Ack).await;
    assert_eq!(kind_of(answer), BrokerErrorKind::Unknown);
    assert_eq!(kind_of(park(&nats, &dead(&spec), &letter).await), BrokerErrorKind::Unknown);
    server.signal("CONT");
    drop(inbox);
}

/// What is on its way for longer than `cancel` listens comes again only after `ack_wait`. That may happen to a busy server,
/// but not each time.
async fn in_one_of_three_tries<F: Future<Output = bool>>(mut attempt: impl FnMut() -> F) {
    for _ in 0..3 {
        if attempt().await {
            return;
        }
    }
    panic!("not in three tries");
}

/// Whether that many come before `ack_wait` is over, and then they are acked.
async fn come_soon(nats: &Nats, spec: &QueueSpec, count: usize) -> bool {
    let mut inbox = nats.subscribe(spec).await.expect("subscribed");
    let Ok(all) = timeout(PATIENCE / 2, take(&mut inbox, count)).await else { return false };
    for delivery in all {
        settle(delivery, Disposition::Ack).await;
    }
    true
}

#[tokio::test]
async fn cancel_hands_back_what_is_buffered_and_what_is_on_its_way() {
    in_one_of_three_tries(all_is_handed_back).await;
}

async fn all_is_handed_back() -> bool {
    let (nats, mut spec, inbox, js) = ready("hand-back").await;
    inbox.close().await;
    spec.prefetch = 50;
    for body in 0..50 {
        send(&js, &spec.name, &body.to_string()).await;
    }
    for round in 0..10 {
        let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
        // One poll: the request for all of them has just been sent, nothing has arrived.
        if round % 2 == 0 {
            assert!(poll_fn(|cx| std::task::Poll::Ready(inbox.poll_next(cx, 50))).await.is_pending());
        } else {
            settle(next(&mut inbox).await, Disposition::Release { after: Duration::ZERO }).await;
        }
        inbox.cancel().await;
        assert!(poll(&mut inbox, 50).await.is_none());
        inbox.close().await;
    }
    let came = come_soon(&nats, &spec, 50).await;
    if came {
        until("acked messages leave", || async { stored(&js, &spec.name).await == 0 }).await;
    }
    came
}

#[tokio::test]
async fn an_abandoned_message_comes_again_only_after_ack_wait() {
    let (nats, js, mut spec) = (nats().await, stranger().await, queue("abandoned"));
    spec.nats = NatsOptions::new().ack_wait(Duration::from_secs(1));
    nats.prepare(&spec).await.expect("prepared");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    let begin = Instant::now();
    send(&js, &spec.name, "x").await;
    settle(next(&mut inbox).await, Disposition::Abandon).await;
    let again = next(&mut inbox).await;
    assert!(begin.elapsed() >= Duration::from_secs(1), "{:?}", begin.elapsed());
    settle(again, Disposition::Ack).await;
}

#[tokio::test]
async fn no_more_is_fetched_than_there_is_room_for() {
    let (_nats, spec, mut inbox, js) = ready("room").await;
    for body in 0..5 {
        send(&js, &spec.name, &body.to_string()).await;
    }
    let first = poll(&mut inbox, 2).await.expect("not ended").expect("a delivery");
    let second = poll(&mut inbox, 1).await.expect("not ended").expect("a delivery");
    let mut durable: consumer::PullConsumer =
        js.get_consumer_from_stream(&spec.name, &spec.name).await.expect("there");
    let out = durable.info().await.expect("info").num_ack_pending;
    assert_eq!(out, 2, "two were taken, two were fetched");
    settle(first, Disposition::Ack).await;
    settle(second, Disposition::Ack).await;
}

#[tokio::test]
async fn a_settlement_wakes_a_subscription_that_is_full() {
    let (nats, mut spec, inbox, js) = ready("woken").await;
    inbox.close().await;
    spec.prefetch = 1;
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    send(&js, &spec.name, "1").await;
    send(&js, &spec.name, "2").await;
    let first = next(&mut inbox).await;
    let mut full = Box::pin(next(&mut inbox));
    assert!(poll_fn(|cx| std::task::Poll::Ready(full.as_mut().poll(cx))).await.is_pending());
    // By another task, so that only the settlement can wake this one.
    tokio::spawn(settle(first, Disposition::Ack));
    let second = timeout(PROMPT, full).await.expect("woken by the settlement, not by a timer");
    assert_eq!(second.message().payload(), "2");
    settle(second, Disposition::Ack).await;
}

#[tokio::test]
async fn a_message_of_somebody_elses_loop_can_be_split_and_settled() {
    let (_nats, spec, inbox, js) = ready("split").await;
    inbox.close().await;
    send_with(&js, &spec.name, &[("Nats-Msg-Id", "a")], b"x").await;
    let durable: consumer::PullConsumer =
        js.get_consumer_from_stream(&spec.name, &spec.name).await.expect("there");
    let mut loop_of_theirs = durable.messages().await.expect("subscribed");
    for _ in 0..2 {
        let theirs = timeout(PATIENCE, loop_of_theirs.next()).await.expect("in time").expect("not ended");
        let (message, acker) = split(theirs.expect("a message"));
        assert_eq!(message.id().expect("an id").as_bytes(), b"a");
        assert_eq!(message.source().queue, spec.name);
        let end = if message.redelivered() {
            Disposition::Ack
        } else {
            Disposition::Release { after: Duration::ZERO }
        };
        acker.settle(end).await.expect("settled");
    }
    until("acked messages leave", || async { stored(&js, &spec.name).await == 0 }).await;
}

// ---------------------------------------------------------------- copies

#[tokio::test]
async fn a_dead_letter_is_true_to_its_original_whatever_the_server_would_act_on() {
    let (nats, js, spec) = (nats().await, stranger().await, queue("faithful"));
    let config = stream::Config {
        name: spec.name.clone(),
        subjects: vec![spec.name.clone()],
        allow_rollup: true,
        allow_message_ttl: true,
        ..stream::Config::default()
    };
    js.create_stream(config).await.expect("created");
    nats.prepare(&spec).await.expect("prepared");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    let sent = [
        ("Nats-Msg-Id", "order-17"),
        ("Nats-Expected-Stream", spec.name.as_str()),
        ("Nats-Rollup", "sub"),
        ("Nats-TTL", "60s"),
        ("x", "1"),
        ("x", "2"),
        ("Content-Type", "application/json"),
    ];
    let body: Vec<u8> = (0..=255).collect();
    // What would purge the dead letters, if it were copied.
    park(&nats, &dead(&spec), &Message::builder("another").transport_id("another").build())
        .await
        .expect("parked");
    send_with(&js, &spec.name, &sent, &body).await;
    let original = next(&mut inbox).await;
    park(&nats, &dead(&spec), original.message()).await.expect("parked");

    let found = js.get_stream(dead(&spec).name()).await.expect("there").direct_get(2).await.expect("stored");
    assert_eq!(&found.payload[..], &body[..]);
    for (name, value) in sent.iter().filter(|(name, _)| name.starts_with("Nats-") && *name != "Nats-Msg-Id") {
        assert!(found.headers.get(*name).is_none(), "{name} is not sent");
        let moved = format!("{}{}", copy::MOVED_HEADER, name.replacen('N', "%4E", 1));
        assert_eq!(found.headers.get(moved.as_str()).expect(name).as_str(), *value);
    }
    let repeated: Vec<_> = found.headers.get_all("x").map(HeaderValue::as_str).collect();
    assert_eq!(repeated, ["1", "2"]);
    assert_ne!(found.headers.get("Nats-Msg-Id").expect("an id").as_str(), "order-17");

    let letters = letters(dead(&spec).name()).await;
    assert_eq!(letters.len(), 2, "nothing was purged");
    let (letter, original_message) = (&letters[1], original.message());
    assert_eq!(sorted(letter), sorted(original_message), "a letter shows the original's headers");
    assert_eq!(letter.id(), original_message.id());
    assert_eq!(letter.transport_id(), original_message.transport_id());
    assert_eq!(letter.source(), original_message.source());
    assert_eq!(letter.content_type(), Some("application/json"));
    assert_eq!(letter.payload(), original_message.payload());
    settle(original, Disposition::Ack).await;
}

fn sorted(message: &Message) -> Vec<(String, Vec<u8>)> {
    let mut headers: Vec<_> =
        message.headers().iter().map(|(name, value)| (name.to_owned(), value.to_vec())).collect();
    headers.sort();
    headers
}

#[tokio::test]
async fn headers_that_nats_cannot_carry_never_panic_and_values_come_back() {
    let (nats, spec, _inbox, _js) = ready("odd-headers").await;
    let names = ["", "a b", "a:b", "é", "c\r\nd", "\0"];
    let values: [(&str, &[u8]); 6] = [
        ("cr", b"a\rb"),
        ("lf", b"a\nb"),
        ("crlf", b"a\r\nNats-Rollup: all"),
        ("nul", b"\0"),
        ("bytes", b"\xff\xfe"),
        ("edges", b" x "),
    ];
    let message = names.iter().fold(Message::builder("body"), |message, name| message.header(*name, "v"));
    let message = values.iter().fold(message, |message, (name, value)| message.header(*name, value.to_vec()));
    park(&nats, &dead(&spec), &message.transport_id(b"\r\n\xff".to_vec()).build()).await.expect("parked");
    let letters = letters(dead(&spec).name()).await;
    let mut expected: Vec<_> =
        values.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec())).collect();
    expected.sort();
    assert_eq!(sorted(&letters[0]), expected);
    assert_eq!(letters[0].id().expect("an id").as_bytes(), b"\r\n\xff");
}

#[tokio::test]
async fn a_copy_to_a_subject_without_a_stream_is_not_routed() {
    let nats = nats().await;
    let message = Message::builder("x").build();
    assert_eq!(kind_of(park(&nats, &unique("nowhere").into(), &message).await), BrokerErrorKind::NotRouted);
    for subject in ["a.*", "a.>", "", "a b", "a\r\nPUB x 0\r\n"] {
        assert_eq!(
            kind_of(park(&nats, &subject.into(), &message).await),
            BrokerErrorKind::Refused,
            "{subject}"
        );
    }
}

#[tokio::test]
async fn an_answer_that_is_not_a_streams_confirms_nothing() {
    let (nats, js) = (nats().await, stranger().await);
    let subject = unique("somebody");
    let client: Client = js.client();
    let mut asked = client.subscribe(subject.clone()).await.expect("subscribed");
    client.flush().await.expect("flushed");
    tokio::spawn(async move {
        while let Some(question) = asked.next().await {
            client
                .publish(question.reply.expect("a question"), r#"{"ok":true}"#.into())
                .await
                .expect("answered");
        }
    });
    let message = Message::builder("x").build();
    until("the responder is there", || async {
        let kind = kind_of(park(&nats, &subject.as_str().into(), &message).await);
        assert!(matches!(kind, BrokerErrorKind::NotRouted | BrokerErrorKind::Unknown), "{kind:?}");
        kind == BrokerErrorKind::Unknown
    })
    .await;
}

#[tokio::test]
async fn a_dead_letter_stream_may_go_and_come_back() {
    let (nats, spec, mut inbox, js) = ready("comes-back").await;
    send(&js, &spec.name, "x").await;
    let delivery = next(&mut inbox).await;
    park(&nats, &dead(&spec), delivery.message()).await.expect("parked");
    js.delete_stream(dead(&spec).name()).await.expect("deleted");
    until("the copy is not routed", || async {
        matches!(park(&nats, &dead(&spec), delivery.message()).await, Err(error) if error.kind() == BrokerErrorKind::NotRouted)
    })
    .await;
    nats.prepare(&spec).await.expect("prepared");
    park(&nats, &dead(&spec), delivery.message()).await.expect("parked");
    assert_eq!(stored(&js, dead(&spec).name()).await, 1);
    settle(delivery, Disposition::Ack).await;
}

#[tokio::test]
async fn a_duplicate_counts_only_while_the_first_is_there() {
    let (nats, spec, mut inbox, js) = ready("duplicate").await;
    send(&js, &spec.name, "x").await;
    let delivery = next(&mut inbox).await;
    for _ in 0..2 {
        park(&nats, &dead(&spec), delivery.message()).await.expect("parked");
        assert_eq!(stored(&js, dead(&spec).name()).await, 1, "the second is a duplicate");
    }
    js.get_stream(dead(&spec).name()).await.expect("there").purge().await.expect("purged");
    park(&nats, &dead(&spec), delivery.message()).await.expect("parked");
    assert_eq!(stored(&js, dead(&spec).name()).await, 1, "the first was purged, so the copy is there again");
    settle(delivery, Disposition::Ack).await;
}

/// The letter of a message that leaves this much of `max_payload` free; none: it stayed with its queue.
async fn parked_with(
    spare: usize,
    server: &Server,
    oversized: Oversized,
) -> Option<(copy::DeadLetter, usize)> {
    let (nats, spec) = (Nats::connect(&server.url()).await.expect("connects"), queue("sizes"));
    let js = stranger_at(&server.url()).await;
    let handler = async |_: Message| Err(guestlist::Failure::permanent("e".repeat(1000)));
    let queue = Queue::new(spec.name.as_str()).declare().dead_letter(dead(&spec)).oversized(oversized);
    let consumer = Consumer::new(nats).queue(queue.handler(handler));
    let status = consumer.status();
    let settled = || {
        let queue = status.queue(&spec.name).unwrap_or_default();
        !queue.dead_letters.is_empty() || queue.failures.get("too_large") == Some(&1)
    };
    let run = consumer.run_until(async {
        until("it runs", || async { status.is_healthy() }).await;
        send_with(
            &js,
            &spec.name,
            &[("Nats-Msg-Id", "1"), ("tenant", "7")],
            &vec![b'x'; MAX_PAYLOAD - spare],
        )
        .await;
        until("it is parked, or refused", || async { settled() }).await;
    });
    run.await.expect("it ends well");
    let stream = js.get_stream(dead(&spec).name()).await.expect("there");
    let kept = stored(&js, &spec.name).await;
    let Ok(letter) = stream.get_raw_message(1).await else {
        assert_eq!(kept, 1, "it is still with its queue");
        return None;
    };
    assert_eq!(letter.headers.get("tenant").map(HeaderValue::as_str), Some("7"));
    let mut message = Message::builder(letter.payload.clone());
    for (name, values) in letter.headers.iter() {
        message = message.header(name.to_string(), values[0].as_str().to_owned());
    }
    Some((copy::DeadLetter::read(&message.build()).expect("a record"), letter.payload.len()))
}

const MAX_PAYLOAD: usize = 8192;

#[tokio::test]
async fn a_letter_larger_than_max_payload_gives_up_its_story_and_then_stays_or_is_cut_as_the_queue_says() {
    let server = Server::start(&format!("max_payload: {MAX_PAYLOAD}\n")).await;
    for (spare, history, error) in [(3000, 1, 1000), (1500, 0, 1000), (900, 0, 0)] {
        let (record, length) = parked_with(spare, &server, Oversized::Keep).await.expect("parked");
        assert_eq!((record.history.len(), record.error.len()), (history, error), "{spare}");
        assert_eq!(
            (length, record.is_whole(), record.cause.as_str()),
            (MAX_PAYLOAD - spare, true, "permanent")
        );
    }
    assert!(parked_with(100, &server, Oversized::Keep).await.is_none());
    let (record, length) = parked_with(100, &server, Oversized::Truncate).await.expect("parked");
    let whole = MAX_PAYLOAD - 100;
    assert_eq!((length, record.truncated), (whole / 2, u64::try_from(whole).ok()));
    assert_eq!(record.body_hash, Some(blake3::hash(&vec![b'x'; whole]).to_string()));
}

#[tokio::test]
async fn what_travels_aside_is_redacted_too() {
    let (nats, spec, js) = (nats().await, queue("aside"), stranger().await);
    let hide = |field: Field<'_>, _: &[u8]| match field {
        Field::Header("Nats-Card") => Redact::Remove,
        Field::Header("Nats-Name") => Redact::Replace("somebody".to_owned()),
        _ => Redact::Keep,
    };
    let handler = async |_: Message| Err(guestlist::Failure::permanent("no"));
    let queue =
        Queue::new(spec.name.as_str()).declare().dead_letter(dead(&spec)).redact(hide).handler(handler);
    let consumer = Consumer::new(nats).queue(queue);
    let status = consumer.status();
    let headers =
        [("Nats-Card", "4111"), ("Nats-Name", "hunter2"), ("Nats-Else", "kept"), ("Nats-Msg-Id", "1")];
    let run = consumer.run_until(async {
        until("it runs", || async { status.is_healthy() }).await;
        send_with(&js, &spec.name, &headers, b"x").await;
        until("it is parked", || async { status.queues()[0].dead_letters.len() == 1 }).await;
    });
    run.await.expect("it ends well");
    let letter = letters(dead(&spec).name()).await.remove(0);
    let shown = |name| letter.headers().get_str(name);
    assert_eq!(
        (shown("Nats-Card"), shown("Nats-Name"), shown("Nats-Else")),
        (None, Some("somebody"), Some("kept"))
    );
}

#[tokio::test]
async fn what_a_stream_refuses_is_not_taken_for_kept() {
    let (nats, js, spec) = (nats().await, stranger().await, queue("full"));
    let full = |name: String| stream::Config {
        subjects: vec![name.clone()],
        name,
        max_messages: 1,
        max_message_size: 2000,
        discard: stream::DiscardPolicy::New,
        ..stream::Config::default()
    };
    js.create_stream(full(dead(&spec).name().to_owned())).await.expect("created");
    let of = |body: String| Message::builder(body.clone()).transport_id(body).build();
    assert_eq!(kind_of(park(&nats, &dead(&spec), &of("x".repeat(2000))).await), BrokerErrorKind::TooLarge);
    park(&nats, &dead(&spec), &of("1".into())).await.expect("parked");
    assert_eq!(kind_of(park(&nats, &dead(&spec), &of("2".into())).await), BrokerErrorKind::Nacked);
}

// ---------------------------------------------------------------- losses

#[tokio::test]
async fn a_deleted_durable_is_noticed_and_made_again() {
    let (nats, mut spec, mut inbox, js) = ready("durable-gone").await;
    stays_quiet(&mut inbox).await;
    let deleted = js.delete_consumer_from_stream(&spec.name, &spec.name);
    let (error, deleted) = join(timeout(PROMPT, end(&mut inbox)), deleted).await;
    let error = deleted.map(|_| error).expect("deleted").expect("the server says so");
    assert!(!error.is_final(), "{error:?}");
    spec.declare = Declare::Check;
    assert!(refusal(nats.subscribe(&spec).await.map(drop)).contains(&format!("the durable `{}`", spec.name)));
    spec.declare = Declare::Create;
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed again");
    send(&js, &spec.name, "x").await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
}

#[tokio::test]
async fn a_deleted_stream_is_noticed_and_made_again() {
    let (nats, spec, mut inbox, js) = ready("stream-gone").await;
    stays_quiet(&mut inbox).await;
    let (error, deleted) = join(timeout(PROMPT, end(&mut inbox)), js.delete_stream(&spec.name)).await;
    let error = deleted.map(|_| error).expect("deleted").expect("the server says so");
    assert!(!error.is_final(), "{error:?}");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed again");
    send(&js, &spec.name, "x").await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
}

#[tokio::test]
async fn a_stream_that_is_gone_before_the_first_request_is_noticed() {
    // By silence: the server does not answer such a request.
    let (_nats, spec, mut inbox, js) = ready("stream-gone-early").await;
    js.delete_stream(&spec.name).await.expect("deleted");
    assert!(!end(&mut inbox).await.is_final());
}

#[tokio::test]
async fn a_killed_server_is_noticed_and_deliveries_in_hand_can_be_settled_later() {
    let mut server = Server::start("").await;
    let (nats, spec) = (Nats::connect(&server.url()).await.expect("connects"), queue("killed"));
    nats.prepare(&spec).await.expect("prepared");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    send(&stranger_at(&server.url()).await, &spec.name, "1").await;
    send(&stranger_at(&server.url()).await, &spec.name, "2").await;
    let in_hand = next(&mut inbox).await;
    let buffered = next(&mut inbox).await;
    server.kill();
    let error = timeout(PROMPT, end(&mut inbox)).await.expect("the broken connection says so");
    assert_eq!(error.kind(), BrokerErrorKind::Unreachable);
    inbox.close().await;
    let away = nats.subscribe(&spec).await.map(drop);
    assert_eq!(kind_of(away), BrokerErrorKind::Unreachable);
    assert_eq!(kind_of(park(&nats, &dead(&spec), in_hand.message()).await), BrokerErrorKind::Unreachable);

    server.restart().await;
    let mut inbox = subscribed_again(&nats, &spec).await;
    settle(in_hand, Disposition::Ack).await;
    settle(buffered, Disposition::Release { after: Duration::ZERO }).await;
    // A server that is killed may forget that it delivered: both may come again, as if for the
    // first time.
    let js = stranger_at(&server.url()).await;
    let begin = Instant::now();
    while stored(&js, &spec.name).await > 0 {
        assert!(begin.elapsed() < PATIENCE, "what is acked leaves");
        if let Ok(again) = timeout(POLL, poll_fn(|cx| inbox.poll_next(cx, 8))).await {
            settle(again.expect("not ended").expect("a delivery"), Disposition::Ack).await;
        }
    }
}

async fn subscribed_again(nats: &Nats, spec: &QueueSpec) -> Box<dyn Subscription> {
    let begin = Instant::now();
    loop {
        match nats.subscribe(spec).await {
            Ok(inbox) => return inbox,
            Err(error) => assert!(!error.is_final() && begin.elapsed() < PATIENCE, "{error:?}"),
        }
        sleep(POLL).await;
    }
}

#[tokio::test]
async fn a_frozen_server_is_noticed_by_its_silence() {
    let server = Server::start("").await;
    let (nats, spec) = (Nats::connect(&server.url()).await.expect("connects"), queue("frozen"));
    nats.prepare(&spec).await.expect("prepared");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    stays_quiet(&mut inbox).await;
    server.freeze().await;
    let begin = Instant::now();
    let error = end(&mut inbox).await;
    assert_eq!(error.kind(), BrokerErrorKind::Unreachable);
    // Two requests are over first, of a second and a half each, and then it may be silent for 10 s.
    assert!(begin.elapsed() < Duration::from_secs(18), "{:?}", begin.elapsed());
    server.signal("CONT");
}

#[tokio::test]
async fn a_quiet_server_is_not_taken_for_dead() {
    let (_nats, spec, mut inbox, js) = ready("quiet").await;
    // Three heartbeats go by.
    let nothing = timeout(Duration::from_secs(16), poll_fn(|cx| inbox.poll_next(cx, 1))).await;
    assert!(nothing.is_err(), "{nothing:?}");
    send(&js, &spec.name, "x").await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
}

/// As a server of 2.9 does not, when a message comes in the moment in which a request ends.
#[tokio::test]
async fn a_request_of_whose_end_nobody_tells_is_over_all_the_same() {
    let spec = queue("untold");
    let untold = between(|said| swap(said, b" 408 ", b" 100 ")).await;
    let nats = Nats::connect(&untold).await.expect("connects");
    nats.prepare(&spec).await.expect("prepared");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    let js = stranger().await;
    for body in ["x", "y"] {
        // Longer than the request for few places and the one for many take, and what is granted to the word of their end.
        let quiet = timeout(Duration::from_secs(2), poll_fn(|cx| inbox.poll_next(cx, 64))).await;
        assert!(quiet.is_err(), "nothing is sent, yet: {quiet:?}");
        let begin = Instant::now();
        send(&js, &spec.name, body).await;
        settle(next(&mut inbox).await, Disposition::Ack).await;
        assert!(begin.elapsed() < PROMPT, "{:?} is late", begin.elapsed());
    }
}

#[tokio::test]
async fn after_close_the_same_broker_can_be_used_again() {
    let (nats, spec, inbox, js) = ready("closed").await;
    inbox.close().await;
    nats.close().await;
    nats.close().await;
    let mut inbox = nats.subscribe(&spec).await.expect("a new connection");
    send(&js, &spec.name, "x").await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
    nats.close().await;
    assert!(!end(&mut inbox).await.is_final(), "a subscription ends with its connection");
    until("close sends the acks", || async { stored(&js, &spec.name).await == 0 }).await;
}

// ---------------------------------------------------------------- topology

#[tokio::test]
async fn what_is_missing_is_refused_by_name_with_the_fix() {
    let (nats, js, mut spec) = (nats().await, stranger().await, queue("missing"));
    spec.declare = Declare::Check;
    let text = refusal(nats.prepare(&spec).await);
    assert!(
        text.contains(&format!("the stream `{}` is missing", spec.name)) && text.contains("nats stream add"),
        "{text}"
    );

    let config = stream::Config { name: spec.name.clone(), ..stream::Config::default() };
    js.create_stream(config).await.expect("created");
    let text = refusal(nats.prepare(&spec).await);
    assert!(
        text.contains(&format!("the durable `{}`", spec.name)) && text.contains("nats consumer add"),
        "{text}"
    );

    let mut create = spec.clone();
    (create.declare, create.dead_letter) = (Declare::Create, None);
    nats.prepare(&create).await.expect("prepared");
    let text = refusal(nats.prepare(&spec).await);
    assert!(text.contains(dead(&spec).name()) && text.contains("nats stream add"), "{text}");
    spec.allow_missing_dead_letter = true;
    nats.prepare(&spec).await.expect("allowed to be missing");
}

/// Prepares a queue whose durable is made by a stranger, otherwise as we would.
async fn prepare_with(
    name: &str,
    declare: Declare,
    change: impl FnOnce(&mut consumer::Config),
) -> Result<(), BrokerError> {
    let (nats, js, mut spec) = (nats().await, stranger().await, queue(name));
    let subjects = vec![spec.name.clone(), format!("{}.other", spec.name)];
    let config = stream::Config { name: spec.name.clone(), subjects, ..stream::Config::default() };
    js.create_stream(config).await.expect("created");
    let mut durable = consumer::Config {
        durable_name: Some(spec.name.clone()),
        filter_subject: spec.name.clone(),
        ack_wait: LONG,
        max_deliver: -1,
        ..consumer::Config::default()
    };
    change(&mut durable);
    // The client's own types refuse to mix push and pull.
    let body = serde_json::json!({"stream_name": spec.name, "config": durable});
    let subject = format!("CONSUMER.DURABLE.CREATE.{}.{0}", spec.name);
    let made: serde_json::Value = js.request(subject, &body).await.expect("asked");
    assert!(made.get("error").is_none(), "{made}");
    spec.declare = declare;
    nats.prepare(&spec).await
}

#[tokio::test]
async fn a_durable_made_by_somebody_else_is_taken_if_it_will_do() {
    for declare in [Declare::Check, Declare::Create] {
        let taken = prepare_with("will-do", declare, |_| {}).await;
        match declare {
            Declare::Create => taken.expect("taken"),
            Declare::Check => {
                assert!(refusal(taken).contains("dead"), "only the dead-letter stream is missing");
            }
        }
    }
}

#[tokio::test]
async fn a_durable_that_would_break_a_promise_is_refused_with_the_reason() {
    type Change = fn(&mut consumer::Config);
    let wrong: [(&str, &str, Change); 8] = [
        ("max-deliver", "max_deliver is 5, must be -1: waits and drains spend", |c| c.max_deliver = 5),
        ("push", "push consumer", |c| c.deliver_subject = Some("somewhere".into())),
        ("ack-all", "ack policy is not explicit", |c| c.ack_policy = consumer::AckPolicy::All),
        ("ack-none", "ack policy is not explicit", |c| {
            (c.ack_policy, c.ack_wait, c.max_deliver) = (consumer::AckPolicy::None, Duration::ZERO, 0);
        }),
        ("filter", "filters by nothing", |c| c.filter_subject = String::new()),
        ("ack-wait", "ack_wait is 7s, not 60s", |c| c.ack_wait = Duration::from_secs(7)),
        ("pending", "max_ack_pending is 3, less than the prefetch of 8", |c| c.max_ack_pending = 3),
        ("headers", "headers only", |c| c.headers_only = true),
    ];
    for (name, reason, change) in wrong {
        for declare in [Declare::Check, Declare::Create] {
            let answer = prepare_with(name, declare, change).await;
            let text = refusal(answer);
            assert!(text.contains(reason) && text.contains("nats consumer edit"), "{name}: {text}");
        }
    }
}

#[tokio::test]
async fn a_short_ack_wait_is_refused_by_the_heartbeat() {
    let (nats, mut spec) = (nats().await, queue("heartbeat"));
    spec.nats = NatsOptions::new();
    spec.heartbeat = Duration::from_secs(2);
    nats.prepare(&spec).await.expect("three heartbeats");
    spec.heartbeat = Duration::from_secs(3);
    nats.prepare(&spec).await.expect("two heartbeats will do");
    spec.heartbeat = Duration::from_millis(3001);
    let text = refusal(nats.prepare(&spec).await);
    assert!(text.contains("6s, at least 6.002s are needed"), "{text}");
}

#[tokio::test]
async fn a_subject_that_the_stream_does_not_keep_is_refused() {
    let (nats, js, mut spec) = (nats().await, stranger().await, queue("subject"));
    nats.prepare(&spec).await.expect("prepared");
    let stream = spec.name.clone();
    spec.nats = NatsOptions::new().stream(&stream).subject("something.else");
    let text = refusal(nats.prepare(&spec).await);
    assert!(text.contains("does not keep the subject `something.else`"), "{text}");

    let mut other = queue("other-stream");
    other.nats = NatsOptions::new().subject(&stream);
    let text = refusal(nats.prepare(&other).await);
    assert!(text.contains(&format!("kept by the stream `{stream}` already")), "{text}");

    let wide = unique("wide");
    let config = stream::Config {
        name: wide.clone(),
        subjects: vec![format!("{wide}.*")],
        ..stream::Config::default()
    };
    js.create_stream(config).await.expect("created");
    let mut narrow = queue("narrow");
    narrow.nats = NatsOptions::new().stream(&wide).subject(format!("{wide}.one"));
    nats.prepare(&narrow).await.expect("prepared");
    let mut inbox = nats.subscribe(&narrow).await.expect("subscribed");
    send(&js, &format!("{wide}.two"), "not for us").await;
    send(&js, &format!("{wide}.one"), "for us").await;
    let delivery = next(&mut inbox).await;
    assert_eq!(delivery.message().payload(), "for us");
    assert_eq!(nats.default_scope(&narrow), format!("nats:{wide}/{}", narrow.name));
    settle(delivery, Disposition::Ack).await;
    stays_quiet(&mut inbox).await;
}

#[tokio::test]
async fn dead_letters_that_would_come_back_or_vanish_are_refused() {
    let (nats, js, mut spec) = (nats().await, stranger().await, queue("dead-letters"));
    spec.dead_letter = Some(spec.name.clone().into());
    assert!(refusal(nats.prepare(&spec).await).contains("would come back to the queue"));
    let vanishing = unique("vanishing");
    let config = stream::Config {
        name: vanishing.clone(),
        retention: stream::RetentionPolicy::Interest,
        ..stream::Config::default()
    };
    js.create_stream(config).await.expect("created");
    spec.dead_letter = Some(vanishing.clone().into());
    let text = refusal(nats.prepare(&spec).await);
    assert!(text.contains(&vanishing) && text.contains("interest"), "{text}");
}

// ---------------------------------------------------------------- connections

#[tokio::test]
async fn a_server_that_is_not_there_is_reported_at_once() {
    let begin = Instant::now();
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("an address");
    let error = Nats::connect(&format!("nats://ann:secret@{free}")).await.expect_err("nobody is there");
    assert_eq!(error.kind(), BrokerErrorKind::Unreachable);
    assert!(
        error.to_string().contains(&free.to_string()) && !format!("{error:?}").contains("secret"),
        "{error:?}"
    );
    // Accepts, and says nothing.
    let mute = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("nats://{}", mute.local_addr().expect("an address"));
    let limit = Duration::from_millis(300);
    let error = Nats::options().connect_timeout(limit).connect(&url).await.expect_err("it does not answer");
    assert_eq!(error.kind(), BrokerErrorKind::Unreachable);
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_server_without_jetstream_says_so() {
    let url = env("GUESTLIST_NATS_URL");
    let server = Server::start("accounts: { A: { users: [ { user: a, password: a } ] } }\n").await;
    let nats = Nats::connect(&server.url().replace("://", "://a:a@")).await.expect("connects");
    let error = nats.prepare(&queue("no-jetstream")).await.expect_err("no JetStream");
    assert!(format!("{error:?}").contains("not enabled"), "{url}: {error:?}");
}

async fn works(nats: Result<Nats, BrokerError>) {
    let nats = nats.expect("connects");
    let spec = queue("login");
    nats.prepare(&spec).await.expect("prepared");
    let text = format!("{nats:?}");
    assert!(text.contains("127.0.0.1") || text.contains("localhost"), "{text}");
    assert!(!text.contains(SECRET), "{text}");
    nats.close().await;
}

fn assert_refused(nats: Result<Nats, BrokerError>) {
    let error = nats.expect_err("wrong credentials");
    assert_eq!(error.kind(), BrokerErrorKind::Refused, "{error:?}");
    assert!(!format!("{error:?}").contains(SECRET), "{error:?}");
}

const SECRET: &str = "s3cr#t";

#[tokio::test]
async fn a_user_logs_in_with_a_password_by_url_or_option() {
    let config = format!("authorization {{ user: ann, password: \"{SECRET}\" }}\n");
    let server = Server::start(&config).await;
    let with = |credentials: &str| server.url().replace("://", &format!("://{credentials}@"));
    works(Nats::connect(&with("ann:s3cr%23t")).await).await;
    works(Nats::options().user_and_password("ann", SECRET).connect(&server.url()).await).await;
    assert_refused(Nats::connect(&with("ann:wrong")).await);
    assert_refused(Nats::connect(&server.url()).await);
}

#[tokio::test]
async fn a_token_logs_in_by_url_or_option() {
    let server = Server::start(&format!("authorization {{ token: \"{SECRET}\" }}\n")).await;
    works(Nats::connect(&server.url().replace("://", "://s3cr%23t@")).await).await;
    works(Nats::options().token(SECRET).connect(&server.url()).await).await;
    assert_refused(Nats::options().token("wrong").connect(&server.url()).await);
}

#[tokio::test]
async fn an_nkey_logs_in_by_its_seed_or_by_a_credentials_file() {
    // A key made for this test.
    const SEED: &str = "SUAHBVGIKDIODQACCXPIDAA2K3VXYGKY2ED2DGH3FY2ZHF2SH4Y6BSCHDE";
    const PUBLIC: &str = "UCQ3PWRPDHRXP5PE3F5SNRFQ6TCDUGLNAWXMK2XUBJREDR6IK2FD7D7L";
    let server = Server::start(&format!("authorization {{ users: [ {{ nkey: {PUBLIC} }} ] }}\n")).await;
    works(Nats::options().nkey_seed(SEED).connect(&server.url()).await).await;
    assert_refused(Nats::options().nkey_seed("SUwrong").connect(&server.url()).await);
    assert_refused(Nats::connect(&server.url()).await);
    let missing = Nats::options().credentials_file("/no/such.creds").connect(&server.url()).await;
    assert!(refusal(missing).contains("/no/such.creds"));
}

#[tokio::test]
async fn tls_needs_a_trusted_certificate_and_shows_its_own() {
    let tls = PathBuf::from(env("GUESTLIST_TLS_DIR"));
    let file = |name: &str| tls.join(name).display().to_string();
    let config = format!(
        "tls {{ cert_file: \"{}\", key_file: \"{}\", ca_file: \"{}\", verify: true }}\n",
        file("server.pem"),
        file("server.key"),
        file("ca.pem")
    );
    let server = Server::start(&config).await;
    let url = format!("tls://localhost:{}", server.port);
    let options = || -> NatsOptionsBuilder { Nats::options().ca_file(tls.join("ca.pem")) };
    let certificate = || options().client_certificate(tls.join("client.pem"), tls.join("client.key"));
    works(certificate().connect(&url).await).await;
    works(certificate().connect(&server.url()).await).await;
    let untrusted = Nats::options().client_certificate(tls.join("client.pem"), tls.join("client.key"));
    assert_refused(untrusted.connect(&url).await);
    assert!(options().connect(&url).await.is_err(), "without a certificate of its own");
    let missing = Nats::options().ca_file("/no/such.pem").connect(&url).await;
    assert!(refusal(missing).contains("/no/such.pem"));
    let plain = Server::start("").await;
    let downgraded = options().connect(&plain.url()).await;
    assert!(downgraded.is_err(), "a CA file asks for TLS; a server without it is not good enough");
}

#[tokio::test]
async fn the_permissions_in_the_docs_are_enough() {
    let mut spec = queue("locked");
    spec.nats = spec.nats.long_delay(Duration::from_millis(100));
    let (name, dead_name) = (spec.name.clone(), dead(&spec).name().to_owned());
    let own = format!("guestlist-{name}-{name}-{}", name.len());
    let allowed = |create: &str| {
        format!(
            "publish: [ \"$JS.API.STREAM.INFO.{name}\", \"$JS.API.CONSUMER.INFO.{name}.{name}\", \
             \"$JS.API.CONSUMER.MSG.NEXT.{name}.{name}\", \"$JS.ACK.{name}.{name}.>\", \"{dead_name}\", \
             \"$JS.API.STREAM.NAMES\", \"$JS.API.STREAM.INFO.{dead_name}\", \"$JS.API.STREAM.MSG.GET.{dead_name}\", \
             \"$JS.API.STREAM.INFO.{own}\", \"$JS.API.CONSUMER.INFO.{own}.{name}\", \"$JS.API.CONSUMER.MSG.NEXT.{own}.{name}\", \
             \"$JS.ACK.{own}.{name}.>\", \"$JS.API.STREAM.MSG.GET.{own}\", \"guestlist.again.{name}.{name}\", \
             \"guestlist.hold.{name}.{name}.*\", \"$JS.API.STREAM.MSG.DELETE.{dead_name}\" {create} ], \
             subscribe: [ \"_MINE.>\" ]"
        )
    };
    let create = format!(
        ", \"$JS.API.STREAM.CREATE.{name}\", \"$JS.API.CONSUMER.CREATE.{name}.{name}.>\", \"$JS.API.STREAM.CREATE.{dead_name}\", \
         \"$JS.API.STREAM.CREATE.{own}\", \"$JS.API.STREAM.UPDATE.{own}\", \"$JS.API.CONSUMER.CREATE.{own}.{name}.>\""
    );
    let users = format!(
        "authorization {{ users: [ {{ user: maker, password: x, permissions: {{ {} }} }}, \
         {{ user: user, password: x, permissions: {{ {} }} }}, {{ user: admin, password: x }} ] }}\n",
        allowed(&create),
        allowed("")
    );
    let server = Server::start(&users).await;
    let login = |user: &str| {
        let url = server.url().replace("://", &format!("://{user}:x@"));
        async move { Nats::options().inbox_prefix("_MINE").connect(&url).await.expect("connects") }
    };
    login("maker").await.prepare(&spec).await.expect("it makes what is missing");
    let (nats, mut check) = (login("user").await, spec.clone());
    check.declare = Declare::Check;
    nats.prepare(&check).await.expect("it checks");
    let mut inbox = nats.subscribe(&check).await.expect("subscribed");
    let admin = guestlist::broker::nats::async_nats::ConnectOptions::with_user_and_password(
        "admin".into(),
        "x".into(),
    );
    let js = jetstream::new(admin.connect(server.url()).await.expect("connects"));
    send(&js, &name, "x").await;
    let delivery = next(&mut inbox).await;
    for _ in 0..2 {
        park(&nats, &dead(&spec), delivery.message()).await.expect("parked, also as a duplicate");
    }
    settle(delivery, Disposition::Requeue { after: Duration::from_millis(500) }).await;
    until("the copy and the ack are permitted", || async { stored(&js, &name).await == 0 }).await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
    until("the copy's ack is permitted", || async { stored(&js, &own).await == 0 }).await;
    let facts = nats.facts(&check).await.expect("what is checked may be asked for");
    assert!(facts.ack_wait.is_some() && facts.max_ack_pending.is_some(), "{facts:?}");
    let mut walk = nats.letters(&dead(&spec)).await.expect("a walk is permitted");
    let letter = walk.next().await.expect("permitted").expect("the letter");
    walk.remove(letter.place).await.expect("a removal is permitted");
    assert_eq!(stored(&js, dead(&spec).name()).await, 0);

    let short = Duration::from_millis(300);
    let url = server.url().replace("://", "://user:x@");
    let nats =
        Nats::options().inbox_prefix("_MINE").confirm_timeout(short).connect(&url).await.expect("connects");
    let mut unknown = queue("not-permitted");
    unknown.declare = Declare::Check;
    let error = nats.prepare(&unknown).await.expect_err("not permitted");
    assert_eq!(error.kind(), BrokerErrorKind::Unreachable);
    let missing = format!("may not publish to `$JS.API.STREAM.INFO.{}`", unknown.name);
    assert!(error.to_string().contains(&missing), "{error}");
}

/// A server that refuses a question says nothing to it, so what is missing must be told by what was asked.
#[tokio::test]
async fn a_missing_permission_is_named() {
    let mut spec = queue("lacking");
    let (name, dead_name) = (spec.name.clone(), dead(&spec).name().to_owned());
    let needed = [
        format!("$JS.API.STREAM.INFO.{name}"),
        format!("$JS.API.CONSUMER.INFO.{name}.{name}"),
        "$JS.API.STREAM.NAMES".to_owned(),
        format!("$JS.API.STREAM.INFO.{dead_name}"),
    ];
    let without = |lacking: usize| {
        format!(
            "{{ user: user{lacking}, password: x, permissions: {{ publish: {{ allow: \">\", deny: \"{}\" }}, subscribe: \">\" }} }}",
            needed[lacking]
        )
    };
    let users: Vec<_> = (0..needed.len()).map(without).collect();
    let admin = "{ user: admin, password: x }".to_owned();
    let server =
        Server::start(&format!("authorization {{ users: [ {}, {admin} ] }}\n", users.join(", "))).await;
    let login = |user: String| {
        let url = server.url().replace("://", &format!("://{user}:x@"));
        let options = Nats::options().confirm_timeout(Duration::from_secs(3));
        async move { options.connect(&url).await.expect("connects") }
    };
    login("admin".into()).await.prepare(&spec).await.expect("made");
    spec.declare = Declare::Check;
    let tried = (0..needed.len()).map(|number| {
        let (nats, spec) = (login(format!("user{number}")), &spec);
        async move { nats.await.prepare(spec).await.expect_err("not permitted") }
    });
    for (lacking, error) in needed.iter().zip(join_all(tried).await) {
        assert!(error.to_string().contains(&format!("`{lacking}`")), "{lacking}: {error}");
    }
}

/// Native dead-lettering: nothing is copied, the server says who was ended, and forgets the message.
#[tokio::test]
async fn a_rejected_message_is_gone_from_a_work_queue_and_an_advisory_says_so() {
    let (nats, js, mut spec) = (nats().await, stranger().await, queue("rejected"));
    spec.dead_letter = None;
    nats.prepare(&spec).await.expect("prepared");
    let advisory = format!("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{0}.{0}", spec.name);
    let mut advisories = js.client().subscribe(advisory).await.expect("subscribed");
    js.client().flush().await.expect("the subscription is at the server");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    send(&js, &spec.name, "x").await;
    settle(next(&mut inbox).await, Disposition::Reject).await;
    let told = tokio::time::timeout(PATIENCE, advisories.next()).await.expect("an advisory").expect("one");
    let told: serde_json::Value = serde_json::from_slice(&told.payload).expect("JSON");
    assert_eq!((&told["stream_seq"], &told["consumer_seq"]), (&1.into(), &1.into()), "a number, and no body");
    until("it is gone", || async { stored(&js, &spec.name).await == 0 }).await;
    stays_quiet(&mut inbox).await;
}

// ---------------------------------------------------------------- core NATS

#[tokio::test]
async fn core_nats_delivers_and_dead_letters_and_says_what_it_loses() {
    let (nats, js, mut spec) = (nats().await, stranger().await, queue("core"));
    spec.nats = NatsOptions::new().core();
    nats.prepare(&spec).await.expect("prepared");
    assert!(js.get_stream(&spec.name).await.is_err(), "no stream is made");
    assert_eq!(nats.default_scope(&spec), format!("nats-core:{0}/{0}", spec.name));
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    let mut other = nats.subscribe(&spec).await.expect("subscribed");
    // The subscriptions are at the server once it has answered.
    nats.prepare(&spec).await.expect("prepared");
    let client = js.client();
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", "a");
    for _ in 0..6 {
        client.publish_with_headers(spec.name.clone(), headers.clone(), "x".into()).await.expect("published");
    }
    let mut arrived = Vec::new();
    until("each message arrives at one of the two", || {
        for inbox in [&mut inbox, &mut other] {
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            while let std::task::Poll::Ready(Some(Ok(delivery))) = inbox.poll_next(&mut cx, 1) {
                arrived.push(delivery);
            }
        }
        std::future::ready(arrived.len() == 6)
    })
    .await;
    stays_quiet(&mut inbox).await;
    stays_quiet(&mut other).await;

    let message = arrived[0].message().clone();
    assert_eq!(message.id().expect("an id").as_bytes(), b"a");
    assert_eq!(
        (message.source().routing_key.as_str(), message.source().sequence),
        (spec.name.as_str(), None)
    );
    park(&nats, &dead(&spec), &message).await.expect("parked");
    assert_eq!(letters(dead(&spec).name()).await[0].payload(), "x");

    let after = Duration::from_secs(1);
    for disposition in [Disposition::Ack, Disposition::Reject, Disposition::Abandon] {
        settle(arrived.remove(0), disposition).await;
    }
    for disposition in [Disposition::Requeue { after }, Disposition::Release { after }] {
        let answer = arrived.remove(0).into_parts().1.settle(disposition).await;
        assert!(refusal(answer).contains("the message is lost"));
    }
    inbox.cancel().await;
    assert!(poll(&mut inbox, 1).await.is_none());
    inbox.close().await;
    other.close().await;
}

#[tokio::test]
async fn core_nats_notices_a_lost_connection() {
    let mut server = Server::start("").await;
    let nats = Nats::connect(&server.url()).await.expect("connects");
    let mut spec = queue("core-lost");
    (spec.nats, spec.dead_letter) = (NatsOptions::new().core(), None);
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    server.kill();
    assert_eq!(end(&mut inbox).await.kind(), BrokerErrorKind::Unreachable);
    server.restart().await;
    subscribed_again(&nats, &spec).await.close().await;
}
