//! The settlement table as code: which answer leads to which end of a claim and of its delivery.
//!
//! Pure functions: no I/O, no clock. The layers and the consumer ask them, in the order in which a
//! delivery meets them, and so does the model of `docs/proof.md`, which walks every order of
//! claims, crashes and lost answers that they can meet. A rule of settlement is changed here or nowhere.
//!
//! | asked when | of | says |
//! |---|---|---|
//! | a claim was answered | [`admission`] | run, wait, skip, or park again |
//! | the handler is about to start | [`refusal`] | why it must not |
//! | a renewal was answered | [`renewal`] | whether the lease goes on |
//! | the handler said `Ok`, and `complete` was answered or not | [`completion`] | recorded, a gap, or lost |
//! | the handler failed | [`verdict`] | whether the attempts are spent, or the lease |
//! | a failure has no plan yet | [`redelivery`], [`parks`] | when it comes again; or that it never will |
//! | a dead letter was not confirmed | [`unparked`] | how the message stays with its source |
//! | the delivery is about to end | [`in_time`] | the plan, or that it is no longer the holder's to settle |
//! | the release before it was answered or not | [`ours_to_settle`] | the same |
//!
//! # What they promise
//!
//! 1. Only [`Claim::Done`] is skipped as a duplicate; a claim in progress elsewhere never is.
//! 2. Work that is done ends in an ack unless another holder may have taken it: `Lost` is the only
//!    answer of the store that takes it away, and a lost record does so only once the lease has ended.
//! 3. A failure is settled only by a holder whose lease is in force and whose release was taken.
//!
//! # Example
//!
//! ```
//! use guestlist::dedup::protocol::Held;
//! use guestlist::settlement::{Completion, completion, ours_to_settle};
//!
//! // The store lost the record: the work counts while the holder's own lease runs.
//! assert_eq!(completion(Some(Held::Gone), true, false), Completion::Recorded);
//! assert_eq!(completion(Some(Held::Gone), false, false), Completion::Lost);
//! // Nobody answered until the lease ended: acked all the same, and counted.
//! assert_eq!(completion(None, false, false), Completion::Gap);
//! assert!(!ours_to_settle(Some(Held::Lost)));
//! ```

use std::time::Duration;

use crate::dedup::protocol::{Before, Claim, Fence, Held, Release};
use crate::{Cause, Disposition, FailureClass, defaults};

/// How a failed delivery is going to end, written by the first layer that knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How it ends at the broker.
    pub disposition: Disposition,
    /// What the claim is released as, before that; without a claim it means nothing.
    pub release: Release,
}

impl Plan {
    /// Tried and failed: again after this backoff.
    pub const fn requeue(after: Duration) -> Self {
        Self { disposition: Disposition::Requeue { after }, release: Release::Failed { not_before: after } }
    }

    /// Not now, says the handler: again after this delay, the attempt given back.
    pub const fn defer(after: Duration) -> Self {
        Self { disposition: Disposition::Release { after }, release: Release::Deferred { not_before: after } }
    }

    /// Hand the delivery back after a delay, no attempt spent.
    pub const fn hand_back(after: Duration) -> Self {
        Self { disposition: Disposition::Release { after }, release: Release::NotStarted }
    }

    /// The consumer stops: at once to another one, and the attempt is given back while that is rare.
    pub const fn interrupted() -> Self {
        Self { disposition: Disposition::Release { after: Duration::ZERO }, release: Release::Interrupted }
    }

    /// Say nothing good to the broker.
    pub const fn abandon(release: Release) -> Self {
        Self { disposition: Disposition::Abandon, release }
    }

    /// Refused, without a destination of ours: the broker's own policy decides, and the record says parked.
    pub const fn reject() -> Self {
        Self { disposition: Disposition::Reject, release: Release::DeadLettered }
    }
}

/// A claim, as its holder sees it at the moment of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its attempt, counted already.
    pub attempt: u32,
    /// How the holder before it ended.
    pub before: Before,
    /// Its lease has neither ended by its own view nor been taken by another.
    pub in_force: bool,
}

/// What the answer to a claim lets its delivery do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Go on to the handler.
    Run {
        /// The claim's fence.
        fence: Fence,
        /// Its attempt.
        attempt: u32,
        /// How the holder before it ended.
        before: Before,
    },
    /// Wait, a bounded time, and claim again; then hand the delivery back. Never an ack.
    Wait {
        /// How long at most, unless the holder renews.
        left: Duration,
    },
    /// The same, and claim again only with the suspect permit.
    WaitForPermit,
    /// Done within the window: ack without running.
    Duplicate,
    /// With the dead letters already: so goes this copy.
    Park(Cause),
}

/// What the answer to a claim lets its delivery do.
pub const fn admission(answer: Claim) -> Admission {
    match answer {
        Claim::Acquired { fence, attempt, before, .. } => Admission::Run { fence, attempt, before },
        // The holder may yet fail, and then this is the copy that is left.
        Claim::InProgress { left, .. } => Admission::Wait { left },
        Claim::Suspect => Admission::WaitForPermit,
        Claim::Done { .. } => Admission::Duplicate,
        Claim::Parked { .. } => Admission::Park(Cause::Parked),
    }
}

/// Why a claim must not run its handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its lease has ended before the handler could start: abandoned, as not started.
    LeaseLost,
    /// The attempts were spent before this one: a dead letter of this cause.
    Spent(Cause),
}

/// Why a claim must not run its handler; `None`: it may.
pub const fn refusal(holder: Holder, max_attempts: u32) -> Option<Refusal> {
    if !holder.in_force {
        return Some(Refusal::LeaseLost);
    }
    if holder.attempt <= max_attempts {
        return None;
    }
    Some(Refusal::Spent(match holder.before {
        Before::Vanished => Cause::CrashSuspected,
        Before::First | Before::Failed | Before::HandedBack => Cause::Exhausted,
    }))
}

/// What a renewal did to the holder's view of its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// It goes on: it ends at the instant before the question + lease.
    Extended,
    /// Nothing is said: it ends when it would have ended.
    Unchanged,
    /// Another holder has it.
    Lost,
}

/// What an answer to a renewal means. `ending`: the claim is being completed or released
/// meanwhile, and `Lost` may be of our own making.
pub const fn renewal(answer: Held, ending: bool) -> Renewal {
    match answer {
        Held::Yes => Renewal::Extended,
        Held::Lost if !ending => Renewal::Lost,
        // A lost record may come back as somebody else's; until our lease ends, nobody else's can.
        Held::Lost | Held::Gone => Renewal::Unchanged,
    }
}

/// What became of a run that ended in `Ok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The id is remembered: ack.
    Recorded,
    /// The store did not answer: the work is done, and nobody knows but us. Ack, and count it.
    Gap,
    /// Somebody else has the claim: abandon.
    Lost,
}

/// What the answer to `complete` means; `None`: there was none until the lease ended.
///
/// A lease that has ended by the holder's own view does not matter to `Yes`: until somebody takes
/// the claim, the store holds it for its holder, and to give up work that is done would be to repeat it.
pub const fn completion(answer: Option<Held>, in_force: bool, lost: bool) -> Completion {
    match answer {
        Some(Held::Yes) => Completion::Recorded,
        // The store lost the record, and wrote `Done`; nobody else can have had the claim as long
        // as our own lease held.
        Some(Held::Gone) if in_force => Completion::Recorded,
        Some(Held::Gone | Held::Lost) => Completion::Lost,
        None if lost => Completion::Lost,
        // A redelivery would be sure to repeat it.
        None => Completion::Gap,
    }
}

/// What a failure of the handler comes to under its claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it was said.
    Stands,
    /// That was the last attempt: permanent now.
    Exhausted,
    /// Another holder may have the claim: abandoned.
    LeaseLost,
}

/// What a failure of the handler comes to. A failure with a plan is not an attempt to be counted out.
pub const fn verdict(class: FailureClass, planned: bool, holder: Holder, max_attempts: u32) -> Verdict {
    if !holder.in_force {
        return Verdict::LeaseLost;
    }
    match class {
        FailureClass::Transient if !planned && holder.attempt >= max_attempts => Verdict::Exhausted,
        _ => Verdict::Stands,
    }
}

/// When a failure comes again; `None`: it is permanent, and does not.
pub const fn redelivery(class: FailureClass, backoff: Duration) -> Option<Plan> {
    match class {
        FailureClass::Transient => Some(Plan::requeue(backoff)),
        FailureClass::Deferred(after) => Some(Plan::defer(after)),
        FailureClass::Permanent => None,
    }
}

/// Whether a failure goes to the dead letters. The first plan on a failure stands.
pub const fn parks(class: FailureClass, planned: bool) -> bool {
    matches!(class, FailureClass::Permanent) && !planned
}

/// How a message stays with its source when its dead letter could not be confirmed, for this
/// cause. The attempt counts if the handler ran under the claim: else it would be tried for ever.
pub const fn unparked(cause: Cause, ran: bool) -> Plan {
    match cause {
        // No later answer will differ, so it comes again when somebody may have taken it out.
        Cause::TooLarge => {
            let after = defaults::BACKOFF_CAP;
            Plan { disposition: Disposition::Requeue { after }, release: counted_if(ran, after) }
        }
        _ => Plan::abandon(counted_if(ran, Duration::ZERO)),
    }
}

const fn counted_if(ran: bool, not_before: Duration) -> Release {
    if ran { Release::Failed { not_before } } else { Release::NotStarted }
}

/// How a failure ends for which no layer planned: it is kept, and comes again.
pub const fn unplanned(class: FailureClass) -> Plan {
    match class {
        FailureClass::Transient => Plan::requeue(defaults::BACKOFF_BASE),
        FailureClass::Permanent => Plan::requeue(defaults::BACKOFF_CAP),
        FailureClass::Deferred(after) => Plan::defer(after),
    }
}

/// The plan, while its holder's lease is in force (`None`: there is no claim). Else another holder
/// may have the claim, and its delivery is not ours to settle.
pub const fn in_time(plan: Plan, in_force: Option<bool>) -> Plan {
    match in_force {
        Some(false) => Plan::abandon(plan.release),
        Some(true) | None => plan,
    }
}

/// Whether the delivery is still ours to settle as planned, by the answer to the release before
/// it (`None`: there was none until the lease ended). If not, it is abandoned.
pub const fn ours_to_settle(answer: Option<Held>) -> bool {
    match answer {
        // `Gone`: the store lost the record; the delivery may still end as planned.
        Some(Held::Yes | Held::Gone) => true,
        Some(Held::Lost) | None => false,
    }
}
