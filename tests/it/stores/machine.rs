//! Random commands against the pure machine, to the microsecond, and shrunk: for stores whose clock can be paused.
//!
//! The contract's own walk runs on any store, and can neither compare times nor shrink.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use guestlist::DedupKey;
use guestlist::dedup::protocol::{
    Ask, Claim, Digest, Fence, Held, Machine, Micros, Record, Release, Run, State, Token,
};
use guestlist::dedup::{DedupStore, MemoryStore};
use guestlist::testing::FaultyStore;
use proptest::prelude::*;
use proptest::sample::select;
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};
use tokio::runtime::Runtime;
use tokio::time::advance;

/// When the model begins; the store begins at a time of its own.
const BEGIN: Micros = 1_700_000_000_000_000;
const KEYS: u8 = 3;

#[derive(Clone, Debug)]
enum Command {
    Claim(u8, Ask),
    Renew(u8, Token, Duration),
    Complete(u8, Token, Duration),
    Release(u8, Token, Release),
    Forget(u8),
    Pass(Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Claim(Claim),
    Held(Held),
    Forgot(bool),
}

/// What a store should be, and have said last.
#[derive(Clone, Debug)]
struct Model {
    now: Micros,
    records: BTreeMap<u8, Record>,
    said: Option<Answer>,
}

impl Model {
    fn step<A>(&mut self, key: u8, step: impl FnOnce(Machine, Option<Record>) -> (Option<Record>, A)) -> A {
        let (record, answer) = step(Machine::at(self.now), self.records.get(&key).copied());
        match record {
            Some(record) => self.records.insert(key, record),
            None => self.records.remove(&key),
        };
        answer
    }
}

fn run(token: Token) -> Run {
    Run { token, fence: Fence(0) }
}

impl ReferenceStateMachine for Model {
    type State = Self;
    type Transition = Command;

    fn init_state() -> BoxedStrategy<Self> {
        Just(Self { now: BEGIN, records: BTreeMap::new(), said: None }).boxed()
    }

    fn transitions(state: &Self) -> BoxedStrategy<Command> {
        let known = state.records.iter().map(|(key, record)| (*key, record.run.token, record.generation));
        let known: Vec<_> = known.chain([(0, Token::from_bits(1), 0)]).collect();
        // As often by whoever is on record as by anybody.
        let who = prop_oneof![
            select(known),
            (0..KEYS, 1..5_u128, 0..4_u32).prop_map(|(key, token, own)| (key, Token::from_bits(token), own)),
        ];
        who.prop_flat_map(|(key, token, generation)| commands(key, token, generation)).boxed()
    }

    fn apply(mut state: Self, command: &Command) -> Self {
        state.said = match *command {
            Command::Claim(key, ask) => {
                Some(Answer::Claim(state.step(key, |machine, record| machine.claim(record, &ask))))
            }
            Command::Renew(key, token, lease) => Some(Answer::Held(
                state.step(key, |machine, record| machine.renew(record, run(token), lease)),
            )),
            Command::Complete(key, token, window) => Some(Answer::Held(
                state.step(key, |machine, record| machine.complete(record, run(token), window)),
            )),
            Command::Release(key, token, why) => Some(Answer::Held(
                state.step(key, |machine, record| machine.release(record, run(token), why)),
            )),
            Command::Forget(key) => Some(Answer::Forgot(
                state.step(key, |machine, record| (None, machine.live(record).is_some())),
            )),
            Command::Pass(time) => {
                state.now += u64::try_from(time.as_micros()).unwrap();
                None
            }
        };
        state
    }
}

/// Lengths that end together now and then.
fn length() -> BoxedStrategy<Duration> {
    prop_oneof![
        6 => (0..4_u64).prop_map(|tens| Duration::from_secs(10 * tens)),
        1 => Just(Duration::from_micros(1)),
        1 => Just(Duration::MAX),
    ]
    .boxed()
}

fn commands(key: u8, token: Token, own: u32) -> BoxedStrategy<Command> {
    let digest = || select(vec![None, Some(1_u128), Some(Digest::MAX)]);
    let claim = (length(), length(), 0..4_u32, digest(), any::<bool>()).prop_map(
        move |(lease, retain, above, digest, alone)| {
            // Mostly its own generation, then the next, and one of the future or the past.
            let generation = own.saturating_add_signed([0, 1, 2, -1][above as usize]);
            Command::Claim(key, Ask { token, lease, retain, generation, digest, alone })
        },
    );
    let release = prop_oneof![
        length().prop_map(|not_before| Release::Failed { not_before }),
        length().prop_map(|not_before| Release::Deferred { not_before }),
        Just(Release::NotStarted),
        Just(Release::Interrupted),
        Just(Release::DeadLettered),
    ];
    prop_oneof![
        6 => claim,
        1 => length().prop_map(move |lease| Command::Renew(key, token, lease)),
        1 => length().prop_map(move |window| Command::Complete(key, token, window)),
        5 => release.prop_map(move |why| Command::Release(key, token, why)),
        1 => Just(Command::Forget(key)),
        3 => (1..4_u64).prop_map(|tens| Command::Pass(Duration::from_secs(10 * tens))),
        1 => Just(Command::Pass(Duration::from_micros(1))),
    ]
    .boxed()
}

/// How a kind of store is opened, within a runtime.
trait Open {
    fn open() -> Arc<dyn DedupStore>;
}

/// A store beside the model.
struct Beside<O> {
    runtime: Runtime,
    store: Arc<dyn DedupStore>,
    /// The store's time when the model's was [`BEGIN`].
    begin: Micros,
    kind: PhantomData<O>,
}

impl<O: Open> Beside<O> {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.unwrap();
        let store = runtime.block_on(async { O::open() });
        let probe = Ask::new(Token::from_bits(1), Duration::ZERO, Duration::ZERO);
        let claim = runtime.block_on(store.claim(&DedupKey::from_bytes([0xee; 16]), &probe)).unwrap();
        // The fence of a key that was never there is the store's time.
        let Claim::Acquired { fence, .. } = claim else { panic!("{claim:?}") };
        Self { runtime, store, begin: fence.0, kind: PhantomData }
    }

    async fn ask(store: &dyn DedupStore, command: &Command) -> Option<Answer> {
        let key = |number: u8| DedupKey::from_bytes([number; 16]);
        Some(match *command {
            Command::Claim(number, ask) => Answer::Claim(store.claim(&key(number), &ask).await.unwrap()),
            Command::Renew(number, token, lease) => {
                Answer::Held(store.renew(&key(number), run(token), lease).await.unwrap())
            }
            Command::Complete(number, token, window) => {
                Answer::Held(store.complete(&key(number), run(token), window).await.unwrap())
            }
            Command::Release(number, token, why) => {
                Answer::Held(store.release(&key(number), run(token), why).await.unwrap())
            }
            Command::Forget(number) => Answer::Forgot(store.forget(&key(number)).await.unwrap()),
            Command::Pass(time) => {
                advance(time).await;
                return None;
            }
        })
    }

    /// A time or a fence of the model, as the store has it.
    fn theirs(&self, ours: Micros) -> Micros {
        match ours {
            // None, and for ever.
            0 | Micros::MAX => ours,
            _ => ours - BEGIN + self.begin,
        }
    }

    fn record(&self, ours: Record) -> Record {
        let state = match ours.state {
            State::Claimed { deadline } => State::Claimed { deadline: self.theirs(deadline) },
            State::Released { not_before } => State::Released { not_before: self.theirs(not_before) },
            other => other,
        };
        let fence = Fence(self.theirs(ours.run.fence.0));
        Record { run: Run { fence, ..ours.run }, state, kept_until: self.theirs(ours.kept_until), ..ours }
    }

    fn answer(&self, ours: Answer) -> Answer {
        match ours {
            Answer::Claim(Claim::Acquired { fence, attempt, before, digest }) => {
                let fence = Fence(self.theirs(fence.0));
                Answer::Claim(Claim::Acquired { fence, attempt, before, digest })
            }
            other => other,
        }
    }
}

/// What is left of a time without end depends on where the clock began.
fn rounded(answer: Answer) -> Answer {
    match answer {
        Answer::Claim(Claim::InProgress { left, digest }) if left > Duration::from_secs(1 << 33) => {
            Answer::Claim(Claim::InProgress { left: Duration::MAX, digest })
        }
        other => other,
    }
}

impl<O: Open + 'static> StateMachineTest for Beside<O> {
    type SystemUnderTest = Self;
    type Reference = Model;

    fn init_test(_: &Model) -> Self {
        Self::new()
    }

    fn apply(beside: Self, model: &Model, command: Command) -> Self {
        let answer = beside.runtime.block_on(Self::ask(&*beside.store, &command));
        let expected = model.said.map(|said| beside.answer(said));
        assert_eq!(answer.map(rounded), expected.map(rounded), "{command:?}");
        beside
    }

    fn check_invariants(beside: &Self, model: &Model) {
        for number in 0..KEYS {
            let expected = Machine::at(model.now).live(model.records.get(&number).copied());
            let key = DedupKey::from_bytes([number; 16]);
            let record = beside.runtime.block_on(beside.store.inspect(&key)).unwrap();
            assert_eq!(record, expected.map(|record| beside.record(record)), "key {number}");
        }
    }
}

struct InMemory;

impl Open for InMemory {
    fn open() -> Arc<dyn DedupStore> {
        Arc::new(MemoryStore::new())
    }
}

struct Faultless;

impl Open for Faultless {
    fn open() -> Arc<dyn DedupStore> {
        Arc::new(FaultyStore::new(MemoryStore::new()))
    }
}

prop_state_machine! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_in_memory_answers_as_the_machine_does(sequential 1..60 => Beside<InMemory>);

    #[test]
    fn a_store_that_could_fail_answers_as_the_machine_does(sequential 1..60 => Beside<Faultless>);
}
