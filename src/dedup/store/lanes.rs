//! Calls to a server that share round trips.
//!
//! A call that finds a lane free goes at once and alone. While all lanes are busy, calls collect, and the first lane
//! to be free takes what has collected in one round trip. So nobody waits for company, and a burst costs few round
//! trips.
//!
//! Round trips are made in tasks of their own: a caller who gives up, or is not polled for a while, disturbs nobody
//! beside it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::StoreError;

/// What is at the other end of the lanes.
pub(super) trait Server: Send + Sync + 'static {
    type Call: Send + 'static;
    type Answer: Send + 'static;

    /// Makes these calls in one round trip. As many answers, in the order of the calls.
    fn serve(&self, calls: Vec<Self::Call>) -> impl Future<Output = Vec<Self::Answer>> + Send;
}

#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// The most round trips at once. At least one.
    pub(super) lanes: usize,
    /// The most calls in a round trip. More would make the first of them wait for the last.
    pub(super) batch: usize,
}

/// Clones share the lanes.
pub(super) struct Lanes<S: Server>(Arc<Inner<S>>);

struct Inner<S: Server> {
    server: S,
    limits: Limits,
    queue: Mutex<Queue<S>>,
}

struct Queue<S: Server> {
    waiting: VecDeque<Waiting<S>>,
    busy: usize,
}

struct Waiting<S: Server> {
    call: S::Call,
    caller: oneshot::Sender<S::Answer>,
}

impl<S: Server> Clone for Lanes<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: Server> Lanes<S> {
    pub(super) fn to(server: S, limits: Limits) -> Self {
        let queue = Mutex::new(Queue { waiting: VecDeque::new(), busy: 0 });
        Self(Arc::new(Inner { server, limits, queue }))
    }

    /// One call, alone or in company.
    ///
    /// # Errors
    ///
    /// The runtime ended in the middle.
    ///
    /// # Cancel safety
    ///
    /// A call that has begun is finished without its caller; one that waits is not made.
    pub(super) async fn call(&self, call: S::Call) -> Result<S::Answer, StoreError> {
        let (caller, answer) = oneshot::channel();
        self.enqueue(Waiting { call, caller });
        answer.await.map_err(|_| StoreError::new("the runtime of the store's call has ended"))
    }

    fn enqueue(&self, waiting: Waiting<S>) {
        let mut queue = self.queue();
        queue.waiting.push_back(waiting);
        if queue.busy < self.0.limits.lanes {
            queue.busy += 1;
            tokio::spawn(Lane { lanes: self.clone(), retired: false }.drive());
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue<S>> {
        // Each change under the lock is whole.
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// It ends when nobody waits.
struct Lane<S: Server> {
    lanes: Lanes<S>,
    retired: bool,
}

impl<S: Server> Lane<S> {
    async fn drive(mut self) {
        while let Some(batch) = self.next() {
            self.serve(batch).await;
        }
    }

    /// What has collected, but for those who gave up.
    fn next(&mut self) -> Option<Vec<Waiting<S>>> {
        let mut queue = self.lanes.queue();
        queue.waiting.retain(|waiting| !waiting.caller.is_closed());
        let size = queue.waiting.len().min(self.lanes.0.limits.batch);
        if size == 0 {
            // Under the same lock as the look: whoever comes now finds a lane free.
            queue.busy -= 1;
            self.retired = true;
            return None;
        }
        Some(queue.waiting.drain(..size).collect())
    }

    async fn serve(&self, batch: Vec<Waiting<S>>) {
        let (calls, callers): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|waiting| (waiting.call, waiting.caller)).unzip();
        let answers = self.lanes.0.server.serve(calls).await;
        for (caller, answer) in callers.into_iter().zip(answers) {
            // Whoever gave up needs none.
            let _ = caller.send(answer);
        }
    }
}

/// Of a lane that was dropped at work: its runtime has ended.
impl<S: Server> Drop for Lane<S> {
    fn drop(&mut self) {
        if self.retired {
            return;
        }
        let mut queue = self.lanes.queue();
        queue.busy -= 1;
        if queue.busy == 0 {
            // Nobody would come for them.
            queue.waiting.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::runtime::Builder;
    use tokio::task::JoinSet;
    use tokio::time::{Instant, sleep, timeout};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Answers a number with itself and how many came with it, after a second.
    #[derive(Default)]
    struct Slow {
        made: Arc<Mutex<Vec<u32>>>,
    }

    impl Server for Slow {
        type Call = u32;
        type Answer = (u32, usize);

        async fn serve(&self, calls: Vec<u32>) -> Vec<(u32, usize)> {
            self.made.lock().unwrap().extend(&calls);
            sleep(SECOND).await;
            calls.iter().map(|call| (*call, calls.len())).collect()
        }
    }

    fn lanes(lanes: usize) -> Lanes<Slow> {
        Lanes::to(Slow::default(), Limits { lanes, batch: 3 })
    }

    /// All answers by their calls, and how many seconds they took.
    async fn calls(lanes: &Lanes<Slow>, count: u32) -> (Vec<(u32, usize)>, u64) {
        let began = Instant::now();
        let mut callers = JoinSet::new();
        for call in 0..count {
            let lanes = lanes.clone();
            callers.spawn(async move {
                let answer = lanes.call(call).await.unwrap();
                assert_eq!(answer.0, call, "everybody's own answer");
                answer
            });
        }
        let mut answers = callers.join_all().await;
        answers.sort_unstable();
        (answers, began.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_with_a_lane_free_goes_alone() {
        let lanes = lanes(2);
        for _ in 0..3 {
            assert_eq!(lanes.call(7).await.unwrap(), (7, 1));
        }
        assert_eq!(lanes.queue().busy, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_for_a_lane_goes_together_and_in_bounded_company() {
        // The lanes' tasks begin when all have asked: two batches of three, and then what is left.
        let (answers, seconds) = calls(&lanes(2), 8).await;
        let company: Vec<usize> = answers.iter().map(|(_, company)| *company).collect();
        assert_eq!(company, [3, 3, 3, 3, 3, 3, 2, 2]);
        assert_eq!(seconds, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_before_the_call_is_made_makes_none_and_who_gives_up_later_disturbs_nobody() {
        let lanes = lanes(1);
        let (one, two) = (lanes.call(1), lanes.call(2));
        let early = async { timeout(SECOND / 2, async { tokio::join!(one, two) }).await.unwrap_err() };
        let late = async {
            sleep(SECOND / 4).await;
            timeout(SECOND / 2, lanes.call(3)).await.unwrap_err();
            lanes.call(4).await.unwrap()
        };
        let (_, answer) = tokio::join!(early, late);
        assert_eq!(answer, (4, 1));
        assert_eq!(*lanes.0.server.made.lock().unwrap(), [1, 2, 4]);
    }

    #[test]
    fn calls_whose_runtime_ends_are_told_and_others_go_on_in_another_one() {
        let lanes = lanes(2);
        let runtime = || Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let (first, second) = (runtime(), runtime());
        let answers: Vec<_> = first.block_on(async {
            let begin = |call| {
                let (caller, answer) = oneshot::channel();
                lanes.enqueue(Waiting { call, caller });
                answer
            };
            let answers = (0..8).map(begin).collect();
            sleep(SECOND / 2).await;
            answers
        });
        drop(first);
        for answer in answers {
            second.block_on(answer).unwrap_err();
        }
        assert_eq!(second.block_on(lanes.call(9)).unwrap(), (9, 1));
    }
}
