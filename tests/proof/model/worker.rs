//! One delivery's way through the stack, as a chain of steps between two things that can go
//! wrong. Every decision is asked of [`guestlist::settlement`]; what is here is their order.

use std::time::Duration;

use guestlist::dedup::Release;
use guestlist::dedup::protocol::{Claim, Held};
use guestlist::settlement::{
    Admission, Completion, Holder, Plan, Refusal, Renewal, Verdict, admission, completion, in_time,
    ours_to_settle, parks, redelivery, refusal, renewal, unparked, verdict,
};
use guestlist::{Cause, Disposition, FailureClass};

use super::bugs::Bug;
use super::setup::Setup;
use super::state::{At, BACKOFF, Call, LEASE, Reason, Request, State, Stray, Worker, token};
use super::store::Stands;
use super::story::{Flaw, Story};

/// The backoff and every other delay of the model.
pub(super) const DELAY: Duration = Duration::from_secs(BACKOFF as u64);
/// Of a run that lost its claim: another one may come at once.
const FAILED: Release = Release::Failed { not_before: Duration::ZERO };

/// How a handler ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Handled {
    Well,
    Transient,
    Permanent,
    Deferred,
}

/// A worker about to take a step.
pub(super) struct Step<'a> {
    pub(super) setup: &'a Setup,
    pub(super) state: &'a mut State,
    pub(super) number: usize,
}

impl Step<'_> {
    pub(super) fn me(&mut self) -> &mut Worker {
        &mut self.state.workers[self.number]
    }

    fn has(&self, bug: Bug) -> bool {
        self.setup.bug == Some(bug)
    }

    fn flaw(&mut self, flaw: Flaw, broken: bool) {
        self.state.flaws.add(flaw, broken);
    }

    /// A delivery arrives.
    pub(super) fn receive(&mut self, parcel: u8, key: u8, generation: u8) {
        *self.me() = Worker { parcel: Some(parcel), key, generation, ..Worker::IDLE };
        self.claim();
    }

    /// Claims, with a new token.
    pub(super) fn claim(&mut self) {
        self.state.renew_token(self.number);
        self.ask_again();
    }

    /// The lease counts from the question.
    fn ask_again(&mut self) {
        let me = self.me();
        me.view = LEASE;
        me.lost = false;
        me.at = At::Claiming(Call::Sent);
    }

    /// The store executes what was asked of it.
    pub(super) fn execute(&mut self) {
        let (token, me) = (token(self.number), *self.me());
        let request = match me.at {
            At::Claiming(_) => Request::Claim { generation: me.generation, alone: self.alone() },
            At::Completing(_) => Request::Complete,
            At::Releasing(why, ..) => Request::Release(why),
            _ => return,
        };
        match self.setup.execute(self.state, Stray { key: me.key, token, request }) {
            Answer::Claim(claim) => {
                self.me().at = At::Claiming(Call::Answered(claim));
                self.me().orphan = false;
            }
            Answer::Held(held) => self.answered(held),
        }
    }

    /// By law the permit; a worker with the bug says so without it.
    fn alone(&mut self) -> bool {
        self.me().permit
    }

    fn answered(&mut self, held: Held) {
        let row = self.state.rows[usize::from(self.me().key)];
        let done = row.is_some_and(|row| row.stands == Stands::Done);
        let me = self.me();
        match &mut me.at {
            At::Completing(call) => {
                *call = Call::Answered(held);
                me.recorded |= done && held != Held::Lost;
            }
            At::Releasing(_, _, call) => *call = Call::Answered(held),
            _ => {}
        }
    }

    /// The answer arrives.
    pub(super) fn take_answer(&mut self) {
        match self.me().at {
            At::Claiming(Call::Answered(claim)) => self.claimed(claim),
            At::Completing(Call::Answered(held)) => self.completed(Some(held)),
            At::Releasing(why, then, Call::Answered(held)) => self.released(why, then, Some(held)),
            _ => {}
        }
    }

    /// No answer in time: asked again, as long as there is a lease to end.
    pub(super) fn time_out(&mut self) {
        let in_force = self.me().in_force();
        match &mut self.me().at {
            At::Claiming(_) => self.ask_again(),
            At::Completing(call) if in_force => *call = Call::Sent,
            At::Releasing(_, _, call) if in_force => *call = Call::Sent,
            At::Completing(_) => self.completed(None),
            &mut At::Releasing(why, then, _) => self.released(why, then, None),
            _ => {}
        }
    }

    fn claimed(&mut self, answer: Claim) {
        if self.has(Bug::LeaseFromTheReply) {
            self.me().view = LEASE;
        }
        let admitted = admission(answer);
        if !matches!(admitted, Admission::Run { .. }) {
            self.me().permit = false;
        }
        match admitted {
            Admission::Run { attempt, before, .. } => {
                let me = self.me();
                (me.holds, me.before) = (true, before);
                me.attempt = u8::try_from(attempt).expect("few attempts");
                self.start_or_refuse();
            }
            Admission::Wait { .. } if self.has(Bug::AcksInProgress) => {
                self.settle(Disposition::Ack, Reason::Duplicate);
            }
            Admission::Wait { .. } => self.me().at = At::Waiting,
            Admission::WaitForPermit => self.me().at = At::WaitingForPermit,
            Admission::Duplicate => self.settle(Disposition::Ack, Reason::Duplicate),
            Admission::Park(cause) => self.park(cause),
        }
    }

    fn holder(&mut self) -> Holder {
        let me = self.me();
        Holder { attempt: u32::from(me.attempt), before: me.before, in_force: me.in_force() }
    }

    fn start_or_refuse(&mut self) {
        let holder = self.holder();
        let refused = refusal(holder, self.setup.max_attempts.into());
        let (me, story) = (*self.me(), self.story());
        self.flaw(Flaw::CountedTwice, holder.in_force && !me.orphan && me.attempt > story.takes);
        match refused {
            None => self.start(),
            Some(Refusal::LeaseLost) => self.end(Plan::abandon(Release::NotStarted)),
            Some(Refusal::Spent(cause)) => {
                let unspent = story.takes <= self.setup.max_attempts;
                self.flaw(Flaw::RedriveDoesNotRun, unspent && story.redriven == Some(me.generation));
                self.park(cause);
            }
        }
    }

    fn story(&mut self) -> Story {
        let key = self.me().key;
        self.state.story[usize::from(key)]
    }

    /// The handler starts.
    fn start(&mut self) {
        let me = self.me();
        (me.ran, me.at) = (true, At::Running);
        let me = *me;
        let story = &mut self.state.story[usize::from(me.key)];
        if story.redriven == Some(me.generation) {
            story.redriven = None;
        }
        if me.orphan {
            return;
        }
        story.starts += 1;
        let story = *story;
        self.flaw(Flaw::TooManyStarts, story.starts > story.may_start(self.setup.max_attempts));
        self.flaw(Flaw::RunInWindow, story.window > 0);
        self.flaw(Flaw::BackoffSkipped, story.quiet > 0);
    }

    /// The handler returns.
    pub(super) fn finish(&mut self, handled: Handled) {
        let key = usize::from(self.me().key);
        let class = match handled {
            Handled::Well => {
                self.state.story[key].succeeded = true;
                return self.succeed();
            }
            Handled::Transient => FailureClass::Transient,
            Handled::Permanent => FailureClass::Permanent,
            Handled::Deferred => {
                self.state.story[key].deferred += 1;
                FailureClass::Deferred(DELAY)
            }
        };
        if self.has(Bug::MarksOnFailure) {
            return self.me().at = At::Completing(Call::Sent);
        }
        self.fail(class);
    }

    fn succeed(&mut self) {
        self.me().at = At::Completing(Call::Sent);
        if self.has(Bug::AcksBeforeComplete) {
            self.settle(Disposition::Ack, Reason::Handled);
        }
    }

    fn fail(&mut self, class: FailureClass) {
        let holder = self.holder();
        let (class, cause) = match verdict(class, false, holder, self.setup.max_attempts.into()) {
            Verdict::Stands => (class, Cause::Permanent),
            Verdict::Exhausted => (FailureClass::Permanent, Cause::Exhausted),
            Verdict::LeaseLost => return self.end(Plan::abandon(FAILED)),
        };
        match redelivery(class, DELAY) {
            Some(plan) => self.end(plan),
            None if parks(class, false) => self.park(cause),
            None => unreachable!("a failure without a plan is permanent"),
        }
    }

    fn park(&mut self, cause: Cause) {
        self.me().at = At::Parking(cause);
        if self.has(Bug::AcksUnconfirmedLetter) {
            self.letter_confirmed();
        }
    }

    /// Whether the letter may be published: with the claim in force, or without a claim.
    pub(super) fn may_publish(&mut self) -> bool {
        !self.me().holds || self.me().in_force()
    }

    /// The letter is with the dead letters, and said so.
    pub(super) fn letter_confirmed(&mut self) {
        if self.me().holds {
            self.me().at = At::Releasing(Release::DeadLettered, Disposition::Ack, Call::Sent);
        } else {
            self.settle(Disposition::Ack, Reason::Parked);
        }
    }

    /// It is not, or did not say so, and the pause has lasted too long; or the lease has ended.
    pub(super) fn letter_given_up(&mut self) {
        let cause = if self.may_publish() { Cause::DeadLetterDown } else { Cause::LeaseLost };
        let ran = self.me().ran && !self.has(Bug::FailedLetterGivesBack);
        self.end(unparked(cause, ran));
    }

    /// A failure on its way to the consumer, which releases its claim and settles it.
    pub(super) fn end(&mut self, plan: Plan) {
        let me = self.me();
        let plan = in_time(plan, me.holds.then(|| me.in_force()));
        if me.holds {
            me.at = At::Releasing(plan.release, plan.disposition, Call::Sent);
        } else {
            self.settle(plan.disposition, Reason::Again);
        }
    }

    /// `None`: no answer until the lease ended.
    fn released(&mut self, why: Release, then: Disposition, answer: Option<Held>) {
        self.ended();
        // The letter is confirmed: whoever holds the claim now, the message is not lost.
        if why == Release::DeadLettered {
            self.settle(then, Reason::Parked);
        } else if ours_to_settle(answer) {
            self.flaw(Flaw::ZombieSettles, answer == Some(Held::Lost) && then != Disposition::Abandon);
            self.settle(then, Reason::Again);
        } else {
            self.settle(Disposition::Abandon, Reason::Again);
        }
    }

    /// `None`: no answer until the lease ended.
    fn completed(&mut self, mut answer: Option<Held>) {
        let (in_force, lost) = (self.me().in_force(), self.me().lost);
        let ours = answer == Some(Held::Yes) || answer == Some(Held::Gone) && in_force;
        if self.has(Bug::GoneIsLost) && answer == Some(Held::Gone) {
            answer = Some(Held::Lost);
        }
        self.ended();
        match completion(answer, in_force, lost) {
            Completion::Recorded => self.settle(Disposition::Ack, Reason::Handled),
            Completion::Gap => self.settle(Disposition::Ack, Reason::Gap),
            Completion::Lost => {
                self.flaw(Flaw::DoneWorkGivenUp, ours);
                self.settle(Disposition::Abandon, Reason::Again);
            }
        }
    }

    /// The end of the claim was answered, or never will be: the permit goes back.
    fn ended(&mut self) {
        let me = self.me();
        (me.holds, me.permit) = (false, false);
    }

    /// The delivery is about to end; one that ended before is over with its claim.
    pub(super) fn settle(&mut self, disposition: Disposition, reason: Reason) {
        if self.me().parcel.is_none() {
            return self.state.idle(self.number);
        }
        self.me().at = At::Settling(disposition, reason);
        let (me, story) = (*self.me(), self.story());
        let recorded = me.recorded || reason == Reason::Gap;
        self.flaw(Flaw::AckBeforeComplete, matches!(reason, Reason::Handled | Reason::Gap) && !recorded);
        self.flaw(Flaw::AckInProgress, reason == Reason::Duplicate && !story.succeeded);
    }

    /// A renewal is executed and answered at once.
    pub(super) fn renew(&mut self) {
        let me = *self.me();
        let asked = Stray { key: me.key, token: token(self.number), request: Request::Renew };
        let Answer::Held(held) = self.setup.execute(self.state, asked) else { return };
        match renewal(held, false) {
            Renewal::Extended => self.me().view = LEASE,
            Renewal::Lost => self.me().lost = true,
            Renewal::Unchanged => {}
        }
        self.notice();
    }

    /// The sweep notices a lease that has ended.
    pub(super) fn notice(&mut self) {
        let me = self.me();
        me.lost |= !me.in_force();
    }

    /// The delivery goes back, and what is left of the claim ends in the background: the future
    /// was dropped, or nobody waits for an answer any more.
    pub(super) fn let_go(&mut self, release: Release) {
        let me = self.me();
        me.parcel = None;
        me.view = if me.holds { me.view } else { LEASE };
        me.at = At::Releasing(release, Disposition::Abandon, Call::Sent);
    }
}

/// The store's answer.
pub(super) enum Answer {
    Claim(Claim),
    Held(Held),
}
