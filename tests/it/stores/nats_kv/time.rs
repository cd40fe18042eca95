//! Leases and backoffs, judged by observation: never early, and late by no more than is said.

use guestlist::dedup::protocol::{Held, Release};

use super::*;

const LEASE: Duration = SECOND;

/// What was seen within a lease. On a machine that stands still for a moment the lease is over before the look at it, and then
/// what is seen says nothing: so it is done again, with new keys.
async fn in_time<T, F: Future<Output = (Instant, T)>>(mut look: impl FnMut() -> F) -> T {
    for _ in 0..20 {
        let (since, seen) = look().await;
        if since.elapsed() < LEASE {
            return seen;
        }
    }
    panic!("nothing was done within {LEASE:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_is_never_taken_over_before_it_is_over() {
    let bucket = unique("lease");
    let (holder, other) = (open(&bucket).await, open(&bucket).await);
    let (key, asked, first, seen) = in_time(|| async {
        let (key, asked) = (key(), Instant::now());
        let first = win(&holder, &key, &ask(LEASE)).await;
        (asked, (key, asked, first, claim(&other, &key, &alone(LEASE)).await))
    })
    .await;
    assert!(is_busy(seen), "{seen:?}");

    let second = win_at_last(&other, &key, &alone(LEASE)).await;
    assert!(asked.elapsed() >= LEASE, "taken over after {:?}", asked.elapsed());
    assert_eq!((second.attempt, second.before), (2, Before::Vanished));
    assert!(fence(&second) > fence(&first));
    assert_eq!(holder.complete(&key, first.run, HOUR).await.unwrap(), Held::Lost);
    assert_eq!(other.complete(&key, second.run, HOUR).await.unwrap(), Held::Yes);
}

/// Who was there while the lease ran need not have seen the record to know that it is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_sees_an_old_claim_for_the_first_time_knows_its_age() {
    // So much longer than a lease that a look which comes late by seconds still dates it.
    const LEASE: Duration = Duration::from_secs(3);
    let bucket = unique("age");
    let (holder, other) = (open(&bucket).await, open(&bucket).await);
    let key = key();
    win(&holder, &key, &ask(LEASE)).await;
    sleep(3 * LEASE).await;
    let second = win(&other, &key, &alone(LEASE)).await;
    assert_eq!(second.before, Before::Vanished);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_came_later_waits_for_a_lease_of_its_own() {
    let bucket = unique("late");
    let holder = open(&bucket).await;
    let (key, opening, other, seen) = in_time(|| async {
        let key = key();
        win(&holder, &key, &ask(LEASE)).await;
        sleep(2 * LEASE).await;
        let opening = Instant::now();
        let other = open(&bucket).await;
        let seen = claim(&other, &key, &alone(LEASE)).await;
        (opening, (key, opening, other, seen))
    })
    .await;
    assert!(is_busy(seen), "{seen:?}");
    win_at_last(&other, &key, &alone(LEASE)).await;
    assert!(opening.elapsed() >= LEASE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewal_begins_the_lease_anew_for_every_observer() {
    const LEASE: Duration = Duration::from_secs(3);
    let bucket = unique("renewal");
    let (holder, other) = (open(&bucket).await, open(&bucket).await);
    let key = key();
    let first = win(&holder, &key, &ask(LEASE)).await;
    let mut renewed = Instant::now();
    for _ in 0..10 {
        sleep(LEASE / 6).await;
        renewed = Instant::now();
        assert_eq!(holder.renew(&key, first.run, LEASE).await.unwrap(), Held::Yes);
        assert!(is_busy(claim(&other, &key, &alone(LEASE)).await));
    }
    win_at_last(&other, &key, &alone(LEASE)).await;
    assert!(renewed.elapsed() >= LEASE);
    assert_eq!(holder.renew(&key, first.run, LEASE).await.unwrap(), Held::Lost);
}

/// A late renewal of a claim that nobody has taken is in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_renewal_is_in_time_as_long_as_nobody_has_taken_the_claim() {
    let bucket = unique("overdue");
    let (holder, other) = (open(&bucket).await, open(&bucket).await);
    let key = key();
    let first = win(&holder, &key, &ask(LEASE)).await;
    sleep(2 * LEASE).await;
    assert_eq!(holder.renew(&key, first.run, HOUR).await.unwrap(), Held::Yes);
    assert!(is_busy(claim(&other, &key, &alone(LEASE)).await));
    assert_eq!(holder.complete(&key, first.run, HOUR).await.unwrap(), Held::Yes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backoff_holds_for_everybody_and_ends() {
    let bucket = unique("backoff");
    let (holder, other) = (open(&bucket).await, open(&bucket).await);
    let failed = Release::Failed { not_before: LEASE };
    let (key, releasing, seen) = in_time(|| async {
        let key = key();
        let first = win(&holder, &key, &ask(HOUR)).await;
        let releasing = Instant::now();
        assert_eq!(holder.release(&key, first.run, failed).await.unwrap(), Held::Yes);
        let seen = [claim(&holder, &key, &ask(HOUR)).await, claim(&other, &key, &ask(HOUR)).await];
        (releasing, (key, releasing, seen))
    })
    .await;
    for busy in seen {
        assert!(matches!(busy, Claim::InProgress { left, .. } if left <= LEASE), "{busy:?}");
    }
    let second = win_at_last(&other, &key, &ask(HOUR)).await;
    assert!(releasing.elapsed() >= LEASE);
    assert_eq!((second.attempt, second.before), (2, Before::Failed));
}

/// A window that is shorter than the bucket's is kept by observation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shorter_window_than_the_buckets_ends_too() {
    let bucket = unique("window");
    let (one, other) = (open(&bucket).await, open(&bucket).await);
    let (key, completing, first, held, seen) = in_time(|| async {
        let (key, asked) = (key(), Instant::now());
        let first = win(&one, &key, &Ask { retain: LEASE, ..ask(LEASE) }).await;
        let completing = Instant::now();
        let held = one.complete(&key, first.run, LEASE).await.unwrap();
        (asked, (key, completing, first, held, claim(&other, &key, &ask(LEASE)).await))
    })
    .await;
    assert_eq!(held, Held::Yes);
    assert!(is_done(seen), "{seen:?}");
    let second = win_at_last(&other, &key, &ask(LEASE)).await;
    assert!(completing.elapsed() >= LEASE);
    assert_eq!((second.attempt, second.before), (1, Before::First));
    assert!(fence(&second) > fence(&first));
}

/// The server forgets by the bucket's age.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bucket_forgets_after_its_window() {
    let window = 4 * SECOND;
    let options = options(&unique("expiry")).window(window);
    let store = options.connect(&env("GUESTLIST_NATS_URL")).await.unwrap();
    assert_eq!(store.window(), window);
    let (key, ask) = (key(), Ask { retain: window, ..ask(SECOND) });
    let first = win(&store, &key, &ask).await;
    assert_eq!(store.complete(&key, first.run, window).await.unwrap(), Held::Yes);
    until("the record has expired", || async { store.inspect(&key).await.unwrap().is_none() }).await;
    let again = Ask { token: Token::random(), ..ask };
    let second = win(&store, &key, &again).await;
    assert!((second.attempt, second.before) == (1, Before::First) && fence(&second) > fence(&first));
}
