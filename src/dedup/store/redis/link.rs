//! One multiplexed connection that is made anew when it is lost.
//!
//! Not the client's own `ConnectionManager`, for four reasons: it does not ask Sentinel again; it keeps a connection
//! that only times out (a peer that vanished without a word) until the kernel gives up on it, after many
//! minutes; it keeps one to a former master, now read-only; and after a refusal in the handshake it stays broken for ever.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster_async::ClusterConnection;
use redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, Value};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::target::Target;
use crate::Backoff;
use crate::defaults::REDIS_ANSWER;

/// A call that its caller gave up after this long unanswered casts doubt on the connection too.
const DOUBT: Duration = Duration::from_millis(250);

/// A connection that was replaced sooner than this after it was made is not replaced at once again.
const STEADY: Duration = Duration::from_secs(2);

/// A connection of either kind. Cheap to clone.
#[derive(Clone)]
pub(super) enum Connection {
    Node(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Connection {
    async fn ask(&mut self, command: &Cmd) -> Result<Value, RedisError> {
        match self {
            Self::Node(connection) => connection.send_packed_command(command).await,
            Self::Cluster(connection) => connection.req_packed_command(command).await,
        }
    }
}

/// The way to Redis. Clones share it.
#[derive(Clone)]
pub(super) struct Link(Arc<Inner>);

struct Inner {
    target: Target,
    state: watch::Sender<State>,
    /// What keys begin with.
    prefix: Arc<str>,
    /// When the last answer came, in milliseconds of the link's life.
    heard: AtomicU64,
    since: Instant,
    /// Where to connect again if a call is dropped outside of any runtime.
    runtime: Handle,
}

enum State {
    Up(Live),
    /// A task is at work on a new one, of this number; this is why there is none.
    Down(RedisError, u64),
}

#[derive(Clone)]
struct Live {
    connection: Connection,
    /// Which connection of the link this is.
    number: u64,
    /// All keys are at the other end of it.
    whole: bool,
    since: Instant,
    /// How many in a row were short-lived or failed, before it.
    failures: u32,
}

impl Link {
    /// Connects; tries once.
    pub(super) async fn open(target: Target, prefix: Arc<str>) -> Result<Self, RedisError> {
        let (connection, whole) = target.open(&prefix).await?;
        let live = Live { connection, number: 0, whole, since: Instant::now(), failures: 0 };
        let (state, _) = watch::channel(State::Up(live));
        let (heard, since, runtime) = (AtomicU64::new(0), Instant::now(), Handle::current());
        Ok(Self(Arc::new(Inner { target, state, prefix, heard, since, runtime })))
    }

    pub(super) fn target(&self) -> &Target {
        &self.0.target
    }

    pub(super) fn prefix(&self) -> &str {
        &self.0.prefix
    }

    /// The number of the connection, or of the next one.
    pub(super) fn number(&self) -> u64 {
        match &*self.0.state.borrow() {
            State::Up(live) => live.number,
            State::Down(_, next) => *next,
        }
    }

    /// Whether the keys are on several servers, as far as is known now.
    pub(super) fn is_spread(&self) -> bool {
        self.0.target.is_cluster() || matches!(&*self.0.state.borrow(), State::Up(live) if !live.whole)
    }

    /// It was said to be whole, and is not any more.
    pub(super) fn learn_that_it_is_spread(&self) {
        self.0.state.send_if_modified(|state| {
            if let State::Up(live) = state {
                live.whole = false;
            }
            false
        });
    }

    /// Waits while there is no connection, for one attempt to make one.
    pub(super) async fn ready(&self) {
        let _ = self.live().await;
    }

    /// Asks, and once more on a new connection if this one turns out to be closed: the idle one that a
    /// server or a firewall closed is nobody's concern. So a command must bear being asked twice.
    pub(super) async fn ask(&self, command: &Cmd) -> Result<Value, RedisError> {
        match self.ask_once(command).await {
            Err(error) if error.is_connection_dropped() => self.ask_once(command).await,
            answer => answer,
        }
    }

    /// Asks, once.
    pub(super) async fn ask_once(&self, command: &Cmd) -> Result<Value, RedisError> {
        let live = self.live().await?;
        self.ask_by(live, command).await
    }

    /// Asks, once, without waiting for a connection.
    ///
    /// # Errors
    ///
    /// Also if the command has several keys, which may not be at the other end.
    pub(super) async fn ask_now(&self, command: &Cmd, keys: usize) -> Result<Value, RedisError> {
        let live = match &*self.0.state.borrow() {
            State::Up(live) if keys > 1 && !live.whole => return Err(spread()),
            State::Up(live) => live.clone(),
            State::Down(why, _) => return Err(why.clone()),
        };
        self.ask_by(live, command).await
    }

    /// Errors in a list of answers stay in it.
    async fn ask_by(&self, mut live: Live, command: &Cmd) -> Result<Value, RedisError> {
        let answer = match live.connection.ask(command).await {
            Ok(Value::ServerError(error)) => Err(error.into()),
            answer => answer,
        };
        match spoiler_in(&answer) {
            Some(error) => self.replace(live.number, &error),
            None => self.0.heard.store(self.age(), Ordering::Relaxed),
        }
        answer
    }

    fn age(&self) -> u64 {
        u64::try_from(self.0.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Nothing was heard for so long.
    fn is_silent_for(&self, moment: Duration) -> bool {
        let heard = Duration::from_millis(self.0.heard.load(Ordering::Relaxed));
        self.0.since.elapsed().saturating_sub(heard) >= moment
    }

    /// A call that begins, to be [`answered`](Unanswered::answered).
    pub(super) fn unanswered(&self) -> Unanswered<'_> {
        let number = match &*self.0.state.borrow() {
            State::Up(live) => Some(live.number),
            State::Down(..) => None,
        };
        Unanswered { link: self, number, since: Instant::now() }
    }

    /// The connection; while there is none, what comes of the attempt to make one.
    async fn live(&self) -> Result<Live, RedisError> {
        if let State::Up(live) = &*self.0.state.borrow() {
            return Ok(live.clone());
        }
        let mut state = self.0.state.subscribe();
        let usable = |state: &State| match state {
            State::Up(live) => Some(live.clone()),
            State::Down(..) => None,
        };
        if let Some(live) = usable(&state.borrow_and_update()) {
            return Ok(live);
        }
        let _ = timeout(REDIS_ANSWER, state.changed()).await;
        match &*state.borrow() {
            State::Up(live) => Ok(live.clone()),
            State::Down(error, _) => Err(error.clone()),
        }
    }

    /// Has the connection of this number replaced, unless it was already.
    fn replace(&self, number: u64, why: &RedisError) {
        let mut lost = None;
        self.0.state.send_if_modified(|state| match state {
            State::Up(live) if live.number == number => {
                lost = Some(live.clone());
                *state = State::Down(why.clone(), number + 1);
                true
            }
            _ => false,
        });
        if let Some(lost) = lost {
            tracing::warn!(target: "guestlist", redis = %self.0.target, error = %why, "the connection to Redis is lost, connecting again");
            let runtime = Handle::try_current().unwrap_or_else(|_| self.0.runtime.clone());
            runtime.spawn(reconnect(Arc::downgrade(&self.0), lost));
        }
    }
}

/// Tries until there is a connection, or nobody is left who wants it.
async fn reconnect(link: Weak<Inner>, lost: Live) {
    let mut failures = if lost.since.elapsed() < STEADY { lost.failures + 1 } else { 0 };
    let number = lost.number + 1;
    drop(lost);
    loop {
        if failures > 0 {
            sleep(Backoff::reconnect().delay(failures)).await;
        }
        let Some(link) = link.upgrade() else { return };
        match link.target.open(&link.prefix).await {
            Ok((connection, whole)) => {
                let live = Live { connection, number, whole, since: Instant::now(), failures };
                link.state.send_replace(State::Up(live));
                tracing::info!(target: "guestlist", redis = %link.target, "connected to Redis again");
                return;
            }
            Err(error) => {
                tracing::debug!(target: "guestlist", redis = %link.target, %error, "connecting to Redis failed");
                link.state.send_replace(State::Down(error, number));
            }
        }
        failures = failures.saturating_add(1);
    }
}

/// The error after which the connection is of no more use; it may be one of a list of answers.
fn spoiler_in(answer: &Result<Value, RedisError>) -> Option<RedisError> {
    match answer {
        Err(error) => Some(error.clone()).filter(spoils_the_connection),
        Ok(Value::Array(answers)) => answers.iter().find_map(|answer| match answer {
            Value::ServerError(error) => Some(error.clone().into()).filter(spoils_the_connection),
            _ => None,
        }),
        Ok(_) => None,
    }
}

/// In the server's own words.
fn spread() -> RedisError {
    (ErrorKind::Server(ServerErrorKind::CrossSlot), "the keys are on several servers").into()
}

/// Whether the next call fares better on another connection.
fn spoils_the_connection(error: &RedisError) -> bool {
    let moved_on =
        matches!(error.kind(), ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown));
    error.is_unrecoverable_error() || error.is_timeout() || moved_on || says_read_only(error)
}

/// Redis 6 and older wrap what a command in a script was refused for into an error of the script.
pub(super) fn says_read_only(error: &RedisError) -> bool {
    error.code() == Some("READONLY") || error.detail().is_some_and(|detail| detail.contains("READONLY "))
}

/// A call under way. The layer's deadline is often shorter than ours, and only drops it.
pub(super) struct Unanswered<'a> {
    link: &'a Link,
    /// Of the connection when the call began.
    number: Option<u64>,
    since: Instant,
}

impl Unanswered<'_> {
    pub(super) fn answered(mut self) {
        self.number = None;
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        // A connection that answers others is only slow.
        let silent = self.since.elapsed() >= DOUBT && self.link.is_silent_for(DOUBT);
        if let Some(number) = self.number.filter(|_| silent) {
            let why = std::io::Error::from(std::io::ErrorKind::TimedOut);
            self.link.replace(number, &why.into());
        }
    }
}
