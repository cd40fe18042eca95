//! [`DeadLetterService`].

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{sleep, sleep_until};
use tower_service::Service;

use super::layer::Oversized;
use super::past::Past;
use super::redaction::Redaction;
use crate::backoff::Backoff;
use crate::broker::copy::DeadLetter;
use crate::broker::copy::history::Noted;
use crate::broker::{Broker, BrokerError, BrokerErrorKind, Copy, Destination};
use crate::clock::from_now;
use crate::dedup::{HeldClaim, Release};
use crate::delivery::BoxFuture;
use crate::events::{EventKind, Events};
use crate::pause::{Away, Gate};
use crate::pipeline::OutsideDedup;
use crate::settlement::{self, Plan};
use crate::{BoxError, Cause, Disposition, Failure, FailureClass, Message, Outcome};

/// Middleware that parks what cannot be handled. See the [module docs](super).
#[derive(Clone)]
pub struct DeadLetterService<S> {
    inner: S,
    letterbox: Arc<Letterbox>,
}

/// Where the dead letters go, and how.
pub(super) struct Letterbox {
    pub(super) broker: Arc<dyn Broker>,
    pub(super) to: Option<Destination>,
    pub(super) pause_hold: Duration,
    pub(super) oversized: Oversized,
    pub(super) redaction: Option<Redaction>,
    pub(super) consumer: Option<String>,
    pub(super) past: Past,
    pub(super) gate: Gate,
    pub(super) events: Events,
}

impl<S> DeadLetterService<S> {
    pub(super) fn new(inner: S, letterbox: Letterbox) -> Self {
        Self { inner, letterbox: Arc::new(letterbox) }
    }
}

impl<S> fmt::Debug for DeadLetterService<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetterService").field("to", &self.letterbox.to).finish_non_exhaustive()
    }
}

impl<S> Service<Message> for DeadLetterService<S>
where
    S: Service<Message>,
    S::Response: OutsideDedup,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    type Response = Outcome;
    type Error = BoxError;
    type Future = BoxFuture<Result<Outcome, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, message: Message) -> Self::Future {
        let answer = self.inner.call(message.clone());
        let letterbox = Arc::clone(&self.letterbox);
        Box::pin(async move {
            let answer = answer.await.map(Into::into).map_err(|error| Failure::from_error(error.into()));
            match answer {
                Ok(outcome) => Ok(outcome),
                Err(failure) => letterbox.failed(message, failure).await,
            }
        })
    }
}

impl Letterbox {
    async fn failed(&self, message: Message, failure: Failure) -> Result<Outcome, BoxError> {
        let parks = settlement::parks(failure.class(), failure.plan().is_some());
        let noted = counts(&failure).then(|| self.past.note(&message, &failure, self.redaction.as_ref()));
        let handled = match noted {
            Some(noted) if parks => self.park(&message, failure, &noted).await,
            _ => Err(failure),
        };
        handled.map_err(Failure::into_error)
    }

    /// copy, confirmed and routed → release(DeadLettered) → `Ok`, and so the ack.
    async fn park(&self, message: &Message, mut failure: Failure, noted: &Noted) -> Result<Outcome, Failure> {
        let cause = failure.cause();
        let Some(to) = &self.to else {
            return Err(rejected(failure));
        };
        let record = DeadLetter::new(message, cause, &noted.error)
            .with_history(noted.history.clone())
            .with_consumer(self.consumer.as_deref());
        if let Err(cause) = self.publish(message, to, &record, &failure).await {
            return Err(kept(failure, cause));
        }
        self.events.emit(message, failure.claim().map(HeldClaim::claimant), EventKind::Copied);
        if let Some(claim) = failure.take_claim() {
            claim.release(Release::DeadLettered).await;
        }
        Ok(Outcome::DeadLettered(cause))
    }

    /// Publishes until it is confirmed, the consumer gives up, or the pause has lasted too long.
    async fn publish(
        &self,
        message: &Message,
        to: &Destination,
        record: &DeadLetter,
        failure: &Failure,
    ) -> Result<(), Cause> {
        let mut copy = Copy::dead_letter(message, record).redacted(self.redaction.as_ref());
        let cut = self.oversized == Oversized::Truncate;
        // A second of grace: with a consumer around, it cancels first, so that what is abandoned
        // does not come straight back.
        let give_up_at = from_now(self.pause_hold.saturating_add(Duration::from_secs(1)));
        let mut failures = 0;
        loop {
            if failure.claim().is_some_and(|claim| !claim.in_force()) {
                return Err(Cause::LeaseLost);
            }
            let Err(error) = self.broker.publish(to, &copy).await else {
                self.gate.open(Away::DeadLetters);
                warn_cut(to, &copy);
                return Ok(());
            };
            if error.is_too_large() {
                if copy.shrink(cut, error.kind() == BrokerErrorKind::HeadersTooLarge) {
                    continue;
                }
                warn_too_large(to, &error);
                return Err(Cause::TooLarge);
            }
            failures += 1;
            self.is_away(to, &error, failures);
            tokio::select! {
                biased;
                () = self.gate.given_up() => return Err(Cause::DeadLetterDown),
                () = sleep_until(give_up_at) => {
                    // As in dedup: nobody may be left to try.
                    self.gate.open(Away::DeadLetters);
                    return Err(Cause::DeadLetterDown);
                }
                () = sleep(Backoff::reconnect().delay(failures)) => {}
            }
        }
    }

    fn is_away(&self, to: &Destination, error: &BrokerError, failures: u32) {
        self.gate.close(Away::DeadLetters);
        tracing::warn!(
            target: "guestlist", to = to.name(), %error, failures,
            "a dead letter was not confirmed; the queue pauses and the copy is published again"
        );
    }
}

/// A failed attempt, or a message that will never be handled: not what only waits, or is handed back.
fn counts(failure: &Failure) -> bool {
    match failure.plan() {
        Some(plan) => matches!(plan.disposition, Disposition::Requeue { .. }),
        None => !matches!(failure.class(), FailureClass::Deferred(_)),
    }
}

fn warn_cut(to: &Destination, copy: &Copy<'_>) {
    if !copy.is_whole() {
        let (delivery, body) = (copy.message().delivery_number(), copy.body().len());
        tracing::warn!(
            target: "guestlist", to = to.name(), delivery, body, whole = copy.message().payload().len(),
            "a message was too large for the dead letters: only a part of it is there"
        );
    }
}

/// It is no use to wait for another answer, and others need not wait with it.
fn warn_too_large(to: &Destination, error: &BrokerError) {
    tracing::warn!(
        target: "guestlist", to = to.name(), %error,
        "a message is too large for the dead letters: it stays with its queue, and comes again until somebody takes it out"
    );
}

/// No destination of ours.
fn rejected(mut failure: Failure) -> Failure {
    failure.set_plan(Plan::reject());
    failure
}

/// The message stays with the source.
fn kept(mut failure: Failure, cause: Cause) -> Failure {
    let ran = failure.claim().is_some_and(HeldClaim::ran);
    failure.reclassify(FailureClass::Transient, cause);
    failure.set_plan(settlement::unparked(cause, ran));
    failure
}
