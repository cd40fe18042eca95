//! The line format: one JSON object for each entry. Its fields are described at [`Log::parse`](super::Log::parse).

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Map, Value};

use super::entry::{ClaimMark, Entry, Marker, Step, What};
use crate::dedup::protocol::{Before, Release};
use crate::{Cause, DedupKey, Disposition, EventKind, Outcome};

/// Why a log cannot be read: which line, which field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the log: {field}: {problem}")]
pub struct ParseError {
    line: usize,
    field: &'static str,
    problem: &'static str,
}

impl ParseError {
    /// The line, from 1.
    pub const fn line(&self) -> usize {
        self.line
    }

    /// The field; `line` if the line as a whole is no JSON object.
    pub const fn field(&self) -> &'static str {
        self.field
    }
}

// Writing.

/// An entry as its line, without the end of the line.
pub(super) fn write(entry: &Entry) -> String {
    let mut line = Line(String::with_capacity(256));
    line.text("process", &entry.process);
    line.number("at", entry.at);
    match &entry.what {
        What::Marker(marker) => write_marker(&mut line, *marker),
        What::Step(step) => write_step(&mut line, step),
    }
    line.0.push('}');
    line.0
}

fn write_marker(line: &mut Line, marker: Marker) {
    line.text("event", marker.name());
    match marker {
        Marker::StoreLost(Some(key)) => line.text("key", &key.to_string()),
        Marker::Clock(ahead) => line.number("ahead", ahead),
        _ => {}
    }
}

fn write_step(line: &mut Line, step: &Step) {
    line.text("event", event_name(step.kind));
    line.number("delivery", step.delivery);
    if let Some(key) = step.key {
        line.text("key", &key.to_string());
    }
    if let Some(claim) = step.claim {
        line.text("token", &format!("{:016x}", claim.token));
        line.number("fence", claim.fence);
        if let Some(until) = claim.until {
            line.number("until", until);
        }
    }
    line.number("attempt", step.attempt);
    line.number("generation", step.generation);
    if let Some(body) = step.body {
        line.text("body", &format!("{body:08x}"));
    }
    write_kind(line, step);
}

fn write_kind(line: &mut Line, step: &Step) {
    let mut cause = step.cause;
    match step.kind {
        EventKind::Claimed(before) => line.text("before", name_of(BEFORES, before)),
        EventKind::Failed(why) => cause = Some(why),
        EventKind::Released(release) => write_release(line, release),
        EventKind::Acked(outcome) => {
            line.text("outcome", outcome.name());
            if let Outcome::DeadLettered(why) = outcome {
                cause = Some(why);
            }
        }
        EventKind::Returned(disposition) => write_disposition(line, disposition),
        _ => {}
    }
    if let Some(cause) = cause {
        line.text("cause", cause.name());
    }
}

fn write_release(line: &mut Line, release: Release) {
    let (name, after) = match release {
        Release::Failed { not_before } => ("failed", Some(not_before)),
        Release::Deferred { not_before } => ("deferred", Some(not_before)),
        Release::NotStarted => ("not_started", None),
        Release::Interrupted => ("interrupted", None),
        Release::DeadLettered => ("dead_lettered", None),
    };
    line.text("as", name);
    line.duration("after", after);
}

fn write_disposition(line: &mut Line, disposition: Disposition) {
    let (name, after) = match disposition {
        Disposition::Ack => ("ack", None),
        Disposition::Requeue { after } => ("requeue", Some(after)),
        Disposition::Release { after } => ("release", Some(after)),
        Disposition::Reject => ("reject", None),
        Disposition::Abandon => ("abandon", None),
    };
    line.text("disposition", name);
    line.duration("after", after);
}

/// A JSON object under way. Written by hand, so that the fields come in the order of reading.
struct Line(String);

impl Line {
    fn name(&mut self, name: &str) {
        self.0.push(if self.0.is_empty() { '{' } else { ',' });
        let _ = write!(self.0, "\"{name}\":");
    }

    fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        self.0.push_str(&Value::from(value).to_string());
    }

    fn number(&mut self, name: &str, value: impl std::fmt::Display) {
        self.name(name);
        let _ = write!(self.0, "{value}");
    }

    fn duration(&mut self, name: &str, value: Option<Duration>) {
        if let Some(value) = value {
            self.number(name, u64::try_from(value.as_micros()).unwrap_or(u64::MAX));
        }
    }
}

// Reading.

/// The entry of a line; `number` counts from 1.
pub(super) fn parse(number: usize, line: &str) -> Result<Entry, ParseError> {
    let Ok(Value::Object(map)) = serde_json::from_str(line) else {
        return Err(ParseError { line: number, field: "line", problem: "not a JSON object" });
    };
    let fields = Fields { map: &map, line: number };
    let event = fields.text("event")?;
    let what = match marker(&fields, event)? {
        Some(marker) => What::Marker(marker),
        None => What::Step(step(&fields, event)?),
    };
    Ok(Entry { process: fields.text("process")?.into(), at: fields.number("at")?, what })
}

fn marker(fields: &Fields<'_>, event: &str) -> Result<Option<Marker>, ParseError> {
    Ok(Some(match event {
        "process_started" => Marker::ProcessStarted,
        "process_killed" => Marker::ProcessKilled,
        "store_away" => Marker::StoreAway,
        "store_back" => Marker::StoreBack,
        "store_lost" => Marker::StoreLost(key(fields)?),
        "store_restarted" => Marker::StoreRestarted,
        "clock" => Marker::Clock(fields.signed("ahead")?),
        _ => return Ok(None),
    }))
}

fn step(fields: &Fields<'_>, event: &str) -> Result<Step, ParseError> {
    let kind = kind(fields, event)?;
    Ok(Step {
        delivery: fields.number("delivery")?,
        key: key(fields)?,
        claim: claim(fields)?,
        attempt: fields.optional("attempt", Fields::number)?.unwrap_or(1),
        generation: fields.optional("generation", Fields::number)?.unwrap_or(0),
        body: fields.optional("body", Fields::hex)?,
        cause: match kind {
            EventKind::Failed(_) | EventKind::Acked(_) => None,
            _ => fields.optional("cause", cause)?,
        },
        kind,
    })
}

fn key(fields: &Fields<'_>) -> Result<Option<DedupKey>, ParseError> {
    let bits = fields.optional::<u128>("key", Fields::hex)?;
    Ok(bits.map(|bits| DedupKey::from_bytes(bits.to_be_bytes())))
}

fn claim(fields: &Fields<'_>) -> Result<Option<ClaimMark>, ParseError> {
    let Some(token) = fields.optional("token", Fields::hex)? else { return Ok(None) };
    let until = fields.optional("until", Fields::number)?;
    Ok(Some(ClaimMark { until, ..ClaimMark::new(token, fields.number("fence")?) }))
}

fn kind(fields: &Fields<'_>, event: &str) -> Result<EventKind, ParseError> {
    Ok(match event {
        "claimed" => EventKind::Claimed(fields.word("before", BEFORES)?),
        "failed" => EventKind::Failed(cause(fields, "cause")?),
        "released" => EventKind::Released(release(fields)?),
        "acked" => EventKind::Acked(outcome(fields)?),
        "returned" => EventKind::Returned(disposition(fields)?),
        _ => fields.word("event", PLAIN)?,
    })
}

fn release(fields: &Fields<'_>) -> Result<Release, ParseError> {
    let releases = [
        ("failed", Release::Failed { not_before: fields.duration()? }),
        ("deferred", Release::Deferred { not_before: fields.duration()? }),
        ("not_started", Release::NotStarted),
        ("interrupted", Release::Interrupted),
        ("dead_lettered", Release::DeadLettered),
    ];
    fields.word("as", &releases)
}

fn disposition(fields: &Fields<'_>) -> Result<Disposition, ParseError> {
    let dispositions = [
        ("ack", Disposition::Ack),
        ("requeue", Disposition::Requeue { after: fields.duration()? }),
        ("release", Disposition::Release { after: fields.duration()? }),
        ("reject", Disposition::Reject),
        ("abandon", Disposition::Abandon),
    ];
    fields.word("disposition", &dispositions)
}

fn outcome(fields: &Fields<'_>) -> Result<Outcome, ParseError> {
    if fields.text("outcome")? == "dead_lettered" {
        return cause(fields, "cause").map(Outcome::DeadLettered);
    }
    fields.word("outcome", OUTCOMES)
}

fn cause(fields: &Fields<'_>, field: &'static str) -> Result<Cause, ParseError> {
    let word = fields.text(field)?;
    let known = CAUSES.iter().find(|cause| cause.name() == word);
    known.copied().ok_or_else(|| fields.error(field, "not a word that is known here"))
}

/// The fields of one line.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    line: usize,
}

impl<'a> Fields<'a> {
    fn error(&self, field: &'static str, problem: &'static str) -> ParseError {
        ParseError { line: self.line, field, problem }
    }

    fn optional<T>(
        &self,
        field: &'static str,
        read: impl FnOnce(&Self, &'static str) -> Result<T, ParseError>,
    ) -> Result<Option<T>, ParseError> {
        match self.map.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => read(self, field).map(Some),
        }
    }

    fn value(&self, field: &'static str) -> Result<&'a Value, ParseError> {
        self.map.get(field).ok_or_else(|| self.error(field, "missing"))
    }

    fn text(&self, field: &'static str) -> Result<&'a str, ParseError> {
        self.value(field)?.as_str().ok_or_else(|| self.error(field, "not a text"))
    }

    fn number<N: TryFrom<u64>>(&self, field: &'static str) -> Result<N, ParseError> {
        let number = self.value(field)?.as_u64().and_then(|number| N::try_from(number).ok());
        number.ok_or_else(|| self.error(field, "not a whole number in range"))
    }

    fn signed(&self, field: &'static str) -> Result<i64, ParseError> {
        self.value(field)?.as_i64().ok_or_else(|| self.error(field, "not a whole number in range"))
    }

    /// Micros; none is zero.
    fn duration(&self) -> Result<Duration, ParseError> {
        Ok(Duration::from_micros(self.optional("after", Self::number)?.unwrap_or(0)))
    }

    /// Exactly as many hexadecimal digits as the number has.
    fn hex<N: TryFrom<u128>>(&self, field: &'static str) -> Result<N, ParseError> {
        let text = self.text(field)?;
        let whole = text.len() == 2 * size_of::<N>() && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        let bits = u128::from_str_radix(text, 16).ok().filter(|_| whole);
        bits.and_then(|bits| N::try_from(bits).ok())
            .ok_or_else(|| self.error(field, "not a hexadecimal number of its length"))
    }

    fn word<T: Copy>(&self, field: &'static str, words: &[(&str, T)]) -> Result<T, ParseError> {
        let word = self.text(field)?;
        let known = words.iter().find(|(name, _)| *name == word);
        known.map(|(_, value)| *value).ok_or_else(|| self.error(field, "not a word that is known here"))
    }
}

// The words.

/// `returned`, however it was returned: the disposition says how.
fn event_name(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Returned(_) => "returned",
        kind => kind.name(),
    }
}

fn name_of<T: Copy + PartialEq>(words: &'static [(&'static str, T)], value: T) -> &'static str {
    words.iter().find(|(_, known)| *known == value).map_or("", |(name, _)| name)
}

const BEFORES: &[(&str, Before)] = &[
    ("first", Before::First),
    ("failed", Before::Failed),
    ("handed_back", Before::HandedBack),
    ("vanished", Before::Vanished),
];

const OUTCOMES: &[(&str, Outcome)] = &[
    ("handled", Outcome::Handled),
    ("handled_unrecorded", Outcome::HandledUnrecorded),
    ("handled_unchecked", Outcome::HandledUnchecked),
    ("duplicate", Outcome::Duplicate),
];

/// The events that are said in one word.
pub(super) const PLAIN: &[(&str, EventKind)] = &[
    ("received", EventKind::Received),
    ("identified", EventKind::Identified),
    ("duplicate", EventKind::Duplicate),
    ("waited", EventKind::Waited),
    ("started", EventKind::Started),
    ("ran", EventKind::Ran),
    ("completed", EventKind::Completed),
    ("gap", EventKind::Gap),
    ("lease_lost", EventKind::LeaseLost),
    ("forgotten", EventKind::Forgotten),
    ("copied", EventKind::Copied),
    ("unsettled", EventKind::Unsettled),
];

pub(super) const CAUSES: &[Cause] = &[
    Cause::Transient,
    Cause::Permanent,
    Cause::Deferred,
    Cause::Panic,
    Cause::Timeout,
    Cause::MaxRun,
    Cause::Exhausted,
    Cause::CrashSuspected,
    Cause::Expired,
    Cause::Undecodable,
    Cause::MissingId,
    Cause::InvalidId,
    Cause::IdConflict,
    Cause::Parked,
    Cause::InProgress,
    Cause::LeaseLost,
    Cause::StoreDown,
    Cause::DeadLetterDown,
    Cause::TooLarge,
    Cause::Overloaded,
    Cause::Interrupted,
];
