//! Cases: only the holder renews, completes and releases, and is told when it is not.

use super::StoreFixture;
use super::claims::assert_busy;
use super::stage::{DEFERRED, FAILED, Key, ME, OTHER, RELEASES, Stand, alone, ask};
use crate::dedup::protocol::{Before, Fence, Held, Release, Run, Token};
use crate::testing::store_contract::LONG;

/// What a token may try with a key.
#[derive(Clone, Copy, Debug)]
enum Call {
    Renew,
    Complete,
    Release(Release),
}

impl Call {
    const ALL: [Self; 5] = [
        Self::Renew,
        Self::Complete,
        Self::Release(FAILED),
        Self::Release(DEFERRED),
        Self::Release(Release::DeadLettered),
    ];

    async fn by(self, token: u128, key: &Key) -> Held {
        match self {
            Self::Renew => key.renew(token, LONG).await,
            Self::Complete => key.complete(token).await,
            Self::Release(why) => key.release(token, why).await,
        }
    }
}

/// A call by a token that is not on record changes nothing, and says `Lost`: in every state.
async fn another_token_is_refused(fixture: &dyn StoreFixture, stand: Stand) {
    let key = Key::new(fixture).await;
    stand.set(&key).await;
    let record = key.snapshot().await;
    for call in Call::ALL {
        assert_eq!(call.by(99, &key).await, Held::Lost, "{stand:?}: {call:?} by another token");
        assert_eq!(key.inspect().await, record, "{stand:?}: {call:?} by another token changes nothing");
    }
}

/// Another token renews, completes and releases nothing that is claimed.
pub async fn another_token_changes_nothing_that_is_claimed(fixture: &dyn StoreFixture) {
    another_token_is_refused(fixture, Stand::Claimed).await;
}

/// Nor what is expired: it is still its holder's.
pub async fn another_token_changes_nothing_that_is_expired(fixture: &dyn StoreFixture) {
    another_token_is_refused(fixture, Stand::Expired).await;
}

/// Nor what is released, backing off or not, suspect or not.
pub async fn another_token_changes_nothing_that_is_released(fixture: &dyn StoreFixture) {
    for stand in [Stand::Released, Stand::BackingOff, Stand::Suspect] {
        another_token_is_refused(fixture, stand).await;
    }
}

/// Nor what is parked or done.
pub async fn another_token_changes_nothing_that_is_parked_or_done(fixture: &dyn StoreFixture) {
    for stand in [Stand::Parked, Stand::Done] {
        another_token_is_refused(fixture, stand).await;
    }
}

/// The token on record is answered as the state says; what is lost changes nothing.
pub async fn the_holder_is_answered_as_the_state_says(fixture: &dyn StoreFixture) {
    use Held::{Lost, Yes};
    let table = [
        // State, then the answer to: renew; complete; release.
        (Stand::Claimed, [Yes, Yes, Yes]),
        (Stand::Expired, [Yes, Yes, Yes]),
        (Stand::Released, [Lost, Lost, Yes]),
        (Stand::BackingOff, [Lost, Lost, Yes]),
        (Stand::Suspect, [Lost, Lost, Yes]),
        (Stand::Parked, [Lost, Lost, Yes]),
        (Stand::Done, [Lost, Yes, Lost]),
    ];
    for (stand, answers) in table {
        for (call, answer) in [Call::Renew, Call::Complete, Call::Release(FAILED)].into_iter().zip(answers) {
            let key = Key::new(fixture).await;
            stand.set(&key).await;
            let record = key.snapshot().await;
            assert_eq!(call.by(ME, &key).await, answer, "{stand:?}: {call:?} by the token on record");
            if answer == Lost {
                assert_eq!(key.inspect().await, record, "{stand:?}: {call:?} that is lost changes nothing");
            }
        }
    }
}

/// A claim whose lease has run out is still held until another claim takes it: its holder
/// renews, completes and releases it.
pub async fn an_expired_claim_is_held_until_it_is_taken(fixture: &dyn StoreFixture) {
    for call in Call::ALL {
        let key = Key::new(fixture).await;
        key.acquire(key.short(ask(ME))).await;
        key.pass().await;
        assert_eq!(call.by(ME, &key).await, Held::Yes, "{call:?} after the lease, which nobody took");
    }
    let key = Key::new(fixture).await;
    key.acquire(key.short(ask(ME))).await;
    key.pass().await;
    assert_eq!(key.renew(ME, LONG).await, Held::Yes);
    assert_busy(key.claim(alone(OTHER)).await, "it was renewed after its lease");
}

/// Once taken over, it is lost to its first holder, in whatever state the new one leaves it.
pub async fn a_claim_that_was_taken_over_is_lost(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(key.short(ask(ME))).await;
    key.pass().await;
    let taken = key.acquire_at_last(alone(OTHER)).await;
    assert_eq!(taken.told(), (2, Before::Vanished));
    for call in Call::ALL {
        assert_eq!(call.by(ME, &key).await, Held::Lost, "{call:?} by a zombie");
    }
    assert_busy(key.claim(ask(ME)).await, "a zombie's claim is one among others");
    key.finish(OTHER).await;
    for call in Call::ALL {
        assert_eq!(call.by(ME, &key).await, Held::Lost, "{call:?} by a zombie of a key that is done");
    }
}

/// The token proves ownership, and it alone: a wrong fence does no harm, the right one no good.
pub async fn the_token_alone_proves_ownership(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    let won = key.acquire(ask(ME)).await;
    let store = key.handle();
    let thief = Run { token: Token::from_bits(OTHER), fence: won.fence };
    for held in [
        store.renew(&key.id, thief, LONG).await,
        store.complete(&key.id, thief, LONG).await,
        store.release(&key.id, thief, FAILED).await,
    ] {
        assert_eq!(held.ok(), Some(Held::Lost), "the right fence with another token");
    }
    let wrong = Run { token: Token::from_bits(ME), fence: Fence(won.fence.0 + 1) };
    assert_eq!(store.renew(&key.id, wrong, LONG).await.ok(), Some(Held::Yes), "the token with a wrong fence");
    assert_eq!(key.record().await.run.fence, won.fence, "a wrong fence is not written down");
    assert_eq!(store.complete(&key.id, wrong, LONG).await.ok(), Some(Held::Yes));
    assert_eq!(key.record().await.run.fence, won.fence, "a wrong fence is not written down");
}

/// Nobody holds a key that was never claimed: `Gone`, and nothing comes of it.
pub async fn nothing_is_held_where_nothing_is_on_record(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    for call in [Call::Renew, Call::Release(FAILED), Call::Release(Release::DeadLettered)] {
        assert_eq!(call.by(ME, &key).await, Held::Gone, "{call:?}");
        assert_eq!(key.inspect().await, None, "{call:?} of nothing leaves nothing");
    }
    assert_eq!(key.acquire(ask(OTHER)).await.told(), (1, Before::First));
}

/// A release whose answer was lost is asked again: `Yes`, and nothing more comes of it.
pub async fn a_release_repeated_says_yes_and_changes_nothing(fixture: &dyn StoreFixture) {
    let backoffs =
        [Release::Failed { not_before: LONG }, Release::Deferred { not_before: LONG }, Release::DeadLettered];
    for why in RELEASES.into_iter().chain(backoffs) {
        let key = Key::new(fixture).await;
        key.acquire(ask(ME)).await;
        key.give_up(ME, why).await;
        let record = key.snapshot().await;
        for again in [why, FAILED, Release::DeadLettered] {
            assert_eq!(key.release(ME, again).await, Held::Yes, "{why:?}, then {again:?}");
            assert_eq!(key.inspect().await, record, "{why:?}, then {again:?}: nothing more");
        }
    }
}
