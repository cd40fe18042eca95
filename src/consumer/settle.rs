//! The one place where a delivery ends.

use std::fmt;

use super::status::Counters;
use crate::broker::copy::escape;
use crate::dedup::HeldClaim;
use crate::events::{EventKind, Events};
use crate::settlement::{self, Plan};
use crate::{Acker, BoxError, Cause, Disposition, Failure, Message, Outcome, defaults};

/// What becomes of a delivery whose stack answered so: `Ok` is done, and acked; a failure ends as the
/// layers planned. A failure that no layer planned for is kept: it comes again.
///
/// ```
/// use guestlist::{Disposition, Failure, Outcome, disposition};
/// assert_eq!(disposition(&Ok(Outcome::Duplicate)), Disposition::Ack);
/// assert!(matches!(disposition(&Err(Failure::transient("no"))), Disposition::Requeue { .. }));
/// ```
pub fn disposition(answer: &Result<Outcome, Failure>) -> Disposition {
    match answer {
        // `Ok` means done, whatever it holds: the id is remembered, or the dead letter confirmed.
        Ok(_) => Disposition::Ack,
        Err(failure) => plan(failure).disposition,
    }
}

/// How a failure ends. Without dead letters and redelivery around the stack, nothing is lost either.
fn plan(failure: &Failure) -> Plan {
    let planned = failure.plan().unwrap_or_else(|| settlement::unplanned(failure.class()));
    settlement::in_time(planned, failure.claim().map(HeldClaim::in_force))
}

impl Acker {
    /// Ends a delivery as its stack answered: releases the claim as planned, *then* settles.
    /// [`Consumer`](crate::Consumer) does this; it is here for loops of your own.
    ///
    /// # Errors
    ///
    /// The broker could not be told: expect the delivery again. The handler's own failure is not
    /// an error here; it has become the disposition.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe. Dropped before it ends, the release goes on in the background, and the
    /// delivery is abandoned or settled, never twice.
    pub async fn conclude(
        self,
        answer: Result<Outcome, BoxError>,
    ) -> Result<Disposition, crate::broker::BrokerError> {
        let mut answer = answer.map_err(Failure::from_error);
        let planned = disposition(&answer);
        let disposition = if release(&mut answer).await { planned } else { Disposition::Abandon };
        self.settle(disposition).await.map(|()| disposition)
    }
}

/// The claim ends before the delivery does, so that the backoff holds over a crash in between.
/// Says whether the delivery is still ours to settle: with the claim in other hands, it is not.
async fn release(answer: &mut Result<Outcome, Failure>) -> bool {
    let Err(failure) = answer else { return true };
    let release = plan(failure).release;
    match failure.take_claim() {
        Some(claim) => claim.release(release).await,
        None => true,
    }
}

/// Ends a delivery of the consumer's, and says so to the log and the counters.
pub(super) async fn conclude(
    events: &Events,
    counters: &Counters,
    message: &Message,
    acker: Acker,
    answer: Result<Outcome, BoxError>,
) {
    let answer = answer.map_err(Failure::from_error);
    report(message, &answer);
    counters.count(&answer);
    let outcome = answer.as_ref().ok().copied();
    let cause = answer.as_ref().err().map(Failure::cause);
    let told = acker.conclude(answer.map_err(Failure::into_error)).await;
    let kind = match (&told, outcome) {
        (Err(_), _) => EventKind::Unsettled,
        (Ok(_), Some(outcome)) => EventKind::Acked(outcome),
        (Ok(disposition), None) => EventKind::Returned(*disposition),
    };
    events.emit_because(message, cause, kind);
    if let Err(error) = told {
        counters.unsettled();
        tracing::warn!(target: "guestlist", delivery = message.delivery_number(), ?error, "the broker could not be told how a delivery ended; it comes again");
    }
}

/// Failures of handlers are for somebody to read; the rest is in the counters and the events.
fn report(message: &Message, answer: &Result<Outcome, Failure>) {
    let delivery = message.delivery_number();
    match answer {
        Err(failure) if matches!(failure.cause(), Cause::InProgress | Cause::Scheduled) => {}
        Err(failure) => {
            // What the dead letters may not show, the log may not either.
            let noted = message.noted().map(|noted| noted.error.clone());
            let error = noted.unwrap_or_else(|| escape(&failure.chain(), defaults::ERROR_TEXT));
            tracing::warn!(target: "guestlist", delivery, attempt = message.attempt(), cause = failure.cause().name(), error, "a delivery failed; it comes again");
        }
        Ok(Outcome::DeadLettered(cause)) => {
            tracing::warn!(target: "guestlist", delivery, attempt = message.attempt(), cause = cause.name(), "a message is with the dead letters");
        }
        Ok(Outcome::HandledUnrecorded) => {
            tracing::warn!(target: "guestlist", delivery, "dedup gap: a message was handled and the store did not confirm it; a copy would run again");
        }
        Ok(_) => {}
    }
}

/// The consumer stops, or lets go: not the message's fault.
pub(super) struct Interrupted;

impl From<Interrupted> for BoxError {
    fn from(_: Interrupted) -> Self {
        Failure::planned(Cause::Interrupted, Plan::interrupted(), "the consumer stopped").into_error()
    }
}

impl fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Interrupted")
    }
}
