//! The failure matrix: one test, at least, for each fault that the in-memory broker can play.
//!
//! A crash is a process that is killed at a chosen point: its deliveries are with the broker again, its claims
//! stay in the store, and nothing that it still does arrives there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guestlist::broker::BrokerErrorKind;
use guestlist::broker::memory::PublishFault;
use guestlist::dedup::{Before, MemoryStore, Release, Suspects};
use guestlist::testing::{Checker, Fault, FaultyStore};
use guestlist::{
    Backoff, Cause, Consumer, Disposition, ErrorKind, EventKind, Failure, Handled, Outcome, Queue, State,
    defaults,
};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::support::{
    CopySpy, DEAD, FAULTS, HOUR, LEASE, Lab, LateStore, MINUTE, ORDERS, Plot, Process, SECOND, Trial,
    Tripwire, every_call_fails_once, pass, until,
};

/// A queue whose handler takes this long and then succeeds.
fn takes(lab: &Lab, time: Duration) -> Queue {
    lab.queue().handler(lab.handler(move |_| async move {
        sleep(time).await;
        Ok(())
    }))
}

/// What to wait for, and what to call when it is there: heard of in the same instant.
fn signal() -> (Arc<Notify>, impl FnOnce() + Send + 'static) {
    let heard = Arc::new(Notify::new());
    let said = Arc::clone(&heard);
    (heard, move || said.notify_one())
}

/// The next process, until the queue is drained.
async fn next_process_drains(lab: &Lab) {
    next_process_drains_as(lab, Checker::new()).await;
}

async fn next_process_drains_as(lab: &Lab, checker: Checker) {
    let process = lab.start(takes(lab, SECOND));
    lab.drained().await;
    process.stop().await.unwrap();
    lab.check_as(checker);
}

#[tokio::test(start_paused = true)]
async fn f1_a_process_killed_before_its_claim_leaves_the_message_to_the_next() {
    let lab = Lab::new();
    lab.send("order-1");
    let store = FaultyStore::new(lab.store.clone());
    store.set_down(true);
    let process = lab.start_over(store, takes(&lab, SECOND));
    until("it has asked", || process.store.calls() > 0).await;
    process.kill().await;
    next_process_drains(&lab).await;
    assert_eq!(lab.journal.attempts("order-1"), [1]);
}

#[tokio::test(start_paused = true)]
async fn f2_a_process_killed_between_claim_and_handler_costs_its_lease_and_an_attempt() {
    let lab = Lab::new();
    lab.send("order-1");
    let store = FaultyStore::new(lab.store.clone());
    store.fail_call(0, Fault::Hang);
    let process = lab.start_over(store, takes(&lab, SECOND));
    until("it has claimed", || lab.store.in_progress() == 1).await;
    let first = lab.record("order-1").await.unwrap();
    process.kill().await;
    let killed = Instant::now();
    next_process_drains(&lab).await;
    let run = &lab.journal.of("order-1")[0];
    assert_eq!((run.attempt, lab.journal.runs("order-1")), (2, 1));
    assert!(run.fence > first.run.fence, "a higher fence");
    let waited = run.began - killed;
    assert!(waited + SECOND > LEASE && waited < LEASE + SECOND, "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn f3_a_process_killed_in_its_handler_costs_its_lease_and_an_attempt() {
    let lab = Lab::new();
    lab.send("order-1");
    let process = lab.start(takes(&lab, HOUR));
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    // Renewed: the lease counts from the last renewal.
    pass(5 * MINUTE).await;
    process.kill().await;
    let killed = Instant::now();
    next_process_drains(&lab).await;
    let runs = lab.journal.of("order-1");
    assert_eq!(lab.journal.attempts("order-1"), [1, 2]);
    assert!(runs[1].fence > runs[0].fence, "a higher fence");
    assert!(runs[1].began - killed <= LEASE + SECOND, "{:?}", runs[1].began - killed);
    assert_eq!(lab.count(EventKind::Claimed(Before::Vanished)), 1);
}

#[tokio::test(start_paused = true)]
async fn f4_a_process_killed_between_ok_and_complete_is_the_one_gap() {
    let lab = Lab::new();
    lab.send("order-1");
    let store = FaultyStore::new(lab.store.clone());
    let last_act = store.clone();
    let handler = lab.handler(move |_| {
        last_act.set_down(true);
        async { Ok(()) }
    });
    let process = lab.start_over(store, lab.queue().handler(handler));
    until("its handler has ended", || lab.journal.ended("order-1") == 1).await;
    process.kill().await;
    next_process_drains(&lab).await;
    assert_eq!(lab.journal.attempts("order-1"), [1, 2], "the effect is repeated");
}

#[tokio::test(start_paused = true)]
async fn f6_a_crash_after_complete_makes_the_redelivery_a_duplicate() {
    let lab = Lab::new();
    lab.send("order-1");
    let broker = lab.broker.clone();
    let (crashed, tell) = signal();
    let crash = Tripwire::observer(
        &lab.log,
        |kind| *kind == EventKind::Completed,
        move || {
            broker.crash(ORDERS).unwrap();
            tell();
        },
    );
    let process = lab.start(takes(&lab, SECOND).observer(crash));
    // At once: it must not get to subscribe again.
    crashed.notified().await;
    process.kill().await;
    assert_eq!(lab.count(EventKind::Unsettled), 1, "its ack came too late");
    assert_eq!(lab.depth(), 1, "the message is with the broker");
    next_process_drains(&lab).await;
    assert_eq!(lab.journal.runs("order-1"), 1);
    assert_eq!(lab.count(EventKind::Duplicate), 1);
}

#[tokio::test(start_paused = true)]
async fn f7_a_lost_ack_makes_the_redelivery_a_duplicate() {
    let lab = Lab::new();
    lab.broker.lose_acks(ORDERS, 3).unwrap();
    lab.send("order-1");
    let process = lab.start(takes(&lab, SECOND));
    lab.drained().await;
    assert_eq!((process.orders().handled, process.orders().duplicates), (1, 3));
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn f8_a_handler_outlives_its_connection_and_the_redelivery_is_a_duplicate() {
    let lab = Lab::new();
    lab.send("order-1");
    let process = lab.start(takes(&lab, MINUTE));
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    lab.broker.crash(ORDERS).unwrap();
    lab.drained().await;
    assert_eq!((lab.journal.runs("order-1"), lab.journal.ended("order-1")), (1, 1));
    let orders = process.orders();
    assert_eq!((orders.handled, orders.duplicates, orders.unsettled, orders.rebuilds), (1, 1, 1, 1));
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn f9_a_crash_after_the_release_keeps_the_attempt_and_the_backoff() {
    let lab = Lab::new();
    lab.send("order-1");
    let broker = lab.broker.clone();
    let (crashed, tell) = signal();
    let crash = Tripwire::observer(
        &lab.log,
        |kind| matches!(kind, EventKind::Released(_)),
        move || {
            broker.crash(ORDERS).unwrap();
            tell();
        },
    );
    let failing = lab.handler(async |_| Err("busy".into()));
    let backoff = Backoff::new(MINUTE, 1, MINUTE).without_jitter();
    let process = lab.start(lab.queue().backoff(backoff).observer(crash).handler(failing));
    crashed.notified().await;
    process.kill().await;
    assert_eq!(lab.count(EventKind::Unsettled), 1, "the broker was not told");
    next_process_drains(&lab).await;
    let runs = lab.journal.of("order-1");
    assert_eq!(lab.journal.attempts("order-1"), [1, 2]);
    let pause = runs[1].began - runs[0].began;
    assert!(pause >= MINUTE && pause <= MINUTE + LEASE, "{pause:?}");
}

#[tokio::test(start_paused = true)]
async fn f11_a_crash_after_the_dead_letter_is_published_makes_a_second_one_with_the_same_id() {
    let lab = Lab::new();
    lab.send("order-1");
    let spy = CopySpy::new(lab.broker.clone());
    let queue =
        || lab.queue().max_attempts(2).handler(lab.handler(async |_| Err(Failure::permanent("never"))));
    for life in 1..=3 {
        let store = FaultyStore::new(lab.store.clone());
        let (down, broker) = (store.clone(), lab.broker.clone());
        let crash = Tripwire::observer(
            &lab.log,
            |kind| *kind == EventKind::Copied,
            move || {
                down.set_down(true);
                broker.crash(ORDERS).unwrap();
            },
        );
        let consumer = Consumer::new(spy.clone()).store(store.clone()).queue(queue().observer(crash));
        let process = Process::spawn(store, consumer);
        until("the letter is there", || lab.letters().len() == life).await;
        process.kill().await;
    }
    let process = lab.start(queue());
    lab.drained().await;
    process.stop().await.unwrap();
    assert_eq!(lab.journal.attempts("order-1"), [1, 2], "not beyond its attempts");
    assert_eq!(lab.causes(), ["permanent", "permanent", "crash_suspected", "crash_suspected"]);
    let ids = spy.ids();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    lab.redrive("order-1", 1);
    next_process_drains_as(&lab, Checker::new().max_attempts(Some(2))).await;
    assert_eq!(lab.journal.attempts("order-1"), [1, 2, 1], "a redrive runs");
}

#[tokio::test(start_paused = true)]
async fn f12_a_dead_letter_that_is_not_confirmed_is_published_again_and_not_acked_before() {
    for (fault, letters) in [
        (PublishFault::Nacked, 1),
        (PublishFault::NotRouted, 1),
        (PublishFault::LostCopy, 1),
        (PublishFault::LostConfirm, 5),
    ] {
        let lab = Lab::new();
        lab.send("order-1");
        lab.broker.fail_publishes(4, fault);
        let spy = CopySpy::new(lab.broker.clone());
        let queue = lab.queue().handler(lab.handler(async |_| Err(Failure::permanent("never"))));
        let store = FaultyStore::new(lab.store.clone());
        let process = Process::spawn(store.clone(), Consumer::new(spy.clone()).store(store).queue(queue));
        until("the queue pauses", || process.orders().paused_by == Some(Cause::DeadLetterDown)).await;
        assert_eq!((process.orders().state, lab.depth()), (State::Paused, 1), "{fault:?}");
        lab.drained().await;
        assert_eq!(lab.journal.runs("order-1"), 1, "{fault:?}");
        assert_eq!(lab.letters().len(), letters, "{fault:?}");
        let ids = spy.ids();
        assert!(ids.len() == 5 && ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        assert!(process.status.is_healthy());
        process.stop().await.unwrap();
        lab.check();
    }
}

#[tokio::test(start_paused = true)]
async fn f12_a_dead_letter_destination_that_is_deleted_and_comes_back_loses_nothing() {
    let lab = Lab::new();
    let handler = lab.handler(async |run| match run.id().as_str() {
        "bad" => Err(Failure::permanent("never")),
        _ => Ok(()),
    });
    let process = lab.start(lab.queue().handler(handler));
    lab.send("good-1");
    lab.drained().await;
    lab.broker.delete(DEAD);
    for id in ["bad", "good-2", "good-3"] {
        lab.send(id);
    }
    // Longer than pause_hold: the deliveries go back to the source, and stay there.
    pass(2 * MINUTE).await;
    assert!(lab.depth() >= 1 && !process.status.is_healthy() && !process.has_ended());
    assert!(lab.log.count(|kind| matches!(kind, EventKind::Acked(Outcome::DeadLettered(_)))) == 0);
    lab.broker.declare(DEAD);
    let back = Instant::now();
    lab.drained().await;
    assert!(back.elapsed() <= 2 * defaults::RECONNECT_CAP, "{:?}", back.elapsed());
    assert_eq!((lab.causes().len(), process.orders().handled), (1, 3));
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn f13_a_missing_dead_letter_destination_is_refused_at_the_start() {
    let lab = Lab::new();
    lab.broker.delete(DEAD);
    lab.send("order-1");
    let refused = lab.start(takes(&lab, SECOND)).end().await.unwrap_err();
    assert_eq!((refused.kind(), refused.broker()), (ErrorKind::Broker, Some(BrokerErrorKind::Refused)));
    assert!(format!("{refused:?}").contains(DEAD), "it names what is missing: {refused:?}");
    assert_eq!((lab.log.events().len(), lab.depth()), (0, 1), "nothing was consumed");
}

#[tokio::test(start_paused = true)]
async fn f13_unless_it_is_allowed_by_name_and_then_the_queue_pauses_at_the_first_dead_letter() {
    let lab = Lab::new();
    lab.broker.delete(DEAD);
    let handler = lab.handler(async |run| match run.id().as_str() {
        "bad" => Err(Failure::permanent("never")),
        _ => Ok(()),
    });
    let process = lab.start(lab.queue().allow_missing_dead_letter().handler(handler));
    lab.send("good");
    lab.drained().await;
    lab.send("bad");
    until("it pauses", || process.orders().paused_by == Some(Cause::DeadLetterDown)).await;
    pass(HOUR).await;
    assert_eq!((lab.depth(), process.has_ended()), (1, false));
    lab.broker.declare(DEAD);
    lab.drained().await;
    assert_eq!(lab.letters().len(), 1);
    process.stop().await.unwrap();
    lab.check();
}

/// A run whose lease is lost to another process ends in this; the zombie changes nothing.
async fn zombie_ends_in(how: fn() -> Handled) {
    let lab = Lab::new();
    let cancelled = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&cancelled);
    let handler = lab.handler(move |run| {
        let told = Arc::clone(&told);
        async move {
            if run.attempt > 1 {
                sleep(5 * MINUTE).await;
                return Ok(());
            }
            run.cancel.cancelled().await;
            told.store(true, Ordering::SeqCst);
            sleep(MINUTE).await;
            how()
        }
    });
    lab.send("order-1");
    let zombie = lab.start(lab.queue().handler(handler.clone()));
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    // Its way to the store breaks, and a copy arrives elsewhere.
    zombie.store.set_down(true);
    let heir = lab.start(lab.queue().handler(handler));
    lab.send("order-1");
    until("the copy runs elsewhere", || lab.journal.runs("order-1") == 2).await;
    assert!(cancelled.load(Ordering::SeqCst), "the first was told before the second began");
    zombie.store.set_down(false);
    let held = lab.record("order-1").await.unwrap();
    until("the zombie ends", || lab.journal.ended("order-1") == 1).await;
    pass(SECOND).await;
    let still = lab.record("order-1").await.unwrap();
    assert_eq!(
        (held.run, held.attempt, held.state_is_claimed()),
        (still.run, still.attempt, still.state_is_claimed())
    );
    assert_eq!(zombie.orders().failures.get("lease_lost"), Some(&1));
    assert_eq!(lab.count(EventKind::Returned(Disposition::Abandon)), 1);
    assert_eq!(lab.count(EventKind::LeaseLost), 1);
    lab.drained().await;
    let runs = lab.journal.of("order-1");
    assert!(runs.len() == 2 && runs[1].fence > runs[0].fence, "{runs:?}");
    assert_eq!(zombie.orders().handled + heir.orders().handled, 1);
    assert!(lab.letters().is_empty(), "nothing is published for a lost lease");
    zombie.stop().await.unwrap();
    heir.stop().await.unwrap();
    lab.check();
}

trait Claimed {
    fn state_is_claimed(&self) -> bool;
}

impl Claimed for guestlist::dedup::protocol::Record {
    fn state_is_claimed(&self) -> bool {
        matches!(self.state, guestlist::dedup::protocol::State::Claimed { .. })
    }
}

#[tokio::test(start_paused = true)]
async fn f14_a_zombie_that_succeeds_changes_nothing() {
    zombie_ends_in(|| Ok(())).await;
}

#[tokio::test(start_paused = true)]
async fn f14_a_zombie_that_fails_changes_nothing() {
    zombie_ends_in(|| Err("busy".into())).await;
}

#[tokio::test(start_paused = true)]
async fn f14_a_zombie_that_fails_for_good_publishes_nothing() {
    zombie_ends_in(|| Err(Failure::permanent("never"))).await;
}

#[tokio::test(start_paused = true)]
async fn f14_a_lease_that_nobody_took_is_still_held_and_its_work_is_not_repeated() {
    let lab = Lab::new();
    lab.send("order-1");
    let process = lab.start(takes(&lab, MINUTE));
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    process.store.set_down(true);
    until("the holder sees its lease end", || lab.count(EventKind::LeaseLost) == 1).await;
    process.store.set_down(false);
    lab.drained().await;
    assert_eq!((lab.journal.runs("order-1"), process.orders().handled), (1, 1));
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn f14_no_in_process_try_starts_on_a_lost_lease() {
    let lab = Lab::new();
    lab.send("order-1");
    let tries = lab.handler(async |_| Err("busy".into()));
    let process = lab.start(lab.queue().tries(1_000_000).handler(tries));
    until("it runs", || lab.journal.runs("order-1") > 0).await;
    process.store.set_down(true);
    until("its lease is lost", || lab.count(EventKind::LeaseLost) == 1).await;
    let tries = lab.journal.runs("order-1");
    pass(5 * MINUTE).await;
    assert_eq!(lab.journal.runs("order-1"), tries);
    process.kill().await;
}

#[tokio::test(start_paused = true)]
async fn f14_a_claim_lost_unnoticed_is_abandoned_not_requeued() {
    let lab = Lab::new();
    lab.send("order-1");
    let process = lab.start(lab.queue().handler(lab.handler(async |run| {
        sleep(SECOND).await;
        if run.attempt == 1 { Err("busy".into()) } else { Ok(()) }
    })));
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    // The store loses the record, and another process claims the id before the first one hears of it.
    lab.forget("order-1").await;
    let other = lab.start(takes(&lab, MINUTE));
    lab.send("order-1");
    until("both run", || lab.journal.runs("order-1") == 2).await;
    until("the first has failed", || process.orders().failures.contains_key("transient")).await;
    assert_eq!(lab.count(EventKind::Returned(Disposition::Abandon)), 1, "{:?}", lab.log.events());
    lab.drained().await;
    process.stop().await.unwrap();
    other.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f14_a_release_without_an_answer_by_the_end_of_the_lease_is_abandoned_not_requeued() {
    let lab = Lab::new();
    lab.send("order-1");
    let store = FaultyStore::new(lab.store.clone());
    let down = store.clone();
    let handler = lab.handler(move |run| {
        down.set_down(run.attempt == 1);
        async move { if run.attempt == 1 { Err("busy".into()) } else { Ok(()) } }
    });
    let process = lab.start_over(store, lab.queue().handler(handler));
    until("the delivery is over", || process.orders().failures.contains_key("transient") && lab.depth() == 1)
        .await;
    until("it is back", || lab.log.count(|kind| matches!(kind, EventKind::Returned(_))) == 1).await;
    assert_eq!(lab.count(EventKind::Returned(Disposition::Abandon)), 1);
    process.store.set_down(false);
    lab.drained().await;
    assert_eq!(lab.journal.attempts("order-1"), [1, 2]);
    process.stop().await.unwrap();
    lab.check();
}

/// In real time: a handler that blocks its thread for longer than the lease, which a stall does not end.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn f15_a_blocking_handler_does_not_starve_the_renewals_of_other_threads() {
    let lab = Lab::new();
    let queue = || {
        lab.queue().lease(4 * SECOND).handler(lab.handler(|_| {
            std::thread::sleep(6 * SECOND);
            async { Ok(()) }
        }))
    };
    let (one, other) = (lab.start(queue()), lab.start(queue()));
    lab.send("order-1");
    lab.send("order-1");
    tokio::time::timeout(MINUTE, lab.broker.drained(ORDERS)).await.unwrap().unwrap();
    assert_eq!(lab.journal.runs("order-1"), 1);
    assert_eq!(lab.count(EventKind::LeaseLost), 0, "the renewals went on");
    one.stop().await.unwrap();
    other.stop().await.unwrap();
    lab.check();
}

/// In real time: nobody can end a handler that blocks its thread, so health says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn i9_a_handler_that_blocks_its_thread_past_max_run_is_reported() {
    let lab = Lab::new();
    let (unblock, blocked) = std::sync::mpsc::channel::<()>();
    let blocked = Arc::new(Mutex::new(blocked));
    let handler = lab.handler(move |_| {
        let _ = blocked.lock().unwrap().recv();
        async { Ok(()) }
    });
    let queue = lab.queue().lease(Duration::from_millis(400)).max_run(Duration::from_millis(100));
    let process = lab.start(queue.handler(handler));
    lab.send("order-1");
    let reported = until("it is reported", || process.orders().stuck == 1 && !process.status.is_healthy());
    tokio::time::timeout(MINUTE, reported).await.unwrap();
    drop(unblock);
    let returned = until("it has returned", || process.orders().stuck == 0 && process.status.is_healthy());
    tokio::time::timeout(MINUTE, returned).await.unwrap();
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f22_the_late_answers_of_a_slow_store_are_not_trusted() {
    let lab = Lab::new();
    let store = LateStore::new(lab.store.clone());
    store.set_late(2 * LEASE);
    for number in 0..5 {
        lab.send(&format!("order-{number}"));
    }
    let consumer = Consumer::new(lab.broker.clone()).store(store.clone()).queue(takes(&lab, SECOND));
    let process = Process::spawn(FaultyStore::new(lab.store.clone()), consumer);
    pass(10 * MINUTE).await;
    assert_eq!((lab.journal.all().len(), lab.depth()), (0, 5), "nothing runs, nothing is lost");
    store.set_late(Duration::from_millis(20));
    lab.drained().await;
    for number in 0..5 {
        assert_eq!(lab.journal.runs(&format!("order-{number}")), 1);
    }
    assert_eq!(process.orders().handled, 5);
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn f22_a_store_that_gets_slow_while_a_handler_runs_leads_to_no_second_run_beside_it() {
    let lab = Lab::new();
    lab.send("order-1");
    let store = LateStore::new(lab.store.clone());
    let consumer = Consumer::new(lab.broker.clone()).store(store.clone()).queue(takes(&lab, 2 * MINUTE));
    let process = Process::spawn(FaultyStore::new(lab.store.clone()), consumer);
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    store.set_late(2 * LEASE);
    until("it has ended", || lab.journal.ended("order-1") == 1).await;
    store.set_late(Duration::ZERO);
    lab.drained().await;
    let runs = lab.journal.of("order-1");
    assert!(runs.len() <= 2 && runs.last().unwrap().ended.is_some(), "{runs:?}");
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn f23_a_flapping_store_pauses_the_queue_without_a_busy_loop() {
    let lab = Lab::new();
    for number in 0..100 {
        lab.send(&format!("order-{number}"));
    }
    let process = lab.start(takes(&lab, Duration::from_millis(300)));
    let store = process.store.clone();
    let flapping = tokio::spawn(async move {
        for second in 0.. {
            store.set_down(second % 2 == 0);
            sleep(SECOND).await;
        }
    });
    let start = Instant::now();
    lab.drained().await;
    flapping.abort();
    let calls = process.store.calls();
    let seconds = usize::try_from(start.elapsed().as_secs()).unwrap() + 1;
    assert!(calls < 200 + seconds * 16 * 10, "{calls} calls in {seconds} s");
    process.store.set_down(false);
    process.stop().await.unwrap();
    assert!((0..100).all(|number| lab.journal.runs(&format!("order-{number}")) == 1));
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn f24_a_queue_deleted_under_the_consumer_is_consumed_again_when_it_is_back() {
    for declares in [false, true] {
        let lab = Lab::new();
        let queue = takes(&lab, SECOND);
        let process = lab.start(if declares { queue.declare() } else { queue });
        lab.send("order-1");
        lab.drained().await;
        lab.broker.delete(ORDERS);
        if declares {
            until("the consumer makes it again", || lab.broker.depth(ORDERS).is_ok()).await;
        } else {
            until("the trouble shows", || process.orders().state == State::Reconnecting).await;
            pass(MINUTE).await;
            assert!(!process.has_ended());
            lab.broker.declare(ORDERS);
        }
        let back = Instant::now();
        lab.send("order-2");
        lab.drained().await;
        assert!(back.elapsed() <= 2 * defaults::RECONNECT_CAP, "{:?}", back.elapsed());
        assert_eq!(process.orders().handled, 2);
        process.stop().await.unwrap();
        lab.check();
    }
}

#[tokio::test(start_paused = true)]
async fn f24_a_queue_that_never_comes_back_ends_the_consumer_with_an_error() {
    let lab = Lab::new();
    lab.broker.declare("refunds");
    let refunds = lab.queue_named("refunds").handler(lab.handler(async |_| {
        sleep(10 * SECOND).await;
        Ok(())
    }));
    let process = lab.start_with(takes(&lab, SECOND), |consumer| consumer.queue(refunds));
    let (status, start) = (process.status.clone(), Instant::now());
    let run = || status.queues().iter().filter(|queue| queue.state == State::Running).count();
    until("both run", || run() == 2).await;
    lab.broker.delete(ORDERS);
    until("it is about to give up", || {
        status.queue(ORDERS).unwrap().rebuilds == u64::from(defaults::MAX_REBUILDS) - 1
    })
    .await;
    lab.broker.send("refunds", guestlist::Message::builder("").transport_id("refund-1")).unwrap();
    let error = process.end().await.unwrap_err();
    assert_eq!((error.kind(), error.broker()), (ErrorKind::Broker, Some(BrokerErrorKind::Refused)));
    assert!(format!("{error:?}").contains(ORDERS), "{error:?}");
    let lasted = start.elapsed();
    assert!(lasted > 4 * MINUTE && lasted < 6 * MINUTE + 10 * SECOND, "about five minutes: {lasted:?}");
    let state = |queue: &str| status.queue(queue).unwrap().state;
    assert_eq!(
        (state(ORDERS), state("refunds")),
        (State::Failed, State::Stopped),
        "the other one stops gracefully"
    );
}

#[tokio::test(start_paused = true)]
async fn f24_a_quiet_queue_survives_any_number_of_broken_connections() {
    let lab = Lab::new();
    let process = lab.start(takes(&lab, SECOND));
    for crash in 1..=2 * u64::from(defaults::MAX_REBUILDS) {
        until("it consumes", || process.orders().state == State::Running).await;
        pass(HOUR).await;
        lab.broker.crash(ORDERS).unwrap();
        until("it noticed", || process.orders().rebuilds == crash).await;
        assert!(!process.has_ended(), "it gave up a queue that is there");
    }
    lab.send("order-1");
    lab.drained().await;
    process.stop().await.unwrap();
}

/// What became of a hundred good orders and one that kills its process.
struct Aftermath {
    lab: Lab,
    lives: usize,
}

fn good() -> impl Iterator<Item = String> {
    (0..100).map(|number| format!("good-{number}"))
}

impl Aftermath {
    fn most_attempts(&self) -> u32 {
        good().flat_map(|id| self.lab.journal.attempts(&id)).max().unwrap_or(0)
    }

    fn all_handled(&self) -> bool {
        good().all(|id| self.lab.journal.ended(&id) >= 1)
    }
}

/// Process after process, each killed by the poison, until the queue is drained.
async fn a_poison_among_a_hundred(place: usize, suspects: fn() -> Suspects) -> Aftermath {
    let lab = Lab::new();
    for number in 0..=100 {
        if number == place {
            lab.send("poison");
        }
        if number < 100 {
            lab.send(&format!("good-{number}"));
        }
    }
    for lives in 1..=30 {
        let store = FaultyStore::new(lab.store.clone());
        let death = Arc::new(Notify::new());
        let (down, broker, last_words) = (store.clone(), lab.broker.clone(), Arc::clone(&death));
        let handler = lab.handler(move |run| {
            let (down, broker, last_words) = (down.clone(), broker.clone(), Arc::clone(&last_words));
            async move {
                sleep(Duration::from_millis(100)).await;
                if run.id() == "poison" {
                    down.set_down(true);
                    broker.crash(ORDERS).unwrap();
                    last_words.notify_one();
                    std::future::pending::<()>().await;
                }
                Ok(())
            }
        });
        let queue = lab.queue().concurrency(16).max_attempts(3).suspects(suspects()).handler(handler);
        let process = lab.start_over(store, queue);
        tokio::select! {
            () = death.notified() => process.kill().await,
            () = lab.drained() => {
                process.stop().await.unwrap();
                return Aftermath { lab, lives };
            }
        }
    }
    panic!("the poison was still at work after thirty lives");
}

#[tokio::test(start_paused = true)]
async fn f26_a_message_that_kills_its_process_costs_its_neighbours_one_attempt_at_most() {
    for place in [0, 7, 50, 100] {
        let after = a_poison_among_a_hundred(place, Suspects::new).await;
        assert!(after.all_handled(), "place {place}");
        assert!(after.most_attempts() <= 2, "place {place}: {} attempts", after.most_attempts());
        assert_eq!(after.lab.causes(), ["crash_suspected"], "place {place}");
        assert_eq!(after.lab.journal.attempts("poison"), [1, 2, 3], "place {place}");
        assert_eq!(after.lives, 4, "place {place}");
        after.lab.check_as(Checker::new().max_attempts(Some(3)));
    }
}

#[tokio::test(start_paused = true)]
async fn f26_without_the_suspect_permit_good_messages_are_suspected() {
    let after = a_poison_among_a_hundred(7, Suspects::unlimited).await;
    assert!(
        after.most_attempts() > 2 || after.lab.causes() != ["crash_suspected"],
        "the permit is needed: {} attempts, {:?}",
        after.most_attempts(),
        after.lab.causes(),
    );
}

/// Orders and refunds whose first holder was killed while it ran them all.
async fn suspects_of_two_queues(lab: &Lab, each: usize) {
    lab.broker.declare("refunds");
    let handler = lab.handler(async |_| {
        sleep(HOUR).await;
        Ok(())
    });
    let process = lab.start_with(lab.queue().handler(handler.clone()), |consumer| {
        consumer.queue(lab.queue_named("refunds").handler(handler))
    });
    for number in 0..each {
        lab.send(&format!("order-{number}"));
        let refund = guestlist::Message::builder("").transport_id(format!("refund-{number}"));
        lab.broker.send("refunds", refund).unwrap();
    }
    until("all run", || lab.journal.all().len() == 2 * each).await;
    process.kill().await;
}

#[tokio::test(start_paused = true)]
async fn f26_suspects_run_one_at_a_time_over_all_queues_and_the_others_beside_them() {
    let lab = Lab::new();
    suspects_of_two_queues(&lab, 4).await;
    let handler = lab.handler(async |run| {
        sleep(if run.attempt > 1 { 20 * SECOND } else { SECOND }).await;
        Ok(())
    });
    let permit = Suspects::new();
    let orders = lab.queue().suspects(permit.clone()).handler(handler.clone());
    let refunds = lab.queue_named("refunds").suspects(permit).handler(handler);
    let process = lab.start_with(orders, |consumer| consumer.queue(refunds));
    let second = || lab.journal.all().into_iter().filter(|run| run.attempt == 2).count();
    until("the first suspect runs", || second() == 1).await;
    lab.send("fresh");
    until("a fresh order has run", || lab.journal.ended("fresh") == 1).await;
    assert_eq!(second(), 1, "beside the suspect, not after it");
    lab.drained().await;
    lab.broker.drained("refunds").await.unwrap();
    let mut suspects: Vec<_> = lab.journal.all().into_iter().filter(|run| run.attempt == 2).collect();
    suspects.sort_by_key(|run| run.began);
    assert_eq!(suspects.len(), 8);
    for pair in suspects.windows(2) {
        assert!(pair[0].ended.unwrap() <= pair[1].began, "{pair:?}");
    }
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn f26_a_lost_lease_does_not_give_the_suspect_permit_back_while_the_handler_runs() {
    let lab = Lab::new();
    suspects_of_two_queues(&lab, 1).await;
    let permit = Suspects::new();
    let queue = |queue: Queue| {
        queue.suspects(permit.clone()).handler(lab.handler(async |_| {
            sleep(5 * MINUTE).await;
            Ok(())
        }))
    };
    let process = lab.start(queue(lab.queue()));
    until("the order runs again", || lab.journal.runs("order-0") == 2).await;
    // The refunds of the same process have a store of their own way, that works.
    let store = FaultyStore::new(lab.store.clone());
    let consumer = Consumer::new(lab.broker.clone()).store(store.clone());
    let other = Process::spawn(store, consumer.queue(queue(lab.queue_named("refunds"))));
    process.store.set_down(true);
    // Not that of the process that was killed: its releases, unheard, notice the end of their leases as well.
    let second_lost = || {
        let events = lab.log.events();
        events.iter().any(|event| event.kind == EventKind::LeaseLost && event.attempt == 2)
    };
    until("the order's lease is lost", second_lost).await;
    pass(MINUTE).await;
    assert_eq!(lab.journal.runs("refund-0"), 1, "it waits for the permit");
    process.store.set_down(false);
    until("the refund runs again", || lab.journal.runs("refund-0") == 2).await;
    let (order, refund) = (&lab.journal.of("order-0")[1], &lab.journal.of("refund-0")[1]);
    assert!(order.ended.unwrap() <= refund.began, "{order:?} {refund:?}");
    lab.broker.drained("refunds").await.unwrap();
    process.stop().await.unwrap();
    other.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn f5_every_single_fault_of_the_store_is_survived_without_loss_or_repetition() {
    every_call_fails_once(|| async { Arc::new(MemoryStore::new()) as _ }, Trial::PATIENT).await;
}

#[tokio::test(start_paused = true)]
async fn f5_every_pair_of_faults_of_the_store_is_survived_without_loss_or_repetition() {
    for plot in Plot::ALL {
        for copies in [1, 2] {
            for (first, second) in (0..6).flat_map(|first| (first + 1..7).map(move |second| (first, second)))
            {
                for (one, other) in FAULTS.into_iter().flat_map(|one| FAULTS.map(|other| (one, other))) {
                    let faults = [(first, one), (second, other)];
                    Trial::PATIENT.run(Arc::new(MemoryStore::new()), plot, copies, &faults).await;
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn f5_a_claim_whose_answer_is_lost_counts_once() {
    for fault in [Fault::AfterEffect, Fault::Hang] {
        let lab = Lab::new();
        lab.send("order-1");
        let store = FaultyStore::new(lab.store.clone());
        for call in 0..4 {
            store.fail_call(call, fault);
        }
        let process = lab.start_over(store, takes(&lab, SECOND));
        lab.drained().await;
        assert_eq!(lab.journal.attempts("order-1"), [1], "{fault:?}");
        process.stop().await.unwrap();
        lab.check();
    }
}

#[tokio::test(start_paused = true)]
async fn f5_a_claim_given_up_is_released_so_that_the_next_one_does_not_wait_for_its_lease() {
    let lab = Lab::new();
    lab.send("order-1");
    let store = FaultyStore::new(lab.store.clone());
    store.fail_call(0, Fault::Hang);
    let process = lab.start_over(store, takes(&lab, SECOND).pause_hold(10 * SECOND));
    until("it has claimed, unheard", || lab.store.in_progress() == 1).await;
    process.store.set_down(true);
    until("the delivery is given up", || lab.count(EventKind::Returned(Disposition::Abandon)) == 1).await;
    process.store.set_down(false);
    let back = Instant::now();
    lab.drained().await;
    let run = &lab.journal.of("order-1")[0];
    assert!(run.began - back <= 2 * defaults::RECONNECT_CAP, "{:?}", run.began - back);
    assert_eq!((run.attempt, lab.journal.runs("order-1")), (1, 1), "it had not started");
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_release_is_told_to_the_store_before_the_broker() {
    let lab = Lab::new();
    lab.send("order-1");
    let process = lab.start(
        lab.queue().handler(lab.handler(
            async |run| {
                if run.attempt == 1 { Err("busy".into()) } else { Ok(()) }
            },
        )),
    );
    lab.drained().await;
    process.stop().await.unwrap();
    let kinds: Vec<_> = lab.log.events().iter().map(|event| event.kind).collect();
    let place = |wanted: EventKind| kinds.iter().position(|kind| *kind == wanted).unwrap();
    let released = place(EventKind::Released(Release::Failed { not_before: SECOND }));
    assert!(released < place(EventKind::Returned(Disposition::Requeue { after: SECOND })));
}
