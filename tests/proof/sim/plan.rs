//! What a seed stands for: the sizes of the world, the stories of its messages, how rough it gets.

use std::time::Duration;

use guestlist::dedup::StorePolicy;

use super::rng::Rng;

pub(super) const MILLI: Duration = Duration::from_millis(1);
pub(super) const SECOND: Duration = Duration::from_secs(1);
/// The longest.
pub(super) const BACKOFF: Duration = Duration::from_secs(30);
pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// How the broker keeps what is delayed, and what it does with what is not settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// As `MemoryBroker`: exact delays.
    Memory,
    /// As RabbitMQ: a delayed message is a copy in a hold queue, and then an ack.
    Amqp,
    /// As JetStream: a deadline for each delivery, and a late word counts for the newer delivery.
    JetStream,
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) kind: Kind,
    /// The store is in the process's memory, and dies with it. Then there is one process.
    pub(super) in_process: bool,
    pub(super) policy: StorePolicy,
    pub(super) processes: usize,
    pub(super) concurrency: usize,
    pub(super) lease: Duration,
    pub(super) window: Duration,
    pub(super) max_run: Duration,
    pub(super) timeout: Option<Duration>,
    pub(super) tries: u32,
    pub(super) max_attempts: u32,
    pub(super) pause_hold: Duration,
    pub(super) drain: Duration,
    /// For how long messages are sent, and faults happen.
    pub(super) span: Duration,
    pub(super) rates: Rates,
    pub(super) stories: Vec<Story>,
}

/// How often, in a thousand calls, each kind of thing goes wrong.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    pub(super) store: u32,
    pub(super) settle: u32,
    pub(super) publish: u32,
    pub(super) deliver: u32,
    /// At each call to the outside, and at each event.
    pub(super) crash: u32,
    /// The longest pause between two events that hit a whole process, the broker, the store.
    pub(super) calamity: Option<Duration>,
    /// Records get lost.
    pub(super) loses_records: bool,
}

/// What the handler does with one id, run by run; the last step goes on for ever.
#[derive(Clone, Debug)]
pub(super) struct Story {
    pub(super) steps: Vec<Step>,
    /// When it is sent, and its copies.
    pub(super) sent_at: Vec<Duration>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) takes: Duration,
    pub(super) end: Ending,
    /// Ends when the claim is lost.
    pub(super) heeds: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Ok,
    Transient,
    Permanent,
    Defer(Duration),
    Panic,
    /// Goes on until somebody drops it.
    Never,
    /// Takes its process down.
    Crash,
}

impl Plan {
    pub(super) fn of(seed: u64) -> Self {
        let rng = Rng::new(seed);
        let in_process = rng.chance(120);
        let lease = rng.pick(&[3, 10, 30]) * SECOND;
        let span = rng.duration(4 * lease, 8 * lease + MINUTE);
        let mut plan = Self {
            seed,
            kind: rng.pick(&[Kind::Memory, Kind::Amqp, Kind::JetStream]),
            in_process,
            policy: if rng.chance(150) { StorePolicy::Process } else { StorePolicy::Pause },
            processes: if in_process { 1 } else { rng.pick(&[1, 2, 2, 3]) },
            concurrency: rng.pick(&[1, 2, 4, 8]),
            lease,
            window: if rng.chance(100) { 3 * lease } else { 48 * 60 * MINUTE },
            max_run: rng.pick(&[2, 5]) * lease,
            timeout: rng.chance(200).then_some(2 * lease),
            tries: if rng.chance(150) { 2 } else { 1 },
            max_attempts: rng.pick(&[2, 3, 5]),
            pause_hold: rng.pick(&[1, 3]) * lease,
            drain: rng.pick(&[SECOND, 5 * SECOND, 2 * lease]),
            span,
            rates: rates(&rng),
            stories: Vec::new(),
        };
        let ids = rng.between(2, 7);
        plan.stories = (0..ids).map(|_| plan.story(&rng)).collect();
        plan
    }

    /// I9: with store and broker up, an id that is not done runs again within its lease, for as long as a
    /// delivery may have been handed back meanwhile, and the longest backoff or deferral.
    pub(super) fn patience(&self) -> Duration {
        2 * self.lease + BACKOFF + 10 * SECOND
    }

    fn story(&self, rng: &Rng) -> Story {
        let mut sent_at = vec![rng.duration(Duration::ZERO, self.span / 2)];
        while rng.chance(350) && sent_at.len() < 4 {
            let copy = if rng.chance(300) { sent_at[0] } else { rng.duration(sent_at[0], self.span) };
            sent_at.push(copy);
        }
        Story { steps: self.steps(rng), sent_at }
    }

    fn steps(&self, rng: &Rng) -> Vec<Step> {
        let ending = match rng.below(20) {
            0..=7 => return vec![self.step(rng, Ending::Ok)],
            8..=11 => Ending::Transient,
            12 => Ending::Permanent,
            13 => Ending::Panic,
            14 | 15 => Ending::Defer(rng.duration(MILLI, 2 * self.lease)),
            16 => Ending::Never,
            _ => Ending::Crash,
        };
        // Without a store that outlives it, nobody would know a poison; without an end, a
        // handler that defers goes on for ever. Both are said in the docs.
        let forgotten = self.in_process && ending == Ending::Crash;
        let ends = forgotten || matches!(ending, Ending::Defer(_));
        let times = rng.between(1, 3);
        let mut steps: Vec<Step> = (0..times).map(|_| self.step(rng, ending)).collect();
        if ends || !rng.chance(300) {
            steps.push(self.step(rng, Ending::Ok));
        }
        steps
    }

    fn step(&self, rng: &Rng, end: Ending) -> Step {
        let takes = match rng.below(10) {
            0..=2 => Duration::ZERO,
            3..=7 => rng.duration(MILLI, SECOND),
            8 => rng.duration(SECOND, self.lease),
            // Shorter than `max_run`, mostly.
            _ => rng.duration(self.lease, 3 * self.lease),
        };
        Step { takes, end, heeds: rng.chance(500) }
    }

    /// What an operator repaired before he sent a dead letter back to work.
    pub(super) fn repaired() -> Step {
        Step { takes: 10 * MILLI, end: Ending::Ok, heeds: true }
    }
}

/// Calm weather in one thing, a storm in another: where everything fails at once, nothing gets far.
fn rates(rng: &Rng) -> Rates {
    let weather = || rng.pick(&[0, 0, 5, 20, 80, 250]);
    Rates {
        store: weather(),
        settle: weather(),
        publish: weather(),
        deliver: weather() / 2,
        crash: rng.pick(&[0, 0, 1, 4, 12]),
        calamity: rng.pick(&[None, Some(5), Some(15), Some(40)]).map(Duration::from_secs),
        loses_records: rng.chance(300),
    }
}
