//! The gate of a queue: closed while its store or its dead-letter destination is away.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::clock::after;

/// Who is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Away {
    Store,
    DeadLetters,
}

/// One gate per queue. Whoever finds something away closes it; whoever is answered again opens
/// it; the consumer stops pulling while it is closed, and gives up what it holds in the end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gate(Arc<Shared>);

/// Not a `watch` channel: that wakes those who wait in random order, and a run could not be played again.
#[derive(Debug, Default)]
struct Shared {
    state: RwLock<State>,
    changed: Notify,
    stuck: AtomicU64,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    store_away: bool,
    dead_letters_away: bool,
    since: Option<Instant>,
    given_up: bool,
}

impl State {
    fn closed(&self) -> bool {
        self.store_away || self.dead_letters_away
    }

    fn set(&mut self, who: Away, away: bool) -> bool {
        let flag = match who {
            Away::Store => &mut self.store_away,
            Away::DeadLetters => &mut self.dead_letters_away,
        };
        if *flag == away {
            return false;
        }
        *flag = away;
        self.since = if self.closed() { self.since.or_else(|| Some(Instant::now())) } else { None };
        true
    }
}

impl Gate {
    pub(crate) fn close(&self, who: Away) {
        self.change(|state| state.set(who, true));
    }

    pub(crate) fn open(&self, who: Away) {
        // Read first: opening an open gate is the common case, and must not lock for writing.
        if self.is_closed() {
            self.change(|state| state.set(who, false));
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.state().closed()
    }

    /// Who is away, for the status.
    pub(crate) fn away(&self) -> Option<Away> {
        let state = self.0.state();
        match state {
            State { store_away: true, .. } => Some(Away::Store),
            State { dead_letters_away: true, .. } => Some(Away::DeadLetters),
            _ => None,
        }
    }

    /// So many runs are past their end and have not returned. It closes nothing: the others go on.
    pub(crate) fn set_stuck(&self, runs: u64) {
        self.0.stuck.store(runs, Ordering::Relaxed);
    }

    pub(crate) fn stuck(&self) -> u64 {
        self.0.stuck.load(Ordering::Relaxed)
    }

    /// Ends when the gate is open.
    pub(crate) fn opened(&self) -> impl Future<Output = ()> + Send + 'static {
        self.until(|state| !state.closed())
    }

    /// Ends when the gate has been closed for `hold`.
    pub(crate) async fn closed_for(&self, hold: Duration) {
        loop {
            self.until(State::closed).await;
            let since = self.0.state().since.unwrap_or_else(Instant::now);
            tokio::select! {
                biased;
                () = self.opened() => {}
                () = tokio::time::sleep_until(after(since, hold)) => return,
            }
        }
    }

    /// The consumer asks the broker for no more: what is in hand may be let go.
    pub(crate) fn give_up(&self) {
        self.change(|state| !std::mem::replace(&mut state.given_up, true));
    }

    /// Ends when the consumer has given up.
    pub(crate) fn given_up(&self) -> impl Future<Output = ()> + Send + 'static {
        self.until(|state| state.given_up)
    }

    /// A new subscription tries its luck.
    pub(crate) fn reset(&self) {
        self.change(|state| {
            *state = State::default();
            true
        });
    }

    fn until(
        &self,
        done: impl Fn(&State) -> bool + Send + Sync + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        let gate = Arc::clone(&self.0);
        async move {
            loop {
                // Made before the look: it hears of every change from here on.
                let changed = gate.changed.notified();
                if done(&gate.state()) {
                    return;
                }
                changed.await;
            }
        }
    }

    /// Says so to those who wait, if it was one.
    fn change(&self, change: impl FnOnce(&mut State) -> bool) {
        let changed = change(&mut self.0.state.write().unwrap_or_else(PoisonError::into_inner));
        if changed {
            self.0.changed.notify_waiters();
        }
    }
}

impl Shared {
    fn state(&self) -> State {
        *self.state.read().unwrap_or_else(PoisonError::into_inner)
    }
}
