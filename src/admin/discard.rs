//! [`Discard`]: letters are removed for good.

use async_trait::async_trait;

use super::walk::{Act, Bounds};
use super::{Fate, Listed, Treated};
use crate::broker::Letters;
use crate::broker::copy::escape;
use crate::{CancellationToken, Error, defaults};

/// How letters are removed for good, and why.
#[derive(Clone, Debug)]
pub struct Discard {
    pub(super) reason: String,
    pub(super) dry_run: bool,
    pub(super) bounds: Bounds,
}

impl Discard {
    /// For this reason, which the audit event of each letter tells: escaped, and at most 1 KiB of it. An empty one is refused.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: escape(reason.into().trim(), defaults::ERROR_TEXT),
            dry_run: false,
            bounds: Bounds::default(),
        }
    }

    /// Only says which letters would be removed.
    #[must_use]
    pub fn dry_run(mut self) -> Self {
        self.dry_run = true;
        self
    }

    /// Ends after this many were removed.
    #[must_use]
    pub fn limit(mut self, letters: u64) -> Self {
        self.bounds.limit = Some(letters);
        self
    }

    /// Ends between two letters when this is cancelled.
    #[must_use]
    pub fn until(mut self, cancelled: CancellationToken) -> Self {
        self.bounds.until = cancelled;
        self
    }
}

/// Removes one letter after the other.
pub(super) struct Discarder {
    pub(super) reason: String,
    pub(super) dry_run: bool,
}

#[async_trait]
impl Act for Discarder {
    type Item = Treated;

    /// removal, confirmed → audit event.
    async fn treat(
        &mut self,
        letter: Listed,
        letters: &mut dyn Letters,
    ) -> Result<(Treated, Option<Fate>), Error> {
        if !self.dry_run {
            let what = "was not seen to be removed: it may still be there";
            letters
                .remove(letter.place())
                .await
                .map_err(|error| Error::of_letter(letter.id(), what, error))?;
            self.tell(&letter);
        }
        let treated = Treated { letter, fate: Fate::Discarded, generation: None, dry_run: self.dry_run };
        Ok((treated, Some(Fate::Discarded)))
    }
}

impl Discarder {
    fn tell(&self, letter: &Listed) {
        tracing::info!(
            target: "guestlist", letter = letter.id(), key = letter.key().map(tracing::field::display),
            cause = letter.cause(), reason = self.reason, "a letter was discarded"
        );
    }
}
