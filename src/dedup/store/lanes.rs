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
    type Call: Clone + Send + 'static;
    type Answer: Send + 'static;

    /// Counts up when what the lanes wait for may never come, and new ones are needed.
    fn epoch(&self) -> u64;

    /// Waits until it can be asked, or there is no use in waiting. Until then the calls can be taken back.
    fn ready(&self) -> impl Future<Output = ()> + Send;

    /// Makes these calls in one round trip. As many answers, in the order of the calls.
    fn serve(&self, calls: Vec<Self::Call>) -> impl Future<Output = Vec<Self::Answer>> + Send;

    /// Whether a call with this answer is to be made once more, if its caller still waits.
    fn is_worth_another(&self, answer: &Self::Answer) -> bool;
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
    /// How many lanes of this epoch there are.
    busy: usize,
    epoch: u64,
}

struct Waiting<S: Server> {
    call: S::Call,
    caller: oneshot::Sender<S::Answer>,
    again: bool,
}

impl<S: Server> Clone for Lanes<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: Server> Lanes<S> {
    pub(super) fn to(server: S, limits: Limits) -> Self {
        let queue = Queue { waiting: VecDeque::new(), busy: 0, epoch: server.epoch() };
        Self(Arc::new(Inner { server, limits, queue: Mutex::new(queue) }))
    }

    /// One call, alone or in company.
    ///
    /// # Errors
    ///
    /// The runtime ended in the middle.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// A call that has begun is finished without its caller; one that waits is not made.
    pub(super) async fn call(&self, call: S::Call) -> Result<S::Answer, StoreError> {
        let (caller, answer) = oneshot::channel();
        self.enqueue(Waiting { call, caller, again: false });
        answer.await.map_err(|_| StoreError::new("the task of the store's call has ended, with its runtime?"))
    }

    fn enqueue(&self, waiting: Waiting<S>) {
        let lane = {
            let mut queue = self.queue();
            queue.waiting.push_back(waiting);
            self.free_lane(&mut queue)
        };
        // Without the lock: a task that is refused is dropped here, and takes it.
        if let Some(lane) = lane {
            tokio::spawn(lane.drive());
        }
    }

    fn free_lane(&self, queue: &mut Queue<S>) -> Option<Lane<S>> {
        let epoch = self.0.server.epoch();
        if epoch > queue.epoch {
            // The lanes of before end by themselves.
            (queue.epoch, queue.busy) = (epoch, 0);
        }
        if queue.busy >= self.0.limits.lanes {
            return None;
        }
        queue.busy += 1;
        Some(Lane { lanes: self.clone(), epoch: queue.epoch, retired: false })
    }

    fn queue(&self) -> MutexGuard<'_, Queue<S>> {
        // Each change under the lock is whole.
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// It ends when nobody waits.
struct Lane<S: Server> {
    lanes: Lanes<S>,
    epoch: u64,
    retired: bool,
}

impl<S: Server> Lane<S> {
    async fn drive(mut self) {
        loop {
            self.lanes.0.server.ready().await;
            let Some(batch) = self.next() else { return };
            self.serve(batch).await;
        }
    }

    /// What has collected, but for those who gave up.
    fn next(&mut self) -> Option<Vec<Waiting<S>>> {
        let mut queue = self.lanes.queue();
        if self.epoch != queue.epoch {
            self.retired = true;
            return None;
        }
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
        let server = &self.lanes.0.server;
        let answers = server.serve(batch.iter().map(|waiting| waiting.call.clone()).collect()).await;
        for (waiting, answer) in batch.into_iter().zip(answers) {
            if !waiting.again && server.is_worth_another(&answer) {
                self.lanes.enqueue(Waiting { again: true, ..waiting });
            } else {
                // Whoever gave up needs none.
                let _ = waiting.caller.send(answer);
            }
        }
    }
}

/// Of a lane that was dropped at work: its runtime has ended.
impl<S: Server> Drop for Lane<S> {
    fn drop(&mut self) {
        let mut queue = self.lanes.queue();
        if self.retired || self.epoch != queue.epoch {
            return;
        }
        queue.busy -= 1;
        if queue.busy == 0 {
            // Nobody would come for them.
            queue.waiting.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
        epoch: AtomicU64,
        away: AtomicBool,
    }

    /// A call that is worth another.
    const TWICE: u32 = 99;

    impl Server for Slow {
        type Call = u32;
        type Answer = (u32, usize);

        fn epoch(&self) -> u64 {
            self.epoch.load(Ordering::Relaxed)
        }

        async fn ready(&self) {
            while self.away.load(Ordering::Relaxed) {
                sleep(SECOND / 10).await;
            }
        }

        fn is_worth_another(&self, answer: &Self::Answer) -> bool {
            answer.0 == TWICE
        }

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
                lanes.enqueue(Waiting { call, caller, again: false });
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

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_server_to_be_ready_can_still_give_up() {
        let lanes = lanes(2);
        lanes.0.server.away.store(true, Ordering::Relaxed);
        timeout(SECOND, lanes.call(1)).await.unwrap_err();
        lanes.0.server.away.store(false, Ordering::Relaxed);
        assert_eq!(lanes.call(2).await.unwrap(), (2, 1));
        assert_eq!(*lanes.0.server.made.lock().unwrap(), [2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_worth_another_is_made_twice_and_no_more_and_not_for_who_gave_up() {
        let lanes = lanes(1);
        assert_eq!(lanes.call(TWICE).await.unwrap(), (TWICE, 1));
        timeout(SECOND / 2, lanes.call(TWICE)).await.unwrap_err();
        lanes.call(1).await.unwrap();
        assert_eq!(*lanes.0.server.made.lock().unwrap(), [TWICE, TWICE, TWICE, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn in_a_new_epoch_nobody_waits_for_the_lanes_of_the_old_one_and_these_end_well() {
        let (lanes, began) = (lanes(1), Instant::now());
        let (old, new) = tokio::join!(lanes.call(1), async {
            sleep(SECOND / 4).await;
            lanes.0.server.epoch.store(1, Ordering::Relaxed);
            let new = lanes.call(2).await.unwrap();
            assert_eq!(began.elapsed(), SECOND + SECOND / 4, "at once");
            new
        });
        assert_eq!((old.unwrap(), new), ((1, 1), (2, 1)));
        assert_eq!(lanes.queue().busy, 0);
        lanes.call(3).await.unwrap();
    }

    /// The task is refused, and dropped where it was to be made.
    #[test]
    fn a_call_outside_of_a_runtime_is_a_panic_and_not_a_hang() {
        let (lanes, (done, waits)) = (lanes(1), std::sync::mpsc::channel());
        std::thread::spawn(move || {
            let call = std::panic::AssertUnwindSafe(|| poll_once(lanes.call(1)));
            done.send(std::panic::catch_unwind(call).is_err()).unwrap();
        });
        assert_eq!(waits.recv_timeout(10 * SECOND), Ok(true));
    }

    fn poll_once(call: impl Future) {
        let mut call = std::pin::pin!(call);
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        let _ = call.as_mut().poll(&mut cx);
    }
}
