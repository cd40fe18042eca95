//! For each invariant a good log, and logs that break exactly it.

use std::time::Duration;

use super::*;

// I1

#[test]
fn i1_each_permitted_reason_for_an_ack_is_fine() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).handles(Before::First, 1, 1);
    tape.arrives("a", 2).is_duplicate();
    tape.clean();
    let mut tape = Tape::new();
    tape.arrives("a", 1).parks(Before::First, 1, 1, Cause::Permanent);
    tape.clean();
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1);
    tape.all(&[EventKind::Started, EventKind::Ran]).after(LEASE);
    tape.all(&[EventKind::Gap, EventKind::Acked(Outcome::HandledUnrecorded)]);
    assert_eq!(tape.clean().counts.gaps, 1);
    let mut tape = Tape::new();
    tape.arrives("a", 1).all(&[
        EventKind::Started,
        EventKind::Ran,
        EventKind::Acked(Outcome::HandledUnchecked),
    ]);
    assert_eq!(tape.clean_as(Checker::new().runs_without_store()).counts.unchecked, 1);
}

#[test]
fn i1_an_ack_without_its_reason_is_found() {
    let outcomes = [
        Outcome::Handled,
        Outcome::HandledUnrecorded,
        Outcome::HandledUnchecked,
        Outcome::Duplicate,
        Outcome::DeadLettered(Cause::Permanent),
    ];
    for outcome in outcomes {
        let mut tape = Tape::new();
        tape.arrives("a", 1).says(EventKind::Acked(outcome));
        assert_eq!(tape.broken(), ["I1"], "{outcome:?}");
    }
}

#[test]
fn i1_a_failed_run_is_not_acked() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1);
    tape.all(&[EventKind::Started, EventKind::Failed(Cause::Transient), EventKind::Released(FAILED)]);
    tape.says(EventKind::Acked(Outcome::Handled));
    assert_eq!(tape.broken(), ["I1"]);
}

// I2

/// `a` holds, and vanishes; `b` takes over after so long.
fn taken_over_after(micros: u64) -> Tape {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.after(micros).arrives("b", 1).handles(Before::Vanished, 2, 2);
    tape
}

#[test]
fn i2_a_claim_in_a_store_of_one_process_ends_with_its_process() {
    let tape = |kills: bool| {
        let mut tape = Tape::new();
        tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started).after(SECOND);
        if kills {
            tape.mark("a", Marker::ProcessStarted);
        }
        tape.arrives("a", 2).handles(Before::Vanished, 2, 2);
        tape
    };
    let own = Checker::new().one_clock().store_of_one_process();
    tape(true).clean_as(own);
    assert_eq!(tape(true).broken(), ["I2"], "a shared store waits for the lease");
    assert_eq!(tape(false).broken_as(own), ["I2"], "its process lives");
}

#[test]
fn i2_a_lease_that_ran_out_may_be_taken() {
    taken_over_after(LEASE).clean();
}

#[test]
fn i2_a_lease_that_is_in_force_may_not_be_taken() {
    assert_eq!(taken_over_after(LEASE - SECOND).broken(), ["I2"]);
}

#[test]
fn i2_clocks_that_differ_by_less_than_the_slack_are_no_proof() {
    assert!(taken_over_after(LEASE - SECOND).broken_as(Checker::new()).is_empty());
    assert_eq!(taken_over_after(LEASE - 2 * SECOND).broken_as(Checker::new()), ["I2"]);
}

#[test]
fn i2_a_clock_that_is_known_to_be_ahead_is_set_right() {
    let ahead = 300 * i64::try_from(SECOND).unwrap();
    let mut tape = Tape::new();
    tape.mark("b", Marker::Clock(ahead));
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.after(LEASE / 2 + 300 * SECOND).arrives("b", 1).handles(Before::Vanished, 2, 2);
    assert_eq!(tape.broken(), ["I2"]);
}

#[test]
fn i2_a_renewed_lease_counts_from_its_renewal() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).after(20 * SECOND).renews().says(EventKind::Started);
    tape.after(LEASE - SECOND).arrives("b", 1).handles(Before::Vanished, 2, 2);
    assert_eq!(tape.broken(), ["I2"]);
}

#[test]
fn i2_without_the_end_of_the_lease_in_the_log_the_setting_decides() {
    for (after, broken) in [(LEASE / 2, vec!["I2"]), (LEASE, vec![])] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).with(|step| step.claim(ClaimMark::new(1, 1)));
        tape.all(&[EventKind::Claimed(Before::First), EventKind::Started]);
        tape.after(after).arrives("b", 1).handles(Before::Vanished, 2, 2);
        assert_eq!(tape.broken(), broken);
    }
}

#[test]
fn i2_a_loss_of_the_record_makes_two_holders_and_nobody_is_to_blame() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started).after(SECOND);
    tape.mark("store", Marker::StoreLost(Some(KEY)));
    tape.after(SECOND).arrives("b", 1).handles(Before::First, 2, 1);
    tape.delivery("a", 1).says(EventKind::LeaseLost).returns(Cause::LeaseLost, Disposition::Abandon);
    assert_eq!(tape.reason(), Reason::RecordLost);
}

#[test]
fn i2_a_zombie_that_completes_is_found() {
    let mut tape = taken_over_after(LEASE);
    tape.delivery("a", 1).all(&[EventKind::Ran, EventKind::Completed, EventKind::Acked(Outcome::Handled)]);
    assert_eq!(tape.broken(), ["I2"]);
}

#[test]
fn i2_a_zombie_that_releases_is_found() {
    let mut tape = taken_over_after(LEASE);
    tape.after(SECOND).delivery("a", 1);
    tape.all(&[EventKind::Failed(Cause::Transient), EventKind::Released(FAILED)])
        .returns(Cause::Transient, AGAIN);
    assert_eq!(tape.broken(), ["I2"]);
}

#[test]
fn i2_a_zombie_that_sees_its_loss_and_goes_is_fine() {
    let mut tape = taken_over_after(LEASE);
    tape.delivery("a", 1).all(&[EventKind::LeaseLost, EventKind::Failed(Cause::LeaseLost)]);
    tape.returns(Cause::LeaseLost, Disposition::Abandon);
    tape.clean();
}

#[test]
fn i2_a_holder_that_lost_its_lease_in_its_own_view_may_complete_what_nobody_took() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started).after(LEASE);
    tape.all(&[
        EventKind::LeaseLost,
        EventKind::Ran,
        EventKind::Completed,
        EventKind::Acked(Outcome::Handled),
    ]);
    tape.clean();
}

#[test]
fn i2_a_start_an_ack_and_a_dead_letter_of_a_zombie_are_found() {
    let cause = Cause::Permanent;
    let stories: [&[EventKind]; 3] = [
        &[EventKind::LeaseLost, EventKind::Started],
        &[EventKind::Started, EventKind::LeaseLost, EventKind::Ran, EventKind::Acked(Outcome::Handled)],
        &[
            EventKind::Started,
            EventKind::LeaseLost,
            EventKind::Failed(cause),
            EventKind::Copied,
            EventKind::Acked(Outcome::DeadLettered(cause)),
        ],
    ];
    for story in stories {
        let mut tape = Tape::new();
        tape.arrives("a", 1).claims(Before::First, 1, 1).after(LEASE).all(story);
        assert_eq!(tape.broken(), ["I2"], "{story:?}");
    }
}

#[test]
fn i2_fences_grow() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).fails(Before::First, 2, 1);
    tape.arrives("a", 2).with(|step| step.claim(ClaimMark::new(7, 2)).attempt(2));
    tape.all(&[EventKind::Claimed(Before::Failed), EventKind::Started]);
    assert_eq!(tape.broken(), ["I2"]);
}

// I3

/// Handled, and claimed again so long after.
fn claimed_again_after(micros: u64, generation: u32) -> Tape {
    let mut tape = Tape::new();
    tape.arrives("a", 1).handles(Before::First, 1, 1);
    tape.after(micros).arrives("b", 1).with(|step| step.generation(generation)).handles(Before::First, 2, 1);
    tape
}

#[test]
fn i3_a_run_after_the_window_is_fine() {
    assert_eq!(claimed_again_after(HOUR, 0).reason(), Reason::WindowOver);
}

#[test]
fn i3_a_run_within_the_window_is_found_and_a_redrive_of_what_is_done_too() {
    for generation in [0, 1] {
        let tape = claimed_again_after(HOUR - SECOND, generation);
        assert_eq!(tape.broken(), ["I3"], "generation {generation}");
    }
    assert!(claimed_again_after(HOUR - SECOND, 0).broken_as(Checker::new()).is_empty(), "within the slack");
    let short = Checker::new().one_clock().window(Duration::from_secs(60));
    assert!(claimed_again_after(60 * SECOND, 0).broken_as(short).is_empty());
}

#[test]
fn i3_the_window_counts_from_before_the_store_was_asked() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).all(&[EventKind::Started, EventKind::Ran]);
    // The answer was late.
    tape.after(SECOND).all(&[EventKind::Completed, EventKind::Acked(Outcome::Handled)]);
    tape.after(HOUR - SECOND).arrives("b", 1).handles(Before::First, 2, 1);
    assert_eq!(tape.reason(), Reason::WindowOver);
}

// I4

#[test]
fn i4_an_id_that_is_marked_after_a_failure_is_found() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1);
    tape.all(&[EventKind::Started, EventKind::Failed(Cause::Timeout), EventKind::Completed]);
    tape.returns(Cause::Interrupted, LATER);
    assert_eq!(tape.broken(), ["I4"]);
}

#[test]
fn i4_a_duplicate_of_what_only_failed_is_found() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).fails(Before::First, 1, 1);
    tape.arrives("a", 2).is_duplicate();
    assert_eq!(tape.broken(), ["I4"]);
    assert!(tape.broken_as(Checker::new().begins_late()).is_empty(), "it may have succeeded before the log");
}

#[test]
fn i4_a_handler_that_succeeded_and_was_killed_may_have_been_remembered() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).all(&[EventKind::Started, EventKind::Ran]);
    tape.mark("a", Marker::ProcessKilled).arrives("b", 1).is_duplicate();
    tape.clean();
}

#[test]
fn i4_a_redrive_begins_at_attempt_one() {
    for (before, attempt, broken) in [(Before::First, 1, vec![]), (Before::Failed, 3, vec!["I4"])] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).fails(Before::First, 1, 1);
        tape.arrives("a", 2).fails(Before::Failed, 2, 2);
        tape.arrives("a", 3).with(|step| step.generation(1)).handles(before, 3, attempt);
        assert_eq!(tape.broken(), broken);
    }
}

// I5

#[test]
fn i5_an_ack_before_the_store_remembers_is_found() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).all(&[EventKind::Started, EventKind::Ran]);
    tape.all(&[EventKind::Acked(Outcome::Handled), EventKind::Completed]);
    assert_eq!(tape.broken(), ["I5"]);
}

// I6

#[test]
fn i6_a_delivery_that_waits_and_goes_back_is_fine() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.arrives("b", 1).says(EventKind::Waited).returns(Cause::InProgress, LATER);
    tape.arrives("b", 2).says(EventKind::Waited).after(SECOND);
    tape.delivery("a", 1).all(&[EventKind::Ran, EventKind::Completed, EventKind::Acked(Outcome::Handled)]);
    tape.delivery("b", 2).is_duplicate();
    tape.clean();
}

#[test]
fn i6_an_ack_of_what_is_in_progress_is_found() {
    for outcome in [Outcome::Handled, Outcome::Duplicate] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
        tape.arrives("b", 1).all(&[EventKind::Waited, EventKind::Acked(outcome)]);
        assert_eq!(tape.broken(), ["I6"], "{outcome:?}");
    }
}

#[test]
fn i6_what_is_in_progress_is_no_duplicate() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.arrives("a", 2).is_duplicate();
    assert_eq!(tape.broken(), ["I6"]);
}

#[test]
fn i6_a_hot_loop_is_found() {
    for (pause, broken) in [(SECOND / 100, vec![]), (SECOND / 101, vec!["I6"])] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
        for number in 0..=100 {
            tape.after(pause).arrives("b", number).says(EventKind::Waited).returns(Cause::InProgress, LATER);
        }
        assert_eq!(tape.broken(), broken);
        assert!(tape.broken_as(Checker::new().returns_per_second(101)).is_empty());
    }
}

// I7

/// The store is away from second 100 to 200; a handler starts at this one.
fn starts_at(second: u64) -> Tape {
    let mut tape = Tape::new();
    let script = [(100, Some(Marker::StoreAway)), (200, Some(Marker::StoreBack)), (second, None)];
    let mut script = Vec::from(script);
    script.sort_by_key(|(at, marker)| (*at, marker.is_none()));
    for (at, marker) in script {
        tape.now = at * SECOND;
        match marker {
            Some(marker) => tape.mark("store", marker),
            None => tape.arrives("a", 1).handles(Before::First, 1, 1),
        };
    }
    tape
}

#[test]
fn i7_nothing_starts_while_the_store_is_away() {
    for second in [90, 100, 200, 210] {
        starts_at(second).clean();
    }
    assert_eq!(starts_at(150).broken(), ["I7"]);
    assert!(starts_at(150).broken_as(Checker::new().runs_without_store()).is_empty());
    assert!(starts_at(101).broken_as(Checker::new()).is_empty(), "within the slack");
}

#[test]
fn i7_a_claim_from_before_the_outage_may_start() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).after(SECOND).mark("store", Marker::StoreAway);
    tape.after(SECOND).says(EventKind::Started);
    tape.clean();
}

#[test]
fn i7_an_outage_of_one_process_is_its_own() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).mark("a", Marker::StoreAway).after(SECOND);
    tape.arrives("b", 1).handles(Before::First, 1, 1);
    tape.clean();
}

#[test]
fn i7_a_run_without_a_claim_is_found_unless_the_policy_allows_it() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).all(&[
        EventKind::Started,
        EventKind::Ran,
        EventKind::Acked(Outcome::HandledUnchecked),
    ]);
    assert_eq!(tape.broken(), ["I7"]);
    tape.clean_as(Checker::new().runs_without_store());
}

// I8

#[test]
fn i8_five_attempts_and_a_dead_letter_are_fine() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).fails(Before::First, 1, 1);
    for attempt in 2..=4 {
        tape.arrives("a", u64::from(attempt)).fails(Before::Failed, u64::from(attempt), attempt);
    }
    tape.arrives("a", 5).claims(Before::Failed, 5, 5);
    tape.all(&[
        EventKind::Started,
        EventKind::Failed(Cause::Transient),
        EventKind::Copied,
        EventKind::Released(Release::DeadLettered),
        EventKind::Acked(Outcome::DeadLettered(Cause::Exhausted)),
    ]);
    assert_eq!(tape.clean().extra(Reason::Retried), 4);
    assert_eq!(
        tape.broken_as(Checker::new().max_attempts(Some(4))),
        ["I8", "I8"],
        "tried again after 4, and run"
    );
    tape.clean_as(Checker::new().max_attempts(None));
}

#[test]
fn i8_an_attempt_too_many_is_found() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).fails(Before::First, 1, 1);
    tape.arrives("a", 2).claims(Before::Failed, 2, 2).says(EventKind::Started);
    assert_eq!(tape.broken_as(Checker::new().max_attempts(Some(1))), ["I8", "I8"], "tried again, and run");
}

#[test]
fn i8_attempts_that_do_not_grow_are_found() {
    for attempt in [1, 3] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).fails(Before::First, 1, 1);
        tape.arrives("a", 2).handles(Before::Failed, 2, attempt);
        assert_eq!(tape.broken(), ["I8"], "attempt {attempt}");
    }
    let mut tape = taken_over_after(LEASE);
    tape.log = Tape::new().log();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.after(LEASE).arrives("b", 1).handles(Before::Vanished, 2, 1);
    assert_eq!(tape.broken(), ["I8"], "a crash counts");
}

#[test]
fn i8_what_is_handed_back_is_not_counted() {
    let deferred = Release::Deferred { not_before: Duration::from_secs(1) };
    for (release, attempts) in
        [(deferred, 1..=1), (Release::Interrupted, 1..=2), (Release::NotStarted, 1..=1)]
    {
        for attempt in 1..=3 {
            let before = if release == Release::NotStarted { Before::First } else { Before::HandedBack };
            let mut tape = Tape::new();
            tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
            tape.says(EventKind::Released(release)).returns(Cause::Interrupted, LATER);
            tape.arrives("a", 2).handles(before, 2, attempt);
            let broken = if attempts.contains(&attempt) { vec![] } else { vec!["I8"] };
            assert_eq!(tape.broken(), broken, "{release:?}, attempt {attempt}");
        }
    }
}

#[test]
fn i8_the_attempt_that_was_counted_is_the_one_that_runs() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).with(|step| step.attempt(2)).says(EventKind::Started);
    assert_eq!(tape.broken(), ["I8"]);
}

#[test]
fn i8_what_is_with_the_dead_letters_does_not_run() {
    for (generation, broken) in [(0, vec!["I8"]), (1, vec![]), (2, vec!["I8"])] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).parks(Before::First, 1, 1, Cause::Permanent);
        tape.arrives("a", 2).with(|step| step.generation(generation));
        let (before, attempt) = if generation == 1 { (Before::First, 1) } else { (Before::Failed, 2) };
        tape.handles(before, 2, attempt);
        assert_eq!(tape.broken(), broken, "generation {generation}");
    }
}

#[test]
fn i8_attempts_that_begin_again_without_a_reason_are_found() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).fails(Before::First, 1, 1);
    tape.after(SECOND).arrives("a", 2).handles(Before::First, 2, 1);
    assert_eq!(tape.broken(), ["I8"]);
    assert_eq!(Checker::new().check(&tape.log()).unexplained().count(), 1);
}

#[test]
fn i8_dead_letters_come_not_before_the_attempts_are_spent() {
    for cause in [Cause::Exhausted, Cause::CrashSuspected] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).parks(Before::First, 1, 1, cause);
        assert_eq!(tape.broken(), ["I8"], "{cause}");
    }
}

// I11

#[test]
fn i11_another_body_is_a_conflict_and_no_duplicate() {
    for (body, broken) in [(7, vec![]), (8, vec!["I11"])] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).with(|step| step.body(7)).handles(Before::First, 1, 1);
        tape.arrives("a", 2).with(|step| step.body(body)).is_duplicate();
        assert_eq!(tape.broken(), broken);
        assert!(tape.broken_as(Checker::new().any_body()).is_empty());
    }
    let mut tape = Tape::new();
    tape.arrives("a", 1).with(|step| step.body(7)).handles(Before::First, 1, 1);
    tape.arrives("a", 2).with(|step| step.body(8));
    tape.all(&[EventKind::Copied, EventKind::Acked(Outcome::DeadLettered(Cause::IdConflict))]);
    tape.clean();
}

#[test]
fn i11_a_retry_with_another_body_is_found() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).with(|step| step.body(7)).fails(Before::First, 1, 1);
    tape.arrives("a", 2).with(|step| step.body(8)).handles(Before::Failed, 2, 2);
    assert_eq!(tape.broken(), ["I11"]);
}

// I15

#[test]
fn i15_a_delivery_has_a_beginning_reasons_and_one_end() {
    let acked = EventKind::Acked(Outcome::Handled);
    let stories: [&[EventKind]; 4] = [
        &[EventKind::Started, EventKind::Ran, EventKind::Completed, acked, EventKind::Unsettled],
        &[EventKind::Started, EventKind::Ran, EventKind::Completed, acked, EventKind::Started],
        &[EventKind::Failed(Cause::Transient)],
        &[EventKind::Started, EventKind::Gap],
    ];
    for story in stories {
        let mut tape = Tape::new();
        tape.arrives("a", 1).claims(Before::First, 1, 1).all(story);
        assert_eq!(tape.broken(), ["I15"], "{story:?}");
    }
    let mut tape = Tape::new();
    tape.arrives("a", 1).is_duplicate();
    let late = tape.log().entries()[1..].to_vec();
    let log = Log::from([tape.arrives("a", 2).log().entries().to_vec(), late].concat());
    assert!(!Checker::new().check(&log).is_clean());
}

#[test]
fn i15_what_is_done_is_not_asked_for_again() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1);
    tape.all(&[EventKind::Started, EventKind::Ran, EventKind::Completed]).returns(Cause::Transient, AGAIN);
    assert_eq!(tape.broken(), ["I15"]);
}

#[test]
fn i15_a_claim_may_end_after_its_delivery() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.returns(Cause::Interrupted, LATER).says(EventKind::Released(Release::Interrupted));
    tape.clean();
}

#[test]
fn i15_a_process_that_counts_its_deliveries_anew_is_no_contradiction() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.after(LEASE).mark("a", Marker::ProcessStarted);
    tape.arrives("a", 1).handles(Before::Vanished, 2, 2);
    assert_eq!(tape.reason(), Reason::Crashed);
}

#[test]
fn i15_a_number_that_arrives_again_is_another_delivery() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).handles(Before::First, 1, 1);
    tape.arrives("a", 1).is_duplicate();
    assert_eq!(tape.clean().counts.deliveries, 2);
}

// The report

#[test]
fn a_report_says_what_was_found_and_panics_with_it() {
    let report = Checker::new().check(&taken_over_after(LEASE / 2).log());
    let text = report.to_string();
    for part in [
        "NOT clean",
        "1 ids",
        "2 runs, 1 of them extra",
        "broken: I2 one at a time",
        "115.000000 b #1",
        "fence 2, attempt 2",
        &KEY.to_string(),
    ] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    let panic = std::panic::catch_unwind(|| report.assert_clean()).unwrap_err();
    assert_eq!(*panic.downcast::<String>().unwrap(), text);
}
