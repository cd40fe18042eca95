//! [`PostgresTransaction`], the handler's argument.

use std::fmt;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use sqlx::{PgConnection, Postgres, Transaction};

use crate::handler::Needs;
use crate::{Failure, FromMessage, Message};

/// The transaction of this try, as an argument of the handler: committed when the handler returns `Ok`, after it has
/// completed the claim; rolled back otherwise.
///
/// It is used as a `sqlx` connection: `.execute(&mut *tx)`. Savepoints are allowed: `tx.begin()`; each must be
/// committed or dropped, never leaked by `mem::forget`, since `sqlx` would take its end for that of the transaction. It must not leave the
/// handler (a task that keeps it makes the message a dead letter), and `COMMIT` or `ROLLBACK` must not be executed by hand:
/// both are noticed, and the message is a dead letter then.
///
/// ```
/// use guestlist::inbox::PostgresTransaction;
/// use guestlist::{Failure, Message};
///
/// async fn handler(message: Message, mut tx: PostgresTransaction) -> Result<(), Failure> {
///     sqlx::query("INSERT INTO orders (body) VALUES ($1)")
///         .bind(&message.payload()[..])
///         .execute(&mut *tx)
///         .await?;
///     Ok(())
/// }
/// # let queue = guestlist::Queue::new("orders").handler(handler);
/// ```
///
/// A queue without an inbox refuses such a handler when it starts.
pub struct PostgresTransaction {
    slot: Arc<Slot>,
    /// There until it is dropped.
    transaction: Option<Transaction<'static, Postgres>>,
}

impl FromMessage for PostgresTransaction {
    const NEEDS: Needs = Needs::TRANSACTION;

    fn from_message(message: &Message) -> Result<Self, Failure> {
        let slot = super::super::loan::<Slot>(message).ok_or_else(|| {
            Failure::permanent("`PostgresTransaction` needs a Postgres inbox around the handler")
        })?;
        let transaction = slot.take().ok_or_else(|| {
            Failure::permanent("there is one transaction in each try, and it is in use already")
        })?;
        Ok(Self { slot, transaction: Some(transaction) })
    }
}

impl Deref for PostgresTransaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        match &self.transaction {
            Some(transaction) => transaction,
            None => unreachable!("there until it is dropped"),
        }
    }
}

impl DerefMut for PostgresTransaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        match &mut self.transaction {
            Some(transaction) => transaction,
            None => unreachable!("there until it is dropped"),
        }
    }
}

impl Drop for PostgresTransaction {
    fn drop(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            self.slot.put_back(transaction);
        }
    }
}

impl fmt::Debug for PostgresTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresTransaction").finish_non_exhaustive()
    }
}

/// Where a transaction is while neither the handler nor the commit has it.
pub(super) struct Slot(Mutex<Place>);

enum Place {
    Here(Transaction<'static, Postgres>),
    Lent,
    /// Whoever still has it rolls it back.
    Closed,
}

impl Slot {
    pub(super) fn new(transaction: Transaction<'static, Postgres>) -> Self {
        Self(Mutex::new(Place::Here(transaction)))
    }

    fn take(&self) -> Option<Transaction<'static, Postgres>> {
        self.change(|place| match mem::replace(place, Place::Lent) {
            Place::Here(transaction) => Some(transaction),
            elsewhere => {
                *place = elsewhere;
                None
            }
        })
    }

    fn put_back(&self, transaction: Transaction<'static, Postgres>) {
        let rolled_back = self.change(|place| {
            if matches!(place, Place::Closed) {
                return Some(transaction);
            }
            *place = Place::Here(transaction);
            None
        });
        drop(rolled_back);
    }

    /// For the commit, or for good.
    pub(super) fn close(&self) -> Option<Transaction<'static, Postgres>> {
        self.change(|place| match mem::replace(place, Place::Closed) {
            Place::Here(transaction) => Some(transaction),
            Place::Lent | Place::Closed => None,
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut Place) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
