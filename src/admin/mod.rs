//! What an operator does with dead letters: look, send back to work, throw away; and look an id up, or forget it.
//!
//! An [`Admin`] is for one queue. It is made from the same [`Queue`] value that the consumer is made from, without a
//! handler, so that both mean the same place, scope, identity and store.
//!
//! # What it promises
//!
//! 1. Nothing is lost. A letter is removed only after its copy is confirmed and routed. Killed, dropped or cancelled at
//!    any point, a redrive can be started again: it repeats at most the one letter that was in flight, and dedup
//!    drops that copy, within the window, or it takes the place of the one before.
//! 2. A redriven message runs as if it were new: attempt 1, no backoff, no suspicion, and a `max_age` that counts from
//!    the redrive. A copy of it that comes late does not run.
//! 3. What was handled meanwhile is not run again, and its letter is not thrown away either, unless you say so.
//!    That is known for the queue's [window](Queue::window); a letter that is older, and of whose id the store knows nothing
//!    any more, stays as well, unless you [say so](Redrive::also_forgotten). Each letter's [`Fate`] is reported. Of a message
//!    without an id nothing is known: a redrive that is killed between copy and removal repeats it.
//! 4. A walk ends: letters that come back meanwhile are not met. One letter is in memory at a time, however many there are.
//! 5. `Debug`, `Display` and events show no body, no header's value and no message id, only their hashes and lengths.
//!
//! # What it does not
//!
//! It does not stop the consumers, and needs not: redriven messages arrive while the walk is on. Nor does it mend
//! what made the messages fail: redrive a few first ([`Redrive::limit`]). Where a letter is known to several operators at
//! once, one of them may find it gone. And where the consumer keeps its ids in its own memory (no store was named), the
//! admin of another process cannot ask (a folder, `file:`, cannot even be opened beside its consumer; give the admin `memory:` then): letters can be redriven all the same, and the consumer decides about each
//! copy, but [`Fate::AlreadyDone`] and the like are not seen, and [`inspect`](Admin::inspect), [`forget`](Admin::forget) and
//! [`force`](Redrive::force) are refused.
//!
//! # Example
//!
//! ```
//! use guestlist::admin::{Admin, Discard, Filter, Redrive};
//! use guestlist::broker::memory::MemoryBroker;
//! use guestlist::prelude::*;
//! use guestlist::{Cause, Consumer};
//! use std::sync::Arc;
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> guestlist::Result {
//! # let (broker, store) = (MemoryBroker::new(), MemoryStore::new());
//! # for queue in ["charges", "charges.dead"] { broker.declare(queue); }
//! # broker.send("charges", Message::builder("{}").transport_id("charge-17"))?;
//! let charges = || Queue::new("charges").dead_letter("charges.dead").store(store.clone());
//! # let fails = charges().handler(async |_: Message| -> Result<(), Failure> { Err(Failure::permanent("the bank is closed")) });
//! # Consumer::new(broker.clone()).queue(fails).run_until(async { broker.drained("charges").await.unwrap() }).await?;
//! let admin = Admin::over(Arc::new(broker.clone()), charges()).await?;
//!
//! let mut letters = admin.letters(Filter::new()).await?;
//! while let Some(letter) = letters.next().await {
//!     let letter = letter?;
//!     println!("{letter}"); // its id, cause, attempts, when it failed
//!     println!("{}", letter.record().map_or("", |record| &record.error));
//! }
//!
//! let redriven = admin.redrive(Filter::new().cause(Cause::Permanent), Redrive::new().rate(50)).await?.finish().await?;
//! assert_eq!(redriven.redriven, 1);
//!
//! let dropped = admin.discard(Filter::new(), Discard::new("refunded by hand")).await?.finish().await?;
//! assert_eq!(dropped.discarded, 0); // nothing is left
//! # Ok(()) }
//! ```

mod decide;
mod discard;
mod filter;
mod listed;
mod redrive;
mod summary;
mod walk;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;

pub use self::discard::Discard;
use self::discard::Discarder;
pub use self::filter::Filter;
pub use self::listed::Listed;
pub use self::redrive::Redrive;
use self::redrive::Redriver;
pub use self::summary::{Fate, Summary, Treated};
pub use self::walk::Walk;
use self::walk::{Act, Bounds, Round};
use crate::broker::{Broker, Destination, Letters, QueueSpec};
use crate::consumer::{ConfigError, from_elsewhere};
use crate::dedup::protocol::Record;
use crate::dedup::{DedupStore, MemoryStore, SharedStore};
use crate::identity::Ids;
use crate::{DedupKey, Error, MessageId, Queue, defaults};

/// The operator's hand on one queue's dead letters and ids. See the [module docs](self) for what it promises, and an example.
pub struct Admin {
    broker: Arc<dyn Broker>,
    spec: QueueSpec,
    ids: Ids,
    window: Duration,
    /// `None`: in the memory of the consumer's process.
    store: Option<Arc<dyn DedupStore>>,
}

impl Admin {
    /// Connects to the broker at this URL, see [`broker::connect`](crate::broker::connect()), and to the queue's store.
    ///
    /// # Errors
    ///
    /// The broker or the store does not answer, or a URL is none that this build knows; the queue has no name.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped before it ends, there is no connection.
    pub async fn connect(url: &str, queue: Queue) -> Result<Self, Error> {
        Self::over(crate::broker::connect(url).await?, queue).await
    }

    /// Over a broker that is there already. Connects to the queue's store, if that is named by a URL.
    ///
    /// # Errors
    ///
    /// As for [`connect`](Self::connect).
    ///
    /// # Cancel safety
    ///
    /// As for [`connect`](Self::connect).
    pub async fn over(broker: Arc<dyn Broker>, queue: Queue) -> Result<Self, Error> {
        let config = queue.into_config();
        if config.spec.name.is_empty() {
            return Err(Error::admin(ConfigError::NoName));
        }
        let store = from_elsewhere(&config).await?;
        let window = config.dedup.window;
        let scope = config.scope.unwrap_or_else(|| broker.default_scope(&config.spec));
        // The layer says how it finds keys; of its store nothing is asked.
        let ids = config.dedup.into_layer(Arc::new(MemoryStore::new()), scope).ids();
        Ok(Self { broker, spec: config.spec, ids, window, store })
    }

    /// The store for a queue that names none of its own: the one that was given to
    /// [`Consumer::store`](crate::Consumer::store). Without it nobody can ask such a queue's consumer what it remembers.
    #[must_use]
    pub fn store(mut self, store: impl Into<SharedStore>) -> Self {
        self.store = self.store.or_else(|| Some(store.into().into_arc()));
        self
    }

    /// The letters that fit, from the oldest on. They stay where they are.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NoLetters`] if the queue has no dead-letter destination. The broker does not answer, there is no such
    /// place, or it cannot show what it keeps.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only looks.
    pub async fn letters(&self, filter: Filter) -> Result<Walk<Listed>, Error> {
        let letters = self.broker.letters(self.place()?).await?;
        Ok(self.walk(letters, filter, Bounds::default(), Look))
    }

    /// The letter with this [id](Listed::id): walks until it is found.
    ///
    /// # Errors
    ///
    /// [`NoLetter`](crate::ErrorKind::NoLetter) if there is none. Else as for [`letters`](Self::letters).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only looks.
    pub async fn show(&self, letter: &str) -> Result<Listed, Error> {
        let mut letters = self.letters(Filter::new().letter(letter)).await?;
        match letters.next().await {
            Some(found) => found,
            None => Err(Error::no_letter(letter, self.place()?.name())),
        }
    }

    /// Sends the letters that fit back to work: a copy to the queue's consumers, confirmed and routed, and then the
    /// letter is removed. The walk that comes back does it, letter by letter; see [`Fate`] for what becomes of them.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for a rate of 0, a destination that is the letters' own place, or `force` without a store that can
    /// be asked. The place lets no letter be removed. Else as for [`letters`](Self::letters). Later, by the walk: the store does not answer, or the
    /// destination did not confirm the copy or is not there. The letter stays.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing has been sent yet. For the walk, see [`Walk`].
    pub async fn redrive(&self, filter: Filter, how: Redrive) -> Result<Walk<Treated>, Error> {
        let to = self.destination(&how)?;
        let pace = how.pace().ok_or_else(|| Error::admin(ConfigError::NoRate))?;
        if how.wish.force {
            self.reachable()?;
        }
        let (broker, store) = (Arc::clone(&self.broker), self.store.clone());
        let window = self.window;
        let act = Redriver { broker, store, to, window, wish: how.wish, dry_run: how.dry_run, pace };
        let letters = self.removable_letters().await?;
        Ok(self.walk(letters, filter.sparing_others_than(self.names()), how.bounds, act))
    }

    /// Removes the letters that fit, for good: each removal is confirmed, and told by an event of `tracing` (target
    /// `guestlist`, level info) with the letter's id, the hashed id, the cause and the reason.
    ///
    /// The ids stay on record: a copy that comes late is still known as what it was.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NoReason`]; the place lets no letter be removed; else as for [`letters`](Self::letters). Later, by the walk: a removal was not confirmed, and
    /// the letter may still be there.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing has been removed yet. For the walk, see [`Walk`].
    pub async fn discard(&self, filter: Filter, how: Discard) -> Result<Walk<Treated>, Error> {
        if how.reason.is_empty() {
            return Err(Error::admin(ConfigError::NoReason));
        }
        let act = Discarder { reason: how.reason, dry_run: how.dry_run };
        let letters = self.removable_letters().await?;
        Ok(self.walk(letters, filter.sparing_others_than(self.names()), how.bounds, act))
    }

    /// What the store has on record for a message's id in this queue's scope. The id is as the sender wrote it and the
    /// queue's [`Identity`](crate::Identity) finds it.
    ///
    /// # Errors
    ///
    /// The id is empty or longer than [`MAX_ID`](defaults::MAX_ID); the store does not answer, or is in the memory of
    /// the consumer's process ([`ConfigError::StoreInMemory`]).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only looks.
    pub async fn inspect(&self, id: impl Into<Bytes>) -> Result<Option<Record>, Error> {
        let key = self.key(id)?;
        Ok(self.reachable()?.inspect(&key).await?)
    }

    /// Removes what is on record for a message's id in this queue's scope, so that the next copy of it runs; says whether
    /// there was anything. A handler that is at work on it at this moment loses its claim.
    ///
    /// Other processes with a [`NearCache`](crate::dedup::NearCache) may take a copy for a duplicate for a
    /// [minute](crate::dedup::NearCache::MAX_AGE) more.
    ///
    /// # Errors
    ///
    /// As for [`inspect`](Self::inspect).
    ///
    /// # Cancel safety
    ///
    /// Dropped before it ends, the store may have forgotten or not; ask again.
    pub async fn forget(&self, id: impl Into<Bytes>) -> Result<bool, Error> {
        let key = self.key(id)?;
        let forgotten = self.reachable()?.forget(&key).await?;
        tracing::info!(target: "guestlist", queue = self.spec.name, %key, forgotten, "an id was to be forgotten");
        Ok(forgotten)
    }

    /// By what an id is known in the store and in events.
    ///
    /// # Errors
    ///
    /// The id is empty or longer than [`MAX_ID`](defaults::MAX_ID).
    pub fn key(&self, id: impl Into<Bytes>) -> Result<DedupKey, Error> {
        let id = id.into();
        let bytes = id.len();
        let id = MessageId::new(id).filter(|_| bytes <= defaults::MAX_ID);
        let id = id.ok_or_else(|| Error::admin(ConfigError::NoId { bytes }))?;
        Ok(self.ids.scope.key(&id))
    }

    /// Closes the connection to the broker. Walks that are on end with an error.
    pub async fn close(self) {
        self.broker.close().await;
    }

    fn walk<A: Act>(
        &self,
        letters: Box<dyn Letters>,
        filter: Filter,
        bounds: Bounds,
        act: A,
    ) -> Walk<A::Item> {
        let (letters, ids, begun) = (Some(letters), self.ids.clone(), SystemTime::now());
        Walk::new(Round { letters, filter, ids, begun, bounds, act })
    }

    /// For what changes letters; a dry run says, too, that it would be refused.
    async fn removable_letters(&self) -> Result<Box<dyn Letters>, Error> {
        let letters = self.broker.letters(self.place()?).await?;
        letters.removable()?;
        Ok(letters)
    }

    /// What a letter may call the queue.
    fn names(&self) -> impl Iterator<Item = String> {
        std::iter::once(self.spec.name.clone()).chain(self.broker.also_called(&self.spec))
    }

    fn place(&self) -> Result<&Destination, Error> {
        let place = self.spec.dead_letter.as_ref().filter(|place| !place.name().is_empty());
        place.ok_or_else(|| Error::admin(ConfigError::NoLetters { queue: self.spec.name.clone() }))
    }

    fn destination(&self, how: &Redrive) -> Result<Destination, Error> {
        let place = self.place()?;
        let to = how.to.clone().unwrap_or_else(|| self.broker.again(&self.spec));
        if to == *place {
            return Err(Error::admin(ConfigError::RedriveInPlace { place: place.name().to_owned() }));
        }
        Ok(to)
    }

    fn reachable(&self) -> Result<&dyn DedupStore, Error> {
        let store = self.store.as_deref();
        store.ok_or_else(|| Error::admin(ConfigError::StoreInMemory { queue: self.spec.name.clone() }))
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin")
            .field("broker", &self.broker)
            .field("queue", &self.spec.name)
            .field("scope", &self.ids.scope)
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}

/// Nothing is done to them.
struct Look;

#[async_trait]
impl Act for Look {
    type Item = Listed;

    async fn treat(
        &mut self,
        letter: Listed,
        _letters: &mut dyn Letters,
    ) -> Result<(Listed, Option<Fate>), Error> {
        Ok((letter, None))
    }
}
