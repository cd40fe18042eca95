//! Dead letters as they lie at their destination: a walk over them, one after the other.

use async_trait::async_trait;

use super::BrokerError;
use crate::Message;

/// A walk over the letters of one place, from the oldest on, begun by
/// [`Broker::letters`](super::Broker::letters).
///
/// # Contract
///
/// 1. It ends: only letters that were there when it began are shown, each once. A letter that is redriven, fails and
///    comes back is not met again.
/// 2. It takes nothing out. What is not [removed](Self::remove) is there after [`close`](Self::close), after a drop and
///    after the death of the process, and keeps its place where the broker can.
/// 3. It holds one letter at a time in memory, however many there are.
#[async_trait]
pub trait Letters: Send {
    /// The next letter; `None`: there are no more.
    ///
    /// # Errors
    ///
    /// The broker could not be asked. The walk is over then; another one begins anew.
    async fn next(&mut self) -> Result<Option<Letter>, BrokerError>;

    /// Removes a letter of this walk. `Ok`: the broker has been seen to take it. A letter that is no longer there is
    /// no error.
    ///
    /// # Errors
    ///
    /// The broker did not answer, or refused: the letter may still be there.
    async fn remove(&mut self, place: Place) -> Result<(), BrokerError>;

    /// Ends the walk, and waits until what was not removed can be read by others again.
    ///
    /// # Errors
    ///
    /// The broker did not answer. It gives the letters back when it notices.
    async fn close(self: Box<Self>) -> Result<(), BrokerError>;
}

/// A dead letter, or whatever else lies there.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Letter {
    /// By what an operator names it: the copy's transport id, which is a hash of what was copied, so that it is the
    /// same wherever the letter is read. A message without one gets a hash of its body and headers.
    pub id: String,
    /// The message, with the identity, source and headers of the original. Its
    /// [record](super::copy::DeadLetter::read) is `None` if it was not put here by guestlist.
    pub message: Message,
    /// Where it lies, for [`Letters::remove`].
    pub place: Place,
}

impl Letter {
    /// A letter, for brokers of your own.
    pub fn new(id: impl Into<String>, message: Message, place: Place) -> Self {
        Self { id: id.into(), message, place }
    }
}

/// Where a letter lies: a number that its broker gave it, good for one walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place(pub u64);
