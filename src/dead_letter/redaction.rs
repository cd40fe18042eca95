//! [`Redact`]: what must not lie with the dead letters.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::broker::copy::{encode, escape};
use crate::defaults;

/// What a redaction is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Field<'a> {
    /// The value of a header of this name, as its sender named it; of a header that a broker would act on and that
    /// travels aside, too.
    Header(&'a str),
    /// AMQP: a property that RabbitMQ would act on and that travels aside: `user_id`, `expiration`, `delivery_mode`.
    Property(&'a str),
    /// The text of an error, with its causes.
    Error,
}

/// What becomes of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Redact {
    /// It stays as it is.
    Keep,
    /// It stays away: the header or property is missing, the error's text is empty.
    Remove,
    /// This text stands in its place: escaped, and at most 1 KiB of it.
    Replace(String),
}

/// A redaction of the user's.
#[derive(Clone)]
pub(crate) struct Redaction(Arc<Ask>);

type Ask = dyn Fn(Field<'_>, &[u8]) -> Redact + Send + Sync;

impl Redaction {
    pub(crate) fn new(ask: impl Fn(Field<'_>, &[u8]) -> Redact + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }

    /// What becomes of a header or property. Who panics at a value has not said that it may be seen.
    pub(crate) fn value(&self, field: Field<'_>, value: &[u8]) -> Redact {
        match self.ask(field, value) {
            Some(Redact::Replace(text)) => Redact::Replace(escape(&text, defaults::ERROR_TEXT)),
            Some(answer) => answer,
            None => Redact::Remove,
        }
    }

    /// What is left of an error's text.
    pub(crate) fn error(&self, text: String) -> String {
        match self.ask(Field::Error, text.as_bytes()) {
            Some(Redact::Keep) => text,
            Some(Redact::Remove) => String::new(),
            Some(Redact::Replace(text)) => text,
            None => "(the redaction panicked)".to_owned(),
        }
    }

    fn ask(&self, field: Field<'_>, value: &[u8]) -> Option<Redact> {
        let answer = catch_unwind(AssertUnwindSafe(|| (self.0)(field, value)));
        if answer.is_err() {
            let (Field::Header(name) | Field::Property(name)) = field else {
                tracing::error!(target: "guestlist", "the redaction panicked at an error's text, which is left out");
                return None;
            };
            let name = encode(name.as_bytes());
            tracing::error!(target: "guestlist", name, "the redaction panicked at a header, which is left out");
        }
        answer.ok()
    }
}

impl fmt::Debug for Redaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Redaction")
    }
}
