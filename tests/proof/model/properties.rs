//! The promises, as the checker asks for them.

use guestlist::dedup::protocol::Held;
use stateright::{Model, Property};

use super::setup::Setup;
use super::state::{At, Call, Reason, State};
use super::step::{Action, is_parking_a_crash};
use super::store::Stands;
use super::story::Flaw;

impl Model for Setup {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.initial()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.enabled(state, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let next = self.after(last, action);
        (next != *last).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = promises();
        properties.extend(landmarks());
        properties
    }
}

/// Whether the property is a promise; if not, it is a landmark.
pub(super) fn is_promise(name: &str) -> bool {
    promises().iter().any(|promise| promise.name == name)
}

fn promises() -> Vec<Property<Setup>> {
    let always = Property::<Setup>::always;
    vec![
        always("I1 nothing is lost", Setup::nothing_lost),
        always("I2 one at a time", Setup::one_at_a_time),
        always("I2 a zombie changes nothing", |_, state| !state.flaws.has(Flaw::ZombieChanges)),
        always("I2 a zombie settles nothing", |_, state| !state.flaws.has(Flaw::ZombieSettles)),
        always("I3 no run within the window", |_, state| !state.flaws.has(Flaw::RunInWindow)),
        always("I4 a failure never marks", |setup, state| {
            (0..usize::from(setup.keys)).all(|key| {
                let done = state.rows[key].is_some_and(|row| row.stands == Stands::Done);
                !done || state.story[key].succeeded
            })
        }),
        always("I4 a redrive runs the handler", |_, state| !state.flaws.has(Flaw::RedriveDoesNotRun)),
        always("I5 complete precedes ack", |_, state| !state.flaws.has(Flaw::AckBeforeComplete)),
        always("I6 in progress is never acked", |_, state| !state.flaws.has(Flaw::AckInProgress)),
        always("I8 attempts are bounded", |_, state| !state.flaws.has(Flaw::TooManyStarts)),
        always("I8 no attempt is counted twice", |_, state| !state.flaws.has(Flaw::CountedTwice)),
        always("I8 no copy skips the backoff", |_, state| !state.flaws.has(Flaw::BackoffSkipped)),
        always("I9 progress", Setup::makes_progress),
        always("rule 10: work done in time is acked", |_, state| !state.flaws.has(Flaw::DoneWorkGivenUp)),
        always("rule 12: suspects run one at a time", Setup::suspects_one_at_a_time),
    ]
}

/// What must be reached by some state of some model: else the promises would hold for nothing.
fn landmarks() -> Vec<Property<Setup>> {
    let sometimes = Property::<Setup>::sometimes;
    vec![
        sometimes("recorded after its own lease had ended", |_, state| {
            state.workers.iter().any(|worker| {
                worker.at == At::Completing(Call::Answered(Held::Yes)) && worker.holds && !worker.in_force()
            })
        }),
        sometimes("a zombie is told so", |_, state| {
            let told = At::Completing(Call::Answered(Held::Lost));
            state.workers.iter().any(|worker| worker.at == told)
        }),
        sometimes("a gap is acked", |_, state| {
            state.workers.iter().any(|worker| matches!(worker.at, At::Settling(_, Reason::Gap)))
        }),
        sometimes("a lost record is done again by complete", |_, state| {
            let gone = At::Completing(Call::Answered(Held::Gone));
            state.workers.iter().any(|worker| worker.at == gone && worker.in_force())
        }),
        sometimes("a crash is suspected", |_, state| state.workers.iter().any(is_parking_a_crash)),
        sometimes("a redriven copy runs", |_, state| {
            state.workers.iter().any(|worker| worker.at == At::Running && worker.generation > 0)
        }),
        sometimes("a suspect runs with the permit", |_, state| {
            state.workers.iter().any(|worker| worker.at == At::Running && worker.permit)
        }),
        sometimes("a duplicate is acked", |_, state| {
            state.workers.iter().any(|worker| matches!(worker.at, At::Settling(_, Reason::Duplicate)))
        }),
        sometimes("a copy is out beside its original", |_, state| {
            state.workers.iter().any(|worker| worker.at == At::Copied)
        }),
    ]
}
