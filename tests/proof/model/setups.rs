//! The models that are checked whole, in three sizes.

use super::setup::{Broker, Fault, Setup};
use super::worker::Handled;

/// How large the models are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Size {
    /// For a build without optimization.
    Small,
    /// For each merge: a million states.
    Full,
    /// For a release: ten million.
    Large,
}

impl Size {
    /// What `GUESTLIST_MODEL` says (`small`, `full`, `large`), or what suits the build.
    pub(super) fn asked_for() -> Self {
        match std::env::var("GUESTLIST_MODEL").as_deref() {
            Ok("small") => Self::Small,
            Ok("full") => Self::Full,
            Ok("large") => Self::Large,
            Ok(other) => panic!("GUESTLIST_MODEL is small, full or large, not {other:?}"),
            Err(_) if cfg!(debug_assertions) => Self::Small,
            Err(_) => Self::Full,
        }
    }

    /// At least so many states are promised.
    pub(super) fn states(self) -> usize {
        match self {
            Self::Small => 10_000,
            Self::Full => 1_000_000,
            Self::Large => 10_000_000,
        }
    }
}

/// Everything that can go wrong.
const ALL: &[Fault] = &[
    Fault::Crash,
    Fault::Redelivery,
    Fault::NoAnswer,
    Fault::LateCall,
    Fault::RenewalUnanswered,
    Fault::GivenUp,
    Fault::Interruption,
    Fault::LetterRefused,
    Fault::LateLetter,
    Fault::CopyUnconfirmed,
    Fault::AckLost,
    Fault::RecordLost,
    Fault::Pause,
];

const STOPS: &[Fault] = &[Fault::Interruption];

const OUTCOMES: &[Handled] = &[Handled::Well, Handled::Transient, Handled::Permanent];
const DEFERS: &[Handled] = &[Handled::Well, Handled::Transient, Handled::Deferred];

/// Those of two ids are left out of a build without optimization.
pub(super) fn all(size: Size) -> Vec<Setup> {
    let brokers = [Broker::JetStream, Broker::Amqp].into_iter();
    brokers
        .flat_map(|broker| on(broker, size))
        .filter(|setup| size > Size::Small || setup.keys == 1)
        .collect()
}

/// The models on one broker, each with its number of faults in the three sizes.
fn on(broker: Broker, size: Size) -> Vec<Setup> {
    let faults = |faults: [u8; 3]| faults[size as usize];
    let copies = Setup { broker, copies: 2, kinds: ALL, handled: OUTCOMES, ..Setup::PLAIN };
    let single = Setup { copies: 1, ..copies };
    let one_worker = Setup { processes: &[0], ..single };
    let pair: &[u8] = if size == Size::Large { &[0, 0, 1] } else { &[0, 0] };
    let suspects = Setup { processes: pair, keys: 2, kinds: &[Fault::Crash, Fault::Pause], ..single };
    vec![
        Setup { name: "copies", faults: faults([0, 2, 2]), reaches: reached(size), ..copies },
        Setup {
            name: "one message",
            faults: faults([1, 2, 3]),
            reaches: &["a crash is suspected"],
            ..single
        },
        Setup { name: "redrive", faults: faults([0, 1, 2]), redrives: 1, reaches: REDRIVEN, ..single },
        Setup { name: "suspects", faults: faults([1, 1, 1]), reaches: SUSPECTS, ..suspects },
        Setup { name: "window", faults: faults([0, 1, 1]), window: 3, ..copies },
        Setup { name: "interruptions", faults: faults([4, 8, 9]), kinds: STOPS, ..one_worker },
        Setup { name: "deferrals", faults: faults([0, 2, 2]), handled: DEFERS, ..one_worker },
    ]
}

const REDRIVEN: &[&str] = &["a redriven copy runs"];
const SUSPECTS: &[&str] = &["a suspect runs with the permit"];

fn reached(size: Size) -> &'static [&'static str] {
    match size {
        Size::Small => &["a duplicate is acked"],
        Size::Full | Size::Large => &[
            "recorded after its own lease had ended",
            "a zombie is told so",
            "a gap is acked",
            "a lost record is done again by complete",
        ],
    }
}
