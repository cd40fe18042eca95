//! Long delays: copies that wait in the stream of our own, and come back when they are due.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::client::Request;
use jiff::Timestamp;
use tokio::time::Instant;

use super::again;
use super::connect::Link;
use super::publish::{self, Marked};
use super::topology::{self, Names};
use crate::broker::{BrokerError, BrokerErrorKind, Copy, copy};

/// Publishes the copies that wait for a long delay.
pub(super) struct Holds {
    link: Link,
    limit: Duration,
    names: Names,
    /// The server keeps the time; else a copy is handed over at once, and back until it is due.
    schedules: bool,
    clock: Clock,
}

impl Holds {
    pub(super) fn new(link: &Link, limit: Duration, names: &Names, schedules: bool, clock: Clock) -> Self {
        Self { link: link.clone(), limit, names: names.clone(), schedules, clock }
    }

    /// Whether a copy that waits is out of the way of its durable, in whose stream it waits.
    pub(super) fn schedules(&self) -> bool {
        self.schedules
    }

    /// Ends when the copy is confirmed, in our own stream. `delivery` names what is copied, and no other delivery: a
    /// copy of the same one takes the place of the first.
    pub(super) async fn publish(
        &self,
        copy: &Copy<'_>,
        delivery: &str,
        delay: Duration,
    ) -> Result<(), BrokerError> {
        let due = self.clock.now() + delay;
        let subject =
            if self.schedules { again::held(&self.names, delivery) } else { self.names.subject.clone() };
        let marks = self.marks(copy, delay, due);
        let marked = Marked { id: delivery, marks, stream: Some(self.names.stream.clone()) };
        publish::permitted(&self.link, self.limit, &subject, copy, marked).await
    }

    fn marks(&self, copy: &Copy<'_>, delay: Duration, due: SystemTime) -> Vec<(&'static str, String)> {
        let stored = copy.message().timestamp().and_then(|stored| stored.duration_since(UNIX_EPOCH).ok());
        let stored = stored.map(|stored| (copy::TIMESTAMP, stored.as_millis().to_string()));
        let mut marks: Vec<_> = stored.into_iter().collect();
        if self.schedules {
            marks.push(("Nats-Schedule", format!("@at {}", at(due))));
            marks.push(("Nats-Schedule-Target", self.names.subject.clone()));
        } else {
            marks.push((copy::HOLD, millis(delay).to_string()));
        }
        marks
    }

    /// It is not earlier than this by the server's clock.
    pub(super) fn saw(&self, stored: SystemTime) {
        self.clock.saw(stored);
    }

    /// How long a copy has still to wait that was stored then.
    pub(super) fn left(&self, hold: Duration, stored: SystemTime) -> Duration {
        let waited = self.clock.now().duration_since(stored).unwrap_or_default();
        hold.saturating_sub(waited)
    }
}

/// Up: not even a millisecond early.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}

fn at(due: SystemTime) -> Timestamp {
    let since = due.duration_since(UNIX_EPOCH).unwrap_or_default();
    let millis = i64::try_from(millis(since)).unwrap_or(i64::MAX);
    Timestamp::from_millisecond(millis).unwrap_or(Timestamp::MAX)
}

/// The server's time, as it was when it was asked, and as long ago as that is: no wall clock of this machine's is
/// compared with the server's.
pub(super) struct Clock {
    server: SystemTime,
    seen: Instant,
    /// By how many nanoseconds it lagged at most: no clock of ours goes on while this machine is suspended.
    lag: AtomicU64,
}

impl Clock {
    /// Servers before 2.10 do not say: there it is this machine's, as it is now.
    ///
    /// # Errors
    ///
    /// `Unreachable`: it cannot be learned. By a clock that is behind the server's, a schedule would be over before it
    /// begins, and the copy would go round and round.
    pub(super) async fn of(link: &Link, stream: &str, schedules: bool) -> Result<Self, BrokerError> {
        let asked_at = Instant::now();
        let (act, api) = ("learn the server's time", format!("STREAM.INFO.{stream}"));
        let asked = link.client.send_request(format!("$JS.API.{api}"), Request::new()).await;
        let answer = asked.map_err(|error| topology::no_answer(act, &api, error))?;
        // What the answer takes makes a copy late, never early: a schedule by a clock that is ahead, and what is left to
        // wait by one that is behind.
        let seen = if schedules { asked_at } else { Instant::now() };
        match time_in(&answer.payload) {
            Some(server) => Ok(Self::new(server, seen)),
            None if schedules => {
                let what = format!("cannot {act}: its answer to `$JS.API.{api}` has no `ts`");
                Err(BrokerError::new(BrokerErrorKind::Unreachable, what))
            }
            None => Ok(Self::new(SystemTime::now(), Instant::now())),
        }
    }

    fn new(server: SystemTime, seen: Instant) -> Self {
        Self { server, seen, lag: AtomicU64::new(0) }
    }

    fn now(&self) -> SystemTime {
        self.reckoned() + Duration::from_nanos(self.lag.load(Ordering::Relaxed))
    }

    fn reckoned(&self) -> SystemTime {
        self.server + self.seen.elapsed()
    }

    /// What the server has stored is not of the future.
    fn saw(&self, stored: SystemTime) {
        let lag = stored.duration_since(self.reckoned()).unwrap_or_default();
        self.lag.fetch_max(u64::try_from(lag.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

fn time_in(answer: &[u8]) -> Option<SystemTime> {
    #[derive(serde::Deserialize)]
    struct Answer {
        ts: String,
    }
    let answer: Answer = serde_json::from_slice(answer).ok()?;
    SystemTime::try_from(answer.ts.parse::<Timestamp>().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_time_is_read_and_a_schedule_is_never_early() {
        let time = time_in(br#"{"config":{},"ts":"2026-11-30T21:06:21.573070758Z"}"#).unwrap();
        assert_eq!(at(time).to_string(), "2026-11-30T21:06:21.574Z");
        assert_eq!(at(UNIX_EPOCH + Duration::from_secs(1)).to_string(), "1970-01-01T00:00:01Z");
        assert_eq!(time_in(br#"{"config":{}}"#), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_is_never_behind_what_the_server_has_stored() {
        let time = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let clock = Clock::new(time(100), Instant::now());
        clock.saw(time(90));
        assert_eq!(clock.now(), time(100), "what was stored earlier says nothing");
        clock.saw(time(700));
        assert_eq!(clock.now(), time(700));
        tokio::time::advance(Duration::from_secs(5)).await;
        clock.saw(time(702));
        assert_eq!(clock.now(), time(705), "it goes on from there");
    }
}
