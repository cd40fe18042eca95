//! [`Dedup`]: one delivery's way through the claim protocol, top to bottom.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tower_service::Service;

use super::claims::{Claims, Lease, NoAnswer};
use super::layer::{Settings, StorePolicy};
use super::protocol::{Ask, Before, Digest, Run, Token};
use super::store::DedupStore;
use super::suspects::SuspectPermit;
use super::{HeldClaim, Release, RunContext};
use crate::clock::{after, from_now};
use crate::delivery::BoxFuture;
use crate::events::EventKind;
use crate::handler::caught;
use crate::identity::{self, Identified};
use crate::pipeline::InsideDedup;
use crate::settlement::{self, Admission, Completion, Plan, Refusal, Verdict};
use crate::{
    BoxError, Cause, DedupKey, Failure, FailureClass, Message, MessageId, MissingId, Outcome, Scope,
};

/// Middleware that runs each id once. See the [module docs](super).
///
/// # Clone
///
/// Clones share the store, the claims in hand, and the places to wait.
///
/// # Readiness
///
/// Ready when the inner service is and the store is not known to be away. A concurrency limit
/// belongs *inside*: a duplicate holds its slot only for the look into the store, a waiting
/// delivery none.
pub struct Dedup<S> {
    inner: S,
    door: Arc<Door>,
    /// Waits for the gate, while it is closed.
    opening: Option<BoxFuture<()>>,
}

/// What all clones of a [`Dedup`] share.
pub(super) struct Door {
    pub(super) claims: Arc<Claims>,
    pub(super) settings: Settings,
    pub(super) places: Semaphore,
    scope: Scope,
}

/// What the store said of a delivery, for the one who carries it on.
pub(super) enum Answer {
    /// Run it.
    Acquired(HeldClaim),
    /// Not now.
    Blocked(Obstacle),
    /// It is done already.
    Done,
    /// Run it without dedup, as the queue's policy says.
    Unchecked,
}

/// Why a delivery cannot run now.
#[derive(Clone, Copy, Debug)]
pub(super) enum Obstacle {
    /// Another holder, or a backoff, at most until then unless renewed.
    InProgress(Instant),
    /// It needs the suspect permit.
    Suspect,
}

impl<S> Dedup<S> {
    pub(super) fn new(inner: S, store: Arc<dyn DedupStore>, scope: Scope, settings: Settings) -> Self {
        let (gate, events) = (settings.gate.clone(), settings.events.clone());
        let pauses = settings.store_policy == StorePolicy::Pause;
        let background = settings.background.clone();
        let claims = Arc::new(Claims::new(store, settings.lengths, pauses, gate, events, background));
        let places = Semaphore::new(settings.waiters);
        Self { inner, door: Arc::new(Door { claims, settings, places, scope }), opening: None }
    }
}

impl<S: Clone> Clone for Dedup<S> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), door: Arc::clone(&self.door), opening: None }
    }
}

impl<S> fmt::Debug for Dedup<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dedup")
            .field("settings", &self.door.settings)
            .field("claims", &self.door.claims)
            .finish_non_exhaustive()
    }
}

impl<S> Service<Message> for Dedup<S>
where
    S: Service<Message> + Clone + Send + 'static,
    S::Response: InsideDedup + Send,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    type Response = Outcome;
    type Error = BoxError;
    type Future = BoxFuture<Result<Outcome, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.door.claims.start_sweeping();
        if self.opening.is_none() && self.door.settings.gate.is_closed() {
            self.opening = Some(Box::pin(self.door.settings.gate.opened()));
        }
        if let Some(opening) = &mut self.opening {
            std::task::ready!(opening.as_mut().poll(cx));
            self.opening = None;
        }
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, message: Message) -> Self::Future {
        // The clone may not be ready; the service that was polled is. Move that one.
        let clone = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, clone);
        let door = Arc::clone(&self.door);
        Box::pin(async move { door.deliver(ready, message).await.map_err(Failure::into_error) })
    }
}

impl Door {
    /// identify → claim → (wait | skip | run) → complete | fail with the claim in hand.
    async fn deliver<S>(self: Arc<Self>, ready: S, message: Message) -> Result<Outcome, Failure>
    where
        S: Service<Message> + Clone + Send,
        S::Error: Into<BoxError>,
        S::Future: Send,
    {
        let Some(key) = self.identify(&message)? else {
            return self.run_unchecked(ready, message).await;
        };
        let (answer, ready) = match self.claim(key, &message, None).await? {
            Answer::Blocked(obstacle) => self.wait_and_claim(ready, key, &message, obstacle).await?,
            answer => (answer, ready),
        };
        match answer {
            Answer::Acquired(claim) => self.run(ready, claim, message).await,
            Answer::Blocked(obstacle) => Err(self.handed_back(&message, obstacle)),
            Answer::Unchecked => self.run_unchecked(ready, message).await,
            Answer::Done => {
                self.claims.events.emit(&message, None, EventKind::Duplicate);
                Ok(Outcome::Duplicate)
            }
        }
    }

    /// The key of the message's id; none: it runs without dedup.
    fn identify(&self, message: &Message) -> Result<Option<DedupKey>, Failure> {
        // A closure of the user's meets an id that it did not expect: without this the delivery's task
        // would end, and the delivery come straight back, for ever.
        let found = catch_unwind(AssertUnwindSafe(|| self.settings.identity.find(message)));
        let id = match (found.map_err(|_| panicking_source())?, self.settings.missing_id) {
            (Some(id), _) => id,
            (None, MissingId::HashBody) => identity::body_hash(message.payload()),
            (None, MissingId::Process) => return Ok(None),
            (None, MissingId::DeadLetter) => return Err(missing_id()),
        };
        if identity::too_long(&id) {
            return Err(invalid_id(&id));
        }
        let key = self.scope.key(&id);
        let digest = self.settings.compare_bodies.then(|| digest(message));
        message.identify(Identified { id, key, digest });
        self.claims.events.emit(message, None, EventKind::Identified);
        Ok(Some(key))
    }

    /// Claims once; the permit, if there is one, makes the claimant `alone`.
    pub(super) async fn claim(
        &self,
        key: DedupKey,
        message: &Message,
        permit: Option<SuspectPermit>,
    ) -> Result<Answer, Failure> {
        let ask = self.ask(message, permit.is_some());
        let (claim, asked, permit) = match self.claims.ask(key, &ask, permit).await {
            Ok(answer) => answer,
            Err(error) => return self.without_store(error),
        };
        let same_body = conflict(ask.digest, claim.digest());
        match settlement::admission(claim) {
            Admission::Run { fence, attempt, before } => {
                let run = Run { token: ask.token, fence };
                let held = self.take(key, run, message, asked, attempt, before, permit);
                same_body.map(|()| Answer::Acquired(held))
            }
            Admission::Wait { left } => {
                same_body.map(|()| Answer::Blocked(Obstacle::InProgress(from_now(left))))
            }
            Admission::WaitForPermit => Ok(Answer::Blocked(Obstacle::Suspect)),
            Admission::Duplicate => same_body.map(|()| Answer::Done),
            Admission::Park(cause) => same_body.and(Err(parked(cause))),
        }
    }

    fn ask(&self, message: &Message, alone: bool) -> Ask {
        let lengths = &self.settings.lengths;
        Ask {
            token: Token::random(),
            lease: lengths.lease,
            retain: lengths.retain(),
            generation: message.generation(),
            digest: self.settings.compare_bodies.then(|| known_digest(message)),
            alone,
        }
    }

    fn without_store(&self, error: NoAnswer) -> Result<Answer, Failure> {
        match self.settings.store_policy {
            StorePolicy::Process => Ok(Answer::Unchecked),
            StorePolicy::Pause => {
                Err(Failure::planned(Cause::StoreDown, Plan::abandon(Release::NotStarted), error.0))
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one claim, put together once")]
    fn take(
        &self,
        key: DedupKey,
        run: Run,
        message: &Message,
        asked: Instant,
        attempt: u32,
        before: Before,
        permit: Option<SuspectPermit>,
    ) -> HeldClaim {
        message.count_attempt(attempt);
        let cancel = self.settings.cancellation.then(CancellationToken::new);
        let lease = Lease::new(key, run, message.clone(), after(asked, self.settings.lengths.lease), cancel);
        self.claims.hold(lease, attempt, before, permit)
    }

    /// Runs the handler under the claim, unless its attempts are spent or its time is over.
    async fn run<S>(&self, ready: S, mut claim: HeldClaim, message: Message) -> Result<Outcome, Failure>
    where
        S: Service<Message>,
        S::Error: Into<BoxError>,
    {
        if let Some(mut refused) = self.refuse(&claim, &message) {
            refused.hold(claim);
            return Err(refused);
        }
        claim.start();
        self.claims.events.emit(&message, Some(claim.claimant()), EventKind::Started);
        let handled = self.run_claimed(ready, &claim, message.clone()).await;
        match handled {
            Ok(()) => self.complete(claim, &message).await,
            Err(failure) => Err(self.failed(failure, claim, &message)),
        }
    }

    /// Why this claim must not run its handler.
    fn refuse(&self, claim: &HeldClaim, message: &Message) -> Option<Failure> {
        match settlement::refusal(claim.holder(), self.settings.max_attempts) {
            Some(Refusal::LeaseLost) => Some(lease_lost(Release::NotStarted)),
            Some(Refusal::Spent(cause)) => Some(spent(claim, cause)),
            None => self.expired(message),
        }
    }

    /// With or without a claim: a handler that always defers must come to an end.
    fn expired(&self, message: &Message) -> Option<Failure> {
        let since = message.timestamp().max(message.due()).max(message.redriven_at());
        let age = since.and_then(|sent| SystemTime::now().duration_since(sent).ok());
        let expired = self.settings.max_age.is_some_and(|max| age.is_some_and(|age| age > max));
        expired
            .then(|| Failure::new(FailureClass::Permanent, Cause::Expired, "older than the queue's max_age"))
    }

    async fn run_claimed<S>(&self, ready: S, claim: &HeldClaim, message: Message) -> Result<(), Failure>
    where
        S: Service<Message>,
        S::Error: Into<BoxError>,
    {
        let lease = claim.lease();
        let end = from_now(self.settings.lengths.max_run);
        lease.run_until(Some(end));
        let context = RunContext {
            fence: claim.run().fence,
            attempt: claim.attempt(),
            cancel: lease.cancel.clone(),
            lease: Arc::clone(lease),
            loan: None,
        };
        let handled = run_until(end, ready, message.for_run(context)).await;
        lease.run_until(None);
        handled
    }

    async fn complete(&self, claim: HeldClaim, message: &Message) -> Result<Outcome, Failure> {
        let claimant = Some(claim.claimant());
        let emit = |kind| self.claims.events.emit(message, claimant, kind);
        emit(EventKind::Ran);
        match claim.complete().await {
            Completion::Recorded => {
                emit(EventKind::Completed);
                Ok(Outcome::Handled)
            }
            Completion::Gap => {
                emit(EventKind::Gap);
                Ok(Outcome::HandledUnrecorded)
            }
            Completion::Lost => Err(lease_lost(FAILED)),
        }
    }

    /// The claim travels outward in the failure, still renewed; whoever ends the failure releases it.
    fn failed(&self, mut failure: Failure, mut claim: HeldClaim, message: &Message) -> Failure {
        self.claims.events.emit(message, Some(claim.claimant()), EventKind::Failed(failure.cause()));
        let (planned, max_attempts) = (failure.plan().is_some(), self.settings.max_attempts);
        match settlement::verdict(failure.class(), planned, claim.holder(), max_attempts) {
            Verdict::Stands => {}
            Verdict::Exhausted => failure.reclassify(FailureClass::Permanent, Cause::Exhausted),
            Verdict::LeaseLost => failure = lease_lost(FAILED),
        }
        let release =
            failure.plan().map_or(Release::Failed { not_before: Duration::ZERO }, |plan| plan.release);
        claim.release_on_drop(release);
        failure.hold(claim);
        failure
    }

    /// Without dedup: no id, or no store. Attempts are bounded by what copies and the broker say.
    async fn run_unchecked<S>(&self, ready: S, message: Message) -> Result<Outcome, Failure>
    where
        S: Service<Message>,
        S::Error: Into<BoxError>,
    {
        if let Some(expired) = self.expired(&message) {
            return Err(expired);
        }
        let emit = |kind| self.claims.events.emit(&message, None, kind);
        emit(EventKind::Started);
        let end = from_now(self.settings.lengths.max_run);
        let Err(failure) = run_until(end, ready, message.clone()).await else {
            emit(EventKind::Ran);
            return Ok(Outcome::HandledUnchecked);
        };
        emit(EventKind::Failed(failure.cause()));
        Err(self.exhausted_by_hints(failure, &message))
    }

    fn exhausted_by_hints(&self, mut failure: Failure, message: &Message) -> Failure {
        let spent = message.hinted_attempt() >= self.settings.max_attempts;
        if spent && failure.class() == FailureClass::Transient && failure.plan().is_none() {
            failure.reclassify(FailureClass::Permanent, Cause::Exhausted);
        }
        failure
    }

    /// The delivery goes back to the broker with a delay: somebody else's claim may yet fail.
    pub(super) fn handed_back(&self, message: &Message, obstacle: Obstacle) -> Failure {
        let left = match obstacle {
            // Part of it has been waited for here.
            Obstacle::InProgress(until) => until.saturating_duration_since(Instant::now()),
            Obstacle::Suspect => self.settings.wait(),
        };
        // Not sooner than a moment, so that a short lease elsewhere is no hot loop here. And not cut to a lease: what is
        // left of a long backoff would go round by the short hold steps only, hundreds of times. The bound is for a
        // store whose clock was set back.
        let after = left.clamp(crate::defaults::RECONNECT_BASE, self.settings.lengths.retain());
        self.claims.events.emit(message, None, EventKind::Waited);
        Failure::planned(Cause::InProgress, Plan::hand_back(after), "another holder has this id")
    }
}

/// The handler, until then; at the end its future is dropped.
async fn run_until<S>(end: Instant, mut ready: S, message: Message) -> Result<(), Failure>
where
    S: Service<Message>,
    S::Error: Into<BoxError>,
{
    match timeout_at(end, caught(move || ready.call(message))).await {
        Ok(handled) => handled?.map(drop).map_err(|error| Failure::from_error(error.into())),
        Err(_) => {
            Err(Failure::new(FailureClass::Transient, Cause::MaxRun, "the handler ran longer than max_run"))
        }
    }
}

/// Hashed once for each delivery, however often it claims.
fn known_digest(message: &Message) -> Digest {
    message.identified().and_then(|found| found.digest).unwrap_or_else(|| digest(message))
}

/// By which bodies are compared.
pub(crate) fn digest(message: &Message) -> Digest {
    let hash = blake3::hash(message.payload());
    let mut bits = [0; 16];
    bits.copy_from_slice(&hash.as_bytes()[..16]);
    Digest::from_le_bytes(bits)
}

/// The same id with another body is never a duplicate.
fn conflict(mine: Option<Digest>, on_record: Option<Digest>) -> Result<(), Failure> {
    match (mine, on_record) {
        (Some(mine), Some(theirs)) if mine != theirs => {
            let text = "this id was seen with another body";
            Err(Failure::new(FailureClass::Permanent, Cause::IdConflict, text))
        }
        _ => Ok(()),
    }
}

fn missing_id() -> Failure {
    let text = "no id: none of the queue's id sources found one";
    Failure::new(FailureClass::Permanent, Cause::MissingId, text)
}

fn panicking_source() -> Failure {
    Failure::new(FailureClass::Permanent, Cause::Panic, "an id source of the queue panicked")
}

fn invalid_id(id: &MessageId) -> Failure {
    let text = format!("the id has {} bytes, more than {}", id.as_bytes().len(), crate::defaults::MAX_ID);
    Failure::new(FailureClass::Permanent, Cause::InvalidId, text)
}

fn parked(cause: Cause) -> Failure {
    let text = "this id is with the dead letters; a redrive would run it again";
    Failure::new(FailureClass::Permanent, cause, text)
}

/// Of a run that lost its claim: another one may come at once.
const FAILED: Release = Release::Failed { not_before: Duration::ZERO };

fn lease_lost(release: Release) -> Failure {
    let text = "the claim ran out; another holder may have it";
    Failure::planned(Cause::LeaseLost, Plan::abandon(release), text)
}

/// The attempt that is one too many does not run.
fn spent(claim: &HeldClaim, cause: Cause) -> Failure {
    let attempts = claim.attempt().saturating_sub(1);
    let what = if cause == Cause::CrashSuspected { "and the last holder vanished" } else { "all of them" };
    Failure::new(FailureClass::Permanent, cause, format!("{attempts} attempts were made, {what}"))
}
