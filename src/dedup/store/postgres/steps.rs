//! The steps of the protocol on this server's lanes: a connection each, and one commit for all steps of a statement.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgRow;
use tokio::time::{Instant, sleep};

use super::call::{Answer, Call};
use super::connections::Connections;
use super::error;
use super::names::Names;
use crate::dedup::StoreError;
use crate::dedup::store::lanes::{Lanes, Limits, Server};

/// The most steps in one statement.
const BATCH: usize = 128;

/// The first and the longest pause before a locked record is asked for again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));

#[derive(Clone)]
pub(super) struct Steps(Lanes<Postgres>);

struct Postgres {
    connections: Connections,
    names: Names,
}

impl Steps {
    /// With so many connections at most.
    pub(super) fn new(connections: Connections, names: Names, most: usize) -> Self {
        Self(Lanes::to(Postgres { connections, names }, Limits { lanes: most.max(1), batch: BATCH }))
    }

    /// One step, alone or in company.
    ///
    /// A record that another transaction holds is asked for again after a moment, for so long: nobody waits for
    /// a row in the server, where it would cost the connection and the company.
    pub(super) async fn step(&self, call: Call, patience: Duration) -> Result<Answer, StoreError> {
        let give_up_at = Instant::now() + patience;
        let mut pause = PAUSE.0;
        loop {
            let answer = self.0.call(call).await?.map_err(error::of_shared)?;
            if !answer.is_locked() || Instant::now() >= give_up_at {
                return Ok(answer);
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }
}

impl Server for Postgres {
    type Call = Call;
    /// A failed statement fails all of its steps.
    type Answer = Result<Answer, Arc<sqlx::Error>>;

    /// A statement has ten seconds on its connection, and then the lane goes on by another.
    fn epoch(&self) -> u64 {
        0
    }

    /// A connection is made when it is needed.
    async fn ready(&self) {}

    /// What is worth it is repeated on the spot.
    fn is_worth_another(&self, _: &Self::Answer) -> bool {
        false
    }

    async fn serve(&self, calls: Vec<Call>) -> Vec<Self::Answer> {
        let mut places: Vec<usize> = (0..calls.len()).collect();
        // All statements lock in the same order, so that no two wait for each other. Stable: the steps on
        // one key stay in the order in which they were asked.
        places.sort_by_key(|place| calls[*place].key);
        let sorted: Vec<Call> = places.iter().map(|place| calls[*place]).collect();
        match self.connections.lend().run(Call::statement(&self.names, &sorted)).await {
            Ok(rows) => answers(&places, &rows),
            Err(error) => {
                let error = Arc::new(error);
                places.iter().map(|_| Err(Arc::clone(&error))).collect()
            }
        }
    }
}

/// The rows carry the number of their step in the statement; the answers go where the step came from.
fn answers(places: &[usize], rows: &[PgRow]) -> Vec<Result<Answer, Arc<sqlx::Error>>> {
    let mut answers: Vec<_> = places.iter().map(|_| Err(Arc::new(sqlx::Error::RowNotFound))).collect();
    for row in rows {
        match Answer::of_row(row) {
            Ok((number, answer)) => {
                if let Some(place) = number.checked_sub(1).and_then(|step| places.get(step)) {
                    answers[*place] = Ok(answer);
                }
            }
            Err(error) => {
                tracing::error!(target: "guestlist", %error, "the Postgres store's answer is unreadable");
            }
        }
    }
    answers
}
