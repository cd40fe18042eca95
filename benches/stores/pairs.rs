//! Batches in turn, and what they come to.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

const IN_FLIGHT: [usize; 3] = [1, 64, 512];

/// How much is measured.
#[derive(Clone, Copy)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    /// For one batch, and how many calls at most.
    pub(crate) time: Duration,
    pub(crate) most: usize,
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rounds, time, most } = self;
        write!(f, "{rounds} rounds; a batch takes {time:?} or {most} calls, whatever is sooner")
    }
}

/// Something that can be called again and again.
pub(crate) struct Contender {
    name: String,
    run: Run,
}

/// Boxed once for a batch, not for a call.
type Run = Box<dyn Fn(usize, Effort) -> Pin<Box<dyn Future<Output = Batch> + Send>> + Send + Sync>;

struct Batch {
    took: Duration,
    times: Vec<Duration>,
}

impl Contender {
    pub(crate) fn new<T, F>(name: impl Into<String>, state: T, call: fn(Arc<T>) -> F) -> Self
    where
        T: Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let state = Arc::new(state);
        let run: Run =
            Box::new(move |in_flight, effort| Box::pin(batch(Arc::clone(&state), call, in_flight, effort)));
        Self { name: name.into(), run }
    }
}

async fn batch<T, F>(state: Arc<T>, call: fn(Arc<T>) -> F, in_flight: usize, effort: Effort) -> Batch
where
    T: Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let began = Instant::now();
    let (end, share) = (began + effort.time, effort.most.div_ceil(in_flight));
    // Dropped, it ends its tasks.
    let mut callers = JoinSet::new();
    for _ in 0..in_flight {
        callers.spawn(caller(Arc::clone(&state), call, end, share));
    }
    let times = callers.join_all().await.concat();
    Batch { took: began.elapsed(), times }
}

async fn caller<T, F: Future<Output = ()>>(
    state: Arc<T>,
    call: fn(Arc<T>) -> F,
    end: Instant,
    share: usize,
) -> Vec<Duration> {
    let mut times = Vec::new();
    loop {
        let began = Instant::now();
        call(Arc::clone(&state)).await;
        times.push(began.elapsed());
        if times.len() >= share || Instant::now() >= end {
            return times;
        }
    }
}

/// What share of another's rate the store's is to be.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    None,
    /// Of a bare call: 0.85, where nobody else shares the connection.
    BareCall,
    /// Of a script of equal size: also where Redis is what limits both.
    EqualScript,
}

impl Target {
    fn at(self, in_flight: usize) -> Option<f64> {
        match (self, in_flight) {
            (Self::BareCall | Self::EqualScript, 1) => Some(0.85),
            (Self::EqualScript, _) => Some(0.80),
            (Self::None | Self::BareCall, _) => None,
        }
    }
}

/// A store and what it is compared with.
pub(crate) struct Group {
    title: String,
    contenders: Vec<Contender>,
    targets: Vec<Target>,
}

/// All batches of a contender.
#[derive(Default)]
struct Runs {
    /// Per second, by round.
    rates: Vec<f64>,
    times: Vec<Duration>,
}

impl Group {
    pub(crate) fn of(title: impl Into<String>, store: Contender) -> Self {
        Self { title: title.into(), contenders: vec![store], targets: Vec::new() }
    }

    /// The one added first is the furthest from the store in each round.
    pub(crate) fn beside(mut self, other: Contender, target: Target) -> Self {
        self.contenders.insert(self.targets.len(), other);
        self.targets.push(target);
        self
    }

    pub(crate) async fn measure(&self, effort: Effort) {
        println!("\n{}", self.title);
        println!("{:>9}  {:40} {:>10} {:>9} {:>9}   store/this", "in flight", "", "per second", "p50", "p99");
        for in_flight in IN_FLIGHT {
            eprintln!("... {}, {in_flight} in flight", self.title);
            let runs = self.rounds(in_flight, effort).await;
            self.print(in_flight, runs);
        }
    }

    async fn rounds(&self, in_flight: usize, effort: Effort) -> Vec<Runs> {
        let mut runs: Vec<Runs> = self.contenders.iter().map(|_| Runs::default()).collect();
        for contender in &self.contenders {
            (contender.run)(in_flight, effort).await;
        }
        for round in 0..effort.rounds {
            for place in 0..runs.len() {
                let turn = if round.is_multiple_of(2) { place } else { runs.len() - 1 - place };
                runs[turn].add((self.contenders[turn].run)(in_flight, effort).await);
            }
        }
        runs
    }

    fn print(&self, in_flight: usize, mut runs: Vec<Runs>) {
        let store = runs.last().map(|store| store.rates.clone()).unwrap_or_default();
        for (turn, runs) in runs.iter_mut().enumerate() {
            let ratio = self.targets.get(turn).map(|target| ratio(&store, &runs.rates, target.at(in_flight)));
            runs.times.sort_unstable();
            println!(
                "{in_flight:>9}  {:40} {:>10.0} {:>9.1?} {:>9.1?}   {}",
                self.contenders[turn].name,
                quartiles(&runs.rates)[1],
                percentile(&runs.times, 50),
                percentile(&runs.times, 99),
                ratio.unwrap_or_default(),
            );
        }
    }
}

impl Runs {
    fn add(&mut self, batch: Batch) {
        self.rates.push(batch.times.len() as f64 / batch.took.as_secs_f64());
        self.times.extend(batch.times);
    }
}

fn ratio(store: &[f64], other: &[f64], target: Option<f64>) -> String {
    let ratios: Vec<f64> = store.iter().zip(other).map(|(store, other)| store / other).collect();
    let [low, median, high] = quartiles(&ratios);
    let verdict = match target {
        None => String::new(),
        Some(target) if median >= target => format!("  target {target:.2}: met"),
        Some(target) => format!("  target {target:.2}: MISSED"),
    };
    format!("{median:5.2} ({low:.2} to {high:.2}){verdict}")
}

/// The first, the median, the third.
fn quartiles(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| sorted[(sorted.len() - 1) * quarter / 4])
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}
