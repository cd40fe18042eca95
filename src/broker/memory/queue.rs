//! One queue: what waits, what is delayed, what is out, and who subscribed.

use std::collections::BTreeMap;
use std::mem;
use std::ops::Bound;
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::time::Instant;

use super::{SYSTEM, lock, topology};
use crate::Message;
use crate::broker::{BrokerError, BrokerErrorKind, Letter, Place};
use crate::message::{MessageBuilder, MessageId, Source};

/// Stands for a delay that has no end a clock could show.
const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365);

/// A queue. Subscriptions and deliveries hold it, so one that is deleted and declared again is
/// another one to them.
pub(super) struct Queue {
    name: String,
    state: Mutex<State>,
    /// Told whenever the queue keeps no message.
    empty: Notify,
}

#[derive(Default)]
struct State {
    /// Counts messages, deliveries and subscriptions: the last number given.
    last: u64,
    /// What can be delivered, by place.
    waiting: BTreeMap<u64, Entry>,
    /// What comes later, by time and place.
    delayed: BTreeMap<(Instant, u64), Entry>,
    /// What is delivered and not settled, by tag.
    out: BTreeMap<u64, Out>,
    members: BTreeMap<u64, Member>,
    /// So many acks are still to be lost.
    acks_to_lose: usize,
    deleted: bool,
}

/// A message that the queue keeps.
struct Entry {
    /// Its place in the queue, for life: the order of sending.
    place: u64,
    content: Arc<MessageBuilder>,
    /// How often it was delivered.
    deliveries: u32,
}

struct Out {
    entry: Entry,
    member: u64,
}

/// A subscription, as the queue sees it.
struct Member {
    prefetch: usize,
    /// How many deliveries it has in hand.
    in_hand: usize,
    standing: Standing,
    waker: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Active,
    Cancelled,
    Crashed,
}

/// What a subscription gets when it asks for the next delivery.
pub(super) enum Next {
    /// A message, and the tag that it is settled by.
    Message(u64, Message),
    /// Nothing yet: the waker will be called, but not for the delayed message that is due then.
    Wait(Option<Instant>),
    /// No more: it was cancelled, or the queue is deleted.
    End,
    /// The subscription crashed.
    Crashed,
}

/// What becomes of a delivery that is settled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is gone, unless the ack is to be lost.
    Acked,
    /// It is gone.
    Rejected,
    /// It comes again after this delay.
    Again(Duration),
}

impl Queue {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), state: Mutex::default(), empty: Notify::new() }
    }

    pub(super) fn put(&self, content: MessageBuilder) {
        self.change(|state| {
            let place = state.number();
            let content = Arc::new(content.or_timestamp(SystemTime::now));
            state.waiting.insert(place, Entry { place, content, deliveries: 0 });
        });
    }

    pub(super) fn depth(&self) -> usize {
        lock(&self.state).depth()
    }

    pub(super) fn messages(&self) -> Vec<Message> {
        let state = lock(&self.state);
        let mut entries: Vec<_> = state.entries().collect();
        entries.sort_unstable_by_key(|entry| entry.place);
        entries.into_iter().map(|entry| message(&entry.content, &self.name, entry.deliveries)).collect()
    }

    /// No place up to this one will be given again.
    pub(super) fn last_place(&self) -> u64 {
        lock(&self.state).last
    }

    /// The first message behind this place, up to `end`. What somebody has in hand is shown as well: it may come back.
    pub(super) fn letter_between(&self, shown: u64, end: u64) -> Result<Option<Letter>, BrokerError> {
        let state = lock(&self.state);
        if state.deleted {
            return Err(topology::missing(&self.name, BrokerErrorKind::Refused));
        }
        let found = state.first_between(shown, end).map(|entry| {
            let message = message(&entry.content, "", entry.deliveries);
            let transport_id = entry.content.written_transport_id().map(MessageId::as_bytes);
            Letter::found(transport_id, None, message, Place(entry.place))
        });
        Ok(found)
    }

    /// Removes the message at this place, wherever it is.
    pub(super) fn remove(&self, place: u64) {
        self.change(|state| state.remove(place));
    }

    pub(super) async fn drained(&self) {
        loop {
            // Made before the look: it hears what is told from here on.
            let empty = self.empty.notified();
            if self.depth() == 0 {
                return;
            }
            empty.await;
        }
    }

    pub(super) fn delete(&self) {
        self.change(|state| {
            // The members stay: they are to be woken, and to see the end.
            let members = mem::take(&mut state.members);
            *state = State { last: state.last, members, deleted: true, ..State::default() };
        });
    }

    pub(super) fn crash(&self) {
        self.change(State::crash);
    }

    pub(super) fn lose_acks(&self, times: usize) {
        self.change(|state| state.acks_to_lose += times);
    }

    pub(super) fn join(&self, prefetch: u16) -> u64 {
        self.change(|state| {
            let member = state.number();
            state.members.insert(member, Member::new(prefetch));
            member
        })
    }

    /// No more deliveries for this subscription; it keeps those in hand.
    pub(super) fn cancel(&self, member: u64) {
        self.change(|state| {
            if let Some(member) = state.members.get_mut(&member) {
                member.standing = Standing::Cancelled;
            }
        });
    }

    /// The subscription is over: what it has in hand comes back.
    pub(super) fn leave(&self, member: u64) {
        self.change(|state| state.leave(member));
    }

    /// The next delivery for this subscription; or its waker is kept.
    pub(super) fn next(&self, member: u64, waker: &Waker) -> Next {
        let next = lock(&self.state).next(member, waker);
        match next {
            Taken::Entry { tag, content, deliveries } => {
                Next::Message(tag, message(&content, &self.name, deliveries))
            }
            Taken::Not(next) => next,
        }
    }

    /// Whether the tag was still out.
    pub(super) fn settle(&self, tag: u64, fate: Fate) -> bool {
        self.change(|state| state.settle(tag, fate))
    }

    /// One step, and then everybody who may care is told.
    fn change<T>(&self, step: impl FnOnce(&mut State) -> T) -> T {
        let (answer, wakers, depth) = {
            let mut state = lock(&self.state);
            let answer = step(&mut state);
            (answer, state.take_wakers(), state.depth())
        };
        // Not under the lock: a waker runs code that is not ours.
        wakers.into_iter().for_each(Waker::wake);
        if depth == 0 {
            self.empty.notify_waiters();
        }
        answer
    }
}

/// The content as one delivery of it, from this queue.
fn message(content: &MessageBuilder, queue: &str, deliveries: u32) -> Message {
    let message = content.again().source(Source::new(SYSTEM, queue));
    message.redelivered(deliveries > 1).broker_deliveries(deliveries).build()
}

/// What a look under the lock found; the message is built without the lock.
enum Taken {
    Entry { tag: u64, content: Arc<MessageBuilder>, deliveries: u32 },
    Not(Next),
}

impl State {
    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn depth(&self) -> usize {
        self.waiting.len() + self.delayed.len() + self.out.len()
    }

    fn entries(&self) -> impl Iterator<Item = &Entry> {
        let out = self.out.values().map(|out| &out.entry);
        self.waiting.values().chain(self.delayed.values()).chain(out)
    }

    fn first_between(&self, shown: u64, end: u64) -> Option<&Entry> {
        let first = self.waiting.range((Bound::Excluded(shown), Bound::Included(end))).next();
        let elsewhere = self.delayed.values().chain(self.out.values().map(|out| &out.entry));
        let entries = first.map(|(_, entry)| entry).into_iter().chain(elsewhere);
        entries.filter(|entry| entry.place > shown && entry.place <= end).min_by_key(|entry| entry.place)
    }

    fn remove(&mut self, place: u64) {
        self.waiting.remove(&place);
        self.delayed.retain(|(_, delayed), _| *delayed != place);
        let out = self.out.iter().find(|(_, out)| out.entry.place == place).map(|(tag, _)| *tag);
        if let Some(tag) = out {
            self.settle(tag, Fate::Rejected);
        }
    }

    fn take_wakers(&mut self) -> Vec<Waker> {
        self.members.values_mut().filter_map(|member| member.waker.take()).collect()
    }

    fn next(&mut self, member: u64, waker: &Waker) -> Taken {
        if self.deleted {
            return Taken::Not(Next::End);
        }
        self.admit_due();
        let Some(asking) = self.members.get_mut(&member) else {
            return Taken::Not(Next::End);
        };
        match asking.standing {
            Standing::Active => {}
            Standing::Cancelled => return Taken::Not(Next::End),
            Standing::Crashed => return Taken::Not(Next::Crashed),
        }
        if asking.in_hand < asking.prefetch
            && let Some((_, entry)) = self.waiting.pop_first()
        {
            asking.in_hand += 1;
            return self.hand_out(entry, member);
        }
        asking.waker = Some(waker.clone());
        Taken::Not(Next::Wait(self.next_due(member)))
    }

    fn hand_out(&mut self, mut entry: Entry, member: u64) -> Taken {
        entry.deliveries = entry.deliveries.saturating_add(1);
        let tag = self.number();
        let taken = Taken::Entry { tag, content: Arc::clone(&entry.content), deliveries: entry.deliveries };
        self.out.insert(tag, Out { entry, member });
        taken
    }

    /// When the next delayed message is due, if this subscription has room for it.
    fn next_due(&self, member: u64) -> Option<Instant> {
        let room = self.members.get(&member).is_some_and(|member| member.in_hand < member.prefetch);
        self.delayed.keys().next().map(|(due, _)| *due).filter(|_| room)
    }

    /// Delayed messages whose time has come take their places again.
    fn admit_due(&mut self) {
        if self.delayed.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some(first) = self.delayed.first_entry().filter(|first| first.key().0 <= now) {
            let entry = first.remove();
            self.waiting.insert(entry.place, entry);
        }
    }

    fn settle(&mut self, tag: u64, fate: Fate) -> bool {
        let Some(Out { entry, member }) = self.out.remove(&tag) else {
            return false;
        };
        if let Some(member) = self.members.get_mut(&member) {
            member.in_hand -= 1;
        }
        match fate {
            Fate::Acked if self.acks_to_lose > 0 => {
                self.acks_to_lose -= 1;
                self.put_back(entry, Duration::ZERO);
            }
            Fate::Acked | Fate::Rejected => {}
            Fate::Again(after) => self.put_back(entry, after),
        }
        true
    }

    fn put_back(&mut self, entry: Entry, after: Duration) {
        if after.is_zero() {
            self.waiting.insert(entry.place, entry);
        } else {
            let now = Instant::now();
            let due = now.checked_add(after.min(FAR)).unwrap_or(now);
            self.delayed.insert((due, entry.place), entry);
        }
    }

    fn leave(&mut self, member: u64) {
        self.members.remove(&member);
        let out = mem::take(&mut self.out).into_iter();
        let (left, kept): (BTreeMap<_, _>, _) = out.partition(|(_, out)| out.member == member);
        self.out = kept;
        self.come_back(left);
    }

    fn crash(&mut self) {
        for member in self.members.values_mut() {
            member.standing = Standing::Crashed;
        }
        let out = mem::take(&mut self.out);
        self.come_back(out);
    }

    fn come_back(&mut self, out: BTreeMap<u64, Out>) {
        let entries = out.into_values().map(|out| (out.entry.place, out.entry));
        self.waiting.extend(entries);
    }
}

impl Member {
    fn new(prefetch: u16) -> Self {
        // With a prefetch of zero nothing would ever be delivered.
        let prefetch = usize::from(prefetch.max(1));
        Self { prefetch, in_hand: 0, standing: Standing::Active, waker: None }
    }
}
