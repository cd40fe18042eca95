//! Faults of a store, counted out: each call of a delivery's life fails once, in each way.

use std::sync::Arc;
use std::time::Duration;

use guestlist::dedup::protocol::Token;
use guestlist::dedup::{Before, DedupStore};
use guestlist::testing::{Checker, Fault, FaultyStore};
use guestlist::{Backoff, Consumer, EventKind, Failure, Handled, QueueStatus};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{LEASE, Lab, ORDERS, Process, SECOND};

/// The ways in which a call can fail.
pub(crate) const FAULTS: [Fault; 3] = [Fault::BeforeEffect, Fault::AfterEffect, Fault::Hang];

/// How many trials run side by side: over a real server most of them wait.
const AT_ONCE: usize = 8;

/// Over a server, a copy that waits asks again and again, the oftener the slower the machine: what comes later is one more
/// question of the same kind, or meets its fault when the end comes sooner.
const CALLS: usize = 20;

/// What a handler does, and how often it should run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Plot {
    Succeeds,
    FailsOnce,
    FailsForGood,
    Defers,
}

impl Plot {
    pub(crate) const ALL: [Self; 4] = [Self::Succeeds, Self::FailsOnce, Self::FailsForGood, Self::Defers];

    fn act(self, nth_run: usize, backoff: Duration) -> Handled {
        match self {
            Self::FailsOnce if nth_run == 1 => Err("busy".into()),
            Self::Defers if nth_run == 1 => Err(Failure::defer(backoff)),
            Self::Succeeds | Self::FailsOnce | Self::Defers => Ok(()),
            Self::FailsForGood => Err(Failure::permanent("never")),
        }
    }

    fn runs(self) -> usize {
        match self {
            Self::Succeeds | Self::FailsForGood => 1,
            Self::FailsOnce | Self::Defers => 2,
        }
    }
}

/// How long things take in a trial, and what is between the faults and the consumer.
#[derive(Clone, Copy)]
pub(crate) struct Trial {
    /// A store call is given up after a sixth of it.
    pub(crate) lease: Duration,
    pub(crate) backoff: Duration,
    /// Whether a stall of the machine takes time.
    pub(crate) real_time: bool,
    /// What the consumer asks, over the store that fails.
    pub(crate) over: fn(FaultyStore) -> Arc<dyn DedupStore>,
}

impl Trial {
    /// For a store whose clock can be paused.
    pub(crate) const PATIENT: Self = Self { lease: LEASE, backoff: SECOND, real_time: false, over: plain };

    /// For a store on a server, in real time.
    #[cfg_attr(
        not(any(feature = "redis", feature = "postgres", feature = "nats", feature = "durable")),
        expect(dead_code, reason = "no such store in this build")
    )]
    pub(crate) const SWIFT: Self = Self {
        lease: Duration::from_millis(1_500),
        backoff: Duration::from_millis(30),
        real_time: true,
        over: plain,
    };

    /// Delivers until acked, with these faults of the store, and proves that nothing is lost or repeated.
    /// Returns how many calls the store had.
    pub(crate) async fn run(
        self,
        store: Arc<dyn DedupStore>,
        plot: Plot,
        copies: usize,
        faults: &[(usize, Fault)],
    ) -> usize {
        let lab = Lab::new();
        for _ in 0..copies {
            lab.send("order-1");
        }
        let store = FaultyStore::over(store);
        for (call, fault) in faults {
            store.fail_call(*call, *fault);
        }
        let process = self.start(&lab, store, plot);
        let drained = timeout(40 * self.lease + 20 * SECOND, lab.broker.drained(ORDERS)).await;
        let what = format!("{plot:?}, {copies} copies, {faults:?}: {:?}", process.orders());
        assert!(drained.is_ok(), "the queue is not drained: {what}");
        let (calls, orders) = (process.store.calls(), process.orders());
        process.stop().await.unwrap();
        // A claim whose answer was lost is in no log: if it ran out as well, the log does not explain the run after it.
        if !(self.real_time && vanished(&lab)) {
            lab.check_as(Checker::new().lease(self.lease));
        }
        let slow = lease_ran_out(&lab) || self.real_time && no_time_to_record(&lab);
        if !slow {
            as_the_plot_says(&lab, plot, copies, &orders, &what);
        }
        calls
    }

    fn start(self, lab: &Lab, store: FaultyStore, plot: Plot) -> Process {
        let (journal, backoff) = (lab.journal.clone(), self.backoff);
        let handler = lab.handler(move |run| {
            let nth_run = journal.runs(&run.id());
            async move { plot.act(nth_run, backoff) }
        });
        let queue = lab
            .queue()
            // A store on a server may remember the trials before.
            .scope(format!("{:?}", Token::random()))
            .lease(self.lease)
            .backoff(Backoff::new(self.backoff, 4, 300 * self.backoff).without_jitter())
            .handler(handler);
        let consumer = Consumer::new(lab.broker.clone()).store((self.over)(store.clone())).queue(queue);
        Process::spawn(store, consumer)
    }
}

fn plain(store: FaultyStore) -> Arc<dyn DedupStore> {
    Arc::new(store)
}

/// On a machine so slow that a lease ran out, an id may rightly run again.
fn lease_ran_out(lab: &Lab) -> bool {
    lab.count(EventKind::LeaseLost) > 0 || vanished(lab)
}

/// Whether somebody claimed an id whose holder's lease had run out.
fn vanished(lab: &Lab) -> bool {
    lab.count(EventKind::Claimed(Before::Vanished)) > 0
}

/// On a machine that stalled while the store was asked to remember a run, the lease may rightly be over before the
/// question is asked again. A gap before the lease's end is none of the machine's.
fn no_time_to_record(lab: &Lab) -> bool {
    let events = lab.log.events();
    let mut gaps = events.iter().filter(|event| event.kind == EventKind::Gap).peekable();
    gaps.peek().is_some() && gaps.all(|gap| gap.lease_ends.is_some_and(|end| end <= gap.at))
}

fn as_the_plot_says(lab: &Lab, plot: Plot, copies: usize, orders: &QueueStatus, what: &str) {
    assert_eq!(lab.journal.runs("order-1"), plot.runs(), "{what}");
    if matches!(plot, Plot::FailsForGood) {
        assert_eq!((lab.letters().len(), orders.handled), (copies, 0), "{what}");
    } else {
        assert_eq!((orders.handled, orders.dedup_gaps), (1, 0), "{what}");
        assert_eq!(orders.duplicates, copies as u64 - 1, "{what}");
        assert!(lab.letters().is_empty(), "{what}");
    }
}

/// A success, a failure that is retried, a dead letter and a deferral, each with and without a copy: once
/// for each call that the store gets and each way to fail. Proves I1 to I8 as far as the log of events can
/// show them, and that nothing was lost or done twice.
pub(crate) async fn every_call_fails_once<S>(open: impl Fn() -> S, trial: Trial)
where
    S: Future<Output = Arc<dyn DedupStore>>,
{
    for plot in Plot::ALL {
        for copies in [1, 2] {
            let calls = trial.run(open().await, plot, copies, &[]).await;
            assert!(calls >= 2, "a claim and its end, at least");
            let mut trials = JoinSet::new();
            for (call, fault) in (0..=calls.min(CALLS)).flat_map(|call| FAULTS.map(|fault| (call, fault))) {
                if trials.len() >= AT_ONCE {
                    trials.join_next().await.unwrap().unwrap();
                }
                let store = open().await;
                trials.spawn(async move { trial.run(store, plot, copies, &[(call, fault)]).await });
            }
            trials.join_all().await;
        }
    }
}
