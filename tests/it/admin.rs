//! What an operator does with dead letters, over the in-memory broker and store.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use guestlist::admin::{Admin, Discard, Fate, Filter, Listed, Redrive, Summary, Treated};
use guestlist::broker::memory::{MemoryBroker, PublishFault};
use guestlist::broker::{
    Broker, BrokerError, BrokerErrorKind, Copy, Destination, Features, Letter, Letters, Place, QueueSpec,
    Subscription,
};
use guestlist::dead_letter::Oversized;
use guestlist::dedup::protocol::{Ask, Claim, Run, State, Token};
use guestlist::dedup::{InProcessStore, NearCache, Release};
use guestlist::testing::{Checker, FaultyStore};
use guestlist::{
    CancellationToken, Cause, ConfigError, Error, ErrorKind, Failure, Identity, Message, MessageId, Queue,
};
use tokio::time::{Instant, timeout};

use crate::support::{DEAD, HOUR, LEASE, Lab, LogCapture, MINUTE, ORDERS, Process, SECOND, key};

/// A consumer whose handler fails for good until it is mended.
#[derive(Clone, Default)]
struct Bank(Arc<AtomicBool>);

impl Bank {
    fn mend(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn start(&self, lab: &Lab) -> Process {
        self.start_queue(lab, lab.queue())
    }

    fn start_queue(&self, lab: &Lab, queue: Queue) -> Process {
        let mended = self.0.clone();
        lab.start(queue.handler(lab.handler(move |_| {
            let mended = mended.load(Ordering::SeqCst);
            async move { if mended { Ok(()) } else { Err(Failure::permanent("the bank is closed")) } }
        })))
    }
}

fn order(number: usize) -> String {
    format!("order-{number}")
}

/// A lab whose first orders are with the dead letters.
async fn lab_with_letters(count: usize) -> Lab {
    let lab = Lab::new();
    for number in 0..count {
        lab.send(&order(number));
    }
    let process = Bank::default().start(&lab);
    lab.drained().await;
    process.stop().await.unwrap();
    assert_eq!(lab.letters().len(), count);
    lab
}

async fn admin(lab: &Lab) -> Admin {
    admin_over(lab, Arc::new(lab.broker.clone())).await
}

async fn admin_over(lab: &Lab, broker: Arc<dyn Broker>) -> Admin {
    Admin::over(broker, lab.queue().store(lab.store.clone())).await.unwrap()
}

async fn redrive_all(lab: &Lab) -> Summary {
    redrive(&admin(lab).await, Redrive::new()).await.unwrap()
}

async fn redrive(admin: &Admin, how: Redrive) -> Result<Summary, Error> {
    admin.redrive(Filter::new(), how).await?.finish().await
}

/// What became of the only letter.
async fn fate_of_one(lab: &Lab, how: Redrive) -> Treated {
    let mut walk = admin(lab).await.redrive(Filter::new(), how).await.unwrap();
    let treated = walk.next().await.expect("there is a letter").unwrap();
    assert!(walk.next().await.is_none(), "there is one letter");
    treated
}

async fn list(lab: &Lab, filter: Filter) -> Vec<Listed> {
    let mut walk = admin(lab).await.letters(filter).await.unwrap();
    let mut listed = Vec::new();
    while let Some(letter) = walk.next().await {
        listed.push(letter.unwrap());
    }
    listed
}

fn depth(lab: &Lab, queue: &str) -> usize {
    lab.broker.depth(queue).unwrap()
}

/// Each of these ran once without success, and once after the bank was mended, with one effect.
fn assert_each_handled_once(lab: &Lab, process: &Process, count: usize) {
    let orders = process.orders();
    assert_eq!(orders.handled, count as u64, "{orders:?}");
    for number in 0..count {
        assert_eq!(lab.journal.attempts(&order(number)), [1, 1], "{}: attempts begin at 1", order(number));
    }
}

#[tokio::test(start_paused = true)]
async fn a_thousand_letters_are_each_handled_once_after_the_bank_is_mended() {
    let lab = lab_with_letters(1000).await;
    let bank = Bank::default();
    bank.mend();
    let process = bank.start(&lab);
    let summary = redrive_all(&lab).await;
    assert_eq!((summary.redriven, summary.matched, summary.whole), (1000, 1000, true), "{summary}");
    lab.drained().await;
    assert_eq!(depth(&lab, DEAD), 0);
    assert_each_handled_once(&lab, &process, 1000);
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_redrive_that_is_dropped_between_letters_goes_on_where_it_was() {
    let lab = lab_with_letters(100).await;
    let bank = Bank::default();
    bank.mend();
    let process = bank.start(&lab);
    for dropped_after in [1, 30] {
        let mut walk = admin(&lab).await.redrive(Filter::new(), Redrive::new()).await.unwrap();
        for _ in 0..dropped_after {
            assert_eq!(walk.next().await.unwrap().unwrap().fate, Fate::Redriven);
        }
        assert!(!walk.summary().whole);
    }
    assert_eq!(depth(&lab, DEAD), 69);
    assert_eq!(redrive_all(&lab).await.redriven, 69);
    lab.drained().await;
    assert_eq!(depth(&lab, DEAD), 0);
    assert_each_handled_once(&lab, &process, 100);
    process.stop().await.unwrap();
    lab.check();
}

/// A broker over which every so many-th removal of a letter never ends: whoever waits for it is killed there.
#[derive(Clone, Debug)]
struct StuckRemovals {
    inner: MemoryBroker,
    removals: Arc<AtomicUsize>,
    every: usize,
}

#[async_trait]
impl Broker for StuckRemovals {
    fn system(&self) -> &'static str {
        self.inner.system()
    }

    fn features(&self) -> Features {
        self.inner.features()
    }

    fn default_scope(&self, queue: &QueueSpec) -> String {
        self.inner.default_scope(queue)
    }

    async fn prepare(&self, queue: &QueueSpec) -> Result<(), BrokerError> {
        self.inner.prepare(queue).await
    }

    async fn subscribe(&self, queue: &QueueSpec) -> Result<Box<dyn Subscription>, BrokerError> {
        self.inner.subscribe(queue).await
    }

    async fn publish(&self, to: &Destination, copy: &Copy<'_>) -> Result<(), BrokerError> {
        self.inner.publish(to, copy).await
    }

    async fn letters(&self, at: &Destination) -> Result<Box<dyn Letters>, BrokerError> {
        let letters = self.inner.letters(at).await?;
        Ok(Box::new(StuckLetters { letters, broker: self.clone() }))
    }

    async fn close(&self) {}
}

struct StuckLetters {
    letters: Box<dyn Letters>,
    broker: StuckRemovals,
}

#[async_trait]
impl Letters for StuckLetters {
    async fn next(&mut self) -> Result<Option<Letter>, BrokerError> {
        self.letters.next().await
    }

    async fn remove(&mut self, place: Place) -> Result<(), BrokerError> {
        let removals = self.broker.removals.fetch_add(1, Ordering::SeqCst) + 1;
        if removals.is_multiple_of(self.broker.every) {
            std::future::pending::<()>().await;
        }
        self.letters.remove(place).await
    }

    async fn close(self: Box<Self>) -> Result<(), BrokerError> {
        self.letters.close().await
    }
}

/// Kills a redrive again and again between a copy's confirmation and the letter's removal, until one comes to the end.
async fn redrive_killed_again_and_again(lab: &Lab, between: impl AsyncFn()) -> Vec<Summary> {
    let removals = Arc::default();
    let broker = StuckRemovals { inner: lab.broker.clone(), removals, every: 7 };
    let admin = admin_over(lab, Arc::new(broker)).await;
    let mut summaries = Vec::new();
    loop {
        let mut walk = admin.redrive(Filter::new(), Redrive::new()).await.unwrap();
        let killed = loop {
            match timeout(MINUTE, walk.next()).await {
                Err(_) => break true,
                Ok(None) => break false,
                Ok(Some(treated)) => drop(treated.unwrap()),
            }
        };
        summaries.push(walk.summary());
        drop(walk);
        between().await;
        if !killed {
            return summaries;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn killed_between_copy_and_removal_no_letter_is_lost_or_run_twice() {
    let lab = lab_with_letters(40).await;
    let bank = Bank::default();
    bank.mend();
    let process = bank.start(&lab);
    let summaries = redrive_killed_again_and_again(&lab, async || lab.drained().await).await;
    let finished: u64 = summaries.iter().map(|summary| summary.finished).sum();
    let killed = summaries.len() as u64 - 1;
    assert!(killed >= 5, "{summaries:?}");
    assert_eq!(finished, killed, "each letter in flight is found done, and removed: {summaries:?}");
    assert_eq!(depth(&lab, DEAD), 0);
    assert_each_handled_once(&lab, &process, 40);
    assert_eq!(process.orders().duplicates, 0, "what is found done is not sent again");
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn killed_while_no_consumer_runs_the_letter_in_flight_is_sent_again_and_runs_once() {
    let lab = lab_with_letters(40).await;
    let summaries = redrive_killed_again_and_again(&lab, async || {}).await;
    let redriven: u64 = summaries.iter().map(|summary| summary.redriven).sum();
    assert_eq!((redriven, depth(&lab, DEAD)), (40, 0));
    let killed = summaries.len() - 1;
    assert_eq!(depth(&lab, ORDERS), 40 + killed, "one more copy for each kill");
    let bank = Bank::default();
    bank.mend();
    let process = bank.start(&lab);
    lab.drained().await;
    assert_each_handled_once(&lab, &process, 40);
    assert_eq!(process.orders().duplicates, killed as u64);
    process.stop().await.unwrap();
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_is_not_confirmed_stops_the_walk_and_keeps_its_letter() {
    for fault in
        [PublishFault::LostConfirm, PublishFault::LostCopy, PublishFault::Nacked, PublishFault::NotRouted]
    {
        let lab = lab_with_letters(20).await;
        let bank = Bank::default();
        bank.mend();
        let process = bank.start(&lab);
        for left in [20, 15, 10] {
            let mut walk = admin(&lab).await.redrive(Filter::new(), Redrive::new()).await.unwrap();
            for _ in 0..5 {
                walk.next().await.unwrap().unwrap();
            }
            lab.broker.fail_publishes(1, fault);
            let error = walk.next().await.unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Broker);
            assert!(error.to_string().contains("stays") && error.to_string().contains(ORDERS), "{error}");
            assert!(walk.next().await.is_none(), "a walk that failed is over");
            assert_eq!(depth(&lab, DEAD), left - 5, "{fault:?}");
            lab.drained().await;
        }
        let summary = redrive_all(&lab).await;
        assert!(summary.whole && summary.matched == 5, "{summary}");
        lab.drained().await;
        assert_eq!(depth(&lab, DEAD), 0, "{fault:?}");
        assert_each_handled_once(&lab, &process, 20);
        process.stop().await.unwrap();
        lab.check();
    }
}

#[tokio::test(start_paused = true)]
async fn a_letter_that_fails_again_and_again_begins_at_attempt_1_each_time() {
    let lab = Lab::new();
    lab.send("order-1");
    let process = lab.start(lab.queue().max_attempts(3).handler(
        lab.handler(async |run| if run.message.generation() < 3 { Err("busy".into()) } else { Ok(()) }),
    ));
    for generation in 0..3 {
        lab.drained().await;
        let letters = list(&lab, Filter::new()).await;
        let found: Vec<_> = letters.iter().map(|letter| (letter.generation(), letter.message_id())).collect();
        assert_eq!(found, [(generation, MessageId::new("order-1").as_ref())]);
        assert_eq!(lab.causes(), ["exhausted"]);
        let treated = fate_of_one(&lab, Redrive::new()).await;
        assert_eq!((treated.fate, treated.generation), (Fate::Redriven, Some(generation + 1)));
    }
    lab.drained().await;
    assert_eq!(depth(&lab, DEAD), 0);
    assert_eq!(lab.journal.attempts("order-1"), [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]);
    process.stop().await.unwrap();
    lab.check_as(Checker::new().max_attempts(Some(3)));
}

#[tokio::test(start_paused = true)]
async fn letters_that_come_back_are_not_met_again_by_the_walk() {
    let lab = lab_with_letters(30).await;
    let process = Bank::default().start(&lab);
    let mut walk = admin(&lab).await.redrive(Filter::new(), Redrive::new()).await.unwrap();
    while let Some(treated) = walk.next().await {
        assert_eq!(treated.unwrap().fate, Fate::Redriven);
        lab.drained().await;
    }
    assert_eq!((walk.summary().redriven, depth(&lab, DEAD)), (30, 30));
    process.stop().await.unwrap();
    lab.check();
}

// ---------------------------------------------------------------- each row of the decision

/// Puts a claim of this generation on record, in place of what is there, and says whose it is.
async fn claim_in(lab: &Lab, id: &str, generation: u32) -> Run {
    lab.forget(id).await;
    let token = Token::random();
    let ask = Ask { generation, ..Ask::new(token, LEASE, HOUR) };
    match lab.store.claim_now(&key(ORDERS, id), &ask) {
        Claim::Acquired { fence, .. } => Run { token, fence },
        other => panic!("{other:?}"),
    }
}

async fn done_in(lab: &Lab, id: &str, generation: u32) {
    let run = claim_in(lab, id, generation).await;
    lab.store.complete_now(&key(ORDERS, id), run, HOUR);
}

async fn released_in(lab: &Lab, id: &str, generation: u32) {
    let run = claim_in(lab, id, generation).await;
    lab.store.release_now(&key(ORDERS, id), run, Release::Failed { not_before: MINUTE });
}

/// A letter of order-0 in generation 0, what is on record for it, and its fate.
async fn fate_with(record: impl AsyncFn(&Lab), how: Redrive) -> (Lab, Treated) {
    let lab = lab_with_letters(1).await;
    record(&lab).await;
    let treated = fate_of_one(&lab, how).await;
    let (stays, sent) = (treated.fate.stays(), treated.fate == Fate::Redriven);
    assert_eq!((depth(&lab, DEAD), depth(&lab, ORDERS)), (usize::from(stays), usize::from(sent)));
    (lab, treated)
}

/// Its copy runs, and is done.
async fn runs(lab: &Lab) {
    let bank = Bank::default();
    bank.mend();
    let process = bank.start(lab);
    lab.drained().await;
    assert_eq!((process.orders().handled, depth(lab, DEAD)), (1, 0));
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn without_a_record_the_letter_runs_by_its_own_generation() {
    let (lab, treated) = fate_with(async |lab| lab.forget("order-0").await, Redrive::new()).await;
    assert_eq!(treated.generation, Some(1));
    runs(&lab).await;
}

#[tokio::test(start_paused = true)]
async fn parked_it_runs_by_one_more_than_the_record() {
    let record = async |lab: &Lab| {
        let run = claim_in(lab, "order-0", 4).await;
        lab.store.release_now(&key(ORDERS, "order-0"), run, Release::DeadLettered);
    };
    let (lab, treated) = fate_with(record, Redrive::new()).await;
    assert_eq!(treated.generation, Some(5));
    runs(&lab).await;
}

#[tokio::test(start_paused = true)]
async fn claimed_or_released_in_a_higher_generation_its_copy_is_at_work() {
    let claimed = async |lab: &Lab| {
        claim_in(lab, "order-0", 1).await;
    };
    let released = async |lab: &Lab| released_in(lab, "order-0", 1).await;
    assert_eq!(fate_with(claimed, Redrive::new()).await.1.fate, Fate::AtWork);
    assert_eq!(fate_with(released, Redrive::new().discard_done()).await.1.fate, Fate::AtWork);
}

#[tokio::test(start_paused = true)]
async fn f11_claimed_or_released_in_its_own_generation_it_runs() {
    let claimed = async |lab: &Lab| {
        claim_in(lab, "order-0", 0).await;
    };
    let released = async |lab: &Lab| released_in(lab, "order-0", 0).await;
    for treated in [fate_with(claimed, Redrive::new()).await, fate_with(released, Redrive::new()).await] {
        let (lab, treated) = treated;
        assert_eq!(treated.generation, Some(1));
        // A claim that still lives is waited for by the copy.
        runs(&lab).await;
    }
}

#[tokio::test(start_paused = true)]
async fn done_by_somebody_else_it_stays_and_is_removed_if_asked_to() {
    let done = async |lab: &Lab| done_in(lab, "order-0", 0).await;
    assert_eq!(fate_with(done, Redrive::new()).await.1.fate, Fate::AlreadyDone);
    let (lab, treated) = fate_with(done, Redrive::new().discard_done()).await;
    assert_eq!((treated.fate, depth(&lab, DEAD)), (Fate::DoneDiscarded, 0));
}

#[tokio::test(start_paused = true)]
async fn done_in_a_higher_generation_it_is_what_an_interrupted_redrive_left() {
    let (lab, treated) = fate_with(async |lab| done_in(lab, "order-0", 1).await, Redrive::new()).await;
    assert_eq!((treated.fate, depth(&lab, DEAD)), (Fate::Finished, 0));
}

#[tokio::test(start_paused = true)]
async fn forced_it_runs_though_it_is_done_also_past_a_near_cache() {
    let lab = lab_with_letters(1).await;
    let bank = Bank::default();
    bank.mend();
    let near = NearCache::new(lab.store.clone());
    let queue = || lab.queue().store(near.clone());
    let process = bank.start_queue(&lab, queue());
    for generation in 1..4 {
        // A letter of generation 0 each time, though the record and the cache know of higher ones.
        if generation > 1 {
            let letter =
                Message::builder("order-0").transport_id("order-0").header("guestlist-cause", "permanent");
            lab.broker.send(DEAD, letter).unwrap();
        }
        let treated = fate_of_one(&lab, Redrive::new().force()).await;
        assert_eq!((treated.fate, treated.generation), (Fate::Redriven, Some(generation)));
        lab.drained().await;
        assert_eq!(process.orders().handled, u64::from(generation), "not suppressed by what is cached");
    }
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_id_conflict_is_never_removed_for_what_became_of_the_other_message() {
    let lab = Lab::new();
    let bank = Bank::default();
    bank.mend();
    let process = bank.start_queue(&lab, lab.queue().compare_bodies());
    lab.send_body("order-1", "100 cents");
    lab.drained().await;
    lab.send_body("order-1", "999 cents");
    lab.drained().await;
    assert_eq!(lab.causes(), ["id_conflict"]);
    for how in [Redrive::new(), Redrive::new().discard_done()] {
        let treated = fate_of_one(&lab, how).await;
        assert_eq!((treated.fate, depth(&lab, DEAD)), (Fate::Conflict, 1));
    }
    // Where the record has no body to compare with, the cause says enough.
    for generation in [0, 1] {
        done_in(&lab, "order-1", generation).await;
        let treated = fate_of_one(&lab, Redrive::new().discard_done()).await;
        assert_eq!((treated.fate, depth(&lab, DEAD)), (Fate::AlreadyDone, 1), "{generation}");
    }
    assert_eq!(fate_of_one(&lab, Redrive::new().force()).await.fate, Fate::Redriven);
    lab.drained().await;
    assert_eq!((process.orders().handled, depth(&lab, DEAD)), (2, 0));
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_redriven_id_conflict_makes_no_letter_of_the_first_message_finished() {
    let lab = Lab::new();
    let bank = Bank::default();
    let process = bank.start_queue(&lab, lab.queue().compare_bodies());
    lab.send_body("order-1", "100 cents");
    lab.send_body("order-1", "999 cents");
    lab.drained().await;
    assert_eq!(lab.causes(), ["permanent", "id_conflict"]);
    bank.mend();
    // The other one is forced through, and takes the id.
    let other =
        admin(&lab).await.redrive(Filter::new().cause(Cause::IdConflict), Redrive::new().force()).await;
    assert_eq!(other.unwrap().finish().await.unwrap().redriven, 1);
    lab.drained().await;
    let treated = fate_of_one(&lab, Redrive::new().discard_done()).await;
    assert_eq!((treated.fate, depth(&lab, DEAD)), (Fate::Conflict, 1), "the first message was never handled");
    process.stop().await.unwrap();
}

/// Neither of the two passes for the other, whoever asks by the letter's id.
#[tokio::test(start_paused = true)]
async fn two_messages_of_one_id_are_two_letters() {
    let lab = Lab::new();
    let process = Bank::default().start_queue(&lab, lab.queue().compare_bodies());
    lab.send_body("order-1", "100 cents");
    lab.send_body("order-1", "999 cents");
    lab.drained().await;
    process.stop().await.unwrap();
    let conflict = list(&lab, Filter::new().cause(Cause::IdConflict)).await.remove(0);
    let admin = admin(&lab).await;
    assert_eq!(admin.show(conflict.id()).await.unwrap().body(), "999 cents");
    let one = Filter::new().letter(conflict.id());
    let discarded = admin.discard(one, Discard::new("a mistake")).await.unwrap().finish().await.unwrap();
    assert_eq!((discarded.discarded, lab.causes()), (1, vec!["permanent".to_owned()]));
}

/// A letter of so many seconds ago, as it lies there when the store has forgotten its id.
fn letter_of(lab: &Lab, seconds_ago: u64) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let letter = Message::builder("order-1")
        .header("guestlist-id", "order-1")
        .header("guestlist-attempt", "5")
        .header("guestlist-cause", "exhausted")
        .header("guestlist-failed-at", (now - seconds_ago).to_string());
    lab.broker.send(DEAD, letter).unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_may_have_been_handled_and_forgotten_stays_unless_it_is_asked_for() {
    let lab = Lab::new();
    letter_of(&lab, 2 * 3600);
    for how in [Redrive::new(), Redrive::new().discard_done()] {
        assert_eq!(fate_of_one(&lab, how).await.fate, Fate::Forgotten);
        assert_eq!((depth(&lab, DEAD), depth(&lab, ORDERS)), (1, 0));
    }
    let treated = fate_of_one(&lab, Redrive::new().also_forgotten()).await;
    assert_eq!((treated.fate, treated.generation), (Fate::Redriven, Some(1)));
    assert_eq!((depth(&lab, DEAD), depth(&lab, ORDERS)), (0, 1));
}

/// Had it been handled since, that would be on record.
#[tokio::test(start_paused = true)]
async fn a_letter_that_is_younger_than_the_window_is_redriven_without_a_record() {
    let lab = Lab::new();
    letter_of(&lab, 3500);
    assert_eq!(fate_of_one(&lab, Redrive::new()).await.fate, Fate::Redriven);
}

#[tokio::test(start_paused = true)]
async fn a_letter_without_an_id_needs_no_store() {
    let lab = Lab::new();
    lab.broker.send(ORDERS, Message::builder("no id")).unwrap();
    lab.broker.send(ORDERS, Message::builder("{}").transport_id(vec![b'x'; 5000])).unwrap();
    let process = Bank::default().start(&lab);
    lab.drained().await;
    assert_eq!(lab.causes(), ["missing_id", "invalid_id"]);
    let store = FaultyStore::new(lab.store.clone());
    store.set_down(true);
    let broker = Arc::new(lab.broker.clone());
    let admin = Admin::over(broker, lab.queue().store(store)).await.unwrap();
    assert_eq!(redrive(&admin, Redrive::new()).await.unwrap().redriven, 2);
    lab.drained().await;
    let again = list(&lab, Filter::new()).await;
    assert_eq!(again.iter().map(Listed::generation).collect::<Vec<_>>(), [1, 1]);
    assert!(again.iter().all(|letter| letter.message_id().is_none() && letter.key().is_none()));
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_expired_letter_is_young_again_when_it_is_redriven() {
    let lab = Lab::new();
    let bank = Bank::default();
    bank.mend();
    let process = bank.start_queue(&lab, lab.queue().max_age(HOUR));
    let old = SystemTime::now() - 2 * HOUR;
    lab.broker.send(ORDERS, Message::builder("{}").transport_id("order-1").timestamp(old)).unwrap();
    lab.drained().await;
    assert_eq!(lab.causes(), ["expired"]);
    redrive_all(&lab).await;
    lab.drained().await;
    assert_eq!((process.orders().handled, depth(&lab, DEAD)), (1, 0));
    // A forged one in the future, or of long ago, keeps no message young.
    for (at, id) in [("99999999999", "order-2"), ("1", "order-3"), ("-1", "order-4"), ("soon", "order-5")] {
        let forged =
            Message::builder("{}").transport_id(id).timestamp(old).header("guestlist-redriven-at", at);
        lab.broker.send(ORDERS, forged).unwrap();
    }
    lab.drained().await;
    assert_eq!(lab.causes(), ["expired"; 4]);
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_redriven_message_stays_young_over_its_retries() {
    let lab = Lab::new();
    let old = SystemTime::now() - 2 * HOUR;
    lab.broker.send(ORDERS, Message::builder("{}").transport_id("order-1").timestamp(old)).unwrap();
    let process = lab.start(
        lab.queue()
            .max_age(HOUR)
            .handler(lab.handler(async |run| if run.attempt < 3 { Err("busy".into()) } else { Ok(()) })),
    );
    lab.drained().await;
    redrive_all(&lab).await;
    lab.drained().await;
    assert_eq!((process.orders().handled, depth(&lab, DEAD)), (1, 0));
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_was_waited_out_once_is_not_waited_for_again() {
    let lab = Lab::new();
    let bank = Bank::default();
    let process = bank.start(&lab);
    let late = Message::builder("{}").transport_id("order-0").header("deliver-after", "1s");
    lab.broker.send(ORDERS, late.timestamp(SystemTime::now() - MINUTE)).unwrap();
    lab.drained().await;
    bank.mend();
    let letters = lab.broker.messages(DEAD).unwrap();
    assert_eq!(letters[0].headers().get_str("deliver-after"), Some("1s"), "it is asked for still");
    let begin = Instant::now();
    redrive_all(&lab).await;
    lab.drained().await;
    assert_eq!(process.orders().handled, 1);
    assert!(begin.elapsed() < SECOND, "it waited {:?} again", begin.elapsed());
    process.stop().await.unwrap();
}

// ---------------------------------------------------------------- filters and bounds

async fn ids(lab: &Lab, filter: Filter) -> Vec<String> {
    let listed = list(lab, filter).await;
    let id = |letter: &Listed| letter.message_id().and_then(MessageId::as_str).unwrap_or_default().to_owned();
    listed.iter().map(id).collect()
}

/// As guestlist writes it.
fn send_letter(lab: &Lab, id: &str, headers: &[(&str, String)]) {
    let letter = Message::builder(id.to_owned()).transport_id(id.to_owned());
    let letter = headers.iter().fold(letter, |letter, (name, value)| letter.header(*name, value.clone()));
    lab.broker.send(DEAD, letter).unwrap();
}

fn seconds_ago(ago: Duration) -> String {
    let at = (SystemTime::now() - ago).duration_since(SystemTime::UNIX_EPOCH).unwrap();
    at.as_secs().to_string()
}

#[tokio::test(start_paused = true)]
async fn filters_take_what_fits_everything_that_they_name() {
    let lab = Lab::new();
    let cause = |cause: &str| ("guestlist-cause", cause.to_owned());
    let from = |queue: &str| ("guestlist-orig-queue", queue.to_owned());
    let failed = |ago| ("guestlist-failed-at", seconds_ago(ago));
    send_letter(&lab, "a", &[cause("exhausted"), from(ORDERS), failed(2 * HOUR)]);
    send_letter(&lab, "b", &[cause("permanent"), from(ORDERS), failed(MINUTE)]);
    send_letter(&lab, "c", &[cause("exhausted"), from("refunds"), failed(MINUTE)]);
    send_letter(&lab, "d", &[cause("expired"), from("refunds")]);
    send_letter(&lab, "e", &[]);
    let all = list(&lab, Filter::new()).await;
    let second = all[1].id();
    for (expected, filter) in [
        (&["a", "b", "c", "d", "e"][..], Filter::new()),
        (&["a", "c"], Filter::new().cause(Cause::Exhausted)),
        (&["a", "c", "d"], Filter::new().cause(Cause::Exhausted).cause(Cause::Expired)),
        (&["a", "b"], Filter::new().from_queue(ORDERS)),
        (&["a", "b", "c", "d"], Filter::new().from_queue(ORDERS).from_queue("refunds")),
        (&["c"], Filter::new().from_queue("refunds").cause(Cause::Exhausted)),
        (&["a"], Filter::new().older_than(HOUR)),
        (&["b", "c"], Filter::new().younger_than(HOUR)),
        (&["b"], Filter::new().id(MessageId::new("b").unwrap())),
        (&["b"], Filter::new().letter(second)),
        (&["a", "b", "c", "d"], Filter::new().with_record()),
        (&["e"], Filter::new().without_record()),
        (&[], Filter::new().letter("0123")),
    ] {
        assert_eq!(ids(&lab, filter.clone()).await, expected, "{filter:?}");
    }
    let again = list(&lab, Filter::new()).await;
    let ids = |letters: &[Listed]| letters.iter().map(|letter| letter.id().to_owned()).collect::<Vec<_>>();
    assert_eq!(ids(&again), ids(&all), "a letter's id does not change, and nothing is gone");
}

#[tokio::test(start_paused = true)]
async fn another_queues_letters_are_left_unless_they_are_asked_for() {
    let lab = Lab::new();
    let record =
        |queue: &str| [("guestlist-cause", "exhausted".into()), ("guestlist-orig-queue", queue.into())];
    send_letter(&lab, "ours", &record(ORDERS));
    send_letter(&lab, "theirs", &record("refunds"));
    send_letter(&lab, "a stranger's", &[]);
    let summary = redrive_all(&lab).await;
    assert_eq!((summary.redriven, summary.passed_over), (2, 1), "{summary}");
    let discarded = admin(&lab).await.discard(Filter::new(), Discard::new("tidying up")).await.unwrap();
    assert_eq!(discarded.finish().await.unwrap().discarded, 0);
    assert_eq!(ids(&lab, Filter::new()).await, ["theirs"]);
    let moved = Filter::new().from_queue("refunds");
    let summary = admin(&lab).await.redrive(moved, Redrive::new()).await.unwrap().finish().await.unwrap();
    assert_eq!((summary.redriven, depth(&lab, DEAD)), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn i1_a_strangers_letter_that_is_redriven_and_fails_can_be_redriven_again() {
    let lab = Lab::new();
    send_letter(&lab, "a stranger's", &[]);
    let process = Bank::default().start(&lab);
    for _ in 0..3 {
        let summary = redrive_all(&lab).await;
        assert_eq!((summary.redriven, summary.passed_over), (1, 0), "{summary}");
        lab.drained().await;
        assert_eq!(depth(&lab, DEAD), 1);
    }
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_says_what_would_happen_and_changes_nothing() {
    let lab = lab_with_letters(3).await;
    done_in(&lab, "order-1", 0).await;
    done_in(&lab, "order-2", 1).await;
    let before = lab.record("order-2").await;
    let how = Redrive::new().dry_run().force();
    assert_eq!(redrive(&admin(&lab).await, how).await.unwrap().redriven, 3, "even forced");
    let summary = redrive(&admin(&lab).await, Redrive::new().dry_run().rate(1)).await.unwrap();
    assert_eq!((summary.redriven, summary.already_done, summary.finished), (1, 1, 1), "{summary}");
    let dry = admin(&lab).await.discard(Filter::new(), Discard::new("tidying up").dry_run()).await.unwrap();
    assert_eq!(dry.finish().await.unwrap().discarded, 3);
    assert_eq!((depth(&lab, DEAD), depth(&lab, ORDERS)), (3, 0));
    assert_eq!(lab.record("order-2").await, before);
}

#[tokio::test(start_paused = true)]
async fn a_rate_is_kept_and_a_limit_counts_what_was_redriven() {
    let lab = lab_with_letters(12).await;
    done_in(&lab, "order-0", 0).await;
    let begin = Instant::now();
    let summary = redrive(&admin(&lab).await, Redrive::new().rate(2).limit(5)).await.unwrap();
    assert_eq!((summary.redriven, summary.already_done, summary.whole), (5, 1, false), "{summary}");
    let took = begin.elapsed();
    assert!(took >= 2 * SECOND && took < 3 * SECOND, "five letters at two a second took {took:?}");
    assert_eq!((depth(&lab, DEAD), depth(&lab, ORDERS)), (7, 5));
    let limited = Discard::new("tidying up").limit(2);
    let summary = admin(&lab).await.discard(Filter::new(), limited).await.unwrap().finish().await.unwrap();
    assert_eq!((summary.discarded, depth(&lab, DEAD)), (2, 5));
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_redrive_ends_between_two_letters() {
    let lab = lab_with_letters(5).await;
    let cancelled = CancellationToken::new();
    let how = Redrive::new().rate(1).until(cancelled.clone());
    let mut walk = admin(&lab).await.redrive(Filter::new(), how).await.unwrap();
    walk.next().await.unwrap().unwrap();
    let begin = Instant::now();
    let (next, ()) = tokio::join!(walk.next(), async {
        tokio::time::sleep(SECOND / 10).await;
        cancelled.cancel();
    });
    assert!(next.is_none() && begin.elapsed() < SECOND / 2, "also while it waits for its rate");
    assert_eq!((walk.summary().redriven, walk.summary().whole), (1, false));
    assert_eq!((depth(&lab, DEAD), depth(&lab, ORDERS)), (4, 1));
}

#[tokio::test(start_paused = true)]
async fn a_next_that_is_dropped_goes_on_at_the_next_call() {
    let lab = lab_with_letters(3).await;
    let mut walk = admin(&lab).await.redrive(Filter::new(), Redrive::new().rate(1)).await.unwrap();
    let mut redriven = 0;
    for _ in 0..100 {
        match timeout(SECOND / 10, walk.next()).await {
            Err(_) => {}
            Ok(Some(treated)) => redriven += u32::from(treated.unwrap().fate == Fate::Redriven),
            Ok(None) => break,
        }
    }
    assert_eq!((redriven, walk.summary().whole, depth(&lab, DEAD)), (3, true, 0));
}

#[tokio::test(start_paused = true)]
async fn a_walk_is_a_stream() {
    async fn count<S: futures_core::Stream<Item = Result<T, Error>> + Unpin, T>(mut stream: S) -> usize {
        let mut count = 0;
        while let Some(item) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut stream).poll_next(cx)).await
        {
            item.unwrap();
            count += 1;
        }
        count
    }
    let lab = lab_with_letters(3).await;
    assert_eq!(count(admin(&lab).await.letters(Filter::new()).await.unwrap()).await, 3);
    assert_eq!(count(admin(&lab).await.redrive(Filter::new(), Redrive::new()).await.unwrap()).await, 3);
}

#[tokio::test(start_paused = true)]
async fn letters_go_to_another_place_if_one_is_named() {
    let lab = lab_with_letters(2).await;
    lab.broker.declare("repairs");
    let summary = redrive(&admin(&lab).await, Redrive::new().to("repairs")).await.unwrap();
    assert_eq!((summary.redriven, depth(&lab, "repairs"), depth(&lab, ORDERS)), (2, 2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_letter_that_is_too_large_stays_and_holds_up_no_other() {
    let lab = lab_with_letters(3).await;
    // Also without its history.
    lab.broker.fail_publishes(2, PublishFault::TooLarge);
    let summary = redrive_all(&lab).await;
    assert_eq!((summary.too_large, summary.redriven, depth(&lab, DEAD)), (1, 2, 1), "{summary}");
}

#[tokio::test(start_paused = true)]
async fn a_letter_that_was_cut_stays_unless_it_is_forced() {
    let lab = Lab::new();
    lab.send_body("order-0", "the whole of the body");
    // Too large with the history, with the error's text, and with all of the body.
    lab.broker.fail_publishes(3, PublishFault::TooLarge);
    let bank = Bank::default();
    let process = bank.start_queue(&lab, lab.queue().oversized(Oversized::Truncate));
    lab.drained().await;
    bank.mend();
    assert_eq!(list(&lab, Filter::new()).await[0].record().unwrap().truncated, Some(21));
    assert_eq!(fate_of_one(&lab, Redrive::new().discard_done()).await.fate, Fate::Incomplete);
    assert_eq!((depth(&lab, DEAD), depth(&lab, ORDERS)), (1, 0));
    assert_eq!(fate_of_one(&lab, Redrive::new().force()).await.fate, Fate::Redriven);
    lab.drained().await;
    assert_eq!((process.orders().handled, depth(&lab, DEAD)), (1, 0));
    process.stop().await.unwrap();
}

// ---------------------------------------------------------------- ids, discards, what is shown

#[tokio::test(start_paused = true)]
async fn ids_are_looked_up_and_forgotten_in_the_queues_own_scope() {
    let lab = Lab::new();
    lab.send("order-1");
    let bank = Bank::default();
    bank.mend();
    let process = bank.start_queue(&lab, lab.queue().scope("shop"));
    lab.drained().await;
    let broker = Arc::new(lab.broker.clone());
    let shop = Admin::over(broker, lab.queue().scope("shop")).await.unwrap().store(lab.store.clone());
    let record = shop.inspect("order-1").await.unwrap().expect("it is done");
    assert_eq!(record.state, State::Done);
    let elsewhere = admin(&lab).await;
    assert_eq!(elsewhere.inspect("order-1").await.unwrap(), None, "in another scope");
    assert!(!elsewhere.forget("order-1").await.unwrap());
    assert!(shop.forget("order-1").await.unwrap());
    assert!(!shop.forget("order-1").await.unwrap());
    assert_eq!(shop.inspect("order-1").await.unwrap(), None);
    lab.send("order-1");
    lab.drained().await;
    assert_eq!(process.orders().handled, 2);
    process.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_key_is_found_as_the_queue_finds_it() {
    let lab = Lab::new();
    let queue = || lab.queue().identity(Identity::none().json_pointer("/card"));
    let body = r#"{"card": "4111-1111"}"#;
    lab.broker
        .send(DEAD, Message::builder(body).transport_id("t-1").header("guestlist-cause", "expired"))
        .unwrap();
    lab.broker.send(DEAD, Message::builder("{}").transport_id("t-2")).unwrap();
    let admin = Admin::over(Arc::new(lab.broker.clone()), queue().store(lab.store.clone())).await.unwrap();
    let mut letters = admin.letters(Filter::new()).await.unwrap();
    let (ours, stranger) = (letters.next().await.unwrap().unwrap(), letters.next().await.unwrap().unwrap());
    assert_eq!(ours.message_id().unwrap().as_bytes(), b"4111-1111");
    assert_eq!(ours.key(), Some(admin.key("4111-1111").unwrap()));
    assert!(stranger.record().is_none() && stranger.key().is_none());
}

#[tokio::test(start_paused = true)]
async fn what_is_shown_and_logged_has_no_body_no_header_and_no_id() {
    let lab = Lab::new();
    let secret = Message::builder("body-secret").transport_id("id-secret").header("tenant", "header-secret");
    lab.broker.send(ORDERS, secret).unwrap();
    let stranger = Message::builder("body-secret").transport_id("id-secret").header("x", "header-secret");
    lab.broker.send(DEAD, stranger).unwrap();
    let forged = Message::builder("body-secret")
        .transport_id("id-secret")
        .header("guestlist-cause", "a\r\nforged line");
    lab.broker.send(DEAD, forged).unwrap();
    let process = Bank::default().start(&lab);
    lab.drained().await;
    process.stop().await.unwrap();
    let log = LogCapture::begin();
    let listed = list(&lab, Filter::new()).await;
    let treated = fate_of(&lab).await;
    let dropped = admin(&lab).await.discard(Filter::new(), Discard::new("by\nhand")).await.unwrap();
    assert_eq!(dropped.finish().await.unwrap().discarded, 2);
    assert!(admin(&lab).await.forget("id-secret").await.unwrap());
    let shown = format!("{listed:?} {treated:?} {treated} {}", listed[2]);
    for text in [shown, log.text()] {
        assert!(!text.contains("secret"), "{text}");
        assert!(!text.contains("\r\n"), "{text}");
    }
    let text = log.text();
    let (redriven, discarded) = (treated.letter.id(), listed[2].id());
    assert!(text.contains("a letter was discarded") && text.contains(r#"reason="by\\nhand""#), "{text}");
    assert!(text.contains(redriven) && text.contains(discarded), "{text}");
    let key = admin(&lab).await.key("id-secret").unwrap().to_string();
    assert!(text.contains(&key) && listed[2].to_string().contains(&key), "the hashed id is");
    assert_eq!(listed[2].body(), "body-secret", "but it can be asked for");
}

/// Redrives the first letter.
async fn fate_of(lab: &Lab) -> Treated {
    let mut walk = admin(lab).await.redrive(Filter::new(), Redrive::new().limit(1)).await.unwrap();
    walk.next().await.unwrap().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_discard_removes_what_fits_and_keeps_the_ids_on_record() {
    let lab = lab_with_letters(4).await;
    let one = list(&lab, Filter::new()).await[1].id().to_owned();
    let log = LogCapture::begin();
    let mut walk =
        admin(&lab).await.discard(Filter::new().letter(&one), Discard::new("refunded")).await.unwrap();
    let treated = walk.next().await.unwrap().unwrap();
    assert_eq!((treated.fate, treated.letter.id()), (Fate::Discarded, one.as_str()));
    assert!(walk.next().await.is_none());
    assert_eq!(ids(&lab, Filter::new()).await, ["order-0", "order-2", "order-3"]);
    let text = log.text();
    let told = text.lines().filter(|line| line.contains("a letter was discarded")).collect::<Vec<_>>();
    assert_eq!(told.len(), 1, "{text}");
    for part in
        [one.as_str(), "cause=\"permanent\"", "reason=\"refunded\"", &key(ORDERS, "order-1").to_string()]
    {
        assert!(told[0].contains(part), "{part}: {}", told[0]);
    }
    assert_eq!(lab.record("order-1").await.unwrap().state, State::Parked, "a late copy does not run");
}

// ---------------------------------------------------------------- bad input

fn assert_says(error: &Error, kind: ErrorKind, parts: &[&str]) {
    assert_eq!(error.kind(), kind, "{error:?}");
    let text = format!("{error:?}");
    for part in parts {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[tokio::test(start_paused = true)]
async fn bad_input_is_refused_by_its_name_and_with_the_fix() {
    let lab = lab_with_letters(1).await;
    let broker = || Arc::new(lab.broker.clone());
    let admin = admin(&lab).await;
    let filter = Filter::new;
    let config = ErrorKind::Config;
    let error = admin.show("0123\r\nx").await.unwrap_err();
    assert_says(&error, ErrorKind::NoLetter, &["`0123\\r\\nx`", DEAD]);
    let error = admin.redrive(filter(), Redrive::new().rate(0)).await.unwrap_err();
    assert_says(&error, config, &["rate of 0", ".rate(…)"]);
    let error = admin.redrive(filter(), Redrive::new().to(DEAD)).await.unwrap_err();
    assert_says(&error, config, &[DEAD, "name another place"]);
    for no_reason in ["", " \n"] {
        let error = admin.discard(filter(), Discard::new(no_reason)).await.unwrap_err();
        assert_says(&error, config, &["reason"]);
    }
    for (id, bytes) in [(Vec::new(), "0 bytes"), (vec![b'x'; guestlist::defaults::MAX_ID + 1], "4097 bytes")]
    {
        assert_says(&admin.inspect(id.clone()).await.unwrap_err(), config, &[bytes, "4096"]);
        assert_says(&admin.forget(id).await.unwrap_err(), config, &[bytes]);
    }
    let error = Admin::over(broker(), Queue::new("")).await.unwrap_err();
    assert_says(&error, config, &["name is empty"]);
    for nowhere in
        [Queue::new(ORDERS), Queue::new(ORDERS).dead_letter(""), Queue::new(ORDERS).reject_failed()]
    {
        let nowhere = Admin::over(broker(), nowhere).await.unwrap();
        assert_says(&nowhere.letters(filter()).await.unwrap_err(), config, &[ORDERS, ".dead_letter("]);
        assert_says(&nowhere.show("1").await.unwrap_err(), config, &[ORDERS]);
        assert!(nowhere.redrive(filter(), Redrive::new()).await.is_err());
        assert!(nowhere.discard(filter(), Discard::new("x")).await.is_err());
    }
    let missing = Admin::over(broker(), Queue::new(ORDERS).dead_letter("nowhere")).await.unwrap();
    let error = missing.letters(filter()).await.unwrap_err();
    assert_says(&error, ErrorKind::Broker, &["nowhere"]);
    assert_eq!(error.broker(), Some(BrokerErrorKind::Refused));
    assert_eq!(depth(&lab, DEAD), 1);
}

#[tokio::test(start_paused = true)]
async fn a_store_in_another_processs_memory_is_said_to_be_out_of_reach() {
    let lab = lab_with_letters(1).await;
    for queue in
        [Queue::new(ORDERS).dead_letter(DEAD), Queue::new(ORDERS).dead_letter(DEAD).store_url("memory:")]
    {
        let admin = Admin::over(Arc::new(lab.broker.clone()), queue).await.unwrap();
        let said = [ORDERS, "memory of its consumer's process", ".store(…)"];
        assert_says(&admin.inspect("order-0").await.unwrap_err(), ErrorKind::Config, &said);
        assert_says(&admin.forget("order-0").await.unwrap_err(), ErrorKind::Config, &said);
        let forced = admin.redrive(Filter::new(), Redrive::new().force()).await;
        assert_says(&forced.unwrap_err(), ErrorKind::Config, &said);
        let given = admin.store(lab.store.clone());
        assert_eq!(given.inspect("order-0").await.unwrap().unwrap().state, State::Parked);
    }
    // Letters go back all the same, and the consumer decides.
    let blind =
        Admin::over(Arc::new(lab.broker.clone()), Queue::new(ORDERS).dead_letter(DEAD)).await.unwrap();
    assert_eq!(redrive(&blind, Redrive::new()).await.unwrap().redriven, 1);
    runs(&lab).await;
}

#[tokio::test(start_paused = true)]
async fn the_queues_own_store_is_not_replaced_by_the_consumers_default() {
    let lab = lab_with_letters(1).await;
    let other = guestlist::dedup::MemoryStore::new();
    let own = admin(&lab).await.store(other);
    assert!(own.inspect("order-0").await.unwrap().is_some());
    let said = ConfigError::StoreInMemory { queue: ORDERS.into() }.to_string();
    assert!(said.contains(ORDERS));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_answer_stops_the_walk_and_loses_nothing() {
    let lab = lab_with_letters(3).await;
    let store = FaultyStore::new(lab.store.clone());
    let admin = Admin::over(Arc::new(lab.broker.clone()), lab.queue().store(store.clone())).await.unwrap();
    let mut walk = admin.redrive(Filter::new(), Redrive::new()).await.unwrap();
    walk.next().await.unwrap().unwrap();
    store.set_down(true);
    let error = walk.next().await.unwrap().unwrap_err();
    assert_says(&error, ErrorKind::Store, &["was not redriven", "store"]);
    assert_eq!((depth(&lab, DEAD), depth(&lab, ORDERS)), (2, 1));
    store.set_down(false);
    assert_eq!(redrive(&admin, Redrive::new()).await.unwrap().redriven, 2);
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_is_missing_is_named_and_nothing_is_lost() {
    let lab = lab_with_letters(3).await;
    let error = redrive(&admin(&lab).await, Redrive::new().to("repars")).await.unwrap_err();
    assert_says(&error, ErrorKind::Broker, &["`repars`", "stays"]);
    assert_eq!(error.broker(), Some(BrokerErrorKind::NotRouted));
    assert_eq!(depth(&lab, DEAD), 3);
}
