#![doc = include_str!("../../../../docs/stores/durable.md")]

mod actor;
mod clock;
mod disk;
mod folder;
mod ledger;
mod record;
mod sweep;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use self::actor::Message;
use self::ledger::{Call, Kind};
use super::{DedupStore, StoreError, StoreFeatures};
use crate::DedupKey;
use crate::dedup::protocol::{Ask, Claim, Held, Machine, Micros, Record, Release, Run};

/// A store in one folder of this machine, for one process. Cheap to clone; clones share it.
///
/// See the [page of this store](self) for what it promises and costs.
///
/// ```
/// use guestlist::dedup::{DurableStore, Durability};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), guestlist::dedup::StoreError> {
/// # let folder = std::env::temp_dir().join(format!("guestlist-doc-{}", std::process::id()));
/// let store = DurableStore::builder(&folder).durability(Durability::Power).open().await?;
/// # store.close().await?;
/// # std::fs::remove_dir_all(folder).unwrap();
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct DurableStore {
    calls: mpsc::Sender<Message>,
    path: PathBuf,
    durability: Durability,
}

/// What an answer of a [`DurableStore`] survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// The death of the process, however it comes: the operating system has it. The default.
    #[default]
    Process,
    /// The death of the machine too: the disk has it (`fdatasync`). Calls that come together share
    /// a sync.
    Power,
}

/// Opens a [`DurableStore`]; made by [`DurableStore::builder`].
#[derive(Clone, Debug)]
#[must_use = "nothing is opened before `open`"]
pub struct Builder {
    path: PathBuf,
    durability: Durability,
    cache: u64,
    memtable: u64,
    garbage_after: Micros,
    sweep_every: Duration,
}

impl DurableStore {
    /// The cache of a store that is not told otherwise: 32 MiB.
    pub const CACHE: u64 = 32 * 1024 * 1024;

    /// Opens the store in a folder, which is made if it is not there; with the defaults of [`builder`](Self::builder).
    ///
    /// # Errors
    ///
    /// As for [`Builder::open`].
    ///
    /// # Cancel safety
    ///
    /// As for [`Builder::open`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::builder(path).open().await
    }

    /// A store in this folder: it survives the process, and has a cache of [`CACHE`](Self::CACHE) bytes, until told otherwise.
    pub fn builder(path: impl AsRef<Path>) -> Builder {
        Builder {
            path: path.as_ref().to_owned(),
            durability: Durability::default(),
            cache: Self::CACHE,
            memtable: MEMTABLE,
            garbage_after: GARBAGE_AFTER,
            sweep_every: SWEEP_EVERY,
        }
    }

    /// Opens the store at a URL: `file:PATH` or `file:///PATH`, and `?durability=process` (the default) or
    /// `?durability=power` after it. The path is taken as it stands: nothing in it is decoded.
    ///
    /// ```
    /// use guestlist::dedup::DurableStore;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let error = DurableStore::connect("file:/tmp/ids?durability=always").await.unwrap_err();
    /// assert!(error.to_string().contains("power"));
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The URL is another, or as for [`Builder::open`].
    ///
    /// # Cancel safety
    ///
    /// As for [`Builder::open`].
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        builder_of(url)?.open().await
    }

    /// Closes it and waits until all is on the disk and the folder is free. Calls of clones that come later fail.
    /// Without this, the folder is free soon after the last clone is dropped.
    ///
    /// # Errors
    ///
    /// The disk has failed, or it was closed before.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: once asked, it is closed, whether or not that is waited for.
    pub async fn close(&self) -> Result<(), StoreError> {
        let (to, closed) = oneshot::channel();
        self.calls.send(Message::Close(to)).await.map_err(|_| actor::closed())?;
        closed.await.unwrap_or_else(|_| Err(actor::closed()))
    }

    /// One step of the protocol.
    async fn step<A: Send + 'static>(
        &self,
        key: &DedupKey,
        kind: Kind,
        make: impl FnMut(Machine, Option<Record>) -> (Option<Record>, A) + Send + 'static,
    ) -> Result<A, StoreError> {
        let (call, answer) = Call::boxed(*key, kind, make);
        self.calls.send(Message::Call(call)).await.map_err(|_| actor::closed())?;
        answer.await.unwrap_or_else(|_| Err(actor::closed()))
    }
}

/// Memory: up to four of these at once.
const MEMTABLE: u64 = 16 * 1024 * 1024;
/// More than a crash can take back from the clock.
const GARBAGE_AFTER: Micros = 10_000_000;
const SWEEP_EVERY: Duration = Duration::from_secs(60);

fn builder_of(url: &str) -> Result<Builder, StoreError> {
    let refused = |what: &str| {
        StoreError::new(format!(
            "{what}: the URL of a durable store is file:PATH, file:///PATH, with ?durability=process or power"
        ))
    };
    let rest = url.strip_prefix("file:").ok_or_else(|| refused("not a file URL"))?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = match path.strip_prefix("//") {
        Some(path) if path.starts_with('/') => path,
        Some(_) => return Err(refused("a file URL with a host")),
        None => path,
    };
    if path.is_empty() {
        return Err(refused("no path"));
    }
    query.split('&').filter(|pair| !pair.is_empty()).try_fold(DurableStore::builder(path), |builder, pair| {
        match pair {
            "durability=process" => Ok(builder.durability(Durability::Process)),
            "durability=power" => Ok(builder.durability(Durability::Power)),
            _ => Err(refused("an unknown parameter")),
        }
    })
}

impl Builder {
    /// What an answer survives; [`Durability::Process`] unless told otherwise.
    pub fn durability(self, durability: Durability) -> Self {
        Self { durability, ..self }
    }

    /// How many bytes of tables are kept in memory; [`DurableStore::CACHE`] unless told otherwise. Up to 64 MiB of
    /// what was just written come on top.
    pub fn cache(self, bytes: u64) -> Self {
        Self { cache: bytes, ..self }
    }

    /// Opens it. The folder is made if it is not there, and closed to other users (0700).
    ///
    /// # Errors
    ///
    /// The folder is open already, in this process or another; it holds something else; the disk is full; what
    /// is there was damaged, or written by a version that this one does not know.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: what was opened is closed again.
    pub async fn open(self) -> Result<DurableStore, StoreError> {
        let (path, durability) = (self.path.clone(), self.durability);
        Ok(DurableStore { calls: actor::start(self).await?, path, durability })
    }
}

#[async_trait]
impl DedupStore for DurableStore {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        let ask = *ask;
        self.step(key, Kind::Claim, move |machine, record| machine.claim(record, &ask)).await
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        self.step(key, Kind::Other, move |machine, record| machine.renew(record, run, lease)).await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.step(key, Kind::Other, move |machine, record| machine.complete(record, run, window)).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        self.step(key, Kind::Other, move |machine, record| machine.release(record, run, why)).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        self.step(key, Kind::Other, |machine, record| (record, machine.live(record))).await
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        self.step(key, Kind::Removal, |machine, record| (None, machine.live(record).is_some())).await
    }

    fn features(&self) -> StoreFeatures {
        StoreFeatures { shared: false, survives_restart: true, keeps: None }
    }
}

impl fmt::Debug for DurableStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DurableStore")
            .field("path", &self.path)
            .field("durability", &self.durability)
            .finish_non_exhaustive()
    }
}
