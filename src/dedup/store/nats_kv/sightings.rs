//! Since when a revision has been on record, by this process's own clock.
//!
//! The server's clock cannot be read, and two machines' clocks are never compared. But all
//! revisions of a bucket are numbered in the order of their writing. Whoever saw the bucket's last
//! revision to be `n` at some instant knows from then on that every revision up to `n` had been
//! written *before* that instant. So one look per second at that number dates every record of the
//! bucket, also those that this process sees for the first time: late by a second at most, early never.

use std::time::Duration;

use tokio::time::Instant;

use crate::dedup::protocol::Micros;

/// Of instants further back, those are kept that lie apart by this part of their age: a record's age is
/// too short by a thirty-second part at most, and a whole year fits into a few hundred marks.
const PARTS: u32 = 32;

/// So many looks may be missing before the chain of looks counts as broken, and not less than ten seconds' worth.
const MISSING_LOOKS: u32 = 10;
const SHORTEST_GAP: Duration = Duration::from_secs(10);

/// What a look at the bucket shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Look {
    /// When the server made the bucket, in microseconds: what tells it from others of its name.
    pub(super) made: Micros,
    /// The replica that leads, in a cluster.
    pub(super) leader: Option<String>,
    /// The revision written last.
    pub(super) last: u64,
}

/// The looks so far, as one unbroken chain.
///
/// Revisions count in one direction only as long as the bucket is the same and has lost nothing. A
/// server that comes back without its last writes gives their numbers out again. So anything
/// that could hide this (a look without an answer, another leader, a bucket made anew, a last
/// revision that went back) breaks the chain, and everything is dated anew from then on.
#[derive(Debug)]
pub(super) struct Sightings {
    every: Duration,
    /// The last look, and when it began and was answered.
    last: Option<(Look, Instant, Instant)>,
    marks: Vec<Mark>,
}

/// At this instant the bucket's last revision was this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    last: u64,
    at: Instant,
}

impl Sightings {
    /// None yet; a look is to follow `every` so often.
    pub(super) const fn new(every: Duration) -> Self {
        Self { every, last: None, marks: Vec::new() }
    }

    /// Takes down a look that began and was answered at these instants. Looks come one after another.
    /// Says whether it continues the chain.
    pub(super) fn saw(&mut self, look: Look, began: Instant, answered: Instant) -> bool {
        let continues = self.continues(&look, answered);
        if !continues {
            self.marks.clear();
        }
        if self.marks.last().is_none_or(|mark| mark.last < look.last) {
            self.marks.push(Mark { last: look.last, at: answered });
        }
        self.thin(answered);
        self.last = Some((look, began, answered));
        continues
    }

    /// A look had no answer.
    pub(super) fn lose_sight(&mut self) {
        self.last = None;
        self.marks.clear();
    }

    /// The instant from which on this revision is known to have been on record, if there is one.
    pub(super) fn since(&self, revision: u64) -> Option<Instant> {
        let first = self.marks.partition_point(|mark| mark.last < revision);
        self.marks.get(first).map(|mark| mark.at)
    }

    /// Whether a look began after this instant.
    pub(super) fn looked_since(&self, instant: Instant) -> bool {
        self.last.as_ref().is_some_and(|(_, began, _)| instant <= *began)
    }

    /// Whether there is no look to go by.
    pub(super) const fn is_blind(&self) -> bool {
        self.last.is_none()
    }

    /// Whether what was sent at this instant, and was written as this revision, should have been given a
    /// higher one.
    pub(super) fn contradicts(&self, sent: Instant, revision: u64) -> bool {
        self.last.as_ref().is_some_and(|(look, _, answered)| *answered <= sent && revision <= look.last)
    }

    fn continues(&self, look: &Look, answered: Instant) -> bool {
        self.last.as_ref().is_some_and(|(last, _, at)| {
            (last.made, &last.leader) == (look.made, &look.leader)
                && last.last <= look.last
                && answered.duration_since(*at) <= self.every.saturating_mul(MISSING_LOOKS).max(SHORTEST_GAP)
        })
    }

    /// Drops marks whose neighbours are close to each other for their age.
    fn thin(&mut self, now: Instant) {
        let mut kept: Vec<Mark> = Vec::with_capacity(self.marks.len());
        for (i, mark) in self.marks.iter().enumerate() {
            let between = kept.last().zip(self.marks.get(i + 1));
            let needless = between.is_some_and(|(before, after)| {
                after.at.duration_since(before.at) <= now.duration_since(after.at) / PARTS
            });
            if !needless {
                kept.push(*mark);
            }
        }
        self.marks = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn look(last: u64) -> Look {
        Look { made: 1, leader: Some("a".to_owned()), last }
    }

    /// Looks at these last revisions, a second apart; and the instant of each.
    fn chain(lasts: &[u64]) -> (Sightings, Vec<Instant>) {
        let (mut sightings, start) = (Sightings::new(SECOND), Instant::now());
        let instants: Vec<_> = (0..).take(lasts.len()).map(|i| start + SECOND * i).collect();
        for (last, at) in lasts.iter().zip(&instants) {
            sightings.saw(look(*last), *at, *at);
        }
        (sightings, instants)
    }

    #[test]
    fn a_revision_is_dated_by_the_first_look_that_shows_it_or_a_later_one() {
        let (sightings, at) = chain(&[10, 10, 12, 20]);
        let cases = [(1, Some(0)), (10, Some(0)), (11, Some(2)), (12, Some(2)), (13, Some(3)), (20, Some(3))];
        for (revision, look) in cases {
            assert_eq!(sightings.since(revision), look.map(|look: usize| at[look]), "{revision}");
        }
        assert_eq!(sightings.since(21), None);
    }

    #[test]
    fn a_break_in_the_chain_dates_everything_anew() {
        let breaks: [fn(&mut Look); 3] =
            [|look| look.made = 2, |look| look.leader = Some("b".to_owned()), |look| look.last = 9];
        for break_it in breaks {
            let (mut sightings, at) = chain(&[5, 10]);
            let mut broken = look(11);
            break_it(&mut broken);
            let now = at[1] + SECOND;
            sightings.saw(broken, now, now);
            assert_eq!(sightings.since(5), Some(now));
        }
    }

    #[test]
    fn so_does_a_look_without_an_answer_and_a_long_time_without_a_look() {
        let (mut sightings, at) = chain(&[5, 10]);
        sightings.lose_sight();
        assert_eq!(sightings.since(5), None);
        sightings.saw(look(10), at[1] + SECOND, at[1] + SECOND);
        assert_eq!(sightings.since(5), Some(at[1] + SECOND));

        let late = at[1] + SECOND * 12;
        sightings.saw(look(10), late, late);
        assert_eq!(sightings.since(5), Some(late));
        sightings.saw(look(10), late + SECOND * 10, late + SECOND * 10);
        assert_eq!(sightings.since(5), Some(late), "ten seconds are not too long");
    }

    #[test]
    fn a_week_of_looks_fits_and_no_age_is_far_too_short() {
        let minute = SECOND * 60;
        let (mut sightings, start, looks) = (Sightings::new(minute), Instant::now(), 10_000);
        for i in 0..looks {
            sightings.saw(look(u64::from(i)), start + minute * i, start + minute * i);
        }
        assert!(sightings.marks.len() < 400, "{} marks", sightings.marks.len());
        let now = start + minute * (looks - 1);
        for i in (0..looks).step_by(97) {
            let truth = now.duration_since(start + minute * i);
            let age = now.duration_since(sightings.since(u64::from(i)).unwrap());
            assert!(age <= truth && truth <= age + truth / PARTS + minute, "{i}: {age:?}, not {truth:?}");
        }
    }

    #[test]
    fn a_write_after_a_look_has_a_higher_revision() {
        let (mut sightings, start) = (Sightings::new(SECOND), Instant::now());
        assert!(!sightings.contradicts(start, 1));
        sightings.saw(look(10), start, start + SECOND);
        assert!(!sightings.contradicts(start, 10), "sent before it was answered");
        assert!(sightings.contradicts(start + SECOND, 10));
        assert!(!sightings.contradicts(start + SECOND, 11));
    }

    #[test]
    fn only_looks_that_began_later_answer_a_question() {
        let (mut sightings, start) = (Sightings::new(SECOND), Instant::now());
        assert!(!sightings.looked_since(start));
        sightings.saw(look(1), start + SECOND, start + SECOND * 2);
        assert!(sightings.looked_since(start) && sightings.looked_since(start + SECOND));
        assert!(!sightings.looked_since(start + SECOND * 2));
    }
}
