//! Dead letters go back to work, over real brokers.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guestlist::admin::{Admin, Filter, Redrive, Summary};
use guestlist::broker::AmqpOptions;
use guestlist::broker::amqp::lapin::BasicProperties;
use guestlist::prelude::*;

use tokio::time::timeout;

use super::{Ledger, MESSAGES, PATIENCE, Running, amqp, body, env, nats, unique, until};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Classic,
    Quorum,
    JetStream,
}

const KINDS: [Kind; 3] = [Kind::Classic, Kind::Quorum, Kind::JetStream];

enum Stranger {
    Rabbit(amqp::Stranger),
    Nats(nats::Stranger),
}

/// A queue with its dead letters, a handler that can be mended, and what is known of its ids.
struct Shop {
    kind: Kind,
    name: String,
    stranger: Stranger,
    store: MemoryStore,
    ledger: Ledger,
    mended: Arc<AtomicBool>,
}

impl Shop {
    async fn new(kind: Kind) -> Self {
        let name = unique("redrive");
        let stranger = match kind {
            Kind::JetStream => Stranger::Nats(nats::Stranger::new().await),
            Kind::Classic | Kind::Quorum => Stranger::Rabbit(amqp::Stranger::new().await),
        };
        if let (Kind::Classic, Stranger::Rabbit(rabbit)) = (kind, &stranger) {
            rabbit.declare(&dead(&name), "classic").await;
        }
        let (store, ledger, mended) = (MemoryStore::new(), Ledger::default(), Arc::default());
        Self { kind, name, stranger, store, ledger, mended }
    }

    fn url(&self) -> String {
        url(self.kind == Kind::JetStream)
    }

    fn queue(&self) -> Queue {
        let queue = place(&self.name).declare().store(self.store.clone());
        if self.kind == Kind::Classic { queue.amqp(AmqpOptions::classic()) } else { queue }
    }

    /// A consumer whose handler fails for good until it is mended.
    async fn open(&self) -> Running {
        let (ledger, mended) = (self.ledger.clone(), Arc::clone(&self.mended));
        let handler = move |message: Message| {
            let body = ledger.started(&message);
            let works = mended.load(Ordering::Relaxed);
            if works {
                ledger.succeeded(&body);
            }
            std::future::ready(if works { Ok(()) } else { Err(Failure::permanent("the bank is closed")) })
        };
        let running = Running::start(&self.url(), self.queue().handler(handler), &self.name).await;
        running.until("it consumes", |queue| queue.state == guestlist::State::Running).await;
        running
    }

    async fn send(&self, id: &str) {
        match &self.stranger {
            Stranger::Rabbit(rabbit) => rabbit.send(&self.name, id).await,
            Stranger::Nats(nats) => nats.send(&self.name, id).await,
        }
    }

    /// How many messages are there.
    async fn depth(&self, place: &str) -> u64 {
        match &self.stranger {
            Stranger::Rabbit(rabbit) => rabbit.ready(place).await.into(),
            Stranger::Nats(nats) => nats.kept(place).await,
        }
    }

    async fn dead_letters_become(&self, count: u64) {
        until(&format!("{:?}: {count} dead letters", self.kind), || async {
            self.depth(&dead(&self.name)).await == count
        })
        .await;
    }

    async fn admin(&self) -> Admin {
        Admin::connect(&self.url(), self.queue()).await.unwrap()
    }

    async fn redrive(&self) -> Summary {
        self.redrive_as(Redrive::new()).await
    }

    async fn redrive_as(&self, how: Redrive) -> Summary {
        let admin = self.admin().await;
        let summary = admin.redrive(Filter::new(), how).await.unwrap().finish().await.unwrap();
        admin.close().await;
        summary
    }

    async fn generations(&self) -> Vec<u32> {
        let admin = self.admin().await;
        let mut letters = admin.letters(Filter::new()).await.unwrap();
        let mut generations = Vec::new();
        while let Some(letter) = letters.next().await {
            let letter = letter.unwrap();
            assert_eq!(letter.record().unwrap().cause, "permanent");
            assert_eq!(letter.message().source().queue, self.name);
            generations.push(letter.generation());
        }
        letters.finish().await.unwrap();
        admin.close().await;
        generations
    }
}

fn url(nats: bool) -> String {
    if nats { nats::url() } else { amqp::url() }
}

fn dead(name: &str) -> String {
    format!("{name}-dead")
}

fn place(name: &str) -> Queue {
    Queue::new(name).dead_letter(dead(name))
}

/// All dead, and the handler mended.
async fn a_thousand_dead_letters(kind: Kind) -> (Shop, Running) {
    let shop = Shop::new(kind).await;
    let running = shop.open().await;
    for n in 0..MESSAGES {
        shop.send(&format!("m-{n}")).await;
    }
    let all = MESSAGES as u64;
    running.until("all are dead letters", |queue| queue.dead_letters.get("permanent") == Some(&all)).await;
    shop.dead_letters_become(all).await;
    shop.mended.store(true, Ordering::Relaxed);
    (shop, running)
}

/// Each handled once, and nothing left.
async fn all_are_handled_once(shop: &Shop, running: Running) -> u64 {
    running.until("all are handled", |queue| queue.handled >= MESSAGES as u64).await;
    shop.dead_letters_become(0).await;
    until("the queue is empty", || async { shop.depth(&shop.name).await == 0 }).await;
    let queue = running.stop().await;
    assert_eq!(queue.handled, MESSAGES as u64, "{:?}: {queue:?}", shop.kind);
    let successes = shop.ledger.successes();
    assert_eq!(successes.len(), MESSAGES);
    assert!(successes.iter().all(|count| *count == 1), "{:?}: an id was handled twice", shop.kind);
    queue.duplicates
}

#[tokio::test]
async fn a_thousand_dead_letters_are_redriven_and_handled_once() {
    for kind in KINDS {
        let (shop, running) = a_thousand_dead_letters(kind).await;
        let begin = std::time::Instant::now();
        let summary = shop.redrive().await;
        println!("{kind:?}: redriven in {:?}", begin.elapsed());
        assert_eq!(summary.redriven, MESSAGES as u64, "{kind:?}: {summary:?}");
        assert_eq!(all_are_handled_once(&shop, running).await, 0, "{kind:?}");
    }
}

const CHILD: &str = "GUESTLIST_TEST_REDRIVE";

fn spawn(shop: &Shop) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "end_to_end::redrive::redrives_as_a_child", "--ignored", "--test-threads=1"])
        .env(CHILD, format!("{} {}", shop.url(), shop.name))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test]
#[ignore = "runs as the child of another test"]
async fn redrives_as_a_child() {
    let job = env(CHILD);
    let (url, name) = job.split_once(' ').unwrap();
    let admin = Admin::connect(url, place(name)).await.unwrap();
    admin.redrive(Filter::new(), Redrive::new()).await.unwrap().finish().await.unwrap();
    admin.close().await;
}

#[tokio::test]
async fn i1_a_redrive_killed_half_way_and_started_again_loses_nothing_and_repeats_nothing() {
    for kind in KINDS {
        let (shop, running) = a_thousand_dead_letters(kind).await;
        let mut child = spawn(&shop);
        running.until("it is half-way", |queue| queue.handled + queue.duplicates >= 300).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let left = MESSAGES as u64 - running.status().handled;
        assert!(left > 100, "{kind:?}: it was killed too late");
        // RabbitMQ gives back what the dead process had in hand.
        until("the letters are back", || async {
            shop.depth(&dead(&shop.name)).await >= MESSAGES as u64 - running.status().handled
        })
        .await;
        let mut again = spawn(&shop);
        let ended = tokio::task::spawn_blocking(move || again.wait().unwrap());
        assert!(timeout(PATIENCE, ended).await.expect("it hangs").unwrap().success(), "{kind:?}");
        let repeated = all_are_handled_once(&shop, running).await;
        assert!(repeated <= 1, "{kind:?}: only the one in flight goes twice, not {repeated}");
    }
}

/// Also within JetStream's duplicate window of two minutes, which swallows what it has seen.
#[tokio::test]
async fn i1_a_letter_that_is_redriven_and_fails_again_and_again_is_a_dead_letter_again() {
    for kind in KINDS {
        let shop = Shop::new(kind).await;
        let running = shop.open().await;
        shop.send("m-0").await;
        for generation in 0..3 {
            shop.dead_letters_become(1).await;
            assert_eq!(shop.generations().await, [generation], "{kind:?}");
            shop.dead_letters_become(1).await;
            assert_eq!(shop.redrive().await.redriven, 1, "{kind:?}");
            let runs = generation as usize + 2;
            until("it ran again", || async { shop.ledger.runs(&body("m-0")) == runs }).await;
            running
                .until("it failed again", |queue| queue.dead_letters.get("permanent") == Some(&(runs as u64)))
                .await;
        }
        shop.dead_letters_become(1).await;
        shop.mended.store(true, Ordering::Relaxed);
        assert_eq!(shop.redrive().await.redriven, 1, "{kind:?}");
        running.until("it is handled", |queue| queue.handled == 1).await;
        shop.dead_letters_become(0).await;
        running.stop().await;
        assert_eq!(shop.ledger.successes(), [1], "{kind:?}");
    }
}

#[tokio::test]
async fn i1_a_strangers_letter_that_is_redriven_and_fails_can_be_redriven_again() {
    for kind in KINDS {
        let shop = Shop::new(kind).await;
        let running = shop.open().await;
        let place = dead(&shop.name);
        match &shop.stranger {
            Stranger::Rabbit(rabbit) => rabbit.send(&place, "m-0").await,
            Stranger::Nats(nats) => nats.send(&place, "m-0").await,
        }
        shop.dead_letters_become(1).await;
        if let Stranger::Rabbit(_) = &shop.stranger {
            assert_eq!(shop.redrive().await.forgotten, 1, "{kind:?}: it does not say how old it is");
        }
        for failures in 1..3 {
            let how = Redrive::new().also_forgotten();
            assert_eq!(shop.redrive_as(how).await.redriven, 1, "{kind:?}: {failures}");
            running.until("it failed", |queue| queue.dead_letters.get("permanent") == Some(&failures)).await;
            shop.dead_letters_become(1).await;
            let generation = u32::try_from(failures).unwrap();
            assert_eq!(shop.generations().await, [generation], "{kind:?}: and names its queue");
            shop.dead_letters_become(1).await;
        }
        shop.mended.store(true, Ordering::Relaxed);
        assert_eq!(shop.redrive().await.redriven, 1, "{kind:?}");
        running.until("it is handled", |queue| queue.handled == 1).await;
        shop.dead_letters_become(0).await;
        running.stop().await;
    }
}

#[tokio::test]
async fn a_redriven_message_of_an_exchange_comes_back_to_its_queue_alone() {
    for kind in [Kind::Classic, Kind::Quorum] {
        let shop = Shop::new(kind).await;
        let Stranger::Rabbit(rabbit) = &shop.stranger else { unreachable!() };
        let running = shop.open().await;
        let other = unique("other");
        rabbit.declare(&other, "quorum").await;
        let exchange = rabbit.fanout(&[&shop.name, &other]).await;
        let properties = BasicProperties::default().with_message_id("one".into());
        rabbit.publish(&exchange, "the-key", &body("one"), properties).await;
        shop.dead_letters_become(1).await;
        shop.mended.store(true, Ordering::Relaxed);
        assert_eq!(shop.redrive().await.redriven, 1);
        running.until("it is handled", |queue| queue.handled == 1).await;
        running.stop().await;
        assert_eq!((shop.depth(&shop.name).await, shop.depth(&other).await), (0, 1), "{kind:?}");
    }
}
