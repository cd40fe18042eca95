//! The whole way over real brokers: a stranger publishes, a [`Consumer`] handles.

#[cfg(feature = "amqp")]
mod amqp;
#[cfg(all(feature = "amqp", feature = "nats", feature = "testing"))]
mod bad_input;
#[cfg(all(feature = "amqp", feature = "nats", feature = "testing"))]
mod causes;
#[cfg(feature = "testing")]
mod delays;
#[cfg(feature = "nats")]
mod nats;
mod proxy;
#[cfg(feature = "testing")]
mod records;
#[cfg(all(feature = "amqp", feature = "nats"))]
mod redrive;
#[cfg(all(feature = "amqp", feature = "nats", feature = "testing"))]
mod retries;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use guestlist::prelude::*;
use guestlist::{Error, QueueStatus, State, Status};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// What has not happened after this long will not happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// The messages of the deduplication tests, and how many of them are sent a second time.
const MESSAGES: usize = 1000;
const COPIES: usize = 100;

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run ./scripts/test"))
}

/// A name that no other test and no earlier run used.
fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    format!("e2e-{name}-{now}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Waits for a condition that nothing announces.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let wait = async {
        while !holds().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("it did not become true that {what}"));
}

/// What a handler did: how often it ran and how often it succeeded, for each body.
#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<HashMap<String, (usize, usize)>>>);

impl Ledger {
    fn started(&self, message: &Message) -> String {
        let body = String::from_utf8_lossy(message.payload()).into_owned();
        self.0.lock().unwrap().entry(body.clone()).or_default().0 += 1;
        body
    }

    fn succeeded(&self, body: &str) {
        self.0.lock().unwrap().entry(body.to_owned()).or_default().1 += 1;
    }

    fn runs(&self, body: &str) -> usize {
        self.0.lock().unwrap().get(body).map_or(0, |counts| counts.0)
    }

    fn successes(&self) -> Vec<usize> {
        self.0.lock().unwrap().values().map(|counts| counts.1).collect()
    }
}

/// A consumer in a task.
struct Running {
    status: Status,
    stop: Arc<Notify>,
    task: JoinHandle<Result<(), Error>>,
    queue: String,
}

impl Running {
    async fn start(url: &str, queue: Queue, name: &str) -> Self {
        let consumer = Consumer::connect(url).await.unwrap().drain(Duration::from_secs(10)).queue(queue);
        let (status, stop) = (consumer.status(), Arc::new(Notify::new()));
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(consumer.run_until(async move { stopped.notified().await }));
        Self { status, stop, task, queue: name.to_owned() }
    }

    fn status(&self) -> QueueStatus {
        self.status.queue(&self.queue).unwrap_or_default()
    }

    async fn until(&self, what: &str, holds: impl Fn(&QueueStatus) -> bool) {
        let wait = until(what, || async { holds(&self.status()) || self.task.is_finished() });
        let in_time = timeout(PATIENCE, wait).await.is_ok();
        assert!(in_time && holds(&self.status()), "it did not become true that {what}: {:?}", self.status());
    }

    async fn stop(self) -> QueueStatus {
        self.stop.notify_one();
        timeout(PATIENCE, self.task).await.expect("the consumer did not stop").unwrap().unwrap();
        self.status.queue(&self.queue).unwrap()
    }
}

/// Ids in an order of their own, and then some of them again.
fn shuffled_ids(label: &str) -> (Vec<String>, Vec<String>) {
    let mut ids: Vec<String> = (0..MESSAGES).map(|n| format!("{label}-{n}")).collect();
    // A fixed permutation: 7 and 1000 have no common factor.
    ids = (0..MESSAGES).map(|n| ids[(n * 7) % MESSAGES].clone()).collect();
    let copies = ids.iter().step_by(MESSAGES / COPIES).cloned().collect();
    (ids, copies)
}

fn body(id: &str) -> String {
    format!(r#"{{"id": "{id}"}}"#)
}

/// Runs a producer that is not Rust, and feeds it ids. Returns how many it says it sent.
async fn run_python(script: &str, args: &[&str], ids: &str) -> usize {
    let path = format!("{}/tests/it/end_to_end/producers/{script}", env!("CARGO_MANIFEST_DIR"));
    let mut producer = Command::new(env("GUESTLIST_PYTHON"))
        .arg(path)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = producer.stdin.take().unwrap();
    stdin.write_all(ids.as_bytes()).await.unwrap();
    drop(stdin);
    let output = timeout(PATIENCE, producer.wait_with_output()).await.expect("the producer hangs").unwrap();
    assert!(output.status.success(), "{script} failed");
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// The consumer's side of the deduplication tests: every id handled once, every copy skipped.
async fn handles_each_id_once(running: Running, ledger: &Ledger) {
    let all = (MESSAGES + COPIES) as u64;
    running.until("every delivery arrived", |queue| queue.received >= all).await;
    running.until("every delivery ended", |queue| queue.handled + queue.duplicates >= all).await;
    let queue = running.stop().await;
    assert_eq!((queue.handled, queue.duplicates), (MESSAGES as u64, COPIES as u64), "{queue:?}");
    assert_eq!(queue.unsettled, 0);
    let successes = ledger.successes();
    assert_eq!(successes.len(), MESSAGES);
    assert!(successes.iter().all(|count| *count == 1), "an id was handled twice");
}

fn counting(ledger: &Ledger) -> impl Fn(Message) -> std::future::Ready<Result<(), Failure>> + Clone + use<> {
    let ledger = ledger.clone();
    move |message: Message| {
        let body = ledger.started(&message);
        ledger.succeeded(&body);
        std::future::ready(Ok(()))
    }
}

/// A handler that waits in mid-run, so that something can happen to its connection.
struct Gated {
    ledger: Ledger,
    doors: Arc<Semaphore>,
}

impl Gated {
    fn new() -> Self {
        Self { ledger: Ledger::default(), doors: Arc::new(Semaphore::new(0)) }
    }

    fn handler(&self) -> impl Fn(Message) -> guestlist::BoxFuture<Result<(), Failure>> + Clone + use<> {
        let (ledger, doors) = (self.ledger.clone(), Arc::clone(&self.doors));
        move |message: Message| {
            let (ledger, doors) = (ledger.clone(), Arc::clone(&doors));
            Box::pin(async move {
                let body = ledger.started(&message);
                doors.acquire().await.unwrap().forget();
                ledger.succeeded(&body);
                Ok(())
            })
        }
    }

    /// Lets every handler go on, now and later.
    fn open(&self) {
        self.doors.add_permits(1000);
    }

    fn running(&self) -> usize {
        self.ledger.0.lock().unwrap().len()
    }
}

/// A private broker in a process of its own, that can be killed and started again with its data.
struct Private {
    kind: &'static str,
    child: Child,
    port: String,
    folder: PathBuf,
}

impl Private {
    /// `rabbitmq` or `nats`, of the generation under test.
    async fn start(kind: &'static str) -> Self {
        let port =
            Command::new(format!("{}/brokers", env("GUESTLIST_SCRIPTS"))).arg("port").output().await.unwrap();
        let port = String::from_utf8(port.stdout).unwrap().trim().to_owned();
        let folder = std::env::temp_dir().join(unique(kind));
        std::fs::create_dir_all(&folder).unwrap();
        let private = Self { kind, child: spawn_broker(kind, &port, &folder), port, folder };
        private.answers().await;
        private
    }

    fn url(&self) -> String {
        match self.kind {
            "nats" => format!("nats://127.0.0.1:{}", self.port),
            _ => format!("amqp://guest:guest@127.0.0.1:{}", self.port),
        }
    }

    async fn answers(&self) {
        until("the private broker answers", || async {
            guestlist::broker::connect(&self.url()).await.is_ok()
        })
        .await;
    }

    async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    async fn restart(&mut self) {
        self.child = spawn_broker(self.kind, &self.port, &self.folder);
        self.answers().await;
    }

    /// `rabbitmqctl`.
    #[cfg(feature = "amqp")]
    async fn control(&self, args: &[&str]) {
        let scripts = env("GUESTLIST_SCRIPTS");
        let mut command = Command::new(format!("{scripts}/brokers"));
        command.arg("rabbitmqctl").arg(&self.folder).args(args).stdout(Stdio::null());
        assert!(command.status().await.unwrap().success(), "rabbitmqctl {args:?}");
    }

    async fn end(mut self) {
        self.kill().await;
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn spawn_broker(kind: &str, port: &str, folder: &Path) -> Child {
    Command::new(format!("{}/brokers", env("GUESTLIST_SCRIPTS")))
        .args(["run", kind, &env("GUESTLIST_BROKERS"), port])
        .arg(folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// A handler that fails for bodies that say `bad`, and counts the rest.
fn failing_if_bad(
    ledger: &Ledger,
    fail: fn() -> Failure,
) -> impl Fn(Message) -> std::future::Ready<Result<(), Failure>> + Clone + use<> {
    let ledger = ledger.clone();
    move |message: Message| {
        let body = ledger.started(&message);
        if body.contains("bad") {
            return std::future::ready(Err(fail()));
        }
        ledger.succeeded(&body);
        std::future::ready(Ok(()))
    }
}

/// A handler that succeeds at the third attempt.
fn third_time_lucky(
    ledger: &Ledger,
) -> impl Fn(Message, Attempt) -> std::future::Ready<Result<(), Failure>> + Clone + use<> {
    let ledger = ledger.clone();
    move |message: Message, Attempt(attempt): Attempt| {
        let body = ledger.started(&message);
        if attempt < 3 {
            return std::future::ready(Err(Failure::transient("not yet")));
        }
        ledger.succeeded(&body);
        std::future::ready(Ok(()))
    }
}

/// Five messages in mid-run; then `harm`; then the handlers go on, and one more message comes. Nothing is lost,
/// nothing that was completed runs again.
async fn survives(url: &str, queue: Queue, name: &str, send: impl AsyncFn(String), harm: impl AsyncFnOnce()) {
    let gated = Gated::new();
    let running = Running::start(url, queue.handler(gated.handler()), name).await;
    for n in 0..5 {
        send(format!("m-{n}")).await;
    }
    until("five handlers run", || async { gated.running() == 5 }).await;
    harm().await;
    running.until("the loss was noticed", |queue| queue.rebuilds >= 1).await;
    gated.open();
    running.until("every message is handled", |queue| queue.handled >= 5).await;
    running.until("it consumes again", |queue| queue.state == State::Running).await;
    send("after".to_owned()).await;
    running.until("the next one too", |queue| queue.handled >= 6).await;
    if url.starts_with("amqp") {
        // RabbitMQ delivers again at once what was not acked: stopped before, the consumer would leave it there.
        running.until("what was in hand is skipped", |queue| queue.duplicates >= 5).await;
    }
    let queue = running.stop().await;
    assert_eq!(queue.handled, 6, "{queue:?}");
    assert!(gated.ledger.successes().iter().all(|count| *count == 1), "a completed run ran again");
}
