//! Where tokens and jitter come from: the thread's cryptographic generator, or a seed that a test
//! gave this thread, so that a run can be played again.

/// 128 random bits.
pub(crate) fn bits() -> u128 {
    #[cfg(feature = "testing")]
    if let Some(bits) = seeded::bits() {
        return bits;
    }
    rand::random()
}

/// A random number from 0 up to, but not, 1.
pub(crate) fn unit() -> f64 {
    #[cfg(feature = "testing")]
    if let Some(bits) = seeded::bits() {
        let top: u32 = (bits >> 96) as u32;
        return f64::from(top) / (f64::from(u32::MAX) + 1.0);
    }
    rand::random()
}

#[cfg(feature = "testing")]
pub(crate) mod seeded {
    use std::cell::Cell;
    use std::marker::PhantomData;

    thread_local! {
        static STATE: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// While it lives, this thread's tokens and jitter follow from a seed. See [`seed_randomness`].
    #[derive(Debug)]
    pub struct SeededRandomness {
        before: Option<u64>,
        /// It belongs to the thread that made it.
        _here: PhantomData<*const ()>,
    }

    /// Makes the tokens and the jitter of this thread follow from a seed, until the guard is dropped: for
    /// simulations that must play again what they once played. Tokens so made can be guessed.
    ///
    /// With it, and on a paused clock, a consumer in a runtime of one thread always does the same.
    ///
    /// ```
    /// use guestlist::dedup::protocol::Token;
    /// use guestlist::testing::seed_randomness;
    /// let token = |seed| {
    ///     let _seeded = seed_randomness(seed);
    ///     Token::random()
    /// };
    /// assert_eq!(token(7), token(7));
    /// assert_ne!(token(7), token(8));
    /// ```
    #[must_use = "dropped, the thread is random again"]
    pub fn seed_randomness(seed: u64) -> SeededRandomness {
        SeededRandomness { before: STATE.replace(Some(seed)), _here: PhantomData }
    }

    impl Drop for SeededRandomness {
        fn drop(&mut self) {
            STATE.set(self.before);
        }
    }

    pub(super) fn bits() -> Option<u128> {
        let mut state = STATE.get()?;
        let (high, low) = (next(&mut state), next(&mut state));
        STATE.set(Some(state));
        Some(u128::from(high) << 64 | u128::from(low))
    }

    /// `SplitMix64`: one word of state, every seed a good one.
    fn next(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
