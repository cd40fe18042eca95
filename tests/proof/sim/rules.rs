//! What one step of the store does: ours, by the machine; by the rules of four peers; and with
//! one rule of ours broken on purpose, to see that it is noticed.

use std::time::Duration;

use guestlist::dedup::protocol::{Ask, Claim, Held, Machine, Record, Release, State, Token};

use super::store::{Answer, Op};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    Ours,
    Peer(Peer),
    Broken(Broken),
}

/// The rules of four peers, within an otherwise equal pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// The id is marked before the handler runs, and never unmarked.
    MarksFirst,
    /// A copy of an id that is being worked on is skipped; a failure unmarks it, a crash does not.
    SkipsInFlight,
    /// A claim has no lease: who crashes keeps it.
    NoLease,
    /// A claim has a lease, and it is not renewed.
    NoRenewal,
}

/// Rules of ours, each of them broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// Anybody renews, completes and releases anybody's claim.
    IgnoresTokens,
    /// A failed id counts as done.
    MarksFailures,
    /// `complete` is answered, and nothing is kept: the ack comes first.
    AcksFirst,
    /// An id in progress is answered as a duplicate.
    DoneWhileInProgress,
    /// A live claim is taken by whoever asks.
    IgnoresLeases,
    /// The attempt is counted when the handler fails, not when its id is claimed.
    CountsFailuresOnly,
    /// A claim is free as soon as it is released, whatever the backoff.
    IgnoresBackoff,
    /// Deferring costs an attempt, and a failure none.
    GivesFailuresBack,
    /// A parked id is answered as done.
    ParkedIsDone,
    /// An id with the dead letters stays claimable.
    NeverParks,
    /// A redrive is taken for the dead letter that it was.
    IgnoresGenerations,
    /// Claims that ran out are taken without the permit.
    NoSuspects,
    /// A claim asked again by the same token is a new one.
    CountsClaimsTwice,
    /// A fence is the same each time.
    SameFence,
}

impl Broken {
    pub(super) const ALL: [Self; 14] = [
        Self::IgnoresTokens,
        Self::MarksFailures,
        Self::AcksFirst,
        Self::DoneWhileInProgress,
        Self::IgnoresLeases,
        Self::CountsFailuresOnly,
        Self::IgnoresBackoff,
        Self::GivesFailuresBack,
        Self::ParkedIsDone,
        Self::NeverParks,
        Self::IgnoresGenerations,
        Self::NoSuspects,
        Self::CountsClaimsTwice,
        Self::SameFence,
    ];
}

type Step = (Option<Record>, Answer);

/// One atomic step of the store.
pub(super) fn step(rule: Rule, machine: Machine, record: Option<Record>, op: &Op) -> Step {
    match rule {
        Rule::Ours => ours(machine, record, op),
        Rule::Peer(peer) => theirs(peer, machine, record, op),
        Rule::Broken(broken) => wrong(broken, machine, record, op),
    }
}

fn ours(machine: Machine, record: Option<Record>, op: &Op) -> Step {
    let held = |(record, held)| (record, Answer::Held(held));
    match op {
        Op::Claim(ask) => claimed(machine.claim(record, ask)),
        Op::Renew(run, lease) => held(machine.renew(record, *run, *lease)),
        Op::Complete(run, window) => held(machine.complete(record, *run, *window)),
        Op::Release(run, why) => held(machine.release(record, *run, *why)),
    }
}

fn claimed((record, claim): (Option<Record>, Claim)) -> Step {
    (record, Answer::Claim(claim))
}

fn theirs(peer: Peer, machine: Machine, record: Option<Record>, op: &Op) -> Step {
    let other = |ask: &Ask| machine.live(record).filter(|record| record.run.token != ask.token);
    let in_flight = |record: &Record| matches!(record.state, State::Claimed { .. });
    match (peer, op) {
        (Peer::MarksFirst, Op::Claim(ask)) if other(ask).is_some() => duplicate(record),
        (Peer::MarksFirst, Op::Release(..)) | (Peer::NoRenewal, Op::Renew(..)) => {
            (record, Answer::Held(Held::Yes))
        }
        (Peer::SkipsInFlight, Op::Claim(ask)) if other(ask).is_some_and(|record| in_flight(&record)) => {
            duplicate(record)
        }
        (Peer::NoLease, Op::Claim(ask)) => ours(machine, record, &Op::Claim(Ask { lease: FOR_EVER, ..*ask })),
        (Peer::NoLease, Op::Renew(run, _)) => ours(machine, record, &Op::Renew(*run, FOR_EVER)),
        _ => ours(machine, record, op),
    }
}

/// Longer than any run of the simulation.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

fn duplicate(record: Option<Record>) -> Step {
    (record, Answer::Claim(Claim::Done { digest: None }))
}

fn wrong(broken: Broken, machine: Machine, record: Option<Record>, op: &Op) -> Step {
    let held_by = |token: Token| {
        record.map(|mut record| {
            record.run.token = token;
            record
        })
    };
    match (broken, op) {
        (Broken::IgnoresTokens, Op::Renew(run, _) | Op::Complete(run, _) | Op::Release(run, _)) => {
            ours(machine, held_by(run.token), op)
        }
        (Broken::MarksFailures, Op::Release(run, Release::Failed { .. })) => {
            let (record, _) = ours(machine, record, &Op::Complete(*run, FOR_EVER));
            (record, Answer::Held(Held::Yes))
        }
        (Broken::AcksFirst, Op::Complete(..)) => (record, Answer::Held(Held::Yes)),
        (Broken::DoneWhileInProgress, Op::Claim(_)) => match ours(machine, record, op) {
            (record, Answer::Claim(Claim::InProgress { .. })) => duplicate(record),
            other => other,
        },
        (Broken::IgnoresLeases, Op::Claim(ask)) => {
            let expired = |record: Record| match record.state {
                State::Claimed { .. } if record.run.token != ask.token => {
                    Record { state: State::Released { not_before: 0 }, suspect: false, ..record }
                }
                _ => record,
            };
            ours(machine, record.map(expired), op)
        }
        (Broken::CountsFailuresOnly, Op::Claim(ask)) => {
            let lost = |record: Record| match record.state {
                State::Claimed { .. } if record.run.token != ask.token => {
                    Record { attempt: record.attempt.saturating_sub(1), ..record }
                }
                _ => record,
            };
            ours(machine, record.map(lost), op)
        }
        (Broken::IgnoresBackoff, Op::Release(run, Release::Failed { .. })) => {
            ours(machine, record, &Op::Release(*run, Release::Failed { not_before: Duration::ZERO }))
        }
        (Broken::GivesFailuresBack, Op::Release(run, Release::Failed { not_before })) => {
            ours(machine, record, &Op::Release(*run, Release::Deferred { not_before: *not_before }))
        }
        (Broken::ParkedIsDone, Op::Claim(_)) => match ours(machine, record, op) {
            (record, Answer::Claim(Claim::Parked { .. })) => duplicate(record),
            other => other,
        },
        (Broken::NeverParks, Op::Release(run, Release::DeadLettered)) => {
            ours(machine, record, &Op::Release(*run, Release::NotStarted))
        }
        (Broken::IgnoresGenerations, Op::Claim(ask)) => {
            ours(machine, record, &Op::Claim(Ask { generation: 0, ..*ask }))
        }
        (Broken::NoSuspects, Op::Claim(ask)) => {
            ours(machine, record, &Op::Claim(Ask { alone: true, ..*ask }))
        }
        (Broken::CountsClaimsTwice, Op::Claim(ask)) => {
            let again = |record: Record| match record.state {
                State::Claimed { .. } if record.run.token == ask.token => {
                    Record { attempt: record.attempt + 1, ..record }
                }
                _ => record,
            };
            ours(machine, record.map(again), op)
        }
        (Broken::SameFence, Op::Claim(_)) => match ours(machine, record, op) {
            (Some(mut record), Answer::Claim(Claim::Acquired { attempt, before, digest, .. })) => {
                record.run.fence.0 = 7;
                let fence = record.run.fence;
                (Some(record), Answer::Claim(Claim::Acquired { fence, attempt, before, digest }))
            }
            other => other,
        },
        _ => ours(machine, record, op),
    }
}
