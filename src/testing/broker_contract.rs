//! What every broker promises, as a suite that any implementation of [`Broker`] can be put through.
//!
//! Write a [`BrokerFixture`] for your broker and call [`broker_contract`] in a test: it runs
//! every case in turn and prints each name, which is the promise. To run or debug one promise,
//! call the case of that name. A case panics with what was promised and what happened instead.
//! Each case has a queue of its own, so cases may also run side by side.
//!
//! Every wait ends when its condition holds, and panics after 20 s (and the broker's
//! ack deadline, if it has one); only the absence of a message is waited for: 300 ms. The
//! suite reads tokio's clock, so a broker that does as well can be tested with a paused one.
//!
//! # Example
//!
//! ```
//! use std::sync::Arc;
//!
//! use guestlist::Message;
//! use guestlist::broker::memory::MemoryBroker;
//! use guestlist::broker::{Broker, Declare, QueueSpec};
//! use guestlist::testing::broker_contract::{BrokerFixture, acked_messages_leave_the_queue_empty};
//!
//! struct InMemory(MemoryBroker);
//!
//! #[async_trait::async_trait]
//! impl BrokerFixture for InMemory {
//!     async fn connect(&self) -> Arc<dyn Broker> {
//!         Arc::new(self.0.clone())
//!     }
//!
//!     fn queue(&self, name: &str, prefetch: u16) -> QueueSpec {
//!         let mut queue = QueueSpec::new(name);
//!         queue.declare = Declare::Create;
//!         queue.prefetch = prefetch;
//!         queue.dead_letter = Some(format!("{name}.dead").into());
//!         queue
//!     }
//!
//!     async fn send(&self, queue: &QueueSpec, id: &str, headers: &[(&str, &str)], body: &[u8]) {
//!         let message = Message::builder(body.to_vec()).transport_id(id.to_owned());
//!         let message = headers.iter().fold(message, |message, (name, value)| {
//!             message.header(*name, value.to_string())
//!         });
//!         self.0.send(&queue.name, message).unwrap();
//!     }
//!
//!     async fn depth(&self, queue: &QueueSpec) -> u64 {
//!         self.0.depth(&queue.name).unwrap() as u64
//!     }
//!
//!     async fn read_dead_letters(&self, queue: &QueueSpec) -> Vec<Message> {
//!         let place = queue.dead_letter.as_ref().unwrap();
//!         self.0.messages(place.name()).unwrap()
//!     }
//!
//!     async fn delete_dead_letters(&self, queue: &QueueSpec) {
//!         self.0.delete(queue.dead_letter.as_ref().unwrap().name());
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! acked_messages_leave_the_queue_empty(&InMemory(MemoryBroker::new())).await;
//! # }
//! ```

#![expect(clippy::missing_panics_doc, reason = "a case panics if its promise is broken: the module says so")]

mod copies;
mod delivery;
mod redelivery;
mod stage;
mod topology;
mod walks;

use std::sync::Arc;

use async_trait::async_trait;

pub use self::copies::*;
pub use self::delivery::*;
pub use self::redelivery::*;
pub use self::topology::*;
pub use self::walks::*;
use crate::Message;
use crate::broker::{Broker, Features, QueueSpec};

/// A broker under test, and the eyes and hands of a stranger beside it: what the suite cannot
/// do through [`Broker`] itself. Where it says so, a method may panic if the broker is away.
#[async_trait]
pub trait BrokerFixture: Send + Sync {
    /// A new connection.
    async fn connect(&self) -> Arc<dyn Broker>;

    /// A spec for a queue that nobody has used, with this in its name: `Declare::Create`, this
    /// prefetch, and a dead-letter destination of its own. A short hold step and a short ack
    /// deadline (a few seconds) keep the suite short.
    fn queue(&self, name: &str, prefetch: u16) -> QueueSpec;

    /// Publishes as a stranger would, by the plain client, to a queue that is there; ends when
    /// the broker has the message. Panics otherwise.
    async fn send(&self, queue: &QueueSpec, id: &str, headers: &[(&str, &str)], body: &[u8]);

    /// How many messages the queue keeps. Asked when nobody has one in hand, and asked again
    /// until the answer is as promised: it may lag behind.
    async fn depth(&self, queue: &QueueSpec) -> u64;

    /// The queue's dead letters, as a consumer of them would see them. It may take them out.
    async fn read_dead_letters(&self, queue: &QueueSpec) -> Vec<Message>;

    /// Deletes the queue's dead-letter destination with all that is in it.
    async fn delete_dead_letters(&self, queue: &QueueSpec);

    /// What is to be expected of `broker`, if that depends on what [`queue`](Self::queue) says.
    fn features(&self, broker: &dyn Broker) -> Features {
        broker.features()
    }
}

macro_rules! run {
    ($fixture:ident: $($case:ident)+) => {$(
        println!("broker contract: {}", stringify!($case));
        // Boxed: all the futures of the suite in one would be large.
        Box::pin($case($fixture)).await;
    )+};
}

macro_rules! skip {
    ($why:literal: $($case:ident)+) => {$(
        println!("broker contract: skipped, {}: {}", $why, stringify!($case));
    )+};
}

/// Hands the list of cases that need redelivery to one of the two macros.
macro_rules! cases_of_redelivery {
    ($act:ident $head:tt) => {
        $act! { $head:
            messages_sent_before_the_subscription_arrive
            acked_messages_leave_the_queue_empty
            rejected_messages_leave_the_queue_empty
            no_more_than_the_prefetch_is_out_at_once
            cancelled_and_closed_nothing_is_lost
            unsettled_messages_come_again_after_close
            abandoned_messages_come_again
            a_dropped_acker_abandons_and_is_counted
            a_requeued_message_comes_again_after_its_delay
            a_released_message_comes_again_after_its_delay
            a_message_released_without_delay_comes_again_at_once
            a_requeued_message_is_its_original_again
            a_delayed_message_holds_up_no_other
            progress_extends_the_deadline
            a_copy_without_a_place_is_refused_and_nothing_is_lost
            a_missing_queue_is_refused_by_name
        }
    };
}

/// Hands the list of cases that walk over dead letters to one of the two macros.
macro_rules! cases_of_walks {
    ($act:ident $head:tt) => {
        $act! { $head:
            a_walk_shows_each_letter_once_and_takes_nothing_out
            a_walk_over_no_letters_ends
            a_letter_has_the_same_id_in_each_walk
            a_letter_that_names_no_queue_is_shown_without_one
            a_walk_ends_though_letters_come_back
            a_removal_removes_exactly_one_letter
            a_letter_removed_twice_is_no_error
            a_dropped_walk_leaves_the_rest
            a_missing_place_of_letters_is_refused_by_name
        }
    };
}

/// Runs every case that the broker's [`Features`] allow, in turn, printing each name; the
/// others are printed as skipped.
pub async fn broker_contract(fixture: &dyn BrokerFixture) {
    run! { fixture:
        every_message_arrives_with_its_id_headers_and_body
        headers_with_odd_values_survive
        a_dropped_poll_loses_nothing
        cancel_stops_deliveries_and_spares_those_in_hand
        two_subscriptions_share_the_work
        a_dead_letter_is_confirmed_and_tells_its_story
        the_same_copy_published_twice_is_there
        ids_of_any_bytes_survive_on_copies
        a_copy_gives_no_message_an_id
        a_copy_goes_without_what_was_taken_from_it
        a_missing_dead_letter_destination_is_refused_by_name
        preparing_twice_changes_nothing
        each_queue_has_a_scope_of_its_own
    }
    let broker = fixture.connect().await;
    if fixture.features(&*broker).redelivers {
        cases_of_redelivery!(run fixture);
    } else {
        cases_of_redelivery!(skip "it does not redeliver");
    }
    if fixture.features(&*broker).shows_letters {
        cases_of_walks!(run fixture);
    } else {
        cases_of_walks!(skip "it does not show its letters");
    }
    broker.close().await;
}
