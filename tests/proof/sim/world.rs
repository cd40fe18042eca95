//! One run: a world made from a seed, its calamities, and its end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guestlist::dedup::StorePolicy;
use guestlist::testing::checker::{Checker, Invariant, Marker, Report, Violation};
use guestlist::testing::seed_randomness;
use guestlist::{DedupKey, Message};
use tokio::task::JoinSet;
use tokio::time::{Instant, advance, sleep, timeout};

use super::broker::Hub;
use super::log::{Fault, Log};
use super::panics::Panics;
use super::plan::{Kind, MILLI, MINUTE, Plan, SECOND};
use super::process::{Process, supervise};
use super::rng::Rng;
use super::rules::Rule;
use super::store::Records;
use super::truth::{Sums, Truth, name};

pub(super) const ORDERS: &str = "orders";
pub(super) const DEAD: &str = "orders.dead";

/// After the last fault, everything must have come to rest within this.
pub(super) const REST: Duration = Duration::from_secs(60 * 60);

/// Nothing has happened for so long: nothing will.
const GIVEN_UP: Duration = Duration::from_secs(10 * 60);

pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) rng: Rng,
    pub(super) log: Arc<Log>,
    pub(super) truth: Truth,
    pub(super) records: Records,
    pub(super) broker: Hub,
    /// By place.
    pub(super) processes: Mutex<BTreeMap<usize, Arc<Process>>>,
    numbers: AtomicUsize,
    calm: AtomicBool,
    over: AtomicBool,
    given_up: AtomicBool,
    /// From here on, the last late request has arrived.
    calm_since: Mutex<Instant>,
    longest_idle: Mutex<Duration>,
}

/// What is left of a run.
pub(super) struct Outcome {
    pub(super) plan: Plan,
    pub(super) sums: Sums,
    pub(super) faults: BTreeMap<Fault, u64>,
    pub(super) violations: Vec<String>,
    pub(super) rested_after: Duration,
    pub(super) longest_idle: Duration,
    pub(super) report: Report,
    pub(super) text: Box<dyn Fn() -> (String, String)>,
}

/// Plays a seed, in a runtime of its own on this thread.
pub(super) fn play(seed: u64, rule: Rule) -> Outcome {
    let _seeded = seed_randomness(seed);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let listening = Panics::listen();
    let mut outcome = runtime.block_on(run(Plan::of(seed), rule));
    drop(runtime);
    outcome.violations.extend(listening.heard());
    outcome
}

async fn run(plan: Plan, rule: Rule) -> Outcome {
    let log = Arc::new(Log::begin());
    let world = Arc::new(World {
        rng: Rng::new(plan.seed ^ 0x5EED),
        truth: Truth::of(plan.stories.len(), plan.window, rule, Arc::clone(&log)),
        log,
        records: Records::new(rule),
        broker: Hub::new(plan.kind),
        processes: Mutex::default(),
        numbers: AtomicUsize::new(0),
        calm: AtomicBool::new(false),
        over: AtomicBool::new(false),
        given_up: AtomicBool::new(false),
        calm_since: Mutex::new(Instant::now()),
        longest_idle: Mutex::default(),
        plan,
    });
    let mut places = JoinSet::new();
    for place in 0..world.plan.processes {
        places.spawn(supervise(Arc::clone(&world), place));
    }
    let mut around = JoinSet::new();
    around.spawn(Arc::clone(&world).send_all());
    around.spawn(Arc::clone(&world).suffer());
    if world.plan.kind == Kind::JetStream {
        around.spawn(Arc::clone(&world).expire());
    }
    sleep(world.plan.span).await;
    world.calm_down();
    let since = Instant::now();
    let mut drained = world.rests().await;
    let rested_after = since.elapsed();
    if drained {
        drained = world.redrive_all().await;
    }
    world.end(&mut places).await;
    // Each knows its world, and the world each.
    world.processes.lock().unwrap().clear();
    let sums = world.truth.at_rest(drained);
    if !drained {
        world.truth.violated("I9: it does not come to rest".to_owned());
    }
    drop(around);
    let report = match rule {
        // Counted, not judged.
        Rule::Peer(_) => Report::default(),
        _ => checker(&world.plan).check(&world.log.checked()),
    };
    judge(&world, &report);
    let (faults, violations) = (world.log.faults(), world.truth.violations());
    let (plan, longest_idle) = (world.plan.clone(), *world.longest_idle.lock().unwrap());
    let text = Box::new(move || (world.log.fault_list(), world.log.whole()));
    Outcome { plan, sums, faults, violations, rested_after, longest_idle, report, text }
}

fn checker(plan: &Plan) -> Checker {
    let checker = Checker::new().lease(plan.lease).window(plan.window).one_clock();
    let checker = checker.max_attempts(Some(plan.max_attempts));
    match plan.policy {
        StorePolicy::Process => checker.runs_without_store(),
        _ => checker,
    }
}

/// The checker does not know of claims that no log tells of; of their ids, the holders, the attempts and the
/// reason of each run are not to be judged by it, but by the truth alone. Nor is it told of outages: the world sees for itself that nothing
/// runs without a claim, and an answer may still be on its way when the store goes down.
fn judge(world: &World, report: &Report) {
    let counted = |violation: &Violation| {
        use Invariant::{BoundedRetry, FailureNeverMarks, OneAtATime};
        matches!(violation.invariant, BoundedRetry | FailureNeverMarks | OneAtATime)
    };
    let unheard = |key: Option<DedupKey>| key.is_some_and(|key| world.truth.had_unheard_holder(&key));
    let violations =
        report.violations.iter().filter(|violation| !(counted(violation) && unheard(violation.key)));
    let unexplained = report.unexplained().filter(|extra| !unheard(Some(extra.key)));
    if violations.count() + unexplained.count() > 0 {
        world.truth.violated(format!("checker: {report}"));
    }
}

impl World {
    pub(super) fn strikes(&self, per_mille: u32) -> bool {
        !self.calm.load(Ordering::Relaxed) && self.rng.chance(per_mille)
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub(super) fn next_process(&self) -> usize {
        self.numbers.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Of a call: often none, so that things happen in the same instant; else they overtake each other.
    pub(super) async fn latency(&self) {
        match self.rng.below(4) {
            0 => {}
            1 => tokio::task::yield_now().await,
            _ => sleep(self.rng.duration(MILLI, 20 * MILLI)).await,
        }
    }

    fn put(&self, id: usize, headers: &[(&str, String)]) {
        let number = self.broker.number().to_string();
        let message = Message::builder(id.to_string()).transport_id(name(id)).header("sequence", number);
        let with = |message: guestlist::MessageBuilder, (name, value): &(&str, String)| {
            message.header(*name, value.clone())
        };
        self.broker.queues.send(ORDERS, headers.iter().fold(message, with)).unwrap();
    }

    /// The producers: each message, and its copies, in their time.
    async fn send_all(self: Arc<Self>) {
        let mut sendings = Vec::new();
        for (id, story) in self.plan.stories.iter().enumerate() {
            sendings.extend(story.sent_at.iter().enumerate().map(|(nth, at)| (*at, id, nth)));
        }
        sendings.sort_unstable();
        let began = Instant::now();
        for (at, id, nth) in sendings {
            sleep((began + at).saturating_duration_since(Instant::now())).await;
            self.log.step("message sent", id as u64);
            if nth > 0 {
                self.log.fault(None, "producer: sent twice");
            }
            self.put(id, &[]);
        }
    }

    async fn expire(self: Arc<Self>) {
        loop {
            sleep(SECOND / 2).await;
            self.broker.expire();
        }
    }

    /// What hits a whole process, the broker or the store.
    async fn suffer(self: Arc<Self>) {
        let Some(pause) = self.plan.rates.calamity else { return };
        loop {
            sleep(self.rng.duration(pause / 10, pause)).await;
            if self.calm.load(Ordering::Relaxed) {
                return;
            }
            self.calamity().await;
        }
    }

    async fn calamity(&self) {
        let process = self.any_process();
        let say = |fault| self.log.fault(process.as_ref().map(|process| process.number), fault);
        let length = self.rng.duration(MILLI, 2 * self.plan.lease);
        let Some(process) = &process else { return };
        match self.rng.below(16) {
            0 => {
                say("process: killed");
                process.crash();
            }
            1 => {
                say("process: consumer dropped");
                process.cancel();
            }
            2 | 3 => {
                say("process: stopped");
                process.stop.cancel();
            }
            4 => {
                say("process: frozen");
                process.freeze(length);
            }
            5 => {
                say("process: cut off from the store");
                process.cut_off_from_store(length);
            }
            6 if !self.plan.in_process => {
                self.log.fault(None, "store: outage");
                self.records.go_down_until(Instant::now() + length);
            }
            7 => {
                self.log.fault(None, "broker: outage");
                self.broker.restart();
                self.broker.go_down_until(Instant::now() + length);
            }
            8 => {
                self.log.fault(None, "broker: restart");
                self.broker.restart();
            }
            9 => {
                say("broker: connection lost");
                self.broker.break_off_all_of(process.number);
            }
            10 | 11 if self.broker.redeliver_one(self.rng.below(100)) => {
                self.log.fault(None, "broker: delivered again in mid-work");
            }
            12 if self.plan.rates.loses_records => self.lose_a_record(),
            13 if self.plan.rates.loses_records && self.rng.chance(300) => self.lose_all_records(None),
            14 => {
                self.log.fault(None, "clock: everybody stands still");
                advance(length).await;
            }
            15 => self.redrive_one(),
            _ => {}
        }
    }

    fn any_process(&self) -> Option<Arc<Process>> {
        let processes = self.processes.lock().unwrap();
        let nth = self.rng.below(processes.len() as u64);
        processes.values().nth(usize::try_from(nth).unwrap_or(0)).cloned()
    }

    fn lose_a_record(&self) {
        let id = usize::try_from(self.rng.below(self.plan.stories.len() as u64)).unwrap_or(0);
        if self.records.lose(&self.truth.key(id)) {
            self.log.fault(None, "store: record lost");
            self.log.mark(0, Marker::StoreLost(Some(self.truth.key(id))));
            self.truth.record_lost(id);
        }
    }

    pub(super) fn lose_all_records(&self, with: Option<usize>) {
        self.log.fault(with, "store: all records lost");
        self.log.mark(0, Marker::StoreLost(None));
        for id in 0..self.plan.stories.len() {
            self.records.lose(&self.truth.key(id));
            self.truth.record_lost(id);
        }
    }

    /// An operator sends a dead letter back to work.
    fn redrive_one(&self) {
        if let Some(id) = self.truth.redrivable().first() {
            self.redrive(*id);
        }
    }

    fn redrive(&self, id: usize) {
        self.log.fault(None, "operator: redrive");
        let on_record = self.records.peek(&self.truth.key(id)).map(|record| record.generation);
        let generation = self.truth.redriven(id, on_record).to_string();
        self.put(id, &[("guestlist-id", name(id)), ("guestlist-generation", generation)]);
    }

    fn calm_down(&self) {
        self.log.step("calm", 0);
        self.calm.store(true, Ordering::Relaxed);
        *self.calm_since.lock().unwrap() = Instant::now() + 3 * self.plan.lease;
        self.records.go_down_until(Instant::now());
        self.broker.go_down_until(Instant::now());
        self.processes.lock().unwrap().values().for_each(|process| process.recover());
    }

    async fn rests(&self) -> bool {
        let give_up_at = Instant::now() + REST;
        while !self.broker.is_empty() {
            if Instant::now() >= give_up_at {
                return false;
            }
            sleep(SECOND / 4).await;
            if self.idle() > GIVEN_UP {
                return false;
            }
        }
        true
    }

    /// For how long nothing has happened.
    fn idle(&self) -> Duration {
        let since = self.truth.idle_since().map(|since| since.max(*self.calm_since.lock().unwrap()));
        let idle = since.map_or(Duration::ZERO, |since| Instant::now().saturating_duration_since(since));
        let mut longest = self.longest_idle.lock().unwrap();
        *longest = (*longest).max(idle);
        if idle > self.plan.patience() && !self.given_up.swap(true, Ordering::Relaxed) {
            self.truth.violated(format!("I9: nothing has happened for {idle:?}"));
        }
        idle
    }

    /// I4: each dead letter runs when it is sent back to work.
    async fn redrive_all(&self) -> bool {
        for _ in 0..2 {
            let ids = self.truth.redrivable();
            for id in ids {
                self.redrive(id);
            }
            if !self.rests().await {
                return false;
            }
        }
        for id in self.truth.redrivable() {
            self.truth.violated(format!("I4: m{id} was sent back to work twice, and did not run"));
        }
        true
    }

    /// I14: everybody stops when asked to.
    async fn end(&self, places: &mut JoinSet<()>) {
        self.log.step("stop", 0);
        self.over.store(true, Ordering::Relaxed);
        self.processes.lock().unwrap().values().for_each(|process| process.stop.cancel());
        let stopped = timeout(self.plan.drain + MINUTE, async {
            while let Some(ended) = places.join_next().await {
                ended.unwrap();
            }
        });
        if stopped.await.is_err() {
            self.truth.violated("I14: a process does not stop".to_owned());
        }
    }
}
