//! A queue's messages become a walk: taken in hand without an ack, and given back at its end.
//!
//! By a consumer, not by `basic.get`: to RabbitMQ each get is a consumer of its own. What was got is given back message by
//! message, which takes a classic queue half a minute for thousands, and on RabbitMQ 4.3 more than 32 at once are still
//! waiting when the channel is closed: each of those counts as a failed delivery.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicNackOptions,
    BasicQosOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Consumer, ErrorKind};
use tokio::time::timeout;

use super::connect::{Link, REPLY_SUCCESS, answered, reply_code, said_no};
use super::source::{SYSTEM, bytes_of, message_of};
use super::topology::{self, PASSIVE, queue_name};
use crate::broker::{BrokerError, BrokerErrorKind, Destination, Letter, Letters, Place, copy};
use crate::message::Source;

/// How long the broker may take for one answer. A large letter takes a while on a slow line.
const ANSWER: Duration = Duration::from_secs(30);

/// After this silence the queue is asked whether it has anything left.
const SILENCE: Duration = Duration::from_millis(500);

/// How many letters are in memory at most. A consumer that has handed out as many is replaced by another.
const WINDOW: u16 = 64;

/// How many consumers' letters are given back at once: half of what a quorum queue's client takes before it lets the
/// rest wait.
const BATCH: usize = 16;

/// A walk over one queue.
pub(super) struct QueueLetters {
    hand: Hand,
    /// The first one, got to see how many there are.
    first: Option<Letter>,
    /// How many are still to be shown.
    left: u32,
}

/// What is unacked on the walk's channel, so that it is not met again.
struct Hand {
    queue: ShortString,
    channel: Channel,
    consumer: Option<Consumer>,
    /// How many of this consumer's letters were shown and not removed.
    of_consumer: u16,
    /// Handed out by this consumer, and not shown yet.
    arrived: VecDeque<Delivery>,
    /// Handed out by a former consumer when it had to stop.
    late: VecDeque<Delivery>,
    /// The last tags of former consumers and of gets.
    ends: Vec<u64>,
    last: u64,
    /// An ack of any other tag would close the channel.
    held: HashSet<u64>,
    given_back: bool,
}

/// # Errors
///
/// `Refused` if there is no such queue, or it shows nothing without losing it (a stream).
pub(super) async fn begin(link: &Link, at: &Destination) -> Result<QueueLetters, BrokerError> {
    let queue = queue_name("the name of the dead-letter queue", at.name())?;
    if !topology::exists(link, &queue).await? {
        let what = format!("the queue `{queue}` does not exist: check the name of the dead letters");
        return Err(BrokerError::new(BrokerErrorKind::Refused, what));
    }
    let (channel, _) = link.channel().await?;
    let mut hand = Hand::new(queue, channel);
    // Its answer says how many are behind it. A declaration's count is 0 while a quorum queue has no leader.
    let first = hand.get().await?;
    let left = first.as_ref().map_or(0, |(_, behind)| *behind);
    Ok(QueueLetters { hand, first: first.map(|(letter, _)| letter), left })
}

#[async_trait]
impl Letters for QueueLetters {
    async fn next(&mut self) -> Result<Option<Letter>, BrokerError> {
        if self.first.is_some() || self.left == 0 {
            return Ok(self.first.take());
        }
        let next = self.hand.next().await?;
        // Nothing: somebody else took what was there.
        self.left = if next.is_some() { self.left - 1 } else { 0 };
        Ok(next)
    }

    async fn remove(&mut self, place: Place) -> Result<(), BrokerError> {
        self.hand.ack(place.0).await
    }

    async fn close(mut self: Box<Self>) -> Result<(), BrokerError> {
        self.hand.give_back().await
    }
}

impl Hand {
    fn new(queue: ShortString, channel: Channel) -> Self {
        Self {
            queue,
            channel,
            consumer: None,
            of_consumer: 0,
            arrived: VecDeque::new(),
            late: VecDeque::new(),
            ends: Vec::new(),
            last: 0,
            held: HashSet::new(),
            given_back: false,
        }
    }

    async fn next(&mut self) -> Result<Option<Letter>, BrokerError> {
        if !self.channel.status().connected() {
            // lapin would go on to show what had arrived.
            return Err(self.cut_off());
        }
        if self.of_consumer >= WINDOW {
            self.stop_consuming().await?;
        }
        if let Some(late) = self.late.pop_front() {
            return Ok(Some(self.letter(late)));
        }
        if let Some(arrived) = self.arrived.pop_front() {
            return self.delivered(Some(Ok(arrived))).map(Some);
        }
        self.start_consuming().await?;
        let Some(consumer) = &mut self.consumer else { return Err(self.ended()) };
        match timeout(SILENCE, consumer.next()).await {
            Ok(delivery) => self.delivered(delivery).map(Some),
            Err(_) => self.ask_for_one().await,
        }
    }

    async fn start_consuming(&mut self) -> Result<(), BrokerError> {
        if self.consumer.is_some() {
            return Ok(());
        }
        let (queue, channel) = (self.queue.clone(), &self.channel);
        let consume = async {
            channel.basic_qos(WINDOW, BasicQosOptions { global: false }).await?;
            let options = BasicConsumeOptions::default();
            channel.basic_consume(queue, ShortString::default(), options, FieldTable::default()).await
        };
        let consumer = answered("reading letters", ANSWER, consume.map(Ok)).await?;
        self.consumer = Some(consumer.map_err(|error| self.lost(error))?);
        Ok(())
    }

    /// The consumer hands out no more; what it has handed out stays in hand.
    async fn stop_consuming(&mut self) -> Result<(), BrokerError> {
        self.see_the_end()?;
        let Some(mut consumer) = self.consumer.take() else { return Ok(()) };
        let cancel = self.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
        answered("reading letters", ANSWER, cancel).await?;
        self.late.extend(self.arrived.drain(..));
        while let Some(Ok(late)) = consumer.next().await {
            self.late.push_back(late);
        }
        self.last = self.late.back().map_or(self.last, |late| late.delivery_tag.max(self.last));
        self.ends.push(self.last);
        self.of_consumer = 0;
        Ok(())
    }

    fn delivered(&mut self, delivery: Option<lapin::Result<Delivery>>) -> Result<Letter, BrokerError> {
        match delivery {
            Some(Ok(frame)) => {
                self.of_consumer += 1;
                Ok(self.letter(frame))
            }
            Some(Err(error)) => Err(self.lost(error)),
            None => Err(self.ended()),
        }
    }

    /// Only a get says that there is nothing. What the consumer was handed before has arrived by then.
    async fn ask_for_one(&mut self) -> Result<Option<Letter>, BrokerError> {
        if let Some((letter, _)) = self.get().await? {
            return Ok(Some(letter));
        }
        match self.consumer.as_mut().and_then(|consumer| consumer.next().now_or_never()) {
            Some(delivery) => self.delivered(delivery).map(Some),
            None => Ok(None),
        }
    }

    /// One letter, and how many are behind it.
    async fn get(&mut self) -> Result<Option<(Letter, u32)>, BrokerError> {
        let get = self.channel.basic_get(self.queue.clone(), BasicGetOptions { no_ack: false });
        let got = answered("reading a letter", ANSWER, get.map(Ok)).await?;
        let Some(got) = got.map_err(|error| self.lost(error))? else { return Ok(None) };
        self.ends.push(got.delivery.delivery_tag);
        Ok(Some((self.letter(got.delivery), got.message_count)))
    }

    fn letter(&mut self, frame: Delivery) -> Letter {
        let tag = frame.delivery_tag;
        self.last = self.last.max(tag);
        self.held.insert(tag);
        let id = own_id(&frame.properties);
        let message = message_of(Source::new(SYSTEM, ""), frame);
        Letter::found(id.as_deref(), None, message, Place(tag))
    }

    /// An error if the broker has ended the reading. What arrived until then is kept.
    fn see_the_end(&mut self) -> Result<(), BrokerError> {
        while let Some(next) = self.consumer.as_mut().and_then(|consumer| consumer.next().now_or_never()) {
            match next {
                Some(Ok(arrived)) => self.arrived.push_back(arrived),
                Some(Err(error)) => return Err(self.lost(error)),
                None => return Err(self.ended()),
            }
        }
        Ok(())
    }

    /// AMQP confirms no ack. But a channel does one thing after the other, and the queue answers the question itself: what
    /// was sent before has come as far. Unless the broker had ended the reading by then, when it swallows the ack and,
    /// RabbitMQ 4.3, revives the consumer: so it is looked for before, and once more when the queue has answered.
    async fn ack(&mut self, tag: u64) -> Result<(), BrokerError> {
        if !self.held.remove(&tag) {
            return Ok(());
        }
        self.see_the_end()?;
        if self.consumer.is_some() && self.ends.last().is_none_or(|end| tag > *end) {
            self.of_consumer = self.of_consumer.saturating_sub(1);
        }
        let taken = async {
            self.channel.basic_ack(tag, BasicAckOptions { multiple: false }).await?;
            self.ask_the_queue().await
        };
        answered(&format!("removing a letter from `{}`", self.queue), ANSWER, taken).await?;
        self.see_the_end()
    }

    async fn ask_the_queue(&self) -> lapin::Result<()> {
        self.channel.queue_declare(self.queue.clone(), PASSIVE, FieldTable::default()).await.map(drop)
    }

    /// Gives everything back before the channel is closed: RabbitMQ 4.3 counts a delivery for each message that a
    /// closed channel held, and drops it at its queue's limit. And cancels before that, or it would come straight back.
    async fn give_back(&mut self) -> Result<(), BrokerError> {
        self.given_back = true;
        self.stop_consuming().await?;
        for end in self.ends.clone().chunks(BATCH).rev().skip(1).rev().filter_map(<[u64]>::last) {
            self.nack(*end).await?;
            // A get is answered when all before it is done, on a quorum queue as well.
            self.get().await?;
        }
        self.nack(ALL).await?;
        let goodbye = async {
            self.ask_the_queue().await?;
            self.channel.close(REPLY_SUCCESS, "OK".into()).await
        };
        answered(&format!("giving back the letters of `{}`", self.queue), ANSWER, goodbye).await
    }

    /// All that is unacked up to this tag.
    async fn nack(&self, tag: u64) -> Result<(), BrokerError> {
        let nack = self.channel.basic_nack(tag, BasicNackOptions { multiple: true, requeue: true });
        answered(&format!("giving back the letters of `{}`", self.queue), ANSWER, nack).await
    }

    /// The channel is closed, and nothing settled on it: a late nack would revive the consumer at the broker (RabbitMQ 4.3).
    fn lost(&mut self, error: lapin::Error) -> BrokerError {
        self.hang_up();
        let what = format!("reading the letters of `{}` ended", self.queue);
        match error.kind() {
            ErrorKind::ParsingError(_) => BrokerError::new(
                BrokerErrorKind::Refused,
                format!("{what}: the next letter has a property or a header's name that is not UTF-8, which lapin cannot read; take it out by another client"),
            )
            .with_source(error),
            // Not implemented.
            _ if reply_code(&error) == Some(540) => {
                let what = format!("the letters of `{}` cannot be shown: it is a stream", self.queue);
                BrokerError::new(BrokerErrorKind::Refused, what).with_source(error)
            }
            _ => said_no(what, error),
        }
    }

    fn cut_off(&mut self) -> BrokerError {
        self.hang_up();
        let what = format!("the connection by which the letters of `{}` are read is lost", self.queue);
        BrokerError::new(BrokerErrorKind::Unreachable, what)
    }

    fn ended(&mut self) -> BrokerError {
        self.hang_up();
        let what =
            format!("RabbitMQ ended the reading of `{}`: it was deleted, or held for too long", self.queue);
        BrokerError::new(BrokerErrorKind::Closed, what)
    }

    fn hang_up(&mut self) {
        self.given_back = true;
        self.consumer = None;
        let _ = self.channel.close(REPLY_SUCCESS, "OK".into()).now_or_never();
    }
}

/// Stands for every tag of a channel.
const ALL: u64 = 0;

impl Drop for QueueLetters {
    /// As `close`, by a task of its own. Without a runtime the channel's end gives everything back, and is counted.
    fn drop(&mut self) {
        if self.hand.given_back {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let gone = Hand::new(self.hand.queue.clone(), self.hand.channel.clone());
        let mut hand = std::mem::replace(&mut self.hand, gone);
        runtime.spawn(async move {
            // What fails ends the channel, which gives back as well.
            let _ = hand.give_back().await;
        });
    }
}

/// The copy's own id; of what is no copy of ours, its sender's.
fn own_id(properties: &BasicProperties) -> Option<Vec<u8>> {
    let copys = properties.headers().as_ref().and_then(|headers| headers.inner().get(copy::COPY_ID));
    let senders = || properties.message_id().as_ref().map(|id| id.as_str().as_bytes().to_vec());
    copys.map(bytes_of).or_else(senders)
}
