//! F9, F10, F11: a process that is killed by SIGKILL between two steps of a failure, and the one after it.
//!
//! The steps that the process takes in its store are caught by a store that kills its own process there. The step
//! between a confirmed hold copy and the ack is within the crate's own broker, so the wire is watched: the parent carries the
//! process's frames to RabbitMQ, and kills it when it says its first ack, which RabbitMQ then never hears.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use guestlist::broker::{
    Broker, BrokerError, Copy, Destination, Features, HoldSteps, QueueSpec, Subscription, copy,
};
use guestlist::dedup::protocol::{Ask, Claim, Held, Record, Release, Run};
use guestlist::dedup::{DedupStore, DurableStore, StoreError, StoreFeatures};
use guestlist::testing::Checker;
use guestlist::testing::checker::{Log, LogWriter, Marker, Report, What};
use guestlist::{
    Attempt, Backoff, BoxFuture, Consumer, DedupKey, EventKind, Failure, Handled, Message, Outcome, Queue,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use super::child::{append, parent_is_done};
use super::{Folder, LEASE, PATIENCE, SCOPE, env, until};
use crate::support::ground::{Ground, Kind, Sent, dead};

const JOB: &str = "GUESTLIST_TEST_STEP";
const ID: &str = "order-1";
const ACK_WAIT: Duration = Duration::from_secs(3);
const SHORT: Duration = Duration::from_millis(200);
/// Longer than the broker takes to deliver again what a killed process had in hand.
const LONG: Duration = Duration::from_secs(4);

/// Where a process kills itself: before or after the store is told how a claim ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Step {
    BeforeFailed,
    AfterFailed,
    BeforeDeadLettered,
    AfterDeadLettered,
}

/// What a process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Job {
    name: String,
    broker: String,
    queue: String,
    folder: PathBuf,
    die_at: Option<Step>,
    /// How many attempts fail, unless it was redriven.
    fails: u32,
    attempts: u32,
    backoff: Duration,
}

/// One run of the handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    generation: u32,
    attempt: u32,
    /// Since 1970.
    began: Duration,
}

impl Job {
    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn runs(&self) -> Vec<Entry> {
        let text = std::fs::read_to_string(self.file("runs")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn attempts(&self) -> Vec<u32> {
        self.runs().iter().map(|run| run.attempt).collect()
    }

    /// The ids of the dead letters that were confirmed, in order.
    fn letters(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.file("letters")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn spawn(&self) -> Child {
        let out = append(self.file(&format!("{}.out", self.name)));
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kills::steps::work", "--ignored", "--nocapture", "--test-threads=1"])
            .env(JOB, serde_json::to_string(self).unwrap())
            .stdin(Stdio::piped())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap()
    }

    fn queue(&self, store: DurableStore, log: &LogWriter) -> Queue {
        Queue::new(&self.queue)
            .dead_letter(dead(&self.queue))
            .store(Doomed { inner: store, at: self.die_at })
            .scope(SCOPE)
            .lease(LEASE)
            .max_attempts(self.attempts)
            .backoff(Backoff::new(self.backoff, 1, self.backoff).without_jitter())
            .observer(log.observer())
            .handler(self.handler())
    }

    fn handler(&self) -> impl Fn(Message, Attempt) -> BoxFuture<Handled> + Clone + use<> {
        let (runs, fails) = (Arc::new(append(self.file("runs"))), self.fails);
        move |message: Message, Attempt(attempt): Attempt| {
            let generation = message.generation();
            let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            line(&runs, &serde_json::to_string(&Entry { generation, attempt, began }).unwrap());
            let fails = generation == 0 && attempt <= fails;
            let answer = if fails { Err(Failure::transient("not yet")) } else { Ok(()) };
            Box::pin(std::future::ready(answer))
        }
    }
}

/// In one write.
fn line(mut to: &File, text: &str) {
    to.write_all(format!("{text}\n").as_bytes()).unwrap();
}

/// SIGKILL: nothing that comes after this happens.
fn die() -> ! {
    let _ = Command::new("kill").args(["-KILL", &std::process::id().to_string()]).status();
    panic!("there is no `kill`");
}

/// A store that kills its own process at one step.
#[derive(Debug)]
struct Doomed {
    inner: DurableStore,
    at: Option<Step>,
}

#[async_trait]
impl DedupStore for Doomed {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        self.inner.claim(key, ask).await
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.inner.renew(key, run, lease).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.inner.complete(key, run, window).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        let (before, after) = match why {
            Release::Failed { .. } => (Step::BeforeFailed, Step::AfterFailed),
            Release::DeadLettered => (Step::BeforeDeadLettered, Step::AfterDeadLettered),
            _ => return self.inner.release(key, run, why).await,
        };
        if self.at == Some(before) {
            die();
        }
        let answer = self.inner.release(key, run, why).await;
        if self.at == Some(after) {
            die();
        }
        answer
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        self.inner.inspect(key).await
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        self.inner.forget(key).await
    }

    fn features(&self) -> StoreFeatures {
        self.inner.features()
    }
}

/// Passes everything on, and writes down the ids of the dead letters that were confirmed.
#[derive(Debug)]
struct Spy {
    inner: Arc<dyn Broker>,
    letters: File,
}

#[async_trait]
impl Broker for Spy {
    fn system(&self) -> &'static str {
        self.inner.system()
    }

    fn features(&self) -> Features {
        self.inner.features()
    }

    fn default_scope(&self, queue: &QueueSpec) -> String {
        self.inner.default_scope(queue)
    }

    fn hold_steps<'a>(&self, queue: &'a QueueSpec) -> Option<&'a HoldSteps> {
        self.inner.hold_steps(queue)
    }

    async fn prepare(&self, queue: &QueueSpec) -> Result<(), BrokerError> {
        self.inner.prepare(queue).await
    }

    async fn subscribe(&self, queue: &QueueSpec) -> Result<Box<dyn Subscription>, BrokerError> {
        self.inner.subscribe(queue).await
    }

    async fn publish(&self, to: &Destination, copy: &Copy<'_>) -> Result<(), BrokerError> {
        self.inner.publish(to, copy).await?;
        line(&self.letters, copy.id());
        Ok(())
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

/// Works until it kills itself, is killed, or is told to stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn work() {
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_ansi(false).init();
    let job: Job = serde_json::from_str(&env(JOB)).unwrap();
    let log = LogWriter::append(job.file(&format!("{}.jsonl", job.name)), job.name.as_str()).unwrap();
    let store = DurableStore::open(job.file("store")).await.unwrap();
    let broker = guestlist::broker::connect(&job.broker).await.unwrap();
    let broker = Spy { inner: broker, letters: append(job.file("letters")) };
    let consumer = Consumer::new(broker).drain(Duration::from_secs(10)).queue(job.queue(store, &log));
    let parent = parent_is_done();
    consumer.run_until(async { parent.await.unwrap() }).await.unwrap();
    assert!(log.failed().is_none(), "the log has a hole");
}

/// Two processes, one after the other.
struct Scene {
    ground: Ground,
    job: Job,
    log: LogWriter,
    _folder: Folder,
}

impl Scene {
    /// One message; its first attempts fail.
    async fn new(kind: Kind, fails: u32, attempts: u32, backoff: Duration) -> Self {
        let (ground, folder) = (Ground::with_ack_wait(kind, "steps", ACK_WAIT).await, Folder::new());
        ground.send(Sent::new(ID, "{}")).await;
        let job = Job {
            name: "first".to_owned(),
            broker: ground.url(),
            queue: ground.name.clone(),
            folder: folder.0.clone(),
            die_at: None,
            fails,
            attempts,
            backoff,
        };
        let log = LogWriter::append(job.file("parent.jsonl"), "parent").unwrap();
        Self { ground, job, log, _folder: folder }
    }

    /// The first process kills itself there.
    async fn dies_at(&self, step: Step) {
        let job = Job { die_at: Some(step), ..self.job.clone() };
        let mut child = Kept(job.spawn());
        child.ends("the first process dies").await;
        self.is_killed(&mut child);
    }

    /// The first process is killed when RabbitMQ is about to hear its first ack.
    async fn dies_at_its_ack(&self) {
        let wire = Wire::to(&self.job.broker).await;
        let job = Job { broker: wire.url(&self.job.broker), ..self.job.clone() };
        let mut child = Kept(job.spawn());
        let acks = tokio::time::timeout(PATIENCE, wire.acks.notified());
        acks.await.unwrap_or_else(|_| panic!("no ack: {}", self.said("first")));
        child.0.kill().unwrap();
        child.0.wait().unwrap();
        self.is_killed(&mut child);
    }

    fn is_killed(&self, child: &mut Kept) {
        let status = child.0.try_wait().unwrap().unwrap();
        assert_eq!(status.signal(), Some(9), "{}", self.said("first"));
        self.log.mark_of("first", Marker::ProcessKilled);
    }

    /// Another process works until this holds and nothing is left.
    async fn another_carries_on(&self, until_holds: impl Fn(&Job) -> bool) {
        let job = Job { name: "second".to_owned(), ..self.job.clone() };
        // What RabbitMQ's consumers have in hand is not counted: it shows when they have stopped.
        for _ in 0..5 {
            let mut child = Kept(job.spawn());
            until("the second process has done its work", || async {
                until_holds(&job) && self.nothing_is_left().await
            })
            .await;
            assert!(child.0.try_wait().unwrap().is_none(), "it ended: {}", self.said("second"));
            drop(child.0.stdin.take());
            child.ends("the second process stops").await;
            assert!(child.0.wait().unwrap().success(), "{}", self.said("second"));
            if self.nothing_is_left().await {
                return;
            }
        }
        panic!("the queue is not drained: {}", self.said("second"));
    }

    async fn nothing_is_left(&self) -> bool {
        self.ground.left().await == 0 && self.ground.held(&[self.job.backoff]).await == 0
    }

    fn said(&self, name: &str) -> String {
        std::fs::read_to_string(self.job.file(&format!("{name}.out"))).unwrap_or_default()
    }

    fn log(&self) -> Log {
        let names = ["first", "second", "parent"];
        Log::merge(names.map(|name| Log::read(self.job.file(&format!("{name}.jsonl"))).unwrap()))
    }

    fn acked(&self, outcome: Outcome) -> usize {
        let files = ["first.jsonl", "second.jsonl"].map(|name| self.job.file(name));
        files.iter().flat_map(|file| acks_in(file)).filter(|acked| *acked == outcome).count()
    }

    /// The logs of all keep the promises.
    fn judge(&self) -> Report {
        let checker =
            Checker::new().lease(LEASE).max_attempts(Some(self.job.attempts)).store_of_one_process();
        let report = checker.check(&self.log());
        println!("{:?}: {report}", self.ground.kind);
        report.assert_clean();
        report
    }
}

/// What the deliveries in this log were acked for; none if the process has not begun.
fn acks_in(log: &Path) -> Vec<Outcome> {
    let Ok(log) = Log::read(log) else { return Vec::new() };
    let outcome = |what: &What| match what {
        What::Step(step) => Some(step.kind),
        _ => None,
    };
    let steps = log.entries().iter().filter_map(|entry| outcome(&entry.what));
    let acked = |step| if let EventKind::Acked(outcome) = step { Some(outcome) } else { None };
    steps.filter_map(acked).collect()
}

/// A process that does not outlive its test.
struct Kept(Child);

impl Kept {
    async fn ends(&mut self, what: &str) {
        until(what, || std::future::ready(self.0.try_wait().unwrap().is_some())).await;
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Carries a process's frames to RabbitMQ, all but its acks.
struct Wire {
    port: u16,
    /// It has said its first ack.
    acks: Arc<Notify>,
}

impl Wire {
    async fn to(url: &str) -> Self {
        let url = url::Url::parse(url).unwrap();
        let broker = (url.host_str().unwrap().to_owned(), url.port().unwrap());
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (port, acks) = (listener.local_addr().unwrap().port(), Arc::new(Notify::new()));
        let told = Arc::clone(&acks);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let broker = TcpStream::connect((broker.0.as_str(), broker.1)).await.unwrap();
                tokio::spawn(carry(client, broker, Arc::clone(&told)));
            }
        });
        Self { port, acks }
    }

    fn url(&self, url: &str) -> String {
        let mut through = url::Url::parse(url).unwrap();
        through.set_port(Some(self.port)).unwrap();
        through.to_string()
    }
}

async fn carry(client: TcpStream, broker: TcpStream, acks: Arc<Notify>) {
    let (from_client, mut to_client) = client.into_split();
    let (mut from_broker, to_broker) = broker.into_split();
    tokio::select! {
        _ = tokio::io::copy(&mut from_broker, &mut to_client) => {}
        _ = frames(from_client, to_broker, &acks) => {}
    }
}

/// Frame by frame, up to the first ack.
async fn frames(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, acks: &Notify) -> std::io::Result<()> {
    const BASIC_ACK: [u8; 4] = [0, 60, 0, 80];
    let mut greeting = [0; 8];
    from.read_exact(&mut greeting).await?;
    to.write_all(&greeting).await?;
    loop {
        let mut frame = vec![0; 7];
        from.read_exact(&mut frame).await?;
        let size = u32::from_be_bytes(frame[3..7].try_into().unwrap());
        // And the byte that ends a frame.
        frame.resize(7 + usize::try_from(size).unwrap() + 1, 0);
        from.read_exact(&mut frame[7..]).await?;
        if frame[0] == 1 && frame[7..].starts_with(&BASIC_ACK) {
            acks.notify_one();
            // Swallowed, with all that comes after it, until the process is gone.
            return tokio::io::copy(&mut from, &mut tokio::io::sink()).await.map(drop);
        }
        to.write_all(&frame).await?;
    }
}

/// Over all three brokers at once.
async fn over_all(case: impl AsyncFn(Kind)) {
    tokio::join!(
        Box::pin(case(Kind::Classic)),
        Box::pin(case(Kind::Quorum)),
        Box::pin(case(Kind::JetStream))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f9_killed_after_the_handler_failed_and_before_the_release_it_runs_again_as_the_next_attempt() {
    over_all(async |kind| {
        let scene = Scene::new(kind, 1, 5, SHORT).await;
        scene.dies_at(Step::BeforeFailed).await;
        assert_eq!(scene.job.attempts(), [1], "{kind:?}");
        scene.another_carries_on(|job| job.runs().len() == 2).await;
        assert_eq!(scene.job.attempts(), [1, 2], "{kind:?}: counted once");
        assert_eq!((scene.acked(Outcome::Handled), scene.ground.letters_count().await), (1, 0), "{kind:?}");
        scene.judge();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f9_killed_after_the_release_and_before_the_broker_is_told_attempt_and_backoff_hold() {
    over_all(async |kind| {
        let scene = Scene::new(kind, 1, 5, LONG).await;
        scene.dies_at(Step::AfterFailed).await;
        assert_eq!(scene.ground.held(&[LONG]).await, 0, "{kind:?}: the copy was not made yet");
        scene.another_carries_on(|job| job.runs().len() == 2).await;
        assert_eq!(scene.job.attempts(), [1, 2], "{kind:?}: counted once");
        let runs = scene.job.runs();
        let waited = runs[1].began.saturating_sub(runs[0].began);
        assert!(waited >= LONG, "{kind:?}: the backoff of {LONG:?} was cut to {waited:?}");
        assert_eq!((scene.acked(Outcome::Handled), scene.ground.letters_count().await), (1, 0), "{kind:?}");
        scene.judge();
    })
    .await;
}

/// JetStream makes no copy: what has told it `-NAK` has told it all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f10_killed_after_the_hold_copy_was_confirmed_and_before_the_ack_one_of_the_two_copies_runs() {
    let case = async |kind| {
        let scene = Scene::new(kind, 1, 5, LONG).await;
        scene.dies_at_its_ack().await;
        // The copy, in its hold queue or back from it, and the original.
        let both = || async { scene.ground.left().await + scene.ground.held(&[LONG]).await == 2 };
        until("there are two copies", both).await;
        let both_ended = |job: &Job| acks_in(&job.file("second.jsonl")).len() == 2;
        scene.another_carries_on(both_ended).await;
        assert_eq!(scene.job.attempts(), [1, 2], "{kind:?}: one run of the two copies");
        assert_eq!((scene.acked(Outcome::Handled), scene.acked(Outcome::Duplicate)), (1, 1), "{kind:?}");
        let runs = scene.job.runs();
        assert!(
            runs[1].began.saturating_sub(runs[0].began) >= LONG,
            "{kind:?}: the original skipped the backoff"
        );
        assert_eq!(scene.ground.letters_count().await, 0, "{kind:?}");
        scene.judge();
    };
    tokio::join!(case(Kind::Classic), case(Kind::Quorum));
}

/// Two letters of one id; neither ran more than it may; each can be redriven, and then it runs.
async fn two_letters_and_a_redrive(scene: &Scene, causes: [&str; 2]) {
    let kind = scene.ground.kind;
    let ids = scene.job.letters();
    assert_eq!((ids.len(), &ids[0]), (2, &ids[1]), "{kind:?}: the second letter has the id of the first");
    assert_eq!(scene.job.attempts(), [1, 2], "{kind:?}: not run beyond max attempts");
    let letters = scene.ground.letters().await;
    let found: Vec<_> = letters.iter().map(|letter| letter.header(copy::CAUSE)).collect();
    assert_eq!(found, causes, "{kind:?}");
    if kind == Kind::JetStream {
        assert!(
            letters.iter().all(|letter| letter.header("Nats-Msg-Id").starts_with(&ids[0])),
            "{letters:?}"
        );
    }
    scene.judge();

    // As an operator sends it back to work by hand.
    let letter = &letters[1];
    let again = Sent::without_id(letter.body.clone());
    let again = again.header(copy::ID, letter.header(copy::ID)).header(copy::GENERATION, "1");
    scene.ground.send(again).await;
    scene.another_carries_on(|job| job.runs().len() == 3).await;
    let run = scene.job.runs()[2];
    assert_eq!((run.generation, run.attempt), (1, 1), "{kind:?}: I4, a redrive runs from attempt 1");
    assert_eq!(scene.acked(Outcome::Handled), 1, "{kind:?}");
    scene.judge();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f11_killed_after_the_dead_letter_was_confirmed_and_before_the_release_it_does_not_run_again() {
    over_all(async |kind| {
        let scene = Scene::new(kind, u32::MAX, 2, SHORT).await;
        scene.dies_at(Step::BeforeDeadLettered).await;
        assert_eq!((scene.job.letters().len(), scene.ground.letters_count().await), (1, 1), "{kind:?}");
        scene.another_carries_on(|job| job.letters().len() == 2).await;
        two_letters_and_a_redrive(&scene, ["exhausted", "crash_suspected"]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f11_killed_after_the_release_as_dead_lettered_and_before_the_ack_it_does_not_run_again() {
    over_all(async |kind| {
        let scene = Scene::new(kind, u32::MAX, 2, SHORT).await;
        scene.dies_at(Step::AfterDeadLettered).await;
        assert_eq!((scene.job.letters().len(), scene.ground.letters_count().await), (1, 1), "{kind:?}");
        scene.another_carries_on(|job| job.letters().len() == 2).await;
        two_letters_and_a_redrive(&scene, ["exhausted", "parked"]).await;
    })
    .await;
}
