//! Pull requests: what the server has been asked for, what it may still bring, and when that is over.

use std::collections::VecDeque;
use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_nats::message::OutboundMessage;
use async_nats::{StatusCode, Subject};
use tokio::time::{Instant, Sleep, sleep};

use super::topology::{Durable, Names};
use crate::broker::{BrokerError, BrokerErrorKind};

/// How long a pull request stays with the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// 30 s: nobody else wants the places that it keeps.
    Alone,
    /// 1 s: they are shared, and there are many.
    Shared,
    /// Half a second: there are few, or what is asked for is expected to be there.
    Short,
    /// 10 ms: another one has messages for the place that it keeps. Not `no_wait`: such a request can stay with the
    /// server for ever, without a word, when the one message that it counted on has gone meanwhile.
    Glance,
}

impl Patience {
    const fn expires(self) -> Duration {
        match self {
            Self::Alone => Duration::from_secs(30),
            Self::Shared => Duration::from_secs(1),
            Self::Short => Duration::from_millis(500),
            Self::Glance => Duration::from_millis(10),
        }
    }
}

/// How often the server says that it still has the request: 5 s.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(5);

/// How long a request without heartbeats stays at most: the server's only word may be that it is over, and must come before
/// silence is judged.
const WITHOUT_HEARTBEATS: Duration = Duration::from_secs(9);

/// How long after its time a request is taken for over of which the server has not said so: the way of that word.
const LAPSE: Duration = Duration::from_millis(500);

/// How often in a row that may be: a server that says nothing is asked for no more than three times what there is room for.
/// Once would not do: a second request can be forgotten as the first one was.
const LAPSES: u32 = 2;

/// How long a message says that there are more: for longer than another one's request may keep the places for them.
const BUSY: Duration = Duration::from_secs(2);

const PENDING_MESSAGES: &str = "Nats-Pending-Messages";

/// The pull requests at the server, and how many messages they may still bring.
pub(super) struct Requests {
    next: Subject,
    inbox: String,
    largest: usize,
    longest: Duration,
    /// Never more than `asked` can bring.
    wanted: usize,
    /// Oldest first.
    asked: VecDeque<Asked>,
    /// How many there have been.
    number: u64,
    /// How many messages they have brought.
    arrivals: u64,
    /// When the last message came, unless a request came to nothing since.
    brought: Option<Instant>,
    lapse: Lapse,
}

/// One request, which the server names in its word of the end.
struct Asked {
    number: u64,
    count: usize,
    end: Instant,
    /// How many messages had been brought when it was made.
    before: u64,
}

/// What was taken for over without the server's word.
struct Lapse {
    timer: Pin<Box<Sleep>>,
    /// How often, since the last word.
    since_word: u32,
    /// The newest request when one was last. What is not in `asked` of those, `wanted` does not count either.
    newest: u64,
}

impl Requests {
    /// Answers come to subjects under `inbox`.
    pub(super) fn new(names: &Names, inbox: String, durable: &Durable) -> Self {
        let next = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", names.stream, names.durable).into();
        Self {
            next,
            inbox,
            largest: durable.max_batch.unwrap_or(usize::MAX),
            longest: durable.max_expires.unwrap_or(Duration::MAX),
            wanted: 0,
            asked: VecDeque::new(),
            number: 0,
            arrivals: 0,
            brought: None,
            lapse: Lapse { timer: Box::pin(sleep(LAPSE)), since_word: 0, newest: 0 },
        }
    }

    /// How many messages they may still bring.
    pub(super) fn wanted(&self) -> usize {
        self.wanted
    }

    /// Whether anything may still arrive: also what was given up.
    pub(super) fn may_bring_more(&self) -> bool {
        self.wanted > 0 || self.lapse.newest > 0
    }

    /// The last that was heard is a message, a moment ago, and not that there is none.
    pub(super) fn busy(&self) -> bool {
        self.brought.is_some_and(|brought| brought.elapsed() < BUSY)
    }

    /// How many to ask for, if it is time to: once half of what was asked for is used up.
    pub(super) fn due(&self, free: usize) -> Option<usize> {
        let count = free.saturating_sub(self.wanted).min(self.largest);
        (count > 0 && self.wanted <= free / 2).then_some(count)
    }

    pub(super) fn request(&mut self, count: usize, patience: Patience) -> OutboundMessage {
        let expires = expires(patience, self.longest);
        self.number += 1;
        self.wanted += count;
        let end = Instant::now() + expires;
        self.asked.push_back(Asked { number: self.number, count, end, before: self.arrivals });
        self.drop_the_done();
        let reply = Subject::from(format!("{}.{}", self.inbox, self.number));
        OutboundMessage {
            subject: self.next.clone(),
            payload: payload(count, expires).into(),
            headers: None,
            reply: Some(reply),
        }
    }

    /// Nobody tells when a request has brought all. It counts as done when the later ones can bring all that is wanted; but
    /// not while it may outlive one of them, whose end would then take away what this one still brings.
    fn drop_the_done(&mut self) {
        while let Some(first) = self.asked.front()
            && self.all_asked() - first.count >= self.wanted
            && self.asked.iter().all(|other| first.end <= other.end)
        {
            self.asked.pop_front();
        }
    }

    fn all_asked(&self) -> usize {
        self.asked.iter().map(|asked| asked.count).sum()
    }

    /// Of a message.
    pub(super) fn arrived(&mut self) {
        self.arrivals += 1;
        self.lapse.since_word = 0;
        self.wanted = self.wanted.saturating_sub(1);
        self.brought = Some(Instant::now());
    }

    /// Reads what the server says in place of a message.
    ///
    /// # Errors
    ///
    /// There will be no more.
    pub(super) fn status(
        &mut self,
        status: StatusCode,
        frame: &async_nats::Message,
    ) -> Result<(), BrokerError> {
        let description = frame.description.as_deref().unwrap_or_default();
        self.lapse.since_word = 0;
        match status {
            StatusCode::IDLE_HEARTBEAT => Ok(()),
            StatusCode::NOT_FOUND | StatusCode::TIMEOUT => {
                self.over(frame);
                Ok(())
            }
            StatusCode::REQUEST_TERMINATED if description == "Batch Completed" => {
                self.over(frame);
                Ok(())
            }
            _ => Err(terminated(status, description)),
        }
    }

    /// A request is over, and the server says how much of it came to nothing.
    fn over(&mut self, frame: &async_nats::Message) {
        let number = number_in(&frame.subject);
        let place = self.asked.iter().position(|asked| Some(asked.number) == number);
        if place.and_then(|place| self.asked.remove(place)).is_none()
            && number.is_some_and(|number| number <= self.lapse.newest)
        {
            return;
        }
        let left = frame.headers.as_ref().and_then(|headers| headers.get(PENDING_MESSAGES));
        let left = left.and_then(|left| left.as_str().parse().ok()).unwrap_or(0);
        self.less(left);
        self.wanted = self.wanted.max(self.still_to_come());
    }

    /// What the newest request can bring if all that arrived since was its own. Another one's late message may have been
    /// taken for one of it.
    fn still_to_come(&self) -> usize {
        let newest = self.asked.back();
        newest.map_or(0, |newest| {
            newest.count.saturating_sub(usize::try_from(self.arrivals - newest.before).unwrap_or(usize::MAX))
        })
    }

    /// Takes off what came to nothing, and what no request is left for. Whether that was any.
    fn less(&mut self, left: usize) -> bool {
        let before = self.wanted;
        self.wanted = before.saturating_sub(left).min(self.all_asked());
        let less = self.wanted < before;
        if less {
            self.brought = None;
        }
        less
    }

    /// Ready: one is over of which the server has not said so. Before 2.9.16, a server that has a message in the moment in
    /// which the request for it ends forgets the request without a word, and keeps the message for the next one.
    pub(super) fn poll_lapse(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.wanted > 0
            && let Some((end, place)) = self.first_to_lapse()
        {
            ready!(self.lapse.poll(cx, end + LAPSE));
            self.asked.remove(place);
            if self.less(0) {
                if self.lapse.since_word < LAPSES {
                    self.lapse.since_word += 1;
                    self.lapse.newest = self.number;
                }
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }

    fn first_to_lapse(&self) -> Option<(Instant, usize)> {
        let Lapse { since_word, newest, .. } = self.lapse;
        let may = |asked: &Asked| since_word < LAPSES || asked.number <= newest;
        let ends = self.asked.iter().enumerate().filter(|(_, asked)| may(asked));
        ends.map(|(place, asked)| (asked.end, place)).min()
    }
}

impl Lapse {
    fn poll(&mut self, cx: &mut Context<'_>, at: Instant) -> Poll<()> {
        if self.timer.deadline() != at {
            self.timer.as_mut().reset(at);
        }
        self.timer.as_mut().poll(cx)
    }
}

fn expires(patience: Patience, longest: Duration) -> Duration {
    let expires = patience.expires().min(longest);
    if expires < HEARTBEAT * 2 { expires.min(WITHOUT_HEARTBEATS) } else { expires }
}

fn payload(count: usize, expires: Duration) -> String {
    let nanos = expires.as_nanos();
    if expires < HEARTBEAT * 2 {
        // The server refuses a heartbeat longer than half the expiry. That is a sign of life itself.
        return format!(r#"{{"batch":{count},"expires":{nanos}}}"#);
    }
    format!(r#"{{"batch":{count},"expires":{nanos},"idle_heartbeat":{}}}"#, HEARTBEAT.as_nanos())
}

fn number_in(subject: &str) -> Option<u64> {
    subject.rsplit_once('.')?.1.parse().ok()
}

fn terminated(status: StatusCode, description: &str) -> BrokerError {
    let (kind, why) = match (status, description) {
        (StatusCode::NO_RESPONDERS, _) => (
            BrokerErrorKind::Unreachable,
            "nobody answers: the durable or its stream is gone, or JetStream is away",
        ),
        (_, "Consumer Deleted") => (BrokerErrorKind::Closed, "the durable was deleted"),
        (StatusCode::REQUEST_TERMINATED, text)
            if text.starts_with("Exceeded MaxRequest") || text == "Consumer is push based" =>
        {
            (BrokerErrorKind::Refused, text)
        }
        (StatusCode::REQUEST_TERMINATED, text) => (BrokerErrorKind::Unreachable, text),
        (_, text) => (BrokerErrorKind::Refused, text),
    };
    BrokerError::new(kind, format!("the server ended a pull request ({status}): {why}"))
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use async_nats::HeaderMap;
    use async_nats::jetstream::{consumer, stream};
    use futures_util::FutureExt;

    use super::*;
    use crate::broker::QueueSpec;

    fn requests() -> Requests {
        let names = Names::of(&QueueSpec::new("q")).unwrap();
        let durable = Durable::new(names.clone(), &stream::Config::default(), &consumer::Config::default());
        Requests::new(&names, "inbox".to_owned(), &durable)
    }

    /// The server's word that a request has come to its end, and how much of it to nothing.
    fn told(requests: &mut Requests, request: &OutboundMessage, left: usize) {
        let mut headers = HeaderMap::new();
        headers.insert(PENDING_MESSAGES, left.to_string());
        let frame = async_nats::Message {
            subject: request.reply.clone().unwrap(),
            reply: None,
            payload: bytes::Bytes::new(),
            headers: Some(headers),
            status: None,
            description: None,
            length: 0,
        };
        requests.status(StatusCode::TIMEOUT, &frame).unwrap();
    }

    fn arrive(requests: &mut Requests, count: usize) {
        for _ in 0..count {
            requests.arrived();
        }
    }

    async fn lapse(requests: &mut Requests) {
        poll_fn(|cx| requests.poll_lapse(cx)).await;
    }

    fn lapses_now(requests: &mut Requests) -> bool {
        poll_fn(|cx| requests.poll_lapse(cx)).now_or_never().is_some()
    }

    #[tokio::test]
    async fn more_is_asked_for_once_half_is_used_up_and_never_more_than_is_free() {
        let mut requests = requests();
        assert_eq!(requests.due(0), None);
        assert_eq!(requests.due(8), Some(8));
        requests.request(8, Patience::Alone);
        arrive(&mut requests, 3);
        assert_eq!(requests.due(8), None, "five are on their way");
        arrive(&mut requests, 1);
        assert_eq!(requests.due(8), Some(4));
        assert_eq!(requests.due(4), None, "four are on their way and four are free");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_of_whose_end_nobody_tells_is_over_but_only_twice_before_the_next_word() {
        let mut requests = requests();
        let (begin, span) = (Instant::now(), Patience::Shared.expires() + LAPSE);
        requests.request(1, Patience::Shared);
        lapse(&mut requests).await;
        assert_eq!((requests.wanted(), begin.elapsed()), (0, span));
        assert!(!lapses_now(&mut requests), "nothing is asked for");
        requests.request(1, Patience::Shared);
        lapse(&mut requests).await;
        requests.request(1, Patience::Shared);
        tokio::time::advance(span * 9).await;
        assert!(!lapses_now(&mut requests), "that is for silence to decide");
        arrive(&mut requests, 1);
        requests.request(1, Patience::Shared);
        tokio::time::advance(span).await;
        assert!(lapses_now(&mut requests));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_told_of_one_request_is_given_up_while_others_go_on() {
        let mut requests = requests();
        requests.request(16, Patience::Shared);
        arrive(&mut requests, 11);
        tokio::time::advance(Duration::from_millis(700)).await;
        let second = requests.request(11, Patience::Shared);
        assert_eq!(requests.wanted(), 16);
        lapse(&mut requests).await;
        assert_eq!(requests.wanted(), 11, "those of the second one");
        told(&mut requests, &second, 11);
        assert_eq!(requests.wanted(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_says_nothing_is_asked_twice_more_at_most() {
        let mut requests = requests();
        requests.longest = Duration::from_secs(5);
        requests.request(8, Patience::Alone);
        arrive(&mut requests, 4);
        tokio::time::advance(Duration::from_secs(2)).await;
        let mut asked = 0;
        while let Some(count) = requests.due(8)
            && asked < 100
        {
            requests.request(count, Patience::Alone);
            asked += count;
            let _ = tokio::time::timeout(Duration::from_secs(60), lapse(&mut requests)).await;
        }
        assert!((5..=16).contains(&asked), "{asked}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_outlives_younger_ones_is_not_taken_for_done() {
        let mut requests = requests();
        let first = requests.request(255, Patience::Shared);
        arrive(&mut requests, 128);
        let second = requests.request(128, Patience::Short);
        arrive(&mut requests, 128);
        let third = requests.request(128, Patience::Short);
        assert_eq!(requests.wanted(), 255);
        for (request, left, wanted) in [(&second, 64, 191), (&third, 128, 63), (&first, 63, 0)] {
            told(&mut requests, request, left);
            assert_eq!(requests.wanted(), wanted);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_message_does_not_leave_one_request_too_many() {
        let mut requests = requests();
        requests.request(1, Patience::Short);
        lapse(&mut requests).await;
        let second = requests.request(1, Patience::Short);
        arrive(&mut requests, 1);
        let third = requests.request(1, Patience::Short);
        told(&mut requests, &second, 1);
        assert_eq!(requests.wanted(), 1, "of the third");
        told(&mut requests, &third, 1);
        assert_eq!(requests.wanted(), 0);
    }

    #[tokio::test]
    async fn without_heartbeats_a_request_is_over_before_silence_is_judged() {
        for longest in [9, 10, 12].map(Duration::from_secs) {
            let expires = expires(Patience::Alone, longest);
            assert_eq!(expires, if longest < HEARTBEAT * 2 { Duration::from_secs(9) } else { longest });
        }
        assert_eq!(expires(Patience::Glance, Duration::MAX), Patience::Glance.expires());
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_word_takes_nothing_from_the_next_request() {
        let mut requests = requests();
        let first = requests.request(8, Patience::Short);
        lapse(&mut requests).await;
        let second = requests.request(8, Patience::Short);
        told(&mut requests, &first, 8);
        assert_eq!(requests.wanted(), 8);
        arrive(&mut requests, 5);
        told(&mut requests, &second, 3);
        assert_eq!(requests.wanted(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_request_brought_all_of_is_not_kept_and_its_word_is_heard_all_the_same() {
        let mut requests = requests();
        let first = requests.request(8, Patience::Alone);
        for _ in 0..1000 {
            arrive(&mut requests, 4);
            requests.request(4, Patience::Alone);
            assert!(requests.asked.len() <= 3, "{}", requests.asked.len());
        }
        // The server went round and round, and the first request is not done.
        told(&mut requests, &first, 2);
        assert_eq!(requests.wanted(), 6);
        tokio::time::advance(Patience::Alone.expires()).await;
        assert!(!lapses_now(&mut requests));
        lapse(&mut requests).await;
        assert_eq!(requests.wanted(), 4);
        assert!(lapses_now(&mut requests), "the other one is of the same time");
        assert_eq!(requests.wanted(), 0);
    }
}
