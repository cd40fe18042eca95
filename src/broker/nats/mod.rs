//! NATS: a durable pull consumer of a `JetStream` stream, or a core subject.
//!
//! # What it promises
//!
//! 1. A message is acked only by [`Ack`](crate::Disposition::Ack); any other end brings it again, or
//!    (`Reject`) ends it by name (`+TERM`).
//! 2. A delay is kept by the server: to the millisecond, over crashes of this process. One shorter than
//!    [`LONG_DELAY`](crate::defaults::LONG_DELAY) is a `-NAK` and copies nothing. A longer one is a confirmed copy in the
//!    [durable's own stream](#the-stream-of-our-own), and then an ack: so it occupies none of the durable's places.
//!    Where that copy is not confirmed, it is a `-NAK` as well.
//! 3. A copy counts as kept when a stream has confirmed it. A confirmation that says *duplicate*
//!    counts only while the message it is a duplicate of is still there.
//! 4. A copy has the body and headers of its original. What the server would act on (every
//!    `Nats-*` header) and what cannot travel (a value with a line end, spaces at its edges, or
//!    that is not UTF-8) is moved aside, and shown in its place again.
//! 5. No more is asked of the server than can be taken in hand, so no deadline runs for a message
//!    that waits in a buffer.
//! 6. A lost connection, a server that is silent for 10 to 20 s, a deleted durable or stream: each
//!    ends the subscription with an error that says which.
//! 7. `cancel` hands back at once what had arrived and was not delivered, from the durable and from its own stream.
//! 8. A copy that is to be worked on again ([`Broker::again`]) goes to one durable's own stream, and never to the source's
//!    subject, which other durables read.
//! 9. Credentials are in no `Debug`, error or log of ours, and not in the URLs that the client
//!    logs. (The client's own `TRACE` level does print what it sends to log in.)
//!
//! # Reading dead letters
//!
//! A [walk](super::Broker::letters) asks the stream for one message of the subject after the other (`STREAM.MSG.GET`), up
//! to the last one that was there when it began. It makes no consumer and changes nothing; walks and readers do not see
//! one another. A removal deletes the message from the stream. Know that
//!
//! * `deny_delete` on the stream refuses removals, and cannot be taken back.
//! * The leader of a replicated stream that has lost its office and does not know it yet may answer once more, and show a
//!   letter that is gone: if it is redriven, its copy has the same id and generation, and dedup skips it.
//! * Headers that the client cannot read are shown as they are, lines that are none are left out; they hide no other letter.
//!
//! # Limits
//!
//! * An ack is not waited for. A lost one is a redelivery, which dedup skips;
//!   [`NatsOptions::double_ack`] has the server confirm each.
//! * Old deliveries can be settled late: the server takes that for the newer delivery of the same
//!   message. The layers settle only while their lease is held.
//! * Abandoned means that `ack_wait` runs out: 3 heartbeats, unless [`NatsOptions::ack_wait`] says
//!   otherwise. After [`close`](Subscription::close) the same goes for deliveries in hand.
//! * What was on its way while `cancel` ended the subscription also comes again only after `ack_wait`.
//! * Messages that wait for a short delay occupy the durable's `max_ack_pending`. Ours is [`MAX_ACK_PENDING`]; with less, a
//!   wave of failures stops all deliveries until delays are over. [`NatsOptions::long_delay`] says what is short.
//! * A long delay is on the server's schedule from version 2.12 on, and occupies nothing. Before, its copy is handed over at
//!   once, goes back to the server unseen, and occupies one of a million places of its own stream. Before 2.10 the server
//!   does not tell its time: there what is left of the delay at that moment is reckoned by this machine's clock.
//!   A server with schedules that does not tell it is not consumed from. While this machine is suspended, its clocks stand still: a
//!   long delay that is asked for after that may come early once, and is whole the next time.
//! * A prefetch is shared with the durable's own stream. Where that is quiet it costs one place, for moments at a time
//!   while the durable has messages, and with a prefetch of 1 up to half a second after a quiet time.
//! * The order of headers with different names is not kept, and spaces at a value's edges are cut,
//!   by the client.
//! * A message with headers that the client cannot read ends the connection each time it is
//!   delivered. That is noticed and rebuilt; only removing the message helps. See `SECURITY.md`.
//! * With more than one TLS provider compiled in (`aws-lc-rs` beside `ring`), install one as the
//!   process's default, or `rustls` panics: `rustls::crypto::ring::default_provider().install_default()`.
//! * Server 2.9 and newer. No domains, no priority groups.
//!
//! # Streams, durables, names
//!
//! With [`Declare::Create`](super::Declare::Create) a missing stream is made for the subject (files, one replica,
//! work queue retention: what is acked is gone), a missing durable (explicit acks, no delivery
//! limit, filtered by the subject), and a stream for the dead-letter subject if none keeps it
//! (limits retention, without limits). For replicas, limits or several durables on one stream,
//! make them yourself. Whatever is there is compared with what is needed, and refused if it differs.
//!
//! Stream, subject and durable have the queue's name; where a name may not hold dots or other
//! signs, they become `_`: the queue `shop.charges` is the durable `shop_charges`.
//!
//! # The stream of our own
//!
//! Beside the durable `D` of the stream `S` there is the stream `guestlist-S-D-n` (`n` is the length of `S`), whatever
//! `declare` says: like hold queues, it is ours. It keeps the subjects `guestlist.again.S.D`, for copies that are due, and
//! `guestlist.hold.S.D.*`, for those on schedule; it is a work queue in files, without limits, with as many replicas as `S`,
//! with message schedules where the server has them, and with one durable `D`. It is pulled beside the source, by the same
//! consumers, and a message from it shows the id, the headers and the place of its original.
//!
//! If it is there in a shape in which copies would be lost, the queue is refused, with the reasons. If the server does not
//! allow it (permissions, limits of the account, a stream that keeps `guestlist.>` already), that is warned about, and the
//! queue goes without: long delays occupy the durable's places, and nothing can be sent back to it. So it is with
//! [`NatsOptions::without_own_stream`]. What is not permitted is asked for again when the process starts again. Messages
//! that are in the stream of our own then, from earlier, wait there until the queue may have it again; a warning at the
//! start counts them, where `$JS.API.STREAM.INFO.O` is permitted.
//!
//! Who deletes a queue deletes its durable, and then the stream `guestlist-S-D-n`. Wait until that is empty: what is in it
//! is not in `S` any more. A durable that was only renamed leaves its delayed messages there, too.
//!
//! # Permissions
//!
//! What a consumer of the stream `S` by the durable `D` needs, with dead letters for the subject
//! `dead` kept by the stream `X`:
//!
//! | | subject |
//! |---|---|
//! | publish | `$JS.API.STREAM.INFO.S`, `$JS.API.CONSUMER.INFO.S.D`, `$JS.API.CONSUMER.MSG.NEXT.S.D`, `$JS.ACK.S.D.>` |
//! | publish, dead letters | `dead`, `$JS.API.STREAM.NAMES`, `$JS.API.STREAM.INFO.X`, `$JS.API.STREAM.MSG.GET.X` |
//! | publish, to read dead letters, to remove them | `$JS.API.STREAM.NAMES`, `$JS.API.STREAM.INFO.X`, `$JS.API.STREAM.MSG.GET.X`; `$JS.API.STREAM.MSG.DELETE.X` |
//! | publish, to make what is missing | `$JS.API.STREAM.CREATE.S`, `$JS.API.CONSUMER.CREATE.S.D.>`, `$JS.API.STREAM.CREATE.X` |
//! | publish, for the stream of our own, `O` | `$JS.API.STREAM.INFO.O`, `$JS.API.CONSUMER.INFO.O.D`, `$JS.API.CONSUMER.MSG.NEXT.O.D`, `$JS.ACK.O.D.>`, `guestlist.again.S.D`, `guestlist.hold.S.D.*`, `$JS.API.STREAM.MSG.GET.O` |
//! | publish, to make it, and change it when the server or `S` has | `$JS.API.STREAM.CREATE.O`, `$JS.API.STREAM.UPDATE.O`, `$JS.API.CONSUMER.CREATE.O.D.>` |
//! | subscribe | `_INBOX.>`, or the prefix given to [`inbox_prefix`](NatsOptionsBuilder::inbox_prefix) |
//!
//! # Core NATS
//!
//! [`NatsOptions::core`] consumes a subject without a stream, as one member of a queue group of the
//! queue's name. Then NATS delivers each message *at most once*: what arrives while nobody listens
//! is gone, and so is what was in hand when a process dies. There are no acks and no redelivery.
//! Dedup works, and so do dead letters (their subject needs a stream). Nothing else does: a message
//! that fails and is not dead-lettered is lost, and settling it answers with an error that says so. Nothing can be sent
//! back to it: such a copy is refused.
//! [`Features`] describe `JetStream`, since one connection serves both.
//!
//! # Example
//!
//! ```no_run
//! # async fn example() -> Result<(), guestlist::BoxError> {
//! use guestlist::broker::nats::Nats;
//! use guestlist::broker::{Broker, Declare, QueueSpec};
//!
//! let nats = Nats::options().credentials_file("shop.creds").connect("tls://nats.example:4222").await?;
//! let mut queue = QueueSpec::new("charges");
//! queue.declare = Declare::Create;
//! queue.dead_letter = Some("charges-dead".into());
//! nats.prepare(&queue).await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`NatsOptions::core`]: super::NatsOptions::core
//! [`NatsOptions::ack_wait`]: super::NatsOptions::ack_wait
//! [`NatsOptions::double_ack`]: super::NatsOptions::double_ack
//! [`NatsOptions::long_delay`]: super::NatsOptions::long_delay
//! [`NatsOptions::without_own_stream`]: super::NatsOptions::without_own_stream

mod again;
mod both;
mod connect;
mod holds;
mod letters;
mod publish;
mod requests;
mod settle;
mod source;
mod topology;

pub use async_nats;
use async_trait::async_trait;

pub(crate) use self::connect::Link;
pub use self::connect::{CONNECT_TIMEOUT, Nats, NatsOptionsBuilder, PING_INTERVAL};
pub use self::source::split;
pub use self::topology::MAX_ACK_PENDING;
use super::{Broker, BrokerError, Copy, Destination, Facts, Features, Letters, QueueSpec, Subscription};
use crate::defaults;

const SYSTEM: &str = "nats";
const CONTENT_TYPE: &str = "Content-Type";

#[async_trait]
impl Broker for Nats {
    fn system(&self) -> &'static str {
        SYSTEM
    }

    fn features(&self) -> Features {
        Features {
            ack_deadline: Some(defaults::LEASE),
            counts_deliveries: true,
            shows_letters: true,
            ..Features::new()
        }
    }

    fn default_scope(&self, queue: &QueueSpec) -> String {
        let kind = if queue.nats.core { "nats-core" } else { SYSTEM };
        match topology::Names::of(queue) {
            Ok(names) if queue.nats.core => format!("{kind}:{}/{}", names.subject, names.durable),
            Ok(names) => format!("{kind}:{}/{}", names.stream, names.durable),
            // Such a queue is refused by `prepare`.
            Err(_) => format!("{kind}:{}", queue.name),
        }
    }

    async fn prepare(&self, queue: &QueueSpec) -> Result<(), BrokerError> {
        let link = self.link().await?;
        if !queue.nats.core {
            let durable = topology::source(&link, queue).await?;
            again::prepare(self, &link, queue, &durable).await?;
        }
        topology::dead_letters(&link, queue).await
    }

    async fn facts(&self, queue: &QueueSpec) -> Result<Facts, BrokerError> {
        topology::facts(&self.link().await?, queue).await
    }

    async fn subscribe(&self, queue: &QueueSpec) -> Result<Box<dyn Subscription>, BrokerError> {
        let link = self.link().await?;
        if queue.nats.core {
            return Ok(Box::new(
                source::CoreSource::start(&link, queue, &topology::Names::of(queue)?).await?,
            ));
        }
        let durable = topology::source(&link, queue).await?;
        let own = again::prepare(self, &link, queue, &durable).await?;
        if own.is_none() {
            again::warn_of_rest(self, &link, queue, &durable).await;
        }
        Ok(Box::new(both::Both::start(&link, queue, &durable, own, self.confirm()).await?))
    }

    async fn publish(&self, to: &Destination, copy: &Copy<'_>) -> Result<(), BrokerError> {
        let (marked, link) = (publish::Marked::plain(copy, to)?, self.link().await?);
        publish::permitted(&link, self.confirm(), to.name(), copy, marked).await
    }

    fn again(&self, queue: &QueueSpec) -> Destination {
        again::destination(queue)
    }

    fn also_called(&self, queue: &QueueSpec) -> Option<String> {
        topology::Names::of(queue).ok().map(|names| names.durable)
    }

    async fn letters(&self, at: &Destination) -> Result<Box<dyn Letters>, BrokerError> {
        Ok(Box::new(letters::begin(&self.link().await?, self.confirm(), at).await?))
    }

    async fn close(&self) {
        self.disconnect().await;
    }
}
