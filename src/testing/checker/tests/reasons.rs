//! Each reason for an extra run.

use std::time::Duration;

use super::*;

#[test]
fn a_failed_attempt_is_retried() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).fails(Before::First, 1, 1);
    tape.arrives("a", 2).handles(Before::Failed, 2, 2);
    assert_eq!(tape.reason(), Reason::Retried);
}

#[test]
fn a_failed_attempt_whose_release_could_not_be_logged_is_retried() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.says(EventKind::Failed(Cause::Panic)).mark("a", Marker::ProcessKilled);
    tape.arrives("b", 1).handles(Before::Failed, 2, 2);
    assert_eq!(tape.reason(), Reason::Retried);
}

#[test]
fn a_handler_that_deferred_runs_again() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.says(EventKind::Failed(Cause::Deferred));
    tape.says(EventKind::Released(Release::Deferred { not_before: Duration::from_secs(1) }));
    tape.returns(Cause::Deferred, LATER).arrives("a", 2).handles(Before::HandedBack, 2, 1);
    assert_eq!(tape.reason(), Reason::Deferred);
}

#[test]
fn a_run_that_was_stopped_runs_again() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.says(EventKind::Released(Release::Interrupted)).returns(Cause::Interrupted, LATER);
    tape.arrives("b", 1).handles(Before::HandedBack, 2, 1);
    assert_eq!(tape.reason(), Reason::Interrupted);
}

#[test]
fn a_run_that_was_turned_away_runs_again() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.all(&[EventKind::Failed(Cause::Overloaded), EventKind::Released(Release::NotStarted)]);
    tape.returns(Cause::Overloaded, LATER).arrives("a", 2).handles(Before::First, 2, 1);
    assert_eq!(tape.reason(), Reason::TurnedAway);
}

#[test]
fn a_process_that_was_killed_is_why_its_run_is_repeated() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.mark("a", Marker::ProcessKilled).after(LEASE).arrives("b", 1).handles(Before::Vanished, 2, 2);
    assert_eq!(tape.reason(), Reason::Crashed);
    let report = tape.clean();
    let killed = |entry: &Entry| entry.what == super::super::What::Marker(Marker::ProcessKilled);
    assert!(report.extra_runs[0].entries.iter().any(killed), "{report:?}");
    assert_eq!(report.counts.unfinished, 1);
}

#[test]
fn a_process_that_is_killed_in_play_may_notice_its_lost_lease() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.mark("a", Marker::ProcessKilled).after(LEASE).says(EventKind::LeaseLost);
    tape.arrives("b", 1).handles(Before::Vanished, 2, 2);
    assert_eq!(tape.reason(), Reason::Crashed);
}

#[test]
fn a_lease_that_ran_out_is_why_its_run_is_repeated() {
    for lost in [true, false] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started).after(LEASE);
        if lost {
            tape.says(EventKind::LeaseLost).returns(Cause::LeaseLost, Disposition::Abandon);
            // A kill that comes later explains nothing.
            tape.after(SECOND).mark("a", Marker::ProcessKilled);
        }
        tape.arrives("b", 1).handles(Before::Vanished, 2, 2);
        assert_eq!(tape.reason(), Reason::LeaseExpired);
    }
}

#[test]
fn a_gap_is_why_its_run_is_repeated() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).all(&[EventKind::Started, EventKind::Ran]).after(LEASE);
    tape.all(&[EventKind::Gap, EventKind::Acked(Outcome::HandledUnrecorded)]);
    tape.arrives("a", 2).handles(Before::Vanished, 2, 2);
    assert_eq!(tape.reason(), Reason::Gap);
}

#[test]
fn an_operator_who_sends_it_back_is_why_it_runs_again() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).parks(Before::First, 1, 1, Cause::Permanent);
    tape.arrives("a", 2).with(|step| step.generation(1)).handles(Before::First, 2, 1);
    assert_eq!(tape.reason(), Reason::Redriven);
}

#[test]
fn a_window_that_is_over_forgets_failures_as_well() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).fails(Before::First, 1, 1);
    tape.after(HOUR).arrives("a", 2).handles(Before::First, 2, 1);
    assert_eq!(tape.reason(), Reason::WindowOver);
}

#[test]
fn a_deferral_longer_than_the_window_forgets_no_failures() {
    for (later, broken) in [(3 * HOUR, false), (5 * HOUR, true)] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).fails(Before::First, 1, 1).arrives("a", 2).claims(Before::Failed, 2, 2);
        tape.says(EventKind::Started).says(EventKind::Failed(Cause::Deferred));
        tape.says(EventKind::Released(Release::Deferred { not_before: Duration::from_secs(4 * 3600) }));
        tape.returns(Cause::Deferred, LATER).after(later).arrives("a", 3).handles(Before::First, 3, 1);
        assert_eq!(tape.broken().is_empty(), broken, "a fresh start after {later:?}");
    }
}

#[test]
fn a_lost_record_is_why_its_id_runs_again_and_no_other() {
    let other = DedupKey::from_bytes([2; 16]);
    for (lost, broken) in [(None, vec![]), (Some(KEY), vec![]), (Some(other), vec!["I3"])] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).handles(Before::First, 1, 1).after(SECOND).mark("test", Marker::StoreLost(lost));
        tape.after(SECOND).arrives("a", 2).handles(Before::First, 2, 1);
        assert_eq!(tape.broken(), broken, "{lost:?}");
        if broken.is_empty() {
            assert_eq!(tape.reason(), Reason::RecordLost);
        }
    }
}

#[test]
fn a_loss_before_the_run_explains_nothing() {
    let mut tape = Tape::new();
    tape.mark("test", Marker::StoreLost(None)).after(SECOND);
    tape.arrives("a", 1).handles(Before::First, 1, 1).arrives("a", 2).handles(Before::First, 2, 1);
    assert_eq!(tape.broken(), ["I3"]);
}

#[test]
fn a_holder_that_the_store_does_not_know_shows_that_the_record_was_lost() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::Started);
    tape.says(EventKind::Forgotten).arrives("b", 1).handles(Before::First, 2, 1);
    tape.delivery("a", 1).says(EventKind::LeaseLost).returns(Cause::LeaseLost, Disposition::Abandon);
    assert_eq!(tape.reason(), Reason::RecordLost);
}

#[test]
fn a_stale_replica_is_a_loss() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).handles(Before::First, 5, 1).after(LEASE).mark("test", Marker::StoreLost(None));
    // The record is what it was while the first one ran.
    tape.after(SECOND).arrives("b", 1).handles(Before::Vanished, 3, 2);
    assert_eq!(tape.reason(), Reason::RecordLost);
}

#[test]
fn a_run_without_dedup_is_why_there_are_two() {
    let unchecked = [EventKind::Started, EventKind::Ran, EventKind::Acked(Outcome::HandledUnchecked)];
    for claimed_first in [true, false] {
        let mut tape = Tape::new();
        if claimed_first {
            tape.arrives("a", 1).handles(Before::First, 1, 1);
        }
        tape.arrives("a", 2).all(&unchecked);
        if !claimed_first {
            tape.arrives("a", 3).handles(Before::First, 1, 1);
        }
        let report = tape.clean_as(Checker::new().runs_without_store());
        assert_eq!(report.extra(Reason::Unchecked), 1, "{report}");
    }
}

#[test]
fn a_claim_that_could_not_be_logged_explains_an_attempt() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).fails(Before::First, 1, 1);
    // Killed while it asked.
    tape.arrives("b", 1).mark("b", Marker::ProcessKilled);
    tape.after(LEASE).arrives("a", 2).handles(Before::Vanished, 3, 3);
    assert_eq!(tape.reason(), Reason::Crashed);
}

#[test]
fn a_claim_that_contradicts_the_run_before_is_not_explained() {
    for before in [Before::HandedBack, Before::Vanished] {
        let mut tape = Tape::new();
        tape.arrives("a", 1).fails(Before::First, 1, 1);
        tape.after(LEASE).arrives("a", 2).handles(before, 2, 2);
        assert_eq!(Checker::new().check(&tape.log()).unexplained().count(), 1, "{before:?}");
    }
}

#[test]
fn reasons_and_runs_are_counted() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).fails(Before::First, 1, 1);
    tape.arrives("a", 2)
        .claims(Before::Failed, 2, 2)
        .says(EventKind::Started)
        .mark("a", Marker::ProcessKilled);
    tape.after(LEASE).arrives("b", 3).handles(Before::Vanished, 3, 3);
    tape.arrives("b", 4).is_duplicate();
    let report = tape.clean();
    assert_eq!((report.counts.runs, report.counts.ids, report.counts.duplicates), (3, 1, 1));
    let reasons: Vec<_> = report.extra_by_reason().into_iter().collect();
    assert_eq!(reasons, [(Reason::Retried, 1), (Reason::Crashed, 1)]);
}

#[test]
fn a_letter_may_be_redriven_before_its_holder_heard_that_it_is_parked() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1);
    tape.all(&[EventKind::Started, EventKind::Failed(Cause::Permanent), EventKind::Copied]);
    tape.after(SECOND).arrives("b", 1).with(|step| step.generation(1)).handles(Before::First, 2, 1);
    assert_eq!(tape.reason(), Reason::Redriven);
}

#[test]
fn a_claim_may_be_undone_after_its_holder_gave_its_lease_up() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).claims(Before::First, 1, 1).says(EventKind::LeaseLost);
    tape.returns(Cause::LeaseLost, Disposition::Abandon);
    tape.after(SECOND).arrives("b", 1).handles(Before::First, 2, 1);
    assert!(tape.clean().extra_runs.is_empty());
}

#[test]
fn a_redrive_of_a_record_whose_first_claim_could_not_be_logged_is_a_redrive() {
    let mut tape = Tape::new();
    tape.arrives("a", 1).mark("a", Marker::ProcessKilled).after(LEASE);
    tape.arrives("b", 1).parks(Before::Vanished, 2, 2, Cause::Permanent);
    tape.arrives("b", 2).with(|step| step.generation(1)).handles(Before::First, 3, 1);
    assert_eq!(tape.reason(), Reason::Redriven);
}
