//! Cases: what each way to give a claim up leaves for the next one.

use std::time::Duration;

use tokio::time::Instant;

use super::claims::assert_busy;
use super::stage::{DEFERRED, FAILED, GENERATION, Key, ME, OTHER, RELEASES, THIRD, alone, ask};
use super::{LONG, StoreFixture};
use crate::dedup::protocol::{Ask, Before, Claim, FREE_INTERRUPTIONS, Held, Release};

/// How often a case may find that the machine was slow, and begin anew.
const TRIES: u32 = 50;

/// A key on which two attempts have failed, and nobody holds.
async fn failed_twice(fixture: &dyn StoreFixture) -> Key {
    let key = Key::new(fixture).await;
    for token in [OTHER, THIRD] {
        key.acquire(ask(token)).await;
        key.give_up(token, FAILED).await;
    }
    key
}

/// A failed attempt counts.
pub async fn a_failed_attempt_counts(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    for nth in 1..=4 {
        let before = if nth == 1 { Before::First } else { Before::Failed };
        assert_eq!(key.acquire(ask(nth.into())).await.told(), (nth, before));
        key.give_up(nth.into(), FAILED).await;
    }
}

/// A vanished holder's attempt counts.
pub async fn a_vanished_attempt_counts(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(key.short(ask(1))).await;
    for nth in 2..=3 {
        key.pass().await;
        let won = key.acquire_at_last(key.short(alone(nth.into()))).await;
        assert_eq!(won.told(), (nth, Before::Vanished));
    }
}

/// A deferral gives its attempt back, and the next one is told that it was handed back.
pub async fn a_deferral_gives_its_attempt_back(fixture: &dyn StoreFixture) {
    let key = failed_twice(fixture).await;
    for token in 11..14 {
        let before = if token == 11 { Before::Failed } else { Before::HandedBack };
        assert_eq!(key.acquire(ask(token)).await.told(), (3, before));
        key.give_up(token, DEFERRED).await;
    }
}

/// Given up before the handler started, everything is as it was before the claim.
pub async fn not_started_restores_the_attempt_and_what_was_before(fixture: &dyn StoreFixture) {
    let new = Key::new(fixture).await;
    for token in 11..14 {
        assert_eq!(new.acquire(ask(token)).await.told(), (1, Before::First));
        new.give_up(token, Release::NotStarted).await;
    }
    let key = failed_twice(fixture).await;
    for token in 11..14 {
        assert_eq!(key.acquire(ask(token)).await.told(), (3, Before::Failed));
        key.give_up(token, Release::NotStarted).await;
    }
    let vanished = Key::new(fixture).await;
    vanished.acquire(vanished.short(ask(ME))).await;
    vanished.pass().await;
    for token in 11..14 {
        let won = vanished.acquire_at_last(alone(token)).await;
        assert_eq!(won.told(), (2, Before::Vanished));
        vanished.give_up(token, Release::NotStarted).await;
    }
}

/// An interruption gives its attempt back, three times in a row; then it counts.
pub async fn interruptions_are_free_three_times_in_a_row(fixture: &dyn StoreFixture) {
    let key = failed_twice(fixture).await;
    let mut token = 10;
    for expected in [3, 3, 3, 3, 4, 5] {
        token += 1;
        assert_eq!(key.acquire(ask(token)).await.attempt, expected, "interruption {}", token - 10);
        key.give_up(token, Release::Interrupted).await;
    }
    let won = key.acquire(ask(ME)).await;
    assert_eq!(won.told(), (6, Before::HandedBack));
}

/// A failure or a deferral between interruptions ends the row; `NotStarted` neither ends nor
/// lengthens it.
pub async fn a_failure_between_interruptions_ends_the_row(fixture: &dyn StoreFixture) {
    for (between, attempt) in [(FAILED, 2), (DEFERRED, 1), (Release::NotStarted, 1)] {
        let key = Key::new(fixture).await;
        let mut token = 10;
        for why in [Release::Interrupted, Release::Interrupted, between] {
            token += 1;
            key.acquire(ask(token)).await;
            key.give_up(token, why).await;
        }
        let free = if between == Release::NotStarted { FREE_INTERRUPTIONS - 2 } else { FREE_INTERRUPTIONS };
        for _ in 0..free {
            token += 1;
            assert_eq!(key.acquire(ask(token)).await.attempt, attempt, "after {between:?}: free");
            key.give_up(token, Release::Interrupted).await;
        }
        key.acquire(ask(OTHER)).await;
        key.give_up(OTHER, Release::Interrupted).await;
        assert_eq!(key.acquire(ask(ME)).await.attempt, attempt + 1, "after {between:?}: counted");
    }
}

/// Dead-lettered, it is parked: nobody gets it, of its own generation or a lower one.
pub async fn a_dead_letter_is_parked(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(ask(ME)).await;
    key.give_up(ME, Release::DeadLettered).await;
    for generation in [0, GENERATION - 1, GENERATION] {
        for token in [ME, OTHER] {
            let claim = key.claim(Ask { generation, ..alone(token) }).await;
            assert!(matches!(claim, Claim::Parked { .. }), "generation {generation}: {claim:?}");
        }
    }
    assert_eq!(key.complete(ME).await, Held::Lost, "what is parked is not done");
}

/// Before its backoff is over, nobody gets the key, whoever asks; then the next one does.
pub async fn a_backoff_is_never_short_and_ends(fixture: &dyn StoreFixture) {
    let pace = fixture.pace();
    for (why, told) in [
        (Release::Failed { not_before: pace.short }, (2, Before::Failed)),
        (Release::Deferred { not_before: pace.short }, (1, Before::HandedBack)),
    ] {
        let key = Key::new(fixture).await;
        key.acquire(ask(ME)).await;
        let sent = Instant::now();
        key.give_up(ME, why).await;
        let won = key.acquire_at_last(ask(OTHER)).await;
        key.not_before(sent, pace.short, "a backoff was skipped");
        assert_eq!(won.told(), told);
    }
}

/// While it backs off, a copy is told for how long: with the suspect permit too.
pub async fn a_copy_neither_skips_the_backoff_nor_burns_attempts(fixture: &dyn StoreFixture) {
    for why in [Release::Failed { not_before: LONG }, Release::Deferred { not_before: LONG }] {
        let key = Key::new(fixture).await;
        key.acquire(ask(ME)).await;
        let sent = Instant::now();
        key.give_up(ME, why).await;
        let attempt = key.record().await.attempt;
        for copy in [ask(OTHER), alone(OTHER), ask(ME)] {
            let left = assert_busy(key.claim(copy).await, "it backs off");
            assert!(left <= LONG + key.pace.late, "no longer than the backoff: {left:?}");
            key.not_before(sent, LONG.saturating_sub(left), "`left` must not say less than there is");
        }
        assert_eq!(key.record().await.attempt, attempt, "copies burn no attempts");
    }
}

/// The retention counts from the end of a backoff or a deferral, however much longer than the retention that is: when the
/// message comes back, its attempts are counted on, and a suspect is one.
pub async fn attempts_and_the_suspect_mark_survive_a_deferral_longer_than_the_retention(
    fixture: &dyn StoreFixture,
) {
    let pace = fixture.pace();
    if pace.one_window {
        return;
    }
    let delay = 2 * pace.short;
    for (why, told) in [
        (Release::Failed { not_before: delay }, (3, Before::Failed)),
        (Release::Deferred { not_before: delay }, (2, Before::HandedBack)),
    ] {
        assert_eq!(comes_back_in_time(fixture, why, delay).await, told, "after {why:?}");
    }
}

/// As [`comes_back`], on a machine that is not always slow.
async fn comes_back_in_time(fixture: &dyn StoreFixture, why: Release, delay: Duration) -> (u32, Before) {
    for _ in 0..TRIES {
        if let Some(told) = comes_back(fixture, why, delay).await {
            return told;
        }
    }
    panic!("after {why:?}: each time the record was gone, as if the machine were slow, {TRIES} times");
}

/// What is told to who claims a suspect after this release. `None`: the machine was slow, and the record was rightly gone.
async fn comes_back(fixture: &dyn StoreFixture, why: Release, delay: Duration) -> Option<(u32, Before)> {
    let key = Key::new(fixture).await;
    key.acquire(key.short(ask(THIRD))).await;
    key.pass().await;
    // Without a renewal for as long as it is kept, the claim itself would be gone.
    key.acquire_at_last(Ask { retain: key.pace.short, ..alone(OTHER) }).await;
    let sent = Instant::now();
    key.give_up(OTHER, why).await;
    let claim = key.claim_at_last(ask(ME)).await;
    if let Claim::Acquired { .. } = claim {
        key.not_before(sent, delay + key.pace.short, "attempts and mark were forgotten");
        return None;
    }
    assert_eq!(claim, Claim::Suspect, "{why:?}");
    let won = key.acquire_at_last(alone(ME)).await;
    if won.before == Before::First {
        key.not_before(sent, delay + key.pace.short, "attempts and mark were forgotten");
        return None;
    }
    Some(won.told())
}

/// Without a backoff, a released key is free at once.
pub async fn a_key_released_without_a_backoff_is_free_at_once(fixture: &dyn StoreFixture) {
    for why in RELEASES {
        let key = Key::new(fixture).await;
        key.acquire(ask(ME)).await;
        key.give_up(ME, why).await;
        key.acquire(ask(OTHER)).await;
    }
}
