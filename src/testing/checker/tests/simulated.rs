//! Logs of consumers that are played over the claim protocol itself: correct ones stay clean,
//! whatever happens to them, and a protocol with a fault in it does not get through.

use proptest::prelude::*;

use super::*;
use crate::dedup::protocol::{Ask, Claim, Held, Machine, Record, Run, State, Token};

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Delivered(usize),
    Renewed(usize),
    Ended(usize, End),
    Killed(usize),
    Lost,
    Redriven,
    /// Seconds.
    Passed(u64),
}

/// How a handler ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Succeeded,
    Failed,
    Deferred,
    Interrupted,
    Parked,
}

/// A fault of the protocol or the consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Anybody may take a claim, from anybody.
    NoLease,
    /// A token is not asked for.
    NoToken,
    /// What is done is forgotten.
    DoneIsForgotten,
    /// A failure counts as done.
    FailureIsDone,
    /// A claim is not counted.
    NotCounted,
    /// Acked before the store has answered.
    AckFirst,
    /// In progress is taken for done.
    BusyIsDone,
}

const PROCESSES: [&str; 3] = ["a", "b", "c"];
const MAX: u32 = crate::defaults::MAX_ATTEMPTS;

struct World {
    tape: Tape,
    fault: Fault,
    record: Option<Record>,
    generation: u32,
    deliveries: u64,
    /// What each process holds: its delivery, its claim, how it was told that the last one ended.
    held: [Option<Holding>; 3],
}

#[derive(Clone, Copy)]
struct Holding {
    delivery: u64,
    run: Run,
    attempt: u32,
    /// In its own view.
    until: u64,
}

impl World {
    fn new(fault: Fault) -> Self {
        Self { tape: Tape::new(), fault, record: None, generation: 0, deliveries: 0, held: [None; 3] }
    }

    fn machine(&self) -> Machine {
        Machine::at(self.tape.now)
    }

    fn all(&mut self, happenings: &[Happening]) {
        for happening in happenings {
            self.happens(*happening);
        }
    }

    fn happens(&mut self, happening: Happening) {
        // No two things happen at once: their order by time is their order.
        self.tape.after(1000);
        match happening {
            Happening::Delivered(process) => self.delivered(process),
            Happening::Renewed(process) => self.renewed(process),
            Happening::Ended(process, end) => self.ended(process, end),
            Happening::Killed(process) => {
                self.held[process] = None;
                self.tape.mark(PROCESSES[process], Marker::ProcessKilled);
            }
            Happening::Lost => {
                self.record = None;
                self.tape.mark("store", Marker::StoreLost(None));
            }
            Happening::Redriven => {
                self.generation = self.record.map_or(self.generation, |record| record.generation) + 1;
            }
            Happening::Passed(seconds) => {
                self.tape.after(seconds * SECOND);
            }
        }
    }

    fn delivered(&mut self, process: usize) {
        if self.held[process].is_some() {
            return;
        }
        self.deliveries += 1;
        let delivery = self.deliveries;
        let generation = self.generation;
        self.tape.arrives(PROCESSES[process], delivery).with(|step| step.generation(generation));
        let mut ask = Ask::new(Token::from_bits(delivery.into()), micros(LEASE), micros(HOUR));
        (ask.generation, ask.alone) = (self.generation, true);
        self.sabotage_claim();
        let (record, claim) = self.machine().claim(self.record, &ask);
        self.record = record;
        match claim {
            Claim::Acquired { fence, attempt, before, .. } => {
                let attempt = if self.fault == Fault::NotCounted { 1 } else { attempt };
                let run = Run { token: ask.token, fence };
                self.acquired(
                    process,
                    Holding { delivery, run, attempt, until: self.tape.now + LEASE },
                    before,
                );
            }
            Claim::Done { .. } => {
                self.tape.is_duplicate();
            }
            Claim::InProgress { .. } if self.fault == Fault::BusyIsDone => {
                self.tape.is_duplicate();
            }
            Claim::Parked { .. } => {
                let acked = EventKind::Acked(Outcome::DeadLettered(Cause::Parked));
                self.tape.all(&[EventKind::Copied, acked]);
            }
            Claim::InProgress { .. } | Claim::Suspect => {
                self.tape.says(EventKind::Waited).returns(Cause::InProgress, LATER);
            }
        }
    }

    fn sabotage_claim(&mut self) {
        match (self.fault, &mut self.record) {
            (Fault::NoLease, Some(Record { state: State::Claimed { deadline }, .. })) => *deadline = 0,
            (Fault::DoneIsForgotten, record) if record.is_some_and(|record| record.state == State::Done) => {
                *record = None;
            }
            _ => {}
        }
    }

    /// Runs, unless its attempts are spent.
    fn acquired(&mut self, process: usize, holding: Holding, before: Before) {
        let claim = ClaimMark::new(holding.delivery, holding.run.fence.0);
        self.tape.claims_as(claim, before, holding.attempt);
        if holding.attempt > MAX {
            let cause = if before == Before::Vanished { Cause::CrashSuspected } else { Cause::Exhausted };
            self.park(holding, cause);
        } else {
            self.tape.says(EventKind::Started);
            self.held[process] = Some(holding);
        }
    }

    fn renewed(&mut self, process: usize) {
        let Some(holding) = &mut self.held[process] else { return };
        let (record, held) = Machine::at(self.tape.now).renew(self.record, holding.run, micros(LEASE));
        self.record = record;
        self.tape.delivery(PROCESSES[process], holding.delivery);
        match held {
            Held::Yes => {
                holding.until = self.tape.now + LEASE;
                self.tape.renews();
            }
            Held::Gone => {
                self.tape.says(EventKind::Forgotten);
            }
            Held::Lost => {
                self.tape.says(EventKind::LeaseLost);
            }
        }
        if held == Held::Lost {
            self.tape.says(EventKind::Failed(Cause::LeaseLost));
            self.tape.returns(Cause::LeaseLost, Disposition::Abandon);
            self.held[process] = None;
        }
    }

    fn ended(&mut self, process: usize, end: End) {
        let Some(holding) = self.held[process].take() else { return };
        self.tape.delivery(PROCESSES[process], holding.delivery);
        if matches!(end, End::Succeeded) {
            return self.complete(holding);
        }
        let spent = matches!(end, End::Failed) && holding.attempt >= MAX;
        let (cause, release) = match end {
            End::Failed | End::Succeeded => (Cause::Transient, FAILED),
            End::Parked => (Cause::Permanent, Release::DeadLettered),
            End::Deferred => (Cause::Deferred, Release::Deferred { not_before: micros(SECOND) }),
            End::Interrupted => (Cause::Interrupted, Release::Interrupted),
        };
        if release != Release::Interrupted {
            self.tape.says(EventKind::Failed(cause));
        }
        if self.tape.now >= holding.until {
            let (release, cause) = (FAILED, Cause::LeaseLost);
            self.give_up(holding, release, cause, Disposition::Abandon);
        } else if spent || release == Release::DeadLettered {
            self.park(holding, if spent { Cause::Exhausted } else { cause });
        } else {
            let disposition = if release == FAILED { AGAIN } else { LATER };
            self.give_up(holding, release, cause, disposition);
        }
    }

    fn complete(&mut self, holding: Holding) {
        self.tape.says(EventKind::Ran);
        if self.fault == Fault::AckFirst {
            self.tape.says(EventKind::Acked(Outcome::Handled));
        }
        let (record, held) = self.machine().complete(self.record, self.as_asked(holding), micros(HOUR));
        self.record = record;
        match held {
            Held::Yes => {
                self.tape.says(EventKind::Completed);
            }
            Held::Gone if self.tape.now < holding.until => {
                self.tape.all(&[EventKind::Forgotten, EventKind::Completed]);
            }
            Held::Gone | Held::Lost => {
                self.tape.says(EventKind::LeaseLost);
                self.give_up(holding, FAILED, Cause::LeaseLost, Disposition::Abandon);
                return;
            }
        }
        if self.fault != Fault::AckFirst {
            self.tape.says(EventKind::Acked(Outcome::Handled));
        }
    }

    fn give_up(&mut self, holding: Holding, release: Release, cause: Cause, disposition: Disposition) {
        let held = self.release(holding, release);
        self.tape.returns(cause, if held == Held::Lost { Disposition::Abandon } else { disposition });
    }

    fn park(&mut self, holding: Holding, cause: Cause) {
        self.tape.says(EventKind::Copied);
        self.release(holding, Release::DeadLettered);
        self.tape.says(EventKind::Acked(Outcome::DeadLettered(cause)));
    }

    fn release(&mut self, holding: Holding, release: Release) -> Held {
        let (mut record, held) = self.machine().release(self.record, self.as_asked(holding), release);
        if let (Fault::FailureIsDone, Some(record)) = (self.fault, &mut record) {
            record.state = State::Done;
        }
        self.record = record;
        self.tape.says(match held {
            Held::Yes => EventKind::Released(release),
            Held::Gone => EventKind::Forgotten,
            Held::Lost => EventKind::LeaseLost,
        });
        held
    }

    fn as_asked(&self, holding: Holding) -> Run {
        match (self.fault, self.record) {
            (Fault::NoToken, Some(record)) => record.run,
            _ => holding.run,
        }
    }
}

fn micros(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

fn happening() -> impl Strategy<Value = Happening> {
    let end = prop_oneof![
        3 => Just(End::Succeeded),
        3 => Just(End::Failed),
        1 => Just(End::Deferred),
        1 => Just(End::Interrupted),
        1 => Just(End::Parked),
    ];
    prop_oneof![
        8 => (0..3_usize).prop_map(Happening::Delivered),
        2 => (0..3_usize).prop_map(Happening::Renewed),
        6 => (0..3_usize, end).prop_map(|(process, end)| Happening::Ended(process, end)),
        1 => (0..3_usize).prop_map(Happening::Killed),
        1 => Just(Happening::Lost),
        1 => Just(Happening::Redriven),
        4 => (0..40_u64).prop_map(Happening::Passed),
        1 => (3500..3700_u64).prop_map(Happening::Passed),
    ]
}

fn play(fault: Fault, happenings: &[Happening]) -> Report {
    let mut world = World::new(fault);
    world.all(happenings);
    let Tape { log, .. } = &world.tape;
    Checker::new().one_clock().check(log)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_correct_run_is_clean(happenings in prop::collection::vec(happening(), 0..80)) {
        let report = play(Fault::None, &happenings);
        prop_assert!(report.is_clean(), "{}", report);
    }

    /// Taken apart by process, and merged by time again.
    #[test]
    fn a_correct_run_is_clean_when_its_logs_are_merged(
        happenings in prop::collection::vec(happening(), 0..60)
    ) {
        let mut world = World::new(Fault::None);
        world.all(&happenings);
        let of = |process: &str| {
            let entries = world.tape.log.entries().iter().filter(|entry| *entry.process == *process);
            Log::from(entries.cloned().collect::<Vec<_>>())
        };
        let merged = Log::merge([of("store"), of("c"), of("b"), of("a")]);
        let merged = Log::parse(&merged.to_lines()).unwrap();
        let report = Checker::new().check(&merged);
        prop_assert!(report.is_clean(), "{}", report);
    }
}

/// Every fault is found by a few hundred random runs, and by the name of the promise that it breaks.
#[test]
fn a_faulty_run_is_found() {
    let faults = [
        (Fault::NoLease, "I2"),
        (Fault::NoToken, "I2"),
        (Fault::DoneIsForgotten, "I3"),
        (Fault::FailureIsDone, "I4"),
        (Fault::NotCounted, "I8"),
        (Fault::AckFirst, "I5"),
        (Fault::BusyIsDone, "I6"),
    ];
    for (fault, name) in faults {
        let found = found_by_chance(fault);
        assert!(found.contains(&name), "{fault:?}: {found:?}");
    }
}

fn found_by_chance(fault: Fault) -> Vec<&'static str> {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let strategy = prop::collection::vec(happening(), 60);
    let mut found = Vec::new();
    for _ in 0..300 {
        let happenings = strategy.new_tree(&mut runner).unwrap().current();
        let report = play(fault, &happenings);
        found.extend(report.violations.iter().map(|violation| violation.invariant.name()));
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// The game is worth its name: correct runs have extra runs of many reasons.
#[test]
fn correct_runs_are_not_dull() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let strategy = prop::collection::vec(happening(), 60);
    let mut reasons = std::collections::BTreeSet::new();
    for _ in 0..300 {
        let happenings = strategy.new_tree(&mut runner).unwrap().current();
        let report = play(Fault::None, &happenings);
        report.assert_clean();
        reasons.extend(report.extra_by_reason().into_keys());
    }
    let expected = [
        Reason::Retried,
        Reason::Deferred,
        Reason::Interrupted,
        Reason::Crashed,
        Reason::LeaseExpired,
        Reason::Redriven,
        Reason::WindowOver,
        Reason::RecordLost,
    ];
    assert_eq!(reasons.into_iter().collect::<Vec<_>>(), expected);
}
