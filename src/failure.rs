//! Why a delivery did not end in `Ok`: [`Failure`], its [`FailureClass`] and [`Cause`].

use std::fmt;
use std::time::Duration;

use crate::BoxError;
use crate::dedup::HeldClaim;
use crate::settlement::Plan;

/// What a handler returns instead of `Ok`: how the work failed, and so what happens next.
///
/// Any error becomes a *transient* failure by `?`; say it if it is not:
///
/// ```
/// use guestlist::{Failure, FailureClass};
/// use std::time::Duration;
///
/// async fn handler(cents: &str) -> Result<(), Failure> {
///     let cents: i64 = cents.parse().map_err(Failure::permanent)?; // never going to work
///     if cents > 100_000 {
///         return Err(Failure::defer(Duration::from_secs(3600)));  // not now; no attempt is spent
///     }
///     std::fs::read("/no/such/file")?;                            // transient: tried again
///     Ok(())
/// }
/// # let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
/// # let class = |text| runtime.block_on(handler(text)).unwrap_err().class();
/// # assert_eq!(class("x"), FailureClass::Permanent);
/// # assert_eq!(class("200000"), FailureClass::Deferred(Duration::from_secs(3600)));
/// # assert_eq!(class("1"), FailureClass::Transient);
/// ```
///
/// `Failure` is not a [`std::error::Error`]; that is what allows `?` on all of them. A failure
/// that is wrapped in an `anyhow::Error` loses its class and arrives as transient: classify at
/// the handler, with `.map_err(Failure::permanent)?`.
pub struct Failure(Box<Inner>);

/// What happens next to a failed message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureClass {
    /// May work later: tried again after a backoff, until the attempts are spent; then a dead letter.
    Transient,
    /// Never going to work: a dead letter at once.
    Permanent,
    /// Not now: delivered again after this delay; the attempt is given back.
    Deferred(Duration),
}

/// The reason for an outcome: the word in dead letters, logs and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// The handler said that it may work later.
    Transient,
    /// The handler said that it never will.
    Permanent,
    /// The handler asked for another time.
    Deferred,
    /// The handler panicked. Counts as transient.
    Panic,
    /// The handler took longer than the queue's timeout. Counts as transient.
    Timeout,
    /// The handler took longer than `max_run`; its future was dropped. Counts as transient.
    MaxRun,
    /// All attempts are spent.
    Exhausted,
    /// All attempts are spent and the last holder vanished: the message may be killing its consumers.
    CrashSuspected,
    /// Older than the queue's `max_age`.
    Expired,
    /// The handler's argument could not be made of the body.
    Undecodable,
    /// No id was found, and the queue's policy is to park such messages.
    MissingId,
    /// The id is longer than [`MAX_ID`](crate::defaults::MAX_ID).
    InvalidId,
    /// The id was seen with another body.
    IdConflict,
    /// A copy of a message that is with the dead letters already.
    Parked,
    /// Another holder has the id; this delivery is handed back.
    InProgress,
    /// The claim ran out while the handler ran; somebody else may have it.
    LeaseLost,
    /// The store did not answer.
    StoreDown,
    /// The dead-letter destination did not take the copy.
    DeadLetterDown,
    /// The dead-letter destination takes no copy as large as this; the message stays with its queue.
    TooLarge,
    /// A layer shed the load (tower's `Overloaded`); not an attempt.
    Overloaded,
    /// The consumer stopped; not an attempt.
    Interrupted,
    /// The sender asked for a later time; not an attempt.
    Scheduled,
}

impl Cause {
    /// The word for headers, logs and metrics.
    ///
    /// ```
    /// assert_eq!(guestlist::Cause::CrashSuspected.name(), "crash_suspected");
    /// ```
    pub const fn name(self) -> &'static str {
        match self {
            Self::Transient => "transient",
            Self::Permanent => "permanent",
            Self::Deferred => "deferred",
            Self::Panic => "panic",
            Self::Timeout => "timeout",
            Self::MaxRun => "max_run",
            Self::Exhausted => "exhausted",
            Self::CrashSuspected => "crash_suspected",
            Self::Expired => "expired",
            Self::Undecodable => "undecodable",
            Self::MissingId => "missing_id",
            Self::InvalidId => "invalid_id",
            Self::IdConflict => "id_conflict",
            Self::Parked => "parked",
            Self::InProgress => "in_progress",
            Self::LeaseLost => "lease_lost",
            Self::StoreDown => "store_down",
            Self::DeadLetterDown => "dead_letter_down",
            Self::TooLarge => "too_large",
            Self::Overloaded => "overloaded",
            Self::Interrupted => "interrupted",
            Self::Scheduled => "scheduled",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The box that is both a [`Failure`] and, as a [`BoxError`], what the services speak: one
/// allocation, and the claim travels outward in it.
struct Inner {
    class: FailureClass,
    cause: Cause,
    /// The cause before somebody found that the attempts are spent.
    origin: Cause,
    error: BoxError,
    claim: Option<HeldClaim>,
    plan: Option<Plan>,
}

impl Failure {
    /// It may work later: tried again after a backoff.
    pub fn transient(error: impl Into<BoxError>) -> Self {
        Self::new(FailureClass::Transient, Cause::Transient, error)
    }

    /// It never will: a dead letter.
    pub fn permanent(error: impl Into<BoxError>) -> Self {
        Self::new(FailureClass::Permanent, Cause::Permanent, error)
    }

    /// Not now: again after `after`; no attempt is spent, and those counted before stay counted, however long it is: the
    /// record is kept from the end of the delay. Only a NATS bucket limits it: what is deferred for longer than the bucket keeps
    /// records, less an hour, comes early, to be deferred again. Without a `max_age` on the queue, a handler that always
    /// defers goes on for ever.
    pub fn defer(after: Duration) -> Self {
        Self::new(FailureClass::Deferred(after), Cause::Deferred, "deferred by the handler")
    }

    pub(crate) fn new(class: FailureClass, cause: Cause, error: impl Into<BoxError>) -> Self {
        Self(Box::new(Inner { class, cause, origin: cause, error: error.into(), claim: None, plan: None }))
    }

    /// A failure that is nobody's fault and goes a fixed way.
    pub(crate) fn planned(cause: Cause, plan: Plan, why: impl Into<BoxError>) -> Self {
        let mut failure = Self::new(FailureClass::Transient, cause, why);
        failure.0.plan = Some(plan);
        failure
    }

    /// What happens next.
    pub fn class(&self) -> FailureClass {
        self.0.class
    }

    /// The reason.
    pub fn cause(&self) -> Cause {
        self.0.cause
    }

    /// The reason at first: the handler's, where the attempts turned out to be spent.
    pub(crate) fn origin(&self) -> Cause {
        self.0.origin
    }

    /// The error behind it.
    pub fn error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        &*self.0.error
    }

    /// The failure as a boxed error, for a service. [`from_error`](Self::from_error) undoes it
    /// at no cost.
    pub fn into_error(self) -> BoxError {
        self.0
    }

    /// The failure in a boxed error. Errors of strangers are transient; tower's `Elapsed` is a
    /// timeout; its `Overloaded` is not an attempt.
    pub fn from_error(error: BoxError) -> Self {
        let error = match error.downcast::<Inner>() {
            Ok(inner) => return Self(inner),
            Err(error) => error,
        };
        if error.is::<tower::timeout::error::Elapsed>() {
            Self::new(FailureClass::Transient, Cause::Timeout, error)
        } else if error.is::<tower::load_shed::error::Overloaded>() {
            Self::planned(Cause::Overloaded, Plan::hand_back(crate::defaults::RECONNECT_BASE), error)
        } else {
            Self::new(FailureClass::Transient, Cause::Transient, error)
        }
    }

    /// The same failure, of another class and cause: the attempts are spent.
    pub(crate) fn reclassify(&mut self, class: FailureClass, cause: Cause) {
        self.0.class = class;
        self.0.cause = cause;
    }

    pub(crate) fn hold(&mut self, claim: HeldClaim) {
        self.0.claim = Some(claim);
    }

    pub(crate) fn claim(&self) -> Option<&HeldClaim> {
        self.0.claim.as_ref()
    }

    pub(crate) fn take_claim(&mut self) -> Option<HeldClaim> {
        self.0.claim.take()
    }

    pub(crate) fn plan(&self) -> Option<Plan> {
        self.0.plan
    }

    /// Writes the plan, and tells the claim, so that a failure that is dropped is released as planned.
    pub(crate) fn set_plan(&mut self, plan: Plan) {
        self.0.plan = Some(plan);
        if let Some(claim) = &mut self.0.claim {
            claim.release_on_drop(plan.release);
        }
    }

    /// The chain of errors in one line, unescaped.
    pub fn chain(&self) -> String {
        let mut text = self.0.error.to_string();
        let mut source = self.0.error.source();
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        text
    }
}

impl<E: Into<BoxError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::from_error(error.into())
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({}): {}", self.0.class, self.0.cause, self.0.error)
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({}): {}", self.class, self.cause, self.error)
    }
}

impl fmt::Display for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.cause, self.error)
    }
}

impl std::error::Error for Inner {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}
