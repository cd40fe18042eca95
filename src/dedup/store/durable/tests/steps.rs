//! Random groups of steps over random keys, with restarts in between, compared with the machine.

use super::*;

const KEYS: u8 = 5;
const HOLDERS: u128 = 4;

#[derive(Clone, Debug)]
enum Act {
    Claim {
        token: u128,
        alone: bool,
        generation: u32,
        digest: Option<u128>,
        lease: Duration,
        retain: Duration,
    },
    Renew(u128, Duration),
    Complete(u128, Duration),
    Release(u128, Release),
    Inspect,
    Forget,
}

#[derive(Clone, Debug)]
enum Event {
    /// Calls that come together.
    Group(Vec<(u8, Act)>),
    Pass(u64),
    Restart,
}

fn length() -> impl Strategy<Value = Duration> {
    prop_oneof![
        1 => Just(Duration::ZERO),
        4 => (1..60_u64).prop_map(Duration::from_secs),
        2 => (1..5_000_u64).prop_map(Duration::from_nanos),
        1 => Just(Duration::MAX),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let claim = (0..HOLDERS, any::<bool>(), 0..3_u32, any::<Option<u128>>(), length(), length()).prop_map(
        |(token, alone, generation, digest, lease, retain)| Act::Claim {
            token,
            alone,
            generation,
            digest,
            lease,
            retain,
        },
    );
    let release = prop_oneof![
        length().prop_map(|not_before| Release::Failed { not_before }),
        length().prop_map(|not_before| Release::Deferred { not_before }),
        Just(Release::NotStarted),
        Just(Release::Interrupted),
        Just(Release::DeadLettered),
    ];
    prop_oneof![
        6 => claim,
        2 => (0..HOLDERS, length()).prop_map(|(token, lease)| Act::Renew(token, lease)),
        2 => (0..HOLDERS, length()).prop_map(|(token, window)| Act::Complete(token, window)),
        4 => (0..HOLDERS, release).prop_map(|(token, why)| Act::Release(token, why)),
        1 => Just(Act::Inspect),
        1 => Just(Act::Forget),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => prop::collection::vec((0..KEYS, act()), 1..6).prop_map(Event::Group),
        4 => prop_oneof![0..5_u64, 1..90_000_000_u64].prop_map(Event::Pass),
        1 => Just(Event::Restart),
    ]
}

fn make(act: &Act, machine: Machine, record: Option<Record>) -> (Option<Record>, String) {
    let run = |token: u128| Run { token: Token::from_bits(token), fence: Fence(7) };
    let text = |(record, answer): (Option<Record>, Held)| (record, format!("{answer:?}"));
    match *act {
        Act::Claim { token, alone, generation, digest, lease, retain } => {
            let ask = Ask { token: Token::from_bits(token), lease, retain, generation, digest, alone };
            let (record, answer) = machine.claim(record, &ask);
            (record, format!("{answer:?}"))
        }
        Act::Renew(token, lease) => text(machine.renew(record, run(token), lease)),
        Act::Complete(token, window) => text(machine.complete(record, run(token), window)),
        Act::Release(token, why) => text(machine.release(record, run(token), why)),
        Act::Inspect => (record, format!("{:?}", machine.live(record))),
        Act::Forget => (None, format!("{:?}", machine.live(record).is_some())),
    }
}

fn kind(act: &Act) -> Kind {
    match act {
        Act::Claim { .. } => Kind::Claim,
        Act::Forget => Kind::Removal,
        _ => Kind::Other,
    }
}

/// The store, and what it should be.
struct Walk {
    temp: Temp,
    clock: Arc<OnceLock<Clock>>,
    ledger: Option<Ledger>,
    /// And in which life each was written.
    records: [Option<Stored>; KEYS as usize],
    now: u64,
    life: u32,
    opened_at: u64,
}

impl Walk {
    fn new(now: u64) -> Self {
        let (temp, clock) = (Temp::new(), Arc::default());
        let mut walk =
            Self { temp, clock, ledger: None, records: [None; KEYS as usize], now, life: 0, opened_at: 0 };
        walk.restart();
        walk
    }

    fn take(&mut self, event: &Event) {
        match event {
            Event::Group(calls) => self.group(calls),
            Event::Pass(micros) => self.now += micros,
            Event::Restart => self.restart(),
        }
    }

    fn group(&mut self, calls: &[(u8, Act)]) {
        let (mut steps, answers): (Vec<_>, Vec<_>) = calls
            .iter()
            .map(|(number, act)| {
                let act = act.clone();
                Call::boxed(key(*number), kind(&act), move |machine, record| make(&act, machine, record))
            })
            .unzip();
        self.ledger.as_mut().unwrap().apply(self.now, &mut steps).unwrap();
        steps.into_iter().for_each(Step::answer);
        for ((number, act), mut answer) in calls.iter().zip(answers) {
            let stored = &mut self.records[usize::from(*number)];
            let old = stored.map(|stored| seen(stored, act, self.life, self.opened_at));
            let (new, expected) = make(act, Machine::at(self.now), old);
            assert_eq!(
                answer.try_recv().unwrap().unwrap(),
                expected,
                "{act:?} on {stored:?} at {}",
                self.now
            );
            if new != old {
                *stored = new.map(|record| Stored { record, life: self.life });
            }
        }
    }

    fn restart(&mut self) {
        drop(self.ledger.take());
        self.life += 1;
        self.opened_at = self.now;
        let disk = self.temp.fjall(&self.clock);
        if self.life > 1 {
            let about = About::read(disk.as_ref()).unwrap();
            assert_eq!(about.life, self.life - 1);
            assert!(about.time <= self.now);
        }
        self.ledger = Some(Ledger::open(disk, Durability::Process, self.life, self.now, self.now).unwrap());
    }
}

/// To a claim, whoever held in another life is gone.
fn seen(stored: Stored, act: &Act, life: u32, opened_at: u64) -> Record {
    match stored.record.state {
        State::Claimed { deadline } if stored.life != life && matches!(act, Act::Claim { .. }) => {
            Record { state: State::Claimed { deadline: opened_at.min(deadline) }, ..stored.record }
        }
        _ => stored.record,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_is_the_machines(
        start in prop_oneof![Just(1_u64), Just(1_700_000_000_000_000)],
        events in prop::collection::vec(event(), 1..80),
    ) {
        let mut walk = Walk::new(start);
        for event in &events {
            walk.take(event);
        }
    }
}
