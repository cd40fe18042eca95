//! The rules of the claim protocol, one test each, then random walks.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

mod random;

const LEASE: Duration = Duration::from_secs(30);
const RETAIN: Duration = Duration::from_secs(3600);
const MOMENT: Duration = Duration::from_micros(1);
const BACKOFF: Duration = Duration::from_secs(4);
/// The generation that the records of these tests are in.
const GENERATION: u32 = 3;
const ME: u128 = 1;
const OTHER: u128 = 2;
const THIRD: u128 = 3;

/// One key of a store whose clock the test moves.
#[derive(Clone, Debug)]
struct Key {
    record: Option<Record>,
    now: Micros,
}

fn ask(token: u128) -> Ask {
    Ask { generation: GENERATION, ..Ask::new(Token::from_bits(token), LEASE, RETAIN) }
}

fn alone(token: u128) -> Ask {
    Ask { alone: true, ..ask(token) }
}

fn of_generation(generation: u32, ask: Ask) -> Ask {
    Ask { generation, ..ask }
}

/// Ownership is proven by the token alone, so the fence here is always a wrong one.
fn run(token: u128) -> Run {
    Run { token: Token::from_bits(token), fence: Fence(0) }
}

fn just_before(end: Duration) -> Duration {
    end.saturating_sub(MOMENT)
}

fn failed(backoff: Duration) -> Release {
    Release::Failed { not_before: backoff }
}

fn deferred(delay: Duration) -> Release {
    Release::Deferred { not_before: delay }
}

const FAILED: Release = Release::Failed { not_before: Duration::ZERO };
const DEFERRED: Release = Release::Deferred { not_before: Duration::ZERO };

impl Key {
    fn absent() -> Self {
        Self { record: None, now: 1_700_000_000_000_000 }
    }

    fn step<A>(&mut self, step: impl FnOnce(Machine, Option<Record>) -> (Option<Record>, A)) -> A {
        let (record, answer) = step(Machine::at(self.now), self.record);
        self.record = record;
        answer
    }

    fn claim(&mut self, ask: Ask) -> Claim {
        self.step(|machine, record| machine.claim(record, &ask))
    }

    /// Claims, and must get it.
    fn acquire(&mut self, ask: Ask) -> (Fence, u32, Before) {
        match self.claim(ask) {
            Claim::Acquired { fence, attempt, before, .. } => (fence, attempt, before),
            other => panic!("{ask:?} must be acquired, not {other:?}"),
        }
    }

    fn attempt(&mut self, ask: Ask) -> (u32, Before) {
        let (_, attempt, before) = self.acquire(ask);
        (attempt, before)
    }

    fn renew(&mut self, token: u128) -> Held {
        self.step(|machine, record| machine.renew(record, run(token), LEASE))
    }

    fn complete(&mut self, token: u128) -> Held {
        self.step(|machine, record| machine.complete(record, run(token), RETAIN))
    }

    fn release(&mut self, token: u128, why: Release) -> Held {
        self.step(|machine, record| machine.release(record, run(token), why))
    }

    /// Releases, and must be the holder.
    fn give_up(&mut self, token: u128, why: Release) {
        assert_eq!(self.release(token, why), Held::Yes, "{why:?}");
    }

    fn pass(&mut self, time: Duration) {
        self.now += u64::try_from(time.as_micros()).unwrap();
    }

    fn left(&self) -> Duration {
        Machine::at(self.now).left(self.record)
    }

    fn record(&self) -> Record {
        self.record.expect("there is a record")
    }

    /// Attempt 2 of `ME`, after a failed one.
    fn claimed() -> Self {
        let mut key = Self::absent();
        key.acquire(ask(THIRD));
        key.give_up(THIRD, FAILED);
        key.acquire(ask(ME));
        key
    }

    fn expired() -> Self {
        let mut key = Self::claimed();
        key.pass(LEASE);
        key
    }

    fn released() -> Self {
        let mut key = Self::claimed();
        key.give_up(ME, FAILED);
        key
    }

    fn backing_off() -> Self {
        let mut key = Self::claimed();
        key.give_up(ME, failed(BACKOFF));
        key
    }

    /// Attempt 3 by `ME`, who took over from a holder that vanished, and failed.
    fn suspect() -> Self {
        let mut key = Self::absent();
        key.acquire(ask(THIRD));
        key.give_up(THIRD, FAILED);
        key.acquire(ask(OTHER));
        key.pass(LEASE);
        key.acquire(alone(ME));
        key.give_up(ME, FAILED);
        key
    }

    fn parked() -> Self {
        let mut key = Self::claimed();
        key.give_up(ME, Release::DeadLettered);
        key
    }

    fn done() -> Self {
        let mut key = Self::claimed();
        assert_eq!(key.complete(ME), Held::Yes);
        key
    }

    /// Any of these past the time it is kept for.
    fn forgotten() -> Self {
        let mut key = Self::done();
        key.pass(RETAIN);
        key
    }
}

/// An answer to a claim, without its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Won(u32, Before),
    Busy,
    Suspect,
    Parked,
    Done,
}

fn told(claim: Claim) -> Told {
    match claim {
        Claim::Acquired { attempt, before, .. } => Told::Won(attempt, before),
        Claim::InProgress { .. } => Told::Busy,
        Claim::Suspect => Told::Suspect,
        Claim::Parked { .. } => Told::Parked,
        Claim::Done { .. } => Told::Done,
    }
}

#[test]
fn a_claim_is_answered_as_the_state_the_token_and_the_generation_say() {
    use Before::{Failed, First, Vanished};
    use Told::{Busy, Done, Parked, Suspect, Won};
    let table = [
        // state, then the answer to: the record's token; another; another, alone; another, alone, of a lower
        // generation; of the next; of the one after that.
        ("absent", Key::absent(), [Won(1, First); 6]),
        ("forgotten", Key::forgotten(), [Won(1, First); 6]),
        ("claimed", Key::claimed(), [Won(2, Failed), Busy, Busy, Busy, Busy, Busy]),
        (
            "expired",
            Key::expired(),
            [Won(2, Failed), Suspect, Won(3, Vanished), Won(3, Vanished), Won(1, First), Won(3, Vanished)],
        ),
        (
            "released",
            Key::released(),
            [Busy, Won(3, Failed), Won(3, Failed), Won(3, Failed), Won(1, First), Won(3, Failed)],
        ),
        ("backing off", Key::backing_off(), [Busy, Busy, Busy, Busy, Won(1, First), Busy]),
        (
            "suspect",
            Key::suspect(),
            [Busy, Suspect, Won(4, Failed), Won(4, Failed), Won(1, First), Won(4, Failed)],
        ),
        ("parked", Key::parked(), [Parked, Parked, Parked, Parked, Won(1, First), Parked]),
        ("done", Key::done(), [Done; 6]),
    ];
    let asks = [
        ask(ME),
        ask(OTHER),
        alone(OTHER),
        of_generation(GENERATION - 1, alone(OTHER)),
        of_generation(GENERATION + 1, ask(OTHER)),
        of_generation(GENERATION + 2, alone(OTHER)),
    ];
    for (state, key, answers) in table {
        for (ask, answer) in asks.into_iter().zip(answers) {
            let mut key = key.clone();
            let before = key.record;
            assert_eq!(told(key.claim(ask)), answer, "{state}: {ask:?}");
            if !matches!(answer, Won(..)) {
                assert_eq!(key.record, before, "{state}: a claim that was refused changes nothing");
            }
        }
    }
}

type Call = fn(&mut Key, u128) -> Held;

#[test]
fn only_the_holder_renews_completes_and_releases() {
    use Held::{Gone, Lost, Yes};
    let table = [
        ("absent", Key::absent(), [Gone, Gone, Gone]),
        ("forgotten", Key::forgotten(), [Gone, Gone, Gone]),
        ("claimed", Key::claimed(), [Yes, Yes, Yes]),
        // Nobody else took it, so it is still held.
        ("expired", Key::expired(), [Yes, Yes, Yes]),
        ("released", Key::released(), [Lost, Lost, Yes]),
        ("backing off", Key::backing_off(), [Lost, Lost, Yes]),
        ("suspect", Key::suspect(), [Lost, Lost, Yes]),
        ("parked", Key::parked(), [Lost, Lost, Yes]),
        ("done", Key::done(), [Lost, Yes, Lost]),
    ];
    let calls: [(&str, Call); 3] = [
        ("renew", Key::renew),
        ("complete", Key::complete),
        ("release", |key, token| key.release(token, FAILED)),
    ];
    for (state, key, answers) in table {
        for ((name, call), answer) in calls.into_iter().zip(answers) {
            let mut mine = key.clone();
            assert_eq!(call(&mut mine, ME), answer, "{state}: {name} by the holder");
            if answer == Lost {
                assert_eq!(mine.record, key.record, "{state}: {name} that is lost changes nothing");
            }
            let mut theirs = key.clone();
            let foreign = if answer == Gone { Gone } else { Lost };
            assert_eq!(call(&mut theirs, OTHER), foreign, "{state}: {name} by another token");
            if foreign == Lost {
                assert_eq!(theirs.record, key.record, "{state}: {name} by another token changes nothing");
            }
        }
    }
}

#[test]
fn a_call_asked_again_has_the_same_answer_and_no_further_effect() {
    let releases =
        [failed(BACKOFF), DEFERRED, Release::NotStarted, Release::Interrupted, Release::DeadLettered];
    for why in releases {
        let mut key = Key::claimed();
        key.give_up(ME, why);
        let once = key.record;
        key.pass(MOMENT);
        key.give_up(ME, why);
        assert_eq!(key.record, once, "{why:?}");
    }
    let mut key = Key::done();
    let once = key.record;
    key.pass(MOMENT);
    assert_eq!(key.complete(ME), Held::Yes);
    assert_eq!(key.record, once, "the window is counted from the first time");
}

// Rule 2: a lost claim reply is resolved by the same token.

#[test]
fn a_claim_repeated_with_its_token_counts_once_and_sets_the_deadline_anew() {
    let mut key = Key::absent();
    let first = key.acquire(ask(ME));
    key.pass(just_before(LEASE));
    assert_eq!(key.acquire(ask(ME)), first);
    key.pass(just_before(LEASE));
    assert_eq!(told(key.claim(ask(OTHER))), Told::Busy, "the deadline is new");
    assert_eq!(key.record().attempt, 1);
}

#[test]
fn a_claim_repeated_after_its_lease_is_held_again_unless_it_was_taken() {
    let mut key = Key::claimed();
    key.pass(2 * LEASE);
    assert_eq!(key.attempt(ask(ME)), (2, Before::Failed));
    assert!(!key.record().suspect);
    assert_eq!(told(key.claim(alone(OTHER))), Told::Busy);

    key.pass(LEASE);
    assert_eq!(key.attempt(alone(OTHER)), (3, Before::Vanished));
    assert_eq!(told(key.claim(ask(ME))), Told::Busy, "taken: the old token is nobody's");
}

#[test]
fn a_claim_that_comes_after_its_own_release_is_not_a_new_one() {
    let mut key = Key::released();
    key.pass(LEASE);
    assert_eq!(told(key.claim(ask(ME))), Told::Busy);
    assert_eq!(key.record().attempt, 2);
}

#[test]
fn an_expired_claim_that_nobody_took_is_still_completed() {
    let mut key = Key::expired();
    key.pass(LEASE);
    assert_eq!(key.complete(ME), Held::Yes);
    assert_eq!(told(key.claim(ask(OTHER))), Told::Done);
}

#[test]
fn a_claim_that_was_taken_over_is_lost_to_its_old_holder() {
    let mut key = Key::expired();
    key.acquire(alone(OTHER));
    for answer in [key.renew(ME), key.complete(ME), key.release(ME, FAILED)] {
        assert_eq!(answer, Held::Lost);
    }
    assert_eq!(key.complete(OTHER), Held::Yes);
}

#[test]
fn a_lease_ends_at_its_deadline_and_not_before() {
    let mut key = Key::claimed();
    key.pass(just_before(LEASE));
    assert_eq!(key.left(), MOMENT);
    assert_eq!(told(key.claim(alone(OTHER))), Told::Busy);
    key.pass(MOMENT);
    assert_eq!(key.left(), Duration::ZERO);
    assert_eq!(key.attempt(alone(OTHER)), (3, Before::Vanished));
}

#[test]
fn a_renewal_holds_for_a_lease_from_when_it_arrived() {
    let mut key = Key::claimed();
    key.pass(LEASE / 3);
    assert_eq!(key.renew(ME), Held::Yes);
    key.pass(just_before(LEASE));
    assert_eq!(told(key.claim(alone(OTHER))), Told::Busy);
    key.pass(MOMENT);
    assert_eq!(told(key.claim(ask(OTHER))), Told::Suspect);
}

#[test]
fn fences_only_grow() {
    let mut key = Key::absent();
    let mut last = Fence(0);
    let mut next = |key: &mut Key, ask: Ask| {
        let (fence, ..) = key.acquire(ask);
        assert!(fence > last, "{fence:?} after {last:?}: {ask:?}");
        last = fence;
    };
    // Within one microsecond: the clock alone would not do.
    for token in 10..20 {
        next(&mut key, ask(token));
        key.give_up(token, FAILED);
    }
    next(&mut key, ask(ME));
    key.pass(LEASE);
    next(&mut key, alone(OTHER));
    key.give_up(OTHER, Release::DeadLettered);
    next(&mut key, of_generation(GENERATION + 1, ask(THIRD)));
    assert_eq!(key.complete(THIRD), Held::Yes);
    key.pass(RETAIN);
    next(&mut key, ask(ME));
    // The store lost the record.
    key.record = None;
    key.pass(MOMENT);
    next(&mut key, ask(OTHER));
}

#[test]
fn fences_grow_over_a_record_that_is_past_its_time() {
    let mut key = Key::absent();
    let short = |token| Ask { retain: MOMENT, lease: MOMENT, ..ask(token) };
    for token in 10..20 {
        key.acquire(short(token));
        key.give_up(token, FAILED);
    }
    let last = key.record().run.fence;
    key.pass(MOMENT);
    assert_eq!(Machine::at(key.now).live(key.record), None, "it is past its time");
    assert!(key.acquire(short(ME)).0 > last);
}

// Rule 3: attempts.

#[test]
fn a_failed_attempt_counts() {
    let mut key = Key::absent();
    for attempt in 1..=5 {
        let before = if attempt == 1 { Before::First } else { Before::Failed };
        let token = u128::from(attempt) + 100;
        assert_eq!(key.attempt(ask(token)), (attempt, before));
        key.give_up(token, FAILED);
    }
}

#[test]
fn a_vanished_holder_counts() {
    let mut key = Key::absent();
    key.acquire(ask(ME));
    for attempt in 2..=5 {
        key.pass(LEASE);
        assert_eq!(key.attempt(alone(u128::from(attempt) + 100)), (attempt, Before::Vanished));
    }
}

#[test]
fn a_deferral_gives_its_attempt_back() {
    let mut key = Key::absent();
    for token in 10..30 {
        let (attempt, _) = key.attempt(ask(token));
        assert_eq!(attempt, 1);
        key.give_up(token, DEFERRED);
    }
    assert_eq!(key.attempt(ask(ME)), (1, Before::HandedBack));
}

#[test]
fn a_claim_that_did_not_start_leaves_everything_as_it_was() {
    for (mut key, attempt, before) in [
        (Key::absent(), 1, Before::First),
        (Key::released(), 3, Before::Failed),
        (Key::expired(), 3, Before::Vanished),
        (Key::suspect(), 4, Before::Failed),
    ] {
        for token in [OTHER, 77, 78] {
            assert_eq!(key.attempt(alone(token)), (attempt, before));
            let suspect = key.record().suspect;
            key.give_up(token, Release::NotStarted);
            assert_eq!(key.record().suspect, suspect);
            assert_eq!(key.left(), Duration::ZERO, "and it is free at once");
        }
    }
}

#[test]
fn a_claim_that_did_not_start_leaves_the_row_of_interruptions_as_it_was() {
    let mut key = Key::absent();
    for token in 10..13 {
        key.acquire(ask(token));
        key.give_up(token, Release::Interrupted);
        key.acquire(ask(ME));
        key.give_up(ME, Release::NotStarted);
    }
    assert_eq!(key.attempt(ask(20)), (1, Before::HandedBack));
    key.give_up(20, Release::Interrupted);
    assert_eq!(key.attempt(ask(21)), (2, Before::HandedBack), "the fourth in a row counts");
}

#[test]
fn three_interruptions_in_a_row_are_free_and_the_fourth_counts() {
    let mut key = Key::absent();
    let attempts: Vec<u32> = (10..16)
        .map(|token| {
            let (attempt, _) = key.attempt(ask(token));
            key.give_up(token, Release::Interrupted);
            attempt
        })
        .collect();
    assert_eq!(attempts, [1, 1, 1, 1, 2, 3]);
}

#[test]
fn a_failure_and_a_deferral_end_the_row_of_interruptions() {
    for why in [FAILED, DEFERRED] {
        let mut key = Key::absent();
        for token in 10..13 {
            key.acquire(ask(token));
            key.give_up(token, Release::Interrupted);
        }
        let (attempt, _) = key.attempt(ask(ME));
        key.give_up(ME, why);
        let counted = if why == FAILED { attempt + 1 } else { attempt };
        for token in 20..23 {
            assert_eq!(key.attempt(ask(token)).0, counted, "{why:?}");
            key.give_up(token, Release::Interrupted);
        }
        assert_eq!(key.attempt(ask(23)).0, counted, "{why:?}");
    }
}

#[test]
fn the_generation_after_the_records_starts_afresh_and_a_forged_one_does_not() {
    for mut key in [Key::expired(), Key::released(), Key::backing_off(), Key::suspect(), Key::parked()] {
        let forged = key.clone().claim(of_generation(u32::MAX, alone(OTHER)));
        assert!(!matches!(told(forged), Told::Won(1, Before::First)));

        let fence = key.record().run.fence;
        let (new_fence, attempt, before) = key.acquire(of_generation(GENERATION + 1, ask(OTHER)));
        assert_eq!((attempt, before), (1, Before::First));
        assert!(new_fence > fence);
        let record = key.record();
        assert_eq!((record.generation, record.suspect, record.interruptions), (GENERATION + 1, false, 0));
        key.give_up(OTHER, FAILED);
        assert_eq!(key.attempt(of_generation(GENERATION + 1, ask(THIRD))), (2, Before::Failed));
    }
}

#[test]
fn a_copy_of_the_generation_before_a_redrive_joins_its_count() {
    let mut key = Key::parked();
    key.acquire(of_generation(GENERATION + 1, ask(OTHER)));
    key.give_up(OTHER, FAILED);
    assert_eq!(key.attempt(ask(THIRD)), (2, Before::Failed));
    assert_eq!(key.record().generation, GENERATION + 1);
}

#[test]
fn there_is_no_generation_after_the_last() {
    let mut key = Key::absent();
    key.acquire(of_generation(u32::MAX, ask(ME)));
    key.give_up(ME, Release::DeadLettered);
    for generation in [0, 1, u32::MAX - 1, u32::MAX] {
        assert_eq!(told(key.claim(of_generation(generation, alone(OTHER)))), Told::Parked);
    }
}

#[test]
fn a_record_is_kept_for_its_window_from_its_last_change() {
    let mut key = Key::absent();
    key.acquire(ask(ME));
    let kept = |key: &Key| Duration::from_micros(key.record().kept_until - key.now);
    assert_eq!(kept(&key), RETAIN);
    key.pass(LEASE / 2);
    assert_eq!(key.renew(ME), Held::Yes);
    assert_eq!(kept(&key), RETAIN);
    key.pass(LEASE / 2);
    key.give_up(ME, FAILED);
    assert_eq!(kept(&key), RETAIN);
    key.pass(just_before(RETAIN));
    assert_eq!(key.attempt(ask(OTHER)), (2, Before::Failed), "kept to the last microsecond");
    key.give_up(OTHER, FAILED);
    key.pass(RETAIN);
    assert_eq!(key.attempt(ask(THIRD)), (1, Before::First));
}

#[test]
fn no_record_is_dropped_before_its_deadline_or_its_backoff() {
    let short = |token| Ask { retain: MOMENT, ..ask(token) };
    let mut key = Key::absent();
    key.acquire(short(ME));
    key.pass(just_before(LEASE));
    assert_eq!(told(key.claim(short(OTHER))), Told::Busy);
    key.give_up(ME, failed(BACKOFF));
    key.pass(just_before(BACKOFF));
    assert_eq!(told(key.claim(short(OTHER))), Told::Busy);
    key.pass(MOMENT);
    assert_eq!(key.attempt(short(OTHER)).0, 2, "and a moment longer, for who comes when it ends");
}

/// Whatever was longer: the retention counts from the end of the backoff, which is when the message comes back.
#[test]
fn attempts_and_the_mark_survive_a_backoff_longer_than_the_retention() {
    let year = Duration::from_secs(365 * 24 * 3600);
    for (why, left) in [(failed(year), (4, Before::Failed)), (deferred(year), (3, Before::HandedBack))] {
        let mut key = Key::claimed();
        key.pass(LEASE);
        key.acquire(alone(OTHER));
        key.give_up(OTHER, why);
        key.pass(year + just_before(RETAIN));
        assert_eq!(told(key.claim(ask(THIRD))), Told::Suspect, "{why:?}");
        let mut later = key.clone();
        assert_eq!(key.attempt(alone(THIRD)), left, "{why:?}");
        later.pass(MOMENT);
        assert_eq!(later.attempt(ask(THIRD)), (1, Before::First), "{why:?}: it is not kept for ever");
    }
}

// Rules 4 and 5: only a completed id is done.

#[test]
fn no_release_marks_an_id_done() {
    for why in [FAILED, DEFERRED, Release::NotStarted, Release::Interrupted, Release::DeadLettered] {
        let mut key = Key::claimed();
        key.give_up(ME, why);
        assert_ne!(told(key.claim(ask(OTHER))), Told::Done, "{why:?}");
    }
}

#[test]
fn a_done_id_is_done_for_its_window() {
    let mut key = Key::claimed();
    let window = Duration::from_secs(7);
    assert_eq!(key.step(|machine, record| machine.complete(record, run(ME), window)), Held::Yes);
    key.pass(just_before(window));
    assert_eq!(told(key.claim(alone(OTHER))), Told::Done);
    assert_eq!(told(key.claim(of_generation(GENERATION + 1, alone(OTHER)))), Told::Done);
    key.pass(MOMENT);
    assert_eq!(key.attempt(ask(OTHER)), (1, Before::First));
}

// Rule 7.

#[test]
fn a_length_of_zero_is_not_none() {
    let mut key = Key::absent();
    key.acquire(Ask { lease: Duration::ZERO, ..ask(ME) });
    assert_eq!(told(key.claim(alone(OTHER))), Told::Busy);
    key.pass(MOMENT);
    assert_eq!(key.attempt(alone(OTHER)), (2, Before::Vanished));
    assert_eq!(key.step(|machine, record| machine.renew(record, run(OTHER), Duration::ZERO)), Held::Yes);
    assert_eq!(told(key.claim(alone(THIRD))), Told::Busy);
    assert_eq!(key.step(|machine, record| machine.complete(record, run(OTHER), Duration::ZERO)), Held::Yes);
    assert_eq!(told(key.claim(ask(THIRD))), Told::Done);
}

// Rule 10.

#[test]
fn completing_what_the_store_lost_remembers_it() {
    let mut key = Key::claimed();
    key.record = None;
    assert_eq!(key.complete(ME), Held::Gone);
    assert_eq!(told(key.claim(ask(OTHER))), Told::Done);
    assert_eq!(key.complete(ME), Held::Yes, "asked again, it is there");
}

#[test]
fn renewing_or_releasing_what_the_store_lost_writes_nothing() {
    let mut key = Key::claimed();
    key.record = None;
    assert_eq!(key.renew(ME), Held::Gone);
    assert_eq!(key.release(ME, FAILED), Held::Gone);
    assert_eq!(key.record, None);
}

// Rule 11.

#[test]
fn nobody_skips_the_backoff_or_burns_attempts_in_it() {
    for why in [failed(BACKOFF), Release::Deferred { not_before: BACKOFF }] {
        let mut key = Key::claimed();
        key.give_up(ME, why);
        let left = |key: &mut Key| match key.claim(alone(OTHER)) {
            Claim::InProgress { left, .. } => left,
            other => panic!("{why:?}: {other:?}"),
        };
        assert_eq!(left(&mut key), BACKOFF);
        assert_eq!(key.left(), BACKOFF);
        key.pass(just_before(BACKOFF));
        assert_eq!(left(&mut key), MOMENT);
        key.pass(MOMENT);
        assert!(matches!(told(key.claim(ask(OTHER))), Told::Won(..)));
    }
}

// Rule 12.

#[test]
fn a_suspect_stays_one_through_every_release() {
    for why in [FAILED, DEFERRED, Release::NotStarted, Release::Interrupted] {
        let mut key = Key::expired();
        key.acquire(alone(OTHER));
        for _ in 0..3 {
            key.give_up(key.record().run.token.bits(), why);
            assert_eq!(told(key.claim(ask(THIRD))), Told::Suspect, "{why:?}");
            key.acquire(alone(key.record().run.token.bits() + 100));
        }
    }
}

#[test]
fn a_suspect_is_one_no_more_when_it_is_done_parked_or_started_afresh() {
    let suspect = || {
        let mut key = Key::expired();
        key.acquire(alone(OTHER));
        key
    };
    let mut key = suspect();
    key.complete(OTHER);
    assert!(!key.record().suspect);

    let mut key = suspect();
    key.give_up(OTHER, Release::DeadLettered);
    assert!(!key.record().suspect);

    let mut key = suspect();
    key.give_up(OTHER, FAILED);
    assert_eq!(key.attempt(of_generation(GENERATION + 1, ask(THIRD))), (1, Before::First));
    key.give_up(THIRD, FAILED);
    assert_eq!(
        key.attempt(of_generation(GENERATION + 1, ask(ME))),
        (2, Before::Failed),
        "without the permit"
    );
}

#[test]
fn a_holder_that_did_not_vanish_leaves_no_suspicion() {
    let mut key = Key::expired();
    assert_eq!(key.renew(ME), Held::Yes);
    key.give_up(ME, FAILED);
    assert!(matches!(told(key.claim(ask(OTHER))), Told::Won(3, Before::Failed)));
}

// Digests.

#[test]
fn the_first_body_is_remembered_until_a_fresh_start() {
    let digest = |claim| match claim {
        Claim::Acquired { digest, .. }
        | Claim::InProgress { digest, .. }
        | Claim::Parked { digest }
        | Claim::Done { digest } => digest,
        Claim::Suspect => panic!("a suspect has no digest yet"),
    };
    let with = |token, body| Ask { digest: Some(body), ..ask(token) };
    let mut key = Key::absent();
    assert_eq!(digest(key.claim(with(ME, 1))), Some(1));
    assert_eq!(digest(key.claim(with(OTHER, 2))), Some(1), "in progress");
    key.give_up(ME, FAILED);
    assert_eq!(digest(key.claim(with(OTHER, 2))), Some(1), "acquired");
    key.give_up(OTHER, Release::DeadLettered);
    assert_eq!(digest(key.claim(with(THIRD, 2))), Some(1), "parked");
    assert_eq!(digest(key.claim(of_generation(GENERATION + 1, with(THIRD, 2)))), Some(2), "redriven");
    key.complete(THIRD);
    assert_eq!(digest(key.claim(with(ME, 1))), Some(2), "done");
}

#[test]
fn a_body_is_remembered_once_somebody_compares() {
    let mut key = Key::released();
    key.acquire(Ask { digest: Some(7), ..ask(OTHER) });
    assert_eq!(key.record().digest, Some(7));
}

#[test]
fn a_token_is_not_shown_as_a_number_one_could_mistake() {
    assert_eq!(format!("{:?}", Token::from_bits(255)), "000000000000000000000000000000ff");
    assert_ne!(Token::random(), Token::random());
}
