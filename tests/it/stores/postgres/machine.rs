//! Step for step the same as the protocol's machine, at a clock that the test sets.

use guestlist::dedup::protocol::{Digest, Machine, Micros};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;

const KEYS: u128 = 5;

/// No length is longer in this store.
const LONGEST: Duration = Duration::from_micros(1 << 61);

/// What is asked of the store and of the machine.
#[derive(Clone, Copy, Debug)]
enum Step {
    Claim(Ask),
    Renew(Run, Duration),
    Complete(Run, Duration),
    Release(Run, Release),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Claim(Claim),
    Held(Held),
}

impl Step {
    async fn at_store(self, store: &PostgresStore, key: &DedupKey) -> Answer {
        match self {
            Self::Claim(ask) => Answer::Claim(store.claim(key, &ask).await.unwrap()),
            Self::Renew(run, lease) => Answer::Held(store.renew(key, run, lease).await.unwrap()),
            Self::Complete(run, window) => Answer::Held(store.complete(key, run, window).await.unwrap()),
            Self::Release(run, why) => Answer::Held(store.release(key, run, why).await.unwrap()),
        }
    }

    fn at_machine(self, now: Micros, record: Option<Record>) -> (Option<Record>, Answer) {
        let machine = Machine::at(now);
        let held = |(record, held)| (record, Answer::Held(held));
        match self {
            Self::Claim(Ask { lease, retain, .. }) => {
                let Self::Claim(ask) = self else { unreachable!() };
                let ask = Ask { lease: lease.min(LONGEST), retain: retain.min(LONGEST), ..ask };
                let (record, claim) = machine.claim(record, &ask);
                (record, Answer::Claim(claim))
            }
            Self::Renew(run, lease) => held(machine.renew(record, run, lease.min(LONGEST))),
            Self::Complete(run, window) => held(machine.complete(record, run, window.min(LONGEST))),
            Self::Release(run, why) => {
                let why = match why {
                    Release::Failed { not_before } => Release::Failed { not_before: not_before.min(LONGEST) },
                    Release::Deferred { not_before } => {
                        Release::Deferred { not_before: not_before.min(LONGEST) }
                    }
                    why => why,
                };
                held(machine.release(record, run, why))
            }
        }
    }
}

/// The machine's records, with the fences that the store's sequence gave.
struct Model {
    records: [Option<Record>; KEYS as usize],
    last_fences: [Fence; KEYS as usize],
}

impl Model {
    fn new() -> Self {
        Self { records: [None; KEYS as usize], last_fences: [Fence(0); KEYS as usize] }
    }

    /// The machine takes its fence from its clock and the store from its sequence: whenever one is new, both
    /// are, and it is above all of the key before it.
    fn step(&mut self, now: Micros, number: u128, step: Step, answer: Answer) {
        let index = usize::try_from(number).unwrap();
        let (slot, last_fence) = (&mut self.records[index], &mut self.last_fences[index]);
        let before = *slot;
        let (after, mut expected) = step.at_machine(now, before);
        *slot = after;
        let taken = matches!(expected, Answer::Claim(Claim::Acquired { .. }))
            && Machine::at(now).live(before).map(|record| record.run) != after.map(|record| record.run);
        if taken
            && let (
                Answer::Claim(Claim::Acquired { fence: theirs, .. }),
                Answer::Claim(Claim::Acquired { fence, .. }),
            ) = (answer, &mut expected)
        {
            assert!(theirs > *last_fence, "{theirs:?} after {last_fence:?}");
            *last_fence = theirs;
            *fence = theirs;
            slot.as_mut().unwrap().run.fence = theirs;
        }
        assert_eq!(answer, expected, "{step:?} at {now} on {before:?}");
    }
}

struct Walk {
    random: StdRng,
    /// The asks that were made of each key, so that runs and repetitions are found again.
    asks: Vec<(u128, Ask)>,
}

impl Walk {
    fn length(&mut self) -> Duration {
        match self.random.random_range(0..12) {
            0 | 1 => Duration::ZERO,
            2 => Duration::from_micros(1),
            3 => Duration::MAX,
            4 => LONGEST,
            5..8 => Duration::from_micros(self.random.random_range(1..5_000)),
            _ => Duration::from_secs(self.random.random_range(1..50)),
        }
    }

    fn run(&mut self, number: u128) -> Run {
        let asks: Vec<Ask> = self.asks.iter().filter(|(of, _)| *of == number).map(|(_, ask)| *ask).collect();
        let recent = asks.len().min(3);
        let token = match recent {
            0 => Token::from_bits(1),
            _ => asks[asks.len() - 1 - self.random.random_range(0..recent)].token,
        };
        // Below all that the sequence gives, as the fence of every claim before is.
        Run { token, fence: Fence(self.random.random_range(0..1_700_000_000_000_000)) }
    }

    fn release(&mut self) -> Release {
        match self.random.random_range(0..10) {
            0 | 1 => Release::Failed { not_before: self.length() },
            2 => Release::Deferred { not_before: self.length() },
            3 | 4 => Release::NotStarted,
            5..9 => Release::Interrupted,
            _ => Release::DeadLettered,
        }
    }

    fn claim(&mut self, number: u128, generation: u32) -> Step {
        let token = Token::from_bits(self.random.random());
        let (lease, retain) = (self.length(), self.length());
        let near = [
            generation.wrapping_sub(1),
            generation,
            generation,
            generation,
            generation.wrapping_add(1),
            generation.wrapping_add(2),
            u32::MAX,
        ];
        let generation = near[self.random.random_range(0..near.len())];
        let digest = self.random.random_bool(0.5).then(|| Digest::from(self.random.random::<u128>()));
        let alone = self.random.random_bool(0.5);
        let ask = Ask { token, lease, retain, generation, digest, alone };
        self.asks.push((number, ask));
        Step::Claim(ask)
    }

    fn step(&mut self, number: u128, generation: u32) -> Step {
        match self.random.random_range(0..20) {
            0..9 => self.claim(number, generation),
            9 | 10 => match self.asks.iter().rfind(|(of, _)| *of == number) {
                Some((_, ask)) => Step::Claim(*ask),
                None => self.claim(number, generation),
            },
            11 | 12 => Step::Renew(self.run(number), self.length()),
            13 => Step::Complete(self.run(number), self.length()),
            _ => Step::Release(self.run(number), self.release()),
        }
    }
}

/// A store whose function reads the time from a table.
async fn at_a_clock_of_ours() -> (Place, Micros) {
    // Thousands of commits that nobody will miss.
    let mut url = url::Url::parse(&url()).unwrap();
    url.query_pairs_mut().append_pair("options[synchronous_commit]", "off");
    let place = Place::at(url.into()).await;
    let migration = place.builder().migration().unwrap();
    let real = "extract(epoch from clock_timestamp()) * 1000000;";
    assert_eq!(
        migration.matches(real).count(),
        2,
        "the function reads the clock for a new id, and for one that is there"
    );
    place.sql(&migration.replace(real, "(select now from {s}.clock);")).await;
    let now = place
        .number("create table {s}.clock as select (extract(epoch from now()) * 1000000)::bigint as now; select now from {s}.clock")
        .await;
    // Ahead of the real one, by which `inspect` judges.
    (place, u64::try_from(now).unwrap() + 1_000_000_000)
}

async fn set_clock(place: &Place, now: Micros) {
    place.sql(&format!("update {{s}}.clock set now = {now}")).await;
}

fn walk() -> Walk {
    let seed = std::env::var("GUESTLIST_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("GUESTLIST_SEED={seed}");
    Walk { random: StdRng::seed_from_u64(seed), asks: Vec::new() }
}

fn pass(random: &mut StdRng, now: Micros) -> Micros {
    now + match random.random_range(0..4) {
        0 => random.random_range(1..90_000_000),
        1 => 1,
        _ => 0,
    }
}

#[tokio::test]
async fn every_step_is_the_machines() {
    let (place, mut now) = at_a_clock_of_ours().await;
    let store = place.store().await;
    let (mut walk, mut model) = (walk(), Model::new());
    set_clock(&place, now).await;
    for _ in 0..6_000 {
        let later = pass(&mut walk.random, now);
        if later != now {
            now = later;
            set_clock(&place, now).await;
        }
        let number = walk.random.random_range(0..KEYS);
        let index = usize::try_from(number).unwrap();
        if walk.random.random_ratio(1, 40) {
            store.forget(&key(number)).await.unwrap();
            model.records[index] = None;
        }
        let generation = model.records[index].map_or(7, |record| record.generation);
        let step = walk.step(number, generation);
        let answer = step.at_store(&store, &key(number)).await;
        model.step(now, number, step, answer);
        let live = |record| Machine::at(now).live(record);
        assert_eq!(live(record(&store, number).await), live(model.records[index]), "after {step:?}");
    }
    place.drop().await;
}

/// In company too: many steps in one statement, several of them on one key, are each the machine's, in the order
/// in which they were asked.
#[tokio::test]
async fn every_step_of_a_shared_statement_is_the_machines() {
    let (place, mut now) = at_a_clock_of_ours().await;
    let store = place.builder().connections(1).connect().await.unwrap();
    let (mut walk, mut model) = (walk(), Model::new());
    for _ in 0..120 {
        now = pass(&mut walk.random, now);
        set_clock(&place, now).await;
        let steps: Vec<(u128, Step)> = (0..40)
            .map(|_| {
                let number = walk.random.random_range(0..KEYS);
                let known = model.records[usize::try_from(number).unwrap()];
                (number, walk.step(number, known.map_or(7, |record| record.generation)))
            })
            .collect();
        // One connection: the first goes alone, the others share the next statement.
        let answers = join_all(steps.iter().map(|(number, step)| {
            let (store, number) = (&store, *number);
            async move { step.at_store(store, &key(number)).await }
        }));
        for ((number, step), answer) in steps.iter().zip(answers.await) {
            model.step(now, *number, *step, answer);
        }
    }
    place.drop().await;
}
