//! Torn tails and garbled journals (F21): opened at the last good state, or refused in words.

use super::*;

const IDS: u64 = 40;
const AHEAD: u64 = 64 << 20;
/// A group is some 130 bytes, the last one of all (the time) some 70.
const LAST_GROUPS: usize = 220;

/// A store in which `0..IDS` were done one after the other, and whose journal is as long as its content.
async fn a_store() -> Temp {
    let temp = Temp::new();
    let store = temp.open().await;
    for number in 0..IDS {
        handle(&store, number).await.unwrap();
    }
    store.close().await.unwrap();
    temp.open().await.close().await.unwrap();
    temp
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let copy_of = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &copy_of);
        } else {
            fs::copy(entry.path(), copy_of).unwrap();
        }
    }
}

fn journal(folder: &Path) -> PathBuf {
    let entries = fs::read_dir(folder.join("data")).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "jnl")).max().unwrap()
}

/// How many of the first ids are remembered; after them, none is.
async fn remembered(store: &DurableStore) -> u64 {
    let mut done = Vec::new();
    for number in 0..IDS {
        done.push(is_done(store, number).await);
    }
    let remembered = done.iter().take_while(|done| **done).count();
    assert!(!done[remembered..].contains(&true), "holes: {done:?}");
    u64::try_from(remembered).unwrap()
}

/// Damages a copy of the journal, opens it, and goes on with it if that is possible.
async fn open_damaged(store: &Temp, damage: impl FnOnce(&mut Vec<u8>)) -> Result<u64, StoreError> {
    let temp = Temp::new();
    copy(&store.0, &temp.0);
    let path = journal(&temp.0);
    let mut bytes = fs::read(&path).unwrap();
    damage(&mut bytes);
    fs::write(&path, bytes).unwrap();
    let store = DurableStore::open(&temp.0).await?;
    let before = remembered(&store).await;
    handle(&store, IDS + 1).await.unwrap();
    store.close().await.unwrap();
    let store = temp.open().await;
    assert!(is_done(&store, IDS + 1).await, "what comes after the damage is kept");
    assert_eq!(remembered(&store).await, before);
    Ok(before)
}

/// Every length of the last two groups, and some before.
fn lengths(whole: usize) -> impl Iterator<Item = usize> {
    (0..whole)
        .rev()
        .enumerate()
        .filter(|(index, _)| *index < LAST_GROUPS || index % 499 == 0)
        .map(|(_, length)| length)
}

#[tokio::test]
async fn a_torn_tail_is_the_last_good_state() {
    let store = a_store().await;
    let whole = fs::read(journal(&store.0)).unwrap().len();
    assert!(whole > 5_000, "{whole}");
    let mut last = IDS;
    for length in lengths(whole) {
        let left = open_damaged(&store, |bytes| bytes.truncate(length)).await.unwrap();
        assert!(left <= last, "{left} of {length} bytes, and {last} of more");
        last = left;
    }
    assert_eq!(last, 0, "of nothing, nothing");
}

/// As a crash leaves it: the journal is made of zeros, far ahead.
#[tokio::test]
async fn zeros_in_the_place_of_a_tail_are_the_last_good_state() {
    let store = a_store().await;
    let whole = fs::read(journal(&store.0)).unwrap().len();
    for length in lengths(whole).step_by(3) {
        let torn = Temp::new();
        copy(&store.0, &torn.0);
        let file = fs::OpenOptions::new().write(true).open(journal(&torn.0)).unwrap();
        file.set_len(u64::try_from(length).unwrap()).unwrap();
        file.set_len(AHEAD).unwrap();
        let opened = torn.open().await;
        let left = remembered(&opened).await;
        assert!(whole - length > 600 || left >= IDS - 3, "{left} left of {length} of {whole} bytes");
        opened.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_garbled_journal_is_opened_or_refused_in_words() {
    let store = a_store().await;
    let whole = fs::read(journal(&store.0)).unwrap().len();
    let (mut opened, mut refused) = (0, 0);
    for at in lengths(whole).step_by(2) {
        let noise = Token::random().bits().to_be_bytes();
        let garble = |bytes: &mut Vec<u8>| {
            for (byte, noise) in bytes[at..].iter_mut().zip(noise) {
                *byte ^= noise | 1;
            }
        };
        match open_damaged(&store, garble).await {
            Ok(left) => {
                assert!(left < IDS || whole - at < LAST_GROUPS, "damage at {at} of {whole} was not seen");
                opened += 1;
            }
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("durable store") && error.contains("damaged"), "{error}");
                refused += 1;
            }
        }
    }
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused");
}
