//! Points in time that cannot overflow.

use std::time::Duration;

use tokio::time::Instant;

/// Longer than any process lives.
const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 30);

/// So long after `start`. "For ever", as a setting, is a time that never comes, and not a panic.
pub(crate) fn after(start: Instant, length: Duration) -> Instant {
    start + length.min(FAR)
}

/// So long from now.
pub(crate) fn from_now(length: Duration) -> Instant {
    after(Instant::now(), length)
}
