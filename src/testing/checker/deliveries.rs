//! Rules for one delivery after the other: reasons for what happened, and for the ack above all.

use super::story::{At, Delivery};
use super::{Invariant, Judge, Step};
use crate::{Cause, Disposition, EventKind, Outcome};

/// What a delivery has come to so far: where each kind of step was last seen.
#[derive(Default)]
struct Seen {
    identified: Option<At>,
    waited: Option<At>,
    claimed: Option<At>,
    started: Option<At>,
    ran: Option<At>,
    failed: Option<At>,
    completed: Option<At>,
    gap: Option<At>,
    lost: Option<At>,
    copied: Option<At>,
    duplicate: Option<At>,
    end: Option<At>,
    /// The attempt that the claim counted.
    counted: Option<u32>,
}

impl Judge<'_> {
    pub(super) fn deliveries(&mut self) {
        let story = self.story;
        for delivery in &story.deliveries {
            self.delivery(delivery);
        }
    }

    fn delivery(&mut self, delivery: &Delivery) {
        self.beginning(delivery);
        let mut seen = Seen::default();
        for at in delivery.steps.iter().copied() {
            let step = self.story.step(at);
            self.after_the_end(at, step, &seen);
            self.order(at, step, &seen);
            self.zombie(at, step, &seen);
            self.attempts(at, step, &seen);
            match step.kind {
                EventKind::Acked(outcome) => self.acked(at, step, outcome, &seen),
                EventKind::Returned(disposition) => self.returned(at, step, disposition, &seen),
                _ => {}
            }
            seen.note(at, step);
        }
    }

    fn beginning(&mut self, delivery: &Delivery) {
        let Some(first) = delivery.steps.first().copied() else { return };
        let step = self.story.step(first);
        let logged = self.settings.whole && self.story.receivers.contains(self.story.process(first));
        if logged && step.kind != EventKind::Received {
            self.broken(
                Invariant::Observable,
                step.key,
                "a delivery does not begin with its arrival",
                &[first],
            );
        }
    }

    /// The claim of a future that was dropped may end late; nothing else may happen after the end.
    fn after_the_end(&mut self, at: At, step: &Step, seen: &Seen) {
        let late = matches!(
            step.kind,
            EventKind::Released(_) | EventKind::Completed | EventKind::LeaseLost | EventKind::Forgotten
        );
        if let Some(end) = seen.end.filter(|_| !late) {
            self.broken(Invariant::Observable, step.key, "a delivery goes on after its end", &[end, at]);
        }
    }

    /// What must have come before, but for the ack.
    fn order(&mut self, at: At, step: &Step, seen: &Seen) {
        if !self.settings.whole {
            return;
        }
        let (missing, invariant, what) = match step.kind {
            EventKind::Claimed(_) | EventKind::Duplicate | EventKind::Waited => (
                seen.identified.is_none(),
                Invariant::Observable,
                "the store was asked before there was an id",
            ),
            EventKind::Ran | EventKind::Failed(_) => {
                (seen.started.is_none(), Invariant::Observable, "a handler ended that had not started")
            }
            EventKind::Completed => (
                seen.ran.is_none(),
                Invariant::FailureNeverMarks,
                "an id was marked as done, and its handler had not succeeded",
            ),
            EventKind::Gap => {
                (seen.ran.is_none(), Invariant::Observable, "a gap, and no handler had succeeded")
            }
            EventKind::Released(_) | EventKind::LeaseLost | EventKind::Forgotten => {
                (seen.claimed.is_none(), Invariant::Observable, "a claim ended that had not begun")
            }
            _ => return,
        };
        if missing {
            self.broken(invariant, step.key, what, &seen.with(at));
        }
    }

    /// A holder that has lost its lease starts nothing and parks nothing.
    fn zombie(&mut self, at: At, step: &Step, seen: &Seen) {
        let Some(lost) = seen.lost else { return };
        if step.kind == EventKind::Started {
            let what = "a handler started under a claim that was lost";
            self.broken(Invariant::OneAtATime, step.key, what, &[lost, at]);
        }
        // Lost while the copy was on its way to the broker is no zombie: the lease was looked at before.
        if let (EventKind::Copied, Some(failed)) = (step.kind, seen.failed.filter(|failed| *failed > lost)) {
            let what = "a dead letter was written under a claim that was lost before";
            self.broken(Invariant::OneAtATime, step.key, what, &[lost, failed, at]);
        }
    }

    /// Counted before the run, and bounded.
    fn attempts(&mut self, at: At, step: &Step, seen: &Seen) {
        if step.kind != EventKind::Started {
            return;
        }
        if let Some(counted) = seen.counted.filter(|counted| *counted != step.attempt) {
            let what = format!("the claim counted attempt {counted}, and attempt {} ran", step.attempt);
            self.broken(Invariant::BoundedRetry, step.key, what, &seen.with(at));
        }
        // Without a claim the number is a hint, and the last attempt may be one that the broker counted.
        let max = self.settings.max_attempts.filter(|_| step.claim.is_some());
        if let Some(max) = max.filter(|max| step.attempt > *max) {
            let what = format!("attempt {} ran, and {max} are allowed", step.attempt);
            self.broken(Invariant::BoundedRetry, step.key, what, &seen.with(at));
        }
    }

    /// One of the permitted reasons, and the one that the ack names.
    fn acked(&mut self, at: At, step: &Step, outcome: Outcome, seen: &Seen) {
        let reason = match outcome {
            Outcome::Handled => seen.completed.is_some(),
            Outcome::HandledUnrecorded => seen.gap.is_some(),
            Outcome::HandledUnchecked => seen.ran.is_some() && seen.claimed.is_none(),
            Outcome::Duplicate => seen.duplicate.is_some(),
            Outcome::DeadLettered(_) => seen.copied.is_some(),
        };
        if !reason {
            let (invariant, what) = seen.why_not_acked(outcome);
            self.broken(invariant, step.key, what, &seen.with(at));
        }
        if let Outcome::DeadLettered(cause) = outcome {
            self.dead_lettered(at, step, cause, seen);
        }
    }

    /// Not before the attempts are spent.
    fn dead_lettered(&mut self, at: At, step: &Step, cause: Cause, seen: &Seen) {
        let Some(max) = self.settings.max_attempts else { return };
        let early = match cause {
            Cause::Exhausted => step.attempt < max,
            Cause::CrashSuspected => step.attempt <= max,
            _ => false,
        };
        if early {
            let what = format!("{cause} after {} attempts, and {max} are allowed", step.attempt);
            self.broken(Invariant::BoundedRetry, step.key, what, &seen.with(at));
        }
    }

    fn returned(&mut self, at: At, step: &Step, disposition: Disposition, seen: &Seen) {
        let done = seen.completed.or(seen.gap).or(seen.copied).or(seen.duplicate);
        // A consumer that stops may cut a delivery between its end in the store and its ack.
        let cut = step.cause.is_none_or(|cause| cause == Cause::Interrupted);
        if let Some(done) = done.filter(|_| !cut) {
            self.broken(Invariant::Observable, step.key, "what is done was asked for again", &[done, at]);
        }
        let failed =
            matches!(step.cause, Some(Cause::Transient | Cause::Panic | Cause::Timeout | Cause::MaxRun))
                && matches!(disposition, Disposition::Requeue { .. });
        if let (true, Some(failed), Some(max)) = (failed, seen.failed, self.settings.max_attempts)
            && step.attempt >= max
            && seen.claimed.is_some()
        {
            let what = format!("attempt {} of {max} failed, and is tried again", step.attempt);
            self.broken(Invariant::BoundedRetry, step.key, what, &[failed, at]);
        }
    }
}

impl Seen {
    fn note(&mut self, at: At, step: &Step) {
        let place = match step.kind {
            EventKind::Identified => &mut self.identified,
            EventKind::Waited => &mut self.waited,
            EventKind::Claimed(_) => {
                self.counted = Some(step.attempt);
                &mut self.claimed
            }
            EventKind::Started => &mut self.started,
            EventKind::Ran => &mut self.ran,
            EventKind::Failed(_) => &mut self.failed,
            EventKind::Completed => &mut self.completed,
            EventKind::Gap => &mut self.gap,
            EventKind::LeaseLost => &mut self.lost,
            EventKind::Copied => &mut self.copied,
            EventKind::Duplicate => &mut self.duplicate,
            EventKind::Acked(_) | EventKind::Returned(_) | EventKind::Unsettled => &mut self.end,
            _ => return,
        };
        *place = Some(at);
    }

    /// Which promise an ack without its reason breaks.
    fn why_not_acked(&self, outcome: Outcome) -> (Invariant, &'static str) {
        let handled = !matches!(outcome, Outcome::DeadLettered(_) | Outcome::Duplicate);
        if handled && self.ran.is_some() && self.lost.is_some() {
            return (Invariant::OneAtATime, "acked by a holder that had lost its lease");
        }
        if handled && self.ran.is_some() {
            return (Invariant::CompleteBeforeAck, "acked as handled before the store remembered it");
        }
        if self.waited.is_some() && self.claimed.is_none() && self.duplicate.is_none() {
            return (Invariant::InProgressNeverAcked, "acked while another delivery had the id");
        }
        let what = match outcome {
            Outcome::Duplicate => "acked as a duplicate, and the store had not said that the id is done",
            Outcome::DeadLettered(_) => "acked as a dead letter, and no copy was confirmed",
            _ => "acked as handled, and no handler had succeeded",
        };
        (Invariant::NoLoss, what)
    }

    /// All that is known of the delivery so far, and this.
    fn with(&self, at: At) -> Vec<At> {
        let seen = [
            self.identified,
            self.waited,
            self.claimed,
            self.started,
            self.ran,
            self.failed,
            self.completed,
            self.gap,
            self.lost,
            self.copied,
            self.duplicate,
        ];
        seen.into_iter().flatten().chain([at]).collect()
    }
}
