//! [`Queue`]: one queue's settings and handler.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::check::{self, Finding};
use super::config::{ConfigError, QueueConfig, StoreChoice};
use super::session::Line;
use super::status::Status;
use super::stores::Stores;
use crate::broker::{AmqpOptions, Broker, Declare, Destination, HoldSteps, NatsOptions};
use crate::dead_letter::redaction::Redaction;
use crate::dead_letter::{Field, Oversized, Redact};
use crate::dedup::{DedupLayer, SharedStore, StorePolicy, Suspects};
use crate::delivery::BoxFuture;
use crate::handler::{Arguments, Handled, Handler, HandlerService, Needs};
use crate::inbox::Inbox;
use crate::pause::Gate;
use crate::pipeline::{Inner, Pipeline};
use crate::redeliver::Again;
use crate::{Backoff, Error, Failure, Identity, MissingId, Observer, defaults};

/// One queue: where it is, how it is consumed, and the handler of its messages.
///
/// Only the name, the handler and the place for failed messages are needed; for the rest see [`defaults`].
///
/// ```
/// use guestlist::prelude::*;
/// use std::time::Duration;
///
/// let queue = Queue::new("charges")
///     .dead_letter("charges.dead")
///     .window(24 * HOUR)
///     .max_attempts(8)
///     .concurrency(4)
///     .timeout(Duration::from_secs(20))
///     .handler(async |message: Message| Ok(()));
/// ```
pub struct Queue {
    config: QueueConfig,
    start: Option<Start>,
}

/// Compiled per handler, boxed once per queue: the loop with its stack.
type Start = Box<dyn FnOnce(Pipeline, Line) -> Result<Run, ConfigError> + Send>;

/// Runs a queue until it is told to stop.
pub(super) type Run = Box<dyn FnOnce(CancellationToken) -> BoxFuture<Result<(), Error>> + Send>;

impl Queue {
    /// The queue of this name. NATS: the durable consumer, and the stream unless [`NatsOptions`] says otherwise.
    pub fn new(name: impl Into<String>) -> Self {
        Self { config: QueueConfig::new(name.into()), start: None }
    }

    fn set(mut self, change: impl FnOnce(&mut QueueConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// The handler: an async function of up to four [arguments](crate::FromMessage).
    #[must_use]
    pub fn handler<H, Args>(mut self, handler: H) -> Self
    where
        H: Handler<Args, Future: Future<Output = Handled> + Send + 'static>,
        Args: Arguments + 'static,
    {
        self.start = Some(Box::new(move |pipeline, line| {
            line.config.check_needs(Args::NEEDS)?;
            Ok(run(pipeline, line, HandlerService::new(handler), Args::NEEDS))
        }));
        self
    }

    /// A service instead of a handler: one with tower layers of your own around it.
    #[must_use]
    pub fn service(mut self, service: impl Inner) -> Self {
        let needs = Needs::CANCELLATION;
        self.start = Some(Box::new(move |pipeline, line| Ok(run(pipeline, line, service, needs))));
        self
    }

    /// Where failed messages go: a queue, or a NATS subject that a stream keeps.
    #[must_use]
    pub fn dead_letter(self, to: impl Into<Destination>) -> Self {
        self.set(|config| config.spec.dead_letter = Some(to.into()))
    }

    /// Starts even if the dead-letter destination is missing. The queue pauses at the first message that needs it.
    #[must_use]
    pub fn allow_missing_dead_letter(self) -> Self {
        self.set(|config| config.spec.allow_missing_dead_letter = true)
    }

    /// Leaves failed messages to the broker: `basic.reject` (a dead-letter exchange, or **the bin**), `term` on NATS
    /// (**gone from the durable**). No story goes with them. See [native dead-lettering](crate::dead_letter#native-dead-lettering).
    #[must_use]
    pub fn reject_failed(self) -> Self {
        self.set(|config| config.reject_failed = true)
    }

    /// What becomes of a message that is too large for the dead letters (NATS: `max_payload`, which counts headers; AMQP:
    /// a frame of headers, or `max_message_size`), even without the history and the error's text: by default it stays with
    /// its queue.
    #[must_use]
    pub fn oversized(self, oversized: Oversized) -> Self {
        self.set(|config| config.oversized = oversized)
    }

    /// Asks this function about each value that is about to lie with the dead letters, where other people read it: the
    /// headers of the message, those moved aside because a broker would act on them included, and the text of each error.
    /// Error texts are asked about once, when the message fails; what is left goes on hold copies and into the log as well.
    ///
    /// ```
    /// use guestlist::dead_letter::{Field, Redact};
    /// use guestlist::prelude::*;
    ///
    /// let queue = Queue::new("charges").dead_letter("charges.dead").redact(|field, _value| match field {
    ///     Field::Header(name) if name.eq_ignore_ascii_case("authorization") => Redact::Remove,
    ///     Field::Error => Redact::Replace("see the log of the bank".to_owned()),
    ///     _ => Redact::Keep,
    /// });
    /// ```
    ///
    /// Not asked about: body, ids, content type, routing key and our own headers, which a redrive needs; the other AMQP
    /// properties; hold copies, whose message must come back whole. A letter that is redriven lacks what was taken away.
    /// A value at which the function panics stays away.
    #[must_use]
    pub fn redact(self, redact: impl Fn(Field<'_>, &[u8]) -> Redact + Send + Sync + 'static) -> Self {
        self.set(|config| config.redaction = Some(Redaction::new(redact)))
    }

    /// Makes the queue, stream, durable and dead-letter destination if they are missing. Without it, missing ones
    /// are refused at the start.
    #[must_use]
    pub fn declare(self) -> Self {
        self.set(|config| config.spec.declare = Declare::Create)
    }

    /// The scope in which ids are unique. The default differs between brokers; a name of your own
    /// stays when a queue moves, and two queues that share it suppress each other's copies.
    #[must_use]
    pub fn scope(self, scope: impl Into<String>) -> Self {
        self.set(|config| config.scope = Some(scope.into()))
    }

    /// The store for this queue's ids, instead of the consumer's.
    #[must_use]
    pub fn store(self, store: impl Into<SharedStore>) -> Self {
        self.set(|config| config.store = StoreChoice::Given(store.into().into_arc()))
    }

    /// The store at this URL, as [`dedup::connect`](crate::dedup::connect) knows it. The consumer connects
    /// when it starts; queues with the same URL share a connection, and with `memory:` a store.
    ///
    /// ```
    /// # use guestlist::prelude::*;
    /// let charges = Queue::new("charges").dead_letter("charges.dead").store_url("redis://localhost");
    /// ```
    #[must_use]
    pub fn store_url(self, url: impl Into<String>) -> Self {
        self.set(|config| config.store = StoreChoice::At(url.into()))
    }

    /// Completes each id in a transaction of the handler's own, which takes it as an argument: its writes there and
    /// the memory that it is done become true together. It brings the store along. See [the inbox](crate::inbox).
    #[must_use]
    pub fn inbox(self, inbox: impl Inbox) -> Self {
        self.set(|config| config.inbox = Some(Arc::new(inbox)))
    }

    /// How long a completed id is remembered: an hour by default. Longer than any copy can be late.
    #[must_use]
    pub fn window(self, window: Duration) -> Self {
        self.set(|config| config.dedup.window = window)
    }

    /// How long a claim holds without renewal: 30 s by default. Renewed while the handler runs.
    #[must_use]
    pub fn lease(self, lease: Duration) -> Self {
        let lease = lease.max(Duration::from_millis(1));
        self.set(|config| {
            config.dedup.lease = lease;
            config.spec.heartbeat = lease / defaults::RENEWALS_PER_LEASE;
        })
    }

    /// How long one run may renew its claim: 15 min by default. Then its future is dropped.
    #[must_use]
    pub fn max_run(self, max_run: Duration) -> Self {
        self.set(|config| config.dedup.max_run = max_run)
    }

    /// How many times an id is tried, over all consumers and crashes: 5 by default.
    #[must_use]
    pub fn max_attempts(self, attempts: u32) -> Self {
        self.set(|config| config.dedup.max_attempts = attempts)
    }

    /// Messages older than this are dead letters, cause `expired`. None by default: then a
    /// handler that always defers goes on for ever.
    #[must_use]
    pub fn max_age(self, age: Duration) -> Self {
        self.set(|config| config.dedup.max_age = Some(age))
    }

    /// Where ids come from.
    #[must_use]
    pub fn identity(self, identity: Identity) -> Self {
        self.set(|config| config.dedup.then(move |layer| layer.with_identity(identity.clone())))
    }

    /// What becomes of a message without an id: a dead letter by default.
    #[must_use]
    pub fn missing_id(self, policy: MissingId) -> Self {
        self.set(|config| config.dedup.missing_id = policy)
    }

    /// Compares bodies: the same id with another body is a dead letter, cause `id_conflict`.
    #[must_use]
    pub fn compare_bodies(self) -> Self {
        self.set(|config| config.dedup.then(DedupLayer::with_compared_bodies))
    }

    /// What to do while the store does not answer: pause by default.
    #[must_use]
    pub fn on_store_failure(self, policy: StorePolicy) -> Self {
        self.set(|config| config.dedup.store_policy = policy)
    }

    /// How long a delivery waits in process for another holder of its id: 5 s by default, or the lease if that is shorter.
    #[must_use]
    pub fn wait(self, wait: Duration) -> Self {
        self.set(|config| config.dedup.wait = Some(wait))
    }

    /// The delays between attempts: 1 s × 4 up to 5 min by default, full jitter.
    #[must_use]
    pub fn backoff(self, backoff: Backoff) -> Self {
        self.set(|config| config.backoff = backoff)
    }

    /// Asks this function first when, and whether, a transient failure is tried again: it is given the failure and
    /// the attempt, from 1. See [`redeliver`](crate::redeliver) for an example.
    #[must_use]
    pub fn retry_policy(self, policy: impl Fn(&Failure, u32) -> Again + Send + Sync + 'static) -> Self {
        self.set(|config| config.retry_policy = Some(Arc::new(policy)))
    }

    /// In-process tries within one attempt, for short hiccups: 1 by default, that is, no second one.
    #[must_use]
    pub fn tries(self, tries: u32) -> Self {
        self.set(|config| config.tries = tries.max(1))
    }

    /// How long each try may take. None by default; `max_run` bounds them all.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        self.set(|config| config.timeout = Some(timeout))
    }

    /// How many handlers run at once: 16 by default. Sets the prefetch to half as many again.
    #[must_use]
    pub fn concurrency(self, concurrency: usize) -> Self {
        self.set(|config| {
            config.concurrency = concurrency;
            config.spec.prefetch = defaults::prefetch(concurrency);
        })
    }

    /// How many unsettled deliveries the broker may hand out; at least the concurrency.
    #[must_use]
    pub fn prefetch(self, prefetch: u16) -> Self {
        self.set(|config| config.spec.prefetch = prefetch)
    }

    /// How long deliveries in hand are kept while the store or the dead-letter destination is
    /// away: 30 s by default. Then they go back to the broker until it answers again.
    #[must_use]
    pub fn pause_hold(self, hold: Duration) -> Self {
        self.set(|config| config.pause_hold = hold)
    }

    /// AMQP: the hold steps, of which every delay is made: 500 ms × 4 up to 24 days by default, each a queue that
    /// is made when it is first needed; with an exact [`backoff`](Self::backoff), its delays as well.
    #[must_use]
    pub fn hold_steps(self, steps: impl IntoIterator<Item = Duration>) -> Self {
        self.set(|config| {
            config.spec.holds = HoldSteps::new(steps);
            config.own_holds = true;
        })
    }

    /// What only RabbitMQ needs to know.
    #[must_use]
    pub fn amqp(self, options: AmqpOptions) -> Self {
        self.set(|config| config.spec.amqp = options)
    }

    /// What only NATS needs to know.
    #[must_use]
    pub fn nats(self, options: NatsOptions) -> Self {
        self.set(|config| config.spec.nats = options)
    }

    /// Who hands out the suspect permit: this process by default.
    #[must_use]
    pub fn suspects(self, suspects: Suspects) -> Self {
        self.set(|config| config.dedup.then(move |layer| layer.with_suspects(suspects.clone())))
    }

    /// Who is told of every event of this queue's deliveries.
    #[must_use]
    pub fn observer(self, observer: Arc<dyn Observer>) -> Self {
        self.set(|config| config.observer = Some(observer))
    }

    /// What is unsafe or risky about its settings, alone and with what the broker says of itself. Asks only: nothing is
    /// made, no store is connected to. A consumer refuses and warns of the same when it starts;
    /// a CI can fail on them. See [`Finding`] for an example.
    ///
    /// # Errors
    ///
    /// The broker could not be asked.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it changes nothing.
    pub async fn check(&self, broker: &dyn Broker) -> Result<Vec<Finding>, Error> {
        self.findings(broker, None).await
    }

    pub(super) async fn findings(
        &self,
        broker: &dyn Broker,
        drain: Option<Duration>,
    ) -> Result<Vec<Finding>, Error> {
        let facts = broker.facts(&self.config.spec).await?;
        let refused = self.config.check().and_then(|()| self.config.check_given());
        let mut findings = self.config.findings(drain, &facts);
        match refused {
            // It is among the findings.
            Ok(()) | Err(ConfigError::Unsafe { .. }) => {}
            Err(error) => findings.insert(0, Finding::refused(&self.config.spec.name, &error)),
        }
        Ok(findings)
    }

    pub(super) fn named(self, consumer: Option<String>) -> Self {
        self.set(|config| config.consumer = consumer)
    }

    pub(crate) fn into_config(self) -> QueueConfig {
        self.config
    }

    /// Checks the settings, and that the broker has what the queue needs; what comes back runs it.
    pub(super) async fn prepare(
        self,
        broker: &Arc<dyn Broker>,
        stores: &mut Stores,
        status: &Status,
        drain: Duration,
    ) -> Result<Run, Error> {
        let Self { mut config, start } = self;
        config.check()?;
        config.fit_holds();
        let start = start.ok_or_else(|| ConfigError::NoHandler { queue: config.spec.name.clone() })?;
        let counters = status
            .add(&config.spec.name)
            .ok_or_else(|| ConfigError::Twice { queue: config.spec.name.clone() })?;
        config.store = StoreChoice::Given(match &config.inbox {
            Some(inbox) => inbox.store(),
            None => stores.of(&config).await?,
        });
        config.check_connected()?;
        let (gate, background) = (Gate::default(), TaskTracker::new());
        let pipeline = Pipeline::of(config.clone(), Arc::clone(broker), gate.clone(), background.clone());
        let line = Line::new(config.clone(), Arc::clone(broker), gate, background, counters, drain);
        let run = start(pipeline, line)?;
        broker.prepare(&config.spec).await?;
        let findings = config.findings(Some(drain), &broker.facts(&config.spec).await?);
        config.refuse(&findings)?;
        check::warn(&findings);
        Ok(run)
    }
}

fn run(pipeline: Pipeline, line: Line, service: impl Inner, needs: Needs) -> Run {
    let stack = pipeline.stack(service, needs);
    Box::new(move |stopping| Box::pin(line.run(stack, stopping)))
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("config", &self.config).finish_non_exhaustive()
    }
}
