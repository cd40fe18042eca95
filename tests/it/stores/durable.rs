//! The store in a folder: what survives which death.

mod contract;
mod full;
mod killed;
mod torn;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use guestlist::DedupKey;
use guestlist::dedup::protocol::{Ask, Claim, Held, Run, State, Token};
use guestlist::dedup::{Before, DedupStore, Durability, DurableStore, Release, StoreError};

const LEASE: Duration = Duration::from_secs(30);
const WINDOW: Duration = Duration::from_secs(3_600);
/// The folder that a child works in.
const FOLDER: &str = "GUESTLIST_TEST_FOLDER";

/// A folder that is gone with the test.
struct Temp(PathBuf);

impl Temp {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("guestlist-it-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self(std::env::temp_dir().join(name))
    }

    async fn open(&self) -> DurableStore {
        DurableStore::open(&self.0).await.unwrap()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// This program, to run one of its ignored tests as another process.
fn child(test: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = format!("stores::durable::{test}");
    command.args(["--exact", &name, "--ignored", "--nocapture", "--test-threads=1"]).env(FOLDER, folder);
    command
}

fn folder_of_child() -> PathBuf {
    std::env::var_os(FOLDER).expect("run as a child of another test").into()
}

/// Waits until the last handle that was dropped has let go of the folder.
fn until_free(folder: &Path) {
    fs::File::open(folder.join("guestlist.lock")).unwrap().lock().unwrap();
}

fn key(number: u64) -> DedupKey {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    key[8..].copy_from_slice(&number.to_be_bytes());
    DedupKey::from_bytes(key)
}

fn ask() -> Ask {
    Ask::new(Token::random(), LEASE, WINDOW)
}

async fn acquire(store: &DurableStore, number: u64) -> Result<(Run, u32), StoreError> {
    let ask = ask();
    match store.claim(&key(number), &ask).await? {
        Claim::Acquired { fence, attempt, .. } => Ok((Run { token: ask.token, fence }, attempt)),
        other => panic!("{number}: {other:?}"),
    }
}

async fn handle(store: &DurableStore, number: u64) -> Result<(), StoreError> {
    let (run, _) = acquire(store, number).await?;
    assert_eq!(store.complete(&key(number), run, WINDOW).await?, Held::Yes);
    Ok(())
}

async fn is_done(store: &DurableStore, number: u64) -> bool {
    let record = store.inspect(&key(number)).await.unwrap();
    record.is_some_and(|record| record.state == State::Done)
}

#[tokio::test]
async fn what_was_done_is_a_duplicate_after_a_restart() {
    for durability in [Durability::Process, Durability::Power] {
        let temp = Temp::new();
        let store = DurableStore::builder(&temp.0).durability(durability).open().await.unwrap();
        handle(&store, 1).await.unwrap();
        store.close().await.unwrap();
        let store = temp.open().await;
        assert_eq!(store.claim(&key(1), &ask()).await.unwrap(), Claim::Done { digest: None });
    }
}

/// F26 in the small: each life claims, and ends without a word.
#[tokio::test]
async fn attempts_and_suspicion_survive_restarts() {
    let temp = Temp::new();
    let store = temp.open().await;
    acquire(&store, 1).await.unwrap();
    store.close().await.unwrap();
    for attempt in 2..=5 {
        let store = temp.open().await;
        assert_eq!(
            store.claim(&key(1), &ask()).await.unwrap(),
            Claim::Suspect,
            "its lease ended with its holder"
        );
        let alone = Ask { alone: true, ..ask() };
        match store.claim(&key(1), &alone).await.unwrap() {
            Claim::Acquired { attempt: counted, before: Before::Vanished, .. } => {
                assert_eq!(counted, attempt);
            }
            other => panic!("{other:?}"),
        }
        store.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_backoff_and_a_dead_letter_survive_a_restart() {
    let temp = Temp::new();
    let store = temp.open().await;
    let (run, _) = acquire(&store, 1).await.unwrap();
    let failed = Release::Failed { not_before: Duration::from_secs(60) };
    assert_eq!(store.release(&key(1), run, failed).await.unwrap(), Held::Yes);
    let (run, _) = acquire(&store, 2).await.unwrap();
    assert_eq!(store.release(&key(2), run, Release::DeadLettered).await.unwrap(), Held::Yes);
    store.close().await.unwrap();

    let store = temp.open().await;
    let left = match store.claim(&key(1), &ask()).await.unwrap() {
        Claim::InProgress { left, .. } => left,
        other => panic!("{other:?}"),
    };
    assert!(left > Duration::from_secs(30) && left <= Duration::from_secs(60), "{left:?}");
    assert_eq!(store.claim(&key(2), &ask()).await.unwrap(), Claim::Parked { digest: None });
}

#[tokio::test]
async fn of_many_claims_of_one_key_one_is_acquired() {
    let temp = Temp::new();
    let store = temp.open().await;
    for number in 0..50 {
        let claims = (0..16).map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.claim(&key(number), &ask()).await.unwrap() })
        });
        let claims: Vec<_> = claims.collect();
        let mut acquired = 0;
        for claim in claims {
            acquired += u32::from(matches!(claim.await.unwrap(), Claim::Acquired { .. }));
        }
        assert_eq!(acquired, 1);
    }
}

#[tokio::test]
async fn a_forgotten_id_runs_again() {
    let temp = Temp::new();
    let store = temp.open().await;
    handle(&store, 1).await.unwrap();
    assert!(store.forget(&key(1)).await.unwrap());
    assert!(!store.forget(&key(1)).await.unwrap());
    assert_eq!(acquire(&store, 1).await.unwrap().1, 1);
}

#[tokio::test]
async fn a_second_opening_says_who_has_it() {
    let temp = Temp::new();
    let store = temp.open().await;
    let error = DurableStore::open(&temp.0).await.unwrap_err().to_string();
    assert!(error.contains("this process") && error.contains("clone"), "{error}");

    let output = child("open_and_say", &temp.0).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(&format!("is open already, in process {}", std::process::id())), "{said}");

    handle(&store, 1).await.unwrap();
    drop(store);
    until_free(&temp.0);
    handle(&temp.open().await, 2).await.unwrap();
}

#[tokio::test]
#[ignore = "runs as the child of another test"]
async fn open_and_say() {
    match DurableStore::open(folder_of_child()).await {
        Ok(_) => println!("opened"),
        Err(error) => println!("{error}"),
    }
}

#[tokio::test]
async fn it_is_chosen_by_url() {
    let temp = Temp::new();
    let url = format!("file://{}?durability=power", temp.0.display());
    let store = guestlist::dedup::connect(&url).await.unwrap();
    assert!(format!("{store:?}").contains("durability: Power"), "{store:?}");
    assert!(store.features().survives_restart && !store.features().shared);
}

#[tokio::test]
async fn a_closed_store_says_so() {
    let temp = Temp::new();
    let store = temp.open().await;
    let clone = store.clone();
    store.close().await.unwrap();
    let error = clone.claim(&key(1), &ask()).await.unwrap_err();
    assert!(error.to_string().contains("closed"), "{error}");
    assert!(clone.close().await.is_err());
}

#[tokio::test]
async fn a_folder_with_something_else_in_it_is_left_alone() {
    let temp = Temp::new();
    fs::create_dir(&temp.0).unwrap();
    fs::write(temp.0.join("letters.txt"), "dear").unwrap();
    let error = DurableStore::open(&temp.0).await.unwrap_err().to_string();
    assert!(error.contains("neither empty nor a durable store"), "{error}");
    assert_eq!(fs::read_dir(&temp.0).unwrap().count(), 1);
}

#[cfg(unix)]
#[tokio::test]
async fn no_other_user_can_read_it() {
    use std::os::unix::fs::PermissionsExt;
    let temp = Temp::new();
    fs::create_dir(&temp.0).unwrap();
    fs::set_permissions(&temp.0, fs::Permissions::from_mode(0o755)).unwrap();
    let store = temp.open().await;
    handle(&store, 1).await.unwrap();
    assert_eq!(fs::metadata(&temp.0).unwrap().permissions().mode() & 0o777, 0o700);
}

/// A crash in the middle of the very first opening.
#[tokio::test]
async fn what_was_never_finished_is_made_anew() {
    let temp = Temp::new();
    let store = temp.open().await;
    store.close().await.unwrap();
    fs::rename(temp.0.join("data"), temp.0.join("new")).unwrap();
    fs::remove_file(temp.0.join("new/version")).unwrap();
    let store = temp.open().await;
    handle(&store, 1).await.unwrap();
    assert!(!temp.0.join("new").exists());
}

#[tokio::test]
async fn debug_shows_the_folder_and_no_more() {
    let temp = Temp::new();
    let store = temp.open().await;
    handle(&store, 1).await.unwrap();
    let debug = format!("{store:?}");
    assert!(
        debug.starts_with("DurableStore { path: ") && debug.ends_with("durability: Process, .. }"),
        "{debug}"
    );
    assert!(!debug.contains(&key(1).to_string()));
}
