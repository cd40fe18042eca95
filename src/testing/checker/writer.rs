//! [`LogWriter`]: an observer that writes a log that survives a kill.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use super::entry::{Entry, Marker};
use super::lines;
use crate::{Event, Observer};

/// Appends each event as a line of JSON and flushes it, so that after a SIGKILL the log ends with the
/// last thing that happened. Clones share the log.
///
/// Times are microseconds of the wall clock, read once when the writer is made and carried on by the
/// monotonic clock: a step of the wall clock does not show, and processes of one machine agree. Every event
/// costs a write: this is for tests and audits. With tokio's paused clock the wall clock and the monotonic
/// one part: make all writers of a test before time goes by, or use a [`Recorder`](crate::testing::Recorder).
///
/// ```
/// use guestlist::prelude::*;
/// use guestlist::testing::checker::{Log, LogWriter, Marker};
/// # let path = std::env::temp_dir().join(format!("guestlist-doc-{}.jsonl", std::process::id()));
/// let log = LogWriter::append(&path, "consumer-1")?;
/// let queue = Queue::new("orders").observer(log.observer());
/// log.mark(Marker::StoreRestarted);
/// assert_eq!(Log::read(&path)?.entries().len(), 2); // the start of the process, and the mark
/// # std::fs::remove_file(path)?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct LogWriter(Arc<Shared>);

struct Shared {
    process: Arc<str>,
    origin: (Instant, u64),
    out: Mutex<Out>,
}

struct Out {
    /// `None` after an error: a log with a hole in it proves nothing.
    to: Option<Box<dyn Write + Send>>,
    failed: Option<io::Error>,
}

impl LogWriter {
    /// Writes to the end of this file, and begins with [`Marker::ProcessStarted`]. A line that a
    /// kill tore is taken out first.
    ///
    /// # Errors
    ///
    /// The file cannot be opened, read or written.
    pub fn append(path: impl AsRef<Path>, process: impl Into<Arc<str>>) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        cut_torn_line(&mut file)?;
        Self::new(file, process)
    }

    /// Writes to anything, and begins with [`Marker::ProcessStarted`].
    ///
    /// # Errors
    ///
    /// The first line cannot be written.
    pub fn new(to: impl Write + Send + 'static, process: impl Into<Arc<str>>) -> io::Result<Self> {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let wall = u64::try_from(wall.as_micros()).unwrap_or(u64::MAX);
        let out = Mutex::new(Out { to: Some(Box::new(to)), failed: None });
        let log = Self(Arc::new(Shared { process: process.into(), origin: (Instant::now(), wall), out }));
        log.mark(Marker::ProcessStarted);
        log.failed().map_or(Ok(log), Err)
    }

    /// What to give to a queue or a layer.
    pub fn observer(&self) -> Arc<dyn Observer> {
        Arc::new(self.clone())
    }

    /// Writes a marker about this process.
    pub fn mark(&self, marker: Marker) {
        self.mark_of(Arc::clone(&self.0.process), marker);
    }

    /// Writes a marker about another process: a test does, which kills it.
    pub fn mark_of(&self, process: impl Into<Arc<str>>, marker: Marker) {
        self.write(&Entry::marker(process, self.micros(Instant::now()), marker));
    }

    /// Takes the first error of writing. After it, nothing more is written.
    pub fn failed(&self) -> Option<io::Error> {
        self.out().failed.take()
    }

    fn write(&self, entry: &Entry) {
        let mut out = self.out();
        let Some(to) = &mut out.to else { return };
        let line = lines::write(entry) + "\n";
        // One write for a line: two could be torn apart by a kill.
        if let Err(error) = to.write_all(line.as_bytes()).and_then(|()| to.flush()) {
            tracing::error!(target: "guestlist", %error, "the event log cannot be written; it ends here");
            *out = Out { to: None, failed: Some(error) };
        }
    }

    fn micros(&self, at: Instant) -> u64 {
        let (origin, wall) = self.0.origin;
        let since = |from: Instant, to: Instant| {
            u64::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u64::MAX)
        };
        wall.saturating_add(since(origin, at)).saturating_sub(since(at, origin))
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.0.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A line without its end would swallow the next one.
fn cut_torn_line(file: &mut File) -> io::Result<()> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    if whole < bytes.len() { file.set_len(whole as u64) } else { Ok(()) }
}

impl Observer for LogWriter {
    fn observe(&self, event: &Event) {
        self.write(&Entry::from_event(Arc::clone(&self.0.process), event, |at| self.micros(at)));
    }
}

impl fmt::Debug for LogWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogWriter").field("process", &self.0.process).finish_non_exhaustive()
    }
}
