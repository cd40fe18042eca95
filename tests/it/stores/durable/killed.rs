//! Killed at any moment (F21): what was confirmed is there.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use super::*;

const KILLS: u64 = 24;
const TASKS: u64 = 8;
/// Claimed by each child, first of all, and never ended.
const POISON: u64 = u64::MAX;
const OF_A_CHILD: u64 = 1_000_000;
const FIRST: &str = "GUESTLIST_TEST_FIRST";
const DURABILITY: &str = "GUESTLIST_TEST_DURABILITY";

/// Works until it is killed, and says what was confirmed as soon as it knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn work() {
    let first: u64 = std::env::var(FIRST).unwrap().parse().unwrap();
    let url =
        format!("file:{}?durability={}", folder_of_child().display(), std::env::var(DURABILITY).unwrap());
    let store = DurableStore::connect(&url).await.unwrap();
    let poison = Ask { alone: true, ..ask() };
    match store.claim(&key(POISON), &poison).await.unwrap() {
        Claim::Acquired { attempt, .. } => say(&format!("poison {attempt}")),
        other => panic!("{other:?}"),
    }
    let tasks: Vec<_> = (0..TASKS).map(|task| tokio::spawn(work_on(store.clone(), first + task))).collect();
    for task in tasks {
        task.await.unwrap();
    }
}

async fn work_on(store: DurableStore, first: u64) {
    for number in (first..).step_by(usize::try_from(TASKS).unwrap()) {
        let (run, _) = acquire(&store, number).await.unwrap();
        say(&format!("claimed {number}"));
        match number / TASKS % 4 {
            0 => {}
            1 => {
                let failed = Release::Failed { not_before: WINDOW };
                assert_eq!(store.release(&key(number), run, failed).await.unwrap(), Held::Yes);
                say(&format!("failed {number}"));
            }
            _ => {
                assert_eq!(store.complete(&key(number), run, WINDOW).await.unwrap(), Held::Yes);
                say(&format!("done {number}"));
            }
        }
    }
}

/// One write to the pipe: what was said is heard, also of the killed.
fn say(line: &str) {
    let _ = std::io::stdout().lock().write_all(format!("\n{line}\n").as_bytes());
}

/// Runs a child and kills it after so many words; all of its words.
fn run_and_kill(folder: &Path, durability: &str, first: u64, words: usize) -> Vec<String> {
    let mut command = child("killed::work", folder);
    command.env(FIRST, first.to_string()).env(DURABILITY, durability);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut heard = Vec::new();
    for line in lines {
        heard.push(line.unwrap());
        if heard.len() == words {
            child.kill().unwrap();
        }
    }
    let status = child.wait().unwrap();
    assert!(!status.success() && heard.len() >= words, "it ended by itself: {status}, {heard:?}");
    heard
}

async fn check(store: &DurableStore, word: &str) {
    let Some((what, number)) = word.split_once(' ') else { return };
    let Ok(number) = number.parse() else { return };
    if what == "poison" {
        return;
    }
    let record = store.inspect(&key(number)).await.unwrap();
    let record = record.unwrap_or_else(|| panic!("{word}: no record"));
    let kept = match what {
        "claimed" => record.attempt == 1,
        "failed" => matches!(record.state, State::Released { .. }),
        "done" => record.state == State::Done,
        _ => return,
    };
    assert!(kept, "{word}: {record:?}");
}

async fn nothing_confirmed_is_lost(durability: &str, kills: u64) {
    let temp = Temp::new();
    let mut said = Vec::new();
    for round in 1..=kills {
        // Not before the poison is claimed: the first few lines are the test runner's.
        let words = 10 + usize::try_from(Token::random().bits() % 1_500).unwrap();
        let heard = run_and_kill(&temp.0, durability, round * OF_A_CHILD, words);
        let poison = heard.iter().find(|word| word.starts_with("poison"));
        assert!(poison.is_none_or(|word| *word == format!("poison {round}")), "{poison:?} in round {round}");
        said.extend(heard);
        let store = temp.open().await;
        for word in &said {
            check(&store, word).await;
        }
        let attempts = store.inspect(&key(POISON)).await.unwrap().map_or(0, |record| record.attempt);
        assert!(u64::from(attempts) == round, "{attempts} attempts after {round} deaths");
        store.close().await.unwrap();
    }
    assert!(said.iter().filter(|word| word.starts_with("done")).count() > 100, "the children worked");
}

#[tokio::test]
async fn what_was_confirmed_survives_a_kill() {
    nothing_confirmed_is_lost("process", KILLS).await;
}

#[tokio::test]
async fn what_was_confirmed_survives_a_kill_with_syncs_too() {
    nothing_confirmed_is_lost("power", 6).await;
}
