//! A broker in this process: for first steps, and for tests of your own handlers.
//!
//! [`MemoryBroker`] is a handle; its clones share the queues. It is a [`Broker`] like the
//! others, so a consumer cannot tell, and it has what a test wants beside it: producers
//! [`send`](MemoryBroker::send), tests look at a queue's [`messages`](MemoryBroker::messages)
//! and wait until it is [`drained`](MemoryBroker::drained), consumers
//! [`crash`](MemoryBroker::crash), copies and acks [are lost](MemoryBroker::fail_publishes).
//!
//! # What it promises
//!
//! 1. First in, first out. A message that comes again keeps its place, so it comes before
//!    those that were sent after it.
//! 2. Nothing is random, and delays are kept by tokio's clock: with a paused one, a test of
//!    an hour's backoff takes no time and always does the same.
//! 3. Deliveries are counted, and a message that comes again is marked as redelivered.
//! 4. No subscription has more than its prefetch in hand.
//! 5. A delivery whose subscription is closed or crashed has come back to its queue; settling it
//!    later changes nothing and says [`Closed`](crate::broker::BrokerErrorKind::Closed).
//!
//! # What it does not
//!
//! It keeps nothing over a restart of the process. Queues have no limit: a producer that is
//! faster than its consumers fills the memory. Priorities are carried, not acted on. A rejected
//! message is thrown away.
//!
//! # Example
//!
//! ```
//! use guestlist::Message;
//! use guestlist::broker::memory::MemoryBroker;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), guestlist::broker::BrokerError> {
//! let broker = MemoryBroker::new();
//! broker.declare("charges");
//! let charge = Message::builder(r#"{"cents": 100}"#).transport_id("charge-1").header("tenant", "7");
//! broker.send("charges", charge)?;
//!
//! assert_eq!(broker.depth("charges")?, 1);
//! assert_eq!(broker.messages("charges")?[0].headers().get_str("tenant"), Some("7"));
//!
//! let typo = broker.send("chargse", Message::builder("{}")).unwrap_err();
//! assert_eq!(typo.to_string(), "there is no queue \"chargse\": declare it with MemoryBroker::declare or Declare::Create");
//! # Ok(()) }
//! ```

mod faults;
mod letters;
mod publish;
mod queue;
mod settle;
mod source;
mod topology;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use self::faults::Faults;
pub use self::faults::PublishFault;
use self::queue::Queue;
use super::{
    Broker, BrokerError, BrokerErrorKind, Copy, Destination, Features, Letters, QueueSpec, Subscription,
};
use crate::Message;
use crate::message::MessageBuilder;

const SYSTEM: &str = "memory";

/// A broker in this process.
///
/// See the [module docs](self) for what it promises, and an example.
///
/// # Clone
///
/// A clone is another handle to the same queues.
#[derive(Clone, Default)]
pub struct MemoryBroker {
    shared: Arc<Shared>,
}

/// What the handles share.
#[derive(Default)]
struct Shared {
    queues: Mutex<BTreeMap<String, Arc<Queue>>>,
    faults: Faults,
}

impl MemoryBroker {
    /// A broker without queues.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a queue of this name, unless there is one.
    pub fn declare(&self, queue: &str) {
        let mut queues = lock(&self.shared.queues);
        queues.entry(queue.to_owned()).or_insert_with(|| Arc::new(Queue::new(queue)));
    }

    /// Deletes a queue with all that is in it. Its subscriptions end; deliveries in hand can no
    /// longer be settled.
    pub fn delete(&self, queue: &str) {
        let deleted = lock(&self.shared.queues).remove(queue);
        if let Some(queue) = deleted {
            queue.delete();
        }
    }

    /// Sends a message, as a producer does. The id goes into
    /// [`transport_id`](MessageBuilder::transport_id). It takes the builder, since where a
    /// message came from and whether it came before is said at each delivery.
    ///
    /// # Errors
    ///
    /// [`BrokerErrorKind::NotRouted`] if there is no such queue.
    pub fn send(&self, queue: &str, message: MessageBuilder) -> Result<(), BrokerError> {
        self.find(queue, BrokerErrorKind::NotRouted)?.put(message);
        Ok(())
    }

    /// How many messages the queue keeps: waiting, delayed, and delivered but not settled.
    ///
    /// # Errors
    ///
    /// [`BrokerErrorKind::Refused`] if there is no such queue, so that a typo in a test is noticed.
    pub fn depth(&self, queue: &str) -> Result<usize, BrokerError> {
        Ok(self.find(queue, BrokerErrorKind::Refused)?.depth())
    }

    /// The messages that the queue keeps, in order, as a consumer would see them; they stay.
    ///
    /// # Errors
    ///
    /// As for [`depth`](Self::depth).
    pub fn messages(&self, queue: &str) -> Result<Vec<Message>, BrokerError> {
        Ok(self.find(queue, BrokerErrorKind::Refused)?.messages())
    }

    /// Waits until the queue keeps no message: all that was sent is done with. A queue that is
    /// deleted meanwhile keeps none.
    ///
    /// # Errors
    ///
    /// As for [`depth`](Self::depth).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only looks.
    pub async fn drained(&self, queue: &str) -> Result<(), BrokerError> {
        let queue = self.find(queue, BrokerErrorKind::Refused)?;
        queue.drained().await;
        Ok(())
    }

    /// Drops every subscription of the queue, as if their processes had been killed: what they
    /// had in hand comes again, and settling it later changes nothing. A consumer that lives on
    /// sees its subscription fail with [`BrokerErrorKind::Closed`].
    ///
    /// # Errors
    ///
    /// As for [`depth`](Self::depth).
    pub fn crash(&self, queue: &str) -> Result<(), BrokerError> {
        self.find(queue, BrokerErrorKind::Refused)?.crash();
        Ok(())
    }

    /// The next `times` copies that are published end in this fault. Calls add up, in order.
    /// Sending is not affected.
    pub fn fail_publishes(&self, times: usize, fault: PublishFault) {
        self.shared.faults.fail_publishes(times, fault);
    }

    /// The next `times` acks of the queue are lost on the way: the consumer is told that all is
    /// well, and the message comes again at once.
    ///
    /// # Errors
    ///
    /// As for [`depth`](Self::depth).
    pub fn lose_acks(&self, queue: &str, times: usize) -> Result<(), BrokerError> {
        self.find(queue, BrokerErrorKind::Refused)?.lose_acks(times);
        Ok(())
    }

    fn find(&self, queue: &str, if_missing: BrokerErrorKind) -> Result<Arc<Queue>, BrokerError> {
        let found = lock(&self.shared.queues).get(queue).map(Arc::clone);
        found.ok_or_else(|| topology::missing(queue, if_missing))
    }
}

#[async_trait]
impl Broker for MemoryBroker {
    fn system(&self) -> &'static str {
        SYSTEM
    }

    fn features(&self) -> Features {
        Features { counts_deliveries: true, shows_letters: true, ..Features::new() }
    }

    fn default_scope(&self, queue: &QueueSpec) -> String {
        format!("{SYSTEM}:{}", queue.name)
    }

    async fn prepare(&self, queue: &QueueSpec) -> Result<(), BrokerError> {
        topology::prepare(self, queue)
    }

    async fn subscribe(&self, queue: &QueueSpec) -> Result<Box<dyn Subscription>, BrokerError> {
        let found = self.find(&queue.name, BrokerErrorKind::Refused)?;
        Ok(Box::new(source::MemorySubscription::new(found, queue.prefetch)))
    }

    async fn publish(&self, to: &Destination, copy: &Copy<'_>) -> Result<(), BrokerError> {
        publish::publish(self, to, copy)
    }

    async fn letters(&self, at: &Destination) -> Result<Box<dyn Letters>, BrokerError> {
        let found = self.find(at.name(), BrokerErrorKind::Refused)?;
        Ok(Box::new(letters::MemoryLetters::new(found)))
    }

    /// Nothing to do: there is no connection, and other handles may go on.
    async fn close(&self) {}
}

impl fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queues: Vec<String> = lock(&self.shared.queues).keys().cloned().collect();
        f.debug_struct("MemoryBroker").field("queues", &queues).finish_non_exhaustive()
    }
}

/// A panic while the lock was held leaves whole values behind: each change is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
