//! The model check: every order of deliveries, claims, crashes and lost answers, within bounds,
//! over the crate's own [`Machine`](guestlist::dedup::protocol::Machine) and
//! [settlement rules](guestlist::settlement). `docs/proof.md` says what is in it and what is not.

mod bugs;
mod fair;
mod plants;
mod properties;
mod setup;
mod setups;
mod state;
mod step;
mod store;
mod story;
mod worker;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Path};

use self::plants::{Plant, plants};
use self::properties::is_promise;
use self::setup::Setup;
use self::setups::Size;
use self::state::State;
use self::step::Action;

#[test]
fn no_order_of_faults_breaks_a_promise() {
    let began = Instant::now();
    let mut states = 0;
    for setup in setups::all(Size::asked_for()) {
        states += check(setup);
    }
    println!("model check: {states} unique states in {:.0?}", began.elapsed());
    assert!(states >= Size::asked_for().states(), "the models have grown too small: {states} states");
}

/// All states of a model; how many there are.
fn check(setup: Setup) -> usize {
    let began = Instant::now();
    let checker = setup.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
    println!(
        "model check: {:29} {:9} {:>9} unique of {:>9} states, {:.1?}",
        setup.name,
        format!("{:?}", setup.broker),
        checker.unique_state_count(),
        checker.state_count(),
        began.elapsed()
    );
    let found = checker.discoveries();
    if let Some((name, path)) = found.iter().find(|(name, _)| is_promise(name)) {
        tell(path);
        panic!("{}: {name:?} is broken, as shown above", setup.name);
    }
    for landmark in setup.reaches {
        assert!(found.contains_key(landmark), "{} never reaches {landmark:?}", setup.name);
    }
    checker.unique_state_count()
}

#[test]
fn each_planted_bug_is_found() {
    for plant in plants(Size::asked_for()) {
        let (broken, steps, took) = find(&plant);
        println!("planted bug: {:24} {steps:>2} steps, {took:>6.1?}: {}", plant.name, broken.join(", "));
        assert!(broken.contains(&plant.caught_by), "{}: not caught by {:?}", plant.name, plant.caught_by);
    }
}

#[test]
fn without_its_bug_each_plant_is_sound() {
    for plant in plants(Size::asked_for()) {
        check(Setup { bug: None, ..plant.setup });
    }
}

/// The promises that are broken first, the length of the shortest trace to them, and the time it took.
fn find(plant: &Plant) -> (Vec<&'static str>, usize, Duration) {
    let began = Instant::now();
    let mut found = broken(plant.setup, None);
    assert!(!found.is_empty(), "{}: not found", plant.name);
    // The checker looks for more in the block of states where it found one, and keeps the last.
    loop {
        let shorter = broken(plant.setup, Some(shortest(&found)));
        if shorter.is_empty() {
            break;
        }
        found = shorter;
    }
    if std::env::var_os("GUESTLIST_TRACES").is_some() {
        println!("\n{}", plant.name);
        found.values().next().into_iter().for_each(tell);
    }
    let steps = shortest(&found);
    let mut names: Vec<_> = found.into_keys().collect();
    names.sort_unstable();
    (names, steps, began.elapsed())
}

type Traces = HashMap<&'static str, Path<State, Action>>;

/// The promises that are broken in fewer steps than these.
fn broken(setup: Setup, steps: Option<usize>) -> Traces {
    let mut checker = setup.checker().finish_when(HasDiscoveries::AnyFailures);
    if let Some(steps) = steps {
        // It counts states, and stops before this one.
        checker = checker.target_max_depth(steps + 1);
    }
    let mut found = checker.spawn_bfs().join().discoveries();
    found.retain(|name, _| is_promise(name));
    let steps = shortest(&found);
    found.retain(|_, path| length(path) == steps);
    found
}

fn shortest(found: &Traces) -> usize {
    found.values().map(length).min().unwrap_or(usize::MAX)
}

fn length(path: &Path<State, Action>) -> usize {
    path.clone().into_actions().len()
}

/// A trace for a reader: each step, and what it left behind.
fn tell(path: &Path<State, Action>) {
    for (number, (state, action)) in path.clone().into_vec().into_iter().enumerate() {
        let at = state.workers.map(|worker| worker.at);
        let rows: Vec<_> = state.rows.iter().flatten().collect();
        println!("{number:>3}. {rows:?}\n     {at:?}");
        if let Some(action) = action {
            println!("     -> {action:?}");
        }
    }
}
