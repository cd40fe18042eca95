//! Stops, drains and pauses: what a consumer does when it must not go on (I14).

use std::time::Duration;

use guestlist::dedup::Release;
use guestlist::dedup::protocol::State as Standing;
use guestlist::testing::{Checker, Fault, FaultyStore};
use guestlist::{Consumer, Disposition, EventKind, Failure, Queue, State, defaults};
use tokio::time::{Instant, sleep};

use crate::support::{HOUR, LEASE, Lab, LateStore, MINUTE, ORDERS, Process, SECOND, pass, until};

fn takes(lab: &Lab, time: Duration) -> Queue {
    lab.queue().handler(lab.handler(move |_| async move {
        sleep(time).await;
        Ok(())
    }))
}

#[tokio::test(start_paused = true)]
async fn a_stop_takes_no_more_and_lets_the_running_finish() {
    let lab = Lab::new();
    for number in 0..100 {
        lab.send(&format!("order-{number}"));
    }
    let process = lab.start(takes(&lab, 10 * SECOND));
    until("sixteen run", || lab.journal.all().len() == 16).await;
    pass(SECOND).await;
    let asked = Instant::now();
    process.ask_to_stop();
    until("it drains", || process.orders().state == State::Draining).await;
    let received = process.orders().received;
    lab.send("order-100");
    let status = process.status.clone();
    process.end().await.unwrap();
    assert!(asked.elapsed() <= 10 * SECOND, "{:?}", asked.elapsed());
    let orders = status.queue(ORDERS).unwrap();
    assert_eq!((orders.received, orders.handled, orders.state), (received, 16, State::Stopped));
    assert_eq!(lab.depth(), 101 - 16);
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn an_idle_consumer_stops_at_once() {
    let lab = Lab::new();
    let process = lab.start(takes(&lab, SECOND));
    pass(MINUTE).await;
    let asked = Instant::now();
    process.stop().await.unwrap();
    assert!(asked.elapsed() < SECOND, "{:?}", asked.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_consumer_without_its_broker_stops_at_once() {
    let lab = Lab::new();
    let process = lab.start(takes(&lab, SECOND));
    until("it consumes", || process.orders().state == State::Running).await;
    lab.broker.delete(ORDERS);
    pass(MINUTE).await;
    assert_eq!(process.orders().state, State::Reconnecting);
    let asked = Instant::now();
    process.stop().await.unwrap();
    assert!(asked.elapsed() < SECOND, "{:?}", asked.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_interrupted_message_comes_again_without_an_attempt_spent_three_times_in_a_row() {
    for in_process in [true, false] {
        let lab = Lab::new();
        lab.send("order-1");
        for life in 1..=6 {
            let queue = takes(&lab, HOUR);
            let consumer = Consumer::new(lab.broker.clone()).drain(SECOND).queue(queue);
            let store = FaultyStore::new(lab.store.clone());
            let consumer =
                if in_process { consumer.store(lab.store.clone()) } else { consumer.store(store.clone()) };
            let process = Process::spawn(store, consumer);
            until("it runs", || lab.journal.runs("order-1") == life).await;
            process.stop().await.unwrap();
        }
        assert_eq!(lab.journal.attempts("order-1"), [1, 1, 1, 1, 2, 3], "in process: {in_process}");
        assert_eq!(lab.count(EventKind::Released(Release::Interrupted)), 6);
        assert_eq!(lab.depth(), 1);
        lab.check();
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_waits_until_the_store_has_heard_of_what_was_interrupted() {
    let lab = Lab::new();
    lab.send("order-1");
    let store = LateStore::new(lab.store.clone());
    let consumer =
        Consumer::new(lab.broker.clone()).drain(SECOND).store(store.clone()).queue(takes(&lab, HOUR));
    let process = Process::spawn(FaultyStore::new(lab.store.clone()), consumer);
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    store.set_late(2 * SECOND);
    process.stop().await.unwrap();
    // The process may end now, and its runtime with it.
    let record = lab.record("order-1").await.unwrap();
    assert!(matches!(record.state, Standing::Released { .. }), "{record:?}");
    assert_eq!(record.attempt, 0);
}

#[tokio::test(start_paused = true)]
async fn a_stop_between_ok_and_complete_does_not_repeat_the_work() {
    let lab = Lab::new();
    lab.send("order-1");
    let store = FaultyStore::new(lab.store.clone());
    store.fail_call(1, Fault::Slow(4 * SECOND)); // complete
    let consumer =
        Consumer::new(lab.broker.clone()).drain(SECOND).store(store.clone()).queue(takes(&lab, 2 * SECOND));
    let process = Process::spawn(store, consumer);
    until("its handler has ended", || lab.journal.ended("order-1") == 1).await;
    process.stop().await.unwrap();
    let next = lab.start(takes(&lab, SECOND));
    lab.drained().await;
    next.stop().await.unwrap();
    assert_eq!(lab.journal.runs("order-1"), 1);
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_stop_while_the_store_is_away_keeps_its_deadline_and_loses_nothing() {
    let lab = Lab::new();
    let process = lab.start_with(takes(&lab, SECOND), |consumer| consumer.drain(10 * SECOND));
    process.store.set_down(true);
    for number in 0..40 {
        lab.send(&format!("order-{number}"));
    }
    until("it pauses", || process.orders().state == State::Paused).await;
    let asked = Instant::now();
    process.stop().await.unwrap();
    assert!(asked.elapsed() <= 20 * SECOND, "{:?}", asked.elapsed());
    assert_eq!(lab.depth(), 40);
    let next = lab.start(takes(&lab, SECOND));
    lab.drained().await;
    next.stop().await.unwrap();
    assert!((0..40).all(|number| lab.journal.attempts(&format!("order-{number}")) == [1]));
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_stop_while_the_dead_letters_are_away_keeps_the_message() {
    let lab = Lab::new();
    lab.send("order-1");
    lab.broker.fail_publishes(1_000, guestlist::broker::memory::PublishFault::Nacked);
    let queue = lab.queue().handler(lab.handler(async |_| Err(Failure::permanent("never"))));
    let process = lab.start_with(queue, |consumer| consumer.drain(10 * SECOND));
    until("it pauses", || process.orders().state == State::Paused).await;
    process.stop().await.unwrap();
    assert_eq!((lab.depth(), lab.letters().len()), (1, 0));
    let record = lab.record("order-1").await.unwrap();
    assert!(matches!(record.state, Standing::Released { .. }), "{record:?}");
    assert_eq!(record.attempt, 1, "the handler ran: the attempt counts");
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_pause_gives_its_deliveries_back_after_pause_hold_and_goes_on_within_the_reconnect_cap() {
    let lab = Lab::new();
    let hold = 20 * SECOND;
    let process = lab.start(takes(&lab, SECOND).pause_hold(hold));
    process.store.set_down(true);
    for number in 0..30 {
        lab.send(&format!("order-{number}"));
    }
    until("it pauses", || process.orders().state == State::Paused).await;
    let paused = Instant::now();
    let returned = || lab.log.count(|kind| matches!(kind, EventKind::Returned(_)));
    until("what is in hand is back", || returned() > 0).await;
    let kept = paused.elapsed();
    assert!(kept + SECOND > hold && kept < hold + SECOND, "{kept:?}");
    pass(MINUTE).await;
    process.store.set_down(false);
    let back = Instant::now();
    lab.drained().await;
    assert!(back.elapsed() <= defaults::RECONNECT_CAP + 3 * SECOND, "{:?}", back.elapsed());
    assert!(lab.journal.all().iter().all(|run| run.attempt == 1));
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_pause_interrupts_no_running_handler() {
    let lab = Lab::new();
    lab.send("long");
    let handler = lab.handler(async |run| {
        sleep(if run.id() == "long" { 45 * SECOND } else { SECOND }).await;
        Ok(())
    });
    // Its lease outlasts the outage.
    let process = lab.start(lab.queue().lease(2 * MINUTE).pause_hold(10 * SECOND).handler(handler));
    until("it runs", || lab.journal.runs("long") == 1).await;
    process.store.set_down(true);
    lab.send("short");
    pass(30 * SECOND).await;
    process.store.set_down(false);
    lab.drained().await;
    assert_eq!((lab.journal.runs("long"), lab.journal.ended("long")), (1, 1));
    assert_eq!(lab.count(EventKind::Returned(Disposition::Abandon)), 1, "the one that waited for the store");
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_stop_while_a_pause_gives_up_keeps_the_deadline_of_the_drain() {
    let lab = Lab::new();
    lab.send("long");
    let handler = lab.handler(async |run| {
        sleep(if run.id() == "long" { HOUR } else { SECOND }).await;
        Ok(())
    });
    let queue = lab.queue().lease(2 * MINUTE).pause_hold(10 * SECOND).handler(handler);
    let process = lab.start_with(queue, |consumer| consumer.drain(30 * SECOND));
    until("it runs", || lab.journal.runs("long") == 1).await;
    process.store.set_down(true);
    lab.send("short");
    until("the pause gives up", || lab.count(EventKind::Returned(Disposition::Abandon)) == 1).await;
    pass(20 * SECOND).await;
    process.store.set_down(false);
    let asked = Instant::now();
    process.stop().await.unwrap();
    assert!(asked.elapsed() <= 35 * SECOND, "{:?}", asked.elapsed());
    let record = lab.record("long").await.unwrap();
    assert!(matches!(record.state, Standing::Released { .. }), "{record:?}");
    assert_eq!(lab.depth(), 2);
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_panicking_handler_leaves_the_consumer_and_its_neighbours_alive() {
    let lab = Lab::new();
    for number in 0..20 {
        lab.send(&format!("order-{number}"));
    }
    let handler = lab.handler(async |run| {
        sleep(SECOND).await;
        assert!(!run.id().ends_with('3'), "on purpose");
        Ok(())
    });
    let process = lab.start(lab.queue().max_attempts(2).handler(handler));
    lab.drained().await;
    let orders = process.orders();
    assert_eq!((orders.handled, lab.causes().len()), (18, 2));
    assert!(process.status.is_healthy());
    process.stop().await.unwrap();
    lab.check_as(Checker::new().max_attempts(Some(2)));
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_a_lease_that_nobody_renews() {
    let lab = Lab::new();
    lab.send("order-1");
    let holder = lab.start(takes(&lab, HOUR));
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    lab.send("order-1");
    let other = lab.start(takes(&lab, SECOND));
    until("the copy waits", || lab.count(EventKind::Waited) > 0).await;
    holder.kill().await;
    let asked = Instant::now();
    other.stop().await.unwrap();
    assert!(asked.elapsed() < LEASE, "{:?}", asked.elapsed());
    assert_eq!(lab.depth(), 2);
}
