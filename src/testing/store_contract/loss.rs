//! Cases: lost records make ids run again, and suppress none; fences grow over everything.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::claims::assert_busy;
use super::stage::{FAILED, GENERATION, Key, ME, OTHER, Stand, THIRD, alone, ask, moment};
use super::{LONG, StoreFixture};
use crate::dedup::protocol::{Ask, Before, Claim, Fence, Held, Release, State};

/// A server that was restarted answers again after this long, or never.
const UP_AGAIN: Duration = Duration::from_secs(30);

/// Whatever a key's record was, once it is lost the key starts afresh.
pub async fn a_lost_record_suppresses_nothing(fixture: &dyn StoreFixture) {
    for stand in Stand::ALL {
        let key = Key::new(fixture).await;
        stand.set(&key).await;
        let last = key.record().await.run.fence;
        key.lose(fixture).await;
        let won = key.acquire_in_the_end(ask(OTHER)).await;
        assert_eq!(won.told(), (1, Before::First), "{stand:?}");
        assert!(won.fence > last, "{stand:?}: fence {:?} after {last:?}", won.fence);
    }
}

/// The holder of a lost record is told `Gone` by renew and release, and nothing comes of them.
pub async fn the_holder_of_a_lost_record_is_told(fixture: &dyn StoreFixture) {
    for stand in [Stand::Claimed, Stand::Released, Stand::Parked] {
        let key = Key::new(fixture).await;
        stand.set(&key).await;
        key.lose(fixture).await;
        assert_eq!(key.renew(ME, LONG).await, Held::Gone, "{stand:?}");
        assert_eq!(key.release(ME, FAILED).await, Held::Gone, "{stand:?}");
        assert_eq!(key.inspect().await, None, "{stand:?}: nothing comes of it");
    }
}

/// Complete of a lost record inserts `Done`, since the work is done, and says `Gone`, since the
/// holder knows whether its lease held.
pub async fn complete_of_a_lost_record_inserts_done(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    let won = key.acquire(ask(ME)).await;
    key.lose(fixture).await;
    assert_eq!(key.complete(ME).await, Held::Gone);
    let record = key.record().await;
    assert_eq!((record.state, record.run.fence), (State::Done, won.fence), "done, by the run that did it");
    let claim = key.claim(ask(OTHER)).await;
    assert!(matches!(claim, Claim::Done { .. }), "{claim:?}");
    assert_eq!(key.complete(ME).await, Held::Yes, "asked again by the same run");
    assert_eq!(key.complete(OTHER).await, Held::Lost, "asked by another");
}

/// What was inserted so is kept for the window, and not longer.
pub async fn what_a_lost_record_left_behind_ends_too(fixture: &dyn StoreFixture) {
    let key = Key::kept_briefly(fixture).await;
    let sent = Instant::now();
    assert_eq!(key.complete_for(ME, key.pace.short).await, Held::Gone, "there was never a record");
    assert_eq!(key.acquire_in_the_end(key.briefly(ask(OTHER))).await.told(), (1, Before::First));
    key.not_before(sent, key.pace.short, "a completed id ran again");
}

/// After a loss, a new holder's claim is safe from the old holder.
pub async fn the_holder_before_a_loss_does_not_disturb_the_next(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(ask(ME)).await;
    key.lose(fixture).await;
    key.acquire(ask(OTHER)).await;
    assert_eq!(key.renew(ME, LONG).await, Held::Lost);
    assert_eq!(key.release(ME, FAILED).await, Held::Lost);
    assert_eq!(key.complete(ME).await, Held::Lost);
    assert_busy(key.claim(ask(THIRD)).await, "the new holder's claim holds");
    key.finish(OTHER).await;
}

/// Each claim of a key has a higher fence than every one before: over release, takeover, redrive,
/// loss and forgetting.
pub async fn fences_only_grow(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    let mut fences: Vec<Fence> = Vec::new();
    fences.push(key.acquire(ask(1)).await.fence);
    key.give_up(1, FAILED).await;
    fences.push(key.acquire(ask(2)).await.fence);
    key.give_up(2, Release::NotStarted).await;
    fences.push(key.acquire(key.short(ask(3))).await.fence);
    key.pass().await;
    fences.push(key.acquire_at_last(alone(4)).await.fence);
    key.give_up(4, Release::DeadLettered).await;
    fences.push(key.acquire(Ask { generation: GENERATION + 1, ..ask(5) }).await.fence);
    key.lose(fixture).await;
    fences.push(key.acquire(ask(6)).await.fence);
    key.forget().await;
    fences.push(key.acquire(ask(7)).await.fence);
    key.finish(7).await;
    key.forget().await;
    fences.push(key.acquire_in_the_end(ask(8)).await.fence);
    assert!(fences.is_sorted_by(|one, next| one < next), "{fences:?}");
    assert_eq!(key.record().await.run.fence, fences[7], "the record has the last one");
}

/// A record of a format that this version does not know is an error for that key: neither done
/// nor a fresh start, and it stays as it is.
pub async fn a_record_of_an_unknown_version_is_an_error(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    if !fixture.write_unknown_version(&key.id).await {
        return;
    }
    let store = key.handle();
    for _ in 0..2 {
        let errors = [
            store.claim(&key.id, &alone(ME)).await.map(|answer| format!("{answer:?}")),
            store.renew(&key.id, key.run(ME), LONG).await.map(|answer| format!("{answer:?}")),
            store.complete(&key.id, key.run(ME), LONG).await.map(|answer| format!("{answer:?}")),
            store.release(&key.id, key.run(ME), FAILED).await.map(|answer| format!("{answer:?}")),
            store.inspect(&key.id).await.map(|answer| format!("{answer:?}")),
        ];
        for answer in errors {
            let Err(error) = answer else { panic!("an unknown version must be an error, not {answer:?}") };
            let text = error.to_string();
            assert!(text.contains("version"), "the error must say what it is: {text}");
            assert!(!text.contains(&key.id.to_string()), "no key in an error: {text}");
        }
    }
    let other = key.another();
    other.acquire(ask(ME)).await;
    key.lose(fixture).await;
    assert_eq!(key.acquire(ask(ME)).await.told(), (1, Before::First), "without it, the key is free");
}

/// Every record lost: ids run again, holders are told, nothing is suppressed, fences grow.
pub async fn after_the_loss_of_everything_all_runs_again(fixture: &dyn StoreFixture) {
    let stands = all_stands(fixture).await;
    let mut last = Vec::new();
    for (_, key) in &stands {
        last.push(key.record().await.run.fence);
    }
    if !fixture.lose_everything().await {
        return;
    }
    moment().await;
    for ((stand, key), last) in stands.iter().zip(last) {
        // A handle may answer from what it remembers of a key that was done.
        if *stand != Stand::Done {
            assert_eq!(key.renew(ME, LONG).await, Held::Gone, "{stand:?}");
        }
        let won = key.acquire_in_the_end(ask(OTHER)).await;
        assert_eq!(won.told(), (1, Before::First), "{stand:?}");
        assert!(won.fence > last, "{stand:?}: fence {:?} after {last:?}", won.fence);
        assert_eq!(key.complete(ME).await, Held::Lost, "{stand:?}: it has a new holder");
    }
}

/// Over a restart of the server, handles answer again by themselves, fences grow, and a store that
/// [survives it](crate::dedup::StoreFeatures::survives_restart) has lost nothing.
pub async fn a_restart_keeps_what_the_store_promises(fixture: &dyn StoreFixture) {
    let stands = all_stands(fixture).await;
    let mut before = Vec::new();
    for (_, key) in &stands {
        before.push(key.record().await);
    }
    if !fixture.restart().await {
        return;
    }
    for ((stand, key), before) in stands.iter().zip(before) {
        answers_again(key).await;
        if key.handle().features().survives_restart {
            assert_eq!(key.inspect().await, Some(before), "{stand:?} survives");
        }
        if *stand == Stand::Claimed && key.inspect().await.is_some() {
            assert_eq!(key.renew(ME, LONG).await, Held::Yes, "the holder still holds");
            key.give_up(ME, FAILED).await;
        }
        if let Some(record) = key.inspect().await
            && record.state == State::Done
        {
            let claim = key.claim(ask(OTHER)).await;
            assert!(matches!(claim, Claim::Done { .. }), "{claim:?}");
            key.forget().await;
        }
        let next = Ask { generation: GENERATION + 1, ..alone(OTHER) };
        let won = key.acquire_in_the_end(next).await;
        assert!(won.fence > before.run.fence, "{stand:?}: fence {:?} after {before:?}", won.fence);
    }
}

/// A key in each state.
async fn all_stands(fixture: &dyn StoreFixture) -> Vec<(Stand, Key)> {
    let mut keys = Vec::new();
    for stand in Stand::ALL {
        let key = Key::new(fixture).await;
        stand.set(&key).await;
        keys.push((stand, key));
    }
    keys
}

/// Waits until both handles answer, by themselves.
async fn answers_again(key: &Key) {
    let give_up_at = Instant::now() + UP_AGAIN;
    for handle in [key.handle(), key.handle()] {
        while let Err(error) = handle.inspect(&key.id).await {
            assert!(Instant::now() < give_up_at, "a handle must reconnect by itself: {error:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}
