//! What every dedup store promises, as a suite that any implementation of [`DedupStore`] can be put through.
//!
//! Write a [`StoreFixture`] for your store and call [`store_contract`] in a test: it runs every
//! case and prints each name, which is the promise. To run or debug one promise, call the case of
//! that name. A case panics with what was promised and what happened instead.
//!
//! The truth is the [protocol's machine](crate::dedup::protocol::Machine): one case walks at random
//! and compares each answer and record with it, the others say one rule each, so that a failure
//! has a name.
//!
//! # Time
//!
//! A server's clock cannot be paused, and the suite must not fail on a slow machine. So every
//! time that the suite waits for is [`Pace::short`], every other one is [`LONG`], and there are
//! two kinds of checks: *never before* its time, measured from the instant before the call was
//! sent, and *at last*, asked again until [`Pace::late`] (and ten seconds for a busy machine) are over. The
//! suite reads tokio's clock, so a store that does as well can be tested with a paused one.
//!
//! Each case has keys of its own, so cases run side by side; those that lose everything or
//! restart the server run alone, at the end. Each call of a case goes over the other of two
//! handles, so that everything is also seen by "another process".
//!
//! # What it cannot show
//!
//! That the store's own clock judges, and not the caller's: one machine has one clock. That what
//! was confirmed survives a failover. See each store's own tests for both.
//!
//! # Example
//!
//! ```
//! use std::sync::Arc;
//!
//! use guestlist::DedupKey;
//! use guestlist::dedup::{DedupStore, MemoryStore};
//! use guestlist::testing::store_contract::{self, Pace, StoreFixture};
//!
//! struct InMemory(MemoryStore);
//!
//! #[async_trait::async_trait]
//! impl StoreFixture for InMemory {
//!     async fn open(&self) -> Arc<dyn DedupStore> {
//!         Arc::new(self.0.clone())
//!     }
//!
//!     async fn lose(&self, key: &DedupKey) {
//!         self.0.forget(key).await.unwrap();
//!     }
//!
//!     async fn lose_everything(&self) -> bool {
//!         false
//!     }
//!
//!     fn pace(&self) -> Pace {
//!         Pace::default()
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! store_contract::an_expired_claim_is_held_until_it_is_taken(&InMemory(MemoryStore::new())).await;
//! # }
//! ```

#![expect(clippy::missing_panics_doc, reason = "a case panics if its promise is broken: the module says so")]

mod calls;
mod claims;
mod done;
mod generations;
mod holders;
mod keys;
mod loss;
mod releases;
mod side_by_side;
mod stage;
mod suspects;
mod walk;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use self::calls::*;
pub use self::claims::*;
pub use self::done::*;
pub use self::generations::*;
pub use self::holders::*;
pub use self::keys::*;
pub use self::loss::*;
pub use self::releases::*;
use self::side_by_side::{Case, in_turn, side_by_side};
pub use self::suspects::*;
pub use self::walk::*;
use crate::DedupKey;
use crate::dedup::DedupStore;

/// A time that is not over before the suite is: every lease, backoff and window that a case does
/// not wait for.
pub const LONG: Duration = Duration::from_secs(3600);

/// A store under test, and the hands of whoever meddles with its data behind its back.
#[async_trait]
pub trait StoreFixture: Send + Sync {
    /// A new handle on the data, as another process would have it: a connection of its own. It keeps records for
    /// [`LONG`] at least, and outlives [`restart`](Self::restart) and
    /// [`lose_everything`](Self::lose_everything).
    async fn open(&self) -> Arc<dyn DedupStore>;

    /// A handle on a store whose records are kept for this window: every call on it asks for
    /// just that. Only a store whose window is a setting of the store's own needs another place for
    /// it (a NATS bucket of that `max_age`); always the same place for the same window.
    async fn open_for(&self, window: Duration) -> Arc<dyn DedupStore> {
        let _ = window;
        self.open().await
    }

    /// The record of a key vanishes behind the store's back: `DEL`, `DELETE`, a purge.
    async fn lose(&self, key: &DedupKey);

    /// Every record vanishes behind the store's back: `FLUSHALL`, `TRUNCATE`. `false`: that cannot happen.
    async fn lose_everything(&self) -> bool;

    /// The server stops, and starts again with what it kept; ends when it is up. `false`: there
    /// is nothing to restart.
    async fn restart(&self) -> bool {
        false
    }

    /// Puts a record of a format from the future where the key's record would be. `false`: this store has no
    /// format that could change (records in this process's memory).
    async fn write_unknown_version(&self, key: &DedupKey) -> bool {
        let _ = key;
        false
    }

    /// How the store keeps time.
    fn pace(&self) -> Pace;
}

/// How a store keeps time, and how patient the suite has to be.
///
/// ```
/// use guestlist::testing::store_contract::Pace;
/// use std::time::Duration;
/// // Leases are judged by observation: a claimant must have seen the record stand for a whole lease.
/// let short = Duration::from_millis(500);
/// let pace = Pace { short, late: 2 * short, one_window: true, ..Pace::default() };
/// assert_eq!(pace.longest, Duration::MAX);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The lease, backoff and window that the suite lets run out. 200 ms by default.
    pub short: Duration,
    /// How much later than an end, or than the loss of a record, the store may notice it. Zero by default.
    pub late: Duration,
    /// The unit that times are rounded to: an end may come this much early. Zero by default, and
    /// better left so: round up.
    pub resolution: Duration,
    /// One window for all records, a setting of the store's own: the suite asks for no window but that of
    /// [`open_for`](StoreFixture::open_for). `false` by default.
    pub one_window: bool,
    /// The longest lease, backoff or window that the store takes. No limit by default.
    pub longest: Duration,
    /// How many claims at once one of them must win. 1,000 by default.
    pub crowd: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            short: Duration::from_millis(200),
            late: Duration::ZERO,
            resolution: Duration::ZERO,
            one_window: false,
            longest: Duration::MAX,
            crowd: 1_000,
        }
    }
}

macro_rules! cases {
    ($fixture:ident: $($case:ident)+) => {
        // Boxed: all the futures of the suite in one would be large.
        vec![$(Case::new(stringify!($case), Box::pin($case($fixture)))),+]
    };
}

/// Runs every case, printing each name when its promise is kept; if one is not, its name is
/// printed and its panic goes on.
pub async fn store_contract(fixture: &dyn StoreFixture) {
    side_by_side(cases! { fixture:
        of_a_thousand_claims_one_wins
        of_all_that_claim_and_fail_one_holds_at_a_time
        the_first_claim_is_the_first_attempt
        a_claim_repeated_with_its_token_counts_once
        a_claim_repeated_sets_the_deadline_anew
        an_expired_claim_is_claimed_again_by_its_token
        a_held_key_is_in_progress_for_the_rest_of_its_lease
        a_lease_is_never_short_and_ends
        a_renewal_holds_from_its_own_instant
        a_run_that_released_does_not_claim_again
        a_refused_claim_changes_nothing
        a_second_handle_sees_what_the_first_did
        another_token_changes_nothing_that_is_claimed
        another_token_changes_nothing_that_is_expired
        another_token_changes_nothing_that_is_released
        another_token_changes_nothing_that_is_parked_or_done
        the_holder_is_answered_as_the_state_says
        an_expired_claim_is_held_until_it_is_taken
        a_claim_that_was_taken_over_is_lost
        the_token_alone_proves_ownership
        nothing_is_held_where_nothing_is_on_record
        a_release_repeated_says_yes_and_changes_nothing
        a_failed_attempt_counts
        a_vanished_attempt_counts
        a_deferral_gives_its_attempt_back
        not_started_restores_the_attempt_and_what_was_before
        interruptions_are_free_three_times_in_a_row
        a_failure_between_interruptions_ends_the_row
        a_dead_letter_is_parked
        a_backoff_is_never_short_and_ends
        a_copy_neither_skips_the_backoff_nor_burns_attempts
        attempts_and_the_suspect_mark_survive_a_deferral_longer_than_the_retention
        a_key_released_without_a_backoff_is_free_at_once
        an_expired_claim_is_suspect
        the_mark_stays_through_every_release
        a_suspect_in_progress_is_in_progress
        the_mark_ends_with_done_and_parked
        the_mark_ends_with_a_fresh_start
        a_renewed_claim_is_not_suspect
        what_is_done_is_done_for_everybody
        a_complete_repeated_says_yes
        a_window_is_never_short_and_ends
        the_window_is_the_completes
        every_record_is_kept_from_its_last_change
        past_its_time_a_claim_is_gone
        a_window_shorter_than_the_lease_cuts_nothing_short
        a_time_of_zero_ends
        the_longest_times_are_taken
        the_next_generation_starts_afresh
        a_generation_from_the_future_is_the_records_own
        an_older_generation_is_the_records_own
        a_redrive_disturbs_neither_a_holder_nor_what_is_done
        the_highest_generation_does_not_overflow
        a_fresh_start_keeps_nothing
        keys_of_any_bytes_are_keys
        keys_that_differ_in_one_bit_are_kept_apart
        many_keys_at_once_get_their_own_answers
        the_digest_first_seen_is_kept
        a_digest_may_come_later
        every_bit_of_what_is_kept_comes_back
        a_lost_record_suppresses_nothing
        the_holder_of_a_lost_record_is_told
        complete_of_a_lost_record_inserts_done
        what_a_lost_record_left_behind_ends_too
        the_holder_before_a_loss_does_not_disturb_the_next
        fences_only_grow
        a_record_of_an_unknown_version_is_an_error
        inspect_shows_what_is_on_record
        inspect_changes_nothing
        forget_says_whether_there_was_anything
        the_holder_of_a_forgotten_key_is_told
        a_call_that_is_dropped_does_no_harm
        answers_are_not_mixed_up_by_dropped_calls
        debug_shows_no_key
        it_answers_as_the_machine_does
    })
    .await;
    in_turn(cases! { fixture:
        after_the_loss_of_everything_all_runs_again
        a_restart_keeps_what_the_store_promises
    })
    .await;
}
