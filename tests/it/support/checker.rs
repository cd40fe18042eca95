//! Proves invariants from the log of events alone (I15).

use std::collections::BTreeMap;

use guestlist::dedup::Before;
use guestlist::dedup::protocol::Token;
use guestlist::{DedupKey, Event, EventKind, Outcome};

/// The events of each delivery, in order.
pub(crate) fn sequences(events: &[Event]) -> BTreeMap<u64, Vec<Event>> {
    let mut deliveries: BTreeMap<u64, Vec<Event>> = BTreeMap::new();
    for event in events {
        deliveries.entry(event.delivery).or_default().push(*event);
    }
    deliveries
}

/// Panics at the first thing in the log that breaks a promise.
pub(crate) fn check(events: &[Event]) {
    for (delivery, sequence) in sequences(events) {
        if let Err(broken) = whole(&sequence) {
            let kinds: Vec<_> = sequence.iter().map(|event| event.kind).collect();
            panic!("delivery {delivery}: {broken}: {kinds:?}");
        }
    }
    one_holder_at_a_time(events);
    fences_grow(events);
}

/// A delivery's story has a beginning, reasons, and at most one end (a killed process writes none).
fn whole(sequence: &[Event]) -> Result<(), String> {
    let before =
        |at: usize, wanted: fn(&EventKind) -> bool| sequence[..at].iter().any(|event| wanted(&event.kind));
    if sequence[0].kind != EventKind::Received {
        return Err("it does not begin with its arrival".to_owned());
    }
    let ends = sequence.iter().filter(|event| is_end(&event.kind)).count();
    if ends > 1 {
        return Err(format!("it has {ends} ends"));
    }
    for (at, event) in sequence.iter().enumerate() {
        let reason = match event.kind {
            EventKind::Claimed(_) | EventKind::Duplicate => before(at, |kind| *kind == EventKind::Identified),
            EventKind::Ran | EventKind::Failed(_) => before(at, |kind| *kind == EventKind::Started),
            EventKind::Completed | EventKind::Gap => before(at, |kind| *kind == EventKind::Ran),
            EventKind::Released(_) | EventKind::LeaseLost => {
                before(at, |kind| matches!(kind, EventKind::Claimed(_)))
            }
            EventKind::Acked(outcome) => acked_for_a_reason(outcome, |wanted| before(at, wanted)),
            // What is done is not delivered again by us.
            EventKind::Returned(_) => !before(at, |kind| {
                matches!(
                    kind,
                    EventKind::Completed | EventKind::Gap | EventKind::Copied | EventKind::Duplicate
                )
            }),
            _ => true,
        };
        if !reason {
            return Err(format!("no reason for {:?}", event.kind));
        }
        // The claim of a future that was dropped may end late.
        let late = matches!(event.kind, EventKind::Released(_) | EventKind::Completed | EventKind::LeaseLost);
        if before(at, is_end) && !late {
            return Err(format!("{:?} after the end", event.kind));
        }
    }
    Ok(())
}

const fn is_end(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Acked(_) | EventKind::Returned(_) | EventKind::Unsettled)
}

/// I1: which of the permitted reasons an ack had.
fn acked_for_a_reason(outcome: Outcome, before: impl Fn(fn(&EventKind) -> bool) -> bool) -> bool {
    match outcome {
        Outcome::Handled => before(|kind| *kind == EventKind::Completed),
        Outcome::HandledUnrecorded => before(|kind| *kind == EventKind::Gap),
        Outcome::HandledUnchecked => {
            before(|kind| *kind == EventKind::Ran) && !before(|kind| matches!(kind, EventKind::Claimed(_)))
        }
        Outcome::Duplicate => before(|kind| *kind == EventKind::Duplicate),
        Outcome::DeadLettered(_) => before(|kind| *kind == EventKind::Copied),
        _ => false,
    }
}

/// I2, I3: between the start of a run and its end, nobody else starts that key, unless the first has lost it,
/// or vanished (then it is `Claimed(Vanished)` that the next one says).
fn one_holder_at_a_time(events: &[Event]) {
    let mut running: BTreeMap<DedupKey, (Token, u64)> = BTreeMap::new();
    for event in events {
        let (Some(key), Some(run)) = (event.key, event.run) else { continue };
        match event.kind {
            EventKind::Claimed(Before::Vanished) => {
                running.remove(&key);
            }
            EventKind::Started => {
                let other = running.insert(key, (run.token, event.delivery));
                assert!(
                    other.is_none_or(|(token, _)| token == run.token),
                    "{key}: delivery {} starts while delivery {:?} runs",
                    event.delivery,
                    other.map(|(_, delivery)| delivery),
                );
            }
            EventKind::Completed
            | EventKind::Gap
            | EventKind::Released(_)
            | EventKind::LeaseLost
            // Its release may take effect before it is heard of.
            | EventKind::Failed(_) => {
                running.retain(|other, (token, _)| *other != key || *token != run.token);
            }
            _ => {}
        }
    }
}

/// A later claim of a key has a higher fence.
fn fences_grow(events: &[Event]) {
    let mut last: BTreeMap<DedupKey, u64> = BTreeMap::new();
    for event in events {
        if let (EventKind::Claimed(_), Some(key), Some(run)) = (event.kind, event.key, event.run) {
            let older = last.insert(key, run.fence.0);
            assert!(
                older.is_none_or(|older| older < run.fence.0),
                "{key}: fence {:?} after {older:?}",
                run.fence
            );
        }
    }
}
