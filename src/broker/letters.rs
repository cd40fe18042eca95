//! Dead letters as they lie at their destination: a walk over them, one after the other.

use async_trait::async_trait;

use super::BrokerError;
use super::copy::DeadLetter;
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
/// 3. It makes no queue up: a message that does not say which one it is from has an empty one in its
///    [source](Message::source), not the place where it lies. A copy would carry that on, and its next letter would pass
///    for another queue's.
/// 4. It holds few letters in memory (one; RabbitMQ: up to 64), however many there are.
#[async_trait]
pub trait Letters: Send {
    /// The next letter; `None`: there are no more.
    ///
    /// # Errors
    ///
    /// The broker could not be asked. The walk is over then; another one begins anew.
    async fn next(&mut self) -> Result<Option<Letter>, BrokerError>;

    /// Whether letters can be removed here at all. What would send them on asks before: a letter that stays would be
    /// sent again each time. By default, they can.
    ///
    /// # Errors
    ///
    /// `Refused`, naming what forbids it.
    fn removable(&self) -> Result<(), BrokerError> {
        Ok(())
    }

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
    /// same wherever the letter is read. A message that we did not put here gets a hash of its id, body and headers, and
    /// of its place, where that has a name for life: a redrive of one must not be taken for another's that says the same.
    /// On AMQP and in memory no place has one, and letters that say the same have one id; no broker there takes one
    /// copy for the other.
    pub id: String,
    /// The message, with the identity, source and headers of the original. Its
    /// [record](super::copy::DeadLetter::read) is `None` if it was not put here by guestlist; then nobody says which
    /// queue it is from, and the source's is empty.
    pub message: Message,
    /// Where it lies, for [`Letters::remove`].
    pub place: Place,
}

impl Letter {
    /// A letter, for brokers of your own.
    pub fn new(id: impl Into<String>, message: Message, place: Place) -> Self {
        Self { id: id.into(), message, place }
    }

    /// A letter as a walk finds it, with the transport id that lies beside it at the broker: on our copies the message
    /// shows the original's instead; and the stream and sequence that name its place for ever, where there are such.
    pub fn found(
        transport_id: Option<&[u8]>,
        lies_at: Option<(&str, u64)>,
        message: Message,
        place: Place,
    ) -> Self {
        let id = letter_id(transport_id.unwrap_or_default(), lies_at, &message);
        Self { id, message, place }
    }
}

/// A stranger's transport id is never shown: it may be a card number for all we know.
fn letter_id(transport_id: &[u8], lies_at: Option<(&str, u64)>, message: &Message) -> String {
    match std::str::from_utf8(transport_id) {
        Ok(id) if is_ours(id) && DeadLetter::read(message).is_some() => id.to_owned(),
        _ => hash_of(transport_id, lies_at, message),
    }
}

/// Whether it has the form of a copy's id.
fn is_ours(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn hash_of(transport_id: &[u8], lies_at: Option<(&str, u64)>, message: &Message) -> String {
    let mut hash = blake3::Hasher::new_derive_key("guestlist 2026 letter id");
    let mut part = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    if let Some((stream, sequence)) = lies_at {
        part(stream.as_bytes());
        part(&sequence.to_le_bytes());
    }
    part(transport_id);
    part(message.payload());
    for (name, value) in message.headers().iter() {
        part(name.as_bytes());
        part(value);
    }
    hash.finalize().to_hex()[..32].to_owned()
}

/// Where a letter lies: a number that its broker gave it, good for one walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &[u8] = b"0123456789abcdef0123456789abcdef";

    fn id(transport_id: Option<&[u8]>, cause: Option<&'static str>, body: &'static str) -> String {
        let message = cause
            .into_iter()
            .fold(Message::builder(body), |message, cause| message.header("guestlist-cause", cause));
        Letter::found(transport_id, None, message.build(), Place(1)).id
    }

    #[test]
    fn i1_two_strangers_letters_that_say_the_same_are_two_where_their_places_have_names() {
        let id = |lies_at| Letter::found(None, lies_at, Message::builder("{}").build(), Place(1)).id;
        let places = [None, Some(("dead", 1)), Some(("dead", 2)), Some(("other", 1))];
        let ids: std::collections::HashSet<_> = places.map(id).into();
        assert_eq!(ids.len(), places.len());
        assert_eq!(id(places[1]), id(places[1]), "the same each time");
        let ours = Message::builder("{}").header("guestlist-cause", "exhausted").build();
        assert_eq!(Letter::found(Some(OURS), places[1], ours, Place(1)).id.as_bytes(), OURS);
    }

    #[test]
    fn only_an_id_that_we_made_is_shown_as_it_is() {
        assert_eq!(id(Some(OURS), Some("exhausted"), "{}").as_bytes(), OURS);
        for (transport_id, cause) in [
            (Some(OURS), None),
            (Some(&b"4111111111111111"[..]), None),
            (Some(b"4111111111111111"), Some("exhausted")),
            (Some(b"\xff"), Some("exhausted")),
            (None, Some("exhausted")),
            (None, None),
        ] {
            let shown = id(transport_id, cause, "{}");
            assert!(is_ours(&shown), "{shown}");
            assert_ne!(Some(shown.as_bytes()), transport_id, "a stranger's id must not be shown");
            assert_eq!(shown, id(transport_id, cause, "{}"), "the same each time");
            assert_ne!(shown, id(transport_id, cause, "{ }"), "another body, another id");
        }
    }
}
