//! What a model is made of: how many of everything, which broker, which faults.

use super::bugs::Bug;
use super::state::{
    At, BACKOFF, FOREVER, KEYS, LEASE, PARCELS, Parcel, Place, Request, State, Stray, WORKERS, Worker,
};
use super::store::Store;
use super::story::{Flaw, Flaws, Story};
use super::worker::{Answer, Handled};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broker {
    /// Requeue and redelivery; a delay is a confirmed copy, then an ack; an acker is dead with its channel.
    Amqp,
    /// `nak(delay)`, `ack_wait`; a late ack or nak acts on the newer delivery.
    JetStream,
}

/// Something that goes wrong. Each time costs one of [`Setup::faults`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fault {
    /// A process is killed, with all its workers.
    Crash,
    /// AMQP: the connection of a process breaks, its handlers go on. `JetStream`: `ack_wait` runs out.
    Redelivery,
    /// A store call is lost on its way there or back.
    NoAnswer,
    /// A store call is given up, and arrives later.
    LateCall,
    /// A renewal is executed, and its answer is lost; or none comes, and the sweep sees the lease end.
    RenewalUnanswered,
    /// A claim is given up before its answer, as when the store is away too long.
    GivenUp,
    /// The consumer stops in the middle of it.
    Interruption,
    /// A dead letter is refused until it is given up.
    LetterRefused,
    /// A dead letter is not confirmed until it is given up, and arrives later.
    LateLetter,
    /// A hold copy is there, and its confirmation is lost: it is published again.
    CopyUnconfirmed,
    /// An ack is lost.
    AckLost,
    /// The store loses a record.
    RecordLost,
    /// A worker takes so long over a step that its lease ends: a paused process, a slow store.
    Pause,
}

/// One model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) name: &'static str,
    pub(super) broker: Broker,
    /// Which process each worker is in.
    pub(super) processes: &'static [u8],
    pub(super) keys: u8,
    /// Messages of each key that the sender sent.
    pub(super) copies: u8,
    pub(super) max_attempts: u8,
    /// How long a record is kept, in ticks.
    pub(super) window: u8,
    pub(super) handled: &'static [Handled],
    pub(super) faults: u8,
    pub(super) kinds: &'static [Fault],
    pub(super) redrives: u8,
    pub(super) bug: Option<Bug>,
    /// What must be seen to happen, so that the model is known to get there.
    pub(super) reaches: &'static [&'static str],
}

impl Setup {
    pub(super) const PLAIN: Self = Self {
        name: "plain",
        broker: Broker::JetStream,
        processes: &[0, 1],
        keys: 1,
        copies: 2,
        max_attempts: 2,
        window: FOREVER,
        handled: &[Handled::Well, Handled::Transient],
        faults: 0,
        kinds: &[],
        redrives: 0,
        bug: None,
        reaches: &[],
    };

    pub(super) fn initial(&self) -> State {
        assert!(usize::from(self.keys) <= KEYS && self.processes.len() <= WORKERS);
        assert!(usize::from(self.keys * self.copies) <= PARCELS);
        let mut state = State {
            rows: [None; KEYS],
            parcels: [None; PARCELS],
            workers: [Worker::IDLE; WORKERS],
            stray: None,
            letters: [None; KEYS],
            late_letter: None,
            faults: self.faults,
            redrives: self.redrives,
            story: [Story::default(); KEYS],
            flaws: Flaws::default(),
        };
        for key in (0..self.keys).flat_map(|key| (0..self.copies).map(move |_| key)) {
            state.put(Parcel { key, generation: 0, place: Place::Ready });
        }
        state.sort_parcels();
        state
    }

    pub(super) fn store(&self) -> Store {
        Store { window: self.window, bug: self.bug }
    }

    /// One atomic step of the store, and the truth about it.
    pub(super) fn execute(&self, state: &mut State, Stray { key, token, request }: Stray) -> Answer {
        let (store, key) = (self.store(), usize::from(key));
        let before = state.rows[key];
        let (row, truth) = (&mut state.rows[key], &mut state.story[key]);
        let answer = match request {
            Request::Claim { generation, alone } => {
                let claim = store.claim(row, token, generation, alone);
                truth.claimed(token, generation, before, claim);
                return Answer::Claim(claim);
            }
            Request::Renew => store.renew(row, token),
            Request::Complete => {
                let held = store.complete(row, token);
                truth.completed(before, *row);
                held
            }
            Request::Release(why) => {
                let held = store.release(row, token, why);
                truth.released(why, before, held, BACKOFF);
                held
            }
        };
        let strangers = before.is_some_and(|row| row.token != token);
        state.flaws.add(Flaw::ZombieChanges, strangers && before != state.rows[key]);
        Answer::Held(answer)
    }

    /// At most one run of a key acts under a claim that is in force by its own view. A record that
    /// the store lost is excused: that is what a lost record does.
    pub(super) fn one_at_a_time(&self, state: &State) -> bool {
        (0..self.keys).all(|key| {
            let acting =
                |worker: &&Worker| worker.key == key && worker.holds && worker.in_force() && !worker.orphan;
            let busy = |worker: &&Worker| matches!(worker.at, At::Running | At::Parking(_));
            state.workers.iter().filter(acting).filter(busy).count() <= 1
        })
    }

    /// In each process, at most one handler runs whose id's holder vanished before.
    pub(super) fn suspects_one_at_a_time(&self, state: &State) -> bool {
        (0..2).all(|process| {
            let suspect = |(number, worker): &(usize, &Worker)| {
                self.processes.get(*number) == Some(&process)
                    && worker.at == At::Running
                    && !worker.orphan
                    && worker.in_force()
                    && state.story[usize::from(worker.key)].suspect
            };
            state.workers.iter().enumerate().filter(suspect).count() <= 1
        })
    }

    /// Each key's handler has succeeded, or its letter is with the dead letters, or a message of it
    /// is at the broker.
    pub(super) fn nothing_lost(&self, state: &State) -> bool {
        (0..self.keys).all(|key| {
            let at = usize::from(key);
            state.story[at].succeeded
                || state.letters[at].is_some()
                || state.parcels().any(|(_, parcel)| parcel.key == key)
        })
    }

    /// The worst time that an id may take without faults: a lease that runs out, a backoff, and the
    /// delay of a hand-back.
    pub(super) const SLACK: u8 = LEASE + BACKOFF + 1;
}
