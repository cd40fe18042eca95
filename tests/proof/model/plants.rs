//! Each planted bug in the smallest model that can show it, and the promise that it breaks.

use super::bugs::Bug;
use super::setup::{Fault, Setup};
use super::setups::Size;
use super::worker::Handled;

pub(super) struct Plant {
    pub(super) name: &'static str,
    pub(super) setup: Setup,
    pub(super) caught_by: &'static str,
}

const ZOMBIE: &str = "I2 a zombie changes nothing";
const BOUNDED: &str = "I8 attempts are bounded";
const SUSPECTS: &str = "rule 12: suspects run one at a time";

/// Those of one id take no time; those of two are left out of a build without optimization.
pub(super) fn plants(size: Size) -> Vec<Plant> {
    all().into_iter().filter(|plant| size > Size::Small || plant.setup.keys == 1).collect()
}

fn all() -> Vec<Plant> {
    let copies = Setup { name: "planted: two copies", ..Setup::PLAIN };
    let single = Setup { name: "planted: one copy", processes: &[0], copies: 1, ..Setup::PLAIN };
    let pause = Setup { name: "planted: a pause", faults: 1, kinds: &[Fault::Pause], ..copies };
    let crashes = Setup { name: "planted: crashes", faults: 2, kinds: &[Fault::Crash], ..single };
    let last = Setup { name: "planted: one attempt", max_attempts: 1, ..single };
    let never = Setup { name: "planted: permanent failures", handled: &[Handled::Permanent], ..last };
    let stops = Setup { name: "planted: interruptions", faults: 4, kinds: &[Fault::Interruption], ..last };
    let redrive = Setup { name: "planted: a redrive", redrives: 1, ..never };
    let letters = Setup { name: "planted: letters", faults: 2, kinds: &[Fault::LetterRefused], ..never };
    let loss = Setup { name: "planted: a lost record", faults: 1, kinds: &[Fault::RecordLost], ..single };
    let two = Setup {
        name: "planted: two suspects",
        processes: &[0, 0],
        keys: 2,
        max_attempts: 3,
        handled: &[Handled::Transient],
        faults: 1,
        ..crashes
    };
    let plant =
        |name, bug, setup, caught_by| Plant { name, setup: Setup { bug: Some(bug), ..setup }, caught_by };
    vec![
        plant("acks in progress", Bug::AcksInProgress, copies, "I6 in progress is never acked"),
        plant("marks on failure", Bug::MarksOnFailure, single, "I4 a failure never marks"),
        plant("acks before complete", Bug::AcksBeforeComplete, single, "I5 complete precedes ack"),
        plant("complete ignores token", Bug::CompleteIgnoresToken, pause, ZOMBIE),
        plant("release ignores token", Bug::ReleaseIgnoresToken, pause, ZOMBIE),
        plant("counts after the run", Bug::CountsAfterTheRun, crashes, BOUNDED),
        plant("forgets at lease expiry", Bug::ForgetsAtExpiry, crashes, BOUNDED),
        plant("gives back for ever", Bug::InterruptionsAreFree, stops, BOUNDED),
        plant("a copy skips not_before", Bug::SkipsBackoff, copies, "I8 no copy skips the backoff"),
        plant("a redrive keeps the count", Bug::RedriveKeepsCount, redrive, "I4 a redrive runs the handler"),
        plant(
            "counts refused suspects",
            Bug::CountsRefusedSuspects,
            crashes,
            "I8 no attempt is counted twice",
        ),
        plant("a failed letter gives back", Bug::FailedLetterGivesBack, letters, BOUNDED),
        plant("Gone is Lost", Bug::GoneIsLost, loss, "rule 10: work done in time is acked"),
        plant("lease from the reply", Bug::LeaseFromTheReply, copies, "I2 one at a time"),
        plant("suspects together", Bug::SuspectsTogether, two, SUSPECTS),
        plant("Failed clears suspicion", Bug::FailureClearsSuspicion, two, SUSPECTS),
        plant("acks an unconfirmed letter", Bug::AcksUnconfirmedLetter, never, "I1 nothing is lost"),
        plant("an expired claim stays held", Bug::ExpiredStaysHeld, crashes, "I9 progress"),
    ]
}
