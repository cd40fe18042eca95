//! The steps of the protocol, by one script that Redis runs as one atomic step itself.

use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use futures_util::future::join_all;
use redis::{Cmd, ErrorKind, RedisError, Script, ServerErrorKind, Value};

use super::link::Link;
use crate::dedup::StoreError;
use crate::dedup::store::lanes::{Lanes, Limits, Server};

/// Redis does one thing at a time, and a step that comes with others costs it half of one that comes alone. So there are few
/// lanes; with fewer than four, a step waits for long on a long line.
const LIMITS: Limits = Limits { lanes: 4, batch: 64 };

const SCRIPT: &str = include_str!("step.lua");

/// By which Redis knows the script once it has seen its text.
static HASH: LazyLock<String> = LazyLock::new(|| Script::new(SCRIPT).get_hash().to_owned());

/// A step on one key.
pub(super) struct Step {
    pub(super) key: String,
    pub(super) argument: Vec<u8>,
}

#[derive(Clone)]
pub(super) struct Steps {
    link: Link,
    lanes: Lanes<Redis>,
    /// The keys are on several nodes, behind a cluster's client or a proxy: none runs a script for keys of another, and
    /// one that is slow or gone is to hold up nobody's but its own.
    spread: Arc<AtomicBool>,
}

struct Redis {
    link: Link,
    spread: Arc<AtomicBool>,
}

impl Steps {
    pub(super) fn over(link: Link) -> Self {
        let spread = Arc::new(AtomicBool::new(link.target().is_cluster()));
        let server = Redis { link: link.clone(), spread: Arc::clone(&spread) };
        Self { link, lanes: Lanes::to(server, LIMITS), spread }
    }

    /// The outer error is one of this side.
    pub(super) async fn step(&self, step: Step) -> Result<Result<Value, RedisError>, StoreError> {
        if self.spread.load(Ordering::Relaxed) {
            return Ok(run(&self.link, &[step]).await);
        }
        self.lanes.call(step).await
    }
}

impl Server for Redis {
    type Call = Step;
    type Answer = Result<Value, RedisError>;

    async fn serve(&self, steps: Vec<Step>) -> Vec<Self::Answer> {
        match (run(&self.link, &steps).await, steps.len()) {
            (answer, 1) => vec![answer],
            (Ok(Value::Array(answers)), _) => answers.into_iter().map(Value::extract_error).collect(),
            (Ok(_), count) => vec![Err(not_a_list()); count],
            (Err(error), _) if is_cross_slot(&error) => {
                self.spread.store(true, Ordering::Relaxed);
                join_all(steps.iter().map(|step| run(&self.link, slice::from_ref(step)))).await
            }
            (Err(error), count) => vec![Err(error); count],
        }
    }
}

fn is_cross_slot(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::CrossSlot)
}

/// Runs the script. By its hash; a server that does not know it (new, restarted, flushed, failed over) gets the text,
/// runs it in the same round trip and knows it from then on.
async fn run(link: &Link, steps: &[Step]) -> Result<Value, RedisError> {
    match link.ask(&command("EVALSHA", &HASH, steps)).await {
        Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
            link.ask(&command("EVAL", SCRIPT, steps)).await
        }
        answer => answer,
    }
}

fn command(name: &str, script: &str, steps: &[Step]) -> Cmd {
    let size: usize = steps.iter().map(|step| step.key.len() + step.argument.len()).sum();
    let mut command = Cmd::with_capacity(3 + 2 * steps.len(), name.len() + script.len() + size + 3);
    command.arg(name).arg(script).arg(steps.len());
    for step in steps {
        command.arg(&step.key);
    }
    for step in steps {
        command.arg(&step.argument);
    }
    command
}

fn not_a_list() -> RedisError {
    (ErrorKind::UnexpectedReturnType, "not a list of answers").into()
}
