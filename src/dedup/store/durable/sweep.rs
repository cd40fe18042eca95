//! Garbage goes when fjall writes its tables anew, as it does under load. A store at rest keeps
//! it; so now and then somebody looks, and cleans up when half of it is garbage.

use std::ops::Bound;
use std::time::{Duration, Instant};

use fjall::Keyspace;
use tokio::sync::{mpsc, oneshot};

use super::actor::Message;
use super::disk::{Settings, is_garbage};

/// Keys are hashes: the first ones after a random one are a fair sample.
const SAMPLE: usize = 1_000;
const FLUSH_PATIENCE: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Cleans up if it is worth it. In a thread of its own: it takes as long as reading and writing
/// everything, during which claims go on.
pub(super) fn sweep(records: &Keyspace, settings: &Settings) {
    match half_is_garbage(records, settings) {
        Ok(false) => {}
        Ok(true) => {
            let began = Instant::now();
            match flush(records).and_then(|()| records.major_compact()) {
                Ok(()) => tracing::debug!(
                    target: "guestlist",
                    took = ?began.elapsed(),
                    "the durable store was swept"
                ),
                Err(error) => failed(&error),
            }
        }
        Err(error) => failed(&error),
    }
}

/// Calls go on, or fail with a reason of their own.
fn failed(error: &fjall::Error) {
    tracing::warn!(target: "guestlist", %error, "the durable store could not be swept: it goes on growing");
}

fn half_is_garbage(records: &Keyspace, settings: &Settings) -> fjall::Result<bool> {
    let before = settings.garbage_before();
    let start: [u8; 16] = rand::random();
    let after = records.range::<[u8; 16], _>((Bound::Included(start), Bound::Unbounded));
    let around = records.range::<[u8; 16], _>((Bound::Unbounded, Bound::Excluded(start)));
    let (mut seen, mut garbage) = (0, 0);
    for item in after.chain(around).take(SAMPLE) {
        let (key, value) = item.into_inner()?;
        seen += 1;
        garbage += usize::from(is_garbage(&key, &value, before));
    }
    Ok(seen == SAMPLE && garbage * 2 >= seen)
}

/// What is in memory only cannot be cleaned up.
fn flush(records: &Keyspace) -> fjall::Result<()> {
    records.rotate_memtable()?;
    let began = Instant::now();
    while records.sealed_memtable_count() > 0 && began.elapsed() < FLUSH_PATIENCE {
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

/// The thread that looks now and then, as long as there is a store.
pub(super) fn sweep_regularly(every: Duration, store: &mpsc::WeakSender<Message>) {
    loop {
        std::thread::park_timeout(every);
        let Some(calls) = store.upgrade() else { return };
        let (to, sweep) = oneshot::channel();
        let asked = calls.blocking_send(Message::Sweep(to));
        drop(calls);
        match (asked, sweep.blocking_recv()) {
            (Err(_), _) => return,
            (Ok(()), Ok(sweep)) => sweep(),
            (Ok(()), Err(_)) => {}
        }
    }
}
