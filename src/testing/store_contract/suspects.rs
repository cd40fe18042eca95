//! Cases: a key whose holder vanished is suspect, and suspects are claimed by the permit only.

use super::claims::assert_busy;
use super::stage::{FAILED, GENERATION, Key, ME, OTHER, RELEASES, Stand, THIRD, alone, ask};
use super::{LONG, StoreFixture};
use crate::dedup::protocol::{Ask, Before, Claim, Release};

/// A key that `OTHER` has taken over from a holder that vanished, and holds: attempt 2.
async fn taken_over(fixture: &dyn StoreFixture) -> Key {
    let key = Key::new(fixture).await;
    key.acquire(key.short(ask(THIRD))).await;
    key.pass().await;
    key.acquire_at_last(alone(OTHER)).await;
    key
}

/// An expired claim is not taken without the suspect permit: `Suspect`, and nothing changes.
pub async fn an_expired_claim_is_suspect(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(key.short(ask(ME))).await;
    key.pass().await;
    let record = key.snapshot().await;
    assert_eq!(key.claim_at_last(ask(OTHER)).await, Claim::Suspect);
    assert_eq!(key.inspect().await, record, "it is as it was");
    let won = key.acquire_at_last(alone(OTHER)).await;
    assert_eq!(won.told(), (2, Before::Vanished), "with the permit it is taken over");
    assert!(key.record().await.suspect, "whoever takes over marks the record");
}

/// The mark stays through every release.
pub async fn the_mark_stays_through_every_release(fixture: &dyn StoreFixture) {
    for why in RELEASES {
        let key = taken_over(fixture).await;
        key.give_up(OTHER, why).await;
        assert_eq!(key.claim(ask(ME)).await, Claim::Suspect, "{why:?}");
        key.acquire(alone(ME)).await;
        assert!(key.record().await.suspect, "{why:?}: also after the next claim");
        key.give_up(ME, FAILED).await;
        assert_eq!(key.claim(ask(THIRD)).await, Claim::Suspect, "{why:?}: and after its release");
    }
}

/// While a suspect is held or backs off, that is the answer.
pub async fn a_suspect_in_progress_is_in_progress(fixture: &dyn StoreFixture) {
    let key = taken_over(fixture).await;
    for copy in [ask(ME), alone(ME)] {
        assert_busy(key.claim(copy).await, "it is held");
    }
    key.give_up(OTHER, Release::Failed { not_before: LONG }).await;
    for copy in [ask(ME), alone(ME)] {
        assert_busy(key.claim(copy).await, "it backs off");
    }
}

/// The mark ends when the key is done or parked.
pub async fn the_mark_ends_with_done_and_parked(fixture: &dyn StoreFixture) {
    let done = taken_over(fixture).await;
    done.finish(OTHER).await;
    assert!(!done.record().await.suspect, "done");
    let parked = taken_over(fixture).await;
    parked.give_up(OTHER, Release::DeadLettered).await;
    assert!(!parked.record().await.suspect, "parked");
}

/// The mark ends with a fresh start, which needs no permit.
pub async fn the_mark_ends_with_a_fresh_start(fixture: &dyn StoreFixture) {
    for stand in [Stand::Suspect, Stand::Expired] {
        let key = Key::new(fixture).await;
        stand.set(&key).await;
        let won = key.acquire_at_last(Ask { generation: GENERATION + 1, ..ask(OTHER) }).await;
        assert_eq!(won.told(), (1, Before::First), "{stand:?}");
        assert!(!key.record().await.suspect, "{stand:?}");
    }
}

/// A holder that comes back in time makes nobody suspect.
pub async fn a_renewed_claim_is_not_suspect(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(key.short(ask(ME))).await;
    key.pass().await;
    assert_eq!(key.claim_at_last(ask(OTHER)).await, Claim::Suspect, "for now");
    key.give_up(ME, FAILED).await;
    assert!(!key.record().await.suspect);
    assert_eq!(key.acquire(ask(OTHER)).await.told(), (2, Before::Failed));
}
