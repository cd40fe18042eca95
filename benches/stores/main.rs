//! What the stores do in a second, beside the bare operation of what they are made of: `scripts/bench`
//!
//! ```text
//! scripts/bench [PART...] [--quick]           with servers of its own
//! cargo bench --bench stores --features redis,postgres,nats,durable [-- PART... --quick]
//! ```
//!
//! PART is `memory` (bytes for each id that is remembered), `local`, `redis`, `postgres` or `nats`; without one, all are
//! measured. `--quick` shows only that it runs. The servers are those of `GUESTLIST_REDIS_URL`, `GUESTLIST_POSTGRES_URL`
//! and `GUESTLIST_NATS_URL`; what it leaves on them is removed at the end, or goes by itself in minutes.
//!
//! How it measures: so many tasks call again and again, for a quarter of a second or 20,000 times, whatever is
//! sooner: a batch. A round is a batch of each contender, every other round in the other order, and gives
//! a ratio of their rates: whatever slows the machine down slows both. Printed are the medians over the rounds. The
//! first round of each is not counted: it makes connections and loads scripts. Nothing here fails for being slow.

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

mod calls;
mod local;
mod nats_server;
mod pairs;
mod postgres_server;
mod redis_server;
mod remembered;

use std::env;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio_util::sync::CancellationToken;

use self::pairs::{Effort, Group};

const PARTS: [&str; 5] = ["memory", "local", "redis", "postgres", "nats"];

const HEAD: &str = "\
Claim + complete of a new id is two calls, and so is what each bare client does for it: one that takes the id,
one that marks it done. A duplicate is one call, beside one. p50 and p99 are of both calls together.
`store/this` is the store's rate divided by that of the row, as the median of the rounds and its quartiles.
Targets: 0.85 of the bare call at 1 in flight, 0.80 of a script of equal size without logic at 64 and 512.";

fn main() {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match &arguments[..] {
        [act, store, ids] if act == remembered::ACT => remembered::child(store, ids),
        arguments => run(&Plan::of(arguments)),
    }
}

fn run(plan: &Plan) {
    println!("{HEAD}\n{}", plan.effort);
    if plan.wants("memory") {
        remembered::run(plan.quick);
    }
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(stores(plan));
}

async fn stores(plan: &Plan) {
    let bench = Bench { effort: plan.effort, stop: stop() };
    if plan.wants("local") {
        local::run(&bench).await;
    }
    if let Some(url) = plan.url("redis", "GUESTLIST_REDIS_URL", "stores") {
        redis_server::run(&bench, &url).await;
    }
    if let Some(url) = plan.url("postgres", "GUESTLIST_POSTGRES_URL", "stores") {
        postgres_server::run(&bench, &url).await;
    }
    if let Some(url) = plan.url("nats", "GUESTLIST_NATS_URL", "brokers") {
        nats_server::run(&bench, &url).await;
    }
}

/// Cancelled by Ctrl-C: nothing more is measured, what was made is removed.
fn stop() -> CancellationToken {
    let stop = CancellationToken::new();
    let stopper = stop.clone();
    tokio::spawn(async move {
        tokio::signal::ctrl_c().await.unwrap();
        stopper.cancel();
    });
    stop
}

/// What the arguments ask for.
struct Plan {
    parts: Vec<String>,
    quick: bool,
    effort: Effort,
}

impl Plan {
    fn of(arguments: &[String]) -> Self {
        let (quick, parts): (Vec<String>, Vec<String>) =
            arguments.iter().cloned().partition(|argument| argument == "--quick");
        let unknown = parts.iter().find(|part| !PARTS.contains(&part.as_str()));
        assert!(unknown.is_none(), "{unknown:?} is none of {PARTS:?} and not --quick");
        let quick = !quick.is_empty();
        let effort = if quick {
            Effort { rounds: 3, time: Duration::from_millis(50), most: 2_000 }
        } else {
            Effort { rounds: 15, time: Duration::from_millis(250), most: 20_000 }
        };
        Self { parts, quick, effort }
    }

    fn wants(&self, part: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|wanted| wanted == part)
    }

    fn url(&self, part: &str, variable: &str, script: &str) -> Option<String> {
        if !self.wants(part) {
            return None;
        }
        let url = env::var(variable).ok();
        if url.is_none() {
            println!(
                "\n{part}: left out, {variable} is not set: `scripts/{script} up distribution DIR; . DIR/env`"
            );
        }
        url
    }
}

/// What all parts need.
struct Bench {
    effort: Effort,
    stop: CancellationToken,
}

impl Bench {
    /// Until it is done or interrupted.
    async fn measure(&self, group: &Group) {
        self.stop.run_until_cancelled(group.measure(self.effort)).await;
    }
}
