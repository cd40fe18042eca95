//! A record as bytes. Every record carries the version of its format, and the life of the store
//! that it was written in.

use std::time::Duration;

use super::StoreError;
use crate::dedup::protocol::{Before, Fence, Micros, Record, Run, State, Token};

/// The one format that is written and read.
pub(super) const VERSION: u8 = 1;

const WITHOUT_DIGEST: usize = 67;
const WITH_DIGEST: usize = WITHOUT_DIGEST + 16;
const KEPT_UNTIL: usize = 15;
const SUSPECT: u8 = 1 << 4;
const DIGEST: u8 = 1 << 5;

/// A record, and the life in which it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) record: Record,
    pub(super) life: u32,
}

impl Stored {
    pub(super) fn encode(&self) -> Vec<u8> {
        let record = &self.record;
        let (state, until) = match record.state {
            State::Claimed { deadline } => (0, deadline),
            State::Released { not_before } => (1, not_before),
            State::Parked => (2, 0),
            State::Done => (3, 0),
        };
        let mut bytes = Vec::with_capacity(WITH_DIGEST);
        bytes.extend([VERSION, state | flags(record), record.interruptions]);
        bytes.extend(self.life.to_be_bytes());
        bytes.extend(record.attempt.to_be_bytes());
        bytes.extend(record.generation.to_be_bytes());
        bytes.extend(record.kept_until.to_be_bytes());
        bytes.extend(until.to_be_bytes());
        bytes.extend(record.run.fence.0.to_be_bytes());
        bytes.extend(record.run.token.bits().to_be_bytes());
        bytes.extend(record.retain.as_secs().to_be_bytes());
        bytes.extend(record.retain.subsec_nanos().to_be_bytes());
        if let Some(digest) = record.digest {
            bytes.extend(digest.to_be_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        match bytes.first() {
            Some(&VERSION) => decode_v1(&bytes[1..]).ok_or_else(|| StoreError::new(GARBLED)),
            Some(version) => Err(unknown_version(*version)),
            None => Err(StoreError::new(GARBLED)),
        }
    }
}

const GARBLED: &str =
    "a record in the durable store is garbled: restore the folder, or move it away (ids then run again)";

fn unknown_version(version: u8) -> StoreError {
    StoreError::new(format!(
        "a record in the durable store has format {version}, and this build reads format {VERSION}: it was written by \
         another version of guestlist; run that one"
    ))
}

/// Until when a record is kept; `None` if that cannot be known, so that it is not thrown away.
pub(super) fn kept_until(bytes: &[u8]) -> Option<Micros> {
    match *bytes.first()? {
        VERSION => Some(Micros::from_be_bytes(*bytes.get(KEPT_UNTIL..)?.first_chunk()?)),
        _ => None,
    }
}

fn flags(record: &Record) -> u8 {
    let before = match record.before {
        Before::First => 0,
        Before::Failed => 1,
        Before::HandedBack => 2,
        Before::Vanished => 3,
    };
    let suspect = if record.suspect { SUSPECT } else { 0 };
    let digest = if record.digest.is_some() { DIGEST } else { 0 };
    before << 2 | suspect | digest
}

fn decode_v1(bytes: &[u8]) -> Option<Stored> {
    let mut bytes = Bytes(bytes);
    let [flags, interruptions] = bytes.take()?;
    let life = u32::from_be_bytes(bytes.take()?);
    let attempt = u32::from_be_bytes(bytes.take()?);
    let generation = u32::from_be_bytes(bytes.take()?);
    let kept_until = Micros::from_be_bytes(bytes.take()?);
    let until = Micros::from_be_bytes(bytes.take()?);
    let fence = Fence(u64::from_be_bytes(bytes.take()?));
    let token = Token::from_bits(u128::from_be_bytes(bytes.take()?));
    let retain = retain(u64::from_be_bytes(bytes.take()?), u32::from_be_bytes(bytes.take()?))?;
    let digest = match flags & DIGEST {
        0 => None,
        _ => Some(u128::from_be_bytes(bytes.take()?)),
    };
    let record = Record {
        run: Run { token, fence },
        attempt,
        before: before(flags),
        state: state(flags, until),
        generation,
        suspect: flags & SUSPECT != 0,
        interruptions,
        digest,
        retain,
        kept_until,
    };
    bytes.0.is_empty().then_some(Stored { record, life })
}

fn state(flags: u8, until: Micros) -> State {
    match flags & 0b11 {
        0 => State::Claimed { deadline: until },
        1 => State::Released { not_before: until },
        2 => State::Parked,
        _ => State::Done,
    }
}

fn before(flags: u8) -> Before {
    match flags >> 2 & 0b11 {
        0 => Before::First,
        1 => Before::Failed,
        2 => Before::HandedBack,
        _ => Before::Vanished,
    }
}

/// `Duration::new` panics on nanoseconds that carry over the end.
fn retain(secs: u64, nanos: u32) -> Option<Duration> {
    (nanos < 1_000_000_000).then(|| Duration::new(secs, nanos))
}

/// What was not read yet.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }
}
