//! The store: the pure machine over an ordered map, and each process's own bad road to it.

use std::collections::BTreeMap;
use std::fmt;
use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use guestlist::DedupKey;
use guestlist::dedup::protocol::{Ask, Claim, Held, Machine, Micros, Record, Release, Run};
use guestlist::dedup::{DedupStore, InProcessStore, StoreError, StoreFeatures};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::{Instant, sleep};

use super::plan::MILLI;
use super::process::Process;
use super::rules::{Rule, step};

/// One call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Claim(Ask),
    Renew(Run, Duration),
    Complete(Run, Duration),
    Release(Run, Release),
}

/// Its answer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    Claim(Claim),
    Held(Held),
}

/// The records, and the store's clock.
pub(super) struct Records {
    rule: Rule,
    began: Instant,
    by_key: Mutex<BTreeMap<DedupKey, Record>>,
    changed: Notify,
    /// No call arrives before then.
    down_until: Mutex<Instant>,
}

impl Records {
    pub(super) fn new(rule: Rule) -> Self {
        let began = Instant::now();
        let down_until = Mutex::new(began);
        Self { rule, began, by_key: Mutex::default(), changed: Notify::new(), down_until }
    }

    pub(super) fn now(&self) -> Micros {
        1_000_000_000 + u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    pub(super) fn peek(&self, key: &DedupKey) -> Option<Record> {
        Machine::at(self.now()).live(self.by_key.lock().unwrap().get(key).copied())
    }

    pub(super) fn lose(&self, key: &DedupKey) -> bool {
        self.by_key.lock().unwrap().remove(key).is_some()
    }

    pub(super) fn go_down_until(&self, then: Instant) {
        *self.down_until.lock().unwrap() = then;
    }

    fn is_down(&self) -> bool {
        Instant::now() < *self.down_until.lock().unwrap()
    }

    /// One atomic step: what was there, the answer, and what is there now.
    fn apply(&self, key: &DedupKey, op: &Op) -> (Option<Record>, Answer, Option<Record>) {
        let mut records = self.by_key.lock().unwrap();
        let old = records.get(key).copied();
        let (new, answer) = step(self.rule, Machine::at(self.now()), old, op);
        match new {
            Some(record) => drop(records.insert(*key, record)),
            None => drop(records.remove(key)),
        }
        (old, answer, new)
    }
}

/// A process's road to the records.
#[derive(Clone)]
pub(super) struct SimStore {
    process: Arc<Process>,
}

impl SimStore {
    pub(super) fn of(process: Arc<Process>) -> Self {
        Self { process }
    }

    /// The call takes effect, and the world sees it.
    fn apply(&self, key: &DedupKey, op: Op) -> Answer {
        let world = &self.process.world;
        let (old, answer, new) = world.records.apply(key, &op);
        world.log.store(self.process.number, world.truth.id_of(key), op, answer);
        world.truth.applied(key, &op, old, new);
        world.records.changed.notify_waiters();
        answer
    }

    /// As [`apply`](Self::apply), some time later, whether or not anybody still waits for it.
    fn apply_later(
        &self,
        key: &DedupKey,
        op: Op,
        delay: Duration,
    ) -> tokio::task::JoinHandle<Option<Answer>> {
        let (road, key) = (self.clone(), *key);
        tokio::spawn(async move {
            sleep(delay).await;
            // What arrives at a store that is down is lost.
            let down = road.process.world.records.is_down();
            (!down).then(|| road.apply(&key, op))
        })
    }

    async fn call(&self, key: &DedupKey, op: Op) -> Result<Answer, StoreError> {
        let (process, world) = (&self.process, &self.process.world);
        process.point("crash before a store call").await;
        world.latency().await;
        if world.records.is_down() || process.is_cut_off() {
            return self.unreachable().await;
        }
        let fault = world.strikes(world.plan.rates.store).then(|| world.rng.below(6));
        let say = |fault| world.log.fault(Some(process.number), fault);
        let most = world.plan.lease * 3 / 2;
        let answer = match fault {
            Some(0) => {
                say("store: request lost");
                return Err(StoreError::new("the request was lost"));
            }
            Some(1) => {
                say("store: request lost, no answer");
                return pending().await;
            }
            Some(2) => {
                say("store: late");
                let delay = world.rng.duration(MILLI, most);
                self.apply_later(key, op, delay)
                    .await
                    .ok()
                    .flatten()
                    .ok_or_else(|| StoreError::new("the connection broke"))?
            }
            Some(3) => {
                say("store: request delivered twice");
                drop(self.apply_later(key, op, world.rng.duration(MILLI, 2 * most)));
                self.apply(key, op)
            }
            _ => self.apply(key, op),
        };
        process.point("crash after a store call").await;
        match fault {
            Some(4) => {
                say("store: answer lost");
                return Err(StoreError::new("the answer was lost"));
            }
            Some(5) => {
                say("store: no answer");
                return pending().await;
            }
            _ => {}
        }
        world.latency().await;
        process.alive().await;
        Ok(answer)
    }

    async fn unreachable(&self) -> Result<Answer, StoreError> {
        let world = &self.process.world;
        world.log.fault(Some(self.process.number), "store: unreachable");
        if world.rng.chance(300) {
            return pending().await;
        }
        Err(StoreError::new("the store cannot be reached"))
    }

    async fn held(&self, key: &DedupKey, op: Op) -> Result<Held, StoreError> {
        match self.call(key, op).await? {
            Answer::Held(held) => Ok(held),
            Answer::Claim(_) => unreachable!("no answer to this question"),
        }
    }

    /// Without a road between: never fails, unless the process is dead.
    fn held_now(&self, key: &DedupKey, op: Op) -> Held {
        if self.process.is_dead() {
            return Held::Lost;
        }
        match self.apply(key, op) {
            Answer::Held(held) => held,
            Answer::Claim(_) => unreachable!("no answer to this question"),
        }
    }
}

#[async_trait]
impl DedupStore for SimStore {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        match self.call(key, Op::Claim(*ask)).await? {
            Answer::Claim(claim) => Ok(claim),
            Answer::Held(_) => unreachable!("no answer to this question"),
        }
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.held(key, Op::Renew(run, lease)).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.held(key, Op::Complete(run, window)).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        self.held(key, Op::Release(run, why)).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        Ok(self.process.world.records.peek(key))
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        Ok(self.process.world.records.lose(key))
    }

    fn features(&self) -> StoreFeatures {
        if self.in_process().is_some() { StoreFeatures::IN_MEMORY } else { StoreFeatures::SHARED }
    }

    fn in_process(&self) -> Option<&dyn InProcessStore> {
        self.process.world.plan.in_process.then_some(self)
    }
}

impl InProcessStore for SimStore {
    fn claim_now(&self, key: &DedupKey, ask: &Ask) -> Claim {
        if self.process.is_dead() {
            return Claim::InProgress { left: ask.lease, digest: None };
        }
        match self.apply(key, Op::Claim(*ask)) {
            Answer::Claim(claim) => claim,
            Answer::Held(_) => unreachable!("no answer to this question"),
        }
    }

    fn renew_now(&self, key: &DedupKey, run: Run, lease: Duration) -> Held {
        self.held_now(key, Op::Renew(run, lease))
    }

    fn complete_now(&self, key: &DedupKey, run: Run, window: Duration) -> Held {
        self.held_now(key, Op::Complete(run, window))
    }

    fn release_now(&self, key: &DedupKey, run: Run, why: Release) -> Held {
        self.held_now(key, Op::Release(run, why))
    }

    fn left_now(&self, key: &DedupKey) -> Duration {
        if self.process.is_dead() {
            return self.process.world.plan.lease;
        }
        let records = &self.process.world.records;
        Machine::at(records.now()).left(records.peek(key))
    }

    fn changed(&self, _: &DedupKey) -> Notified<'_> {
        self.process.world.records.changed.notified()
    }
}

impl fmt::Debug for SimStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimStore")
    }
}
