//! Cases: keys of any bytes are kept apart, and what is kept with them comes back whole.

use tokio::task::JoinSet;

use super::stage::{FAILED, GENERATION, Key, ME, OTHER, THIRD, Won, answered, ask};
use super::{LONG, StoreFixture};
use crate::DedupKey;
use crate::dedup::protocol::{Ask, Before, Claim, Digest, Release, Token};

/// Keys of bytes that have a meaning somewhere: to a subject, a glob, a hash tag, a URL; and neighbours that are
/// one to a C string, to a lossy decoder, to a comparison without case, to a trim.
const ODD_KEYS: [&[u8; 16]; 12] = [
    &[0; 16],
    &[0xff; 16],
    b"a.b.*.>.$KV.\r\n \t",
    b"{x}{y}:[a-z]*?\\^",
    b"'; DROP TABLE --",
    b"%00%2e%2E/../../",
    b"01\0two\0three\0\0\0\0",
    b"01\0one\0three\0\0\0\0",
    b"\xc3\x28\xa0\xa1\xe2\x28\xf0\x28\x8c\xbc\xfe\xff\xed\xa0\x80\xc0",
    b"\xc3\x28\xa0\xa1\xe2\x28\xf0\x28\x8c\xbc\xff\xfe\xed\xa0\x80\xc1",
    b"CASE and case   ",
    b"case and CASE  \0",
];

/// Every key of 16 bytes is a key like any other.
pub async fn keys_of_any_bytes_are_keys(fixture: &dyn StoreFixture) {
    let base = Key::new(fixture).await;
    let keys = ODD_KEYS.map(|bytes| base.of(DedupKey::from_bytes(*bytes)));
    for key in &keys {
        // An earlier run of the suite may have left them.
        key.forget().await;
        key.acquire_in_the_end(ask(ME)).await;
    }
    for (nth, key) in (10..).zip(&keys) {
        key.give_up(ME, FAILED).await;
        assert_eq!(key.acquire(ask(nth)).await.told(), (2, Before::Failed), "{:?}", key.id);
        key.finish(nth).await;
    }
    for key in &keys {
        let claim = key.claim(ask(THIRD)).await;
        assert!(matches!(claim, Claim::Done { .. }), "{:?}: {claim:?}", key.id);
        assert!(key.forget().await, "{:?}", key.id);
    }
}

/// Keys that differ in one bit have nothing to do with each other.
pub async fn keys_that_differ_in_one_bit_are_kept_apart(fixture: &dyn StoreFixture) {
    let base = Key::new(fixture).await;
    let bits = u128::from_le_bytes(*base.id.as_bytes());
    base.acquire(ask(ME)).await;
    base.finish(ME).await;
    let near: Vec<_> =
        (0..128).map(|bit| base.of(DedupKey::from_bytes((bits ^ (1 << bit)).to_le_bytes()))).collect();
    for (bit, key) in near.iter().enumerate() {
        assert_eq!(key.acquire(ask(OTHER)).await.told(), (1, Before::First), "bit {bit}");
    }
    for (bit, key) in near.iter().enumerate() {
        key.give_up(OTHER, FAILED).await;
        assert_eq!(key.acquire(ask(ME)).await.told(), (2, Before::Failed), "bit {bit}");
    }
    let claim = base.claim(ask(OTHER)).await;
    assert!(matches!(claim, Claim::Done { .. }), "{claim:?}");
}

/// Answers to many calls at once over one handle are not mixed up.
pub async fn many_keys_at_once_get_their_own_answers(fixture: &dyn StoreFixture) {
    let base = Key::new(fixture).await;
    let store = fixture.open().await;
    let mut calls = JoinSet::new();
    for number in 1..=100_u32 {
        let (store, key) = (store.clone(), base.another());
        calls.spawn(async move {
            // The digest tells whose answer it is.
            let ask = Ask { digest: Some(number.into()), generation: number, ..ask(number.into()) };
            let won = Won::of(answered("claim", store.claim(&key.id, &ask).await));
            let record = answered("inspect", store.inspect(&key.id).await);
            let generation = record.map(|record| record.generation);
            let told = won.map(|won| (won.told(), won.digest));
            assert_eq!(told, Some(((1, Before::First), Some(number.into()))), "call {number}");
            assert_eq!(generation, Some(number), "call {number}");
        });
    }
    calls.join_all().await;
}

fn digest_of(claim: Claim) -> Option<Digest> {
    match claim {
        Claim::Acquired { digest, .. }
        | Claim::InProgress { digest, .. }
        | Claim::Parked { digest }
        | Claim::Done { digest } => digest,
        Claim::Suspect => None,
    }
}

/// The digest of the body first seen is kept from the claim on, and told in every answer; a later one
/// does not replace it.
pub async fn the_digest_first_seen_is_kept(fixture: &dyn StoreFixture) {
    let first = Some(0x0123_4567_89ab_cdef_fedc_ba98_7654_3210);
    let with = |token, digest| Ask { digest, ..ask(token) };
    let key = Key::new(fixture).await;
    assert_eq!(key.acquire(with(ME, first)).await.digest, first);
    assert_eq!(digest_of(key.claim(with(OTHER, Some(7))).await), first, "in progress");
    assert_eq!(digest_of(key.claim(with(ME, Some(7))).await), first, "claimed again");
    key.give_up(ME, Release::Failed { not_before: LONG }).await;
    assert_eq!(digest_of(key.claim(with(OTHER, Some(7))).await), first, "backing off");

    let key = key.another();
    key.acquire(with(ME, first)).await;
    key.give_up(ME, FAILED).await;
    assert_eq!(key.acquire(with(OTHER, Some(7))).await.digest, first, "claimed by the next");
    key.finish(OTHER).await;
    assert_eq!(digest_of(key.claim(with(THIRD, None)).await), first, "done");

    let key = key.another();
    key.acquire(with(ME, first)).await;
    key.give_up(ME, Release::DeadLettered).await;
    assert_eq!(digest_of(key.claim(with(OTHER, Some(7))).await), first, "parked");
}

/// A key that was first claimed without a digest gets one from the next claim that has it.
pub async fn a_digest_may_come_later(fixture: &dyn StoreFixture) {
    let key = Key::new(fixture).await;
    assert_eq!(key.acquire(ask(ME)).await.digest, None);
    key.give_up(ME, FAILED).await;
    let won = key.acquire(Ask { digest: Some(5), ..ask(OTHER) }).await;
    assert_eq!(won.digest, Some(5));
    key.finish(OTHER).await;
    assert_eq!(digest_of(key.claim(ask(THIRD)).await), Some(5));
}

/// Tokens, digests and generations come back with all their bits.
pub async fn every_bit_of_what_is_kept_comes_back(fixture: &dyn StoreFixture) {
    let values = [0, 1, u128::MAX, 1 << 127, u128::from(u64::MAX), 1 << 64, (1 << 63) | 1];
    for (value, generation) in values.into_iter().zip([0, 1, 1 << 31, u32::MAX, GENERATION, 1 << 16, 255]) {
        let key = Key::new(fixture).await;
        let asked = Ask { digest: Some(value), generation, ..ask(value) };
        let won = key.acquire(asked).await;
        assert_eq!(won.digest, Some(value));
        let record = key.record().await;
        assert_eq!(record.run.token, Token::from_bits(value));
        assert_eq!((record.digest, record.generation), (Some(value), generation));
        assert_eq!(key.acquire(asked).await, won, "token {value:#x} is known again");
        let claim = key.claim(Ask { generation, ..ask(value ^ (1 << 64)) }).await;
        assert!(matches!(claim, Claim::InProgress { .. }), "and differs from its neighbour: {claim:?}");
        key.finish(value).await;
    }
}
