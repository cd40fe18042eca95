//! What is right for a letter that is to be redriven, by what the store has on record for its id.

use super::Fate;
use crate::dedup::protocol::{Record, State};

/// What counts of a letter.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a yes or no of its own")]
pub(super) struct Facts {
    pub(super) generation: u32,
    /// Its body or headers were cut, to make it fit.
    pub(super) cut: bool,
    /// It failed longer ago than a done id is remembered: that nothing is on record tells nothing.
    pub(super) stale: bool,
    /// Its cause is `id_conflict`: its id is that of another message.
    pub(super) id_conflict: bool,
    /// The record has the digest of another body.
    pub(super) other_body: bool,
}

/// What the operator asked for beside the default.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wish {
    pub(super) discard_done: bool,
    pub(super) forgotten: bool,
    pub(super) force: bool,
}

/// What to do with a letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Publish its copy in this generation, then remove it.
    Publish(u32),
    /// Forget the record, publish its copy in this generation, then remove it.
    ForgetAndPublish(u32),
    /// Nothing is left to do: remove it.
    Remove(Fate),
    /// It stays.
    Leave(Fate),
}

/// Decides, by the store's record of generation r and the letter of generation g:
///
/// | on record | what that says | decision |
/// |---|---|---|
/// | any, the letter was cut to fit | the handler would be given a part for the whole | leave, `Incomplete` |
/// | nothing, and the letter is younger than the window | had its message been handled since, that would be remembered; any generation starts afresh | publish, g + 1 |
/// | nothing, and it is older, or of no age | it may have been handled and forgotten: sent again, or by a copy that was redriven before | leave, `Forgotten`; publish, g + 1, if asked to |
/// | `Parked` | what failed is with the dead letters: this letter, or a later failure of it | publish, r + 1 |
/// | `Claimed` or `Released`, r > g | a copy that was redriven is at work; it ends as `Done` or as a letter of its own | leave, `AtWork` |
/// | `Claimed` or `Released`, r ≤ g | whoever made this letter was killed before it could say so (F11), or is about to; where the claim still lives, the copy waits for its end, as any copy does | publish, r + 1 |
/// | `Done`, r > g | a redriven copy of this letter was handled, and the redrive was interrupted before it removed the letter | remove, `Finished` |
/// | `Done`, r ≤ g | handled by a copy that nobody redrove; whether this letter is worth anything is for the operator to say | leave, `AlreadyDone`; remove, if asked to |
/// | any, of another body | another message has this id: a copy would only come back | leave, `Conflict` |
/// | `Done`, the letter's cause is `id_conflict` | *the other* message was handled | leave, `AlreadyDone`, whatever was asked for |
/// | any, forced | the operator knows better | forget, publish, max(r, g) + 1: a near cache elsewhere knows `Done` of no generation as high |
///
/// Only r + 1 starts afresh on a record, so the letter's own generation does not count where there is one.
pub(super) fn decide(letter: Facts, record: Option<&Record>, wish: Wish) -> Decision {
    let Facts { generation, cut, stale, id_conflict, other_body } = letter;
    if cut && !wish.force {
        return Decision::Leave(Fate::Incomplete);
    }
    let Some(record) = record else {
        let untold = stale && !wish.forgotten && !wish.force;
        return if untold { Decision::Leave(Fate::Forgotten) } else { Decision::Publish(after(generation)) };
    };
    if wish.force {
        return Decision::ForgetAndPublish(after(record.generation.max(generation)));
    }
    if other_body {
        return Decision::Leave(Fate::Conflict);
    }
    let later = record.generation > generation;
    match record.state {
        State::Done if id_conflict => Decision::Leave(Fate::AlreadyDone),
        State::Done if later => Decision::Remove(Fate::Finished),
        State::Done if wish.discard_done => Decision::Remove(Fate::DoneDiscarded),
        State::Done => Decision::Leave(Fate::AlreadyDone),
        State::Claimed { .. } | State::Released { .. } if later => Decision::Leave(Fate::AtWork),
        State::Claimed { .. } | State::Released { .. } | State::Parked => {
            Decision::Publish(after(record.generation))
        }
    }
}

/// At the highest number, which nobody reaches but a forger, the copy comes back as a letter: `force` helps.
const fn after(generation: u32) -> u32 {
    generation.saturating_add(1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::dedup::protocol::{Ask, Claim, Machine, Run, Token};
    use crate::dedup::{Before, Fence};

    const CLAIMED: State = State::Claimed { deadline: 100 };
    const RELEASED: State = State::Released { not_before: 100 };

    fn record(state: State, generation: u32) -> Record {
        Record {
            run: Run { token: Token::from_bits(1), fence: Fence(1) },
            attempt: 3,
            before: Before::Failed,
            state,
            generation,
            suspect: true,
            interruptions: 0,
            digest: None,
            retain: Duration::from_secs(1),
            kept_until: 1_000_000,
        }
    }

    fn letter(generation: u32) -> Facts {
        Facts { generation, cut: false, stale: false, id_conflict: false, other_body: false }
    }

    /// By default.
    fn decided(letter: Facts, state: State, generation: u32) -> Decision {
        decide(letter, Some(&record(state, generation)), Wish::default())
    }

    #[test]
    fn without_a_record_the_letters_generation_counts() {
        assert_eq!(decide(letter(0), None, Wish::default()), Decision::Publish(1));
        assert_eq!(decide(letter(7), None, Wish::default()), Decision::Publish(8));
        let forced = Wish { force: true, ..Wish::default() };
        assert_eq!(decide(letter(7), None, forced), Decision::Publish(8), "there is nothing to forget");
    }

    #[test]
    fn without_a_record_an_old_letter_may_have_been_handled_and_forgotten() {
        let old = Facts { stale: true, ..letter(1) };
        assert_eq!(decide(old, None, Wish::default()), Decision::Leave(Fate::Forgotten));
        let all = Wish { discard_done: true, ..Wish::default() };
        assert_eq!(decide(old, None, all), Decision::Leave(Fate::Forgotten));
        for wish in [Wish { forgotten: true, ..all }, Wish { force: true, ..all }] {
            assert_eq!(decide(old, None, wish), Decision::Publish(2));
        }
        assert_eq!(decide(old, Some(&record(State::Parked, 1)), all), Decision::Publish(2), "it is known");
    }

    #[test]
    fn parked_starts_afresh_by_one_above_the_record() {
        for (g, r) in [(0, 0), (2, 2), (0, 3), (5, 1)] {
            assert_eq!(
                decided(letter(g), State::Parked, r),
                Decision::Publish(r + 1),
                "letter {g}, record {r}"
            );
        }
    }

    #[test]
    fn in_a_higher_generation_its_copy_is_at_work() {
        for state in [CLAIMED, RELEASED] {
            assert_eq!(decided(letter(0), state, 1), Decision::Leave(Fate::AtWork));
            assert_eq!(decided(letter(3), state, 9), Decision::Leave(Fate::AtWork));
        }
    }

    #[test]
    fn f11_in_the_same_or_a_lower_generation_nobody_else_has_the_letter() {
        for state in [CLAIMED, RELEASED] {
            assert_eq!(decided(letter(0), state, 0), Decision::Publish(1));
            assert_eq!(decided(letter(4), state, 2), Decision::Publish(3));
        }
    }

    #[test]
    fn done_in_a_higher_generation_is_what_an_interrupted_redrive_left() {
        assert_eq!(decided(letter(0), State::Done, 1), Decision::Remove(Fate::Finished));
        let all = Wish { discard_done: true, ..Wish::default() };
        assert_eq!(decide(letter(0), Some(&record(State::Done, 1)), all), Decision::Remove(Fate::Finished));
    }

    #[test]
    fn done_by_somebody_else_stays_until_the_operator_says_so() {
        let all = Wish { discard_done: true, ..Wish::default() };
        for (g, r) in [(0, 0), (3, 2)] {
            assert_eq!(decided(letter(g), State::Done, r), Decision::Leave(Fate::AlreadyDone));
            let removed = decide(letter(g), Some(&record(State::Done, r)), all);
            assert_eq!(removed, Decision::Remove(Fate::DoneDiscarded));
        }
    }

    #[test]
    fn a_letter_of_another_message_is_never_removed_for_what_became_of_the_first() {
        let all = Wish { discard_done: true, ..Wish::default() };
        for r in [0, 1, 5] {
            for wish in [Wish::default(), all] {
                let conflict = Facts { id_conflict: true, ..letter(0) };
                let done = decide(conflict, Some(&record(State::Done, r)), wish);
                assert_eq!(done, Decision::Leave(Fate::AlreadyDone));
                for state in [State::Done, State::Parked, CLAIMED, RELEASED] {
                    let other = Facts { other_body: true, ..letter(0) };
                    let left = decide(other, Some(&record(state, r)), wish);
                    assert_eq!(left, Decision::Leave(Fate::Conflict), "{state:?}");
                }
            }
        }
    }

    #[test]
    fn forced_it_runs_whatever_is_on_record_and_above_what_a_cache_may_know() {
        let forced = Wish { force: true, ..Wish::default() };
        for state in [State::Done, State::Parked, CLAIMED, RELEASED] {
            for (g, r, next) in [(0, 0, 1), (0, 4, 5), (4, 0, 5)] {
                let facts = Facts { id_conflict: true, other_body: true, ..letter(g) };
                let decision = decide(facts, Some(&record(state, r)), forced);
                assert_eq!(decision, Decision::ForgetAndPublish(next), "{state:?}");
            }
        }
    }

    #[test]
    fn a_part_is_not_redriven_for_the_whole_unless_forced() {
        let cut = Facts { cut: true, ..letter(0) };
        let all = Wish { discard_done: true, ..Wish::default() };
        for on_record in [None, Some(record(State::Parked, 0)), Some(record(State::Done, 1))] {
            assert_eq!(decide(cut, on_record.as_ref(), all), Decision::Leave(Fate::Incomplete));
        }
        let forced = Wish { force: true, ..Wish::default() };
        assert_eq!(decide(cut, None, forced), Decision::Publish(1));
        assert_eq!(decide(cut, Some(&record(State::Parked, 0)), forced), Decision::ForgetAndPublish(1));
    }

    #[test]
    fn a_forged_generation_overflows_nothing() {
        assert_eq!(decide(letter(u32::MAX), None, Wish::default()), Decision::Publish(u32::MAX));
        assert_eq!(decided(letter(0), State::Parked, u32::MAX), Decision::Publish(u32::MAX));
    }

    fn states() -> impl Strategy<Value = State> {
        prop_oneof![
            (0..200_u64).prop_map(|deadline| State::Claimed { deadline }),
            (0..200_u64).prop_map(|not_before| State::Released { not_before }),
            Just(State::Parked),
            Just(State::Done),
        ]
    }

    proptest! {
        /// Whatever is on record: a copy that is published starts afresh at once, or after the claim that still
        /// lives; it is never parked or skipped by what was known when it was published.
        #[test]
        fn what_is_published_runs(state in states(), r in 0..9_u32, g in 0..9_u32, known: bool, force: bool, discard_done: bool) {
            let on_record = known.then(|| record(state, r));
            let (kept, generation) = match decide(letter(g), on_record.as_ref(), Wish { discard_done, force, forgotten: false }) {
                Decision::Publish(generation) => (on_record, generation),
                Decision::ForgetAndPublish(generation) => (None, generation),
                Decision::Remove(_) | Decision::Leave(_) => return Ok(()),
            };
            let lease = Duration::from_micros(10);
            let ask = Ask { generation, ..Ask::new(Token::from_bits(2), lease, lease) };
            let (_, claim) = Machine::at(100).claim(kept, &ask);
            let lives = matches!(kept.map(|record| record.state), Some(State::Claimed { deadline }) if deadline > 100);
            match claim {
                Claim::Acquired { attempt: 1, before: Before::First, .. } => prop_assert!(!lives),
                Claim::InProgress { .. } => prop_assert!(lives),
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
