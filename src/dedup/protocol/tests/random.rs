//! Random walks of several claimants over one key, held to invariants and to a count kept beside it.

use super::*;

const CLAIMANTS: usize = 4;

#[derive(Clone, Debug)]
enum Step {
    /// A new claim: with the permit or not, this far from the record's generation.
    Claim {
        by: usize,
        alone: bool,
        generation: i8,
        lease: Duration,
        retain: Duration,
    },
    /// The last claim again, since its answer was lost.
    Again(usize),
    Renew(usize, Duration),
    Complete(usize, Duration),
    Release(usize, Release),
    Pass(Duration),
    /// The store drops what is past its time.
    Collect,
    /// The store loses the record.
    Lose,
}

fn length() -> impl Strategy<Value = Duration> {
    prop_oneof![
        2 => Just(Duration::ZERO),
        2 => Just(MOMENT),
        4 => (1..50_u64).prop_map(Duration::from_secs),
        4 => (1..5_000_u64).prop_map(Duration::from_micros),
        1 => prop_oneof![Just(Duration::MAX), Just(Duration::from_micros(u64::MAX))],
    ]
}

fn release() -> impl Strategy<Value = Release> {
    prop_oneof![
        1 => length().prop_map(|not_before| Release::Failed { not_before }),
        1 => length().prop_map(|not_before| Release::Deferred { not_before }),
        2 => Just(FAILED),
        2 => Just(Release::NotStarted),
        4 => Just(Release::Interrupted),
        1 => Just(Release::DeadLettered),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let by = || 0..CLAIMANTS;
    let claim = (by(), any::<bool>(), -1..=2_i8, length(), length()).prop_map(
        |(by, alone, generation, lease, retain)| Step::Claim { by, alone, generation, lease, retain },
    );
    prop_oneof![
        6 => claim,
        1 => by().prop_map(Step::Again),
        1 => (by(), length()).prop_map(|(by, lease)| Step::Renew(by, lease)),
        1 => (by(), length()).prop_map(|(by, window)| Step::Complete(by, window)),
        4 => (by(), release()).prop_map(|(by, why)| Step::Release(by, why)),
        3 => prop_oneof![Just(MOMENT), (1..90_u64).prop_map(Duration::from_secs)].prop_map(Step::Pass),
        1 => Just(Step::Collect),
        1 => Just(Step::Lose),
    ]
}

/// What a bystander who sees only questions and answers can count.
#[derive(Debug, Default)]
struct Count {
    attempt: u32,
    interruptions: u32,
    suspect: bool,
}

struct Walk {
    key: Key,
    asks: [Option<Ask>; CLAIMANTS],
    next_token: u128,
    count: Count,
    last_fence: Fence,
}

impl Walk {
    fn new() -> Self {
        Self {
            key: Key::absent(),
            asks: [None; CLAIMANTS],
            next_token: 1,
            count: Count::default(),
            last_fence: Fence(0),
        }
    }

    fn live(&self) -> Option<Record> {
        Machine::at(self.key.now).live(self.key.record)
    }

    fn holder(&self) -> Option<Token> {
        self.live().filter(|r| matches!(r.state, State::Claimed { .. })).map(|r| r.run.token)
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Claim { by, alone, generation, lease, retain } => {
                let now = i64::from(self.live().map_or(GENERATION, |record| record.generation));
                let generation = u32::try_from((now + i64::from(generation)).max(0)).unwrap_or(u32::MAX);
                let token = Token::from_bits(self.next_token);
                self.next_token += 1;
                let ask = Ask { token, lease, retain, generation, digest: None, alone };
                self.asks[by] = Some(ask);
                self.claim(ask);
            }
            Step::Again(by) => self.again(by),
            Step::Renew(by, lease) => self.by(by, |m, r, run| m.renew(r, run, lease), |_| {}),
            Step::Complete(by, window) => {
                self.by(by, |m, r, run| m.complete(r, run, window), |count| *count = Count::default());
            }
            Step::Release(by, why) => {
                self.by(by, |m, r, run| m.release(r, run, why), |count| count.release(why));
            }
            Step::Pass(time) => self.key.pass(time),
            Step::Collect => {
                if self.live().is_none() {
                    self.lose();
                }
            }
            Step::Lose => self.lose(),
        }
    }

    /// It takes longer than this walk's claims within one microsecond, which the clock then makes up for.
    fn lose(&mut self) {
        self.key.record = None;
        self.key.pass(Duration::from_millis(1));
    }

    fn claim(&mut self, ask: Ask) {
        let (was, now) = (self.live(), self.key.now);
        match self.key.claim(ask) {
            Claim::Acquired { fence, attempt, before, .. } => {
                self.acquired(was, &ask);
                assert!(fence > self.last_fence, "fences grow: {fence:?} after {:?}", self.last_fence);
                self.last_fence = fence;
                assert_eq!(attempt, self.count.attempt, "the attempt is the bystander's count");
                let never_ran = |was: Record| was.before == Before::First && was.attempt == 0;
                let first = was.is_none_or(|was| fresh(&was, &ask) || never_ran(was));
                assert_eq!(before == Before::First, first);
                let record = self.key.record();
                assert_eq!((record.run, record.attempt), (Run { token: ask.token, fence }, attempt));
                assert!(record.kept_until > now);
            }
            Claim::Done { .. } => assert!(matches!(was.unwrap().state, State::Done)),
            refused => {
                assert_eq!(self.key.record, was.and(self.key.record), "{refused:?} changes nothing");
                assert!(was.is_some(), "what is not there cannot refuse");
            }
        }
    }

    /// Who may acquire, and what it counts.
    fn acquired(&mut self, was: Option<Record>, ask: &Ask) {
        let Some(was) = was else {
            self.count = Count { attempt: 1, ..Count::default() };
            return;
        };
        let now = self.key.now;
        match was.state {
            State::Done => panic!("a done id runs again within its window"),
            State::Claimed { deadline } => assert!(now >= deadline, "two holders"),
            State::Released { not_before } => assert!(now >= not_before || fresh(&was, ask), "the backoff"),
            State::Parked => assert!(fresh(&was, ask), "a parked id runs without a redrive"),
        }
        if fresh(&was, ask) {
            self.count = Count { attempt: 1, ..Count::default() };
            return;
        }
        self.count.attempt += 1;
        self.count.suspect |= matches!(was.state, State::Claimed { .. });
        assert!(ask.alone || !self.count.suspect, "a suspect is run beside others");
        assert_eq!(self.key.record().suspect, self.count.suspect);
    }

    fn again(&mut self, by: usize) {
        let Some(ask) = self.asks[by] else { return };
        let (was, holder) = (self.live(), self.holder());
        match self.key.claim(ask) {
            Claim::Acquired { fence, attempt, before, .. } if holder == Some(ask.token) => {
                let was = was.unwrap();
                assert_eq!((was.run.fence, was.attempt, was.before), (fence, attempt, before));
            }
            Claim::Acquired { fence, .. } => {
                // Not a repetition for the store: a claim like any other.
                self.acquired(was, &ask);
                self.last_fence = fence;
            }
            _ => assert_eq!(self.live(), was),
        }
    }

    fn by(
        &mut self,
        by: usize,
        call: impl FnOnce(Machine, Option<Record>, Run) -> (Option<Record>, Held),
        count: impl FnOnce(&mut Count),
    ) {
        let Some(ask) = self.asks[by] else { return };
        let (was, holder) = (self.live(), self.holder());
        let held =
            self.key.step(|machine, record| call(machine, record, Run { token: ask.token, fence: Fence(0) }));
        match held {
            Held::Yes if holder == Some(ask.token) => count(&mut self.count),
            Held::Yes => {
                assert_eq!(self.key.record, was, "asked again: no further effect");
                assert_eq!(was.unwrap().run.token, ask.token);
            }
            Held::Lost => {
                assert_eq!(self.key.record, was, "lost: nothing is changed");
                assert_ne!(holder, Some(ask.token), "a holder does not lose its claim");
            }
            Held::Gone => assert_eq!(was, None),
        }
    }
}

impl Count {
    fn release(&mut self, why: Release) {
        match why {
            Release::Failed { .. } => self.interruptions = 0,
            Release::Deferred { .. } => {
                self.interruptions = 0;
                self.attempt -= 1;
            }
            Release::NotStarted => self.attempt -= 1,
            Release::Interrupted => {
                self.interruptions += 1;
                if self.interruptions <= 3 {
                    self.attempt -= 1;
                }
            }
            Release::DeadLettered => *self = Self::default(),
        }
    }
}

fn fresh(was: &Record, ask: &Ask) -> bool {
    ask.generation == was.generation + 1
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, ..ProptestConfig::default() })]

    #[test]
    fn every_walk_keeps_the_protocols_promises(steps in proptest::collection::vec(step(), 1..80)) {
        let mut walk = Walk::new();
        for step in &steps {
            walk.take(step);
        }
    }
}

fn any_record() -> impl Strategy<Value = Record> {
    let extreme = || prop_oneof![Just(0), Just(1), Just(u64::MAX), any::<u64>()];
    let state = prop_oneof![
        extreme().prop_map(|deadline| State::Claimed { deadline }),
        extreme().prop_map(|not_before| State::Released { not_before }),
        Just(State::Parked),
        Just(State::Done),
    ];
    let numbers = (
        prop_oneof![Just(0), Just(u32::MAX), any::<u32>()],
        prop_oneof![Just(0), Just(u32::MAX - 1), Just(u32::MAX)],
        prop_oneof![Just(0), Just(3), Just(u8::MAX)],
    );
    (0..3_u128, extreme(), numbers, state, any::<bool>(), length(), extreme()).prop_map(
        |(token, fence, (attempt, generation, interruptions), state, suspect, retain, kept_until)| Record {
            run: Run { token: Token::from_bits(token), fence: Fence(fence) },
            attempt,
            before: Before::Failed,
            state,
            generation,
            suspect,
            interruptions,
            digest: None,
            retain,
            kept_until,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5_000, ..ProptestConfig::default() })]

    /// A record may come from a store of another age, or a broken one.
    #[test]
    fn no_record_and_no_number_makes_it_panic(
        record in proptest::option::of(any_record()),
        now in prop_oneof![Just(0), Just(u64::MAX), any::<u64>()],
        token in 0..3_u128,
        generation in prop_oneof![Just(0), Just(u32::MAX)],
        (lease, retain) in (length(), length()),
        alone in any::<bool>(),
        why in release(),
    ) {
        let machine = Machine::at(now);
        let token = Token::from_bits(token);
        let run = Run { token, fence: Fence(u64::MAX) };
        let _ = machine.claim(record, &Ask { token, lease, retain, generation, digest: None, alone });
        let _ = machine.renew(record, run, lease);
        let _ = machine.complete(record, run, retain);
        let _ = machine.release(record, run, why);
        let _ = machine.left(record);
    }
}
