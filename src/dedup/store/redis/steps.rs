//! The steps of the protocol, by one script that Redis runs as one atomic step itself.

use std::sync::LazyLock;

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
#[derive(Clone)]
pub(super) struct Step {
    pub(super) key: String,
    pub(super) argument: Vec<u8>,
}

#[derive(Clone)]
pub(super) struct Steps {
    link: Link,
    lanes: Lanes<Redis>,
}

struct Redis(Link);

impl Steps {
    pub(super) fn over(link: Link) -> Self {
        Self { lanes: Lanes::to(Redis(link.clone()), LIMITS), link }
    }

    /// The outer error is one of this side.
    pub(super) async fn step(&self, step: Step) -> Result<Result<Value, RedisError>, StoreError> {
        if self.link.is_spread() {
            // A server that is slow or gone is to hold up no other's keys.
            return Ok(alone(&self.link, step).await);
        }
        self.lanes.call(step).await
    }
}

impl Server for Redis {
    type Call = Step;
    type Answer = Result<Value, RedisError>;

    /// What is in flight on a connection that was replaced may still end well, but nobody waits behind it.
    fn epoch(&self) -> u64 {
        self.0.number()
    }

    async fn ready(&self) {
        self.0.ready().await;
    }

    async fn serve(&self, steps: Vec<Step>) -> Vec<Self::Answer> {
        let mut answer = self.0.ask_now(&by_hash(&steps), steps.len()).await;
        if is_unknown(&answer) {
            answer = self.0.ask_now(&by_text(&steps), steps.len()).await;
        }
        match (answer, steps.len()) {
            (answer, 1) => vec![answer],
            (Ok(Value::Array(answers)), _) => answers.into_iter().map(Value::extract_error).collect(),
            (Ok(_), count) => vec![Err(not_a_list()); count],
            (Err(error), _) if is_cross_slot(&error) => {
                self.0.learn_that_it_is_spread();
                join_all(steps.into_iter().map(|step| alone(&self.0, step))).await
            }
            (Err(error), count) => vec![Err(error); count],
        }
    }

    /// The idle connection that a server or a firewall closed is nobody's concern.
    fn is_worth_another(&self, answer: &Self::Answer) -> bool {
        matches!(answer, Err(error) if error.is_connection_dropped())
    }
}

fn is_cross_slot(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::CrossSlot)
}

async fn alone(link: &Link, step: Step) -> Result<Value, RedisError> {
    let steps = [step];
    let answer = link.ask(&by_hash(&steps)).await;
    if is_unknown(&answer) { link.ask(&by_text(&steps)).await } else { answer }
}

fn by_hash(steps: &[Step]) -> Cmd {
    command("EVALSHA", &HASH, steps)
}

/// For a server that does not know the script yet (new, restarted, flushed, failed over): it runs it in the same round
/// trip, and knows it from then on.
fn by_text(steps: &[Step]) -> Cmd {
    command("EVAL", SCRIPT, steps)
}

fn is_unknown(answer: &Result<Value, RedisError>) -> bool {
    matches!(answer, Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript))
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
