//! The steps that wait for a connection, and share one.
//!
//! A call that finds a connection free goes at once and alone. While all of them are busy, calls
//! collect, and the first connection to be free takes what has collected in one statement: one round trip
//! and one commit for all. So nobody waits for company, and a burst costs few commits.
//!
//! Statements run in tasks of their own, so that a caller who gives up disturbs nobody beside it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::postgres::PgRow;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use super::call::{Answer, Call};
use super::connections::{Connections, Lent};
use super::error;
use super::names::Names;
use crate::dedup::StoreError;

/// The most steps in one statement. More would make the first of them wait for the last.
const BATCH: usize = 128;

/// The first and the longest pause before a locked record is asked for again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));

#[derive(Clone)]
pub(super) struct Lanes(Arc<Inner>);

struct Inner {
    connections: Connections,
    names: Names,
    most: usize,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    busy: usize,
}

struct Waiting {
    call: Call,
    answer: oneshot::Sender<Answered>,
}

/// A failed statement fails all of its steps.
type Answered = Result<Answer, Arc<sqlx::Error>>;

impl Lanes {
    pub(super) fn new(connections: Connections, names: Names, most: usize) -> Self {
        Self(Arc::new(Inner { connections, names, most: most.max(1), queue: Mutex::default() }))
    }

    /// One step, alone or in company.
    ///
    /// A record that another transaction holds is asked for again after a moment, for so long: nobody waits for
    /// a row in the server, where it would cost the connection and the company.
    pub(super) async fn step(&self, call: Call, patience: Duration) -> Result<Answer, StoreError> {
        let give_up_at = Instant::now() + patience;
        let mut pause = PAUSE.0;
        loop {
            let answer = self.step_once(call).await?;
            if !answer.is_locked() || Instant::now() >= give_up_at {
                return Ok(answer);
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    async fn step_once(&self, call: Call) -> Result<Answer, StoreError> {
        let (answer, answered) = oneshot::channel();
        self.enqueue(Waiting { call, answer });
        match answered.await {
            Ok(answer) => answer.map_err(error::of_shared),
            Err(_) => Err(StoreError::new("the runtime of the Postgres store's call has ended")),
        }
    }

    fn enqueue(&self, waiting: Waiting) {
        let mut queue = self.queue();
        queue.waiting.push_back(waiting);
        if queue.busy < self.0.most {
            queue.busy += 1;
            tokio::spawn(Lane { lanes: self.clone(), retired: false }.drive());
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Each change under the lock is whole.
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's worth of work: it ends when nobody waits.
struct Lane {
    lanes: Lanes,
    retired: bool,
}

impl Lane {
    async fn drive(mut self) {
        let mut connection = self.lanes.0.connections.lend();
        while let Some(batch) = self.next() {
            serve(&self.lanes.0.names, &mut connection, batch).await;
        }
    }

    /// What has collected, but for those who gave up.
    fn next(&mut self) -> Option<Vec<Waiting>> {
        let mut queue = self.lanes.queue();
        queue.waiting.retain(|waiting| !waiting.answer.is_closed());
        let size = queue.waiting.len().min(BATCH);
        if size == 0 {
            // Under the same lock as the look: whoever comes now finds a lane free.
            queue.busy -= 1;
            self.retired = true;
            return None;
        }
        Some(queue.waiting.drain(..size).collect())
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if !self.retired {
            self.lanes.queue().busy -= 1;
        }
    }
}

async fn serve(names: &Names, connection: &mut Lent, mut batch: Vec<Waiting>) {
    // All statements lock in the same order, so that no two wait for each other. Stable: the steps on
    // one key stay in the order in which they were asked.
    batch.sort_by_key(|waiting| waiting.call.key);
    let calls: Vec<Call> = batch.iter().map(|waiting| waiting.call).collect();
    match connection.run(Call::statement(names, &calls)).await {
        Ok(rows) => answer_each(batch, &rows),
        Err(error) => {
            let error = Arc::new(error);
            for waiting in batch {
                // Whoever gave up needs no answer.
                let _ = waiting.answer.send(Err(Arc::clone(&error)));
            }
        }
    }
}

fn answer_each(batch: Vec<Waiting>, rows: &[PgRow]) {
    let mut answers: Vec<Option<Answered>> = batch.iter().map(|_| None).collect();
    for row in rows {
        match Answer::of_row(row) {
            Ok((number, answer)) => {
                if let Some(place) = number.checked_sub(1).and_then(|index| answers.get_mut(index)) {
                    *place = Some(Ok(answer));
                }
            }
            Err(error) => {
                tracing::error!(target: "guestlist", %error, "the Postgres store's answer is unreadable");
            }
        }
    }
    for (waiting, answer) in batch.into_iter().zip(answers) {
        let none = || Err(Arc::new(sqlx::Error::RowNotFound));
        let _ = waiting.answer.send(answer.unwrap_or_else(none));
    }
}
