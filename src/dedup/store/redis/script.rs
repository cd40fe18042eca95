//! The transitions, each one script that Redis runs as one atomic step.

use std::sync::LazyLock;

use redis::{Cmd, ErrorKind, RedisError, Script, ServerErrorKind, Value};

use super::link::Link;

/// One of the scripts: its text, and the hash by which Redis knows it once it has seen the text.
pub(super) struct Transition {
    text: &'static str,
    hash: LazyLock<String>,
}

macro_rules! transition {
    ($name:ident, $file:literal) => {
        pub(super) static $name: Transition = Transition {
            text: concat!(include_str!("record.lua"), include_str!($file)),
            hash: LazyLock::new(|| Script::new($name.text).get_hash().to_owned()),
        };
    };
}

transition!(CLAIM, "claim.lua");
transition!(RENEW, "renew.lua");
transition!(COMPLETE, "complete.lua");
transition!(RELEASE, "release.lua");
transition!(INSPECT, "inspect.lua");
transition!(FORGET, "forget.lua");

impl Transition {
    /// Runs it on one key. By its hash; a server that does not know it (new, restarted, flushed, failed over)
    /// gets the text, runs it in the same round trip and knows it from then on.
    pub(super) async fn run(&self, link: &Link, key: &[u8], argument: &[u8]) -> Result<Value, RedisError> {
        let by_hash = command("EVALSHA", &self.hash, key, argument);
        match link.ask(&by_hash).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                link.ask(&command("EVAL", self.text, key, argument)).await
            }
            answer => answer,
        }
    }
}

fn command(name: &str, script: &str, key: &[u8], argument: &[u8]) -> Cmd {
    let mut command = Cmd::with_capacity(5, name.len() + script.len() + key.len() + argument.len() + 1);
    command.arg(name).arg(script).arg("1").arg(key).arg(argument);
    command
}
