//! Progress, as a property of each state by itself: from here on nothing goes wrong and nobody is
//! starved. Then every message must be done with, in bounded time.
//!
//! `eventually` of the checker is not used: it does not see a path that ends in a cycle, and this
//! model has cycles (a waiter that claims again and again).

use super::setup::Setup;
use super::state::{At, Call, Place, State};
use super::step::Action;
use super::worker::Handled;

/// More steps than any such schedule needs.
const STEPS: usize = 600;

impl Setup {
    /// From this state on, with handlers that succeed, every message is done with, within a lease, a
    /// backoff and the delay of a hand-back; with handlers that fail, it ends with the dead letters.
    pub(super) fn makes_progress(&self, state: &State) -> bool {
        let succeeding = self.settles(state, Handled::Well);
        let failing = || self.settles(state, Handled::Transient);
        succeeding.is_some_and(|ticks| ticks <= Self::SLACK) && failing().is_some()
    }

    /// How many ticks it takes until the broker is empty and all workers are idle; `None`: it does not
    /// happen.
    pub(super) fn settles(&self, state: &State, handled: Handled) -> Option<u8> {
        let (mut state, mut ticks) = (*state, 0);
        for _ in 0..STEPS {
            if self.is_settled(&state) {
                return Some(ticks);
            }
            let action = self.fair(&state, handled);
            ticks += u8::from(action == Action::Tick);
            state = self.after(&state, action);
        }
        None
    }

    fn is_settled(&self, state: &State) -> bool {
        state.parcels().next().is_none() && self.workers().all(|worker| state.workers[worker].at == At::Idle)
    }

    /// What is due: whatever can be done, before time goes on.
    fn fair(&self, state: &State, handled: Handled) -> Action {
        if state.stray.is_some() {
            return Action::StrayArrives;
        }
        let step = self.workers().find_map(|worker| self.due(state, worker, handled));
        step.or_else(|| self.arriving(state)).unwrap_or(Action::Tick)
    }

    fn due(&self, state: &State, number: usize, handled: Handled) -> Option<Action> {
        let worker = state.workers[number];
        match worker.at {
            At::Claiming(Call::Sent) | At::Completing(Call::Sent) | At::Releasing(_, _, Call::Sent) => {
                Some(Action::Execute(number))
            }
            At::Claiming(_) | At::Completing(_) | At::Releasing(..) => Some(Action::Answer(number)),
            At::Waiting => {
                let free = self.store().free(state.rows[usize::from(worker.key)]);
                free.then_some(Action::ClaimAgain(number))
            }
            At::WaitingForPermit => self.permit_is_free(state, number).then_some(Action::ClaimAlone(number)),
            At::Running => Some(Action::Finish(number, handled)),
            At::Parking(_) => Some(Action::Publish(number)),
            At::Settling(..) | At::Copied => Some(Action::Settle(number)),
            At::Idle => None,
        }
    }

    fn arriving(&self, state: &State) -> Option<Action> {
        let mut actions = Vec::new();
        self.deliveries(state, &mut actions);
        let stranded = || {
            let out = state.parcels().find(|(at, parcel)| {
                let kept = state.workers.iter().any(|worker| worker.parcel == Some(*at) && !worker.lost);
                parcel.place == Place::Out && !kept
            });
            out.map(|(at, _)| Action::AckWaitOver(at))
        };
        actions.first().copied().or_else(stranded)
    }
}
