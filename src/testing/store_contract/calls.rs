//! Cases: inspect, forget, and calls that are given up half-way.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use super::claims::assert_busy;
use super::stage::{FAILED, GENERATION, Key, ME, OTHER, Stand, THIRD, alone, answered, ask};
use super::{LONG, StoreFixture};
use crate::dedup::protocol::{Ask, Before, Claim, Held, Record, Release, State};

/// Inspect shows the record that the rules make of what was done.
pub async fn inspect_shows_what_is_on_record(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    assert_eq!(key.inspect().await, None, "nothing yet");
    let won = key.acquire(Ask { digest: Some(9), ..ask(ME) }).await;
    let claimed = key.record().await;
    assert_eq!(claimed.run, key.run(ME));
    assert_eq!(claimed.run.fence, won.fence);
    assert_eq!((claimed.attempt, claimed.before), (1, Before::First));
    assert!(matches!(claimed.state, State::Claimed { .. }), "{claimed:?}");
    assert_eq!((claimed.generation, claimed.digest), (GENERATION, Some(9)));
    assert_eq!((claimed.suspect, claimed.interruptions), (false, 0));

    key.give_up(ME, Release::Interrupted).await;
    let released = key.record().await;
    assert!(matches!(released.state, State::Released { .. }), "{released:?}");
    assert_eq!((released.attempt, released.before, released.interruptions), (0, Before::HandedBack, 1));
    assert_eq!(released.run, claimed.run, "it keeps its last holder");

    key.acquire(ask(OTHER)).await;
    key.finish(OTHER).await;
    let done = key.record().await;
    assert_eq!((done.state, done.run), (State::Done, key.run(OTHER)));
    assert_eq!((done.attempt, done.digest), (1, Some(9)));
}

/// Inspect changes nothing, in whatever state the key is, and says the same again.
pub async fn inspect_changes_nothing(fixture: &dyn StoreFixture) {
    for stand in Stand::ALL {
        let key = Key::new(fixture).await;
        stand.set(&key).await;
        let seen: Vec<Option<Record>> = vec![key.snapshot().await, key.snapshot().await, key.inspect().await];
        assert!(seen[0].is_some() && seen[0] == seen[1] && seen[1] == seen[2], "{stand:?}: {seen:?}");
    }
}

/// Forget says whether there was anything, and leaves nothing: the next claim starts afresh.
pub async fn forget_says_whether_there_was_anything(fixture: &dyn StoreFixture) {
    let new = Key::new(fixture).await;
    assert!(!new.forget().await, "there was nothing");
    for stand in Stand::ALL {
        let key = Key::new(fixture).await;
        stand.set(&key).await;
        assert!(key.forget().await, "{stand:?} was there");
        assert_eq!(key.inspect().await, None, "{stand:?} is gone");
        assert!(!key.forget().await, "{stand:?} is gone");
        let won = key.acquire_in_the_end(ask(OTHER)).await;
        assert_eq!(won.told(), (1, Before::First), "{stand:?}");
    }
}

/// The holder of a forgotten key is told so.
pub async fn the_holder_of_a_forgotten_key_is_told(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(ask(ME)).await;
    assert!(key.forget().await);
    assert_eq!(key.renew(ME, LONG).await, Held::Gone);
    assert_eq!(key.release(ME, FAILED).await, Held::Gone);
    assert_eq!(key.complete(ME).await, Held::Gone, "but its work is done");
    let claim = key.claim(ask(OTHER)).await;
    assert!(matches!(claim, Claim::Done { .. }), "{claim:?}");
}

/// Polls a call this many times, then drops it; `Some` if it ended before.
async fn cut_short<T>(call: impl Future<Output = T>, polls: usize) -> Option<T> {
    let (mut call, mut polled) = (pin!(call), 0);
    poll_fn(|cx| {
        if polled == polls {
            return Poll::Ready(None);
        }
        polled += 1;
        call.as_mut().poll(cx).map(Some)
    })
    .await
}

/// A call that is dropped half-way has happened or not: asked again with the same token, it has
/// its one effect, and the handle is as good as before.
pub async fn a_call_that_is_dropped_does_no_harm(fixture: &dyn StoreFixture) {
    for polls in 0..6 {
        for handle in 0..2 {
            let key = Key::new(fixture).await;
            if handle == 1 {
                key.handle();
            }
            let (store, first) = (key.handle().clone(), ask(ME));
            let _ = cut_short(store.claim(&key.id, &first), polls).await;
            let won = key.acquire(first).await;
            assert_eq!(won.told(), (1, Before::First), "dropped after {polls} polls, a claim counts once");
            let run = key.run(ME);
            let _ = cut_short(store.renew(&key.id, run, LONG), polls).await;
            assert_busy(key.claim(alone(OTHER)).await, "renewed or not, it is held");
            let _ = cut_short(store.release(&key.id, run, FAILED), polls).await;
            key.give_up(ME, FAILED).await;
            assert_eq!(key.acquire(ask(OTHER)).await.told(), (2, Before::Failed), "released once");
            let _ = cut_short(store.complete(&key.id, key.run(OTHER), LONG), polls).await;
            key.finish(OTHER).await;
            let claim = key.claim(ask(THIRD)).await;
            assert!(matches!(claim, Claim::Done { .. }), "{claim:?}");
            // Of a key of its own: the dropped complete may still be on its way.
            let forgotten = key.another();
            forgotten.acquire(ask(ME)).await;
            let _ = cut_short(store.forget(&forgotten.id), polls).await;
            forgotten.forget().await;
            assert_eq!(forgotten.inspect().await, None);
        }
    }
}

/// After many dropped calls, the next answers are still those to their own questions.
pub async fn answers_are_not_mixed_up_by_dropped_calls(fixture: &dyn StoreFixture) {
    let (mine, others) = (Key::new(fixture).await, Key::new(fixture).await);
    mine.acquire(Ask { digest: Some(1), ..ask(ME) }).await;
    others.acquire(Ask { digest: Some(2), ..ask(ME) }).await;
    others.finish(ME).await;
    let store = fixture.open().await;
    for polls in (1..4).cycle().take(60) {
        let other = ask(OTHER);
        let _ = cut_short(store.claim(&others.id, &other), polls).await;
        let claim = answered("claim", store.claim(&mine.id, &other).await);
        assert!(matches!(claim, Claim::InProgress { digest: Some(1), .. }), "not its own answer: {claim:?}");
    }
}

/// What a store says of itself, `Debug` included, is no key.
pub async fn debug_shows_no_key(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    key.acquire(ask(ME)).await;
    let shown = format!("{:?}", key.handle());
    assert!(!shown.is_empty() && !shown.contains(&key.id.to_string()), "{shown}");
}
