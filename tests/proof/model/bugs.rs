//! Bugs that the model plants, one at a time, to show that each would be found.

/// A planted bug: of the store double, or of a worker of the model. None is in shipped code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bug {
    AcksInProgress,
    MarksOnFailure,
    AcksBeforeComplete,
    CompleteIgnoresToken,
    ReleaseIgnoresToken,
    CountsAfterTheRun,
    ForgetsAtExpiry,
    InterruptionsAreFree,
    SkipsBackoff,
    RedriveKeepsCount,
    CountsRefusedSuspects,
    FailedLetterGivesBack,
    GoneIsLost,
    LeaseFromTheReply,
    SuspectsTogether,
    FailureClearsSuspicion,
    /// Beyond the list: an ack before the letter's confirmation.
    AcksUnconfirmedLetter,
    /// Beyond the list: nobody may take over a claim whose lease is over.
    ExpiredStaysHeld,
}
