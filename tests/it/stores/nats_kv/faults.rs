//! What a bucket or a server that goes away does: it costs re-runs, and suppresses nothing.

use guestlist::dedup::protocol::Held;

use super::server::Server;
use super::*;

/// Never during a test.
const NEVER: Duration = HOUR;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i13_a_bucket_deleted_in_mid_run_only_re_runs() {
    let bucket = unique("deleted");
    let (store, other) = (open(&bucket).await, open(&bucket).await);
    let (done, held) = (key(), key());
    let first = win(&store, &done, &ask(HOUR)).await;
    store.complete(&done, first.run, HOUR).await.unwrap();
    let holder = win(&store, &held, &ask(HOUR)).await;

    let js = stranger(&env("GUESTLIST_NATS_URL")).await;
    js.delete_key_value(&bucket).await.unwrap();
    assert_eq!(store.renew(&held, holder.run, HOUR).await.unwrap(), Held::Gone);
    assert_eq!(store.complete(&held, holder.run, HOUR).await.unwrap(), Held::Gone);
    assert!(is_done(claim(&other, &held, &ask(HOUR)).await), "what is done since then is kept");
    let again = win(&other, &done, &ask(HOUR)).await;
    assert!(again.attempt == 1 && fence(&again) > fence(&first));
    assert_eq!(other.window(), HOUR);
}

/// The looks of another bucket's life say nothing about the age of this one's records.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i2_a_bucket_made_anew_between_two_looks_makes_no_claim_old() {
    let bucket = unique("anew");
    let holder = open(&bucket).await;
    for _ in 0..20 {
        win(&holder, &key(), &ask(HOUR)).await;
    }
    let url = env("GUESTLIST_NATS_URL");
    let other = options(&bucket).observe_every(NEVER).connect(&url).await.unwrap();
    sleep(SECOND).await;
    stranger(&url).await.delete_key_value(&bucket).await.unwrap();
    let key = key();
    win(&holder, &key, &ask(SECOND / 2)).await;
    assert!(is_busy(claim(&other, &key, &alone(HOUR)).await), "a lease of half a second, just begun");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_and_restarted_keeps_what_it_confirmed() {
    let mut server = Server::start().await;
    let store = options("b").connect(&server.url()).await.unwrap();
    let (done, held) = (key(), key());
    let first = win(&store, &done, &ask(HOUR)).await;
    store.complete(&done, first.run, HOUR).await.unwrap();
    let holder = win(&store, &held, &ask(HOUR)).await;

    server.kill();
    until("the loss is noticed", || async { store.renew(&held, holder.run, HOUR).await.is_err() }).await;
    server.restart().await;
    until("the store is back", || async { store.inspect(&done).await.is_ok() }).await;
    assert!(is_done(claim(&store, &done, &ask(HOUR)).await));
    assert!(is_busy(claim(&store, &held, &ask(HOUR)).await));
    assert_eq!(store.renew(&held, holder.run, HOUR).await.unwrap(), Held::Yes);
    assert_eq!(store.complete(&held, holder.run, HOUR).await.unwrap(), Held::Yes);
}

/// By default a server brings its writes to the disk every two minutes: a power failure takes them back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f19_a_server_that_lost_its_last_writes_only_re_runs() {
    let mut server = Server::start().await;
    let store = options("b").connect(&server.url()).await.unwrap();
    let (kept, lost) = (key(), key());
    let first = win(&store, &kept, &ask(HOUR)).await;
    store.complete(&kept, first.run, HOUR).await.unwrap();
    server.snapshot().await;

    let holder = win_at_last(&store, &lost, &ask(HOUR)).await;
    assert_eq!(store.complete(&lost, holder.run, HOUR).await.unwrap(), Held::Yes);
    for _ in 0..20 {
        win(&store, &key(), &ask(HOUR)).await;
    }
    let other = options("b").observe_every(NEVER).connect(&server.url()).await.unwrap();
    sleep(SECOND).await;
    server.roll_back().await;

    let again = win_at_last(&store, &lost, &ask(SECOND / 2)).await;
    assert_eq!((again.attempt, again.before), (1, Before::First), "a lost record runs again");
    assert!(fence(&again) > fence(&holder), "with a higher fence, though its revision was given out before");
    // Its revision was given out before, long ago: to this process it would look old.
    until("the other process is connected", || async { other.inspect(&kept).await.is_ok() }).await;
    let renewed = store.claim(&lost, &Ask { token: again.run.token, ..ask(HOUR / 2) }).await.unwrap();
    assert!(matches!(renewed, Claim::Acquired { .. }));
    assert!(is_busy(claim(&other, &lost, &alone(HOUR)).await));
    assert!(is_done(claim(&other, &kept, &ask(HOUR)).await));
}
