//! What can go wrong with a broker.

use std::fmt;

use crate::BoxError;

/// A broker did not do what it was asked; says what, and why.
pub struct BrokerError {
    kind: BrokerErrorKind,
    what: String,
    source: Option<BoxError>,
}

/// What kind of thing went wrong, for whoever decides what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BrokerErrorKind {
    /// No connection, or it broke: try again later.
    Unreachable,
    /// The broker or we refuse: a wrong password, a missing queue, other arguments. Trying again does not help.
    Refused,
    /// The broker took the copy and had no place to put it.
    NotRouted,
    /// The broker said no to a copy (a full queue, a limit).
    Nacked,
    /// No answer in time: it may or may not have happened.
    Unknown,
    /// The copy is larger than the broker takes.
    TooLarge,
    /// The copy's headers are larger than the broker takes, however short its body is.
    HeadersTooLarge,
    /// The subscription or channel that the delivery came by is gone: it is delivered again.
    Closed,
}

impl BrokerError {
    /// An error of this kind; `what` names the act that failed and, where there is one, the fix.
    pub fn new(kind: BrokerErrorKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), source: None }
    }

    /// With the client's own error behind it.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What kind of thing went wrong.
    pub const fn kind(&self) -> BrokerErrorKind {
        self.kind
    }

    pub(crate) const fn is_too_large(&self) -> bool {
        matches!(self.kind, BrokerErrorKind::TooLarge | BrokerErrorKind::HeadersTooLarge)
    }

    /// Whether trying again is pointless.
    pub const fn is_final(&self) -> bool {
        matches!(self.kind, BrokerErrorKind::Refused)
    }
}

impl fmt::Display for BrokerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl fmt::Debug for BrokerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.what)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for BrokerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
