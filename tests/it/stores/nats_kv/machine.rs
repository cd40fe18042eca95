//! The same answers and records as the protocol's machine, from two handles in turn.

use guestlist::dedup::protocol::{Held, Machine, Record, Release, State};
use tokio::task::JoinSet;

use super::*;

/// As far from the walk's beginning as makes no lease or backoff end.
const NOW: u64 = 1;

/// A small generator of our own, so that a failure names the seed that repeats it.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// What does not depend on time; a fence is compared only with the one before.
fn timeless(record: Record) -> Record {
    let state = match record.state {
        State::Claimed { .. } => State::Claimed { deadline: 0 },
        State::Released { not_before } => State::Released { not_before: u64::from(not_before > 0) },
        state => state,
    };
    let run = Run { fence: Fence(0), ..record.run };
    Record { run, state, kept_until: 0, ..record }
}

fn without_fence(claim: Claim) -> Claim {
    match claim {
        Claim::Acquired { attempt, before, digest, .. } => {
            Claim::Acquired { fence: Fence(0), attempt, before, digest }
        }
        Claim::InProgress { digest, .. } => Claim::InProgress { left: Duration::ZERO, digest },
        other => other,
    }
}

fn why(dice: &mut Dice) -> Release {
    match dice.roll(7) {
        0 => Release::Failed { not_before: HOUR },
        1 => Release::Failed { not_before: Duration::ZERO },
        2 => Release::Deferred { not_before: Duration::ZERO },
        3 => Release::NotStarted,
        4 | 5 => Release::Interrupted,
        _ => Release::DeadLettered,
    }
}

async fn walk(seed: u64, stores: [NatsKvStore; 2]) {
    let (key, mut dice, mut model) = (key(), Dice(seed), None);
    let mut last_fence = Fence(0);
    for step in 0..40 {
        let store = &stores[usize::from(dice.roll(2) == 0)];
        let token = Token::from_bits(u128::from(dice.roll(3)) + 1);
        let run = Run { token, fence: Fence(1) };
        let at = || format!("seed {seed}, step {step}");
        let machine = Machine::at(NOW);
        match dice.roll(8) {
            0..4 => {
                let ask = Ask {
                    token,
                    lease: HOUR,
                    retain: HOUR,
                    generation: u32::try_from(dice.roll(3)).unwrap(),
                    digest: Some(u128::from(dice.roll(2))),
                    alone: dice.roll(2) == 0,
                };
                let answer = claim(store, &key, &ask).await;
                let (record, expected) = machine.claim(model, &ask);
                assert_eq!(without_fence(answer), without_fence(expected), "{}", at());
                if let (Some(won), true) =
                    (won(&ask, answer), model.map(|m: Record| m.run) != record.map(|r| r.run))
                {
                    assert!(fence(&won) > last_fence, "{}: fences grow", at());
                    last_fence = fence(&won);
                }
                model = record;
            }
            4 => {
                let held = store.renew(&key, run, HOUR).await.unwrap();
                let (record, expected) = machine.renew(model, run, HOUR);
                assert_eq!(held, expected, "{}", at());
                model = record;
            }
            5 => {
                let held = store.complete(&key, run, HOUR).await.unwrap();
                let (record, expected) = machine.complete(model, run, HOUR);
                assert_eq!(held, expected, "{}", at());
                model = record;
            }
            6 => {
                let why = why(&mut dice);
                let held = store.release(&key, run, why).await.unwrap();
                let (record, expected) = machine.release(model, run, why);
                assert_eq!(held, expected, "{}", at());
                model = record;
            }
            _ if dice.roll(3) == 0 => {
                assert_eq!(store.forget(&key).await.unwrap(), model.is_some(), "{}", at());
                model = None;
            }
            _ => {}
        }
        let record = store.inspect(&key).await.unwrap();
        assert_eq!(record.map(timeless), model.map(timeless), "{}", at());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_random_walk_has_the_machines_answers_and_records() {
    let bucket = unique("walk");
    let stores = [open(&bucket).await, open(&bucket).await];
    let begin = u64::from(std::process::id()) << 32;
    let mut walks: JoinSet<()> = (0..40).map(|i| walk(begin.wrapping_add(i), stores.clone())).collect();
    while let Some(walk) = walks.join_next().await {
        walk.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_thousand_claims_one_wins() {
    let bucket = unique("crowd");
    let stores = [open(&bucket).await, open(&bucket).await];
    for _ in 0..3 {
        let key = key();
        let mut claims: JoinSet<Claim> = (0..1000)
            .map(|i| {
                let store = stores[i % 2].clone();
                async move { claim(&store, &key, &ask(HOUR)).await }
            })
            .collect();
        let mut winners = 0;
        while let Some(answer) = claims.join_next().await {
            match answer.unwrap() {
                Claim::Acquired { .. } => winners += 1,
                other => assert!(is_busy(other), "{other:?}"),
            }
        }
        assert_eq!(winners, 1);
    }
}

/// Also of an expired claim, which is there to be fought for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_hundred_takeovers_one_wins() {
    let bucket = unique("takeover");
    let stores = [open(&bucket).await, open(&bucket).await];
    let key = key();
    win(&stores[0], &key, &ask(Duration::from_millis(100))).await;
    let mut winners = 0;
    while winners == 0 {
        let mut claims: JoinSet<Claim> = (0..100)
            .map(|i| {
                let store = stores[i % 2].clone();
                async move { claim(&store, &key, &alone(HOUR)).await }
            })
            .collect();
        while let Some(answer) = claims.join_next().await {
            winners += usize::from(matches!(answer.unwrap(), Claim::Acquired { .. }));
        }
    }
    assert_eq!(winners, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_repeated_counts_once_and_keeps_its_fence() {
    let bucket = unique("again");
    let stores = [open(&bucket).await, open(&bucket).await];
    let (key, ask) = (key(), ask(HOUR));
    let first = win(&stores[0], &key, &ask).await;
    for store in stores.iter().cycle().take(4) {
        assert_eq!(win(store, &key, &ask).await, first);
        assert_eq!(store.renew(&key, first.run, HOUR).await.unwrap(), Held::Yes);
    }
    for store in &stores {
        assert_eq!(store.complete(&key, first.run, HOUR).await.unwrap(), Held::Yes);
        assert_eq!(store.inspect(&key).await.unwrap().unwrap().run, first.run);
        assert!(is_done(claim(store, &key, &ask).await));
    }
}

/// The bucket's age is in it, so that it grows over the bucket's end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fences_grow_over_a_lost_record_and_a_lost_bucket() {
    let bucket = unique("fences");
    let stores = [open(&bucket).await, open(&bucket).await];
    let js = stranger(&env("GUESTLIST_NATS_URL")).await;
    let (key, mut last) = (key(), Fence(0));
    for round in 0..6 {
        let won = win(&stores[round % 2], &key, &ask(HOUR)).await;
        assert!(fence(&won) > last, "round {round}");
        last = fence(&won);
        match round % 3 {
            0 => assert!(stores[0].forget(&key).await.unwrap()),
            1 => js.get_key_value(&bucket).await.unwrap().purge(key.to_string()).await.unwrap(),
            _ => js.delete_key_value(&bucket).await.map(drop).unwrap(),
        }
    }
}
