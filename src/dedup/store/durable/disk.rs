//! The disk: fjall, a log-structured store, in one folder.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fjall::compaction::filter::{
    CompactionFilter, CompactionFilterResult, Context, Factory, ItemAccessor, Verdict,
};
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use super::clock::Clock;
use super::folder::Folder;
use super::ledger::{ABOUT, Disk, Write};
use super::sweep;
use super::{Durability, StoreError, record};
use crate::dedup::protocol::Micros;

const MIB: u64 = 1024 * 1024;
const RECORDS: &str = "records";

/// Disk: journals beyond this are emptied.
const JOURNALS: u64 = 128 * MIB;
const WORKERS: usize = 2;

/// While its workers are behind, fjall takes writes into memory; at four sealed memtables or 30 runs it stops
/// the writer until they have caught up, *also when they have ended* on a full disk. So nothing is written from
/// well below that on.
const SEALED_MEMTABLES: usize = 2;
const FRESH_TABLES: usize = 18;
const LOOK_AGAIN: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// What the disk needs to know.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) cache: u64,
    pub(super) memtable: u64,
    /// Records are garbage so much later than they say, in µs. More than the time that a crash can take
    /// back from the clock, so that a fence never sinks below that of a record thrown away.
    pub(super) garbage_after: Micros,
    pub(super) clock: Arc<OnceLock<Clock>>,
}

pub(super) struct Fjall {
    database: Database,
    records: Keyspace,
    settings: Settings,
}

impl Fjall {
    pub(super) fn open(folder: &Folder, settings: &Settings) -> Result<Self, StoreError> {
        let data = folder.data(|new| Self::open_data(new, settings).map(drop))?;
        trim_the_journal(&data).map_err(|error| cannot("open", error))?;
        Self::open_data(&data, settings)
    }

    fn open_data(data: &Path, settings: &Settings) -> Result<Self, StoreError> {
        let open = || {
            let database = builder(data, settings).open()?;
            let records = database.keyspace(RECORDS, || options(settings))?;
            database.persist(PersistMode::SyncAll)?;
            Ok(Self { database, records, settings: settings.clone() })
        };
        open().map_err(|error: fjall::Error| match error {
            fjall::Error::JournalRecovery(_) | fjall::Error::Unrecoverable | fjall::Error::Storage(_)
                if !is_full(&error) =>
            {
                damaged(data, error)
            }
            // The folder is ours alone: that can only be a sweep of the time before.
            fjall::Error::Locked => StoreError::new("the durable store is still being swept: open it again"),
            error => cannot("open", error),
        })
    }

    #[cfg(test)]
    pub(super) fn tree(&self) -> fjall::AnyTree {
        self.records.tree.clone()
    }

    /// Waits while the workers are behind; not for those that have ended.
    fn wait_for_the_workers(&self) -> Result<(), StoreError> {
        let began = Instant::now();
        while self.is_behind() {
            // Does nothing but to say whether a worker has failed.
            self.database.persist(PersistMode::Buffer).map_err(|error| cannot("write to", error))?;
            if began.elapsed() > PATIENCE {
                return Err(StoreError::new(
                    "the durable store's disk is too slow: its tables are not written",
                ));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    fn is_behind(&self) -> bool {
        self.records.sealed_memtable_count() >= SEALED_MEMTABLES
            || self.records.l0_table_count() >= FRESH_TABLES
    }
}

impl Disk for Fjall {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let value = self.records.get(key).map_err(|error| cannot("read from", error))?;
        Ok(value.map(|value| value.to_vec()))
    }

    /// The journal is written (and synced) before the memory is: what failed is not read.
    fn write(&mut self, writes: Vec<Write>, durability: Durability) -> Result<(), StoreError> {
        self.wait_for_the_workers()?;
        let mode = match durability {
            Durability::Process => PersistMode::Buffer,
            Durability::Power => PersistMode::SyncData,
        };
        let mut batch = self.database.batch().durability(Some(mode));
        for (key, value) in writes {
            match value {
                Some(value) => batch.insert(&self.records, key, value),
                None => batch.remove(&self.records, key),
            }
        }
        batch.commit().map_err(|error| cannot("write to", error))
    }

    fn sweeper(&self) -> Option<Box<dyn FnOnce() + Send>> {
        let (records, settings) = (self.records.clone(), self.settings.clone());
        Some(Box::new(move || sweep::sweep(&records, &settings)))
    }
}

fn builder(data: &Path, settings: &Settings) -> fjall::DatabaseBuilder<Database> {
    let filter: Arc<dyn Factory> = Arc::new(Garbage(settings.clone()));
    Database::builder(data)
        .worker_threads(WORKERS)
        .cache_size(settings.cache)
        .max_journaling_size(JOURNALS)
        .with_compaction_filter_factories(Arc::new(move |name| {
            (name == RECORDS).then(|| Arc::clone(&filter))
        }))
}

fn options(settings: &Settings) -> KeyspaceCreateOptions {
    KeyspaceCreateOptions::default().max_memtable_size(settings.memtable)
}

fn cannot(what: &str, error: impl Into<crate::BoxError>) -> StoreError {
    let error = error.into();
    let hint = if is_full(error.as_ref()) {
        ": the disk is full; it goes on by itself when there is space"
    } else {
        ""
    };
    StoreError::new(format!("could not {what} the durable store{hint}")).with_source(error)
}

fn damaged(data: &Path, error: fjall::Error) -> StoreError {
    StoreError::new(format!(
        "the durable store in {} is damaged, and not only at its end: restore the folder, or move it away (what \
         it remembered then runs again)",
        data.parent().unwrap_or(data).display()
    ))
    .with_source(error)
}

fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let full = |kind| matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| full(error.kind()))
}

/// Journals are made of zeros, 64 MiB ahead, and a group of steps ends in bytes that are not zero.
/// Without the zeros a torn end is cut short, and not read as if it were whole but for wrong lengths.
fn trim_the_journal(data: &Path) -> io::Result<()> {
    let number = |path: &Path| path.file_stem()?.to_str()?.parse::<u64>().ok();
    let journals = fs::read_dir(data)?.filter_map(|entry| Some(entry.ok()?.path()));
    let journals = journals.filter(|path| path.extension().is_some_and(|extension| extension == "jnl"));
    let Some(newest) = journals.max_by_key(|path| number(path)) else { return Ok(()) };
    let mut file = fs::OpenOptions::new().read(true).write(true).open(newest)?;
    let length = file.metadata()?.len();
    match end_of_the_content(&mut file, length)? {
        end if end < length => file.set_len(end),
        _ => Ok(()),
    }
}

fn end_of_the_content(file: &mut fs::File, mut end: u64) -> io::Result<u64> {
    let (zeros, mut block) = (vec![0; BLOCK], vec![0; BLOCK]);
    while end > 0 {
        let from = (end - 1) / BLOCK as u64 * BLOCK as u64;
        let block = &mut block[..usize::try_from(end - from).unwrap_or(BLOCK)];
        file.seek(SeekFrom::Start(from))?;
        file.read_exact(block)?;
        if *block != zeros[..block.len()] {
            let last = block.iter().rposition(|byte| *byte != 0).unwrap_or_default();
            return Ok(from + last as u64 + 1);
        }
        end = from;
    }
    Ok(0)
}

const BLOCK: usize = 64 * 1024;

/// Throws away what is past its time, whenever fjall writes its tables anew.
struct Garbage(Settings);

impl Settings {
    /// What was kept until before this is garbage.
    pub(super) fn garbage_before(&self) -> Micros {
        self.clock.get().map_or(0, |clock| clock.now().saturating_sub(self.garbage_after))
    }
}

impl Factory for Garbage {
    fn name(&self) -> &'static str {
        "garbage"
    }

    fn make_filter(&self, _: &Context) -> Box<dyn CompactionFilter> {
        Box::new(Before(self.0.garbage_before()))
    }
}

struct Before(Micros);

impl CompactionFilter for Before {
    fn filter_item(&mut self, item: ItemAccessor<'_>, _: &Context) -> CompactionFilterResult {
        // `Destroy` would bring an older record of the key back, which can be kept for longer.
        Ok(if is_garbage(item.key(), &item.value()?, self.0) { Verdict::Remove } else { Verdict::Keep })
    }
}

pub(super) fn is_garbage(key: &[u8], value: &[u8], before: Micros) -> bool {
    key != ABOUT && record::kept_until(value).is_some_and(|until| until < before)
}
