//! Event logs of consumers: on disk, of several processes, and what a checker makes of them.

use std::path::PathBuf;

use guestlist::testing::FaultyStore;
use guestlist::testing::checker::{Checker, Log, LogWriter, Marker, Reason};
use guestlist::{Consumer, EventKind, Queue};
use tokio::time::sleep;

use crate::support::{LEASE, Lab, ORDERS, Process, SECOND, until};

/// A file that is there as long as this.
struct LogFile(PathBuf);

impl LogFile {
    fn new(name: &str) -> Self {
        let file = format!("guestlist-{name}-{}.jsonl", std::process::id());
        Self(std::env::temp_dir().join(file))
    }

    fn writer(&self, process: &str) -> LogWriter {
        LogWriter::append(&self.0, process).unwrap()
    }

    fn read(&self) -> Log {
        Log::read(&self.0).unwrap()
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A handler that takes two seconds.
fn slow(lab: &Lab, log: &LogWriter) -> Queue {
    let handler = lab.handler(async |_| {
        sleep(2 * SECOND).await;
        Ok(())
    });
    lab.queue().observer(log.observer()).handler(handler)
}

#[tokio::test(start_paused = true)]
async fn the_logs_of_two_processes_tell_why_an_id_ran_twice() {
    let (first, second, test) = (LogFile::new("first"), LogFile::new("second"), LogFile::new("test"));
    let logs = (first.writer("first"), second.writer("second"), test.writer("test"));
    let lab = Lab::new();
    lab.send("order-1");
    let process = lab.start(slow(&lab, &logs.0));
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    process.kill().await;
    logs.2.mark_of("first", Marker::ProcessKilled);
    lab.broker.crash(ORDERS).unwrap();

    let process = lab.start(slow(&lab, &logs.1));
    lab.drained().await;
    lab.send("order-1");
    lab.drained().await;
    process.stop().await.unwrap();

    let log = Log::merge([test.read(), second.read(), first.read()]);
    let report = Checker::new().check(&log);
    report.assert_clean();
    assert_eq!((report.counts.runs, report.counts.duplicates, report.counts.ids), (2, 1, 1), "{report}");
    assert_eq!(report.extra(Reason::Crashed), 1, "{report}");
}

#[tokio::test(start_paused = true)]
async fn an_event_says_until_when_its_claim_holds_and_why_a_delivery_went_back() {
    let lab = Lab::new();
    lab.send("order-1");
    lab.send("order-1");
    let queue = lab.queue().compare_bodies().handler(lab.handler(async |run| {
        sleep(12 * SECOND).await;
        if run.attempt == 1 { Err("not yet".into()) } else { Ok(()) }
    }));
    let process = lab.start(queue);
    lab.drained().await;
    process.stop().await.unwrap();
    let report = lab.check();
    assert_eq!(report.extra(Reason::Retried), 1);
    let events = lab.log.events();
    let claimed = events.iter().find(|event| matches!(event.kind, EventKind::Claimed(_))).unwrap();
    assert_eq!(claimed.lease_ends, Some(claimed.at + LEASE));
    let failed = events.iter().find(|event| matches!(event.kind, EventKind::Failed(_))).unwrap();
    assert!(failed.lease_ends > claimed.lease_ends, "it was renewed");
    let causes: Vec<_> = events
        .iter()
        .filter(|event| matches!(event.kind, EventKind::Returned(_)))
        .filter_map(|event| event.cause)
        .map(guestlist::Cause::name)
        .collect();
    assert!(causes.contains(&"in_progress") && causes.contains(&"transient"), "{causes:?}");
    let bodies: Vec<_> = events.iter().filter(|event| event.key.is_some()).map(|event| event.body).collect();
    assert!(bodies.iter().all(|body| body.is_some() && *body == bodies[0]), "{bodies:?}");
}

#[tokio::test(start_paused = true)]
async fn the_processes_of_one_recorder_are_told_apart() {
    let lab = Lab::new();
    lab.send("order-1");
    let queue = |process: &str| {
        let handler = lab.handler(async |_| {
            sleep(2 * SECOND).await;
            Ok(())
        });
        lab.queue().observer(lab.log.observer_of(process)).handler(handler)
    };
    let store = FaultyStore::new(lab.store.clone());
    let consumer = Consumer::new(lab.broker.clone()).store(store.clone()).queue(queue("first"));
    let first = Process::spawn(store, consumer);
    until("it runs", || lab.journal.runs("order-1") == 1).await;
    first.kill().await;
    lab.log.mark("first", Marker::ProcessKilled);
    lab.broker.crash(ORDERS).unwrap();
    let second = lab.start(queue("second"));
    lab.drained().await;
    second.stop().await.unwrap();
    let report = lab.check();
    assert_eq!(report.extra(Reason::Crashed), 1, "{report}");
    let log = lab.log.log();
    let processes: Vec<_> = log.entries().iter().map(|entry| &*entry.process).collect();
    assert!(processes.contains(&"first") && processes.contains(&"second"));
}
