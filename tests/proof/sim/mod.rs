//! Seeded simulation: the whole consumer, a store and a broker in one thread on a paused clock,
//! and faults wherever it waits. One seed, one history.

mod broker;
mod handler;
mod log;
mod plan;
mod process;
mod rng;
mod rules;
mod session;
mod store;
mod truth;
mod world;

use self::rules::Rule;
use self::world::{Outcome, play};

fn failed(outcome: &Outcome) -> String {
    let (faults, log) = (outcome.text)();
    let seed = outcome.plan.seed;
    format!(
        "seed {seed}: {:#?}\n{:?}\n\nfaults:\n{faults}\nlog:\n{log}\nseed {seed}: {:#?}\nagain: GUESTLIST_SEED={seed} cargo test --release --features testing --test proof sim::replay -- --nocapture",
        outcome.violations, outcome.plan, outcome.violations,
    )
}

#[test]
fn replay() {
    let Some(seed) = std::env::var("GUESTLIST_SEED").ok().and_then(|seed| seed.parse().ok()) else { return };
    let outcome = play(seed, Rule::Ours);
    println!("{}", failed(&outcome));
    assert!(outcome.violations.is_empty());
}

#[test]
fn seeds() {
    let count = std::env::var("GUESTLIST_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let began = std::time::Instant::now();
    let mut bad = 0;
    let mut most = std::time::Duration::ZERO;
    for seed in 0..count {
        if std::env::var("VERBOSE").is_ok() {
            eprintln!("{seed}");
        }
        let outcome = play(seed, Rule::Ours);
        most = most.max(outcome.rested_after);
        if !outcome.violations.is_empty() {
            bad += 1;
            println!("seed {seed}: {:?}", outcome.violations);
        }
    }
    println!("{bad} of {count} in {:?}, rested {most:?}", began.elapsed());
    assert_eq!(bad, 0);
}
