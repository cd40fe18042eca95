//! The steps of the protocol over a disk: a group of them is one write.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use tokio::sync::oneshot;

use super::record::Stored;
use super::{Durability, StoreError};
use crate::DedupKey;
use crate::dedup::protocol::{Before, Fence, Machine, Micros, Record, Run, State, Token};

/// The time seen and the life: a key of another length than any id's.
pub(super) const ABOUT: &[u8] = b"about";
const ABOUT_VERSION: u8 = 1;

/// The time is written down so often, at most: that much of it can be lost with the process.
pub(super) const CLOCK_EVERY: Micros = 1_000_000;

/// The plug: what keeps bytes. Tests break things here.
///
/// 1. `write` takes effect as a whole or not at all, now or (after an error) later.
/// 2. After an error of `write` the disk is of no use any more: it is opened anew.
/// 3. `get` reads nothing that a `write` did not confirm, unless it was opened anew in between.
pub(super) trait Disk: Send {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;
    /// `None` removes.
    fn write(&mut self, writes: Vec<Write>, durability: Durability) -> Result<(), StoreError>;
    /// Cleans up in a thread of the caller's.
    fn sweeper(&self) -> Option<Box<dyn FnOnce() + Send>>;
}

pub(super) type Write = (Vec<u8>, Option<Vec<u8>>);

/// What the store knows of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct About {
    /// The highest time seen, within [`CLOCK_EVERY`].
    pub(super) time: Micros,
    /// How many times it was opened.
    pub(super) life: u32,
}

impl About {
    pub(super) fn read(disk: &dyn Disk) -> Result<Self, StoreError> {
        let Some(bytes) = disk.get(ABOUT)? else { return Ok(Self::default()) };
        match bytes.as_slice().split_first_chunk() {
            Some((&[ABOUT_VERSION], rest)) if rest.len() == 12 => Ok(Self::of(rest)),
            _ => Err(StoreError::new(
                "the durable store is of a format that this build does not know: another version of guestlist wrote it",
            )),
        }
    }

    fn of(bytes: &[u8]) -> Self {
        let number = |bytes: &[u8]| bytes.iter().fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
        let (time, life) = bytes.split_at(8);
        Self { time: number(time), life: u32::try_from(number(life)).unwrap_or(u32::MAX) }
    }

    fn write(self) -> Write {
        let bytes = [&[ABOUT_VERSION], &self.time.to_be_bytes()[..], &self.life.to_be_bytes()].concat();
        (ABOUT.to_vec(), Some(bytes))
    }
}

/// The records, in one life of the store.
pub(super) struct Ledger {
    disk: Box<dyn Disk>,
    durability: Durability,
    about: About,
    opened_at: Micros,
}

impl Ledger {
    /// Begins a life, or goes on with it on a disk that was opened anew. Writes, so that a disk
    /// that is still full is noticed here.
    pub(super) fn open(
        mut disk: Box<dyn Disk>,
        durability: Durability,
        life: u32,
        opened_at: Micros,
        now: Micros,
    ) -> Result<Self, StoreError> {
        let about = About { time: now, life };
        disk.write(vec![about.write()], Durability::Power)?;
        Ok(Self { disk, durability, about, opened_at })
    }

    /// Makes the steps one after the other and writes what they changed, at once. On an error
    /// none of them may be answered: they may rest on what was not written.
    pub(super) fn apply(&mut self, now: Micros, steps: &mut [Box<dyn Step>]) -> Result<(), StoreError> {
        let mut changed = HashMap::new();
        for step in steps {
            self.step(now, step.as_mut(), &mut changed);
        }
        self.write(now, changed)
    }

    pub(super) fn sweeper(&self) -> Option<Box<dyn FnOnce() + Send>> {
        self.disk.sweeper()
    }

    #[cfg(test)]
    pub(super) fn has(&self, key: &DedupKey) -> bool {
        self.disk.get(key.as_bytes()).unwrap().is_some()
    }

    /// Writes the time down, and everything to the disk.
    pub(super) fn close(mut self, now: Micros) -> Result<(), StoreError> {
        self.disk.write(vec![About { time: now, ..self.about }.write()], Durability::Power)
    }

    /// A record that cannot be read fails the calls of its key, and no others.
    fn step(&self, now: Micros, step: &mut dyn Step, changed: &mut Changes) {
        let key = step.key();
        let old = match changed.get(&key) {
            Some(record) => Ok(*record),
            None => self.read(&key, step.kind()),
        };
        match old {
            Err(error) => step.fail(error),
            Ok(old) => {
                let new = step.make(Machine::at(now), old);
                if new != old || step.kind() == Kind::Removal {
                    changed.insert(key, new);
                }
            }
        }
    }

    fn read(&self, key: &DedupKey, kind: Kind) -> Result<Option<Record>, StoreError> {
        let Some(bytes) = self.disk.get(key.as_bytes())? else { return Ok(None) };
        match (kind, Stored::decode(&bytes)) {
            (Kind::Claim, stored) => Ok(Some(self.without_the_dead(stored?))),
            (Kind::Removal, Err(_)) => Ok(Some(UNREADABLE)),
            (_, stored) => Ok(Some(stored?.record)),
        }
    }

    /// The lock of the folder proves that the holders of an earlier life are gone, with their
    /// process or with their store: their leases are over. Only a claim asks for that.
    fn without_the_dead(&self, stored: Stored) -> Record {
        let Stored { record, life } = stored;
        match record.state {
            State::Claimed { deadline } if life != self.about.life => {
                Record { state: State::Claimed { deadline: deadline.min(self.opened_at) }, ..record }
            }
            _ => record,
        }
    }

    fn write(&mut self, now: Micros, changed: Changes) -> Result<(), StoreError> {
        if changed.is_empty() {
            return Ok(());
        }
        let life = self.about.life;
        let bytes = |record| Stored { record, life }.encode();
        let mut writes: Vec<Write> =
            changed.into_iter().map(|(key, record)| (key.as_bytes().to_vec(), record.map(bytes))).collect();
        let about = About { time: self.about.time.max(now), ..self.about };
        // A fence is lost with what is removed: only the time keeps the next one above it.
        let removes = writes.iter().any(|(_, record)| record.is_none());
        let clock_is_due = removes || now.saturating_sub(self.about.time) >= CLOCK_EVERY;
        if clock_is_due {
            writes.push(about.write());
        }
        self.disk.write(writes, self.durability)?;
        if clock_is_due {
            self.about = about;
        }
        Ok(())
    }
}

type Changes = HashMap<DedupKey, Option<Record>>;

/// Stands for what cannot be read, where all that counts is that something is there.
const UNREADABLE: Record = Record {
    run: Run { token: Token::from_bits(0), fence: Fence(0) },
    attempt: 0,
    before: Before::First,
    state: State::Parked,
    generation: 0,
    suspect: false,
    interruptions: 0,
    digest: None,
    retain: Duration::MAX,
    kept_until: Micros::MAX,
};

/// What a step is to its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Claim,
    /// It removes also what it cannot read.
    Removal,
    Other,
}

/// A call: one step of the protocol, and whoever waits for its answer.
pub(super) trait Step: Send {
    fn key(&self) -> DedupKey;
    fn kind(&self) -> Kind;
    /// Makes the step; the answer is kept until the change is written.
    fn make(&mut self, machine: Machine, record: Option<Record>) -> Option<Record>;
    /// It cannot be made.
    fn fail(&mut self, error: StoreError);
    /// Gives the answer.
    fn answer(self: Box<Self>);
    /// Nobody waits any more.
    fn is_abandoned(&self) -> bool;
}

/// A step by a function of the machine.
pub(super) struct Call<F, A> {
    key: DedupKey,
    kind: Kind,
    make: F,
    answer: Result<A, StoreError>,
    to: oneshot::Sender<Result<A, StoreError>>,
}

impl<F, A> Call<F, A>
where
    F: FnMut(Machine, Option<Record>) -> (Option<Record>, A) + Send + 'static,
    A: Send + 'static,
{
    pub(super) fn boxed(key: DedupKey, kind: Kind, make: F) -> (Box<dyn Step>, Answer<A>) {
        let (to, given) = oneshot::channel();
        let answer = Err(StoreError::new("the durable store did not come to it"));
        (Box::new(Self { key, kind, make, answer, to }), given)
    }
}

type Answer<A> = oneshot::Receiver<Result<A, StoreError>>;

impl<F, A> Step for Call<F, A>
where
    F: FnMut(Machine, Option<Record>) -> (Option<Record>, A) + Send,
    A: Send,
{
    fn key(&self) -> DedupKey {
        self.key
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn make(&mut self, machine: Machine, record: Option<Record>) -> Option<Record> {
        let (record, answer) = (self.make)(machine, record);
        self.answer = Ok(answer);
        record
    }

    fn fail(&mut self, error: StoreError) {
        self.answer = Err(error);
    }

    fn answer(self: Box<Self>) {
        // Whoever asked may have gone: the layer's deadline, a cancelled future.
        let _ = self.to.send(self.answer);
    }

    fn is_abandoned(&self) -> bool {
        self.to.is_closed()
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger")
            .field("about", &self.about)
            .field("durability", &self.durability)
            .finish_non_exhaustive()
    }
}
