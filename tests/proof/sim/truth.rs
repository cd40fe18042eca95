//! What really happened, seen from outside: by the store, the broker and the handlers, never by
//! what the consumer says of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use guestlist::dedup::protocol::{Ask, Record, Release, Run, State};
use guestlist::{DedupKey, Disposition, Message, MessageId, Scope};
use tokio::time::Instant;

use super::log::Log;
use super::process::Process;
use super::rules::Rule;
use super::store::Op;
use super::world::{ORDERS, World};

/// A run of the handler that began.
pub(super) struct Started {
    pub(super) id: usize,
    pub(super) attempt: u32,
    /// How many there were before it, in this generation.
    pub(super) number: usize,
    run: Option<Run>,
    claimed: Instant,
    process: Arc<Process>,
    /// It is among those that run one at a time.
    suspect: bool,
}

impl Drop for Started {
    fn drop(&mut self) {
        self.process.world.truth.running.fetch_sub(1, Ordering::Relaxed);
        self.process.world.truth.stirred();
        if self.suspect {
            self.process.suspects.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// What is known of one id.
#[derive(Default)]
struct Id {
    /// Runs in the first generation.
    runs: usize,
    effects: Vec<Effect>,
    /// Letters that nobody has sent back to work.
    letters: i64,
    /// The generations in which one was ever written.
    lettered: BTreeSet<u32>,
    /// The store has said `Done` of it, once at least.
    ever_done: bool,
    /// A handler succeeded without a claim, or without being recorded.
    unrecorded: bool,
    lost_at: Option<Instant>,
    /// A release asked for this pause, in this generation.
    pause: Option<(Instant, u32)>,
    generation: u32,
}

#[derive(Clone, Copy)]
struct Effect {
    token: Option<u128>,
    process: usize,
    claimed: Instant,
    /// When the store took it down as done.
    recorded: Option<Instant>,
}

pub(super) struct Truth {
    keys: Vec<DedupKey>,
    ids: Mutex<Vec<Id>>,
    /// Claims that the store granted and no process has logged, or too late: the answer was lost for good, the
    /// request came when nobody waited for it any more, or the record was lost before it was heard of.
    unheard: Mutex<BTreeMap<u128, usize>>,
    violations: Mutex<Vec<String>>,
    crashed: Mutex<BTreeSet<usize>>,
    /// Until when each claim would hold by our rules: renewed whenever its holder asked.
    leases: Mutex<BTreeMap<u128, Instant>>,
    /// When the store granted each claim; heard of later, if at all.
    granted: Mutex<BTreeMap<u128, Instant>>,
    unexplained: Mutex<u64>,
    running: AtomicUsize,
    /// When something last happened.
    stirred: Mutex<Instant>,
    window: Duration,
    /// Peers are counted, not judged.
    judges: bool,
    log: Arc<Log>,
}

/// How it ended, over all ids.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sums {
    pub(super) ids: u64,
    pub(super) effects: u64,
    pub(super) repeats: u64,
    pub(super) unexplained: u64,
    pub(super) lost: u64,
    pub(super) stuck: u64,
    pub(super) letters: u64,
}

impl std::ops::AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.ids += other.ids;
        self.effects += other.effects;
        self.repeats += other.repeats;
        self.unexplained += other.unexplained;
        self.lost += other.lost;
        self.stuck += other.stuck;
        self.letters += other.letters;
    }
}

impl Truth {
    pub(super) fn of(ids: usize, window: Duration, rule: Rule, log: Arc<Log>) -> Self {
        let scope = Scope::new("", &format!("memory:{ORDERS}"));
        let keys = (0..ids).map(|id| scope.key(&MessageId::new(name(id)).unwrap())).collect();
        Self {
            keys,
            ids: Mutex::new((0..ids).map(|_| Id::default()).collect()),
            unheard: Mutex::default(),
            violations: Mutex::default(),
            crashed: Mutex::default(),
            leases: Mutex::default(),
            granted: Mutex::default(),
            unexplained: Mutex::default(),
            running: AtomicUsize::new(0),
            stirred: Mutex::new(Instant::now()),
            window,
            judges: !matches!(rule, Rule::Peer(_)),
            log,
        }
    }

    pub(super) fn key(&self, id: usize) -> DedupKey {
        self.keys[id]
    }

    pub(super) fn id_of(&self, key: &DedupKey) -> Option<usize> {
        self.keys.iter().position(|other| other == key)
    }

    fn ids(&self) -> MutexGuard<'_, Vec<Id>> {
        self.ids.lock().unwrap()
    }

    pub(super) fn violated(&self, what: String) {
        if self.judges {
            self.log.violation(&what);
            self.violations.lock().unwrap().push(what);
        }
    }

    pub(super) fn violations(&self) -> Vec<String> {
        self.violations.lock().unwrap().clone()
    }

    /// I2, I3, I8: a run starts only under a live claim of its own, and within its attempts.
    pub(super) fn starts(&self, process: &Arc<Process>, message: &Message) -> Started {
        let world = &process.world;
        let id = number(message);
        let run = process.knows(message.delivery_number()).claim;
        let granted = |run: Run| self.granted.lock().unwrap().get(&run.token.bits()).copied();
        let claimed = run.and_then(granted).unwrap_or_else(Instant::now);
        let record = world.records.peek(&self.keys[id]);
        let attempt = message.attempt();
        world.log.handler(process.number, id, attempt, "starts");
        let mut ids = self.ids();
        let truth = &mut ids[id];
        let number = truth.runs;
        truth.runs += 1;
        if let Some(run) = run {
            let forgotten = truth.lost_at.is_some_and(|lost| lost >= claimed);
            if !forgotten && !is_held(record, run, world) {
                self.violated(format!(
                    "I2: m{id} starts in p{} without its claim: {record:?}",
                    process.number
                ));
            }
            if truth
                .pause
                .is_some_and(|(until, of)| !forgotten && of == message.generation() && Instant::now() < until)
            {
                self.violated(format!("I8: m{id} starts before its backoff is over"));
            }
            if attempt > world.plan.max_attempts {
                self.violated(format!("I8: m{id} starts for the {attempt}th time"));
            }
        } else if world.plan.policy == guestlist::dedup::StorePolicy::Pause {
            self.violated(format!("I7: m{id} starts in p{} without a claim", process.number));
        }
        let suspect = run.is_some() && record.is_some_and(|record| record.suspect);
        if suspect && process.suspects.fetch_add(1, Ordering::Relaxed) > 0 {
            self.violated(format!(
                "F26: m{id} is a suspect, and starts beside another one in p{}",
                process.number
            ));
        }
        self.running.fetch_add(1, Ordering::Relaxed);
        self.stirred();
        let process = Arc::clone(process);
        Started { id, attempt, number, run, claimed, process, suspect }
    }

    pub(super) fn succeeds(&self, process: &Process, run: &Started) {
        let token = run.run.map(|run| run.token.bits());
        let truth = &mut self.ids()[run.id];
        truth.unrecorded |= token.is_none();
        let effect = Effect { token, process: process.number, claimed: run.claimed, recorded: None };
        if truth.effects.iter().any(|other| !self.excused(truth, other, &effect)) {
            *self.unexplained.lock().unwrap() += 1;
            self.violated(format!("I3: m{} succeeds again, and no failure is why", run.id));
        }
        truth.effects.push(effect);
    }

    /// Whether a failure is why both of them succeeded: a crash, a lost record, a store out of reach.
    fn excused(&self, truth: &Id, one: &Effect, other: &Effect) -> bool {
        let (first, second) = if one.claimed <= other.claimed { (one, other) } else { (other, one) };
        let (Some(token), Some(_)) = (first.token, second.token) else { return true };
        let crashed = self.crashed.lock().unwrap().contains(&first.process) && first.recorded.is_none();
        let forgotten = truth.lost_at.is_some_and(|lost| lost >= first.claimed);
        let over = first.recorded.is_some_and(|at| second.claimed >= at + self.window);
        let held = self.leases.lock().unwrap().get(&token).is_some_and(|until| second.claimed < *until);
        crashed || forgotten || over || first.recorded.is_none() && !held
    }

    fn stirred(&self) {
        *self.stirred.lock().unwrap() = Instant::now();
    }

    /// For how long no handler has run, and nothing has ended.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        (self.running.load(Ordering::Relaxed) == 0).then(|| *self.stirred.lock().unwrap())
    }

    pub(super) fn crashed(&self, process: usize) {
        self.crashed.lock().unwrap().insert(process);
    }

    /// A process logs a claim: late, if its record was lost meanwhile.
    pub(super) fn heard(&self, key: &DedupKey, run: Run) {
        let token = run.token.bits();
        let granted = self.granted.lock().unwrap().get(&token).copied();
        let lost = self.id_of(key).and_then(|id| self.ids()[id].lost_at);
        if lost.is_none_or(|lost| granted.is_some_and(|granted| lost < granted)) {
            self.unheard.lock().unwrap().remove(&token);
        }
    }

    /// Whether somebody held this id of whom no log tells.
    pub(super) fn had_unheard_holder(&self, key: &DedupKey) -> bool {
        let id = self.id_of(key);
        self.unheard.lock().unwrap().values().any(|other| Some(*other) == id)
    }

    /// I4, I5: done only by a run that succeeded; what succeeded is never given up.
    pub(super) fn applied(&self, key: &DedupKey, op: &Op, old: Option<Record>, new: Option<Record>) {
        let Some(id) = self.id_of(key) else {
            return self.violated("a call for a key that nobody sent".to_owned());
        };
        if let Op::Claim(Ask { token, lease, .. }) | Op::Renew(Run { token, .. }, lease) = op
            && new.is_some_and(|new| new.run.token == *token)
        {
            self.leases.lock().unwrap().insert(token.bits(), Instant::now() + *lease);
        }
        if old == new {
            return;
        }
        let mut ids = self.ids();
        let truth = &mut ids[id];
        let Some(record) = new else { return };
        let token = record.run.token.bits();
        let effect = truth.effects.iter_mut().find(|effect| effect.token == Some(token));
        if let (State::Claimed { .. }, Op::Claim(ask)) = (record.state, op)
            && old.is_none_or(|old| old.run.token != ask.token)
        {
            self.unheard.lock().unwrap().insert(token, id);
            self.granted.lock().unwrap().insert(token, Instant::now());
        }
        match (record.state, op) {
            (State::Done, _) => {
                match effect {
                    Some(effect) => effect.recorded = effect.recorded.or(Some(Instant::now())),
                    None => self.violated(format!("I4: m{id} is done by {op:?}, and no run of it succeeded")),
                }
                truth.ever_done = true;
            }
            (
                State::Released { .. },
                Op::Release(_, Release::Failed { not_before } | Release::Deferred { not_before }),
            ) if effect.is_none() => {
                // A store counts microseconds.
                let micros = u64::try_from(not_before.as_micros()).unwrap_or(u64::MAX);
                truth.pause = Some((Instant::now() + Duration::from_micros(micros), record.generation));
            }
            (State::Released { .. } | State::Parked, Op::Release(run, why)) if effect.is_some() => {
                self.violated(format!("I5: m{id} succeeded and was given up as {why:?} by {run:?}"));
            }
            _ => {}
        }
    }

    pub(super) fn record_lost(&self, id: usize) {
        let truth = &mut self.ids()[id];
        truth.lost_at = Some(Instant::now());
        truth.pause = None;
    }

    pub(super) fn letter(&self, message: &Message) {
        self.stirred();
        let truth = &mut self.ids()[number(message)];
        truth.letters += 1;
        truth.lettered.insert(message.generation());
    }

    /// I1: the broker forgets a message only for a reason.
    pub(super) fn settled(&self, process: &Process, message: &Message, disposition: Disposition) {
        if disposition != Disposition::Ack {
            return;
        }
        self.stirred();
        let id = number(message);
        let known = process.knows(message.delivery_number());
        let ids = self.ids();
        let truth = &ids[id];
        let unrecorded = known.gap || (known.claim.is_none() && known.ran);
        if !(truth.ever_done
            || truth.lettered.contains(&message.generation())
            || unrecorded && !truth.effects.is_empty())
        {
            self.violated(format!("I1: m{id} is acked by p{} for no reason", process.number));
        }
    }

    /// Ids that are with the dead letters and nowhere else, and the generation to send them back in.
    pub(super) fn redrivable(&self) -> Vec<usize> {
        let ids = self.ids();
        (0..ids.len()).filter(|&id| ids[id].letters > 0 && ids[id].effects.is_empty()).collect()
    }

    /// A letter is taken out, to be sent back to work in this generation.
    pub(super) fn redriven(&self, id: usize, on_record: Option<u32>) -> u32 {
        let truth = &mut self.ids()[id];
        truth.letters -= 1;
        truth.generation = on_record.unwrap_or(truth.generation) + 1;
        truth.generation
    }

    /// I1, I9 at rest: each id is done, or with the dead letters.
    pub(super) fn at_rest(&self, drained: bool) -> Sums {
        let ids = self.ids();
        let unexplained = *self.unexplained.lock().unwrap();
        let mut sums = Sums { ids: ids.len() as u64, unexplained, ..Sums::default() };
        for (id, truth) in ids.iter().enumerate() {
            sums.effects += truth.effects.len() as u64;
            sums.repeats += truth.effects.len().saturating_sub(1) as u64;
            sums.letters += u64::try_from(truth.letters).unwrap_or(0);
            if truth.effects.is_empty() && truth.letters <= 0 {
                let which = if drained { &mut sums.lost } else { &mut sums.stuck };
                *which += 1;
                self.violated(format!(
                    "{}: m{id} is neither done nor with the dead letters",
                    if drained { "I1" } else { "I9" }
                ));
            }
        }
        sums
    }
}

fn is_held(record: Option<Record>, run: Run, world: &World) -> bool {
    record.is_some_and(|record| match record.state {
        State::Claimed { deadline } => record.run.token == run.token && world.records.now() < deadline,
        _ => false,
    })
}

pub(super) fn name(id: usize) -> String {
    format!("m{id}")
}

pub(super) fn number(message: &Message) -> usize {
    std::str::from_utf8(message.payload()).ok().and_then(|text| text.parse().ok()).unwrap()
}
