//! The crate's own error: why a consumer did not start, or gave up.

use std::fmt;

use crate::BoxError;
use crate::broker::copy::escape;
use crate::broker::{BrokerError, BrokerErrorKind};
use crate::consumer::ConfigError;
use crate::dedup::StoreError;

/// Why a consumer did not start, or gave up.
///
/// `Debug` prints the same line as `Display`, with its causes, since that is what a `main` that returns it shows.
pub struct Error {
    kind: ErrorKind,
    what: String,
    source: Option<BoxError>,
}

/// What kind of error it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The settings do not fit together, or the URL is none that this build knows.
    Config,
    /// The broker does not answer, or refuses.
    Broker,
    /// The store does not answer, or refuses.
    Store,
    /// There is no such dead letter.
    NoLetter,
    /// A queue's loop ended by itself. A bug, of ours or of an observer's.
    Loop,
}

impl Error {
    pub(crate) fn url(what: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Config, what: what.into(), source: None }
    }

    /// The store that a queue names by its URL, which is not shown: it may hold a password.
    pub(crate) fn store_of(queue: &str, error: StoreError) -> Self {
        let what = format!("the store of queue `{queue}`");
        Self { kind: ErrorKind::Store, what, source: Some(error.into()) }
    }

    pub(crate) fn loop_ended(error: tokio::task::JoinError) -> Self {
        let what = "the loop of a queue ended by itself".to_owned();
        Self { kind: ErrorKind::Loop, what, source: Some(error.into()) }
    }

    pub(crate) fn gave_up(queue: &str, failures: u32, error: Option<BrokerError>) -> Self {
        let what = format!("gave up on queue `{queue}`: {failures} subscriptions in a row brought nothing");
        Self { kind: ErrorKind::Broker, what, source: error.map(Into::into) }
    }

    pub(crate) fn no_letter(id: &str, place: &str) -> Self {
        let id = escape(id, 64);
        let what = format!(
            "there is no letter `{id}` at `{place}`: it was redriven or removed, or the id is mistyped"
        );
        Self { kind: ErrorKind::NoLetter, what, source: None }
    }

    /// What was not done to a letter, and why.
    pub(crate) fn of_letter(id: &str, what: &str, error: impl Into<Self>) -> Self {
        let Self { kind, source, .. } = error.into();
        Self { kind, what: format!("letter `{id}` {what}"), source }
    }

    /// The settings of an operator's call.
    pub(crate) fn admin(error: ConfigError) -> Self {
        Self { what: "the admin's settings".to_owned(), ..error.into() }
    }

    /// What kind of error it is.
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The broker's kind, if a broker is behind it.
    pub fn broker(&self) -> Option<BrokerErrorKind> {
        self.source.as_ref()?.downcast_ref::<BrokerError>().map(BrokerError::kind)
    }
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        Self {
            kind: ErrorKind::Config,
            what: "the consumer's settings".to_owned(),
            source: Some(error.into()),
        }
    }
}

impl From<BrokerError> for Error {
    fn from(error: BrokerError) -> Self {
        Self { kind: ErrorKind::Broker, what: "the broker".to_owned(), source: Some(error.into()) }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        Self { kind: ErrorKind::Store, what: "the store".to_owned(), source: Some(error.into()) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
