//! The steps that can be taken, and what each does.

use std::time::Duration;

use guestlist::dedup::Release;
use guestlist::settlement::Plan;
use guestlist::{Cause, Disposition};

use super::bugs::Bug;
use super::setup::{Broker, Fault, Setup};
use super::state::{
    At, BACKOFF, Call, LEASE, NOBODY, Parcel, Place, Reason, Request, STRANGER, State, Stray, Worker, token,
};
use super::store::{Row, Stands};
use super::worker::{DELAY, Handled, Step};

/// How often a handler defers.
const DEFERRALS: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The broker hands a message to a worker, which claims.
    Deliver {
        parcel: u8,
        worker: usize,
    },
    /// The store executes the worker's request.
    Execute(usize),
    /// The worker takes the store's answer, and goes on to the next thing that can go wrong.
    Answer(usize),
    Finish(usize, Handled),
    Renew(usize),
    /// A waiter claims again.
    ClaimAgain(usize),
    /// A waiter claims again, with the suspect permit.
    ClaimAlone(usize),
    /// A waiter gives the delivery back, with a delay.
    HandBack(usize),
    /// The dead letter is published and confirmed; or the lease is seen to have ended.
    Publish(usize),
    Settle(usize),
    /// `JetStream`: nobody extends the delivery any more, and its time is over.
    AckWaitOver(u8),
    /// An operator sends the letter back to work.
    Redrive(usize),
    StrayArrives,
    LetterArrives,
    Tick,
    Crash(u8),
    Disconnect(u8),
    Redeliver(u8),
    NoAnswer(usize),
    LateCall(usize),
    RenewalUnanswered(usize),
    RenewalLate(usize),
    GiveUp(usize),
    Interrupt(usize),
    LetterRefused(usize),
    LetterLate(usize),
    CopyUnconfirmed(usize),
    AckLost(usize),
    RecordLost(usize),
    /// A tick in which a lease ends while its worker is at work.
    Pause,
}

impl Setup {
    pub(super) fn workers(&self) -> std::ops::Range<usize> {
        0..self.processes.len()
    }

    pub(super) fn enabled(&self, state: &State, actions: &mut Vec<Action>) {
        self.deliveries(state, actions);
        for worker in self.workers() {
            self.steps_of(state, worker, actions);
        }
        self.steps_of_the_world(state, actions);
        if state.faults > 0 {
            self.faults(state, actions);
        }
    }

    /// Of idle workers that differ in nothing, one is enough.
    pub(super) fn deliveries(&self, state: &State, actions: &mut Vec<Action>) {
        let mut last = None;
        for (parcel, ready) in state.parcels().filter(|(_, parcel)| parcel.place == Place::Ready) {
            if last == Some(ready) {
                continue;
            }
            last = Some(ready);
            for process in 0..2 {
                let idle = |worker: &usize| {
                    self.processes[*worker] == process && state.workers[*worker].at == At::Idle
                };
                let worker = self.workers().find(idle);
                actions.extend(worker.map(|worker| Action::Deliver { parcel, worker }));
            }
        }
    }

    fn steps_of(&self, state: &State, number: usize, actions: &mut Vec<Action>) {
        let worker = state.workers[number];
        match worker.at {
            At::Idle => {}
            At::Claiming(Call::Sent) | At::Completing(Call::Sent) | At::Releasing(_, _, Call::Sent) => {
                actions.push(Action::Execute(number));
            }
            At::Claiming(_) | At::Completing(_) | At::Releasing(..) => actions.push(Action::Answer(number)),
            At::Waiting => actions.extend([Action::ClaimAgain(number), Action::HandBack(number)]),
            At::WaitingForPermit => {
                if self.permit_is_free(state, number) {
                    actions.push(Action::ClaimAlone(number));
                }
                actions.push(Action::HandBack(number));
            }
            At::Running => {
                // A handler that always defers goes on for ever, as the docs say.
                let defers = state.story[usize::from(worker.key)].deferred < DEFERRALS;
                let ends = self.handled.iter().filter(|ends| defers || **ends != Handled::Deferred);
                actions.extend(ends.map(|handled| Action::Finish(number, *handled)));
            }
            At::Parking(_) => actions.push(Action::Publish(number)),
            At::Settling(..) | At::Copied => actions.push(Action::Settle(number)),
        }
        if is_renewed(&worker) {
            actions.push(Action::Renew(number));
        }
    }

    pub(super) fn permit_is_free(&self, state: &State, number: usize) -> bool {
        let mine = self.processes[number];
        self.bug == Some(Bug::SuspectsTogether)
            || !self.workers().any(|other| self.processes[other] == mine && state.workers[other].permit)
    }

    fn steps_of_the_world(&self, state: &State, actions: &mut Vec<Action>) {
        actions.extend(state.stray.map(|_| Action::StrayArrives));
        actions.extend(state.late_letter.map(|_| Action::LetterArrives));
        let stranded = state.parcels().filter(|(at, parcel)| is_stranded(state, *at, *parcel));
        actions.extend(stranded.map(|(at, _)| Action::AckWaitOver(at)));
        if state.redrives > 0 {
            let letters = (0..usize::from(self.keys)).filter(|key| state.letters[*key].is_some());
            actions.extend(letters.map(Action::Redrive));
        }
        if !is_pause(state) {
            actions.push(Action::Tick);
        }
    }

    fn can(&self, fault: Fault) -> bool {
        self.kinds.contains(&fault)
    }

    fn faults(&self, state: &State, actions: &mut Vec<Action>) {
        for process in 0..2 {
            let mut workers = self.workers().filter(|worker| self.processes[*worker] == process);
            if !workers.any(|worker| state.workers[worker].at != At::Idle) {
                continue;
            }
            if self.can(Fault::Crash) {
                actions.push(Action::Crash(process));
            }
            if self.can(Fault::Redelivery) && self.broker == Broker::Amqp {
                actions.push(Action::Disconnect(process));
            }
        }
        if self.can(Fault::Redelivery) && self.broker == Broker::JetStream {
            let out = state
                .parcels()
                .filter(|(at, parcel)| parcel.place == Place::Out && !is_stranded(state, *at, *parcel));
            actions.extend(out.map(|(at, _)| Action::Redeliver(at)));
        }
        for worker in self.workers() {
            self.faults_of(state, worker, actions);
        }
        if self.can(Fault::Pause) && is_pause(state) {
            actions.push(Action::Pause);
        }
        if self.can(Fault::RecordLost) {
            let rows = (0..usize::from(self.keys)).filter(|key| state.rows[*key].is_some());
            actions.extend(rows.map(Action::RecordLost));
        }
    }

    fn faults_of(&self, state: &State, number: usize, actions: &mut Vec<Action>) {
        let worker = state.workers[number];
        let mut may = |fault, action| {
            if self.can(fault) {
                actions.push(action);
            }
        };
        match worker.at {
            At::Claiming(call) => {
                may(Fault::NoAnswer, Action::NoAnswer(number));
                may(Fault::GivenUp, Action::GiveUp(number));
                may(Fault::Interruption, Action::Interrupt(number));
                if call == Call::Sent && state.stray.is_none() {
                    may(Fault::LateCall, Action::LateCall(number));
                }
            }
            At::Completing(Call::Sent) | At::Releasing(_, _, Call::Sent) if state.stray.is_none() => {
                may(Fault::NoAnswer, Action::NoAnswer(number));
                may(Fault::LateCall, Action::LateCall(number));
            }
            At::Completing(_) | At::Releasing(..) => may(Fault::NoAnswer, Action::NoAnswer(number)),
            At::Parking(_) if worker.holds == worker.in_force() => {
                may(Fault::LetterRefused, Action::LetterRefused(number));
                if state.late_letter.is_none() {
                    may(Fault::LateLetter, Action::LetterLate(number));
                }
            }
            At::Settling(Disposition::Ack, _) | At::Copied => may(Fault::AckLost, Action::AckLost(number)),
            At::Settling(disposition, _) if self.copies_for(disposition).is_some() => {
                may(Fault::CopyUnconfirmed, Action::CopyUnconfirmed(number));
            }
            _ => {}
        }
        let interruptible = matches!(
            worker.at,
            At::Waiting | At::WaitingForPermit | At::Running | At::Completing(_) | At::Parking(_)
        ) || matches!(worker.at, At::Releasing(Release::DeadLettered, ..));
        if interruptible && worker.parcel.is_some() {
            may(Fault::Interruption, Action::Interrupt(number));
        }
        if is_renewed(&worker) {
            may(Fault::RenewalUnanswered, Action::RenewalUnanswered(number));
            if state.stray.is_none() {
                may(Fault::LateCall, Action::RenewalLate(number));
            }
        }
    }

    /// AMQP: the delay of a copy, where a delivery ends in one.
    fn copies_for(&self, disposition: Disposition) -> Option<Duration> {
        match disposition {
            Disposition::Requeue { after } | Disposition::Release { after }
                if self.broker == Broker::Amqp && !after.is_zero() =>
            {
                Some(after)
            }
            _ => None,
        }
    }

    pub(super) fn after(&self, last: &State, action: Action) -> State {
        let mut state = *last;
        self.act(&mut state, action);
        if !matches!(state.stray, Some(Stray { token: STRANGER, .. })) {
            state.rename(STRANGER, NOBODY);
        }
        for worker in &mut state.workers {
            worker.forget_what_is_over();
        }
        state.sort_parcels();
        state
    }

    fn act(&self, state: &mut State, action: Action) {
        match action {
            Action::Deliver { parcel, worker } => {
                let Some(Parcel { key, generation, .. }) = state.parcels[usize::from(parcel)] else { return };
                state.place(parcel, Place::Out);
                self.step(state, worker).receive(parcel, key, generation);
            }
            Action::Execute(worker) => self.step(state, worker).execute(),
            Action::Answer(worker) => self.step(state, worker).take_answer(),
            Action::Finish(worker, handled) => self.step(state, worker).finish(handled),
            Action::Renew(worker) => self.step(state, worker).renew(),
            Action::ClaimAgain(worker) => self.step(state, worker).claim(),
            Action::ClaimAlone(worker) => {
                state.workers[worker].permit = true;
                self.step(state, worker).claim();
            }
            Action::HandBack(worker) => {
                let plan = Plan::hand_back(DELAY);
                self.step(state, worker).settle(plan.disposition, Reason::Again);
            }
            Action::Publish(worker) => self.publish(state, worker),
            Action::Settle(worker) => self.settle(state, worker),
            Action::AckWaitOver(parcel) => state.place(parcel, Place::Ready),
            Action::Redrive(key) => redrive(state, key),
            Action::StrayArrives => {
                if let Some(stray) = state.stray.take() {
                    self.execute(state, stray);
                }
            }
            Action::LetterArrives => {
                if let Some((key, generation)) = state.late_letter.take() {
                    arrive(state, key, generation);
                }
            }
            Action::Tick => tick(state),
            fault => {
                state.faults -= 1;
                self.go_wrong(state, fault);
            }
        }
    }

    fn go_wrong(&self, state: &mut State, fault: Action) {
        match fault {
            Action::Crash(process) => self.crash(state, process),
            Action::Disconnect(process) => self.disconnect(state, process),
            Action::Redeliver(parcel) => state.place(parcel, Place::Ready),
            Action::NoAnswer(worker) => self.step(state, worker).time_out(),
            Action::LateCall(worker) => {
                state.stray = Some(stray(&state.workers[worker], worker));
                self.step(state, worker).time_out();
            }
            Action::RenewalUnanswered(worker) => {
                let me = state.workers[worker];
                self.execute(state, Stray { key: me.key, token: token(worker), request: Request::Renew });
                self.step(state, worker).notice();
            }
            Action::RenewalLate(worker) => {
                let me = state.workers[worker];
                state.stray = Some(Stray { key: me.key, token: token(worker), request: Request::Renew });
                self.step(state, worker).notice();
            }
            Action::GiveUp(worker) => {
                self.give_back(state, worker, Disposition::Abandon);
                self.step(state, worker).let_go(Release::NotStarted);
            }
            Action::Interrupt(worker) => self.interrupt(state, worker),
            Action::LetterRefused(worker) => self.step(state, worker).letter_given_up(),
            Action::LetterLate(worker) => {
                let me = state.workers[worker];
                state.late_letter = Some((me.key, me.generation));
                self.step(state, worker).letter_given_up();
            }
            Action::CopyUnconfirmed(worker) => state.copy(worker),
            Action::AckLost(worker) => self.give_back(state, worker, Disposition::Abandon),
            Action::RecordLost(key) => lose_record(state, key),
            Action::Pause => tick(state),
            _ => unreachable!("not a fault: {fault:?}"),
        }
        if let Action::AckLost(worker) = fault {
            state.idle(worker);
        }
    }

    pub(super) fn step<'a>(&'a self, state: &'a mut State, number: usize) -> Step<'a> {
        Step { setup: self, state, number }
    }

    fn publish(&self, state: &mut State, worker: usize) {
        let me = state.workers[worker];
        if !self.step(state, worker).may_publish() {
            return self.step(state, worker).letter_given_up();
        }
        arrive(state, me.key, me.generation);
        self.step(state, worker).letter_confirmed();
    }

    fn settle(&self, state: &mut State, worker: usize) {
        let disposition = match state.workers[worker].at {
            At::Settling(disposition, _) => disposition,
            _ => Disposition::Ack,
        };
        if state.workers[worker].parcel.is_some() && self.copies_for(disposition).is_some() {
            state.copy(worker);
            state.workers[worker].at = At::Copied;
            return;
        }
        self.give_back(state, worker, disposition);
        state.idle(worker);
    }

    /// What the broker does with the end of a delivery.
    fn give_back(&self, state: &mut State, worker: usize, disposition: Disposition) {
        let Some(parcel) = state.workers[worker].parcel else { return };
        match disposition {
            Disposition::Ack | Disposition::Reject => return state.remove(parcel),
            Disposition::Requeue { after } | Disposition::Release { after } if !after.is_zero() => {
                state.place(parcel, Place::Delayed(BACKOFF));
            }
            // Silence on JetStream.
            Disposition::Abandon if self.broker == Broker::JetStream => {}
            _ => state.place(parcel, Place::Ready),
        }
        state.workers[worker].parcel = None;
    }

    fn crash(&self, state: &mut State, process: u8) {
        for worker in self.workers().filter(|worker| self.processes[*worker] == process) {
            if state.workers[worker].at != At::Idle {
                self.give_back(state, worker, Disposition::Abandon);
                state.idle(worker);
            }
        }
    }

    /// AMQP: what was out is delivered again; the ackers are dead, the handlers are not.
    fn disconnect(&self, state: &mut State, process: u8) {
        for worker in self.workers().filter(|worker| self.processes[*worker] == process) {
            self.give_back(state, worker, Disposition::Abandon);
            if matches!(state.workers[worker].at, At::Settling(..) | At::Copied) {
                state.idle(worker);
            }
        }
    }

    /// The worker's future is dropped; its delivery goes back at once, and its claim ends in the background.
    fn interrupt(&self, state: &mut State, worker: usize) {
        self.give_back(state, worker, Plan::interrupted().disposition);
        let me = state.workers[worker];
        match me.at {
            At::Claiming(_) => self.step(state, worker).let_go(Release::NotStarted),
            At::Running => {
                state.story[usize::from(me.key)].interrupted += 1;
                self.step(state, worker).let_go(Plan::interrupted().release);
            }
            At::Parking(_) if me.holds && me.ran => {
                self.step(state, worker).let_go(Release::Failed { not_before: Duration::ZERO });
            }
            At::Parking(_) if me.holds => self.step(state, worker).let_go(Release::NotStarted),
            // Goes on to its end, without a delivery.
            At::Completing(_) | At::Releasing(..) => {}
            _ => state.idle(worker),
        }
    }
}

/// The claim is in the sweep.
fn is_renewed(worker: &Worker) -> bool {
    worker.holds && !worker.lost && worker.view < LEASE && matches!(worker.at, At::Running | At::Parking(_))
}

/// Time goes by while the workers work, but none of them is so slow that its lease ends.
fn is_pause(state: &State) -> bool {
    state.workers.iter().any(|worker| worker.view == 1)
}

/// `JetStream`: nobody is there to extend it, or who is has forsaken it.
fn is_stranded(state: &State, at: u8, parcel: Parcel) -> bool {
    let kept = |worker: &Worker| worker.parcel == Some(at) && !worker.lost;
    parcel.place == Place::Out && !state.workers.iter().any(kept)
}

fn stray(worker: &Worker, number: usize) -> Stray {
    let request = match worker.at {
        At::Claiming(_) => Request::Claim { generation: worker.generation, alone: worker.permit },
        At::Releasing(why, ..) => Request::Release(why),
        _ => Request::Complete,
    };
    Stray { key: worker.key, token: token(number), request }
}

fn arrive(state: &mut State, key: u8, generation: u8) {
    let letter = &mut state.letters[usize::from(key)];
    *letter = (*letter).max(Some(generation));
}

/// One above the record's generation, or the letter's if there is no record.
fn redrive(state: &mut State, key: usize) {
    let Some(letter) = state.letters[key].take() else { return };
    let generation = state.rows[key].map_or(letter, |row| row.generation) + 1;
    state.redrives -= 1;
    let done = state.rows[key].is_some_and(|row| row.stands == Stands::Done);
    state.story[key].redriven = (!done).then_some(generation);
    state.put(Parcel { key: u8::try_from(key).unwrap_or(u8::MAX), generation, place: Place::Ready });
}

fn lose_record(state: &mut State, key: usize) {
    state.rows[key] = None;
    state.story[key].forgotten();
    for worker in state.workers.iter_mut().filter(|worker| usize::from(worker.key) == key) {
        worker.orphan = worker.holds || matches!(worker.at, At::Claiming(Call::Answered(_)));
    }
}

fn tick(state: &mut State) {
    for key in 0..state.rows.len() {
        let kept = state.rows[key].and_then(Row::tick);
        if kept.is_none() && state.rows[key].is_some() {
            lose_record(state, key);
        }
        state.rows[key] = kept;
        state.story[key].tick();
    }
    for worker in &mut state.workers {
        worker.view = worker.view.saturating_sub(1);
    }
    for parcel in state.parcels.iter_mut().flatten() {
        parcel.place = match parcel.place {
            Place::Delayed(1) => Place::Ready,
            Place::Delayed(left) => Place::Delayed(left - 1),
            place => place,
        };
    }
}

/// Whether the message is with the dead letters for a suspected crash, for a look from outside.
pub(super) fn is_parking_a_crash(worker: &Worker) -> bool {
    worker.at == At::Parking(Cause::CrashSuspected)
}
