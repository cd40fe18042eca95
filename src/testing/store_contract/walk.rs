//! Case: random walks, compared with the machine step by step.

use std::collections::HashMap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::side_by_side::{Case, side_by_side};
use super::stage::Key;
use super::{LONG, StoreFixture};
use crate::dedup::protocol::{
    Ask, Before, Claim, Digest, Fence, Held, Machine, Micros, Record, Release, Run, State, Token,
};

const WALKS: usize = 24;
const STEPS: usize = 50;

/// Over random commands of several tokens on a few keys, every answer and every record is the
/// [machine's](Machine). Panics with the seed, to walk again by [`a_random_walk`].
pub async fn it_answers_as_the_machine_does(fixture: &dyn StoreFixture) {
    let walks = (0..WALKS).map(|_| Box::pin(a_random_walk(fixture, rand::random())) as _);
    side_by_side(walks.map(|walk| Case::new("a random walk", walk)).collect()).await;
}

/// One walk of that case, the same for the same seed.
pub async fn a_random_walk(fixture: &dyn StoreFixture, seed: u64) {
    let mut walk = Walk::new(Key::new(fixture).await, seed);
    for _ in 0..STEPS {
        let step = walk.choose();
        walk.go(fixture, step).await;
    }
}

/// How long something lasts: to the end of the walk, or not to the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Span {
    Long,
    Short,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Claim { token: u128, lease: Span, retain: Span, generation: u32, digest: Option<Digest>, alone: bool },
    Renew { token: u128, lease: Span },
    Complete { token: u128, window: Span },
    Release { token: u128, why: Why },
    Forget,
    Lose,
}

#[derive(Clone, Copy, Debug)]
enum Why {
    Failed(Option<Span>),
    Deferred(Option<Span>),
    NotStarted,
    Interrupted,
    DeadLettered,
}

/// One key's walk: the store's key, and what the machine makes of the same steps.
struct Walk {
    key: Key,
    record: Option<Record>,
    now: Micros,
    /// The fences of each token's last claim, the machine's and the store's.
    fences: HashMap<u128, (Fence, Fence)>,
    /// Those of the last claim of all.
    last: (Fence, Fence),
    rng: StdRng,
    /// For whoever has to find out what went wrong.
    story: Vec<String>,
}

impl Walk {
    fn new(key: Key, seed: u64) -> Self {
        Self {
            key,
            record: None,
            now: 1_700_000_000_000_000,
            fences: HashMap::new(),
            last: (Fence(0), Fence(0)),
            rng: StdRng::seed_from_u64(seed),
            story: vec![format!("seed {seed}")],
        }
    }

    fn choose(&mut self) -> Step {
        let token = self.token();
        match self.rng.random_range(0..20) {
            0..8 => self.choose_claim(token),
            8 => Step::Renew { token, lease: self.span() },
            9..11 => Step::Complete { token, window: self.window() },
            11..18 => Step::Release { token, why: self.why() },
            18 => Step::Forget,
            _ => Step::Lose,
        }
    }

    fn choose_claim(&mut self, token: u128) -> Step {
        let own = self.record.map_or(3, |record| record.generation);
        Step::Claim {
            token,
            lease: self.span(),
            retain: self.window(),
            generation: own.saturating_add_signed([-1, 0, 0, 0, 1, 2][self.rng.random_range(0..6)]),
            digest: [None, Some(1), Some(2)][self.rng.random_range(0..3)],
            alone: self.rng.random(),
        }
    }

    /// Half of the time whoever is on record, so that the walk gets somewhere.
    fn token(&mut self) -> u128 {
        let own = self.record.map(|record| record.run.token.bits());
        own.filter(|_| self.rng.random()).unwrap_or_else(|| self.rng.random_range(1..=4))
    }

    fn span(&mut self) -> Span {
        if self.rng.random_ratio(1, 4) { Span::Short } else { Span::Long }
    }

    fn window(&mut self) -> Span {
        let short = !self.key.pace.one_window && self.rng.random_ratio(1, 8);
        if short { Span::Short } else { Span::Long }
    }

    fn why(&mut self) -> Why {
        let backoff = match self.rng.random_range(0..4) {
            0 | 1 => None,
            2 => Some(Span::Short),
            _ => Some(Span::Long),
        };
        match self.rng.random_range(0..8) {
            0..3 => Why::Failed(backoff),
            3 => Why::Deferred(backoff),
            4 => Why::NotStarted,
            5 | 6 => Why::Interrupted,
            _ => Why::DeadLettered,
        }
    }

    /// The step by the store and by the machine, then a look at the record of each.
    async fn go(&mut self, fixture: &dyn StoreFixture, step: Step) {
        self.story.push(format!("{step:?}"));
        self.now += 1;
        match step {
            Step::Claim { token, lease, retain, generation, digest, alone } => {
                let (lease, retain) = (self.length(lease), self.length(retain));
                let token = Token::from_bits(token);
                self.claim(Ask { token, lease, retain, generation, digest, alone }).await;
            }
            Step::Renew { token, lease } => self.renew(token, self.length(lease)).await,
            Step::Complete { token, window } => self.complete(token, self.length(window)).await,
            Step::Release { token, why } => self.release(token, self.plan(why)).await,
            Step::Forget => self.forget().await,
            Step::Lose => {
                self.key.lose(fixture).await;
                self.record = None;
            }
        }
        if step.is_short() || self.ends_soon() {
            self.key.pass().await;
            self.now += 2 * micros(self.key.pace.short);
        }
        self.compare_records().await;
    }

    /// The record's time may be over before the next step, if the machine is slow: a release of what was claimed
    /// for a short time.
    fn ends_soon(&self) -> bool {
        let left = self.record.map_or(0, |record| record.kept_until.saturating_sub(self.now));
        left > 0 && left <= micros(self.key.pace.short)
    }

    async fn claim(&mut self, ask: Ask) {
        let (record, expected) = Machine::at(self.now).claim(self.record, &ask);
        self.record = record;
        let claim = if self.key.pace.late.is_zero() {
            self.key.claim(ask).await
        } else {
            self.key.claim_until(ask, |claim| without_numbers(*claim) == without_numbers(expected)).await
        };
        let right = without_numbers(claim) == without_numbers(expected);
        assert!(right, "answered {claim:?}, not {expected:?}: {:#?}", self.story);
        if let (Claim::Acquired { fence: expected, .. }, Claim::Acquired { fence, .. }) = (expected, claim) {
            self.fence(ask.token, expected, fence);
        }
    }

    /// The same claim has the same fence, another one a higher one.
    fn fence(&mut self, token: Token, expected: Fence, fence: Fence) {
        let (last_expected, last) = self.last;
        let right = if expected == last_expected { fence == last } else { fence > last };
        assert!(right, "fence {fence:?} after {last:?}: {:#?}", self.story);
        self.last = (expected, fence);
        self.fences.insert(token.bits(), self.last);
    }

    async fn renew(&mut self, token: u128, lease: Duration) {
        let (record, expected) = Machine::at(self.now).renew(self.record, self.run(token), lease);
        self.record = record;
        let held = self.key.renew(token, lease).await;
        self.compare(expected, held);
    }

    async fn complete(&mut self, token: u128, window: Duration) {
        let (record, expected) = Machine::at(self.now).complete(self.record, self.run(token), window);
        self.record = record;
        let held = self.key.complete_for(token, window).await;
        self.compare(expected, held);
    }

    async fn release(&mut self, token: u128, why: Release) {
        let (record, expected) = Machine::at(self.now).release(self.record, self.run(token), why);
        self.record = record;
        let held = self.key.release(token, why).await;
        self.compare(expected, held);
    }

    fn compare(&self, expected: Held, held: Held) {
        assert_eq!(held, expected, "{:#?}", self.story);
    }

    async fn forget(&mut self) {
        let there = Machine::at(self.now).live(self.record).is_some();
        self.record = None;
        assert_eq!(self.key.forget().await, there, "{:#?}", self.story);
    }

    async fn compare_records(&mut self) {
        let expected = Machine::at(self.now).live(self.record);
        if expected.is_none() && self.record.is_some() {
            self.key.vanishes().await;
        }
        let record = self.key.inspect().await;
        assert_eq!(record.map(Timeless::of), expected.map(Timeless::of), "{:#?}", self.story);
        let (Some(record), Some(expected)) = (record, expected) else { return };
        if let Some((machines, stores)) = self.fences.get(&record.run.token.bits())
            && *machines == expected.run.fence
        {
            assert_eq!(record.run.fence, *stores, "{:#?}", self.story);
        }
        if !self.key.pace.one_window {
            assert_eq!(record.retain, expected.retain, "{:#?}", self.story);
        }
    }

    /// The machine's run of a token.
    fn run(&self, token: u128) -> Run {
        let fence = self.fences.get(&token).map_or(Fence(0), |(machines, _)| *machines);
        Run { token: Token::from_bits(token), fence }
    }

    const fn length(&self, span: Span) -> Duration {
        match span {
            Span::Long => LONG,
            Span::Short => self.key.pace.short,
        }
    }

    fn plan(&self, why: Why) -> Release {
        let backoff = |span: Option<Span>| span.map_or(Duration::ZERO, |span| self.length(span));
        match why {
            Why::Failed(span) => Release::Failed { not_before: backoff(span) },
            Why::Deferred(span) => Release::Deferred { not_before: backoff(span) },
            Why::NotStarted => Release::NotStarted,
            Why::Interrupted => Release::Interrupted,
            Why::DeadLettered => Release::DeadLettered,
        }
    }
}

impl Step {
    fn is_short(self) -> bool {
        match self {
            Self::Claim { lease, retain, .. } => lease == Span::Short || retain == Span::Short,
            Self::Renew { lease, .. } => lease == Span::Short,
            Self::Complete { window, .. } => window == Span::Short,
            Self::Release { why: Why::Failed(span) | Why::Deferred(span), .. } => span == Some(Span::Short),
            Self::Release { .. } | Self::Forget | Self::Lose => false,
        }
    }
}

/// A record without what only its own store's clock and counter can say.
#[derive(Debug, PartialEq, Eq)]
struct Timeless {
    token: Token,
    attempt: u32,
    before: Before,
    stands: &'static str,
    generation: u32,
    suspect: bool,
    interruptions: u8,
    digest: Option<Digest>,
}

impl Timeless {
    const fn of(record: Record) -> Self {
        let Record { run, attempt, before, generation, suspect, interruptions, digest, .. } = record;
        let stands = match record.state {
            State::Claimed { .. } => "claimed",
            State::Released { .. } => "released",
            State::Parked => "parked",
            State::Done => "done",
        };
        Self { token: run.token, attempt, before, stands, generation, suspect, interruptions, digest }
    }
}

/// An answer without what only its own store's clock and counter can say.
const fn without_numbers(claim: Claim) -> Claim {
    match claim {
        Claim::Acquired { attempt, before, digest, .. } => {
            Claim::Acquired { fence: Fence(0), attempt, before, digest }
        }
        Claim::InProgress { digest, .. } => Claim::InProgress { left: Duration::ZERO, digest },
        other => other,
    }
}

fn micros(duration: Duration) -> Micros {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
