//! One step, as a statement and back.
//!
//! Statements go by the simple protocol, with their arguments in the text: numbers and hexadecimal digits
//! of our own making, nothing that anybody sent. So they need one round trip from the first call on and
//! no prepared statement, and work behind every pooler without a setting.

use std::fmt::Write;
use std::str::FromStr;
use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::error;
use super::names::Names;
use crate::dedup::StoreError;
use crate::dedup::protocol::{Ask, Before, Claim, Digest, Fence, Held, Record, Release, Run, State, Token};
use crate::{BoxError, DedupKey};

/// No length is longer: a time plus two of them, a backoff and the retention, stays within a `bigint`. It is 73,000 years.
pub(super) const LONGEST: u64 = 1 << 61;

/// When to look again at a record that another transaction holds.
const LOCKED: Duration = Duration::from_secs(1);

/// One step of the protocol, as `step_v2` takes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    op: i32,
    pub(super) key: DedupKey,
    token: Token,
    fence: i64,
    length: u64,
    keep: u64,
    generation: u32,
    digest: Option<Digest>,
    alone: bool,
}

/// What `step_v2` answers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    code: i16,
    busy_for: Option<i64>,
    fence: Option<i64>,
    attempt: Option<i64>,
    before: Option<i16>,
    digest: Option<Digest>,
}

impl Call {
    pub(super) fn claim(key: &DedupKey, ask: &Ask) -> Self {
        Self {
            op: 0,
            key: *key,
            token: ask.token,
            fence: 0,
            length: micros(ask.lease),
            keep: micros(ask.retain),
            generation: ask.generation,
            digest: ask.digest,
            alone: ask.alone,
        }
    }

    pub(super) fn renew(key: &DedupKey, run: Run, lease: Duration) -> Self {
        Self::by_run(1, key, run, lease)
    }

    pub(super) fn complete(key: &DedupKey, run: Run, window: Duration) -> Self {
        Self::by_run(2, key, run, window)
    }

    pub(super) fn release(key: &DedupKey, run: Run, why: Release) -> Self {
        let (op, not_before) = match why {
            Release::Failed { not_before } => (3, not_before),
            Release::Deferred { not_before } => (4, not_before),
            Release::NotStarted => (5, Duration::ZERO),
            Release::Interrupted => (6, Duration::ZERO),
            Release::DeadLettered => (7, Duration::ZERO),
        };
        Self::by_run(op, key, run, not_before)
    }

    fn by_run(op: i32, key: &DedupKey, run: Run, length: Duration) -> Self {
        Self {
            op,
            key: *key,
            token: run.token,
            fence: i64::try_from(run.fence.0).unwrap_or(i64::MAX),
            length: micros(length),
            keep: 0,
            generation: 0,
            digest: None,
            alone: false,
        }
    }

    /// The statement of these steps, in this order. Its rows carry the step's number, from 1.
    pub(super) fn statement(names: &Names, calls: &[Self]) -> String {
        match calls {
            [call] => call.statement_of_one(names),
            calls => statement_of_many(names, calls),
        }
    }

    fn statement_of_one(&self, names: &Names) -> String {
        let Self { op, token, fence, length, keep, generation, alone, .. } = self;
        let (Names { schema, table }, key, digest) = (names, hex_of(&self.key), quoted(self.digest));
        format!(
            "select 1::bigint, \"{schema}\".\"{table}_step_v2\"({op}, '{key}', '{token:?}', {fence}, {length}, {keep}, {generation}, {digest}, {alone})"
        )
    }
}

/// A function call per row, in the order of the rows: the second step on a key sees the first one's record.
fn statement_of_many(names: &Names, calls: &[Call]) -> String {
    let Names { schema, table } = names;
    let mut text = String::with_capacity(400 + calls.len() * 200);
    let values = "a.op, a.k, a.token, a.fence, a.length, a.keep, a.generation, a.digest, a.alone";
    let _ = write!(text, "select a.n, \"{schema}\".\"{table}_step_v2\"({values}) from unnest(");
    let mut array = |of: &str, item: &dyn Fn(&Call, &mut String)| {
        text.push_str("'{");
        for (i, call) in calls.iter().enumerate() {
            if i > 0 {
                text.push(',');
            }
            item(call, &mut text);
        }
        let _ = write!(text, "}}'::{of}[],");
    };
    array("int", &|call, to| put(to, call.op));
    array("uuid", &|call, to| to.push_str(&hex_of(&call.key)));
    array("uuid", &|call, to| put(to, format_args!("{:?}", call.token)));
    array("bigint", &|call, to| put(to, call.fence));
    array("bigint", &|call, to| put(to, call.length));
    array("bigint", &|call, to| put(to, call.keep));
    array("bigint", &|call, to| put(to, call.generation));
    array("uuid", &|call, to| match call.digest {
        Some(digest) => put(to, format_args!("{digest:032x}")),
        None => to.push_str("null"),
    });
    array("boolean", &|call, to| put(to, call.alone));
    text.pop();
    let columns = "op, k, token, fence, length, keep, generation, digest, alone";
    let _ = write!(text, ") with ordinality a({columns}, n)");
    text
}

fn put(to: &mut String, item: impl std::fmt::Display) {
    let _ = write!(to, "{item}");
}

fn quoted(digest: Option<Digest>) -> String {
    digest.map_or_else(|| "null".to_owned(), |digest| format!("'{digest:032x}'"))
}

/// A key as a `uuid` is written.
pub(crate) fn hex_of(key: &DedupKey) -> String {
    format!("{:032x}", u128::from_be_bytes(*key.as_bytes()))
}

/// What is not zero stays more than zero.
pub(crate) fn micros(length: Duration) -> u64 {
    let micros = u64::try_from(length.as_micros()).unwrap_or(u64::MAX);
    micros.clamp(u64::from(!length.is_zero()), LONGEST)
}

impl Answer {
    /// A row: the number of the step, and its answer.
    pub(super) fn of_row(row: &PgRow) -> Result<(usize, Self), sqlx::Error> {
        let number: i64 = row.try_get(0)?;
        let answer = Self::read(row.try_get_unchecked(1)?)?;
        Ok((usize::try_from(number).unwrap_or(0), answer))
    }

    /// Of the text of a row in a row, like `(0,,17,1,0,)`. With the function in the `from` clause its columns would be
    /// the row's own, but the server took a tenth of the time more.
    fn read(text: &str) -> Result<Self, sqlx::Error> {
        let mut fields =
            text.strip_prefix('(').and_then(|text| text.strip_suffix(')')).unwrap_or("").split(',');
        let mut next = || fields.next().unwrap_or("");
        Ok(Self {
            code: field(next())?.ok_or_else(|| sqlx::Error::Decode("there is no answer".into()))?,
            busy_for: field(next())?,
            fence: field(next())?,
            attempt: field(next())?,
            before: field(next())?,
            digest: bits_of(next())?,
        })
    }

    /// Another transaction changes the record right now.
    pub(super) fn is_locked(&self) -> bool {
        self.code == 20
    }

    pub(super) fn claim(self) -> Result<Claim, StoreError> {
        let digest = self.digest;
        match self.code {
            0 => self.acquired(),
            1 => Ok(Claim::InProgress { left: length(self.busy_for.unwrap_or(0)), digest }),
            2 => Ok(Claim::Suspect),
            3 => Ok(Claim::Parked { digest }),
            4 => Ok(Claim::Done { digest }),
            // Its holder may be committing: in progress, in every sense that matters.
            20 => Ok(Claim::InProgress { left: LOCKED, digest: None }),
            code => Err(unknown(code)),
        }
    }

    fn acquired(self) -> Result<Claim, StoreError> {
        let (Some(fence), Some(attempt), Some(before)) = (self.fence, self.attempt, self.before) else {
            return Err(unknown(0));
        };
        Ok(Claim::Acquired {
            fence: Fence(unsigned(fence)),
            attempt: u32::try_from(attempt).unwrap_or(u32::MAX),
            before: before_of(before)?,
            digest: self.digest,
        })
    }

    pub(super) fn held(self) -> Result<Held, StoreError> {
        match self.code {
            10 => Ok(Held::Yes),
            11 => Ok(Held::Lost),
            12 => Ok(Held::Gone),
            20 => Err(error::locked()),
            code => Err(unknown(code)),
        }
    }
}

/// The server's clock.
pub(crate) const NOW: &str = "(extract(epoch from clock_timestamp()) * 1000000)::bigint";

/// The columns of a record, as [`record_of`] reads them; after them the clock.
pub(super) const RECORD: &str = "token, fence, attempt, before, state, until, generation, suspect, interruptions, digest, retain, kept_until, version";

/// A record, and the time at which it was read.
pub(super) fn record_of(row: &PgRow) -> Result<(Record, u64), StoreError> {
    let version: i16 = row.try_get(12).map_err(unreadable)?;
    if version != 1 {
        return Err(unknown(21));
    }
    let (record, now) = known_record_of(row).map_err(unreadable)?;
    Ok((record?, unsigned(now)))
}

fn known_record_of(row: &PgRow) -> Result<(Result<Record, StoreError>, i64), sqlx::Error> {
    let token = Token::from_bits(uuid_at(row, 0)?.unwrap_or_default());
    let fence = Fence(unsigned(row.try_get(1)?));
    let (before, state, until): (i16, i16, i64) = (row.try_get(3)?, row.try_get(4)?, row.try_get(5)?);
    let blank = Record {
        run: Run { token, fence },
        attempt: u32::try_from(row.try_get::<i64, _>(2)?).unwrap_or(u32::MAX),
        before: Before::First,
        state: State::Done,
        generation: u32::try_from(row.try_get::<i64, _>(6)?).unwrap_or(u32::MAX),
        suspect: row.try_get(7)?,
        interruptions: u8::try_from(row.try_get::<i16, _>(8)?).unwrap_or(u8::MAX),
        digest: uuid_at(row, 9)?,
        retain: length(row.try_get(10)?),
        kept_until: unsigned(row.try_get(11)?),
    };
    let record = before_of(before).and_then(|before| {
        let state = state_of(state, unsigned(until))?;
        Ok(Record { before, state, ..blank })
    });
    Ok((record, row.try_get(13)?))
}

fn before_of(before: i16) -> Result<Before, StoreError> {
    match before {
        0 => Ok(Before::First),
        1 => Ok(Before::Failed),
        2 => Ok(Before::HandedBack),
        3 => Ok(Before::Vanished),
        _ => Err(unknown(21)),
    }
}

fn state_of(state: i16, until: u64) -> Result<State, StoreError> {
    match state {
        0 => Ok(State::Claimed { deadline: until }),
        1 => Ok(State::Released { not_before: until }),
        2 => Ok(State::Parked),
        3 => Ok(State::Done),
        _ => Err(unknown(21)),
    }
}

/// The simple protocol answers in text.
fn uuid_at(row: &PgRow, column: usize) -> Result<Option<u128>, sqlx::Error> {
    bits_of(row.try_get_unchecked::<Option<&str>, _>(column)?.unwrap_or(""))
}

fn bits_of(uuid: &str) -> Result<Option<u128>, sqlx::Error> {
    if uuid.is_empty() {
        return Ok(None);
    }
    let bits = u128::from_str_radix(&uuid.replace('-', ""), 16);
    bits.map(Some).map_err(|error| sqlx::Error::Decode(error.into()))
}

/// Nothing between two commas is null.
fn field<T>(text: &str) -> Result<Option<T>, sqlx::Error>
where
    T: FromStr<Err: Into<BoxError>>,
{
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|error: T::Err| sqlx::Error::Decode(error.into()))
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn length(micros: i64) -> Duration {
    Duration::from_micros(unsigned(micros))
}

fn unreadable(error: sqlx::Error) -> StoreError {
    StoreError::new("the Postgres store answered something unreadable").with_source(error)
}

fn unknown(code: i16) -> StoreError {
    StoreError::new(match code {
        21 => "the Postgres store has a record of an unknown version for this key: upgrade this program, or forget the key".to_owned(),
        code => format!("the Postgres store gave an answer that this version does not know: {code}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_is_not_zero_stays_so_and_fits() {
        assert_eq!(micros(Duration::ZERO), 0);
        assert_eq!(micros(Duration::from_nanos(1)), 1);
        assert_eq!(micros(Duration::from_secs(1)), 1_000_000);
        assert_eq!(micros(Duration::MAX), LONGEST);
    }

    #[test]
    fn an_answer_is_read_whole_or_not_at_all() {
        let digest = "00000000-0000-0000-0000-0000000000ff";
        let answer = Answer::read(&format!("(0,12,9223372036854775807,4,1,{digest})")).unwrap();
        assert_eq!((answer.code, answer.busy_for, answer.fence), (0, Some(12), Some(i64::MAX)));
        assert_eq!((answer.attempt, answer.before, answer.digest), (Some(4), Some(1), Some(0xff)));
        let answer = Answer::read("(12,,,,,)").unwrap();
        assert_eq!((answer.code, answer.busy_for, answer.digest), (12, None, None));
        for wrong in ["", "()", "(,1,1,1,1,)", "(70000,,,,,)", "(0,,x,1,0,)", "(0,,1,1,0,xyz)", "0,,1,1,0,"] {
            Answer::read(wrong).expect_err(wrong);
        }
    }
}
