//! The scripts beside the machine: the same calls, the same answers, the same records.
//!
//! The server's clock is read before and after each call, and the machine runs at both instants: what the store
//! answers and keeps must lie between.

use std::time::Duration;

use guestlist::DedupKey;
use guestlist::dedup::protocol::{Ask, Claim, Fence, Held, Machine, Record, Release, Run, State, Token};
use guestlist::dedup::{DedupStore, RedisStore};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};

use super::server::{Plain, key, own_url};

const STEPS: usize = 6_000;
const KEYS: u128 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Claim(Claim),
    Held(Held),
    Forgot(bool),
    Lost,
}

#[derive(Clone, Copy, Debug)]
enum Call {
    Claim(Ask),
    Renew(Run, Duration),
    Complete(Run, Duration),
    Release(Run, Release),
    Forget,
    /// The record vanishes behind the store's back.
    Lose,
}

impl Call {
    fn on_the_machine(self, now: u64, record: Option<Record>) -> (Option<Record>, Answer) {
        let machine = Machine::at(now);
        let held = |(record, held)| (record, Answer::Held(held));
        match self {
            Self::Claim(ask) => {
                let (record, claim) = machine.claim(record, &ask);
                (record, Answer::Claim(claim))
            }
            Self::Renew(run, lease) => held(machine.renew(record, run, lease)),
            Self::Complete(run, window) => held(machine.complete(record, run, window)),
            Self::Release(run, why) => held(machine.release(record, run, why)),
            Self::Forget => (None, Answer::Forgot(machine.live(record).is_some())),
            Self::Lose => (None, Answer::Lost),
        }
    }

    async fn on_the_store(self, store: &RedisStore, plain: &Plain, key: &DedupKey) -> Answer {
        match self {
            Self::Claim(ask) => Answer::Claim(store.claim(key, &ask).await.unwrap()),
            Self::Renew(run, lease) => Answer::Held(store.renew(key, run, lease).await.unwrap()),
            Self::Complete(run, window) => Answer::Held(store.complete(key, run, window).await.unwrap()),
            Self::Release(run, why) => Answer::Held(store.release(key, run, why).await.unwrap()),
            Self::Forget => Answer::Forgot(store.forget(key).await.unwrap()),
            Self::Lose => {
                let _: u32 = plain.ask(&format!("DEL {}", store.redis_key(key))).await;
                Answer::Lost
            }
        }
    }
}

/// A length of time: none, hardly any, a moment that may end between two calls, long, for ever.
fn length(random: &mut StdRng) -> Duration {
    match random.random_range(0..10) {
        0 => Duration::ZERO,
        1 => Duration::from_micros(1),
        2..5 => Duration::from_micros(random.random_range(100..3_000)),
        5..9 => Duration::from_micros(random.random_range(3_600_000_000..7_200_000_000)),
        _ => Duration::MAX,
    }
}

fn token(random: &mut StdRng) -> Token {
    Token::from_bits(u128::MAX - random.random_range(0_u128..4))
}

fn run(random: &mut StdRng, record: Option<Record>) -> Run {
    match record {
        Some(record) if random.random_ratio(3, 4) => record.run,
        _ => Run { token: token(random), fence: Fence(random.random_range(0..5)) },
    }
}

fn generation(random: &mut StdRng, record: Option<Record>) -> u32 {
    let now = record.map_or(0, |record| record.generation);
    let next = now.saturating_add(1);
    *[now, now, now, now, next, now.saturating_add(2), 0, u32::MAX - 1, u32::MAX].choose(random).unwrap()
}

fn any_call(random: &mut StdRng, record: Option<Record>) -> Call {
    match random.random_range(0..100) {
        0..45 => Call::Claim(Ask {
            generation: generation(random, record),
            digest: [None, Some(0), Some(u128::MAX), Some(1 << 127)].choose(random).copied().unwrap(),
            alone: random.random(),
            ..Ask::new(token(random), length(random), length(random))
        }),
        45..55 => Call::Renew(run(random, record), length(random)),
        55..65 => Call::Complete(run(random, record), length(random)),
        65..95 => Call::Release(run(random, record), release(random)),
        95..98 => Call::Lose,
        _ => Call::Forget,
    }
}

fn release(random: &mut StdRng) -> Release {
    match random.random_range(0..7) {
        0 | 1 => Release::Failed { not_before: length(random) },
        2 => Release::Deferred { not_before: length(random) },
        3 => Release::NotStarted,
        4 | 5 => Release::Interrupted,
        _ => Release::DeadLettered,
    }
}

/// Whether the answer lies between the machine's at the two instants.
fn answer_between(low: Answer, got: Answer, high: Answer) -> bool {
    let Answer::Claim(claim) = got else { return got == low && got == high };
    let (Answer::Claim(low), Answer::Claim(high)) = (low, high) else { return false };
    match (low, claim, high) {
        (
            Claim::Acquired { fence: first, .. },
            Claim::Acquired { fence, attempt, before, digest },
            Claim::Acquired { fence: last, .. },
        ) => {
            let other = |fence| Claim::Acquired { fence, attempt, before, digest };
            (first..=last).contains(&fence) && low == other(first) && high == other(last)
        }
        (
            Claim::InProgress { left: most, .. },
            Claim::InProgress { left, digest },
            Claim::InProgress { left: least, .. },
        ) => {
            let other = |left| Claim::InProgress { left, digest };
            let for_ever = |left: Duration| left > Duration::from_secs(3_600_000_000);
            let between = (least..=most).contains(&left) || for_ever(left) && for_ever(least);
            between && low == other(most) && high == other(least)
        }
        _ => claim == low && claim == high,
    }
}

fn times(record: &Record) -> [u64; 3] {
    let (State::Claimed { deadline: till } | State::Released { not_before: till }) = record.state else {
        return [record.run.fence.0, record.kept_until, 0];
    };
    [record.run.fence.0, record.kept_until, till]
}

fn with_times_of(record: Record, other: &Record) -> Record {
    let state = match (record.state, other.state) {
        (State::Claimed { .. }, State::Claimed { deadline }) => State::Claimed { deadline },
        (State::Released { .. }, State::Released { not_before }) => State::Released { not_before },
        (state, _) => state,
    };
    let run = Run { fence: other.run.fence, ..record.run };
    Record { run, state, kept_until: other.kept_until, ..record }
}

/// Whether the record lies between the machine's at the two instants.
fn record_between(low: &Record, got: &Record, high: &Record) -> bool {
    let ordered = times(low).into_iter().zip(times(got)).zip(times(high));
    with_times_of(*low, got) == *got
        && with_times_of(*high, got) == *got
        && ordered.into_iter().all(|((low, got), high)| low <= got && got <= high)
}

/// Steps that are asked for at once are made by one run of the script: this one between others, on other keys.
async fn in_company<T>(step: impl Future<Output = T>, store: &RedisStore, random: &mut StdRng) -> T {
    let strangers = [KEYS, KEYS + 1].map(|number| key(number + random.random_range(0..5)));
    let ask = Ask::new(token(random), length(random), length(random));
    let why = release(random);
    let run = Run { token: token(random), fence: Fence(1) };
    let (claimed, answer, released) =
        tokio::join!(store.claim(&strangers[0], &ask), step, store.release(&strangers[1], run, why));
    claimed.unwrap();
    released.unwrap();
    answer
}

/// What the machine and the store make of one key.
#[derive(Default)]
struct Tally {
    calls: usize,
    undecided: usize,
    acquired: usize,
    past_its_time: usize,
}

async fn compare(seed: u64, stores: &[RedisStore; 2], plain: &Plain) -> Tally {
    let mut random = StdRng::seed_from_u64(seed);
    let mut records: Vec<Option<Record>> = vec![None; usize::try_from(KEYS).unwrap()];
    let mut tally = Tally::default();
    for step in 0..STEPS {
        let number = random.random_range(0..KEYS);
        let (key, slot) = (key(number), usize::try_from(number).unwrap());
        let record = records[slot];
        let call = any_call(&mut random, record);
        let store = stores.choose(&mut random).unwrap();

        let before = plain.time().await;
        let got = if random.random() {
            in_company(call.on_the_store(store, plain, &key), store, &mut random).await
        } else {
            call.on_the_store(store, plain, &key).await
        };
        let after = plain.time().await;

        let (low_record, low) = call.on_the_machine(before, record);
        let (high_record, high) = call.on_the_machine(after, record);
        let told = format!("seed {seed}, step {step}, {before} to {after}, {call:?} on {record:?}");
        tally.calls += 1;
        tally.acquired += usize::from(matches!(got, Answer::Claim(Claim::Acquired { .. })));
        tally.past_its_time += usize::from(record.is_some_and(|record| record.kept_until < before));

        // A deadline between the two instants: the store may have seen it or not.
        let undecided = !same_shape(low_record, high_record) || kind(low) != kind(high);
        tally.undecided += usize::from(undecided);
        let (low_record, high_record) = if !undecided {
            assert!(answer_between(low, got, high), "{got:?}, not {low:?} to {high:?}: {told}");
            (low_record, high_record)
        } else if kind(got) == kind(low) && kind(got) == kind(high) {
            (low_record, high_record)
        } else {
            // With two deadlines between the instants, there is a time in which only one of them is over.
            let turns = record.iter().flat_map(times).filter(|turn| (before..after).contains(turn));
            let instants =
                [before, after].into_iter().chain(turns).map(|now| call.on_the_machine(now, record));
            let Some((one, _)) = instants.into_iter().find(|(_, answer)| kind(*answer) == kind(got)) else {
                panic!("{got:?}, not {low:?} or {high:?}: {told}");
            };
            (one, one)
        };

        let slack = if undecided { after - before } else { 0 };
        let looked = store.inspect(&key).await.unwrap();
        let now = plain.time().await;
        records[slot] = match (low_record, looked, high_record) {
            (Some(low), Some(got), Some(high)) => {
                let as_one = with_times_of(low, &got) == got || with_times_of(high, &got) == got;
                assert!(
                    record_between(&low, &got, &high) || undecided && as_one,
                    "{got:?}, not {low:?} to {high:?}: {told}"
                );
                Some(got)
            }
            // Past its time: only its fence counts. When it was written may be known by the two instants alone.
            (Some(low), None, _) if low.kept_until - slack <= now => Some(with_fence(low, got)),
            (None, None, None) => None,
            (low, got, _) => panic!("{got:?}, not {low:?}: {told}"),
        };
    }
    tally
}

fn with_fence(record: Record, answer: Answer) -> Record {
    match answer {
        Answer::Claim(Claim::Acquired { fence, .. }) => Record { run: Run { fence, ..record.run }, ..record },
        _ => record,
    }
}

fn kind(answer: Answer) -> String {
    match answer {
        Answer::Claim(Claim::Acquired { attempt, before, .. }) => format!("acquired {attempt} {before:?}"),
        Answer::Claim(Claim::InProgress { .. }) => "in progress".to_owned(),
        other => format!("{other:?}"),
    }
}

/// Whether two records differ in times only.
fn same_shape(one: Option<Record>, other: Option<Record>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => with_times_of(one, &other) == other,
        (one, other) => one == other,
    }
}

#[tokio::test]
async fn the_scripts_do_what_the_machine_does() {
    let url = own_url();
    let stores = [RedisStore::connect(&url).await.unwrap(), RedisStore::connect(&url).await.unwrap()];
    let plain = Plain::shared().await;
    let seed = rand::rng().next_u64();
    let tally = compare(seed, &stores, &plain).await;
    assert_eq!(tally.calls, STEPS);
    // The walk is worth something only if it gets about.
    assert!(tally.acquired > STEPS / 10, "{} acquired, seed {seed}", tally.acquired);
    assert!(tally.past_its_time > STEPS / 100, "{} past their time, seed {seed}", tally.past_its_time);
    assert!(tally.undecided < STEPS / 2, "{} undecided, seed {seed}", tally.undecided);
}
