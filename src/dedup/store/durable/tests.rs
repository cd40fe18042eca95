//! What needs a clock of its own or a disk that fails as told; the rest is in `tests/it/stores/durable.rs`.

mod steps;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use fjall::AbstractTree;
use proptest::prelude::*;

use super::actor::Actor;
use super::clock::Clock;
use super::disk::{Fjall, Settings};
use super::folder::Folder;
use super::ledger::{About, Disk, Ledger, Step, Write};
use super::record::{self, Stored};
use super::*;
use crate::dedup::protocol::{Before, Fence, State, Token};

const LEASE: Duration = Duration::from_secs(30);
const WINDOW: Duration = Duration::from_secs(3_600);

/// A folder that is gone with the test.
struct Temp(PathBuf);

impl Temp {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("guestlist-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self(std::env::temp_dir().join(name))
    }

    fn fjall(&self, clock: &Arc<OnceLock<Clock>>) -> Box<dyn Disk> {
        let settings =
            Settings { cache: 1 << 20, memtable: 1 << 20, garbage_after: 0, clock: Arc::clone(clock) };
        Box::new(Fjall::open(&Folder::open(&self.0).unwrap(), &settings).unwrap())
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn key(number: u8) -> DedupKey {
    DedupKey::from_bytes([number; 16])
}

fn ask(token: u128) -> Ask {
    Ask::new(Token::from_bits(token), LEASE, WINDOW)
}

/// Bytes in memory, and a fault to come.
#[derive(Clone, Default)]
struct Plug(Arc<Mutex<Bytes>>);

#[derive(Default)]
struct Bytes {
    kept: std::collections::HashMap<Vec<u8>, Vec<u8>>,
    fault: Option<Fault>,
    opened: u32,
}

#[derive(Clone, Copy)]
enum Fault {
    /// Nothing is written.
    Full,
    /// It is written, and nobody knows.
    Unsure,
    Panics,
}

impl Plug {
    fn disk(&self) -> Box<dyn Disk> {
        self.0.lock().unwrap().opened += 1;
        Box::new(self.clone())
    }

    fn actor(&self) -> Actor {
        let plug = self.clone();
        Actor::open(Box::new(move || Ok(plug.disk())), Durability::Process).unwrap()
    }

    fn set(&self, fault: Option<Fault>) {
        self.0.lock().unwrap().fault = fault;
    }

    fn opened(&self) -> u32 {
        self.0.lock().unwrap().opened
    }
}

impl Disk for Plug {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.0.lock().unwrap().kept.get(key).cloned())
    }

    fn write(&mut self, writes: Vec<Write>, _: Durability) -> Result<(), StoreError> {
        let mut bytes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match bytes.fault {
            Some(Fault::Full) => return Err(StoreError::new("no space")),
            Some(Fault::Panics) => {
                drop(bytes);
                panic!("as told")
            }
            Some(Fault::Unsure) | None => {}
        }
        for (key, value) in writes {
            match value {
                Some(value) => drop(bytes.kept.insert(key, value)),
                None => drop(bytes.kept.remove(&key)),
            }
        }
        bytes.fault.map_or(Ok(()), |_| Err(StoreError::new("who knows")))
    }

    fn sweeper(&self) -> Option<Box<dyn FnOnce() + Send>> {
        None
    }
}

fn claim(actor: &mut Actor, number: u8, token: u128) -> Result<Claim, StoreError> {
    let (call, mut answer) =
        Call::boxed(key(number), Kind::Claim, move |machine, record| machine.claim(record, &ask(token)));
    actor.serve(vec![call]);
    answer.try_recv().unwrap()
}

fn fence_of(claim: Claim) -> Fence {
    match claim {
        Claim::Acquired { fence, .. } => fence,
        other => panic!("{other:?}"),
    }
}

/// Calls until the pause before the next opening is over; says how many calls failed till then.
fn until_it_works(actor: &mut Actor, number: u8, token: u128) -> Claim {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        match claim(actor, number, token) {
            Ok(answer) => return answer,
            Err(_) => assert!(std::time::Instant::now() < deadline, "it does not come back"),
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_full_disk_is_an_outage_and_what_it_did_not_take_is_not_remembered() {
    let plug = Plug::default();
    let mut actor = plug.actor();
    claim(&mut actor, 1, 1).unwrap();
    plug.set(Some(Fault::Full));
    for token in 2..5 {
        let error = claim(&mut actor, 2, token).unwrap_err();
        assert!(error.to_string().contains("no space"), "{error}");
    }
    plug.set(None);
    let answer = until_it_works(&mut actor, 2, 9);
    assert!(matches!(answer, Claim::Acquired { attempt: 1, before: Before::First, .. }), "{answer:?}");
    let held = claim(&mut actor, 1, 9).unwrap();
    assert!(matches!(held, Claim::InProgress { .. }), "the same life: the holder may be alive: {held:?}");
}

#[test]
fn what_is_unsure_is_read_anew() {
    let plug = Plug::default();
    let mut actor = plug.actor();
    plug.set(Some(Fault::Unsure));
    claim(&mut actor, 1, 1).unwrap_err();
    plug.set(None);
    let answer = until_it_works(&mut actor, 1, 1);
    assert!(matches!(answer, Claim::Acquired { attempt: 1, .. }), "the same claim: {answer:?}");
    assert!(matches!(claim(&mut actor, 1, 2).unwrap(), Claim::InProgress { .. }));
    assert_eq!(plug.opened(), 2, "from the disk, and not from memory");
}

/// fjall would take the writes and keep them in memory until its workers come back.
#[test]
fn writers_wait_for_workers_that_are_behind_and_not_for_ever() {
    let temp = Temp::new();
    let settings = Settings { cache: 1 << 20, memtable: 1 << 16, garbage_after: 0, clock: Arc::default() };
    let mut disk = Fjall::open(&Folder::open(&temp.0).unwrap(), &settings).unwrap();
    let tree = disk.tree();
    let stuck = tree.get_flush_lock();
    let mut write = |number: u16| {
        disk.write(vec![(number.to_be_bytes().to_vec(), Some(vec![7; 4_096]))], Durability::Process)
    };
    let error =
        (0..4_096).find_map(|number| write(number).err()).expect("16 MiB fit into a memory of 64 KiB");
    assert!(error.to_string().contains("too slow"), "{error}");
    drop(stuck);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while write(0).is_err() {
        assert!(std::time::Instant::now() < deadline, "it does not go on");
    }
}

#[test]
fn a_panic_below_is_an_outage() {
    let plug = Plug::default();
    let mut actor = plug.actor();
    plug.set(Some(Fault::Panics));
    claim(&mut actor, 1, 1).unwrap_err();
    plug.set(None);
    fence_of(until_it_works(&mut actor, 1, 1));
}

#[test]
fn so_is_one_while_the_disk_is_opened_anew() {
    let plug = Plug::default();
    let mut actor = plug.actor();
    plug.set(Some(Fault::Panics));
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while plug.opened() < 3 {
        claim(&mut actor, 1, 1).unwrap_err();
        assert!(std::time::Instant::now() < deadline, "it is not opened anew");
    }
    plug.set(None);
    fence_of(until_it_works(&mut actor, 1, 1));
}

#[test]
fn a_failed_disk_is_opened_now_and_then_and_not_for_every_call() {
    let plug = Plug::default();
    let mut actor = plug.actor();
    plug.set(Some(Fault::Full));
    for token in 0..1_000 {
        claim(&mut actor, 1, token).unwrap_err();
    }
    assert!(plug.opened() < 50, "opened {} times", plug.opened());
}

#[test]
fn on_an_error_of_a_group_nobody_is_answered_from_it() {
    let plug = Plug::default();
    let mut actor = plug.actor();
    claim(&mut actor, 1, 1).unwrap();
    plug.set(Some(Fault::Full));
    let (writes, mut written) =
        Call::boxed(key(2), Kind::Claim, |machine, record| machine.claim(record, &ask(2)));
    let (reads, mut read) =
        Call::boxed(key(2), Kind::Other, |machine, record| (record, machine.live(record)));
    actor.serve(vec![writes, reads]);
    assert!(written.try_recv().unwrap().is_err());
    assert!(read.try_recv().unwrap().is_err(), "it saw a claim that was never written");
}

#[test]
fn a_call_that_nobody_waits_for_is_not_made() {
    let plug = Plug::default();
    let mut actor = plug.actor();
    let (call, answer) = Call::boxed(key(1), Kind::Claim, |machine, record| machine.claim(record, &ask(1)));
    drop(answer);
    actor.serve(vec![call]);
    assert!(matches!(claim(&mut actor, 1, 2).unwrap(), Claim::Acquired { attempt: 1, .. }));
}

/// F16: the wall clock was an hour ahead, and is right again after a restart.
#[test]
fn time_does_not_go_back_when_the_wall_clock_does() {
    let plug = Plug::default();
    let hour = 3_600_000_000;
    let ahead = Clock::start(0).now() + hour;
    let mut past = Ledger::open(plug.disk(), Durability::Process, 1, ahead, ahead).unwrap();
    let (call, mut answer) =
        Call::boxed(key(1), Kind::Claim, |machine, record| machine.claim(record, &ask(1)));
    let mut calls = [call];
    past.apply(ahead + 400_000, &mut calls).unwrap();
    calls.into_iter().for_each(Step::answer);
    let last = fence_of(answer.try_recv().unwrap().unwrap());
    assert!(last.0 > ahead);
    let (removal, _answer) = Call::boxed(key(1), Kind::Removal, |_, _| (None, ()));
    past.apply(ahead + 500_000, &mut [removal]).unwrap();
    let fence = fence_of(claim(&mut plug.actor(), 1, 2).unwrap());
    assert!(fence > last, "{fence:?} after {last:?}, of a claim that was forgotten");
}

/// F16: and the other way: a clock that was set ahead ends windows early, and nothing else.
#[test]
fn a_wall_clock_that_was_behind_does_not_make_claims_endless() {
    let plug = Plug::default();
    let behind = Clock::start(0).now() - 3_600_000_000;
    let mut past = Ledger::open(plug.disk(), Durability::Process, 1, behind, behind).unwrap();
    let (call, _answer) = Call::boxed(key(1), Kind::Claim, |machine, record| machine.claim(record, &ask(1)));
    past.apply(behind, &mut [call]).unwrap();
    let answer = claim(&mut plug.actor(), 1, 2).unwrap();
    assert!(!matches!(answer, Claim::InProgress { .. }), "{answer:?}");
}

#[test]
fn a_claim_of_an_earlier_life_is_over_and_its_holder_vanished() {
    let plug = Plug::default();
    fence_of(claim(&mut plug.actor(), 1, 1).unwrap());
    let mut actor = plug.actor();
    assert_eq!(claim(&mut actor, 1, 2).unwrap(), Claim::Suspect);
    let alone = Ask { alone: true, ..ask(3) };
    let (call, mut answer) =
        Call::boxed(key(1), Kind::Claim, move |machine, record| machine.claim(record, &alone));
    actor.serve(vec![call]);
    let answer = answer.try_recv().unwrap().unwrap();
    assert!(matches!(answer, Claim::Acquired { attempt: 2, before: Before::Vanished, .. }), "{answer:?}");
    assert!(
        matches!(claim(&mut actor, 1, 4).unwrap(), Claim::InProgress { .. }),
        "a claim of this life holds"
    );
}

/// F29.
#[test]
fn an_unknown_format_is_an_error_of_its_key_alone() {
    let plug = Plug::default();
    let mut actor = plug.actor();
    plug.0.lock().unwrap().kept.insert(vec![1; 16], vec![9; 67]);
    let error = claim(&mut actor, 1, 1).unwrap_err();
    assert!(error.to_string().contains("format 9"), "{error}");
    claim(&mut actor, 2, 1).unwrap();
    let (removal, mut removed) = Call::boxed(key(1), Kind::Removal, |_, record| (None, record.is_some()));
    actor.serve(vec![removal]);
    assert!(removed.try_recv().unwrap().unwrap(), "forgetting is the way out");
    fence_of(claim(&mut actor, 1, 1).unwrap());
    plug.0.lock().unwrap().kept.insert(super::ledger::ABOUT.to_vec(), vec![2; 13]);
    let again = plug.clone();
    let error = Actor::open(Box::new(move || Ok(again.disk())), Durability::Process).map(drop).unwrap_err();
    assert!(error.to_string().contains("another version"), "{error}");
}

#[test]
fn garbage_goes_and_nothing_else() {
    const KEPT: u64 = 500;
    const GARBAGE: u64 = 3_000;
    let temp = Temp::new();
    let clock = Arc::new(OnceLock::new());
    let disk = temp.fjall(&clock);
    let now = clock.get_or_init(|| Clock::start(0)).now();
    let mut ledger = Ledger::open(disk, Durability::Process, 1, now, now).unwrap();
    for number in 0..KEPT + GARBAGE {
        let window = if number < KEPT { WINDOW } else { Duration::from_micros(1) };
        ledger.apply(now, &mut [done(number, window)]).unwrap();
    }
    assert_eq!(on_disk(&ledger, KEPT + GARBAGE), KEPT + GARBAGE);
    ledger.sweeper().unwrap()();
    assert_eq!(on_disk(&ledger, KEPT), KEPT);
    assert_eq!(on_disk(&ledger, KEPT + GARBAGE), KEPT);
}

fn numbered(number: u64) -> DedupKey {
    let mut key = [0; 16];
    key.copy_from_slice(&blake3::hash(&number.to_be_bytes()).as_bytes()[..16]);
    DedupKey::from_bytes(key)
}

fn done(number: u64, window: Duration) -> Box<dyn Step> {
    let run = Run { token: Token::from_bits(number.into()), fence: Fence(1) };
    Call::boxed(numbered(number), Kind::Other, move |machine: Machine, record| {
        machine.complete(record, run, window)
    })
    .0
}

fn on_disk(ledger: &Ledger, numbers: u64) -> u64 {
    (0..numbers).map(|number| u64::from(ledger.has(&numbered(number)))).sum()
}

#[test]
fn urls_say_where_and_how() {
    let ok = |url: &str| {
        let builder = builder_of(url).unwrap();
        (builder.path.to_str().unwrap().to_owned(), builder.durability)
    };
    assert_eq!(ok("file:ids"), ("ids".into(), Durability::Process));
    assert_eq!(ok("file:/var/ids?durability=process"), ("/var/ids".into(), Durability::Process));
    assert_eq!(ok("file:///var/ids?durability=power"), ("/var/ids".into(), Durability::Power));
    for url in [
        "redis:x",
        "file:",
        "file:?durability=power",
        "file://host/ids",
        "file:ids?durability=",
        "file:ids?x=1",
    ] {
        let error = builder_of(url).unwrap_err().to_string();
        assert!(error.contains("file:PATH"), "{url}: {error}");
    }
}

fn any_stored() -> impl Strategy<Value = Stored> {
    let state = prop_oneof![
        any::<u64>().prop_map(|deadline| State::Claimed { deadline }),
        any::<u64>().prop_map(|not_before| State::Released { not_before }),
        Just(State::Parked),
        Just(State::Done),
    ];
    let before =
        prop::sample::select(vec![Before::First, Before::Failed, Before::HandedBack, Before::Vanished]);
    let numbers =
        (any::<u128>(), any::<u64>(), any::<u32>(), any::<u32>(), any::<u8>(), any::<u64>(), any::<u32>());
    (numbers, before, state, any::<bool>(), any::<Option<u128>>(), any::<Duration>()).prop_map(
        |(
            (token, fence, attempt, generation, interruptions, kept_until, life),
            before,
            state,
            suspect,
            digest,
            retain,
        )| {
            let run = Run { token: Token::from_bits(token), fence: Fence(fence) };
            let record = Record {
                run,
                attempt,
                before,
                state,
                generation,
                suspect,
                interruptions,
                digest,
                retain,
                kept_until,
            };
            Stored { record, life }
        },
    )
}

proptest! {
    #[test]
    fn a_record_is_read_as_it_was_written(stored in any_stored()) {
        let bytes = stored.encode();
        prop_assert_eq!(Stored::decode(&bytes).unwrap(), stored);
        prop_assert_eq!(record::kept_until(&bytes), Some(stored.record.kept_until));
        for length in 0..bytes.len() {
            prop_assert!(Stored::decode(&bytes[..length]).is_err());
        }
        prop_assert!(Stored::decode(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..120), known in any::<bool>()) {
        if let Some(first) = bytes.first_mut().filter(|_| known) {
            *first = record::VERSION;
        }
        let _ = Stored::decode(&bytes);
        let _ = record::kept_until(&bytes);
    }
}

/// How many bytes the tables have.
fn tables(folder: &Path) -> u64 {
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(about) if about.is_dir() => tables(&entry.path()),
        Ok(about) => about.len(),
        Err(_) => 0,
    };
    std::fs::read_dir(folder).map_or(0, |entries| entries.filter_map(Result::ok).map(size).sum())
}

async fn complete_all(store: &DurableStore, numbers: std::ops::Range<u64>, window: Duration) {
    let tasks = (0..64).map(|task| {
        let (store, numbers) = (store.clone(), numbers.clone());
        tokio::spawn(async move {
            for number in numbers.skip(task).step_by(64) {
                let run = Run { token: Token::from_bits(1), fence: Fence(1) };
                store.complete(&numbered(number), run, window).await.unwrap();
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

/// A store at rest but for a claim now and then: what is past its time leaves the disk, and every claim is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_disk_shrinks_while_claims_go_on() {
    const IDS: u64 = 60_000;
    const KEPT: u64 = 1_200;
    let temp = Temp::new();
    let quick = Builder {
        memtable: 1 << 20,
        garbage_after: 0,
        sweep_every: Duration::from_millis(50),
        ..DurableStore::builder(&temp.0)
    };
    let store = quick.open().await.unwrap();
    complete_all(&store, 0..IDS, Duration::from_secs(2)).await;
    complete_all(&store, IDS..IDS + KEPT, WINDOW).await;
    let shrunk = async {
        // Some 6 MB were written, and memory holds one of them.
        while tables(&temp.0.join("data/keyspaces")) > 1_000_000 {
            fence_of(store.claim(&key(1), &ask(1)).await.unwrap());
        }
    };
    tokio::time::timeout(Duration::from_secs(60), shrunk).await.expect("the disk never shrinks");
    for kept in IDS..IDS + KEPT {
        assert!(store.inspect(&numbered(kept)).await.unwrap().is_some(), "{kept} is within its window");
    }
    assert!(store.inspect(&numbered(1)).await.unwrap().is_none());
}
