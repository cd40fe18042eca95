use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, Waker};

use proptest::prelude::*;
use tokio::time::{advance, timeout};

use super::*;
use crate::dedup::protocol::Token;

const LEASE: Duration = Duration::from_secs(30);
const WINDOW: Duration = Duration::from_secs(3600);

fn key(number: u64) -> DedupKey {
    let hash = blake3::hash(&number.to_le_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.as_bytes()[..16]);
    DedupKey::from_bytes(bytes)
}

fn ask(token: u128) -> Ask {
    Ask::new(Token::from_bits(token), LEASE, WINDOW)
}

fn run(token: u128) -> Run {
    Run { token: Token::from_bits(token), fence: crate::Fence(0) }
}

fn won(claim: Claim) -> bool {
    matches!(claim, Claim::Acquired { .. })
}

fn handle(store: &MemoryStore, number: u64) {
    let token = u128::from(number);
    assert!(won(store.claim_now(&key(number), &ask(token))), "{number} is new");
    assert_eq!(store.complete_now(&key(number), run(token), WINDOW), Held::Yes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_a_thousand_claims_at_once_one_wins() {
    let store = MemoryStore::new();
    for round in 0..20 {
        let mut claims = tokio::task::JoinSet::new();
        for token in 0..1_000 {
            let store = store.clone();
            claims.spawn(async move { store.claim(&key(round), &ask(token)).await.unwrap() });
        }
        let winners = claims.join_all().await.into_iter().filter(|claim| won(*claim)).count();
        assert_eq!(winners, 1);
    }
    assert_eq!(store.in_progress(), 20);
}

/// Two claims in a row must never both find the key free, whatever the store moves meanwhile
/// from its claims to its settled records.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_all_that_claim_fail_and_claim_again_one_holds_at_a_time() {
    let store = MemoryStore::new();
    let holders = Arc::new(AtomicUsize::new(0));
    let mut workers = tokio::task::JoinSet::new();
    for worker in 0..8_u128 {
        let (store, holders) = (store.clone(), Arc::clone(&holders));
        workers.spawn(async move {
            let mut wins = 0;
            for round in 0..2_000 {
                let token = worker << 64 | round;
                if won(store.claim_now(&key(1), &ask(token))) {
                    wins += 1;
                    assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two holders");
                    holders.fetch_sub(1, Ordering::SeqCst);
                    let why = Release::Failed { not_before: Duration::ZERO };
                    assert_eq!(store.release_now(&key(1), run(token), why), Held::Yes);
                }
            }
            wins
        });
    }
    let wins: u32 = workers.join_all().await.into_iter().sum();
    let record = store.inspect(&key(1)).await.unwrap().unwrap();
    assert_eq!(record.attempt, wins, "each win was counted once");
}

#[derive(Clone, Debug)]
enum Step {
    Claim { key: u64, token: u128, alone: bool, generation: u32 },
    Renew(u64, u128),
    Complete(u64, u128),
    Release(u64, u128, Release),
    Forget(u64),
    Pass(Duration),
}

fn step() -> impl Strategy<Value = Step> {
    let (key, token) = (|| 0..3_u64, || 0..4_u128);
    let claim = (key(), token(), any::<bool>(), 0..3_u32)
        .prop_map(|(key, token, alone, generation)| Step::Claim { key, token, alone, generation });
    let release = prop_oneof![
        (0..40_u64).prop_map(|s| Release::Failed { not_before: Duration::from_secs(s) }),
        (0..40_u64).prop_map(|s| Release::Deferred { not_before: Duration::from_secs(s) }),
        Just(Release::Deferred { not_before: Duration::MAX }),
        Just(Release::NotStarted),
        Just(Release::Interrupted),
        Just(Release::DeadLettered),
    ];
    prop_oneof![
        5 => claim,
        1 => (key(), token()).prop_map(|(k, t)| Step::Renew(k, t)),
        2 => (key(), token()).prop_map(|(k, t)| Step::Complete(k, t)),
        4 => (key(), token(), release).prop_map(|(k, t, why)| Step::Release(k, t, why)),
        1 => key().prop_map(Step::Forget),
        2 => (0..4_000_u64).prop_map(|s| Step::Pass(Duration::from_secs(s))),
    ]
}

/// The same step on the store and on a map of records by the pure machine.
async fn compare(store: &MemoryStore, records: &mut BTreeMap<u64, Record>, step: &Step) {
    let machine = Machine::at(store.0.clock.now());
    let mut pure = |number: u64, step: &dyn Fn(Option<Record>) -> (Option<Record>, Box<dyn Answer>)| {
        let (record, answer) = step(records.get(&number).copied());
        match record {
            Some(record) => records.insert(number, record),
            None => records.remove(&number),
        };
        format!("{answer:?}")
    };
    match *step {
        Step::Claim { key: k, token, alone, generation } => {
            let ask = Ask { generation, alone, ..ask(token) };
            let expected = pure(k, &|r| boxed(machine.claim(r, &ask)));
            assert_eq!(format!("{:?}", store.claim_now(&key(k), &ask)), expected);
        }
        Step::Renew(k, token) => {
            let expected = pure(k, &|r| boxed(machine.renew(r, run(token), LEASE)));
            assert_eq!(format!("{:?}", store.renew_now(&key(k), run(token), LEASE)), expected);
        }
        Step::Complete(k, token) => {
            let expected = pure(k, &|r| boxed(machine.complete(r, run(token), WINDOW)));
            assert_eq!(format!("{:?}", store.complete_now(&key(k), run(token), WINDOW)), expected);
        }
        Step::Release(k, token, why) => {
            let expected = pure(k, &|r| boxed(machine.release(r, run(token), why)));
            assert_eq!(format!("{:?}", store.release_now(&key(k), run(token), why)), expected);
        }
        Step::Forget(k) => {
            let there = machine.live(records.remove(&k)).is_some();
            assert_eq!(store.forget(&key(k)).await.unwrap(), there);
        }
        Step::Pass(time) => advance(time).await,
    }
    let machine = Machine::at(store.0.clock.now());
    for number in 0..3 {
        let record = records.get(&number).copied();
        assert_eq!(store.inspect(&key(number)).await.unwrap(), machine.live(record));
        assert_eq!(store.left_now(&key(number)), machine.left(record));
    }
}

trait Answer: fmt::Debug {}
impl Answer for Claim {}
impl Answer for Held {}

fn boxed<A: Answer + 'static>((record, answer): (Option<Record>, A)) -> (Option<Record>, Box<dyn Answer>) {
    (record, Box::new(answer))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn it_answers_as_the_pure_machine_does(steps in proptest::collection::vec(step(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let (store, mut records) = (MemoryStore::new(), BTreeMap::new());
            for step in &steps {
                compare(&store, &mut records, step).await;
            }
        });
    }
}

#[test]
fn a_full_store_keeps_the_newest_and_the_lately_seen() {
    let store = MemoryStore::with_capacity(100);
    for number in 0..100 {
        handle(&store, number);
    }
    assert_eq!(store.forgotten_early(), 0);
    // A copy of the oldest comes: it is not the oldest any more.
    assert!(matches!(store.claim_now(&key(0), &ask(1)), Claim::Done { .. }));
    for number in 100..150 {
        handle(&store, number);
        store.0.settled.run_pending_tasks();
    }
    assert_eq!(store.forgotten_early(), 50);
    for number in (0..1).chain(51..150) {
        assert!(store.0.settled.contains_key(&key(number)), "{number} is remembered");
    }
    for number in 1..51 {
        assert!(won(store.claim_now(&key(number), &ask(7))), "{number} is forgotten, and runs again");
    }
}

/// moka's own policy would refuse ids that nobody has asked for yet, in favour of popular ones.
#[test]
fn a_full_store_takes_new_ids_however_popular_the_old_ones_are() {
    let store = MemoryStore::with_capacity(100);
    for number in 0..100 {
        handle(&store, number);
    }
    for copies in 0..20 {
        for number in 0..100 {
            assert!(matches!(store.claim_now(&key(number), &ask(copies)), Claim::Done { .. }));
        }
    }
    for number in 100..200 {
        handle(&store, number);
        store.0.settled.run_pending_tasks();
        assert!(
            matches!(store.claim_now(&key(number), &ask(7)), Claim::Done { .. }),
            "{number} is remembered"
        );
    }
}

#[test]
fn a_claim_takes_no_room_among_the_remembered() {
    let store = MemoryStore::with_capacity(10);
    for number in 0..10 {
        assert!(won(store.claim_now(&key(number), &ask(1))));
        let why = Release::Failed { not_before: Duration::ZERO };
        assert_eq!(store.release_now(&key(number), run(1), why), Held::Yes);
        assert!(won(store.claim_now(&key(number), &ask(2))));
    }
    for number in 10..20 {
        handle(&store, number);
    }
    assert_eq!(store.forgotten_early(), 0);
}

#[test]
fn claims_in_progress_are_never_forgotten() {
    let store = MemoryStore::with_capacity(10);
    for number in 0..5_000 {
        assert!(won(store.claim_now(&key(number), &ask(1))));
    }
    for number in 5_000..6_000 {
        handle(&store, number);
    }
    store.0.settled.run_pending_tasks();
    for number in 0..5_000 {
        assert!(matches!(store.claim_now(&key(number), &ask(2)), Claim::InProgress { .. }), "{number}");
    }
    assert_eq!(store.in_progress(), 5_000);
}

#[tokio::test(start_paused = true)]
async fn ids_that_are_past_their_window_are_not_forgotten_early() {
    let store = MemoryStore::with_capacity(10);
    for number in 0..10 {
        handle(&store, number);
    }
    advance(WINDOW).await;
    for number in 10..20 {
        handle(&store, number);
    }
    assert_eq!(store.forgotten_early(), 0);
}

#[test]
fn the_memory_for_a_hundred_thousand_ids_is_bounded() {
    let store = MemoryStore::with_capacity(1_000);
    for number in 0..100_000 {
        handle(&store, number);
    }
    assert_eq!(store.forgotten_early(), 99_000);
    assert_eq!(store.0.settled.entry_count(), 1_000);
    assert_eq!(store.in_progress(), 0);
}

#[tokio::test(start_paused = true)]
async fn claims_whose_holders_vanished_are_garbage_in_the_end() {
    let store = MemoryStore::new();
    let count = SHARDS as u64 * SWEEP_FROM as u64;
    for number in 0..count {
        store.claim_now(&key(number), &ask(1));
    }
    advance(WINDOW).await;
    for number in count..2 * count {
        store.claim_now(&key(number), &ask(1));
    }
    let kept = u64::try_from(store.in_progress()).unwrap();
    assert!(kept < count + count / 2, "{kept} of {} claims are kept", 2 * count);
    for number in count..2 * count {
        assert!(matches!(store.claim_now(&key(number), &ask(2)), Claim::InProgress { .. }));
    }
}

fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_registers_before_it_looks_misses_nothing() {
    let store = MemoryStore::new();
    let endings: [fn(&MemoryStore); 3] = [
        |store| assert_eq!(store.complete_now(&key(1), run(1), WINDOW), Held::Yes),
        |store| assert_eq!(store.release_now(&key(1), run(1), Release::NotStarted), Held::Yes),
        |store| assert_eq!(store.release_now(&key(1), run(1), Release::DeadLettered), Held::Yes),
    ];
    for end in endings {
        let store = MemoryStore::new();
        assert!(won(store.claim_now(&key(1), &ask(1))));
        let mut changed = pin!(store.changed(&key(1)));
        assert_eq!(store.left_now(&key(1)), LEASE);
        // Between the look and the first poll.
        end(&store);
        assert_eq!(poll(changed.as_mut()), Poll::Ready(()));
        assert_eq!(store.left_now(&key(1)), Duration::ZERO);
    }
    store.claim_now(&key(1), &ask(1));
    let mut changed = pin!(store.changed(&key(1)));
    assert_eq!(poll(changed.as_mut()), Poll::Pending);
    assert!(store.forget(&key(1)).await.unwrap());
    assert_eq!(poll(changed.as_mut()), Poll::Ready(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_waiter_is_woken_by_the_end_of_a_claim() {
    let store = MemoryStore::new();
    for round in 0..200 {
        assert!(won(store.claim_now(&key(round), &ask(1))));
        let mut waiters = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let store = store.clone();
            waiters.spawn(async move {
                loop {
                    let changed = store.changed(&key(round));
                    if store.left_now(&key(round)).is_zero() {
                        return;
                    }
                    changed.await;
                }
            });
        }
        store.complete_now(&key(round), run(1), WINDOW);
        let woken = timeout(LEASE / 2, waiters.join_all()).await;
        assert!(woken.is_ok(), "a waiter slept through the end of its claim");
    }
}

#[test]
fn it_works_without_a_runtime_and_over_the_longest_times() {
    let store = MemoryStore::new();
    let ask = Ask { lease: Duration::MAX, retain: Duration::MAX, ..ask(1) };
    assert!(won(store.claim_now(&key(1), &ask)));
    let why = Release::Deferred { not_before: Duration::MAX };
    assert_eq!(store.release_now(&key(1), run(1), why), Held::Yes);
    assert!(store.left_now(&key(1)) > 1_000 * WINDOW);
    assert!(won(store.claim_now(&key(2), &ask)));
    assert_eq!(store.complete_now(&key(2), run(1), Duration::MAX), Held::Yes);
    store.0.settled.run_pending_tasks();
    assert!(matches!(store.claim_now(&key(2), &ask), Claim::Done { .. }));
}

#[test]
fn fences_grow_over_a_restart() {
    let fence = |store: &MemoryStore| match store.claim_now(&key(1), &ask(1)) {
        Claim::Acquired { fence, .. } => fence,
        other => panic!("{other:?}"),
    };
    let before = fence(&MemoryStore::new());
    let mut after = fence(&MemoryStore::new());
    while after == before {
        // Within the same microsecond.
        after = fence(&MemoryStore::new());
    }
    assert!(after > before);
}
