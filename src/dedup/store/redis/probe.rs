//! Whether several keys may be in one script.
//!
//! Where a proxy spreads keys over servers, a script runs on the server of its first key; some proxies refuse one with keys of
//! others, some do not, and nothing they say of themselves tells. Then a claim would be where nobody looks for it. So it is
//! tried: keys that are set one by one must all be seen by one script.

use redis::aio::MultiplexedConnection;
use redis::{Pipeline, RedisError};

use super::link::Connection;
use crate::dedup::protocol::Token;

/// That all of them are on one of two servers by chance: once in two thousand million connections.
const KEYS: usize = 32;

/// Milliseconds. What the script does not see is left to Redis.
const KEPT: u32 = 10_000;

/// Removes what it sees.
const LOOK: &str = "return redis.call('DEL', unpack(KEYS))";

/// Of a cluster's client, no. Nor where it cannot be tried, as when the memory is full.
pub(super) async fn is_whole(connection: &mut Connection, prefix: &str) -> bool {
    let Connection::Node(connection) = connection else { return false };
    let whole = try_it(connection, prefix).await;
    if !matches!(whole, Ok(true)) {
        tracing::debug!(target: "guestlist", ?whole, "each call to Redis goes by itself: it is not certain that all keys are on one server");
    }
    whole.unwrap_or(false)
}

async fn try_it(connection: &mut MultiplexedConnection, prefix: &str) -> Result<bool, RedisError> {
    let nonce = Token::random().bits();
    let keys: Vec<String> = (0..KEYS).map(|n| format!("{prefix}probe:{nonce:032x}:{n}")).collect();
    let mut set = Pipeline::with_capacity(KEYS);
    for key in &keys {
        set.cmd("SET").arg(key).arg(0).arg("PX").arg(KEPT).ignore();
    }
    let () = set.query_async(connection).await?;
    let mut look = redis::cmd("EVAL");
    let seen: usize = look.arg(LOOK).arg(KEYS).arg(&keys).query_async(connection).await?;
    Ok(seen == KEYS)
}
