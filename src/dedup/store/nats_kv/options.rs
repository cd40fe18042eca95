//! The settings of a store, and its URL.

use std::time::Duration;

use super::NatsKvStore;
use crate::broker::nats::Nats;
use crate::dedup::store::StoreError;
use crate::defaults;

/// The bucket, if none is named.
pub const BUCKET: &str = "guestlist";

/// How often a store looks at its bucket's last revision, which is how precisely it can judge the age of a
/// record: each second.
pub const OBSERVE_EVERY: Duration = Duration::from_secs(1);

/// How to open a bucket, where a URL is not enough: made by [`NatsKvStore::options`].
///
/// ```no_run
/// # async fn example() -> Result<(), guestlist::BoxError> {
/// use guestlist::broker::nats::Nats;
/// use guestlist::dedup::NatsKvStore;
/// use guestlist::prelude::*;
///
/// let nats = Nats::options().credentials_file("shop.creds").connect("tls://nats.example:4222").await?;
/// // Over the broker's own connection.
/// let store = NatsKvStore::options().bucket("shop").window(DAY).replicas(3).open(&nats).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "finish with `open` or `connect`"]
pub struct NatsKvOptions {
    bucket: String,
    settings: Settings,
}

/// What is asked of the bucket.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// None: the bucket's, whatever it is.
    pub(super) window: Option<Duration>,
    pub(super) replicas: usize,
    pub(super) observe_every: Duration,
}

/// What a new bucket remembers for, unless told otherwise: an hour and five minutes, since an id that is not done
/// stays on record for an hour longer than its longest backoff. A queue of all defaults must fit.
const REMEMBERS: Duration = Duration::from_secs(defaults::WINDOW.as_secs() + defaults::BACKOFF_CAP.as_secs());

impl Settings {
    pub(super) fn window_or_default(&self) -> Duration {
        self.window.unwrap_or(REMEMBERS)
    }
}

impl Default for NatsKvOptions {
    fn default() -> Self {
        let settings = Settings { window: None, replicas: 1, observe_every: OBSERVE_EVERY };
        Self { bucket: BUCKET.to_owned(), settings }
    }
}

impl NatsKvOptions {
    /// The bucket; else [`BUCKET`]. Made if it is missing.
    pub fn bucket(mut self, bucket: impl Into<String>) -> Self {
        self.bucket = bucket.into();
        self
    }

    /// How long the bucket remembers: its `max_age`, and the longest window that a queue on it may have. It
    /// must be an hour longer than the queue's longest backoff, too: for so long attempts are kept.
    ///
    /// If it is not given, a bucket that is there keeps its own, and a new one has an hour and five minutes:
    /// [`defaults::WINDOW`] and [`defaults::BACKOFF_CAP`]. A bucket that is there with another window is refused.
    pub fn window(mut self, window: Duration) -> Self {
        self.settings.window = Some(window);
        self
    }

    /// On how many servers of a cluster a bucket made by us is kept: 1 by default, 3 if it is to
    /// outlive the loss of one. A bucket that is there keeps its own number.
    pub fn replicas(mut self, replicas: usize) -> Self {
        self.settings.replicas = replicas;
        self
    }

    /// How often to look at the bucket's last revision; else [`OBSERVE_EVERY`]. A lease that ran out, and a
    /// backoff that is over, are noticed this much later.
    pub fn observe_every(mut self, every: Duration) -> Self {
        self.settings.observe_every = every.max(Duration::from_millis(1));
        self
    }

    /// Opens the bucket over this connection, and shares it.
    ///
    /// # Errors
    ///
    /// The server does not answer or has no JetStream, the user lacks a permission, or the bucket is
    /// there with another window or is otherwise unfit. The text names what to change.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped before it ends, at most the bucket has been made.
    pub async fn open(self, nats: &Nats) -> Result<NatsKvStore, StoreError> {
        if !is_bucket_name(&self.bucket) {
            return Err(StoreError::new(format!(
                "`{}` cannot be the name of a bucket: use letters, digits, `-` and `_`",
                self.bucket
            )));
        }
        // Boxed: the client's descriptions of a stream make a large future.
        Box::pin(NatsKvStore::open(nats, &self.bucket, self.settings)).await
    }

    /// Connects, and opens the bucket. The URL is as for [`NatsKvStore::connect`]; what it says comes before
    /// what was set here.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open); also a URL that is none, or wrong credentials.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped before it ends, at most the bucket has been made.
    pub async fn connect(self, url: &str) -> Result<NatsKvStore, StoreError> {
        let (servers, options) = self.read_url(url)?;
        let nats = Box::pin(Nats::connect(servers)).await;
        let nats = nats.map_err(|error| StoreError::new("cannot reach the store").with_source(error))?;
        options.open(&nats).await
    }

    /// Splits a URL into the servers' part and what is set by the rest.
    fn read_url(mut self, url: &str) -> Result<(&str, Self), StoreError> {
        let (rest, query) = url.split_once('?').unwrap_or((url, ""));
        for setting in query.split('&').filter(|setting| !setting.is_empty()) {
            self = self.set(setting)?;
        }
        // The last slash that is not of a server's `//`.
        let (servers, bucket) = match rest.rsplit_once('/') {
            Some((servers, bucket)) if !servers.ends_with('/') => (servers, bucket),
            _ => (rest, ""),
        };
        if !bucket.is_empty() {
            self = self.bucket(bucket);
        }
        Ok((servers, self))
    }

    fn set(self, setting: &str) -> Result<Self, StoreError> {
        let (name, value) = setting.split_once('=').unwrap_or((setting, ""));
        match name {
            "window" => length(value).map(|window| self.window(window)),
            "observe" => length(value).map(|every| self.observe_every(every)),
            "replicas" => value.parse().ok().map(|replicas| self.replicas(replicas)),
            _ => None,
        }
        // A value may be a password that went to the wrong place.
        .ok_or_else(|| {
            StoreError::new(
                "the query of a NATS KV URL is made of window=<length>, observe=<length> and replicas=<number>; a \
                 length is a number with ms, s, m, h or d, as in window=24h",
            )
        })
    }
}

fn is_bucket_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|sign| sign.is_ascii_alphanumeric() || matches!(sign, '-' | '_'))
}

/// A number with its unit.
fn length(text: &str) -> Option<Duration> {
    let unit = text.find(|sign: char| !sign.is_ascii_digit())?;
    let (number, unit) = text.split_at(unit);
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        "d" => 24 * 60 * 60 * 1000,
        _ => return None,
    };
    let number: u64 = number.parse().ok()?;
    number.checked_mul(milliseconds).filter(|length| *length > 0).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Option<(&str, NatsKvOptions)> {
        NatsKvOptions::default().read_url(url).ok()
    }

    #[test]
    fn a_url_names_servers_bucket_and_settings() {
        let (servers, options) =
            read("nats://ann:s%2fx@a:1,tls://b/shop?window=24h&replicas=3&observe=50ms").unwrap();
        assert_eq!((servers, options.bucket.as_str()), ("nats://ann:s%2fx@a:1,tls://b", "shop"));
        assert_eq!(options.settings.window, Some(Duration::from_secs(24 * 60 * 60)));
        assert_eq!(options.settings.replicas, 3);
        assert_eq!(options.settings.observe_every, Duration::from_millis(50));
    }

    #[test]
    fn what_a_url_does_not_name_is_as_by_default() {
        for url in ["nats://a:4222", "nats://a:4222/", "nats://a:4222?"] {
            let (servers, options) = read(url).unwrap();
            assert_eq!((servers, options.bucket.as_str()), ("nats://a:4222", BUCKET), "{url}");
            assert_eq!((options.settings.window, options.settings.replicas), (None, 1));
        }
    }

    #[test]
    fn a_query_that_is_none_is_refused_without_repeating_it() {
        for query in
            ["window=24", "window=0s", "window=h", "window=99999999999999999999d", "replicas=x", "secret=1"]
        {
            let url = format!("nats://a/b?{query}");
            let error = NatsKvOptions::default().read_url(&url).unwrap_err();
            assert!(!format!("{error:?}").contains("secret"), "{error:?}");
        }
    }

    #[test]
    fn lengths_have_units() {
        let cases = [("90ms", 90), ("2s", 2000), ("3m", 180_000), ("1h", 3_600_000), ("1d", 86_400_000)];
        for (text, milliseconds) in cases {
            assert_eq!(length(text), Some(Duration::from_millis(milliseconds)), "{text}");
        }
    }

    #[test]
    fn names_of_buckets() {
        assert!(is_bucket_name("shop-2_x"));
        assert!(["", "a.b", "a b", "ä", "*"].iter().all(|name| !is_bucket_name(name)));
    }
}
