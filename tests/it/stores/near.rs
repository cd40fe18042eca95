//! The near cache: the contract of all stores over the store in memory, and what it may never say.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use guestlist::DedupKey;
use guestlist::dedup::protocol::{Ask, Claim, Fence, Held, Record, Release, Run, Token};
use guestlist::dedup::{DedupStore, MemoryStore, NearCache, StoreError, StoreFeatures};
use guestlist::testing::store_contract::{
    Pace, StoreFixture, it_answers_as_the_machine_does, store_contract,
};
use guestlist::testing::{Fault, FaultyStore};
use tokio::time::{advance, sleep, timeout};

use super::swap::Swap;
use crate::support::{HOUR, LEASE, MINUTE, SECOND, Trial, every_call_fails_once};

const KEY: DedupKey = DedupKey::from_bytes([7; 16]);
const OTHER_KEY: DedupKey = DedupKey::from_bytes([8; 16]);
const AGE: Duration = Duration::from_millis(50);
const MOMENT: Duration = Duration::from_millis(1);

/// Several processes, each with a cache of its own, over one store.
struct Near(Swap);

#[async_trait]
impl StoreFixture for Near {
    async fn open(&self) -> Arc<dyn DedupStore> {
        Arc::new(NearCache::new(self.0.clone()).with_max_age(AGE))
    }

    async fn lose(&self, key: &DedupKey) {
        self.0.forget(key).await.unwrap();
    }

    async fn lose_everything(&self) -> bool {
        false
    }

    fn pace(&self) -> Pace {
        Pace { short: Duration::from_millis(100), late: AGE, ..Pace::default() }
    }
}

#[tokio::test(start_paused = true)]
async fn it_keeps_the_contract_over_a_store_in_memory() {
    store_contract(&Near(Swap::new(MemoryStore::new()))).await;
}

#[tokio::test(start_paused = true)]
async fn it_answers_as_the_machine_does_over_many_walks() {
    for _ in 0..20 {
        it_answers_as_the_machine_does(&Near(Swap::new(MemoryStore::new()))).await;
    }
}

#[tokio::test(start_paused = true)]
async fn every_call_under_it_may_fail_once() {
    let near = Trial { over: |store| Arc::new(NearCache::new(store)), ..Trial::PATIENT };
    every_call_fails_once(|| async { Arc::new(MemoryStore::new()) as _ }, near).await;
}

/// A store whose answers to claims take a second to arrive, and to which a `forget` takes two, and two back.
#[derive(Debug)]
struct LateAnswers(MemoryStore);

#[async_trait]
impl DedupStore for LateAnswers {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        let claim = self.0.claim(key, ask).await;
        sleep(SECOND).await;
        claim
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.0.renew(key, run, lease).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.0.complete(key, run, window).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        self.0.release(key, run, why).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        self.0.inspect(key).await
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        sleep(2 * SECOND).await;
        let there = self.0.forget(key).await;
        sleep(2 * SECOND).await;
        there
    }

    fn features(&self) -> StoreFeatures {
        self.0.features()
    }
}

/// A process with a cache, the store behind it, and how often it was asked.
struct Desk {
    store: MemoryStore,
    counter: FaultyStore,
    near: NearCache,
}

fn ask(token: u128) -> Ask {
    Ask::new(Token::from_bits(token), LEASE, HOUR)
}

fn run(token: u128) -> Run {
    Run { token: Token::from_bits(token), fence: Fence(0) }
}

impl Desk {
    fn new() -> Self {
        Self::over(MemoryStore::new())
    }

    fn over(store: MemoryStore) -> Self {
        let counter = FaultyStore::new(store.clone());
        Self { store, near: NearCache::new(counter.clone()), counter }
    }

    /// Another process over the same store.
    fn beside(&self) -> Self {
        Self::over(self.store.clone())
    }

    async fn handle(&self, ask: Ask) {
        assert!(matches!(self.near.claim(&KEY, &ask).await.unwrap(), Claim::Acquired { .. }));
        self.complete(HOUR).await;
    }

    async fn complete(&self, window: Duration) {
        assert_eq!(self.near.complete(&KEY, run(1), window).await.unwrap(), Held::Yes);
    }

    /// Whether a copy is answered `Done`, and whether the store was asked.
    async fn copy(&self, ask: Ask) -> (bool, bool) {
        let calls = self.counter.calls();
        let claim = self.near.claim(&KEY, &ask).await.unwrap();
        (matches!(claim, Claim::Done { .. }), self.counter.calls() > calls)
    }
}

const NEAR: (bool, bool) = (true, false);
const FAR: (bool, bool) = (true, true);

#[tokio::test(start_paused = true)]
async fn a_copy_of_what_this_process_has_done_costs_no_round_trip() {
    let desk = Desk::new();
    desk.handle(ask(1)).await;
    for copy in 2..10 {
        assert_eq!(desk.copy(ask(copy)).await, NEAR);
    }
    assert_eq!(desk.near.hits(), 8);
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_what_another_process_has_done_costs_one() {
    let one = Desk::new();
    let two = one.beside();
    one.handle(ask(1)).await;
    assert_eq!(two.copy(ask(2)).await, FAR);
    assert_eq!(two.copy(ask(3)).await, NEAR);
}

#[tokio::test(start_paused = true)]
async fn it_remembers_for_a_minute_and_a_window_at_most() {
    for (window, remembered) in [(HOUR, MINUTE), (MINUTE, MINUTE), (10 * SECOND, 10 * SECOND)] {
        let desk = Desk::new();
        assert!(matches!(desk.near.claim(&KEY, &ask(1)).await.unwrap(), Claim::Acquired { .. }));
        desk.complete(window).await;
        advance(remembered.saturating_sub(MOMENT)).await;
        assert_eq!(desk.copy(ask(2)).await, NEAR, "{window:?}");
        advance(MOMENT).await;
        let (done, asked) = desk.copy(ask(3)).await;
        assert!(asked, "{window:?}: its time here is over");
        assert_eq!(done, window > MINUTE, "{window:?}: as the store says");
    }
}

#[tokio::test(start_paused = true)]
async fn a_completion_asked_again_does_not_lengthen_the_window() {
    let desk = Desk::new();
    assert!(matches!(desk.near.claim(&KEY, &ask(1)).await.unwrap(), Claim::Acquired { .. }));
    desk.counter.fail_call(0, Fault::AfterEffect);
    assert!(desk.near.complete(&KEY, run(1), 10 * SECOND).await.is_err());
    advance(4 * SECOND).await;
    desk.complete(10 * SECOND).await;
    advance((6 * SECOND).saturating_sub(MOMENT)).await;
    assert_eq!(desk.copy(ask(2)).await, NEAR);
    advance(MOMENT).await;
    assert_eq!(
        desk.copy(ask(3)).await,
        (false, true),
        "the window began with the completion that was not heard"
    );
}

#[tokio::test(start_paused = true)]
async fn what_it_only_saw_done_is_remembered_for_a_sixtieth_of_the_window() {
    let one = Desk::new();
    one.handle(ask(1)).await;
    for (window, remembered) in [(HOUR, MINUTE), (24 * HOUR, MINUTE), (MINUTE, SECOND)] {
        let two = one.beside();
        let ask = |token| Ask { retain: window, ..ask(token) };
        assert_eq!(two.copy(ask(2)).await, FAR);
        advance(remembered.saturating_sub(MOMENT)).await;
        assert_eq!(two.copy(ask(3)).await, NEAR, "{window:?}");
        advance(MOMENT).await;
        assert_eq!(two.copy(ask(4)).await, FAR, "{window:?}");
    }
}

/// A queue keeps what is not done for longer than its window.
#[tokio::test(start_paused = true)]
async fn a_short_window_is_not_lengthened_by_how_long_claims_are_kept() {
    let one = Desk::new();
    let two = one.beside();
    assert!(matches!(two.near.claim(&OTHER_KEY, &ask(1)).await.unwrap(), Claim::Acquired { .. }));
    assert_eq!(two.near.complete(&OTHER_KEY, run(1), 10 * SECOND).await.unwrap(), Held::Yes);
    assert!(matches!(one.near.claim(&KEY, &ask(1)).await.unwrap(), Claim::Acquired { .. }));
    one.complete(10 * SECOND).await;
    assert_eq!(two.copy(ask(2)).await, FAR);
    advance(10 * SECOND).await;
    assert_eq!(two.copy(ask(3)).await, (false, true), "its window is over");
}

#[tokio::test(start_paused = true)]
async fn a_hit_does_not_lengthen_what_is_remembered() {
    let desk = Desk::new();
    desk.handle(ask(1)).await;
    for second in 0..60 {
        assert_eq!(desk.copy(ask(2)).await, NEAR, "second {second}");
        advance(SECOND).await;
    }
    assert_eq!(desk.copy(ask(2)).await, FAR);
}

#[tokio::test(start_paused = true)]
async fn what_was_sent_back_to_work_is_asked_about_at_the_store() {
    let desk = Desk::new();
    desk.handle(Ask { generation: 1, ..ask(1) }).await;
    let redriven = Ask { generation: 2, ..ask(2) };
    for _ in 0..2 {
        assert_eq!(desk.copy(redriven).await, FAR, "it is still done there");
    }
    let forged = Ask { generation: u32::MAX, ..ask(5) };
    assert_eq!(
        desk.copy(forged).await,
        FAR,
        "and that is not remembered of a generation that anybody can write"
    );
    desk.store.forget(&KEY).await.unwrap();
    let again = Ask { generation: 3, ..ask(3) };
    assert_eq!(desk.copy(again).await, (false, true), "forgotten there, it runs");
    assert_eq!(desk.copy(ask(4)).await, (false, true), "and is not called done meanwhile");
}

#[tokio::test(start_paused = true)]
async fn what_is_forgotten_is_forgotten_here_at_once_and_elsewhere_within_a_minute() {
    let one = Desk::new();
    let two = one.beside();
    one.handle(ask(1)).await;
    assert_eq!(two.copy(ask(2)).await, FAR);
    assert!(two.near.forget(&KEY).await.unwrap());
    assert_eq!(one.copy(ask(3)).await, NEAR, "the other process does not know");
    assert_eq!(two.copy(ask(4)).await, (false, true), "this one does");
    advance(MINUTE).await;
    assert_eq!(one.copy(ask(5)).await, (false, true), "and then the other as well");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_was_on_its_way_does_not_bring_back_what_was_forgotten() {
    let one = Desk::new();
    one.handle(ask(1)).await;
    let late = NearCache::new(LateAnswers(one.store.clone()));
    let claim = |token| {
        let late = late.clone();
        tokio::spawn(async move { late.claim(&KEY, &ask(token)).await.unwrap() })
    };
    let before = claim(2);
    tokio::task::yield_now().await;
    let forget = tokio::spawn({
        let late = late.clone();
        async move { late.forget(&KEY).await.unwrap() }
    });
    tokio::task::yield_now().await;
    let meanwhile = claim(3);
    for claim in [before, meanwhile] {
        assert!(matches!(claim.await.unwrap(), Claim::Done { .. }), "when it was asked, it was done");
    }
    assert!(forget.await.unwrap());
    assert!(matches!(claim(4).await.unwrap(), Claim::Acquired { .. }), "now it is not");
}

#[tokio::test(start_paused = true)]
async fn a_forget_that_is_dropped_half_way_is_one_all_the_same() {
    let store = MemoryStore::new();
    let near = NearCache::new(LateAnswers(store.clone()));
    assert!(matches!(near.claim(&KEY, &ask(1)).await.unwrap(), Claim::Acquired { .. }));
    assert_eq!(near.complete(&KEY, run(1), HOUR).await.unwrap(), Held::Yes);
    assert!(timeout(3 * SECOND, near.forget(&KEY)).await.is_err(), "the store has forgotten, unheard");
    assert!(matches!(near.claim(&KEY, &ask(2)).await.unwrap(), Claim::Acquired { .. }));
}

#[tokio::test(start_paused = true)]
async fn it_remembers_for_no_longer_than_a_minute_whatever_it_is_told() {
    let mut desk = Desk::new();
    desk.near = desk.near.clone().with_max_age(HOUR);
    desk.handle(ask(1)).await;
    advance(MINUTE).await;
    assert_eq!(desk.copy(ask(2)).await, FAR);
    let mut desk = Desk::new();
    desk.near = desk.near.clone().with_max_age(SECOND);
    desk.handle(ask(1)).await;
    advance(SECOND).await;
    assert_eq!(desk.copy(ask(2)).await, FAR);
}

#[tokio::test(start_paused = true)]
async fn it_keeps_the_digest_so_that_bodies_can_be_compared() {
    let one = Desk::new();
    let two = one.beside();
    one.handle(Ask { digest: Some(5), ..ask(1) }).await;
    for (desk, round) in [(&one, 1), (&two, 1), (&two, 2)] {
        let claim = desk.near.claim(&KEY, &Ask { digest: Some(6), ..ask(2) }).await.unwrap();
        assert_eq!(claim, Claim::Done { digest: Some(5) }, "round {round}");
    }
    assert_eq!((one.near.hits(), two.near.hits()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn it_calls_nothing_done_that_the_store_has_not() {
    let desk = Desk::new();
    let claim = async |token| desk.near.claim(&KEY, &ask(token)).await.unwrap();
    assert!(matches!(claim(1).await, Claim::Acquired { .. }));
    assert!(matches!(claim(2).await, Claim::InProgress { .. }));
    // Not by an error, nor by a completion that was refused.
    desk.counter.fail_call(0, Fault::BeforeEffect);
    assert!(desk.near.complete(&KEY, run(1), HOUR).await.is_err());
    assert_eq!(desk.near.complete(&KEY, run(9), HOUR).await.unwrap(), Held::Lost);
    assert!(matches!(claim(2).await, Claim::InProgress { .. }));
    let failed = Release::Failed { not_before: Duration::ZERO };
    assert_eq!(desk.near.release(&KEY, run(1), failed).await.unwrap(), Held::Yes);
    assert_eq!(desk.near.complete(&KEY, run(1), HOUR).await.unwrap(), Held::Lost);
    assert!(matches!(claim(2).await, Claim::Acquired { attempt: 2, .. }));
    // Nor by a completion of a claim that was lost meanwhile.
    desk.store.forget(&KEY).await.unwrap();
    assert!(matches!(desk.store.claim(&KEY, &ask(8)).await.unwrap(), Claim::Acquired { .. }));
    assert_eq!(desk.near.complete(&KEY, run(2), HOUR).await.unwrap(), Held::Lost);
    assert!(matches!(claim(3).await, Claim::InProgress { .. }));
    desk.store.forget(&KEY).await.unwrap();
    assert!(matches!(claim(2).await, Claim::Acquired { .. }));
    let parked = Release::DeadLettered;
    assert_eq!(desk.near.release(&KEY, run(2), parked).await.unwrap(), Held::Yes);
    for _ in 0..2 {
        assert!(matches!(claim(3).await, Claim::Parked { .. }));
    }
    let other = desk.near.claim(&OTHER_KEY, &ask(1)).await.unwrap();
    assert!(matches!(other, Claim::Acquired { .. }));
    assert_eq!(desk.near.hits(), 0);
}

async fn remember(near: &NearCache, number: u128) -> DedupKey {
    let key = DedupKey::from_bytes(number.to_le_bytes());
    assert!(matches!(near.claim(&key, &ask(1)).await.unwrap(), Claim::Acquired { .. }));
    assert_eq!(near.complete(&key, run(1), HOUR).await.unwrap(), Held::Yes);
    key
}

/// How many of these are answered near by.
async fn near_by(near: &NearCache, numbers: std::ops::Range<u128>) -> u64 {
    let before = near.hits();
    for number in numbers {
        near.claim(&DedupKey::from_bytes(number.to_le_bytes()), &ask(2)).await.unwrap();
    }
    near.hits() - before
}

#[tokio::test(start_paused = true)]
async fn it_is_bounded() {
    let near = NearCache::new(MemoryStore::new()).with_capacity(100);
    for number in 0..10_000 {
        remember(&near, number).await;
    }
    let found = near_by(&near, 0..10_000).await;
    assert!(found <= 200, "{found} of 10,000 are remembered");
}

/// moka's own policy would refuse ids that nobody has asked for yet, in favour of popular ones.
#[tokio::test(start_paused = true)]
async fn a_full_cache_takes_new_ids_however_popular_the_old_ones_are() {
    let near = NearCache::new(MemoryStore::new()).with_capacity(100);
    for number in 0..100 {
        remember(&near, number).await;
    }
    for _ in 0..20 {
        near_by(&near, 0..100).await;
    }
    for number in 100..150 {
        remember(&near, number).await;
    }
    // Housekeeping comes with other calls.
    for other in 10_000..12_000_u128 {
        near.claim(&DedupKey::from_bytes(other.to_le_bytes()), &ask(1)).await.unwrap();
    }
    assert_eq!(near_by(&near, 100..150).await, 50);
}
