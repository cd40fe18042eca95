//! The folder: made, closed to other users, and locked.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::StoreError;

const LOCK: &str = "guestlist.lock";
const DATA: &str = "data";
const NEW: &str = "new";

/// How long an opening waits for the one before it to end: a handle that was just dropped, or
/// the predecessor of this process.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The folder of a store, ours until it is dropped. The lock is the kernel's: it ends with the
/// process, however that ends, and nobody has to clean up after it.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        make(path).map_err(|error| failed(path, "made", error))?;
        refuse_a_foreign_one(path)?;
        close_to_others(path).map_err(|error| failed(path, "closed to other users", error))?;
        let lock = lock(path)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Where the data is. It appears whole or not at all: `make` makes it beside, and it is
    /// renamed when it is on the disk.
    pub(super) fn data(
        &self,
        make: impl FnOnce(&Path) -> Result<(), StoreError>,
    ) -> Result<PathBuf, StoreError> {
        let (data, new) = (self.path.join(DATA), self.path.join(NEW));
        let failed = |error| failed(&self.path, "filled", error);
        if !data.try_exists().map_err(failed)? {
            remove(&new).map_err(failed)?;
            make(&new)?;
            fs::rename(&new, &data).and_then(|()| sync(&self.path)).map_err(failed)?;
        }
        Ok(data)
    }
}

fn failed(path: &Path, what: &str, error: io::Error) -> StoreError {
    StoreError::new(format!("the folder {} of the durable store could not be {what}", path.display()))
        .with_source(error)
}

fn make(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(path)?;
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(Ok(()), sync)
}

/// A wrong path must not get the permissions of a stranger's folder changed.
fn refuse_a_foreign_one(path: &Path) -> Result<(), StoreError> {
    let mut entries = fs::read_dir(path).map_err(|error| failed(path, "read", error))?;
    if path.join(LOCK).is_file() || entries.next().is_none() {
        return Ok(());
    }
    Err(StoreError::new(format!(
        "{} is neither empty nor a durable store: give it a folder of its own",
        path.display()
    )))
}

#[cfg(unix)]
fn close_to_others(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    match fs::metadata(path)?.permissions().mode() & 0o777 {
        0o700 => Ok(()),
        _ => fs::set_permissions(path, fs::Permissions::from_mode(0o700)),
    }
}

#[cfg(not(unix))]
#[expect(clippy::unnecessary_wraps, reason = "the other build can fail")]
fn close_to_others(_: &Path) -> io::Result<()> {
    Ok(())
}

fn lock(path: &Path) -> Result<File, StoreError> {
    let failed = |error| failed(path, "locked", error);
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file =
        options.create(true).truncate(false).read(true).write(true).open(path.join(LOCK)).map_err(failed)?;
    let patient_until = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if Instant::now() < patient_until => std::thread::sleep(LOCK_PAUSE),
            Err(TryLockError::WouldBlock) => return Err(in_use(path, &mut file)),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
    }
    // For the error of whoever comes second; a full disk is no reason not to open.
    let _ =
        file.rewind().and_then(|()| file.set_len(0)).and_then(|()| write!(file, "{}", std::process::id()));
    Ok(file)
}

fn in_use(path: &Path, lock: &mut File) -> StoreError {
    let mut holder = String::new();
    let holder = match lock.read_to_string(&mut holder).ok().and_then(|_| holder.trim().parse::<u32>().ok()) {
        Some(id) if id == std::process::id() => "this process: clone the store that it has".to_owned(),
        Some(id) => format!("process {id}"),
        None => "another process".to_owned(),
    };
    StoreError::new(format!("the durable store in {} is open already, in {holder}", path.display()))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(unix)]
fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Windows does not sync folders.
#[cfg(not(unix))]
#[expect(clippy::unnecessary_wraps, reason = "the other build can fail")]
fn sync(_: &Path) -> io::Result<()> {
    Ok(())
}
