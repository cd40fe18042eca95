//! Cases: what is done is done for the window, for everybody, and not longer.

use std::time::Duration;

use tokio::time::Instant;

use super::claims::assert_busy;
use super::stage::{FAILED, GENERATION, Key, ME, OTHER, THIRD, alone, ask};
use super::{LONG, StoreFixture};
use crate::dedup::protocol::{Ask, Before, Claim, Held, Release, State};

/// Within the window every claim is answered `Done`: of any token, its own too, of any
/// generation, with the permit or without.
pub async fn what_is_done_is_done_for_everybody(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(ask(ME)).await;
    key.finish(ME).await;
    for token in [ME, OTHER, THIRD] {
        for generation in [0, GENERATION, GENERATION + 1, GENERATION + 2, u32::MAX] {
            for alone in [false, true] {
                let claim = key.claim(Ask { generation, alone, ..ask(token) }).await;
                assert!(matches!(claim, Claim::Done { .. }), "generation {generation}: {claim:?}");
            }
        }
    }
}

/// A complete whose answer was lost is asked again: `Yes`, and the window is the first one's.
pub async fn a_complete_repeated_says_yes(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(ask(ME)).await;
    key.finish(ME).await;
    let record = key.snapshot().await;
    for _ in 0..3 {
        key.finish(ME).await;
    }
    assert_eq!(key.inspect().await, record, "the window is counted from the first time");
}

/// The window is never short, and ends: then the key starts afresh, with a higher fence.
pub async fn a_window_is_never_short_and_ends(fixture: &dyn StoreFixture) {
    let key = Key::kept_briefly(fixture).await;
    let first = key.acquire(Ask { lease: LONG, ..key.briefly(ask(ME)) }).await;
    let sent = Instant::now();
    // On a slow machine the claim's own time may be over by now: then there is nothing left to see.
    let held = key.complete_for(ME, key.pace.short).await;
    assert!(held == Held::Yes || key.pace.one_window, "the lease holds: {held:?}");
    let again = key.acquire_in_the_end(key.briefly(ask(OTHER))).await;
    key.not_before(sent, key.pace.short, "a completed id ran again");
    assert_eq!(again.told(), (1, Before::First), "past its window there is nothing before it");
    assert!(again.fence > first.fence, "but fences grow: {:?} after {:?}", again.fence, first.fence);
}

/// It is the window of `complete` that counts, not what the claim asked for.
pub async fn the_window_is_the_completes(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    if key.pace.one_window {
        return;
    }
    key.acquire(Ask { retain: key.pace.short, ..ask(ME) }).await;
    key.finish(ME).await;
    key.pass().await;
    let claim = key.claim(ask(OTHER)).await;
    assert!(matches!(claim, Claim::Done { .. }), "a long window after a short claim: {claim:?}");

    let key = key.another();
    key.acquire(ask(ME)).await;
    let sent = Instant::now();
    assert_eq!(key.complete_for(ME, key.pace.short).await, Held::Yes);
    assert_eq!(key.acquire_in_the_end(ask(OTHER)).await.told(), (1, Before::First));
    key.not_before(sent, key.pace.short, "a completed id ran again");
}

/// A record is kept for its time from its last change, whatever that was, or from the end of its backoff; then nothing is
/// left of it, and the key starts afresh.
pub async fn every_record_is_kept_from_its_last_change(fixture: &dyn StoreFixture) {
    let short = fixture.pace().short;
    let backoff = if fixture.pace().one_window { Duration::ZERO } else { short };
    let endings = [
        (None, short),
        (Some(FAILED), short),
        (Some(Release::Failed { not_before: backoff }), backoff + short),
        (Some(Release::Deferred { not_before: backoff }), backoff + short),
        (Some(Release::Interrupted), short),
        (Some(Release::DeadLettered), short),
    ];
    for (ending, due) in endings {
        let key = Key::kept_briefly(fixture).await;
        key.acquire(key.briefly(ask(ME))).await;
        let sent = Instant::now();
        let held = match ending {
            None => key.renew(ME, key.pace.short).await,
            Some(why) => key.release(ME, why).await,
        };
        if held == Held::Gone {
            // On a slow machine it can be past its time already.
            continue;
        }
        key.vanishes().await;
        key.not_before(sent, due, "a record vanished");
        assert_eq!(key.acquire(key.briefly(ask(OTHER))).await.told(), (1, Before::First), "{ending:?}");
    }
}

/// A record past its time holds nothing: its holder is told `Gone`.
pub async fn past_its_time_a_claim_is_gone(fixture: &dyn StoreFixture) {
    let key = Key::kept_briefly(fixture).await;
    key.acquire(key.briefly(ask(ME))).await;
    key.vanishes().await;
    assert_eq!(key.renew(ME, key.pace.short).await, Held::Gone);
    assert_eq!(key.release(ME, FAILED).await, Held::Gone);
    assert_eq!(key.complete_for(ME, key.pace.short).await, Held::Gone, "but the work is done");
    let record = key.inspect().await;
    assert!(record.is_none_or(|record| record.state == State::Done), "and that is kept: {record:?}");
}

/// A claim is kept to the end of its lease, and a backoff to its own, however short the window is.
pub async fn a_window_shorter_than_the_lease_cuts_nothing_short(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    if key.pace.one_window {
        return;
    }
    let briefly = |token| Ask { retain: Duration::from_millis(1), ..alone(token) };
    key.acquire(briefly(ME)).await;
    key.pass().await;
    assert_busy(key.claim(briefly(OTHER)).await, "the lease holds");
    key.give_up(ME, Release::Failed { not_before: LONG }).await;
    key.pass().await;
    assert_busy(key.claim(briefly(OTHER)).await, "the backoff holds");
}

/// A time of zero is one that ends, not one without end.
pub async fn a_time_of_zero_ends(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(Ask { lease: Duration::ZERO, ..ask(ME) }).await;
    let won = key.acquire_at_last(alone(OTHER)).await;
    assert_eq!(won.told(), (2, Before::Vanished), "a lease of zero");
    assert_eq!(key.renew(OTHER, Duration::ZERO).await, Held::Yes);
    assert_eq!(key.acquire_at_last(alone(THIRD)).await.attempt, 3, "a renewal for zero");
    if key.pace.one_window {
        return;
    }
    let key = key.another();
    key.acquire(Ask { retain: Duration::ZERO, ..ask(ME) }).await;
    assert_eq!(key.complete_for(ME, Duration::ZERO).await, Held::Yes);
    assert_eq!(key.acquire_in_the_end(ask(OTHER)).await.told(), (1, Before::First), "a window of zero");
}

/// Lengths at which a count of milliseconds, microseconds or seconds overflows or turns negative
/// somewhere, alone or added to a clock.
const LONGEST: [Duration; 8] = [
    Duration::from_millis(1 << 31),
    Duration::from_millis(1 << 32),
    Duration::from_secs(1 << 32),
    Duration::from_micros(1 << 53),
    Duration::from_micros(1 << 63),
    Duration::from_micros(u64::MAX),
    Duration::from_millis(1 << 63),
    Duration::MAX,
];

/// Times as long as can be are taken, and hold: nothing overflows.
pub async fn the_longest_times_are_taken(fixture: &dyn StoreFixture) {
    let base = Key::new(fixture).await;
    for length in LONGEST.map(|length| length.min(base.pace.longest)) {
        let retain = if base.pace.one_window { LONG } else { length };
        let key = base.another();
        key.acquire(Ask { lease: length, retain, ..ask(ME) }).await;
        assert_busy(key.claim(alone(OTHER)).await, "claimed for long");
        assert_eq!(key.renew(ME, length).await, Held::Yes);
        assert_busy(key.claim(alone(OTHER)).await, "renewed for long");
        key.give_up(ME, Release::Deferred { not_before: length }).await;
        assert_busy(key.claim(alone(OTHER)).await, "backing off for long");

        let key = base.another();
        key.acquire(Ask { retain, ..ask(ME) }).await;
        assert_eq!(key.complete_for(ME, retain).await, Held::Yes);
        key.pass().await;
        let claim = key.claim(ask(OTHER)).await;
        assert!(matches!(claim, Claim::Done { .. }), "done for {retain:?}: {claim:?}");
    }
}
