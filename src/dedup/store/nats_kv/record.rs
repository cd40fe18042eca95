//! What is in a message of the bucket: a record whose times are lengths, not points in time.
//!
//! A lease of 30 s is stored as 30 s. Whoever reads it adds them to the instant from which on
//! it knows the record to stand unchanged.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::dedup::protocol::{Before, Fence, Micros, Record, Run, State, Token};
use crate::dedup::store::StoreError;

/// The first byte of every record. A record of another format is not read, and suppresses nothing.
const VERSION: u8 = 1;

const SUSPECT: u8 = 1;
const DIGEST: u8 = 1 << 1;
const FENCE_IS_BASE: u8 = 1 << 2;
const KNOWN_FLAGS: u8 = SUSPECT | DIGEST | FENCE_IS_BASE;

/// All fields but the digest.
const SIZE: usize = 53;
const DIGEST_SIZE: usize = 16;

/// A record as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    /// The record of an observer for whom time begins at zero, when the record was written.
    at_zero: Record,
    /// A claim cannot know its own revision, which makes its fence: then this plus the revision of
    /// the message that it stands in.
    fence_base: Option<u64>,
}

impl Stored {
    /// What to write for a record that was made at this instant. A new claim's fence is to be `fence_base` plus
    /// the revision that it is given.
    pub(super) fn new(record: &Record, now: Micros, fence_base: Option<u64>) -> Self {
        let state = match record.state {
            State::Claimed { deadline } => State::Claimed { deadline: deadline.saturating_sub(now) },
            State::Released { not_before } => State::Released { not_before: not_before.saturating_sub(now) },
            state @ (State::Parked | State::Done) => state,
        };
        Self { at_zero: kept(Record { state, ..*record }, 0), fence_base }
    }

    /// The record for an observer who has known it since then.
    pub(super) fn record(&self, since: Micros) -> Record {
        let state = match self.at_zero.state {
            State::Claimed { deadline } => State::Claimed { deadline: since.saturating_add(deadline) },
            // No backoff: free at all times.
            State::Released { not_before: 0 } => State::Released { not_before: 0 },
            State::Released { not_before } => {
                State::Released { not_before: since.saturating_add(not_before) }
            }
            state @ (State::Parked | State::Done) => state,
        };
        kept(Record { state, ..self.at_zero }, since)
    }

    /// The same, known to be written as this revision.
    pub(super) fn written_as(mut self, revision: u64) -> Self {
        if let Some(base) = self.fence_base.take() {
            self.at_zero.run.fence = Fence(base.saturating_add(revision));
        }
        self
    }

    pub(super) const fn fence(&self) -> Fence {
        self.at_zero.run.fence
    }

    /// For a claim whose fence is yet to be made.
    pub(super) const fn fence_base(&self) -> Option<u64> {
        self.fence_base
    }

    pub(super) fn encode(&self) -> Bytes {
        let Record {
            run, attempt, before, state, generation, suspect, interruptions, digest, retain, ..
        } = self.at_zero;
        let (state, length) = match state {
            State::Claimed { deadline } => (0, deadline),
            State::Released { not_before } => (1, not_before),
            State::Parked => (2, 0),
            State::Done => (3, 0),
        };
        let flags = flag(SUSPECT, suspect)
            | flag(DIGEST, digest.is_some())
            | flag(FENCE_IS_BASE, self.fence_base.is_some());
        let mut bytes = BytesMut::with_capacity(SIZE + DIGEST_SIZE);
        bytes.put_slice(&[VERSION, state, before_code(before), flags, interruptions]);
        bytes.put_u128(run.token.bits());
        bytes.put_u64(self.fence_base.unwrap_or(run.fence.0));
        bytes.put_u32(attempt);
        bytes.put_u32(generation);
        bytes.put_u64(micros(retain));
        bytes.put_u64(length);
        if let Some(digest) = digest {
            bytes.put_u128(digest);
        }
        bytes.freeze()
    }

    /// Reads the message of this revision.
    pub(super) fn decode(mut bytes: &[u8], revision: u64) -> Result<Self, StoreError> {
        match bytes.first() {
            Some(&VERSION) if bytes.len() >= SIZE => {}
            Some(&VERSION) | None => return Err(garbled()),
            Some(version) => return Err(unknown(*version)),
        }
        bytes.advance(1);
        let (state, before, flags, interruptions) =
            (bytes.get_u8(), bytes.get_u8(), bytes.get_u8(), bytes.get_u8());
        let run = Run { token: Token::from_bits(bytes.get_u128()), fence: Fence(bytes.get_u64()) };
        let (attempt, generation) = (bytes.get_u32(), bytes.get_u32());
        let retain = Duration::from_micros(bytes.get_u64());
        let state = state_of(state, bytes.get_u64())?;
        let before = before_of(before)?;
        let digest_size = if flags & DIGEST == 0 { 0 } else { DIGEST_SIZE };
        if bytes.len() != digest_size || flags & !KNOWN_FLAGS != 0 {
            return Err(garbled());
        }
        let digest = (digest_size > 0).then(|| bytes.get_u128());
        let suspect = flags & SUSPECT != 0;
        let record = Record {
            run,
            attempt,
            before,
            state,
            generation,
            suspect,
            interruptions,
            digest,
            retain,
            kept_until: 0,
        };
        let fence_base = (flags & FENCE_IS_BASE != 0).then_some(run.fence.0);
        Ok(Self { at_zero: kept(record, 0), fence_base }.written_as(revision))
    }
}

/// Kept for `retain` from its last change or the end of its backoff on, and a claim at least to its end, as the machine does.
fn kept(record: Record, since: Micros) -> Record {
    let after = |instant: Micros| instant.saturating_add(micros(record.retain).max(1));
    let kept_until = match record.state {
        State::Claimed { deadline } => after(since).max(deadline),
        State::Released { not_before } => after(since.max(not_before)),
        State::Parked | State::Done => after(since),
    };
    Record { kept_until, ..record }
}

pub(super) fn micros(length: Duration) -> Micros {
    u64::try_from(length.as_micros()).unwrap_or(u64::MAX)
}

const fn flag(bit: u8, set: bool) -> u8 {
    if set { bit } else { 0 }
}

const fn before_code(before: Before) -> u8 {
    match before {
        Before::First => 0,
        Before::Failed => 1,
        Before::HandedBack => 2,
        Before::Vanished => 3,
    }
}

fn before_of(code: u8) -> Result<Before, StoreError> {
    Ok(match code {
        0 => Before::First,
        1 => Before::Failed,
        2 => Before::HandedBack,
        3 => Before::Vanished,
        _ => return Err(garbled()),
    })
}

fn state_of(code: u8, length: u64) -> Result<State, StoreError> {
    Ok(match code {
        0 => State::Claimed { deadline: length },
        1 => State::Released { not_before: length },
        2 => State::Parked,
        3 => State::Done,
        _ => return Err(garbled()),
    })
}

fn unknown(version: u8) -> StoreError {
    StoreError::new(format!(
        "a record in the bucket is of format {version}, and this version of guestlist reads format {VERSION}: \
         upgrade it, or forget the key"
    ))
}

fn garbled() -> StoreError {
    StoreError::new(
        "a value in the bucket is not a record of guestlist: the bucket must be for guestlist alone; forget the key",
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dedup::protocol::{Ask, Machine, Release};

    fn length() -> impl Strategy<Value = Duration> {
        prop_oneof![
            Just(Duration::ZERO),
            (1..100_u64).prop_map(Duration::from_micros),
            (1..100_000_u64).prop_map(Duration::from_secs),
            Just(Duration::from_micros(u64::MAX)),
        ]
    }

    fn release() -> impl Strategy<Value = Release> {
        prop_oneof![
            length().prop_map(|not_before| Release::Failed { not_before }),
            length().prop_map(|not_before| Release::Deferred { not_before }),
            Just(Release::NotStarted),
            Just(Release::Interrupted),
            Just(Release::DeadLettered),
        ]
    }

    /// Any record that the machine makes, and when.
    fn made() -> impl Strategy<Value = (Record, Micros)> {
        let claim = (1..9_u128, length(), length(), any::<u32>(), any::<Option<u128>>());
        (claim, 1..1_u64 << 60, proptest::option::of(release()), any::<bool>()).prop_map(
            |((token, lease, retain, generation, digest), now, release, done)| {
                let token = Token::from_bits(token);
                let ask = Ask { token, lease, retain, generation, digest, alone: true };
                let machine = Machine::at(now);
                let (record, _) = machine.claim(None, &ask);
                let run = record.unwrap().run;
                let record = match release {
                    Some(why) => machine.release(record, run, why).0,
                    None if done => machine.complete(record, run, retain).0,
                    None => record,
                };
                (record.unwrap(), now)
            },
        )
    }

    proptest! {
        #[test]
        fn who_knows_a_record_from_the_start_sees_what_the_machine_made((record, now) in made()) {
            prop_assert_eq!(Stored::new(&record, now, None).record(now), record);
        }

        #[test]
        fn it_is_read_as_it_was_written((record, now) in made(), base in any::<Option<u64>>(), revision in any::<u64>()) {
            let stored = Stored::new(&record, now, base);
            let read = Stored::decode(&stored.encode(), revision).unwrap();
            prop_assert_eq!(read, stored.written_as(revision));
            let fence = base.map_or(record.run.fence, |base| Fence(base.saturating_add(revision)));
            prop_assert_eq!(read.record(now).run.fence, fence);
        }

        #[test]
        fn who_sees_it_later_waits_as_long_again((record, now) in made(), later in 0..1_u64 << 60) {
            let seen = Stored::new(&record, now, None).record(now + later);
            let shift = |until: Micros| until.saturating_sub(now).saturating_add(now + later);
            match (record.state, seen.state) {
                (State::Claimed { deadline: a }, State::Claimed { deadline: b }) => prop_assert_eq!(shift(a), b),
                (State::Released { not_before: 0 }, other) => {
                    prop_assert_eq!(other, State::Released { not_before: 0 });
                }
                (State::Released { not_before: a }, State::Released { not_before: b }) => {
                    prop_assert_eq!(shift(a), b);
                }
                (a, b) => prop_assert_eq!(a, b),
            }
        }

        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..90), version in any::<bool>()) {
            if let (true, Some(first)) = (version, bytes.first_mut()) {
                *first = VERSION;
            }
            if let Ok(stored) = Stored::decode(&bytes, u64::MAX) {
                let _ = stored.record(u64::MAX);
            }
        }
    }

    fn bytes() -> Vec<u8> {
        let ask = Ask::new(Token::from_bits(1), Duration::from_secs(1), Duration::from_secs(9));
        let (record, _) = Machine::at(5).claim(None, &ask);
        Stored::new(&record.unwrap(), 5, None).encode().to_vec()
    }

    #[test]
    fn another_format_and_what_is_no_record_are_errors() {
        assert!(Stored::decode(&bytes(), 1).is_ok());
        let mut future = bytes();
        future[0] = VERSION + 1;
        let error = Stored::decode(&future, 1).unwrap_err().to_string();
        assert!(error.contains("format 2"), "{error}");
        let (short, mut long, mut state, mut flags) = (&bytes()[..SIZE - 1], bytes(), bytes(), bytes());
        long.push(0);
        state[1] = 4;
        flags[3] = 1 << 7;
        for garbled in [b"".as_slice(), short, &long, &state, &flags] {
            let error = Stored::decode(garbled, 1).unwrap_err().to_string();
            assert!(error.contains("not a record"), "{error}");
        }
    }
}
