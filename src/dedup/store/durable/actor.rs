//! The thread that owns the folder. It takes the calls that have come, makes their steps as one
//! write, syncs once if it has to, and answers them: the lock of every key, the group commit, and the
//! place where blocking hurts nobody, in one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::clock::Clock;
use super::disk::{Fjall, Settings};
use super::folder::Folder;
use super::ledger::{About, Disk, Ledger, Step};
use super::sweep::sweep_regularly;
use super::{Builder, Durability, StoreError};

/// How many calls may wait; the next one waits for a place.
const WAITING: usize = 1_024;
/// How many calls are one write, at most.
const GROUP: usize = 512;
/// The first and the longest pause before a failed disk is opened anew.
const OPEN_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Cleans up, in the thread of whoever calls it.
pub(super) type Sweep = Box<dyn FnOnce() + Send>;

/// What the thread is sent.
pub(super) enum Message {
    Call(Box<dyn Step>),
    /// Whoever sweeps asks for the means; there are none while the disk has failed.
    Sweep(oneshot::Sender<Sweep>),
    Close(oneshot::Sender<Result<(), StoreError>>),
}

/// Opens the disk, and again after it failed. It owns the folder.
pub(super) type Open = Box<dyn FnMut() -> Result<Box<dyn Disk>, StoreError> + Send>;

/// Starts the thread, and waits until the folder is open.
pub(super) async fn start(builder: Builder) -> Result<mpsc::Sender<Message>, StoreError> {
    let (calls, inbox) = mpsc::channel(WAITING);
    let (opened, is_open) = oneshot::channel();
    let (calls_of_sweep, sweep_every) = (calls.downgrade(), builder.sweep_every);
    spawn("guestlist-store", move || match open_folder(&builder) {
        Err(error) => drop(opened.send(Err(error))),
        Ok(actor) => {
            let sweeping = spawn("guestlist-sweep", move || sweep_regularly(sweep_every, &calls_of_sweep));
            // Nobody waits any more: the senders are gone too, and `run` ends at once.
            let _ = opened.send(sweeping.as_ref().map(drop).map_err(|_| StoreError::new(NO_THREAD)));
            actor.run(inbox);
            sweeping.iter().for_each(Thread::unpark);
        }
    })?;
    is_open.await.unwrap_or_else(|_| Err(closed()))?;
    Ok(calls)
}

const NO_THREAD: &str = "the durable store got no thread from the system";

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<Thread, StoreError> {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(run);
    spawned
        .map(|handle| handle.thread().clone())
        .map_err(|error| StoreError::new(NO_THREAD).with_source(error))
}

pub(super) fn closed() -> StoreError {
    StoreError::new("the durable store is closed")
}

fn open_folder(builder: &Builder) -> Result<Actor, StoreError> {
    let folder = Folder::open(&builder.path)?;
    let clock = Arc::new(OnceLock::new());
    let Builder { cache, memtable, garbage_after, .. } = *builder;
    let settings = Settings { cache, memtable, garbage_after, clock: Arc::clone(&clock) };
    let open = move || Ok(Box::new(Fjall::open(&folder, &settings)?) as Box<dyn Disk>);
    let actor = Actor::open(Box::new(open), builder.durability)?;
    clock.get_or_init(|| actor.clock);
    Ok(actor)
}

/// The fields are dropped in this order: the disk is closed before the folder is let go.
pub(super) struct Actor {
    disk: State,
    open: Open,
    durability: Durability,
    life: u32,
    clock: Clock,
}

enum State {
    Open(Ledger),
    Failed { why: String, pause: Duration, again_at: Instant },
}

impl Actor {
    /// Opens the disk for the first time: another life begins.
    pub(super) fn open(mut open: Open, durability: Durability) -> Result<Self, StoreError> {
        let disk = unpanicked(&mut open)?;
        let about = About::read(disk.as_ref())?;
        let (life, clock) = (about.life.wrapping_add(1), Clock::start(about.time));
        let ledger = begin(disk, durability, life, clock)?;
        Ok(Self { disk: State::Open(ledger), open, durability, life, clock })
    }

    /// Until it is closed, or nobody has a handle any more.
    fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        let mut messages = Vec::with_capacity(GROUP);
        while inbox.blocking_recv_many(&mut messages, GROUP) > 0 {
            let mut calls = Vec::with_capacity(messages.len());
            let mut closing = None;
            for message in messages.drain(..) {
                match message {
                    Message::Call(call) => calls.push(call),
                    Message::Sweep(to) => self.lend(to),
                    Message::Close(to) => closing = Some(to),
                }
            }
            self.serve(calls);
            if let Some(to) = closing {
                inbox.close();
                let _ = to.send(self.close());
                return;
            }
        }
        let _ = self.close();
    }

    /// Makes the calls, writes, answers.
    pub(super) fn serve(&mut self, mut calls: Vec<Box<dyn Step>>) {
        calls.retain(|call| !call.is_abandoned());
        if calls.is_empty() {
            return;
        }
        if let Err(error) = self.apply(&mut calls) {
            self.fail(&error);
        }
        if let State::Failed { why, .. } = &self.disk {
            for call in &mut calls {
                call.fail(StoreError::new(why.clone()));
            }
        }
        calls.into_iter().for_each(Step::answer);
    }

    fn apply(&mut self, calls: &mut [Box<dyn Step>]) -> Result<(), StoreError> {
        self.open_again()?;
        let now = self.clock.now();
        match &mut self.disk {
            State::Open(ledger) => {
                catch_unwind(AssertUnwindSafe(|| ledger.apply(now, calls))).unwrap_or_else(panicked)
            }
            State::Failed { .. } => Ok(()),
        }
    }

    /// If it has failed, and the pause is over: what was written is read anew, in the same life.
    fn open_again(&mut self) -> Result<(), StoreError> {
        match &self.disk {
            State::Failed { again_at, .. } if Instant::now() >= *again_at => {}
            _ => return Ok(()),
        }
        let disk = unpanicked(&mut self.open)?;
        let Self { durability, life, clock, .. } = *self;
        self.disk = State::Open(begin(disk, durability, life, clock)?);
        tracing::info!(target: "guestlist", "the durable store works again");
        Ok(())
    }

    /// The disk is closed, and nothing that it has in memory is ever read again.
    fn fail(&mut self, error: &StoreError) {
        let why = in_full(error);
        let pause = match &self.disk {
            State::Open(_) => OPEN_AGAIN.0,
            State::Failed { pause, .. } => (*pause * 2).min(OPEN_AGAIN.1),
        };
        tracing::error!(target: "guestlist", why, "the durable store failed; it is opened anew");
        let failed =
            std::mem::replace(&mut self.disk, State::Failed { why, pause, again_at: Instant::now() + pause });
        let _ = catch_unwind(AssertUnwindSafe(|| drop(failed)));
    }

    fn lend(&self, to: oneshot::Sender<Sweep>) {
        if let State::Open(ledger) = &self.disk
            && let Some(sweep) = ledger.sweeper()
        {
            let _ = to.send(sweep);
        }
    }

    fn close(self) -> Result<(), StoreError> {
        let now = self.clock.now();
        match self.disk {
            State::Open(ledger) => {
                catch_unwind(AssertUnwindSafe(|| ledger.close(now))).unwrap_or_else(panicked)
            }
            State::Failed { why, .. } => Err(StoreError::new(why)),
        }
    }
}

/// A life begins or goes on, with a write: what panics there must not end the thread, which tries again.
fn begin(disk: Box<dyn Disk>, durability: Durability, life: u32, clock: Clock) -> Result<Ledger, StoreError> {
    let open = || Ledger::open(disk, durability, life, clock.opened_at(), clock.now());
    catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(panicked)
}

/// fjall panics on files that are not what it wrote: an error like others, for the calls at hand.
fn unpanicked(open: &mut Open) -> Result<Box<dyn Disk>, StoreError> {
    catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(panicked)
}

fn panicked<T>(_: Box<dyn std::any::Any + Send>) -> Result<T, StoreError> {
    Err(StoreError::new(
        "the durable store panicked: its folder is damaged, or this is a bug of guestlist or fjall",
    ))
}

/// The error is given to many, so it is told and not passed on.
fn in_full(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
