//! The settings of one queue, and whether they fit together.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::broker::{HoldSteps, QueueSpec};
use crate::dedup::{DedupLayer, DedupStore, MemoryStore, SharedStore, StorePolicy, retain};
use crate::handler::Needs;
use crate::inbox::Inbox;
use crate::redeliver::OwnPolicy;
use crate::{Backoff, MissingId, Observer, defaults};

/// More exact delays than this get no hold queue of their own: the steps between them will do.
const MOST_DELAYS: u32 = 12;

/// Everything about a queue but its handler.
#[derive(Clone)]
pub(crate) struct QueueConfig {
    pub(crate) spec: QueueSpec,
    pub(crate) scope: Option<String>,
    pub(crate) store: StoreChoice,
    pub(crate) inbox: Option<Arc<dyn Inbox>>,
    pub(crate) dedup: DedupConfig,
    pub(crate) backoff: Backoff,
    pub(crate) retry_policy: Option<Arc<OwnPolicy>>,
    pub(crate) tries: u32,
    pub(crate) timeout: Option<Duration>,
    pub(crate) concurrency: usize,
    pub(crate) pause_hold: Duration,
    pub(crate) reject_failed: bool,
    /// The hold steps are the user's, not ours to add to.
    pub(crate) own_holds: bool,
    pub(crate) observer: Option<Arc<dyn Observer>>,
}

/// Which store a queue uses.
#[derive(Clone)]
pub(crate) enum StoreChoice {
    /// The consumer's.
    Default,
    Given(Arc<dyn DedupStore>),
    /// The one at this URL, which may hold a password.
    At(String),
}

/// The settings of dedup, before there is a store and a scope. Changes are kept as a function
/// of the layer, so that each default stands in one place.
#[derive(Clone)]
pub(crate) struct DedupConfig {
    pub(crate) lease: Duration,
    pub(crate) window: Duration,
    pub(crate) max_run: Duration,
    pub(crate) max_attempts: u32,
    pub(crate) missing_id: MissingId,
    pub(crate) store_policy: StorePolicy,
    changes: Arc<dyn Fn(DedupLayer) -> DedupLayer + Send + Sync>,
}

impl DedupConfig {
    pub(crate) fn then(&mut self, change: impl Fn(DedupLayer) -> DedupLayer + Send + Sync + 'static) {
        let earlier = Arc::clone(&self.changes);
        self.changes = Arc::new(move |layer| change(earlier(layer)));
    }

    pub(crate) fn into_layer(self, store: Arc<dyn DedupStore>, scope: String) -> DedupLayer {
        let layer = DedupLayer::new(SharedStore::from(store), scope)
            .with_lease(self.lease)
            .with_window(self.window)
            .with_max_run(self.max_run)
            .with_max_attempts(self.max_attempts)
            .with_missing_id(self.missing_id)
            .with_store_policy(self.store_policy);
        (self.changes)(layer)
    }
}

impl Default for DedupConfig {
    fn default() -> Self {
        Self {
            lease: defaults::LEASE,
            window: defaults::WINDOW,
            max_run: defaults::MAX_RUN,
            max_attempts: defaults::MAX_ATTEMPTS,
            missing_id: MissingId::default(),
            store_policy: StorePolicy::default(),
            changes: Arc::new(|layer| layer),
        }
    }
}

impl QueueConfig {
    pub(crate) fn new(name: String) -> Self {
        Self {
            spec: QueueSpec::new(name),
            scope: None,
            store: StoreChoice::Default,
            inbox: None,
            dedup: DedupConfig::default(),
            backoff: Backoff::attempts(),
            retry_policy: None,
            tries: defaults::TRIES,
            timeout: None,
            concurrency: defaults::CONCURRENCY,
            pause_hold: defaults::PAUSE_HOLD,
            reject_failed: false,
            own_holds: false,
            observer: None,
        }
    }

    /// An inbox's own store comes first: its transactions complete claims there and nowhere else. Where nobody has
    /// chosen one, the queue has one in memory for itself.
    pub(crate) fn store(&self) -> Arc<dyn DedupStore> {
        if let Some(inbox) = &self.inbox {
            return inbox.store();
        }
        match &self.store {
            StoreChoice::Given(store) => Arc::clone(store),
            StoreChoice::Default | StoreChoice::At(_) => Arc::new(MemoryStore::new()),
        }
    }

    /// A store that cannot keep a record for as long as the queue needs would refuse every claim.
    fn check_store(&self, store: &dyn DedupStore) -> Result<(), ConfigError> {
        let needs = retain(self.dedup.window, self.backoff.cap());
        match store.features().keeps {
            Some(keeps) if keeps < needs => {
                Err(ConfigError::StoreKeeps { queue: self.spec.name.clone(), needs, keeps })
            }
            _ => Ok(()),
        }
    }

    /// Only a consumer connects: a store that nobody would connect to must not be replaced silently.
    pub(crate) fn check_connected(&self) -> Result<(), ConfigError> {
        match &self.store {
            StoreChoice::At(_) => Err(ConfigError::StoreUrl { queue: self.spec.name.clone() }),
            StoreChoice::Given(store) => self.check_store(&**store),
            StoreChoice::Default => Ok(()),
        }
    }

    /// Refuses what is unsafe, and warns of what is risky.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let queue = || self.spec.name.clone();
        if self.spec.name.is_empty() {
            return Err(ConfigError::NoName);
        }
        if self.spec.dead_letter.is_none() && !self.reject_failed {
            return Err(ConfigError::NoDeadLetter { queue: queue() });
        }
        if self.concurrency == 0 || usize::from(self.spec.prefetch) < self.concurrency {
            let (prefetch, concurrency) = (self.spec.prefetch, self.concurrency);
            return Err(ConfigError::Concurrency { queue: queue(), concurrency, prefetch });
        }
        if self.dedup.window < self.dedup.lease {
            let (window, lease) = (self.dedup.window, self.dedup.lease);
            return Err(ConfigError::Window { queue: queue(), window, lease });
        }
        if self.spec.holds.is_empty() {
            return Err(ConfigError::NoHold { queue: queue() });
        }
        if let Some(step) = self.spec.holds.impossible() {
            return Err(ConfigError::Hold { queue: queue(), step });
        }
        if self.inbox.is_some() {
            self.check_inbox()?;
        }
        self.warn();
        Ok(())
    }

    /// Exact delays between attempts are steps of their own, so that each takes one hop; delays that are drawn at
    /// random take a neighbouring step.
    pub(crate) fn fit_holds(&mut self) {
        if !self.own_holds && !self.backoff.has_jitter() {
            let delays = (1..self.dedup.max_attempts.min(MOST_DELAYS)).map(|n| self.backoff.delay(n));
            let delays: Vec<_> =
                delays.filter(|delay| HoldSteps::new([*delay]).impossible().is_none()).collect();
            self.spec.holds = self.spec.holds.and(delays);
        }
    }

    fn warn(&self) {
        if self.dedup.max_attempts < 3 {
            tracing::warn!(
                target: "guestlist", queue = self.spec.name, max_attempts = self.dedup.max_attempts,
                "with fewer than 3 attempts, a message that kills its process can take a good neighbour's last one"
            );
        }
        if self.timeout.is_some_and(|timeout| timeout > self.dedup.max_run) {
            tracing::warn!(target: "guestlist", queue = self.spec.name, "the timeout is longer than max_run, which ends the handler first");
        }
    }

    /// A transaction completes a claim of every message, in the store that it belongs to.
    fn check_inbox(&self) -> Result<(), ConfigError> {
        let queue = || self.spec.name.clone();
        if !matches!(self.store, StoreChoice::Default) {
            return Err(ConfigError::TwoStores { queue: queue() });
        }
        match self.unclaimed() {
            Some(setting) => Err(ConfigError::InboxWithoutClaim { queue: queue(), setting }),
            None => Ok(()),
        }
    }

    /// An argument that needs a claim does not go with messages that run without one; one that needs a transaction needs
    /// an inbox. And a handler without it would write past the inbox, and promise nothing.
    pub(crate) fn check_needs(&self, needs: Needs) -> Result<(), ConfigError> {
        let queue = || self.spec.name.clone();
        match (needs.transaction, self.inbox.is_some()) {
            (true, false) => return Err(ConfigError::NoInbox { queue: queue() }),
            (false, true) => return Err(ConfigError::NoTransaction { queue: queue() }),
            _ => {}
        }
        match self.unclaimed() {
            Some(setting) if needs.claim => Err(ConfigError::Needs { queue: queue(), setting }),
            _ => Ok(()),
        }
    }

    /// The setting that lets messages run without a claim.
    fn unclaimed(&self) -> Option<&'static str> {
        match (self.dedup.missing_id, self.dedup.store_policy) {
            (MissingId::Process, _) => Some("missing_id(MissingId::Process)"),
            (_, StorePolicy::Process) => Some("on_store_failure(StorePolicy::Process)"),
            _ => None,
        }
    }
}

impl fmt::Debug for QueueConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueConfig")
            .field("spec", &self.spec)
            .field("scope", &self.scope)
            .finish_non_exhaustive()
    }
}

/// Settings that do not fit together: nothing was consumed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// There is no queue to consume.
    #[error("the consumer has no queue: add one with `.queue(Queue::new(\"…\").handler(…))`")]
    NoQueue,
    /// A queue has an empty name.
    #[error("a queue's name is empty")]
    NoName,
    /// A queue has no handler.
    #[error("queue `{queue}` has no handler: add `.handler(…)`")]
    NoHandler {
        /// The queue.
        queue: String,
    },
    /// Two queues have the same name.
    #[error("queue `{queue}` is there twice; one consumer takes each queue once")]
    Twice {
        /// The queue.
        queue: String,
    },
    /// Nothing says what becomes of messages that cannot be handled.
    #[error(
        "queue `{queue}` does not say where failed messages go: add `.dead_letter(\"{queue}.dead\")`, or `.reject_failed()` to leave it to the broker"
    )]
    NoDeadLetter {
        /// The queue.
        queue: String,
    },
    /// No handler could run, or fewer than asked for.
    #[error(
        "queue `{queue}` has concurrency {concurrency} and prefetch {prefetch}: concurrency must be at least 1, and prefetch at least as large"
    )]
    Concurrency {
        /// The queue.
        queue: String,
        /// Its concurrency.
        concurrency: usize,
        /// Its prefetch.
        prefetch: u16,
    },
    /// An id would be forgotten while it is still being worked on.
    #[error(
        "queue `{queue}` has a window of {window:?}, shorter than its lease of {lease:?}: an id would be forgotten while it is worked on"
    )]
    Window {
        /// The queue.
        queue: String,
        /// Its window.
        window: Duration,
        /// Its lease.
        lease: Duration,
    },
    /// The store cannot keep a record for long enough.
    #[error(
        "queue `{queue}` needs its ids kept for {needs:?} (its window, and an hour more than its longest backoff), and its store keeps them for {keeps:?}: use a bucket with a longer window, or shorten those"
    )]
    StoreKeeps {
        /// The queue.
        queue: String,
        /// What it needs.
        needs: Duration,
        /// What the store can do.
        keeps: Duration,
    },
    /// A store is named by its URL, and nobody is there to connect to it.
    #[error(
        "queue `{queue}` names its store by URL, which only a `Consumer` connects to: use `.store(guestlist::dedup::connect(…).await?)`"
    )]
    StoreUrl {
        /// The queue.
        queue: String,
    },
    /// No hold step at all.
    #[error(
        "queue `{queue}` has no hold steps, and RabbitMQ no other way to delay a message: name one, or leave `.hold_steps(…)` out"
    )]
    NoHold {
        /// The queue.
        queue: String,
    },
    /// A hold step that no queue can have.
    #[error("queue `{queue}` has a hold step of {step:?}: RabbitMQ takes 1 ms to 49 days")]
    Hold {
        /// The queue.
        queue: String,
        /// The step.
        step: Duration,
    },
    /// The handler wants what some of its messages would not have.
    #[error(
        "the handler of queue `{queue}` takes a `Fence` or `MessageId`, which messages without a claim do not have; remove `{setting}` or the argument"
    )]
    Needs {
        /// The queue.
        queue: String,
        /// The setting that lets messages run without a claim.
        setting: &'static str,
    },
    /// The handler wants a transaction, and nobody begins one.
    #[error(
        "the handler of queue `{queue}` takes a transaction, which only a queue with an inbox has: add `.inbox(…)`"
    )]
    NoInbox {
        /// The queue.
        queue: String,
    },
    /// The queue has an inbox, and its handler would write past it.
    #[error(
        "queue `{queue}` has an inbox, but its handler takes no transaction: whatever it writes is not part of it; take `PostgresTransaction` as an argument, or use `.store(…)` instead of `.inbox(…)`"
    )]
    NoTransaction {
        /// The queue.
        queue: String,
    },
    /// The queue's claims are to be in two places.
    #[error(
        "queue `{queue}` has an inbox and a store: the inbox brings its own store along; remove `.store(…)`"
    )]
    TwoStores {
        /// The queue.
        queue: String,
    },
    /// Some messages would have no claim that a transaction could complete.
    #[error("queue `{queue}` has an inbox, which needs a claim for each message; remove `{setting}`")]
    InboxWithoutClaim {
        /// The queue.
        queue: String,
        /// The setting that lets messages run without a claim.
        setting: &'static str,
    },
    /// Nothing says where the dead letters are.
    #[error(
        "queue `{queue}` does not say where its dead letters are: add `.dead_letter(…)` as its consumer does, or, if it rejects what fails, the queue behind its dead-letter exchange"
    )]
    NoLetters {
        /// The queue.
        queue: String,
    },
    /// Dead letters would go where they are.
    #[error(
        "the dead letters at `{place}` cannot be redriven to `{place}`: name another place, or leave `.to(…)` out"
    )]
    RedriveInPlace {
        /// The place.
        place: String,
    },
    /// Nothing would ever be redriven.
    #[error("a rate of 0 letters per second redrives nothing: take 1 or more, or leave `.rate(…)` out")]
    NoRate,
    /// A removal that nobody could explain later.
    #[error("a discard needs a reason, which its audit event tells: `Discard::new(\"refunded by hand\")`")]
    NoReason,
    /// An id that no message has.
    #[error("no message has an id of {bytes} bytes: an id has 1 to {} of them", defaults::MAX_ID)]
    NoId {
        /// Its length.
        bytes: usize,
    },
    /// What is known of ids is out of reach.
    #[error(
        "the ids of queue `{queue}` are in the memory of its consumer's process, where nobody else can look: give the admin that store by `.store(…)` within the process, or both a store that is shared"
    )]
    StoreInMemory {
        /// The queue.
        queue: String,
    },
}
