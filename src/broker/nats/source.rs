//! Frames become deliveries: a durable that is pulled, the core subscription, and what a frame says.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::client::Request;
use async_nats::{Client, HeaderMap, StatusCode, Subject, Subscriber, header, jetstream};
use bytes::Bytes;
use futures_util::{FutureExt, Sink, StreamExt};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::connect::Link;
use super::holds::Holds;
use super::publish::acted_on;
use super::requests::{HEARTBEAT, Patience, Requests};
use super::settle::{CoreSettler, InHand, NAK, Settler};
use super::topology::{Durable, Names};
use crate::broker::{BrokerError, BrokerErrorKind, QueueSpec, Subscription, copy};
use crate::delivery::{AckHandle, BoxFuture, Settle};
use crate::message::{MessageBuilder, Source};
use crate::{Acker, Delivery, Message};

/// How long `cancel` listens for deliveries that are on their way.
const ON_THEIR_WAY: Duration = Duration::from_millis(100);

/// How long `cancel` waits for the client to end the subscription.
const UNSUBSCRIBED: Duration = Duration::from_secs(1);

/// How long `cancel` takes at most. What is not handed back by then comes again after `ack_wait`.
const HANDED_BACK: Duration = Duration::from_secs(5);

/// A durable, pulled: never more is asked for than can be taken in hand.
pub(super) struct Pull {
    /// `None` once it has ended.
    frames: Option<Subscriber>,
    client: Client,
    requests: Requests,
    /// Where to ask about the durable.
    info: Subject,
    queue: String,
    settle: Arc<Settler>,
    in_hand: Arc<InHand>,
    /// On our own stream: what knows whether a copy is due.
    copies: Option<Arc<Holds>>,
    silence: Silence,
    loss: BoxFuture<()>,
}

/// What a poll of one durable brought, if it did not end it.
pub(super) enum Arrived {
    Delivery(Delivery),
    /// Nothing to hand over, but there may be more to ask for now.
    Word,
}

impl Pull {
    /// Begins to listen; it brings what is [asked](Self::ask) for.
    pub(super) async fn start(
        link: &Link,
        spec: &QueueSpec,
        durable: &Durable,
        settler: Settler,
        in_hand: &Arc<InHand>,
    ) -> Result<Self, BrokerError> {
        // Before the subscription, so that no loss falls between the two.
        let loss = Box::pin(link.loss());
        let client = link.client.clone();
        let Names { stream, durable: name, .. } = &durable.names;
        let inbox = client.new_inbox();
        let frames = client.subscribe(format!("{inbox}.*")).await.map_err(|error| {
            let what = format!("cannot subscribe to the replies of the durable `{name}`");
            BrokerError::new(BrokerErrorKind::Unreachable, what).with_source(error)
        })?;
        Ok(Self {
            frames: Some(frames),
            client,
            requests: Requests::new(&durable.names, inbox, durable),
            info: format!("$JS.API.CONSUMER.INFO.{stream}.{name}").into(),
            queue: spec.name.clone(),
            settle: Arc::new(settler.counted(Arc::clone(in_hand))),
            in_hand: Arc::clone(in_hand),
            copies: None,
            silence: Silence::new(HEARTBEAT * 2),
            loss,
        })
    }

    /// What it brings are copies of ours.
    pub(super) fn of_copies(self, holds: Arc<Holds>) -> Self {
        Self { copies: Some(holds), ..self }
    }

    /// How many messages may still arrive.
    pub(super) fn wanted(&self) -> usize {
        self.requests.wanted()
    }

    /// The last that was heard is a message, a moment ago, and not that there is none.
    pub(super) fn busy(&self) -> bool {
        self.requests.busy()
    }

    /// Asks for as many messages as are free, once half of what was asked for is used up: so the
    /// next ones are on their way while these are handled, and requests do not get small.
    pub(super) fn ask(
        &mut self,
        cx: &mut Context<'_>,
        free: usize,
        patience: Patience,
    ) -> Result<(), BrokerError> {
        let Some(count) = self.requests.due(free) else { return Ok(()) };
        // Pending: the client's queue is full, and wakes this task when it is not.
        if let Poll::Ready(ready) = Pin::new(&mut self.client).poll_ready(cx) {
            ready.map_err(client_closed)?;
            let request = self.requests.request(count, patience);
            Pin::new(&mut self.client).start_send(request).map_err(client_closed)?;
            self.silence.broken();
        }
        Ok(())
    }

    /// What has arrived. After an error it is dead.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Arrived, BrokerError>> {
        let polled = match self.poll_frame(cx) {
            Poll::Ready(Some(frame)) => Poll::Ready(self.read(frame)),
            Poll::Ready(None) => Poll::Ready(Err(subscription_ended())),
            Poll::Pending => self.poll_clocks(cx),
        };
        if let Poll::Ready(Err(_)) = polled {
            self.frames = None;
        }
        polled
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<async_nats::Message>> {
        self.frames.as_mut().map_or(Poll::Ready(None), |frames| frames.poll_next_unpin(cx))
    }

    fn read(&mut self, frame: async_nats::Message) -> Result<Arrived, BrokerError> {
        self.silence.broken();
        match frame.status.filter(|_| !is_stored(&frame)) {
            None | Some(StatusCode::OK) => Ok(self.delivery(frame).map_or(Arrived::Word, Arrived::Delivery)),
            Some(status) => self.requests.status(status, &frame).map(|()| Arrived::Word),
        }
    }

    fn delivery(&mut self, frame: async_nats::Message) -> Option<Delivery> {
        let Some((message, reply)) = read_frame(frame, Some(&self.queue), self.copies.is_some()) else {
            tracing::warn!(queue = self.queue, "a message without JetStream's reply subject was ignored");
            return None;
        };
        self.requests.arrived();
        if let Some(left) = self.left(&message, &reply) {
            self.settle.not_yet(reply, left);
            return None;
        }
        self.in_hand.taken();
        let settle: Arc<dyn Settle> = Arc::clone(&self.settle) as _;
        Some(Delivery::new(message, settle, AckHandle::Reply(Bytes::from(reply.into_string()))))
    }

    /// How long a copy has still to wait that could not be put on schedule.
    fn left(&self, message: &Message, reply: &Subject) -> Option<Duration> {
        let (copies, hold) = (self.copies.as_ref()?, message.copy_marks().hold?);
        let stored = Place::read(reply)?.time();
        copies.saw(stored);
        let left = copies.left(hold, stored);
        (!left.is_zero()).then_some(left)
    }

    /// Only asked when nothing is buffered: what has arrived can still be handled and acked.
    fn poll_clocks(&mut self, cx: &mut Context<'_>) -> Poll<Result<Arrived, BrokerError>> {
        if self.loss.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(connection_lost()));
        }
        if self.requests.wanted() > 0 && self.silence.poll(cx).is_ready() {
            let what = format!("the server has not said a word for {:?}", self.silence.limit);
            return Poll::Ready(Err(BrokerError::new(BrokerErrorKind::Unreachable, what)));
        }
        self.requests.poll_lapse(cx).map(|()| Ok(Arrived::Word))
    }

    /// Ends it, and hands back what has arrived.
    pub(super) fn cancel(&mut self) -> BoxFuture<()> {
        let Some(frames) = self.frames.take().filter(|_| self.requests.may_bring_more()) else {
            return Box::pin(async {});
        };
        let (client, info, wanted) = (self.client.clone(), self.info.clone(), self.requests.wanted());
        Box::pin(HandBack { frames, client, info, wanted, replies: Vec::new() }.run())
    }
}

/// What `cancel` leaves behind, until all that was not delivered is given back.
struct HandBack {
    frames: Subscriber,
    client: Client,
    /// Where to ask about the durable.
    info: Subject,
    wanted: usize,
    replies: Vec<Subject>,
}

impl HandBack {
    /// Gives back only after the subscription has ended: a nak before that would bring the
    /// message here again.
    async fn run(self) {
        // Every step may wait for room in the client's queue, and that for a connection.
        let _ = timeout(HANDED_BACK, self.steps()).await;
    }

    async fn steps(mut self) {
        self.collect_what_is_on_its_way().await;
        self.unsubscribe().await;
        self.forget_requests().await;
        for reply in self.replies {
            let _ = self.client.publish(reply, NAK).await;
        }
    }

    async fn collect_what_is_on_its_way(&mut self) {
        while self.wanted > self.replies.len()
            && let Ok(Some(frame)) = timeout(ON_THEIR_WAY, self.frames.next()).await
        {
            self.keep(frame);
        }
    }

    /// The client forgets a drained subscription at its next turn, without waiting for the
    /// server. What arrives later than that comes again after `ack_wait`.
    async fn unsubscribe(&mut self) {
        if self.frames.drain().await.is_err() {
            return;
        }
        while let Ok(Some(frame)) = timeout(UNSUBSCRIBED, self.frames.next()).await {
            self.keep(frame);
        }
    }

    /// A server of 2.9 gives a message that comes back to the oldest request, finds that nobody
    /// waits for it any more, and keeps the message until `ack_wait` is over. Asked about the
    /// durable, it looks through the requests and drops those.
    async fn forget_requests(&self) {
        let request = Request::new().timeout(Some(UNSUBSCRIBED));
        let _ = self.client.send_request(self.info.clone(), request).await;
    }

    fn keep(&mut self, frame: async_nats::Message) {
        if frame.status.is_none() || is_stored(&frame) {
            self.replies.extend(frame.reply);
        }
    }
}

fn connection_lost() -> BrokerError {
    BrokerError::new(BrokerErrorKind::Unreachable, "the connection to NATS was lost")
}

fn subscription_ended() -> BrokerError {
    BrokerError::new(BrokerErrorKind::Closed, "the NATS client has ended, and the subscription with it")
}

fn client_closed(error: async_nats::PublishError) -> BrokerError {
    subscription_ended().with_source(error)
}

/// Measures how long the server says nothing; one timer, moved only when nothing has arrived.
struct Silence {
    limit: Duration,
    timer: Pin<Box<Sleep>>,
    broken: bool,
}

impl Silence {
    fn new(limit: Duration) -> Self {
        Self { limit, timer: Box::pin(sleep(limit)), broken: true }
    }

    fn broken(&mut self) {
        self.broken = true;
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::take(&mut self.broken) {
            self.timer.as_mut().reset(Instant::now() + self.limit);
        }
        self.timer.as_mut().poll(cx)
    }
}

/// A queue group on a subject: at most once.
pub(super) struct CoreSource {
    frames: Subscriber,
    ended: bool,
    queue: String,
    settle: Arc<dyn Settle>,
    loss: BoxFuture<()>,
}

impl CoreSource {
    pub(super) async fn start(link: &Link, spec: &QueueSpec, names: &Names) -> Result<Self, BrokerError> {
        let loss = Box::pin(link.loss());
        let frames = link.client.queue_subscribe(names.subject.clone(), names.durable.clone()).await;
        let frames = frames.map_err(|error| {
            let what = format!("cannot subscribe to the subject `{}`", names.subject);
            BrokerError::new(BrokerErrorKind::Refused, what).with_source(error)
        })?;
        Ok(Self { frames, ended: false, queue: spec.name.clone(), settle: Arc::new(CoreSettler), loss })
    }

    fn delivery(&self, frame: async_nats::Message) -> Delivery {
        let mut source = Source::new(super::SYSTEM, self.queue.as_str());
        frame.subject.as_str().clone_into(&mut source.routing_key);
        let message =
            with_headers(Message::builder(frame.payload), frame.headers.as_ref()).source(source).build();
        Delivery::new(message, Arc::clone(&self.settle), AckHandle::Reply(Bytes::new()))
    }
}

impl Subscription for CoreSource {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        _room: usize,
    ) -> Poll<Option<Result<Delivery, BrokerError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let end = match self.frames.poll_next_unpin(cx) {
            Poll::Ready(Some(frame)) => return Poll::Ready(Some(Ok(self.delivery(frame)))),
            Poll::Ready(None) => subscription_ended(),
            Poll::Pending if self.loss.as_mut().poll(cx).is_ready() => connection_lost(),
            Poll::Pending => return Poll::Pending,
        };
        self.ended = true;
        Poll::Ready(Some(Err(end)))
    }

    fn cancel(&mut self) -> BoxFuture<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Box::pin(async {});
        }
        let unsubscribed = self.frames.unsubscribe().now_or_never();
        let mut lost = 0_usize;
        while let Some(Some(_)) = self.frames.next().now_or_never() {
            lost += 1;
        }
        if lost > 0 {
            tracing::warn!(queue = self.queue, lost, "core NATS: messages that had arrived are lost");
        }
        drop(unsubscribed);
        Box::pin(async {})
    }

    fn close(mut self: Box<Self>) -> BoxFuture<()> {
        self.cancel()
    }
}

/// A message of a stream may have a first header line that reads as a word of the server's, if its sender wrote it there.
fn is_stored(frame: &async_nats::Message) -> bool {
    frame.reply.as_ref().is_some_and(|reply| Place::read(reply).is_some())
}

/// Splits a message of your own `async-nats` loop into what the layers take and the right to
/// settle it.
///
/// A message that did not come from a stream has no source, and its acker can only fail.
///
/// ```no_run
/// # async fn example(message: guestlist::broker::nats::async_nats::jetstream::Message) -> Result<(), guestlist::BoxError> {
/// use guestlist::Disposition;
///
/// let (message, acker) = guestlist::broker::nats::split(message);
/// println!("{} bytes", message.payload().len()); // call the layers with it
/// acker.settle(Disposition::Ack).await?;
/// # Ok(())
/// # }
/// ```
pub fn split(message: jetstream::Message) -> (Message, Acker) {
    let settle = Settler::new(message.context.client(), false, crate::defaults::CONFIRM);
    let frame = message.message;
    let bare = (frame.payload.clone(), frame.headers.clone());
    let read =
        read_frame(frame, None, false).map(|(message, reply)| (message, Bytes::from(reply.into_string())));
    let (message, reply) = read.unwrap_or_else(|| {
        let message = with_headers(Message::builder(bare.0), bare.1.as_ref());
        (message.source(Source::new(super::SYSTEM, "")).build(), Bytes::new())
    });
    Delivery::new(message, Arc::new(settle), AckHandle::Reply(reply)).into_parts()
}

/// What a frame says, and the subject to answer it on; `None` if no stream delivered it. `ours`: it comes from our own
/// stream, where the first delivery of a copy that is not on schedule only finds that it is not due.
fn read_frame(frame: async_nats::Message, queue: Option<&str>, ours: bool) -> Option<(Message, Subject)> {
    let reply = frame.reply?;
    let place = Place::read(&reply)?;
    let mut source = Source::new(super::SYSTEM, queue.unwrap_or(place.durable));
    place.stream.clone_into(&mut source.stream);
    frame.subject.as_str().clone_into(&mut source.routing_key);
    source.sequence = Some(place.sequence);
    let held = ours && frame.headers.as_ref().is_some_and(|headers| headers.get(copy::HOLD).is_some());
    let delivered = place.delivered.saturating_sub(u32::from(held)).max(1);
    let message = with_headers(Message::builder(frame.payload), frame.headers.as_ref())
        .source(source)
        .redelivered(delivered > 1)
        .broker_deliveries(delivered)
        .timestamp(place.time())
        .build();
    Some((message, reply))
}

/// All headers, the id and the content type.
fn with_headers(message: MessageBuilder, headers: Option<&HeaderMap>) -> MessageBuilder {
    let all = headers.into_iter().flat_map(HeaderMap::iter);
    let fields = all.flat_map(|(name, values)| {
        values.iter().map(|value| (AsRef::<str>::as_ref(name), value.as_str().as_bytes()))
    });
    with_fields(message, &fields)
}

/// The same for names and values that the client did not read.
pub(super) fn with_fields<'a>(
    mut message: MessageBuilder,
    fields: &(impl Iterator<Item = (&'a str, &'a [u8])> + Clone),
) -> MessageBuilder {
    // On a copy of ours these are the copy's own (its id for the duplicate window, the stream it was for, its
    // schedule); the original's are among those that were moved aside.
    let is_copy = fields.clone().any(|(name, _)| name == copy::ATTEMPT);
    let is_id = |name: &str| name == AsRef::<str>::as_ref(&header::NATS_MESSAGE_ID);
    for (name, value) in fields.clone().filter(|(name, _)| !(is_copy && acted_on(name))) {
        message = message.header(name, Bytes::copy_from_slice(value));
    }
    if let Some((_, id)) = fields.clone().find(|(name, _)| is_id(name) && !is_copy) {
        message = message.transport_id(id.to_vec());
    }
    let is_type = |name: &str| name.eq_ignore_ascii_case(super::CONTENT_TYPE);
    match fields.clone().find(|(name, _)| is_type(name)).map(|(_, value)| std::str::from_utf8(value)) {
        Some(Ok(value)) => message.content_type(value),
        _ => message,
    }
}

/// What a delivery's reply subject says of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place<'a> {
    stream: &'a str,
    durable: &'a str,
    delivered: u32,
    pub(super) sequence: u64,
    /// Nanoseconds since 1970, by the server's clock.
    pub(super) stored: u64,
}

impl<'a> Place<'a> {
    /// `$JS.ACK.stream.durable.delivered.sequence.sequence-of-durable.time.pending`; newer
    /// servers may put a domain and an account's hash before the stream, and more at the end.
    pub(super) fn read(reply: &'a str) -> Option<Self> {
        let tokens: Vec<&str> = reply.strip_prefix("$JS.ACK.")?.split('.').collect();
        let tokens = match tokens.len() {
            7 => &tokens[..],
            9.. => &tokens[2..],
            _ => return None,
        };
        Some(Self {
            stream: tokens[0],
            durable: tokens[1],
            delivered: u32::try_from(tokens[2].parse::<u64>().ok()?).unwrap_or(u32::MAX),
            sequence: tokens[3].parse().ok()?,
            stored: tokens[5].parse().ok()?,
        })
    }

    pub(super) fn time(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_subject_names_the_place_in_the_stream() {
        let place = Place { stream: "S", durable: "d", delivered: 3, sequence: 100, stored: 17 };
        assert_eq!(Place::read("$JS.ACK.S.d.3.100.7.17.42"), Some(place));
        let place = Place { stream: "S", durable: "d", delivered: 1, sequence: 2, stored: 17 };
        assert_eq!(Place::read("$JS.ACK._.hash.S.d.1.2.7.17.0"), Some(Place { ..place }));
        assert_eq!(Place::read("$JS.ACK.hub.hash.S.d.1.2.7.17.0.more.more"), Some(place));
        for none in ["", "$JS.ACK.S.d.3.100.7.17", "$JS.ACK.S.d.x.100.7.17.42", "_INBOX.a.b.c.d.e.f.g"] {
            assert_eq!(Place::read(none), None, "{none}");
        }
    }
}
