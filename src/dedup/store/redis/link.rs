//! One multiplexed connection that is made anew when it is lost.
//!
//! Not the client's own `ConnectionManager`, for four reasons: it does not ask Sentinel again; it keeps a connection
//! that only times out (a peer that vanished without a word) until the kernel gives up on it, after many
//! minutes; it keeps one to a former master, now read-only; and after a refusal in the handshake it stays broken for ever.

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

/// A connection of either kind. Cheap to clone; what is in flight on an old clone may still end well.
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
    /// Where to connect again if a call is dropped outside of any runtime.
    runtime: Handle,
}

enum State {
    Up(Live),
    /// A task is at work on a new one; this is why there is none.
    Down(RedisError),
}

#[derive(Clone)]
struct Live {
    connection: Connection,
    /// Which connection of the link this is.
    number: u64,
    since: Instant,
    /// How many in a row were short-lived or failed, before it.
    failures: u32,
}

impl Link {
    /// Connects; tries once.
    pub(super) async fn open(target: Target) -> Result<Self, RedisError> {
        let connection = target.open().await?;
        let live = Live { connection, number: 0, since: Instant::now(), failures: 0 };
        let (state, _) = watch::channel(State::Up(live));
        Ok(Self(Arc::new(Inner { target, state, runtime: Handle::current() })))
    }

    pub(super) fn target(&self) -> &Target {
        &self.0.target
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
        let mut live = self.live().await?;
        let unanswered =
            Unanswered { link: self, number: live.number, since: Instant::now(), answered: false };
        let answer = live.connection.ask(command).await;
        unanswered.answered();
        match answer {
            Ok(answer) => answer.extract_error(),
            Err(error) => Err(error),
        }
        .inspect_err(|error| {
            if spoils_the_connection(error) {
                self.replace(live.number, error);
            }
        })
    }

    /// The connection; while there is none, what comes of the attempt to make one.
    async fn live(&self) -> Result<Live, RedisError> {
        if let State::Up(live) = &*self.0.state.borrow() {
            return Ok(live.clone());
        }
        let mut state = self.0.state.subscribe();
        let usable = |state: &State| match state {
            State::Up(live) => Some(live.clone()),
            State::Down(_) => None,
        };
        if let Some(live) = usable(&state.borrow_and_update()) {
            return Ok(live);
        }
        let _ = timeout(REDIS_ANSWER, state.changed()).await;
        match &*state.borrow() {
            State::Up(live) => Ok(live.clone()),
            State::Down(error) => Err(error.clone()),
        }
    }

    /// Has the connection of this number replaced, unless it was already.
    fn replace(&self, number: u64, why: &RedisError) {
        let mut lost = None;
        self.0.state.send_if_modified(|state| match state {
            State::Up(live) if live.number == number => {
                lost = Some(live.clone());
                *state = State::Down(why.clone());
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
        match link.target.open().await {
            Ok(connection) => {
                let live = Live { connection, number, since: Instant::now(), failures };
                link.state.send_replace(State::Up(live));
                tracing::info!(target: "guestlist", redis = %link.target, "connected to Redis again");
                return;
            }
            Err(error) => {
                tracing::debug!(target: "guestlist", redis = %link.target, %error, "connecting to Redis failed");
                link.state.send_replace(State::Down(error));
            }
        }
        failures = failures.saturating_add(1);
    }
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
struct Unanswered<'a> {
    link: &'a Link,
    number: u64,
    since: Instant,
    answered: bool,
}

impl Unanswered<'_> {
    fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.answered && self.since.elapsed() >= DOUBT {
            let why = std::io::Error::from(std::io::ErrorKind::TimedOut);
            self.link.replace(self.number, &why.into());
        }
    }
}
