//! Dispositions become what is published to a delivery's reply subject.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_nats::client::{Request, RequestError, RequestErrorKind};
use async_nats::message::OutboundMessage;
use async_nats::{Client, PublishError, Subject};
use bytes::Bytes;
use futures_util::Sink;
use futures_util::task::AtomicWaker;
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::holds::Holds;
use super::source::Place;
use super::topology::Durable;
use crate::broker::{BrokerError, BrokerErrorKind, Copy};
use crate::delivery::{AckHandle, Settle, Settling};
use crate::{Disposition, Message, defaults};

const ACK: Bytes = Bytes::from_static(b"+ACK");
pub(super) const NAK: Bytes = Bytes::from_static(b"-NAK");
const TERM: Bytes = Bytes::from_static(b"+TERM");
const PROGRESS: Bytes = Bytes::from_static(b"+WPI");

/// The server adds the delay to its clock, so it must not overflow there: ten years.
const LONGEST_DELAY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Settles `JetStream` deliveries, in any order, over whatever connection the client has now.
pub(super) struct Settler {
    /// Behind a lock, since sending without waiting needs `&mut`; never held while waiting.
    client: Mutex<Client>,
    double_ack: bool,
    limit: Duration,
    in_hand: Option<Arc<InHand>>,
    again: Option<Again>,
}

/// What long delays need: the stream of our own, and when to use it.
#[derive(Clone)]
struct Again {
    holds: Arc<Holds>,
    /// From which delay on.
    long: Duration,
    /// The stream whose deliveries are settled here is the source's, not ours.
    source: bool,
    /// It has its times from the server that keeps the schedules.
    stamps: bool,
}

type MakeCopy = for<'a> fn(&'a Message) -> Copy<'a>;

impl Settler {
    pub(super) fn new(client: Client, double_ack: bool, limit: Duration) -> Self {
        Self { client: Mutex::new(client), double_ack, limit, in_hand: None, again: None }
    }

    /// Also counts each settlement.
    pub(super) fn counted(self, in_hand: Arc<InHand>) -> Self {
        Self { in_hand: Some(in_hand), ..self }
    }

    /// Keeps long delays outside of the durable's pending places. `source`: whose deliveries these are; `None`: copies.
    pub(super) fn holding(
        self,
        holds: &Arc<Holds>,
        long: Option<Duration>,
        source: Option<&Durable>,
    ) -> Self {
        let (holds, long) = (Arc::clone(holds), long.unwrap_or(defaults::LONG_DELAY));
        let stamps = source.is_none_or(|source| !source.mirror);
        Self { again: Some(Again { holds, long, source: source.is_some(), stamps }), ..self }
    }

    fn client(&self) -> Client {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Hands the answer to the client, which sends it: at once if there is room in its queue.
    fn tell(&self, reply: Subject, payload: Bytes) -> Settling {
        let answer = OutboundMessage { subject: reply, payload, headers: None, reply: None };
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        let mut client = Pin::new(&mut *client);
        match client.as_mut().poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => Settling::Now(client.start_send(answer).map_err(closed)),
            Poll::Ready(Err(error)) => Settling::Now(Err(closed(error))),
            Poll::Pending => Settling::Later(Box::pin(tell_later(client.clone(), answer, self.limit))),
        }
    }

    fn acked(&self, reply: Subject) -> Settling {
        if self.double_ack { self.ask(reply) } else { self.tell(reply, ACK) }
    }

    /// Comes again: by the server, or as a copy if that is a long way off.
    fn later(&self, reply: Subject, message: &Message, after: Duration, copy: MakeCopy) -> Settling {
        match &self.again {
            Some(again) if again.takes(after) => self.hold(again, reply, message.clone(), after, copy),
            _ => self.tell(reply, nak(after)),
        }
    }

    /// The original is acked only when its copy is confirmed. If it is not, nothing is lost: the server keeps the delay,
    /// and if the copy is there after all, there are two, of which one runs.
    fn hold(
        &self,
        again: &Again,
        reply: Subject,
        message: Message,
        after: Duration,
        copy: MakeCopy,
    ) -> Settling {
        let holds = Arc::clone(&again.holds);
        let settler = Self::new(self.client(), self.double_ack, self.limit);
        again.learn_time(&reply);
        let delivery = delivery_name(&reply, again.source);
        Settling::Later(Box::pin(async move {
            let ended = match publish(&holds, copy(&message), &delivery, after).await {
                Ok(()) => settler.acked(reply),
                Err(error) => {
                    tracing::warn!(
                        target: "guestlist", queue = message.source().queue, ?error,
                        "a copy for a long delay is not confirmed: the message waits in its source's max_ack_pending"
                    );
                    settler.tell(reply, nak(after))
                }
            };
            match ended {
                Settling::Now(told) => told,
                Settling::Later(told) => told.await,
            }
        }))
    }

    /// Hands back a copy that is not due.
    pub(super) fn not_yet(&self, reply: Subject, left: Duration) {
        self.tell_meanwhile(reply, nak(left));
    }

    /// Never waits.
    fn tell_meanwhile(&self, reply: Subject, payload: Bytes) {
        if let (Settling::Later(sent), Ok(runtime)) = (self.tell(reply, payload), Handle::try_current()) {
            runtime.spawn(sent);
        }
    }

    /// Asks the server to confirm the ack.
    fn ask(&self, reply: Subject) -> Settling {
        let client = self.client();
        let request = Request::new().payload(ACK).timeout(Some(self.limit));
        // The client's own double_ack takes any answer for success, "nobody is there" too.
        Settling::Later(Box::pin(async move {
            client.send_request(reply, request).await.map(drop).map_err(unconfirmed)
        }))
    }
}

/// A message that fits is not refused for the history that we add to it.
async fn publish(
    holds: &Holds,
    mut copy: Copy<'_>,
    delivery: &str,
    after: Duration,
) -> Result<(), BrokerError> {
    loop {
        match holds.publish(&copy, delivery, after).await {
            Err(error) if error.is_too_large() && copy.shrink(false, false) => {}
            answer => return answer,
        }
    }
}

impl Again {
    /// A copy that came at once, by a clock that is behind, makes the next one wait.
    fn learn_time(&self, reply: &Subject) {
        if let Some(place) = Place::read(reply).filter(|_| self.stamps) {
            self.holds.saw(place.time());
        }
    }

    /// A copy of ours is copied again only if that takes it out of our durable's pending places. Else it stays there.
    fn takes(&self, after: Duration) -> bool {
        !after.is_zero() && after >= self.long && (self.source || self.holds.schedules())
    }
}

/// No other delivery has this name: a stream made anew counts from 1 again, but at another time. The same message
/// delivered again has, so that its second copy takes the place of the first.
fn delivery_name(reply: &Subject, source: bool) -> String {
    let stream = if source { 's' } else { 'a' };
    match Place::read(reply) {
        Some(place) => format!("{stream}{}-{}", place.sequence, place.stored),
        None => format!("{stream}{:016x}", rand::random::<u64>()),
    }
}

async fn tell_later(client: Client, answer: OutboundMessage, limit: Duration) -> Result<(), BrokerError> {
    match timeout(limit, client.publish(answer.subject, answer.payload)).await {
        Ok(sent) => sent.map_err(closed),
        Err(elapsed) => {
            let what =
                "the NATS client's queue stayed full: the server may never hear of this delivery's end";
            Err(BrokerError::new(BrokerErrorKind::Unknown, what).with_source(elapsed))
        }
    }
}

impl Settle for Settler {
    fn settle(&self, handle: &AckHandle, message: &Message, disposition: Disposition) -> Settling {
        if let Some(in_hand) = &self.in_hand {
            in_hand.settled();
        }
        let reply = match reply(handle) {
            Ok(reply) => reply,
            Err(error) => return Settling::Now(Err(error)),
        };
        match disposition {
            Disposition::Ack => self.acked(reply),
            Disposition::Requeue { after } => {
                self.later(reply, message, after, |message| Copy::hold(message))
            }
            Disposition::Release { after } => {
                self.later(reply, message, after, |message| Copy::release(message))
            }
            Disposition::Reject => self.tell(reply, TERM),
            // Any word would be an answer. Silence lets ack_wait run out.
            Disposition::Abandon => Settling::Now(Ok(())),
        }
    }

    fn progress(&self, handle: &AckHandle) {
        if let Ok(reply) = reply(handle) {
            self.tell_meanwhile(reply, PROGRESS);
        }
    }
}

fn reply(handle: &AckHandle) -> Result<Subject, BrokerError> {
    let what = "this delivery has no reply subject: it did not come from JetStream";
    let none = || BrokerError::new(BrokerErrorKind::Closed, what);
    match handle {
        AckHandle::Reply(subject) if !subject.is_empty() => {
            Subject::from_utf8(subject.clone()).map_err(|_| none())
        }
        _ => Err(none()),
    }
}

fn nak(after: Duration) -> Bytes {
    if after.is_zero() {
        return NAK;
    }
    format!("-NAK {{\"delay\": {}}}", after.min(LONGEST_DELAY).as_nanos()).into()
}

fn closed(error: PublishError) -> BrokerError {
    let what = "the NATS client is closed: the delivery comes again after ack_wait";
    BrokerError::new(BrokerErrorKind::Closed, what).with_source(error)
}

fn unconfirmed(error: RequestError) -> BrokerError {
    let (kind, what) = match error.kind() {
        RequestErrorKind::NoResponders => {
            (BrokerErrorKind::Closed, "nobody took the ack: the durable or its stream is gone")
        }
        RequestErrorKind::TimedOut => {
            (BrokerErrorKind::Unknown, "the server did not confirm the ack in time")
        }
        _ => (BrokerErrorKind::Unknown, "the ack could not be confirmed"),
    };
    BrokerError::new(kind, what).with_source(error)
}

/// How many deliveries of one subscription are in hand: its prefetch is counted here, since
/// `max_ack_pending` also counts what waits for its delay, and for every other consumer.
pub(super) struct InHand {
    count: AtomicUsize,
    prefetch: usize,
    waiting: AtomicWaker,
}

impl InHand {
    pub(super) fn new(prefetch: u16) -> Self {
        let prefetch = usize::from(prefetch).max(1);
        Self { count: AtomicUsize::new(0), prefetch, waiting: AtomicWaker::new() }
    }

    pub(super) fn taken(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    fn settled(&self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
        self.waiting.wake();
    }

    /// How many more may be taken. If none, the task is woken by the next settlement.
    pub(super) fn free(&self, cx: &Context<'_>) -> usize {
        let free = || self.prefetch.saturating_sub(self.count.load(Ordering::Relaxed));
        if free() > 0 {
            return free();
        }
        self.waiting.register(cx.waker());
        free()
    }
}

/// Core NATS knows no answers: what was delivered is gone.
pub(super) struct CoreSettler;

impl Settle for CoreSettler {
    fn settle(&self, _handle: &AckHandle, _message: &Message, disposition: Disposition) -> Settling {
        Settling::Now(match disposition {
            Disposition::Ack | Disposition::Reject | Disposition::Abandon => Ok(()),
            Disposition::Requeue { .. } | Disposition::Release { .. } => {
                let what =
                    "core NATS does not redeliver: the message is lost. Consume it from a stream instead";
                Err(BrokerError::new(BrokerErrorKind::Refused, what))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_is_sent_in_nanoseconds_and_never_overflows() {
        assert_eq!(nak(Duration::ZERO), "-NAK");
        assert_eq!(nak(Duration::from_micros(1500)), r#"-NAK {"delay": 1500000}"#);
        assert_eq!(nak(Duration::MAX), r#"-NAK {"delay": 315360000000000000}"#);
    }

    #[test]
    fn a_handle_without_a_reply_subject_is_an_error() {
        for handle in
            [AckHandle::Tag(1), AckHandle::Reply(Bytes::new()), AckHandle::Reply(Bytes::from_static(b"\xff"))]
        {
            assert_eq!(reply(&handle).unwrap_err().kind(), BrokerErrorKind::Closed);
        }
    }
}
