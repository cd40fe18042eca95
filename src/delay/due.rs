//! When a message is due.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::{Span, SpanRelativeTo, Timestamp};

use super::{DELIVER_AFTER, DELIVER_AT, LONGEST};
use crate::Message;

/// A header that says no time. Not what it says: that is the sender's, and this goes into logs and letters (I16).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoTime {
    header: &'static str,
    why: &'static str,
}

impl fmt::Display for NoTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the value of the header `{}` is {}", self.header, self.why)
    }
}

impl std::error::Error for NoTime {}

/// From when on the message may be handled; `None`: it does not say.
pub(super) fn due(message: &Message, now: SystemTime) -> Result<Option<SystemTime>, NoTime> {
    if let Some(settled) = message.due() {
        return Ok(Some(settled));
    }
    let due = match (text(message, DELIVER_AT)?, text(message, DELIVER_AFTER)?) {
        (None, None) => return Ok(None),
        (Some(at), _) => at_time(at)?,
        (None, Some(after)) => start(message, now)
            .checked_add(length(after)?)
            .ok_or_else(|| no_time(DELIVER_AFTER, "no time that a clock shows"))?,
    };
    if due > now + LONGEST {
        let header = if text(message, DELIVER_AT)?.is_some() { DELIVER_AT } else { DELIVER_AFTER };
        return Err(no_time(header, "more than 366 days away"));
    }
    message.set_due(due);
    Ok(Some(due))
}

fn text<'a>(message: &'a Message, header: &'static str) -> Result<Option<&'a str>, NoTime> {
    match message.headers().get(header) {
        None => Ok(None),
        Some(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Some(text.trim())),
            Err(_) => Err(no_time(header, "not text")),
        },
    }
}

/// AMQP's timestamp is the sender's and in whole seconds: there a delay begins when a consumer sees the message.
fn start(message: &Message, now: SystemTime) -> SystemTime {
    let stored = message.timestamp().filter(|_| message.source().system != "rabbitmq");
    // In a loop of one's own a delay is waited out in the process, and the broker hands the very message out again.
    let waited =
        message.redelivered() && message.source().system == "rabbitmq" && message.source().queue.is_empty();
    if waited { UNIX_EPOCH } else { stored.unwrap_or(now) }
}

fn at_time(text: &str) -> Result<SystemTime, NoTime> {
    if let Some(seconds) = seconds(text) {
        return UNIX_EPOCH
            .checked_add(seconds)
            .ok_or_else(|| no_time(DELIVER_AT, "no time that a clock shows"));
    }
    let why = "neither a time like 2027-01-01T00:00:00Z nor seconds since 1970";
    let at: Timestamp = text.parse().map_err(|_| no_time(DELIVER_AT, why))?;
    SystemTime::try_from(at).map_err(|_| no_time(DELIVER_AT, "no time that this system can show"))
}

fn length(text: &str) -> Result<Duration, NoTime> {
    if let Some(seconds) = seconds(text) {
        return Ok(seconds.min(LONGEST * 2));
    }
    let why = "no length of time like 90s, 1h 30m, PT90S or 1.5";
    let days = SpanRelativeTo::days_are_24_hours();
    let length = text.parse::<Span>().and_then(|span| span.to_duration(days));
    let length = length.map_err(|_| no_time(DELIVER_AFTER, why))?;
    // Some time ago, as it were: due.
    Ok(Duration::try_from(length).unwrap_or_default().min(LONGEST * 2))
}

/// A number without a unit. What is none, is negative, or is not finite is left to the other readings.
fn seconds(text: &str) -> Option<Duration> {
    let number: f64 = text.bytes().all(|b| b.is_ascii_digit() || b == b'.').then(|| text.parse().ok())??;
    Duration::try_from_secs_f64(number).ok()
}

const fn no_time(header: &'static str, why: &'static str) -> NoTime {
    NoTime { header, why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{MessageBuilder, Source};

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn says(header: &str, value: impl Into<bytes::Bytes>) -> MessageBuilder {
        Message::builder("").header(header, value)
    }

    /// How long from NOW.
    fn read(message: MessageBuilder) -> Result<Option<f64>, String> {
        let now = UNIX_EPOCH + NOW;
        let due = due(&message.build(), now).map_err(|no| no.to_string())?;
        Ok(due.map(|due| match due.duration_since(now) {
            Ok(ahead) => ahead.as_secs_f64(),
            Err(past) => -past.duration().as_secs_f64(),
        }))
    }

    #[test]
    fn times_and_lengths_in_each_form_are_read() {
        assert_eq!(read(Message::builder("")), Ok(None));
        for (header, value, left) in [
            (DELIVER_AT, "1800000010", 10.0),
            (DELIVER_AT, " 1800000000.25 ", 0.25),
            (DELIVER_AT, "0", -1_800_000_000.0),
            (DELIVER_AT, "2027-01-15T08:00:10Z", 10.0),
            (DELIVER_AT, "2027-01-15T09:00:10.5+01:00", 10.5),
            (DELIVER_AFTER, "90", 90.0),
            (DELIVER_AFTER, "0.1", 0.1),
            (DELIVER_AFTER, "90s", 90.0),
            (DELIVER_AFTER, "100ms", 0.1),
            (DELIVER_AFTER, "1h 30m", 5400.0),
            (DELIVER_AFTER, "PT1M30S", 90.0),
            (DELIVER_AFTER, "8760h", 31_536_000.0),
            (DELIVER_AFTER, "300 days", 25_920_000.0),
            (DELIVER_AFTER, "P1DT1S", 86_401.0),
            (DELIVER_AFTER, "-5s", 0.0),
        ] {
            let found = read(says(header, value)).unwrap().unwrap();
            assert!((found - left).abs() < 1e-6, "{header} {value}: {found}");
        }
    }

    #[test]
    fn what_is_no_time_is_named_and_never_due() {
        for (header, value) in [
            (DELIVER_AT, "tomorrow"),
            (DELIVER_AT, ""),
            (DELIVER_AT, "-5"),
            (DELIVER_AT, "NaN"),
            (DELIVER_AT, "1800000000000"),
            (DELIVER_AT, "99999999999999999999999999999999"),
            (DELIVER_AT, "2027-01-15"),
            (DELIVER_AT, "2027-01-15T08:00:10"),
            (DELIVER_AFTER, "soon"),
            (DELIVER_AFTER, "inf"),
            (DELIVER_AFTER, "1e9"),
            (DELIVER_AFTER, "400 days"),
            (DELIVER_AFTER, "1 month"),
            (DELIVER_AFTER, "9999999999999999999999"),
        ] {
            let error = read(says(header, value)).unwrap_err();
            assert!(error.contains(header), "{error}");
        }
        assert!(read(says(DELIVER_AT, &b"\xff"[..])).unwrap_err().contains("not text"));
    }

    #[test]
    fn i16_an_error_shows_nothing_of_what_the_header_says() {
        const CARD: &str = "4111111111111111";
        for header in [DELIVER_AT, DELIVER_AFTER] {
            for value in [CARD.to_owned(), format!("card {CARD}"), format!("\n{CARD}\n"), CARD.repeat(1000)] {
                let no_time = due(&says(header, value).build(), UNIX_EPOCH + NOW).unwrap_err();
                let shown = format!("{no_time} {no_time:?}");
                assert!(shown.contains(header) && !shown.contains("4111"), "{shown}");
            }
        }
    }

    #[test]
    fn a_length_counts_from_where_the_broker_stored_the_message() {
        let stored = UNIX_EPOCH + NOW - Duration::from_secs(30);
        let from = |system| says(DELIVER_AFTER, "40").timestamp(stored).source(Source::new(system, "q"));
        assert_eq!(read(from("nats")), Ok(Some(10.0)));
        assert_eq!(
            read(from("rabbitmq")),
            Ok(Some(40.0)),
            "the sender's word, in whole seconds, is not used"
        );
    }

    #[test]
    fn a_forged_time_of_a_copy_neither_delays_for_ever_nor_keeps_a_message_young() {
        for never in ["18446744073709551615", "9999999999999999", "99999999999999"] {
            let message = says("guestlist-due", never).build();
            assert_eq!(message.due(), None, "{never}");
            assert_eq!(read(says("guestlist-due", never).header(DELIVER_AFTER, "10")), Ok(Some(10.0)));
        }
        assert_eq!(read(says("guestlist-due", "1800000010000")), Ok(Some(10.0)), "as we write it");
    }

    #[test]
    fn what_was_found_first_stands_for_every_clone() {
        let message = says(DELIVER_AFTER, "10").build();
        let clone = message.clone();
        let first = due(&message, UNIX_EPOCH + NOW).unwrap();
        assert_eq!(due(&clone, UNIX_EPOCH + NOW + Duration::from_secs(7)).unwrap(), first);
    }
}
