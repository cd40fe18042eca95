//! Arguments, answers and records as bytes: one argument and one answer per step.

use std::time::Duration;

use crate::dedup::protocol::{
    Ask, Before, Claim, Digest, Fence, Held, Micros, Record, Release, Run, State, Token,
};

/// The script counts in doubles, exact up to here; so many microseconds (285 years) are "for ever".
const FOREVER: u64 = (1 << 53) - 1;

/// Longer ones are for ever, and none but zero is zero.
fn length(duration: Duration) -> [u8; 8] {
    let micros = u64::try_from(duration.as_micros()).unwrap_or(FOREVER).min(FOREVER);
    let micros = if duration.is_zero() { 0 } else { micros.max(1) };
    micros.to_le_bytes()
}

pub(super) fn claim_of(ask: &Ask) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(54);
    bytes.push(b'c');
    bytes.extend(ask.token.bits().to_le_bytes());
    bytes.extend(length(ask.lease));
    bytes.extend(length(ask.retain));
    bytes.extend(ask.generation.to_le_bytes());
    bytes.push(u8::from(ask.alone));
    bytes.extend(ask.digest.map(Digest::to_le_bytes).into_iter().flatten());
    bytes
}

pub(super) fn renewal(run: Run, lease: Duration) -> Vec<u8> {
    [b"n", &run.token.bits().to_le_bytes()[..], &length(lease)].concat()
}

pub(super) fn completion(run: Run, window: Duration) -> Vec<u8> {
    let fence = run.fence.0.min(FOREVER).to_le_bytes();
    [b"d", &run.token.bits().to_le_bytes()[..], &fence, &length(window)].concat()
}

pub(super) fn release(run: Run, why: Release) -> Vec<u8> {
    let (code, delay) = match why {
        Release::Failed { not_before } => (0, not_before),
        Release::Deferred { not_before } => (1, not_before),
        Release::NotStarted => (2, Duration::ZERO),
        Release::Interrupted => (3, Duration::ZERO),
        Release::DeadLettered => (4, Duration::ZERO),
    };
    [b"r", &run.token.bits().to_le_bytes()[..], &[code], &length(delay)].concat()
}

pub(super) fn inspection() -> Vec<u8> {
    b"i".to_vec()
}

pub(super) fn removal() -> Vec<u8> {
    b"f".to_vec()
}

/// An answer that our script does not give.
#[derive(Debug)]
pub(super) struct Unintelligible;

type Read<T> = Result<T, Unintelligible>;

pub(super) fn held(code: i64) -> Read<Held> {
    match code {
        0 => Ok(Held::Yes),
        1 => Ok(Held::Lost),
        2 => Ok(Held::Gone),
        _ => Err(Unintelligible),
    }
}

pub(super) fn claim(answer: &[u8]) -> Read<Claim> {
    let mut bytes = Reader(answer);
    Ok(match bytes.byte()? {
        b'A' => Claim::Acquired {
            fence: Fence(bytes.u64()?),
            attempt: bytes.u32()?,
            before: bytes.before()?,
            digest: bytes.digest()?,
        },
        b'B' => Claim::InProgress { left: Duration::from_micros(bytes.u64()?), digest: bytes.digest()? },
        b'S' => Claim::Suspect,
        b'P' => Claim::Parked { digest: bytes.digest()? },
        b'D' => Claim::Done { digest: bytes.digest()? },
        _ => return Err(Unintelligible),
    })
}

/// A record of format 1, see `step.lua`.
pub(super) fn record(bytes: &[u8]) -> Read<Record> {
    let mut bytes = Reader(bytes);
    if bytes.byte()? != 1 {
        return Err(Unintelligible);
    }
    let state = bytes.byte()?;
    let (before, suspect, interruptions) = (bytes.before()?, bytes.byte()? == 1, bytes.byte()?);
    let (attempt, generation, fence) = (bytes.u32()?, bytes.u32()?, Fence(bytes.u64()?));
    let (till, retain, kept_until) = (bytes.instant()?, bytes.duration()?, bytes.instant()?);
    let run = Run { token: bytes.token()?, fence };
    let digest = bytes.digest()?;
    let state = match state {
        0 => State::Claimed { deadline: till },
        1 => State::Released { not_before: till },
        2 => State::Parked,
        3 => State::Done,
        _ => return Err(Unintelligible),
    };
    Ok(Record { run, attempt, before, state, generation, suspect, interruptions, digest, retain, kept_until })
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Read<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Unintelligible)?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn byte(&mut self) -> Read<u8> {
        self.take().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Read<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Read<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn instant(&mut self) -> Read<Micros> {
        Ok(Some(self.u64()?).filter(|micros| *micros < FOREVER).unwrap_or(Micros::MAX))
    }

    fn duration(&mut self) -> Read<Duration> {
        let micros = Some(self.u64()?).filter(|micros| *micros < FOREVER);
        Ok(micros.map_or(Duration::MAX, Duration::from_micros))
    }

    fn before(&mut self) -> Read<Before> {
        match self.byte()? {
            0 => Ok(Before::First),
            1 => Ok(Before::Failed),
            2 => Ok(Before::HandedBack),
            3 => Ok(Before::Vanished),
            _ => Err(Unintelligible),
        }
    }

    fn token(&mut self) -> Read<Token> {
        Ok(Token::from_bits(u128::from_le_bytes(self.take()?)))
    }

    /// What is left: a digest, or nothing.
    fn digest(&mut self) -> Read<Option<Digest>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let digest = Digest::from_le_bytes(self.take()?);
        if self.0.is_empty() { Ok(Some(digest)) } else { Err(Unintelligible) }
    }
}
