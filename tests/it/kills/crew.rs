//! The parent: starts processes, kills them, and judges by what they left behind.

use std::collections::HashMap;
use std::process::{Child, ExitStatus};

use guestlist::testing::checker::{Checker, Log, LogWriter, Marker, Reason, Report};

use super::broker::{Plain, dead};
use super::child::Job;
use super::{KILLS, LEASE, below, key, until};

/// Processes of one job.
pub(super) struct Crew {
    pub(super) job: Job,
    pub(super) broker: Plain,
    /// What only the parent knows.
    log: LogWriter,
    members: Vec<(&'static str, Child)>,
}

impl Crew {
    /// Declares the queue, and starts a process for each name.
    pub(super) async fn start(job: Job, names: &[&'static str]) -> Self {
        let broker = Plain::connect(&job.broker).await;
        broker.declare(&job.queue).await;
        let log = LogWriter::append(job.log("parent"), "parent").unwrap();
        let members = names.iter().map(|name| (*name, job.spawn(name))).collect();
        Self { job, broker, log, members }
    }

    pub(super) async fn publish(&self, ids: &[String]) {
        self.broker.publish(&self.job.queue, ids).await;
    }

    /// Waits until every process consumes.
    pub(super) async fn ready(&mut self) {
        for (name, child) in &mut self.members {
            until("a process consumes", || {
                let ended = child.try_wait().unwrap();
                assert!(ended.is_none(), "{name} ended: {}", self.job.said(name));
                std::future::ready(self.job.ready(name).exists())
            })
            .await;
        }
    }

    /// SIGKILL for one of them, and another one of its name.
    fn kill_one(&mut self) {
        let victim = below(self.members.len());
        let (name, child) = &mut self.members[victim];
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert!(!status.success(), "{name} ended by itself: {}", self.job.said(name));
        self.bury(victim);
    }

    fn bury(&mut self, dead: usize) {
        let (name, child) = &mut self.members[dead];
        self.log.mark_of(*name, Marker::ProcessKilled);
        *child = self.job.spawn(name);
    }

    /// Starts those again that died by themselves; how many these were.
    pub(super) fn revive(&mut self) -> usize {
        let died: Vec<usize> = (0..self.members.len())
            .filter(|member| self.members[*member].1.try_wait().unwrap().is_some())
            .collect();
        for member in &died {
            self.bury(*member);
        }
        died.len()
    }

    /// Asks all to stop, and waits until they have.
    pub(super) async fn stop(&mut self) {
        for (_, child) in &mut self.members {
            drop(child.stdin.take());
        }
        for (name, child) in &mut self.members {
            let mut ended: Option<ExitStatus> = None;
            until("a process stops", || {
                ended = child.try_wait().unwrap();
                std::future::ready(ended.is_some())
            })
            .await;
            assert!(ended.is_some_and(|status| status.success()), "{name} failed: {}", self.job.said(name));
        }
    }

    fn start_again(&mut self) {
        for (name, child) in &mut self.members {
            *child = self.job.spawn(name);
        }
    }

    /// Each batch, and a kill somewhere in it.
    pub(super) async fn work_and_die(&mut self, ids: &[String]) {
        for batch in batches(ids) {
            self.ready().await;
            let before = self.job.runs().len();
            self.publish(&batch.messages).await;
            let then = before + below(batch.new / 2);
            until("the batch is under way", || async { self.job.runs().len() > then }).await;
            self.kill_one();
        }
    }

    /// Waits until all is done, stops, and looks whether the broker agrees.
    pub(super) async fn finish(&mut self, ids: &[String]) {
        // What RabbitMQ's consumers have in hand is not counted: it shows when they have stopped.
        for _ in 0..10 {
            until("every id has run, and the queue is empty", || async {
                self.job.missing(ids) == 0 && self.broker.left(&self.job.queue).await == 0
            })
            .await;
            self.stop().await;
            if self.broker.left(&self.job.queue).await == 0 {
                return;
            }
            self.start_again();
            self.ready().await;
        }
        panic!("the queue is not drained");
    }

    pub(super) fn log(&self) -> Log {
        let names = self.members.iter().map(|(name, _)| *name).chain(["parent"]);
        Log::merge(names.map(|name| Log::read(self.job.log(name)).unwrap()))
    }

    /// Every id has run; every run beyond one is explained.
    pub(super) fn judge(&self, what: &str, checker: Checker, ids: &[String]) -> Report {
        assert_eq!(self.job.missing(ids), 0, "{what}: ids are lost");
        let checker = checker.lease(LEASE).max_attempts(Some(self.job.attempts));
        let report = checker.check(&self.log());
        let runs = self.job.runs_by_id();
        let again = runs.values().filter(|runs| **runs > 1).count();
        println!("{what}: {again} ids came to the end of a run more than once; {report}");
        report.assert_clean();
        for (id, runs) in &runs {
            let extra = report.extra_runs.iter().filter(|extra| extra.key == key(id)).count();
            assert!(extra + 1 >= *runs, "{what}: {id} ended {runs} runs, and {extra} are explained");
        }
        let of_a_kill = [Reason::Crashed, Reason::LeaseExpired, Reason::Gap, Reason::Interrupted];
        let others = report.extra_runs.iter().find(|extra| !of_a_kill.contains(&extra.reason));
        assert!(others.is_none(), "{what}: not by a kill: {others:?}");
        report
    }

    /// Nothing is with the dead letters.
    pub(super) async fn none_is_dead(&self) {
        assert_eq!(self.broker.left(&dead(&self.job.queue)).await, 0, "good messages with the dead letters");
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for (name, child) in &mut self.members {
            if std::thread::panicking() {
                println!("{name} said: {}", self.job.said(name));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Job {
    /// The ids whose handler came to its end, once for each time.
    pub(super) fn runs(&self) -> Vec<String> {
        let journal = std::fs::read_to_string(self.journal()).unwrap_or_default();
        journal.lines().map(str::to_owned).collect()
    }

    fn runs_by_id(&self) -> HashMap<String, usize> {
        let mut runs = HashMap::new();
        for id in self.runs() {
            *runs.entry(id).or_default() += 1;
        }
        runs
    }

    pub(super) fn missing(&self, ids: &[String]) -> usize {
        let runs = self.runs_by_id();
        ids.iter().filter(|id| !runs.contains_key(*id)).count()
    }

    fn said(&self, name: &str) -> String {
        std::fs::read_to_string(self.output(name)).unwrap_or_default()
    }
}

struct Batch {
    messages: Vec<String>,
    /// How many ids it brings.
    new: usize,
}

/// All ids, a fifth of them twice; and all of that once more, one batch later; mixed within each batch.
fn batches(ids: &[String]) -> Vec<Batch> {
    let parts: Vec<Vec<String>> = ids.chunks(ids.len().div_ceil(KILLS)).map(with_copies).collect();
    let before = std::iter::once(Vec::new()).chain(parts.clone());
    let mut batches: Vec<Batch> = parts
        .iter()
        .zip(before)
        .map(|(part, before)| Batch {
            messages: shuffled([part.clone(), before].concat()),
            new: part.len() * 5 / 6,
        })
        .collect();
    if let (Some(batch), Some(part)) = (batches.last_mut(), parts.last()) {
        batch.messages.extend(part.iter().cloned());
    }
    batches
}

fn with_copies(ids: &[String]) -> Vec<String> {
    ids.iter().chain(ids.iter().step_by(5)).cloned().collect()
}

fn shuffled(mut ids: Vec<String>) -> Vec<String> {
    for end in (1..ids.len()).rev() {
        ids.swap(end, below(end + 1));
    }
    ids
}
