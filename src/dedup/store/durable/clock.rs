//! The store's clock: it never goes back, not over a restart either.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::dedup::protocol::Micros;

/// Monotonic from the store's opening on. Not tokio's clock: the store works in threads of its
/// own, where a paused clock is not seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    opened: Instant,
    opened_at: Micros,
}

impl Clock {
    /// Starts at the wall clock's time, or at the highest that the store has seen, if that is
    /// later: a wall clock that was set back would make fences shrink and windows longer.
    pub(super) fn start(seen: Micros) -> Self {
        Self { opened: Instant::now(), opened_at: wall_clock().max(seen) }
    }

    pub(super) fn opened_at(&self) -> Micros {
        self.opened_at
    }

    pub(super) fn now(&self) -> Micros {
        self.opened_at.saturating_add(micros(self.opened.elapsed()))
    }
}

fn wall_clock() -> Micros {
    micros(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

pub(super) fn micros(duration: Duration) -> Micros {
    Micros::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}
