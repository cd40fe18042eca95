//! [`DedupLayer`] and its settings.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::TaskTracker;
use tower_layer::Layer;

use super::claims::Lengths;
use super::service::Dedup;
use super::store::DedupStore;
use super::suspects::Suspects;
use crate::events::Events;
use crate::identity::Ids;
use crate::pause::Gate;
use crate::{Identity, MissingId, Observer, Scope, defaults};

/// What a queue does while its store does not answer claims.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum StorePolicy {
    /// No handler runs; consumption pauses, and goes on when the store is back. The default.
    #[default]
    Pause,
    /// Messages are handled without dedup, and counted. Attempts are bounded by what our own
    /// copies and the broker say.
    Process,
}

/// [`Layer`] that applies [`Dedup`].
///
/// See the [module docs](super) for an example, and [`defaults`] for the numbers.
#[derive(Clone, Debug)]
pub struct DedupLayer {
    store: Arc<dyn DedupStore>,
    namespace: String,
    scope: String,
    pub(super) settings: Settings,
}

#[derive(Clone)]
pub(super) struct Settings {
    pub(super) lengths: Lengths,
    pub(super) identity: Identity,
    pub(super) missing_id: MissingId,
    pub(super) max_attempts: u32,
    pub(super) max_age: Option<Duration>,
    pub(super) wait: Option<Duration>,
    pub(super) waiters: usize,
    pub(super) compare_bodies: bool,
    pub(super) store_policy: StorePolicy,
    pub(super) suspects: Suspects,
    pub(super) cancellation: bool,
    pub(super) gate: Gate,
    pub(super) events: Events,
    pub(super) background: TaskTracker,
}

impl DedupLayer {
    /// Remembers in `store`, each id within `scope`: two queues that share a store and not a
    /// scope never suppress each other's messages.
    pub fn new(store: impl Into<SharedStore>, scope: impl Into<String>) -> Self {
        let (namespace, scope) = (String::new(), scope.into());
        Self { store: store.into().0, namespace, scope, settings: Settings::default() }
    }

    fn set(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        change(&mut self.settings);
        self
    }

    /// The namespace in the store, for stores that several systems share.
    #[must_use]
    pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// How long a completed id is remembered. One that is not done stays on record for an hour longer than
    /// its longest backoff, at least, so that its attempts are counted to the end.
    #[must_use]
    pub fn with_window(self, window: Duration) -> Self {
        self.set(|settings| settings.lengths.window = window)
    }

    /// How long a claim holds without renewal. Zero is not "no lease": it is as short as can be.
    #[must_use]
    pub fn with_lease(self, lease: Duration) -> Self {
        self.set(|settings| settings.lengths.lease = lease.max(Duration::from_millis(1)))
    }

    /// How long one run may renew its claim; then its future is dropped.
    #[must_use]
    pub fn with_max_run(self, max_run: Duration) -> Self {
        self.set(|settings| settings.lengths.max_run = max_run)
    }

    /// How long deliveries in hand are kept while the store is away.
    #[must_use]
    pub fn with_pause_hold(self, hold: Duration) -> Self {
        self.set(|settings| settings.lengths.pause_hold = hold)
    }

    /// How many times an id is tried, over all consumers and crashes. At least once.
    #[must_use]
    pub fn with_max_attempts(self, attempts: u32) -> Self {
        self.set(|settings| settings.max_attempts = attempts.max(1))
    }

    /// Where ids come from.
    #[must_use]
    pub fn with_identity(self, identity: Identity) -> Self {
        self.set(|settings| settings.identity = identity)
    }

    /// What becomes of a message without an id.
    #[must_use]
    pub fn with_missing_id(self, policy: MissingId) -> Self {
        self.set(|settings| settings.missing_id = policy)
    }

    /// Messages older than this are dead letters, cause `expired`. A message whose age nobody
    /// knows is not.
    #[must_use]
    pub fn with_max_age(self, age: Duration) -> Self {
        self.set(|settings| settings.max_age = Some(age))
    }

    /// How long a delivery waits in process for another holder of its id, at most.
    #[must_use]
    pub fn with_wait(self, wait: Duration) -> Self {
        self.set(|settings| settings.wait = Some(wait))
    }

    /// How many deliveries may wait at once; the others are handed back without waiting.
    #[must_use]
    pub fn with_waiters(self, waiters: usize) -> Self {
        self.set(|settings| settings.waiters = waiters.max(1))
    }

    /// Compares bodies: the same id with another body is a dead letter, cause `id_conflict`.
    #[must_use]
    pub fn with_compared_bodies(self) -> Self {
        self.set(|settings| settings.compare_bodies = true)
    }

    /// What to do while the store does not answer.
    #[must_use]
    pub fn with_store_policy(self, policy: StorePolicy) -> Self {
        self.set(|settings| settings.store_policy = policy)
    }

    /// Who hands out the suspect permit; by default this process does, for all its queues.
    #[must_use]
    pub fn with_suspects(self, suspects: Suspects) -> Self {
        self.set(|settings| settings.suspects = suspects)
    }

    /// Who is told of every event.
    #[must_use]
    pub fn with_observer(self, observer: Arc<dyn Observer>) -> Self {
        self.set(|settings| settings.events = Events::new(Some(observer)))
    }

    /// How this layer finds keys, for whoever looks without claiming.
    pub(crate) fn ids(&self) -> Ids {
        let Settings { identity, missing_id, .. } = &self.settings;
        Ids {
            identity: identity.clone(),
            missing: *missing_id,
            scope: Scope::new(&self.namespace, &self.scope),
        }
    }

    pub(crate) fn with_gate(self, gate: Gate) -> Self {
        self.set(|settings| settings.gate = gate)
    }

    pub(crate) fn with_events(self, events: Events) -> Self {
        self.set(|settings| settings.events = events)
    }

    /// The longest backoff that the layers around it plan.
    pub(crate) fn with_longest_backoff(self, backoff: Duration) -> Self {
        self.set(|settings| settings.lengths.backoff = backoff)
    }

    /// Who keeps track of what ends claims after their holders are gone.
    pub(crate) fn with_background(self, background: TaskTracker) -> Self {
        self.set(|settings| settings.background = background)
    }

    pub(crate) fn with_cancellation(self, cancellation: bool) -> Self {
        self.set(|settings| settings.cancellation = cancellation)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            lengths: Lengths {
                lease: defaults::LEASE,
                window: defaults::WINDOW,
                backoff: defaults::BACKOFF_CAP,
                max_run: defaults::MAX_RUN,
                pause_hold: defaults::PAUSE_HOLD,
            },
            identity: Identity::default(),
            missing_id: MissingId::default(),
            max_attempts: defaults::MAX_ATTEMPTS,
            max_age: None,
            wait: None,
            waiters: usize::from(defaults::prefetch(defaults::CONCURRENCY) / 4),
            compare_bodies: false,
            store_policy: StorePolicy::default(),
            suspects: Suspects::default(),
            cancellation: true,
            gate: Gate::default(),
            events: Events::default(),
            background: TaskTracker::new(),
        }
    }
}

impl Settings {
    pub(super) fn wait(&self) -> Duration {
        self.wait.unwrap_or_else(|| defaults::WAIT.min(self.lengths.lease))
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("lengths", &self.lengths)
            .field("identity", &self.identity)
            .field("missing_id", &self.missing_id)
            .field("max_attempts", &self.max_attempts)
            .field("store_policy", &self.store_policy)
            .finish_non_exhaustive()
    }
}

impl<S> Layer<S> for DedupLayer {
    type Service = Dedup<S>;

    fn layer(&self, inner: S) -> Dedup<S> {
        let scope = Scope::new(&self.namespace, &self.scope);
        Dedup::new(inner, Arc::clone(&self.store), scope, self.settings.clone())
    }
}

/// A store that is shared: what [`DedupLayer::new`] takes. Any store, or an `Arc` of one.
#[derive(Clone, Debug)]
pub struct SharedStore(Arc<dyn DedupStore>);

impl SharedStore {
    pub(crate) fn into_arc(self) -> Arc<dyn DedupStore> {
        self.0
    }
}

impl<S: DedupStore> From<S> for SharedStore {
    fn from(store: S) -> Self {
        Self(Arc::new(store))
    }
}

impl From<Arc<dyn DedupStore>> for SharedStore {
    fn from(store: Arc<dyn DedupStore>) -> Self {
        Self(store)
    }
}
