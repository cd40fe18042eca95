//! What went wrong, and what to do about it.

use std::sync::Arc;

use sqlx::Error;

use crate::dedup::StoreError;

/// A store error with the client's behind it.
pub(crate) fn of(error: Error) -> StoreError {
    StoreError::new(text_of(&error)).with_source(error)
}

/// The same, of an error that several calls share.
pub(super) fn of_shared(error: Arc<Error>) -> StoreError {
    StoreError::new(text_of(&error)).with_source(error)
}

pub(super) fn locked() -> StoreError {
    StoreError::new(
        "another transaction holds the record of this key: an inbox transaction that does not end? (pg_stat_activity tells)",
    )
}

fn text_of(error: &Error) -> &'static str {
    match code_of(error).as_deref() {
        Some("25006") => {
            "the Postgres server is read-only: a standby, or a primary that was one a moment ago; the store needs the primary"
        }
        Some("3F000" | "42P01" | "42883") => {
            "the Postgres database lacks the store's table, sequence or function: run `migrate`, or apply its SQL"
        }
        Some("42501") => {
            "the Postgres role may not use the store: grant USAGE on the schema and the sequence, and SELECT, INSERT, UPDATE, DELETE on the table"
        }
        Some("28000" | "28P01") => "the Postgres server refused the store's login",
        Some("53300") => "the Postgres server has no connection left for the store",
        Some("53100") => "the Postgres server's disk is full",
        Some("57P01" | "57P02" | "57P03") => "the Postgres server is shutting down or starting up",
        Some("40001" | "40P01") => "other transactions got in the way of the Postgres store, again and again",
        Some(_) => "the Postgres store was refused",
        None if is_hung(error) => "the Postgres server did not answer the store in time",
        None => "the Postgres store could not be asked",
    }
}

/// Another transaction was in the way; the same statement again may succeed.
pub(crate) fn is_contention(error: &Error) -> bool {
    matches!(code_of(error).as_deref(), Some("40001" | "40P01"))
}

/// The connection is of no more use: closed, of a server that stops, or that is no primary.
pub(crate) fn is_gone(error: &Error) -> bool {
    match code_of(error).as_deref() {
        Some(code) => matches!(code, "25006" | "57P01" | "57P02" | "57P03") || code.starts_with("08"),
        None => true,
    }
}

pub(super) fn hung() -> Error {
    Error::Io(std::io::ErrorKind::TimedOut.into())
}

pub(super) fn is_hung(error: &Error) -> bool {
    matches!(error, Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut)
}

fn code_of(error: &Error) -> Option<String> {
    error.as_database_error().and_then(|error| error.code().map(std::borrow::Cow::into_owned))
}
