//! What is asked of every store.

use std::time::Duration;

use guestlist::DedupKey;
use guestlist::dedup::DedupStore;
use guestlist::dedup::protocol::{Ask, Claim, Held, Run, Token};

pub(crate) const LEASE: Duration = Duration::from_secs(30);
/// Longer than the benchmark takes, and short enough to leave nothing behind for long.
pub(crate) const WINDOW: Duration = Duration::from_secs(15 * 60);

/// Ids for [`duplicate`].
const DONE: usize = 1_000;

/// Of an id that was never seen.
pub(crate) fn new_key() -> DedupKey {
    DedupKey::from_bytes(Token::random().bits().to_be_bytes())
}

pub(crate) async fn claim_and_complete(store: &impl DedupStore) {
    handle(store, &new_key()).await;
}

pub(crate) async fn handle(store: &impl DedupStore, key: &DedupKey) {
    let ask = Ask::new(Token::random(), LEASE, WINDOW);
    let claim = store.claim(key, &ask).await.unwrap();
    let Claim::Acquired { fence, .. } = claim else { panic!("{claim:?}") };
    let held = store.complete(key, Run { token: ask.token, fence }, WINDOW).await.unwrap();
    assert_eq!(held, Held::Yes);
}

pub(crate) async fn duplicate(store: &impl DedupStore, key: &DedupKey) {
    let claim = store.claim(key, &Ask::new(Token::random(), LEASE, WINDOW)).await.unwrap();
    assert!(matches!(claim, Claim::Done { .. }), "{claim:?}");
}

/// Ids that are done in a store.
pub(crate) struct Done<S> {
    pub(crate) store: S,
    keys: Vec<DedupKey>,
}

impl<S: DedupStore> Done<S> {
    pub(crate) async fn new(store: S) -> Self {
        let keys: Vec<DedupKey> = (0..DONE).map(|_| new_key()).collect();
        for key in &keys {
            handle(&store, key).await;
        }
        Self { store, keys }
    }

    /// A copy of one of them.
    pub(crate) async fn duplicate(&self) {
        duplicate(&self.store, self.any()).await;
    }
}

impl<S> Done<S> {
    pub(crate) fn with_keys(store: S, keys: Vec<DedupKey>) -> Self {
        Self { store, keys }
    }

    pub(crate) fn keys(&self) -> &[DedupKey] {
        &self.keys
    }

    pub(crate) fn any(&self) -> &DedupKey {
        let number = Token::random().bits() % self.keys.len() as u128;
        &self.keys[usize::try_from(number).unwrap()]
    }
}
