//! Rules that are about time: outages of the store, and hot loops.

use super::story::{At, Outage};
use super::{Invariant, Judge};
use crate::{DedupKey, EventKind};

/// In microseconds.
const SECOND: u64 = 1_000_000;

impl Judge<'_> {
    /// While the store is away a queue that pauses starts nothing, claimed or not.
    pub(super) fn outages(&mut self) {
        if !self.settings.pauses {
            return;
        }
        let story = self.story;
        for outage in &story.outages {
            let during: Vec<At> =
                (0..story.entries.len()).filter(|at| self.starts_during(*at, outage)).collect();
            for start in during {
                let what = "a handler started while the store was away";
                let entries: Vec<At> =
                    [Some(outage.begin), Some(start), outage.end].into_iter().flatten().collect();
                self.broken(Invariant::StoreOutage, story.step(start).key, what, &entries);
            }
        }
    }

    /// A claim that was answered just before the outage may start just after it began.
    fn starts_during(&self, at: At, outage: &Outage) -> bool {
        let story = self.story;
        let Some(step) = story.entries[at].as_step() else { return false };
        let of = outage.of.as_ref().is_none_or(|of| of == story.process(at));
        if step.kind != EventKind::Started || step.key.is_none() || !of {
            return false;
        }
        let during = |at: At| {
            let time = story.time(at);
            let begun = time > story.time(outage.begin).saturating_add(self.slack());
            begun && outage.end.is_none_or(|end| time.saturating_add(self.slack()) < story.time(end))
        };
        during(at) && self.claim_of(at).is_none_or(during)
    }

    /// Where the claim of a start was answered.
    fn claim_of(&self, start: At) -> Option<At> {
        let step = self.story.step(start);
        let claim = step.claim?;
        let key = self.story.keys.get(&step.key?)?;
        let run = key.runs.iter().find(|run| run.fence == claim.fence && run.started == Some(start))?;
        Some(run.begun)
    }

    /// Deliveries of an id in progress go back with a delay.
    pub(super) fn hot_loop(&mut self, key: DedupKey, waited: &[At]) {
        let most = self.settings.returns;
        let hot = waited.windows(most + 1).find(|returns| {
            let (first, last) = (returns[0], returns[most]);
            self.story.time(last).saturating_sub(self.story.time(first)) < SECOND
        });
        if let Some(returns) = hot {
            let what =
                format!("went back to the broker more than {most} times within a second while in progress");
            self.broken(Invariant::InProgressNeverAcked, Some(key), what, &[returns[0], returns[most]]);
        }
    }
}
