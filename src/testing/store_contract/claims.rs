//! Cases: one holder at a time, and a claim repeated is the same claim.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::stage::{FAILED, Key, ME, OTHER, RELEASES, Stand, THIRD, Won, alone, answered, ask, fresh_key};
use super::{LONG, StoreFixture};
use crate::dedup::protocol::{Ask, Before, Claim, Held, Release, Run};

/// Of any number of claims of a free key at once, over several handles, exactly one is acquired;
/// all others are told that it is in progress.
pub async fn of_a_thousand_claims_one_wins(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    let stores = [fixture.open().await, fixture.open().await, fixture.open().await, fixture.open().await];
    let mut claims = JoinSet::new();
    for (number, store) in (1_u128..).zip(stores.iter().cycle().take(key.pace.crowd)) {
        let (store, key) = (store.clone(), key.id);
        claims.spawn(async move { answered("claim", store.claim(&key, &ask(number)).await) });
    }
    let (won, told): (Vec<_>, Vec<_>) =
        claims.join_all().await.into_iter().partition(|claim| Won::of(*claim).is_some());
    assert_eq!(won.len(), 1, "of {} claims at once one must win: {won:?}", key.pace.crowd);
    for claim in told {
        assert!(matches!(claim, Claim::InProgress { .. }), "a loser must be told InProgress, not {claim:?}");
    }
    assert_eq!(key.record().await.attempt, 1, "one attempt is counted");
}

/// Workers that claim, fail and claim again never hold the key two at a time, and each win is
/// counted once.
pub async fn of_all_that_claim_and_fail_one_holds_at_a_time(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    let mut workers = JoinSet::new();
    for worker in 1..=4_u128 {
        let (store, key) = (fixture.open().await, key.id);
        workers.spawn(async move {
            let mut wins: Vec<Won> = Vec::new();
            for round in 0..25 {
                let ask = ask(worker << 32 | round);
                let Some(won) = Won::of(answered("claim", store.claim(&key, &ask).await)) else { continue };
                let run = Run { token: ask.token, fence: won.fence };
                let held = answered("release", store.release(&key, run, FAILED).await);
                assert_eq!(held, Held::Yes, "the holder releases, and nobody else holds");
                wins.push(won);
            }
            wins
        });
    }
    let mut wins = workers.join_all().await.concat();
    wins.sort_by_key(|won| won.attempt);
    assert!((1..).zip(&wins).all(|(nth, won)| won.attempt == nth), "each win is counted once: {wins:?}");
    assert!(wins.is_sorted_by(|one, next| one.fence < next.fence), "fences grow with the attempts: {wins:?}");
    let counted = usize::try_from(key.record().await.attempt);
    assert_eq!(counted, Ok(wins.len()), "each win is on record");
}

/// The first claim of a key is attempt 1, before which there was nobody.
pub async fn the_first_claim_is_the_first_attempt(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    let won = key.acquire(ask(ME)).await;
    assert_eq!(won.told(), (1, Before::First));
    assert_eq!(won.digest, None, "no digest was asked with");
}

/// A claim whose answer was lost is asked again with its token: the same fence, attempt and
/// `before`, counted once.
pub async fn a_claim_repeated_with_its_token_counts_once(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(ask(THIRD)).await;
    key.give_up(THIRD, FAILED).await;
    let first = key.acquire(ask(ME)).await;
    assert_eq!(first.told(), (2, Before::Failed));
    for _ in 0..3 {
        assert_eq!(key.acquire(ask(ME)).await, first, "the same claim has the same answer");
    }
    assert_eq!(key.record().await.attempt, 2, "it is counted once");
}

/// A claim repeated by its holder sets the deadline anew.
pub async fn a_claim_repeated_sets_the_deadline_anew(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(key.short(ask(ME))).await;
    key.acquire(ask(ME)).await;
    key.pass().await;
    assert_busy(key.claim(alone(OTHER)).await, "its second lease holds");
}

/// So it does after its lease has run out, as long as nobody took the key.
pub async fn an_expired_claim_is_claimed_again_by_its_token(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    let first = key.acquire(key.short(ask(ME))).await;
    key.pass().await;
    assert_eq!(key.acquire(ask(ME)).await, first, "expired and not taken, it is the same claim");
    assert_busy(key.claim(alone(OTHER)).await, "its second lease holds");
    assert!(!key.record().await.suspect, "its own holder is nobody who vanished");
}

/// While a claim is held, others are told for how long at most.
pub async fn a_held_key_is_in_progress_for_the_rest_of_its_lease(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    let sent = Instant::now();
    key.acquire(ask(ME)).await;
    for other in [ask(OTHER), alone(OTHER)] {
        let claim = key.claim(other).await;
        let left = assert_busy(claim, "it is held");
        assert!(left <= LONG + key.pace.late, "no longer than the lease: {left:?}");
        key.not_before(sent, LONG.saturating_sub(left), "`left` must not say less than there is");
    }
}

/// The end of a claim's lease is never before its time, and comes.
pub async fn a_lease_is_never_short_and_ends(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    let sent = Instant::now();
    key.acquire(key.short(ask(ME))).await;
    let won = key.acquire_at_last(alone(OTHER)).await;
    key.not_before(sent, key.pace.short, "a lease was taken over");
    assert_eq!(won.told(), (2, Before::Vanished));
}

/// A renewal holds the key from its own instant on: longer, or shorter if it says so.
pub async fn a_renewal_holds_from_its_own_instant(fixture: &dyn StoreFixture) {
    let longer = Key::new(fixture).await;
    longer.acquire(longer.short(ask(ME))).await;
    assert_eq!(longer.renew(ME, LONG).await, Held::Yes);
    longer.pass().await;
    assert_busy(longer.claim(alone(OTHER)).await, "it was renewed");

    let shorter = Key::new(fixture).await;
    shorter.acquire(ask(ME)).await;
    let sent = Instant::now();
    assert_eq!(shorter.renew(ME, shorter.pace.short).await, Held::Yes);
    shorter.acquire_at_last(alone(OTHER)).await;
    shorter.not_before(sent, shorter.pace.short, "a renewed lease was taken over");
}

/// A claim by a token that released the key comes too late: it is not a new one.
pub async fn a_run_that_released_does_not_claim_again(fixture: &dyn StoreFixture) {
    for why in RELEASES {
        let key = Key::new(fixture).await;
        key.acquire(ask(ME)).await;
        key.give_up(ME, why).await;
        let record = key.snapshot().await;
        assert_busy(key.claim(ask(ME)).await, "a late claim of a run that has ended");
        assert_eq!(key.inspect().await, record, "{why:?}: a late claim changes nothing");
        key.acquire(ask(OTHER)).await;
    }
}

/// A claim that is refused changes nothing on record, whatever state the key is in.
pub async fn a_refused_claim_changes_nothing(fixture: &dyn StoreFixture) {
    let refused = [
        (Stand::Claimed, alone(OTHER)),
        (Stand::Expired, ask(OTHER)),
        (Stand::BackingOff, alone(OTHER)),
        (Stand::Suspect, ask(OTHER)),
        (Stand::Parked, alone(OTHER)),
        (Stand::Done, alone(OTHER)),
    ];
    for (stand, ask) in refused {
        let key = Key::new(fixture).await;
        stand.set(&key).await;
        let record = key.snapshot().await;
        let claim = key.claim(Ask { digest: Some(7), ..ask }).await;
        assert!(Won::of(claim).is_none(), "{stand:?}: {claim:?}");
        assert_eq!(key.inspect().await, record, "{stand:?}: a claim answered {claim:?} changes nothing");
    }
}

/// What one handle does, another sees at once.
pub async fn a_second_handle_sees_what_the_first_did(fixture: &dyn StoreFixture) {
    let (one, two) = (fixture.open().await, fixture.open().await);
    let key = fresh_key();
    let won = Won::of(answered("claim", one.claim(&key, &ask(ME)).await));
    let Some(won) = won else { panic!("a new key must be acquired") };
    let seen = answered("inspect", two.inspect(&key).await).map(|record| record.run.fence);
    assert_eq!(seen, Some(won.fence));
    let run = Run { token: ask(ME).token, fence: won.fence };
    assert_busy(answered("claim", two.claim(&key, &ask(OTHER)).await), "it is held over the other handle");
    assert_eq!(answered("renew", two.renew(&key, run, LONG).await), Held::Yes);
    assert_eq!(answered("release", two.release(&key, run, Release::NotStarted).await), Held::Yes);
    assert!(Won::of(answered("claim", one.claim(&key, &ask(OTHER)).await)).is_some(), "it was released");
    let late = answered("complete", two.complete(&key, run, LONG).await);
    assert_eq!(late, Held::Lost, "it is held over the other handle");
}

/// How long it is in progress; panics if it is not.
pub(super) fn assert_busy(claim: Claim, why: &str) -> Duration {
    match claim {
        Claim::InProgress { left, .. } => left,
        other => panic!("{why}: it must be in progress, not {other:?}"),
    }
}
