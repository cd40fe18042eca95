//! What one state of the model holds. Times are ticks from now, never instants, so that the same
//! situation is the same state whenever it comes about.

use guestlist::dedup::Release;
use guestlist::dedup::protocol::{Before, Claim, Held};
use guestlist::{Cause, Disposition};

use super::store::Row;
use super::story::{Flaws, Story};

pub(super) const KEYS: usize = 2;
pub(super) const WORKERS: usize = 3;
pub(super) const PARCELS: usize = 8;

/// How long a lease is, in ticks.
pub(super) const LEASE: u8 = 2;
/// The backoff between attempts, and a hand-back's delay, in ticks.
pub(super) const BACKOFF: u8 = 1;
/// A time that does not end within a trace.
pub(super) const FOREVER: u8 = u8::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    /// The dedup store's record of each key.
    pub(super) rows: [Option<Row>; KEYS],
    /// What the broker keeps.
    pub(super) parcels: [Option<Parcel>; PARCELS],
    pub(super) workers: [Worker; WORKERS],
    /// A request to the store that its sender has given up, and that may still arrive.
    pub(super) stray: Option<Stray>,
    /// The highest generation of each key with the dead letters.
    pub(super) letters: [Option<u8>; KEYS],
    /// A letter that its sender has given up, and that may still arrive.
    pub(super) late_letter: Option<(u8, u8)>,
    /// Faults still to come.
    pub(super) faults: u8,
    pub(super) redrives: u8,
    pub(super) story: [Story; KEYS],
    pub(super) flaws: Flaws,
}

/// A message at the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Parcel {
    pub(super) key: u8,
    pub(super) generation: u8,
    pub(super) place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Place {
    Ready,
    Delayed(u8),
    Out,
}

/// One delivery on its way through a consumer's stack, or the end of its claim in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own, with its own name")]
pub(super) struct Worker {
    pub(super) at: At,
    /// What its acker acts on; `None`: an acker without effect, or none.
    pub(super) parcel: Option<u8>,
    pub(super) key: u8,
    pub(super) generation: u8,
    /// Its own view of its lease: ticks from the request on.
    pub(super) view: u8,
    /// Another holder has it, or it must be assumed.
    pub(super) lost: bool,
    /// It has a claim.
    pub(super) holds: bool,
    pub(super) attempt: u8,
    pub(super) before: Before,
    /// The handler ran under the claim.
    pub(super) ran: bool,
    pub(super) permit: bool,
    /// In truth: the store executed its `complete`.
    pub(super) recorded: bool,
    /// In truth: the store lost the record that the claim was in.
    pub(super) orphan: bool,
}

impl Worker {
    pub(super) const IDLE: Self = Self {
        at: At::Idle,
        parcel: None,
        key: 0,
        generation: 0,
        view: 0,
        lost: false,
        holds: false,
        attempt: 0,
        before: Before::First,
        ran: false,
        permit: false,
        recorded: false,
        orphan: false,
    };

    /// What nobody looks at any more is not part of the state.
    pub(super) fn forget_what_is_over(&mut self) {
        match self.at {
            At::Waiting | At::WaitingForPermit | At::Settling(..) | At::Copied => {
                let Self { at, parcel, key, generation, lost, .. } = *self;
                *self = Self { at, parcel, key, generation, lost, ..Self::IDLE };
            }
            At::Parking(_) if !self.holds => self.view = 0,
            _ => {}
        }
    }

    pub(super) fn in_force(&self) -> bool {
        !self.lost && self.view > 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum At {
    Idle,
    Claiming(Call<Claim>),
    Waiting,
    WaitingForPermit,
    Running,
    Completing(Call<Held>),
    /// Publishing the dead letter.
    Parking(Cause),
    /// Releasing the claim, then settling the delivery so, if it is still there.
    Releasing(Release, Disposition, Call<Held>),
    Settling(Disposition, Reason),
    /// The hold copy is confirmed, the original not acked yet.
    Copied,
}

/// A call to the store on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Call<T> {
    Sent,
    Answered(T),
}

/// Why a delivery ends as it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reason {
    Handled,
    Gap,
    Duplicate,
    Parked,
    /// A failure, a hand-back: not an ack of ours, but a copy's.
    Again,
}

/// A late request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stray {
    pub(super) key: u8,
    pub(super) token: u8,
    pub(super) request: Request,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Request {
    Claim { generation: u8, alone: bool },
    Renew,
    Complete,
    Release(Release),
}

/// The token of a record whose run is over and of no request.
pub(super) const NOBODY: u8 = 0;
/// The token of the stray request, when its sender has moved on to another.
pub(super) const STRANGER: u8 = 100;

/// Each worker has one token at a time.
pub(super) fn token(worker: usize) -> u8 {
    u8::try_from(worker).unwrap_or(u8::MAX - 1) + 1
}

impl State {
    /// The worker takes a new token: what is left of its old one is nobody's, or the stray's.
    pub(super) fn renew_token(&mut self, worker: usize) {
        let old = token(worker);
        let mut heir = NOBODY;
        if let Some(stray) = self.stray.as_mut().filter(|stray| stray.token == old) {
            stray.token = STRANGER;
            heir = STRANGER;
        }
        self.rename(old, heir);
    }

    pub(super) fn rename(&mut self, old: u8, new: u8) {
        for row in self.rows.iter_mut().flatten().filter(|row| row.token == old) {
            row.token = new;
        }
    }

    pub(super) fn idle(&mut self, worker: usize) {
        self.workers[worker] = Worker::IDLE;
        self.renew_token(worker);
    }

    pub(super) fn put(&mut self, parcel: Parcel) {
        let free = self.parcels.iter_mut().find(|place| place.is_none());
        *free.expect("the model has room for every copy that its faults can make") = Some(parcel);
    }

    /// Gone from the broker: nobody's acker acts on it any more.
    pub(super) fn remove(&mut self, parcel: u8) {
        self.parcels[usize::from(parcel)] = None;
        self.forget_ackers(parcel);
    }

    pub(super) fn forget_ackers(&mut self, parcel: u8) {
        for worker in self.workers.iter_mut().filter(|worker| worker.parcel == Some(parcel)) {
            worker.parcel = None;
        }
    }

    /// A copy of the worker's message, with the backoff before it.
    pub(super) fn copy(&mut self, worker: usize) {
        let Worker { key, generation, .. } = self.workers[worker];
        self.put(Parcel { key, generation, place: Place::Delayed(BACKOFF) });
    }

    pub(super) fn place(&mut self, parcel: u8, place: Place) {
        if let Some(parcel) = &mut self.parcels[usize::from(parcel)] {
            parcel.place = place;
        }
    }

    pub(super) fn parcels(&self) -> impl Iterator<Item = (u8, Parcel)> {
        (0u8..).zip(self.parcels).filter_map(|(at, parcel)| parcel.map(|parcel| (at, parcel)))
    }

    /// Parcels in an order of their own: which index one has means nothing.
    pub(super) fn sort_parcels(&mut self) {
        let mut owners = [0u8; PARCELS];
        for (number, worker) in self.workers.iter().enumerate() {
            if let Some(parcel) = worker.parcel {
                owners[usize::from(parcel)] |= 1 << number;
            }
        }
        let mut order: [usize; PARCELS] = std::array::from_fn(|at| at);
        order.sort_by_key(|at| (self.parcels[*at].is_none(), self.parcels[*at], owners[*at]));
        if order.is_sorted() {
            return;
        }
        let parcels = order.map(|at| self.parcels[at]);
        for worker in &mut self.workers {
            worker.parcel = worker.parcel.map(|parcel| {
                let at = order.iter().position(|from| *from == usize::from(parcel));
                at.and_then(|at| u8::try_from(at).ok()).expect("an order has every index")
            });
        }
        self.parcels = parcels;
    }
}
