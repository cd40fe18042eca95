//! The bucket: made or checked at the start; its three requests.
//!
//! A bucket is the stream `KV_<bucket>` over the subjects `$KV.<bucket>.>`. It is used as such and not
//! through the client's key-value type: that reads from any replica, makes buckets in a way
//! that server 2.9 does not understand, and hides the revision of a deletion.

use std::time::Duration;

use async_nats::client::{Request, RequestError, RequestErrorKind};
use async_nats::jetstream::context::{self, CreateStreamErrorKind, GetStreamErrorKind};
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{
    Config, DiscardPolicy, Info, RawMessageErrorKind, RetentionPolicy, StorageType,
};
use async_nats::jetstream::{self, ErrorCode};
use async_nats::{HeaderMap, HeaderValue, header};
use bytes::Bytes;

use super::options::Settings;
use super::record::Stored;
use super::sightings::Look;
use crate::broker::nats::Link;
use crate::dedup::protocol::Micros;
use crate::dedup::store::StoreError;
use crate::{BoxError, DedupKey};

const OPERATION: &str = "KV-Operation";
const DELETED: &str = "DEL";
const MARKER_REASON: &str = "Nats-Marker-Reason";

/// What a bucket is called at the server.
#[derive(Clone, Debug)]
pub(super) struct Names {
    bucket: String,
    stream: String,
}

/// What is known of the bucket that was opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opened {
    pub(super) window: Duration,
    pub(super) in_files: bool,
    /// When the server made it, in microseconds.
    pub(super) made: Micros,
}

/// The last message of a key, if there is one.
#[derive(Debug)]
pub(super) enum Found {
    Nothing,
    /// A deletion; its revision is what the next write has to expect.
    Deleted {
        revision: u64,
    },
    /// Written at this time of the server's, which is for show only.
    Record {
        revision: u64,
        stored: Stored,
        at: Micros,
    },
}

/// Why a request did not do what it was for.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The bucket is not there (or nobody leads it).
    NoBucket(StoreError),
    Other(StoreError),
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    As {
        revision: u64,
    },
    /// The key's last message is not the expected one: nothing was written.
    Conflict,
    /// The server cannot tell at this moment: nothing was written.
    NotNow,
}

impl Names {
    pub(super) fn new(bucket: &str) -> Self {
        Self { bucket: bucket.to_owned(), stream: format!("KV_{bucket}") }
    }

    pub(super) fn bucket(&self) -> &str {
        &self.bucket
    }

    fn subjects(&self) -> String {
        format!("$KV.{}.>", self.bucket)
    }

    /// 128 bits in hexadecimal: every sign of it is allowed in a key.
    fn subject(&self, key: &str) -> String {
        format!("$KV.{}.{key}", self.bucket)
    }

    fn config(&self, settings: &Settings) -> Config {
        Config {
            name: self.stream.clone(),
            description: Some("ids remembered by guestlist".to_owned()),
            subjects: vec![self.subjects()],
            max_messages_per_subject: 1,
            max_age: settings.window_or_default(),
            storage: StorageType::File,
            num_replicas: settings.replicas,
            // Full means that nothing new is taken, not that a claim is evicted.
            discard: DiscardPolicy::New,
            // As `nats kv add` makes it, so that its other tools work.
            allow_rollup: true,
            deny_delete: true,
            allow_direct: true,
            ..Config::default()
        }
    }

    /// Makes the bucket if it is missing, and checks that it is fit.
    pub(super) async fn open(&self, link: &Link, settings: &Settings) -> Result<Opened, StoreError> {
        let info = match self.info_if_there(link).await? {
            Some(info) => info,
            None => self.make(link, settings).await?,
        };
        self.check(&info.config, settings)?;
        let in_files = info.config.storage == StorageType::File;
        Ok(Opened { window: info.config.max_age, in_files, made: made(&info) })
    }

    async fn info_if_there(&self, link: &Link) -> Result<Option<Info>, StoreError> {
        match link.jetstream.get_stream(&self.stream).await {
            Ok(stream) => Ok(Some(stream.cached_info().clone())),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(said) if said.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                    Ok(None)
                }
                GetStreamErrorKind::JetStream(said) => Err(self.said_no("look up", said)),
                _ => Err(self.no_answer("look up", error)),
            },
        }
    }

    async fn make(&self, link: &Link, settings: &Settings) -> Result<Info, StoreError> {
        let error = match link.jetstream.create_stream(self.config(settings)).await {
            Ok(stream) => return Ok(stream.cached_info().clone()),
            Err(error) => error,
        };
        match error.kind() {
            // Somebody was faster, with other settings.
            CreateStreamErrorKind::JetStream(said) if said.error_code() == ErrorCode::STREAM_NAME_EXIST => {
                self.info_if_there(link).await?.ok_or_else(|| self.said_no("make", said))
            }
            CreateStreamErrorKind::JetStream(said) => Err(self.said_no("make", said)),
            _ => Err(self.no_answer("make", error)),
        }
    }

    fn check(&self, config: &Config, settings: &Settings) -> Result<(), StoreError> {
        let wrong = |what: &str| Err(StoreError::new(format!("the bucket `{}` {what}", self.bucket)));
        if config.max_age.is_zero() {
            return wrong(
                "has no max_age, so that ids would be kept for ever: set it to the queue's window (nats kv edit --ttl)",
            );
        }
        if let Some(window) = settings.window.filter(|window| *window != config.max_age) {
            return wrong(&format!(
                "keeps ids for {:?} (its max_age), and {window:?} is asked for: give the store the bucket's window, \
                 or another bucket",
                config.max_age
            ));
        }
        if config.subjects != [self.subjects()] || config.mirror.is_some() || config.sources.is_some() {
            return wrong("is a mirror, or keeps other subjects than its own: use a plain bucket");
        }
        if config.max_messages_per_subject < 1 || config.retention != RetentionPolicy::Limits {
            return wrong("is not a key-value bucket: make it with `nats kv add`");
        }
        let limited = config.max_bytes > 0 || config.max_messages > 0;
        if limited && config.discard == DiscardPolicy::Old {
            return wrong(
                "drops old records when it is full, and with them claims: set its discard policy to new",
            );
        }
        if config.no_ack || config.sealed {
            return wrong("cannot be written to with a confirmation (no_ack, or sealed)");
        }
        Ok(())
    }

    /// Whether reading and writing are permitted, without writing anything: what is not permitted is
    /// not answered.
    pub(super) async fn rehearse(&self, link: &Link) -> Result<(), StoreError> {
        const NO_KEY: &str = "rehearsal";
        self.read_message(link, NO_KEY).await.map_err(Trouble::into_error)?;
        let never = u64::MAX >> 1;
        match self.write_message(link, NO_KEY, never, HeaderMap::new(), Bytes::new()).await {
            Ok(Written::As { .. }) => Err(StoreError::new(
                "the server does not heed the expected revision of a write: guestlist needs NATS 2.9 or newer",
            )),
            Ok(Written::Conflict | Written::NotNow) => Ok(()),
            Err(trouble) => Err(trouble.into_error()),
        }
    }

    /// The bucket's last revision, and what tells a bucket that lost some of its own from one that did not.
    pub(super) async fn look(&self, link: &Link) -> Result<Look, StoreError> {
        let subject = format!("STREAM.INFO.{}", self.stream);
        let info: Info = match link.jetstream.request(subject, &serde_json::json!({})).await {
            Ok(Response::Ok(info)) => info,
            Ok(Response::Err { error }) => return Err(self.said_no("look up", error)),
            Err(error) => return Err(self.no_answer("look up", error)),
        };
        Ok(Look {
            made: made(&info),
            leader: info.cluster.and_then(|cluster| cluster.leader),
            last: info.state.last_sequence,
        })
    }

    pub(super) async fn read(&self, link: &Link, key: &DedupKey) -> Result<Found, Trouble> {
        self.read_message(link, &key.to_string()).await
    }

    /// Asks the leader: any replica would answer a direct get, with what it had some time ago.
    async fn read_message(&self, link: &Link, key: &str) -> Result<Found, Trouble> {
        let stream = link.jetstream.get_stream_no_info(&self.stream).await;
        let stream = stream.map_err(|error| Trouble::Other(self.no_answer("read", error)))?;
        let message = match stream.raw_message_builder().last_by_subject(self.subject(key)).send().await {
            Ok(message) => message,
            Err(error) => match error.kind() {
                RawMessageErrorKind::NoMessageFound => return Ok(Found::Nothing),
                RawMessageErrorKind::JetStream(said) if said.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                    return Err(Trouble::NoBucket(self.said_no("read", said)));
                }
                RawMessageErrorKind::JetStream(said) => {
                    return Err(Trouble::Other(self.said_no("read", said)));
                }
                _ => return Err(Trouble::Other(self.no_answer("read", error))),
            },
        };
        let revision = message.sequence;
        let gone = |name| message.headers.get(name).is_some();
        if gone(OPERATION) || gone(MARKER_REASON) {
            return Ok(Found::Deleted { revision });
        }
        let stored = Stored::decode(&message.payload, revision).map_err(Trouble::Other)?;
        Ok(Found::Record { revision, stored, at: in_micros(message.time.unix_timestamp_nanos()) })
    }

    /// Writes a record, or a deletion, if the key's last message is the expected one (0: there is none).
    pub(super) async fn write(
        &self,
        link: &Link,
        key: &DedupKey,
        expected: u64,
        stored: Option<&Stored>,
    ) -> Result<Written, Trouble> {
        let mut headers = HeaderMap::new();
        if stored.is_none() {
            headers.insert(OPERATION, DELETED);
        }
        let value = stored.map(Stored::encode).unwrap_or_default();
        self.write_message(link, &key.to_string(), expected, headers, value).await
    }

    async fn write_message(
        &self,
        link: &Link,
        key: &str,
        expected: u64,
        mut headers: HeaderMap,
        value: Bytes,
    ) -> Result<Written, Trouble> {
        headers.insert(header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, HeaderValue::from(expected));
        let request = Request::new().headers(headers).payload(value);
        let answer = match link.client.send_request(self.subject(key), request).await {
            Ok(answer) => answer,
            Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                return Err(Trouble::NoBucket(self.no_answer("write to", error)));
            }
            Err(error) => return Err(Trouble::Other(self.no_answer("write to", error))),
        };
        match serde_json::from_slice(&answer.payload) {
            Ok(Response::Ok(PublishAck { stream, sequence, .. })) if stream == self.stream => {
                Ok(Written::As { revision: sequence })
            }
            Ok(Response::Ok(PublishAck { .. })) => Err(Trouble::Other(StoreError::new(format!(
                "a stream other than the bucket `{}` keeps its subjects",
                self.bucket
            )))),
            Ok(Response::Err { error }) => self.refused(error),
            Err(error) => Err(Trouble::Other(self.no_answer("write to", error))),
        }
    }

    fn refused(&self, error: jetstream::Error) -> Result<Written, Trouble> {
        match error.error_code() {
            ErrorCode::STREAM_WRONG_LAST_SEQUENCE | ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT => {
                Ok(Written::Conflict)
            }
            ErrorCode::STREAM_EXPECTED_LAST_SEQ_PER_SUBJECT_NOT_READY => Ok(Written::NotNow),
            ErrorCode::STREAM_NOT_FOUND => Err(Trouble::NoBucket(self.said_no("write to", error))),
            _ => Err(Trouble::Other(self.said_no("write to", error))),
        }
    }

    /// The server answered, and the answer is no.
    fn said_no(&self, act: &str, error: jetstream::Error) -> StoreError {
        let hint = match error.error_code() {
            ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => {
                ": JetStream is not enabled for this account"
            }
            _ => "",
        };
        let what = format!("NATS refuses to {act} the bucket `{}`{hint}", self.bucket);
        StoreError::new(what).with_source(error)
    }

    fn no_answer(&self, act: &str, error: impl Into<BoxError>) -> StoreError {
        let error = error.into();
        let hint = match reason(&*error) {
            Some(RequestErrorKind::NoResponders) => {
                "nobody is there to answer: JetStream is not enabled for this account, the bucket is gone, or it \
                 has no leader"
            }
            Some(RequestErrorKind::TimedOut) => {
                "no answer in time; so it is also if this user may not publish to `$JS.API.>` and the bucket's \
                 subjects, or read its inbox"
            }
            _ => "the request failed",
        };
        StoreError::new(format!("cannot {act} the bucket `{}`: {hint}", self.bucket)).with_source(error)
    }
}

fn made(info: &Info) -> Micros {
    in_micros(info.created.unix_timestamp_nanos())
}

fn in_micros(nanos: i128) -> Micros {
    Micros::try_from(nanos / 1000).unwrap_or(0)
}

impl Trouble {
    pub(super) fn into_error(self) -> StoreError {
        match self {
            Self::NoBucket(error) | Self::Other(error) => error,
        }
    }
}

/// The client has two request errors, and wraps them.
fn reason(error: &(dyn std::error::Error + 'static)) -> Option<RequestErrorKind> {
    let own = error.downcast_ref::<RequestError>().map(RequestError::kind);
    let wrapped = error.downcast_ref::<context::RequestError>().and_then(|error| match error.kind() {
        context::RequestErrorKind::NoResponders => Some(RequestErrorKind::NoResponders),
        context::RequestErrorKind::TimedOut => Some(RequestErrorKind::TimedOut),
        _ => None,
    });
    own.or(wrapped).or_else(|| reason(error.source()?))
}
