//! [`HoldSteps`]: the delays that a broker without delays of its own can keep.

use std::time::Duration;

use crate::defaults;

/// The delays for which RabbitMQ has a hold queue each, in ascending order.
///
/// Any other delay is made of several, one hop after the other: the longest step that fits is taken, the message
/// comes back, and what is left of the delay is taken up anew. The last hop is the shortest step, so a message is
/// late by less than that. What is left is known to the id's record in the store, or, of a time that the sender asked for, to the
/// copy. Of a message that is handled without a claim (it has no id, or the store is away and the queue goes on) nobody knows it:
/// it comes back after the first hop.
///
/// ```
/// use guestlist::broker::HoldSteps;
/// use std::time::Duration;
/// let steps = HoldSteps::new([Duration::from_secs(60), Duration::from_secs(5)]);
/// assert_eq!(steps.hop(Duration::from_secs(80)), Duration::from_secs(60)); // then 20 s are left:
/// assert_eq!(steps.hop(Duration::from_secs(20)), Duration::from_secs(5));
/// assert_eq!(steps.hop(Duration::from_millis(1)), Duration::from_secs(5));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldSteps(Vec<Duration>);

/// The longest time to live that RabbitMQ takes for a queue: 2^32 - 1 ms, 49 days.
pub(crate) const LONGEST: Duration = Duration::from_millis(u32::MAX as u64);

impl HoldSteps {
    /// These steps, in any order.
    pub fn new(steps: impl IntoIterator<Item = Duration>) -> Self {
        let mut steps: Vec<_> = steps.into_iter().collect();
        steps.sort_unstable();
        steps.dedup();
        Self(steps)
    }

    /// The steps in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Duration> {
        self.0.iter().copied()
    }

    /// The shortest step: no delay is shorter. Zero if there is no step at all, which no queue starts with.
    pub fn shortest(&self) -> Duration {
        self.0.first().copied().unwrap_or_default()
    }

    /// The step to take for the first hop of this delay: the longest that ends before the delay does, or that little
    /// later which saves a hop (a twentieth of the delay, at most 100 ms).
    pub fn hop(&self, delay: Duration) -> Duration {
        let little = (delay / 20).min(Duration::from_millis(100));
        let end = delay.saturating_add(little);
        self.iter().take_while(|step| *step <= end).last().unwrap_or(self.shortest())
    }

    /// A delay that takes one hop, for one that was drawn at random anyway: the neighbouring step below or above, by
    /// chance, so that the mean is about what was drawn.
    pub(crate) fn nearby(&self, drawn: Duration) -> Duration {
        let below = self.iter().take_while(|step| *step <= drawn).last();
        let above = self.iter().find(|step| *step > drawn);
        match (below, above) {
            (Some(below), Some(above)) => {
                let share = drawn.abs_diff(below).as_secs_f64() / above.abs_diff(below).as_secs_f64();
                if rand::random::<f64>() < share { above } else { below }
            }
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => drawn,
        }
    }

    /// The first step that RabbitMQ could not keep.
    pub(crate) fn impossible(&self) -> Option<Duration> {
        self.iter().find(|step| *step < Duration::from_millis(1) || *step > LONGEST)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// These steps and others.
    pub(crate) fn and(&self, others: impl IntoIterator<Item = Duration>) -> Self {
        Self::new(self.iter().chain(others))
    }
}

/// [`HOLD_SHORTEST`](defaults::HOLD_SHORTEST), and each four times the one before: half a second to 24 days in
/// twelve steps.
impl Default for HoldSteps {
    fn default() -> Self {
        let next = |step: &Duration| step.checked_mul(defaults::HOLD_FACTOR).filter(|step| *step <= LONGEST);
        Self::new(std::iter::successors(Some(defaults::HOLD_SHORTEST), next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// Follows the hops of a delay to its end: how many, and how late.
    fn walk(steps: &HoldSteps, delay: Duration) -> (u32, Duration) {
        let (mut left, mut hops) = (delay, 0);
        loop {
            let hop = steps.hop(left);
            hops += 1;
            if hop >= left {
                return (hops, hop.abs_diff(left));
            }
            left -= hop;
        }
    }

    #[test]
    fn a_delay_that_is_a_step_takes_one_hop_and_ends_on_time() {
        for step in HoldSteps::default().iter() {
            assert_eq!(walk(&HoldSteps::default(), step), (1, Duration::ZERO), "{step:?}");
        }
    }

    #[test]
    fn any_delay_up_to_a_year_is_less_than_a_second_late_and_takes_few_hops() {
        let year = secs(365 * 24 * 60 * 60);
        for n in 0..40_000_u32 {
            let delay = Duration::from_millis(100) + year.mul_f64((f64::from(n) / 40_000.0).powi(4));
            let (hops, late) = walk(&HoldSteps::default(), delay);
            assert!(late <= defaults::HOLD_SHORTEST, "{delay:?} is {late:?} late");
            assert!(hops <= 50, "{delay:?} takes {hops} hops");
        }
    }

    #[test]
    fn what_is_left_after_a_hop_that_took_its_time_takes_no_extra_one() {
        let steps = HoldSteps::new([secs(1), secs(4)]);
        assert_eq!(steps.hop(Duration::from_millis(3910)), secs(4));
        assert_eq!(steps.hop(Duration::from_millis(3800)), secs(1));
    }

    #[test]
    fn a_drawn_delay_becomes_a_neighbouring_step_and_keeps_its_mean() {
        let steps = HoldSteps::new([secs(1), secs(5), secs(100)]);
        let drawn: Vec<_> = (0..4000).map(|_| steps.nearby(secs(2))).collect();
        assert!(drawn.iter().all(|step| [secs(1), secs(5)].contains(step)));
        let mean = drawn.iter().sum::<Duration>() / 4000;
        assert!(
            mean > secs(1) + Duration::from_millis(800) && mean < secs(2) + Duration::from_millis(200),
            "{mean:?}"
        );
        assert_eq!(steps.nearby(Duration::ZERO), secs(1));
        assert_eq!(steps.nearby(secs(1000)), secs(100));
    }

    #[test]
    fn the_longest_step_is_one_that_rabbitmq_takes() {
        assert_eq!(HoldSteps::default().impossible(), None);
        assert_eq!(HoldSteps::default().iter().count(), 12);
        assert_eq!(HoldSteps::new([secs(50 * 24 * 60 * 60)]).impossible(), Some(secs(50 * 24 * 60 * 60)));
        assert_eq!(HoldSteps::new([Duration::ZERO, secs(1)]).impossible(), Some(Duration::ZERO));
    }
}
