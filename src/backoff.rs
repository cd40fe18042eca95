//! How long to wait before trying again.

use std::time::Duration;

use crate::defaults;

/// Exponential backoff with full jitter: before the n-th retry, a random time between zero and
/// base × factor^(n-1), at most the cap.
///
/// Full jitter spreads a crowd best: see "Exponential Backoff And Jitter", Marc Brooker, AWS
/// Architecture Blog, 2015.
///
/// ```
/// use guestlist::Backoff;
/// use std::time::Duration;
/// let exact = Backoff::new(Duration::from_secs(1), 4, Duration::from_secs(60)).without_jitter();
/// assert_eq!(exact.delay(1), Duration::from_secs(1));
/// assert_eq!(exact.delay(3), Duration::from_secs(16));
/// assert_eq!(exact.delay(99), Duration::from_secs(60));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    base: Duration,
    factor: u32,
    cap: Duration,
    jitter: bool,
}

impl Backoff {
    /// From `base`, each `factor` times the one before, up to `cap`.
    pub const fn new(base: Duration, factor: u32, cap: Duration) -> Self {
        Self { base, factor, cap, jitter: true }
    }

    /// The delays between attempts: 1 s × 4 up to 5 min.
    pub(crate) const fn attempts() -> Self {
        Self::new(defaults::BACKOFF_BASE, defaults::BACKOFF_FACTOR, defaults::BACKOFF_CAP)
    }

    /// The delays between in-process tries: 50 ms × 4 up to 2 s.
    pub(crate) const fn tries() -> Self {
        Self::new(defaults::TRIES_BACKOFF_BASE, defaults::BACKOFF_FACTOR, defaults::RECONNECT_CAP)
    }

    /// The delays before a broker, a store or a destination is asked again: 100 ms × 2 up to 2 s.
    pub(crate) const fn reconnect() -> Self {
        Self::new(defaults::RECONNECT_BASE, 2, defaults::RECONNECT_CAP)
    }

    /// The same delays, exact: for tests, and where nobody else waits.
    #[must_use]
    pub const fn without_jitter(mut self) -> Self {
        self.jitter = false;
        self
    }

    /// The delay after the `n`-th failure, from 1.
    pub fn delay(&self, n: u32) -> Duration {
        let factor = self.factor.checked_pow(n.saturating_sub(1)).unwrap_or(u32::MAX);
        let delay = self.base.saturating_mul(factor).min(self.cap);
        if self.jitter { delay.mul_f64(crate::random::unit()) } else { delay }
    }

    /// Whether the delays are drawn at random.
    pub(crate) const fn has_jitter(&self) -> bool {
        self.jitter
    }

    /// The longest delay there is.
    pub const fn cap(&self) -> Duration {
        self.cap
    }
}
