//! The process that is killed: a consumer, as it is told by its parent.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use guestlist::dedup::PostgresStore;
use guestlist::inbox::{PostgresInbox, PostgresTransaction};
use guestlist::testing::checker::LogWriter;
use guestlist::{Backoff, BoxFuture, Consumer, Handled, Identity, Message, Queue, State, Status};
use serde::{Deserialize, Serialize};
use sqlx::AssertSqlSafe;
use sqlx::postgres::PgPoolOptions;
use tokio::sync::oneshot;
use tokio::time::sleep;

use super::broker::{ID, dead};
use super::{LEASE, SCOPE, below, env};

const JOB: &str = "GUESTLIST_TEST_JOB";
const NAME: &str = "GUESTLIST_TEST_NAME";

/// Its handler never ends: it takes its process along.
pub(super) const POISON: &str = "poison";

/// What a child is told.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) broker: String,
    pub(super) queue: String,
    /// A URL; the inbox's if there is a schema.
    pub(super) store: String,
    /// The schema of the inbox and of the accounts that it charges.
    pub(super) inbox: Option<String>,
    pub(super) attempts: u32,
    /// For journal and logs.
    pub(super) folder: PathBuf,
}

impl Job {
    /// One line for each run that came to its end.
    pub(super) fn journal(&self) -> PathBuf {
        self.folder.join("journal")
    }

    /// The events of this process.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.jsonl"))
    }

    /// Is there while it consumes.
    pub(super) fn ready(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.ready"))
    }

    /// What it said.
    pub(super) fn output(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.out"))
    }

    /// Starts a process of this name. It stops when its standard input ends, so that it does not outlive its parent.
    pub(super) fn spawn(&self, name: &str) -> Child {
        let _ = std::fs::remove_file(self.ready(name));
        let out = append(self.output(name));
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kills::child::work", "--ignored", "--nocapture", "--test-threads=1"])
            .env(JOB, serde_json::to_string(self).unwrap())
            .env(NAME, name)
            .stdin(Stdio::piped())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap()
    }

    fn queue(&self) -> Queue {
        Queue::new(&self.queue)
            .dead_letter(dead(&self.queue))
            .scope(SCOPE)
            .identity(Identity::none().header(ID))
            .lease(LEASE)
            .max_attempts(self.attempts)
            .backoff(Backoff::new(Duration::from_millis(500), 1, Duration::from_millis(500)).without_jitter())
    }

    async fn queue_with_handler(&self) -> Queue {
        let journal = Journal(Arc::new(append(self.journal())));
        match &self.inbox {
            None => self.queue().store_url(&self.store).handler(writing(journal)),
            Some(schema) => {
                let pool = PgPoolOptions::new().max_connections(16).connect(&self.store).await.unwrap();
                let store = PostgresStore::builder(&self.store).unwrap().schema(schema);
                let inbox = PostgresInbox::new(store.connect().await.unwrap(), pool).await.unwrap();
                self.queue().inbox(inbox).handler(charging(journal, schema))
            }
        }
    }
}

pub(super) fn append(path: PathBuf) -> File {
    OpenOptions::new().append(true).create(true).open(path).unwrap()
}

#[derive(Clone)]
struct Journal(Arc<File>);

impl Journal {
    /// One write: no other process writes into the middle of it, and a kill does not tear it.
    fn ended(&self, id: &str) {
        (&*self.0).write_all(format!("{id}\n").as_bytes()).unwrap();
    }
}

fn id_of(message: &Message) -> String {
    String::from_utf8(message.payload().to_vec()).unwrap()
}

async fn some_work(id: &str) {
    if id == POISON {
        std::process::abort();
    }
    sleep(Duration::from_millis(5 + below(20) as u64)).await;
}

fn writing(journal: Journal) -> impl Fn(Message) -> BoxFuture<Handled> + Clone + Send + Sync + 'static {
    move |message: Message| {
        let journal = journal.clone();
        Box::pin(async move {
            let id = id_of(&message);
            some_work(&id).await;
            journal.ended(&id);
            Ok(())
        })
    }
}

/// Charges the account that the id's last digit names.
fn charging(
    journal: Journal,
    schema: &str,
) -> impl Fn(Message, PostgresTransaction) -> BoxFuture<Handled> + Clone + Send + Sync + 'static {
    let schema = schema.to_owned();
    move |message: Message, mut tx: PostgresTransaction| {
        let (journal, schema) = (journal.clone(), schema.clone());
        Box::pin(async move {
            let id = id_of(&message);
            some_work(&id).await;
            let account = id.chars().last().unwrap();
            let charge =
                format!("update {schema}.accounts set charged = charged + 1 where name = '{account}'");
            let charged = sqlx::raw_sql(AssertSqlSafe(charge)).execute(&mut *tx).await?;
            assert_eq!(charged.rows_affected(), 1);
            journal.ended(&id);
            Ok(())
        })
    }
}

/// Works until it is killed, or told to stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn work() {
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_ansi(false).init();
    let (job, name): (Job, String) = (serde_json::from_str(&env(JOB)).unwrap(), env(NAME));
    let log = LogWriter::append(job.log(&name), name.as_str()).unwrap();
    let queue = job.queue_with_handler().await.observer(log.observer());
    let consumer = Consumer::connect(&job.broker).await.unwrap().drain(Duration::from_secs(10)).queue(queue);
    tokio::spawn(say_when_ready(consumer.status(), job.ready(&name)));
    let parent = parent_is_done();
    consumer.run_until(async { parent.await.unwrap() }).await.unwrap();
    assert!(log.failed().is_none(), "the log has a hole");
}

async fn say_when_ready(status: Status, file: PathBuf) {
    while !status.queues().iter().any(|queue| queue.state == State::Running) {
        sleep(Duration::from_millis(5)).await;
    }
    File::create(file).unwrap();
}

/// Read by a thread that nobody waits for: a runtime would wait for its own.
pub(super) fn parent_is_done() -> oneshot::Receiver<()> {
    let (done, is_done) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = done.send(());
    });
    is_done
}
