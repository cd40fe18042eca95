//! Cases: a redrive starts afresh, a forged generation does not.

use super::StoreFixture;
use super::claims::assert_busy;
use super::stage::{FAILED, GENERATION, Key, ME, OTHER, Stand, THIRD, Won, alone, ask};
use crate::dedup::protocol::{Ask, Before, Claim, Release};

const NEXT: u32 = GENERATION + 1;

/// What a claim of this generation is answered on a key that stands so.
async fn asked(fixture: &dyn StoreFixture, stand: Stand, ask: Ask) -> (Key, Claim) {
    let key = Key::new(fixture).await;
    stand.set(&key).await;
    let claim = key.claim_at_last(ask).await;
    (key, claim)
}

/// Exactly one generation above the record's is a redrive: attempt 1, nobody before, no backoff,
/// no permit needed.
pub async fn the_next_generation_starts_afresh(fixture: &dyn StoreFixture) {
    for stand in [Stand::Parked, Stand::Released, Stand::BackingOff, Stand::Suspect, Stand::Expired] {
        let key = Key::new(fixture).await;
        stand.set(&key).await;
        let last = key.record().await.run.fence;
        let next = Ask { generation: NEXT, ..ask(OTHER) };
        let won = match stand {
            Stand::Expired => key.acquire_at_last(next).await,
            // A backoff does not hold a redrive up.
            _ => key.acquire(next).await,
        };
        assert_eq!(won.told(), (1, Before::First), "{stand:?}");
        assert!(won.fence > last, "{stand:?}: fences grow");
        assert_eq!(key.record().await.generation, NEXT, "{stand:?}");
    }
}

/// More than one above is not believed, since headers can be forged: it counts as the record's own.
pub async fn a_generation_from_the_future_is_the_records_own(fixture: &dyn StoreFixture) {
    for generation in [NEXT + 1, u32::MAX] {
        let forged = Ask { generation, ..alone(OTHER) };
        for (stand, told) in [
            (Stand::Released, (3, Before::Failed)),
            (Stand::Suspect, (4, Before::Failed)),
            (Stand::Expired, (3, Before::Vanished)),
        ] {
            let (key, claim) = asked(fixture, stand, forged).await;
            let told_now = Won::of(claim).map(|won| won.told());
            assert_eq!(told_now, Some(told), "{stand:?}, generation {generation}: {claim:?}");
            assert_eq!(key.record().await.generation, GENERATION, "{stand:?}");
        }
        let (_, claim) = asked(fixture, Stand::Parked, forged).await;
        assert!(matches!(claim, Claim::Parked { .. }), "generation {generation}: {claim:?}");
    }
}

/// A lower generation is an older copy: it is answered as one of the record's own.
pub async fn an_older_generation_is_the_records_own(fixture: &dyn StoreFixture) {
    let older = Ask { generation: 0, ..alone(OTHER) };
    let (key, claim) = asked(fixture, Stand::Released, older).await;
    assert_eq!(Won::of(claim).map(|won| won.told()), Some((3, Before::Failed)), "{claim:?}");
    assert_eq!(key.record().await.generation, GENERATION, "the record's own generation stays");
    let (_, claim) = asked(fixture, Stand::Parked, older).await;
    assert!(matches!(claim, Claim::Parked { .. }), "{claim:?}");
}

/// The next generation disturbs nobody who holds the key, and does not undo what is done.
pub async fn a_redrive_disturbs_neither_a_holder_nor_what_is_done(fixture: &dyn StoreFixture) {
    let next = Ask { generation: NEXT, ..alone(OTHER) };
    let key = Key::new(fixture).await;
    Stand::Claimed.set(&key).await;
    assert_busy(key.claim(next).await, "it is held");
    key.finish(ME).await;
    let claim = key.claim(next).await;
    assert!(matches!(claim, Claim::Done { .. }), "{claim:?}");
    assert_eq!(key.record().await.generation, GENERATION);
}

/// The highest generation has no next one.
pub async fn the_highest_generation_does_not_overflow(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    let highest = |token| Ask { generation: u32::MAX, ..ask(token) };
    key.acquire(highest(ME)).await;
    assert_eq!(key.record().await.generation, u32::MAX, "a first claim's generation is the record's");
    key.give_up(ME, Release::DeadLettered).await;
    for copy in [highest(OTHER), Ask { generation: 0, ..ask(OTHER) }] {
        let claim = key.claim(copy).await;
        assert!(matches!(claim, Claim::Parked { .. }), "{claim:?}");
    }
}

/// A fresh start keeps nothing of what was before it but the order of fences.
pub async fn a_fresh_start_keeps_nothing(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    for token in 11..=13 {
        key.acquire(Ask { digest: Some(1), ..ask(token) }).await;
        key.give_up(token, Release::Interrupted).await;
    }
    let won = key.acquire(Ask { generation: NEXT, digest: Some(2), ..ask(ME) }).await;
    assert_eq!((won.told(), won.digest), ((1, Before::First), Some(2)), "the digest is the new message's");
    assert_eq!(key.record().await.interruptions, 0);
    key.give_up(ME, FAILED).await;
    // The row of interruptions starts anew as well.
    key.acquire(Ask { generation: NEXT, ..ask(OTHER) }).await;
    key.give_up(OTHER, Release::Interrupted).await;
    assert_eq!(key.acquire(Ask { generation: NEXT, ..ask(THIRD) }).await.attempt, 2, "it was free");
}
