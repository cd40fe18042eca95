//! Records that are not as usual: of another format, damaged, somebody else's, at the limits of their numbers.

use std::time::Duration;

use futures_util::future::join_all;
use guestlist::dedup::protocol::{Ask, Before, Claim, Fence, Held, Release, Run, State, Token};
use guestlist::dedup::{DedupStore, RedisStore, StoreError};

use super::server::{Plain, key, own_store};

const HOUR: Duration = Duration::from_secs(3600);
const TOKEN: Token = Token::from_bits(u128::MAX - 1);
const RUN: Run = Run { token: TOKEN, fence: Fence(1) };

/// The largest number that a script counts to.
const LARGEST: u64 = (1 << 53) - 1;

fn ask() -> Ask {
    Ask::new(TOKEN, HOUR, HOUR)
}

/// A record of format 1, as documented in `step.lua`, for ever kept.
struct Raw {
    state: u8,
    before: u8,
    suspect: u8,
    interruptions: u8,
    attempt: u32,
    generation: u32,
    fence: u64,
}

const RELEASED: Raw =
    Raw { state: 1, before: 1, suspect: 0, interruptions: 0, attempt: 1, generation: 0, fence: 7 };

impl Raw {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![1, self.state, self.before, self.suspect, self.interruptions];
        bytes.extend(self.attempt.to_le_bytes());
        bytes.extend(self.generation.to_le_bytes());
        for number in [self.fence, 0, LARGEST, LARGEST] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(5_u128.to_le_bytes());
        bytes
    }
}

/// Every call's error.
async fn errors(store: &RedisStore) -> Vec<StoreError> {
    let key = key(1);
    vec![
        store.claim(&key, &ask()).await.unwrap_err(),
        store.renew(&key, RUN, HOUR).await.unwrap_err(),
        store.complete(&key, RUN, HOUR).await.unwrap_err(),
        store.release(&key, RUN, Release::NotStarted).await.unwrap_err(),
        store.inspect(&key).await.unwrap_err(),
        store.forget(&key).await.unwrap_err(),
    ]
}

#[tokio::test]
async fn a_record_of_another_format_is_an_error_and_stays() {
    let (store, plain) = (own_store().await, Plain::shared().await);
    let redis_key = store.redis_key(&key(1));
    for future in [&b"\x02from the future"[..], b"\xff", &[2; 61]] {
        plain.set(&redis_key, future).await;
        for error in errors(&store).await {
            let text = error.to_string();
            assert!(text.contains(&format!("format {}", future[0])), "{text}");
        }
        assert_eq!(plain.get(&redis_key).await.as_deref(), Some(future));
    }
}

#[tokio::test]
async fn a_damaged_record_is_an_error_and_stays() {
    let (store, plain) = (own_store().await, Plain::shared().await);
    let redis_key = store.redis_key(&key(1));
    let (short, unknown) = (RELEASED.bytes()[..60].to_vec(), Raw { state: 4, ..RELEASED }.bytes());
    for damaged in [short, unknown, [RELEASED.bytes(), vec![0; 15]].concat()] {
        plain.set(&redis_key, &damaged).await;
        for error in errors(&store).await {
            assert!(error.to_string().contains("damaged"), "{error}");
        }
        assert_eq!(plain.get(&redis_key).await, Some(damaged));
    }
}

#[tokio::test]
async fn somebody_elses_data_under_the_prefix_is_an_error() {
    let (store, plain) = (own_store().await, Plain::shared().await);
    let _: u32 = plain.ask(&format!("LPUSH {} theirs", store.redis_key(&key(1)))).await;
    for error in errors(&store).await {
        assert!(error.to_string().contains("holds something else"), "{error}");
    }
}

#[tokio::test]
async fn what_is_wrong_with_one_key_is_no_error_of_the_steps_beside_it() {
    let (store, plain) = (own_store().await, Plain::shared().await);
    let _: u32 = plain.ask(&format!("LPUSH {} theirs", store.redis_key(&key(1)))).await;
    plain.set(&store.redis_key(&key(2)), b"\x02from the future").await;
    // At once, so that one run of the script makes them all.
    let keys: Vec<_> = (0..4).map(key).collect();
    let claims = keys.iter().map(|key| async { store.claim(key, &ask()).await });
    let claims = join_all(claims).await;
    assert!(matches!(claims[0], Ok(Claim::Acquired { attempt: 1, .. })), "{claims:?}");
    assert!(claims[1].as_ref().unwrap_err().to_string().contains("holds something else"), "{claims:?}");
    assert!(claims[2].as_ref().unwrap_err().to_string().contains("format 2"), "{claims:?}");
    assert!(matches!(claims[3], Ok(Claim::Acquired { attempt: 1, .. })), "{claims:?}");
}

#[tokio::test]
async fn counts_stop_at_their_limits() {
    let (store, plain) = (own_store().await, Plain::shared().await);
    let full =
        Raw { interruptions: u8::MAX, attempt: u32::MAX, generation: u32::MAX, fence: LARGEST, ..RELEASED };
    plain.set(&store.redis_key(&key(1)), &full.bytes()).await;

    let claim = store.claim(&key(1), &Ask { generation: u32::MAX, ..ask() }).await.unwrap();
    let acquired =
        Claim::Acquired { fence: Fence(LARGEST), attempt: u32::MAX, before: Before::Failed, digest: None };
    assert_eq!(claim, acquired);
    assert_eq!(store.release(&key(1), RUN, Release::Interrupted).await.unwrap(), Held::Yes);
    let record = store.inspect(&key(1)).await.unwrap().unwrap();
    assert_eq!((record.interruptions, record.attempt), (u8::MAX, u32::MAX));
    assert_eq!(record.generation, u32::MAX);
}

#[tokio::test]
async fn the_generation_before_the_last_can_be_redriven() {
    let (store, plain) = (own_store().await, Plain::shared().await);
    let parked = Raw { state: 2, generation: u32::MAX - 1, ..RELEASED };
    plain.set(&store.redis_key(&key(1)), &parked.bytes()).await;
    let at = |generation| Ask { generation, ..ask() };
    assert_eq!(store.claim(&key(1), &at(0)).await.unwrap(), Claim::Parked { digest: None });
    assert_eq!(store.claim(&key(1), &at(u32::MAX - 1)).await.unwrap(), Claim::Parked { digest: None });
    let claim = store.claim(&key(1), &at(u32::MAX)).await.unwrap();
    assert!(matches!(claim, Claim::Acquired { attempt: 1, before: Before::First, .. }), "{claim:?}");
}

#[tokio::test]
async fn the_longest_times_are_for_ever() {
    let store = own_store().await;
    for length in [Duration::from_micros(LARGEST), Duration::from_micros(u64::MAX), Duration::MAX] {
        let key = key(length.as_micros());
        store.claim(&key, &Ask::new(TOKEN, length, length)).await.unwrap();
        let record = store.inspect(&key).await.unwrap().unwrap();
        assert_eq!(record.state, State::Claimed { deadline: u64::MAX });
        assert_eq!((record.retain, record.kept_until), (Duration::MAX, u64::MAX));
        let other = Ask { token: Token::from_bits(1), ..ask() };
        let claim = store.claim(&key, &other).await.unwrap();
        assert!(matches!(claim, Claim::InProgress { left, .. } if left > HOUR * 24 * 365 * 200), "{claim:?}");
        assert_eq!(
            store.release(&key, RUN, Release::Failed { not_before: length }).await.unwrap(),
            Held::Yes
        );
        let record = store.inspect(&key).await.unwrap().unwrap();
        assert_eq!(record.state, State::Released { not_before: u64::MAX });
    }
}

#[tokio::test]
async fn the_shortest_times_are_a_microsecond() {
    let store = own_store().await;
    store.claim(&key(1), &Ask::new(TOKEN, HOUR, HOUR)).await.unwrap();
    let shortest = Release::Failed { not_before: Duration::from_nanos(1) };
    store.release(&key(1), RUN, shortest).await.unwrap();
    let record = store.inspect(&key(1)).await.unwrap().unwrap();
    assert!(matches!(record.state, State::Released { not_before: 1.. }), "a backoff, not none: {record:?}");
}

/// All 128 bits of tokens and digests count, and a fence as large as a script can count.
#[tokio::test]
async fn wide_numbers_come_back_whole() {
    let store = own_store().await;
    let digest = Some(0x0123_4567_89ab_cdef_fedc_ba98_7654_3211);
    let token = Token::from_bits(0x8000_0000_0000_0000_0000_0000_0000_0001);
    store.claim(&key(1), &Ask { digest, ..Ask::new(token, HOUR, HOUR) }).await.unwrap();
    let record = store.inspect(&key(1)).await.unwrap().unwrap();
    assert_eq!((record.run.token, record.digest), (token, digest));
    let near = Run { token: Token::from_bits(token.bits() ^ 1), ..record.run };
    assert_eq!(store.complete(&key(1), near, HOUR).await.unwrap(), Held::Lost);

    for (fence, kept) in [(LARGEST, LARGEST), (u64::MAX, LARGEST), (LARGEST - 1, LARGEST - 1)] {
        let (key, run) = (key(u128::from(fence)), Run { fence: Fence(fence), ..RUN });
        assert_eq!(store.complete(&key, run, HOUR).await.unwrap(), Held::Gone);
        assert_eq!(store.inspect(&key).await.unwrap().unwrap().run.fence, Fence(kept));
    }
}

/// Redis forgets a record after its own time, not before and not much later.
#[tokio::test]
async fn redis_collects_what_is_past_its_time() {
    let (store, plain) = (own_store().await, Plain::shared().await);
    store.claim(&key(1), &Ask::new(TOKEN, HOUR, HOUR * 2)).await.unwrap();
    let left: u64 = plain.ask(&format!("PTTL {}", store.redis_key(&key(1)))).await;
    let (window, minute) = (2 * 3_600_000, 60_000);
    assert!((window..=window + minute + 1).contains(&left), "{left} ms");
    assert!(left > window + minute / 2, "{left} ms");
}
