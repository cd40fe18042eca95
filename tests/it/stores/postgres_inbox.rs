//! The transactional inbox: every account is charged exactly once, whatever fails.

mod proxy;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use guestlist::broker::memory::MemoryBroker;
use guestlist::dedup::protocol::{Ask, Claim, Release, Run, State, Token};
use guestlist::dedup::{DedupStore, PostgresStore, Suspects};
use guestlist::inbox::{Inbox, InboxClaim, InboxTransaction, Isolation, PostgresInbox, PostgresTransaction};
use guestlist::testing::{Checker, FaultyStore, Recorder};
use guestlist::{
    Backoff, BoxError, BoxFuture, Cause, Consumer, ErrorKind, EventKind, Handled, Message, MessageId,
    MissingId, Queue, Scope,
};
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection};
use tokio::sync::{Barrier, Notify};
use tokio::time::{Instant, sleep, timeout};

use self::proxy::{At, Cut, Proxy};
use super::postgres::{HOUR, Place, SECOND};
use crate::support::{Process, Tripwire};

const CHARGES: &str = "charges";
const DEAD: &str = "charges.dead";
const MOMENT: Duration = Duration::from_millis(10);
/// Of a run, or of silence in its transaction: a run that nothing holds up is done before, on a slow machine too.
const LIMIT: Duration = Duration::from_secs(4);

/// Accounts, and a broker that brings charges.
struct Bank {
    place: Place,
    broker: MemoryBroker,
    log: Recorder,
    proxy: Proxy,
    pool: PgPool,
    inbox: PostgresInbox,
    /// Every run of the handler.
    runs: Arc<Mutex<Vec<String>>>,
}

impl Bank {
    async fn open() -> Self {
        let place = Place::migrated().await;
        place.sql("create table {s}.accounts (name text primary key, charged int not null)").await;
        let server = url::Url::parse(&place.url).unwrap();
        let to = format!("{}:{}", server.host_str().unwrap(), server.port().unwrap_or(5432));
        let proxy = Proxy::to(to).await;
        let pool = pool(&place, &proxy).await;
        let inbox = PostgresInbox::new(place.store().await, pool.clone()).await.unwrap();
        let broker = MemoryBroker::new();
        broker.declare(CHARGES);
        broker.declare(DEAD);
        Self { place, broker, log: Recorder::new(), proxy, pool, inbox, runs: Arc::default() }
    }

    async fn account(&self, name: &str) {
        self.place.sql(&format!("insert into {{s}}.accounts values ('{name}', 0)")).await;
    }

    fn send(&self, name: &str) {
        let message = Message::builder(name.to_owned()).transport_id(name.to_owned());
        self.broker.send(CHARGES, message).unwrap();
    }

    /// An account with one charge on its way.
    async fn charge(&self, name: &str) {
        self.account(name).await;
        self.send(name);
    }

    fn queue(&self) -> Queue {
        self.queue_of(self.inbox.clone())
    }

    fn queue_of(&self, inbox: impl Inbox) -> Queue {
        Queue::new(CHARGES)
            .dead_letter(DEAD)
            .lease(3 * SECOND)
            .backoff(Backoff::new(5 * MOMENT, 1, 5 * MOMENT))
            .max_attempts(20)
            .suspects(Suspects::new())
            .observer(self.log.observer())
            .inbox(inbox)
    }

    /// Charges the account; then does what the test says, with the transaction in hand.
    fn handler<W>(
        &self,
        then: W,
    ) -> impl Fn(Message, PostgresTransaction) -> BoxFuture<Handled> + Clone + Send + Sync + 'static
    where
        W: Fn(PostgresTransaction, u32) -> BoxFuture<Handled> + Clone + Send + Sync + 'static,
    {
        let (schema, runs) = (self.place.schema.clone(), Arc::clone(&self.runs));
        move |message: Message, mut tx: PostgresTransaction| {
            let name = message.id().unwrap().as_str().unwrap().to_owned();
            let run = {
                let mut runs = runs.lock().unwrap();
                runs.push(name.clone());
                runs.iter().filter(|other| **other == name).count()
            };
            let (then, run) = (then.clone(), u32::try_from(run).unwrap());
            let write = format!("update {schema}.accounts set charged = charged + 1 where name = '{name}'");
            Box::pin(async move {
                let written = sqlx::raw_sql(AssertSqlSafe(write)).execute(&mut *tx).await?;
                assert_eq!(written.rows_affected(), 1);
                then(tx, run).await
            })
        }
    }

    fn charging(&self) -> Queue {
        self.queue().handler(self.handler(|_, _| Box::pin(async { Ok(()) })))
    }

    fn start(&self, queue: Queue) -> Process {
        // The inbox brings the store along; this one is nobody's.
        let store = FaultyStore::new(guestlist::dedup::MemoryStore::new());
        Process::spawn(store, Consumer::new(self.broker.clone()).queue(queue))
    }

    async fn drained(&self) {
        let drained = timeout(60 * SECOND, self.broker.drained(CHARGES)).await;
        drained.expect("drained within a minute").unwrap();
    }

    fn runs(&self) -> usize {
        self.runs.lock().unwrap().len()
    }

    async fn charged(&self, name: &str) -> i64 {
        let look = format!("select charged::bigint from {{s}}.accounts where name = '{name}'");
        self.place.number(&look).await
    }

    async fn record(&self, name: &str) -> Option<State> {
        let record = self.inbox.store().inspect(&key(name)).await.unwrap();
        record.map(|record| record.state)
    }

    /// Every account once, every message acked, nothing parked, and no promise broken.
    async fn all_charged_once(self) {
        let wrong = self.place.number("select count(*) from {s}.accounts where charged <> 1").await;
        assert_eq!(wrong, 0, "accounts that were not charged exactly once");
        let done = self.place.number("select count(*) from {s}.claims where state = 3").await;
        assert_eq!(done, self.place.number("select count(*) from {s}.accounts").await);
        assert_eq!(self.broker.depth(DEAD).unwrap(), 0);
        let checker = Checker::new().one_clock().inbox().lease(3 * SECOND).max_attempts(None);
        checker.check(&self.log.log()).assert_clean();
        self.close().await;
    }

    async fn close(self) {
        self.pool.close().await;
        self.place.drop().await;
    }
}

async fn pool(place: &Place, proxy: &Proxy) -> PgPool {
    let mut url = url::Url::parse(&place.url).unwrap();
    url.set_host(Some("127.0.0.1")).unwrap();
    url.set_port(Some(proxy.address().port())).unwrap();
    url.query_pairs_mut().append_pair("application_name", &place.schema);
    PgPoolOptions::new().max_connections(16).connect(url.as_str()).await.unwrap()
}

fn key(name: &str) -> guestlist::DedupKey {
    Scope::new("", &format!("memory:{CHARGES}")).key(&MessageId::new(name.to_owned()).unwrap())
}

async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    at_last(what, || {
        let holds = holds();
        async { holds.await.then_some(()) }
    })
    .await;
}

/// What an attempt brings in the end.
async fn at_last<T, F: Future<Output = Option<T>>>(what: &str, mut attempt: impl FnMut() -> F) -> T {
    let give_up_at = Instant::now() + 60 * SECOND;
    loop {
        if let Some(it) = attempt().await {
            return it;
        }
        assert!(Instant::now() < give_up_at, "waited a minute until {what}");
        sleep(MOMENT).await;
    }
}

#[tokio::test]
async fn a_handlers_writes_and_the_memory_of_them_are_one_commit() {
    let bank = Bank::open().await;
    bank.charge("ada").await;
    let (wait, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (waiting, going_on) = (Arc::clone(&wait), Arc::clone(&go_on));
    let process = bank.start(bank.queue().handler(bank.handler(move |_tx, _| {
        let (waiting, going_on) = (Arc::clone(&waiting), Arc::clone(&going_on));
        Box::pin(async move {
            waiting.notify_one();
            going_on.notified().await;
            Ok(())
        })
    })));
    wait.notified().await;
    assert_eq!(bank.charged("ada").await, 0, "nobody sees it before the commit");
    assert!(matches!(bank.record("ada").await, Some(State::Claimed { .. })), "claimed and committed before");
    go_on.notify_one();
    bank.drained().await;
    assert_eq!(bank.record("ada").await, Some(State::Done));
    bank.send("ada");
    bank.drained().await;
    assert_eq!(bank.runs(), 1, "a copy is a duplicate");
    process.stop().await.unwrap();
    bank.all_charged_once().await;
}

/// Fails its first run, in this way, after its writes.
async fn fails_first(bank: Bank, queue: Queue, fail: fn(PostgresTransaction) -> BoxFuture<Handled>) -> Bank {
    bank.charge("ada").await;
    let handler = bank.handler(move |tx, run| match run {
        1 => fail(tx),
        _ => Box::pin(async { Ok(()) }),
    });
    let process = bank.start(queue.handler(handler));
    bank.drained().await;
    process.stop().await.unwrap();
    assert_eq!(bank.runs(), 2);
    bank
}

#[tokio::test]
async fn an_error_after_the_writes_rolls_them_back() {
    let bank = Bank::open().await;
    let queue = bank.queue();
    let bank = fails_first(bank, queue, |_| Box::pin(async { Err("no".into()) })).await;
    bank.all_charged_once().await;
}

#[tokio::test]
async fn a_panic_after_the_writes_rolls_them_back() {
    let bank = Bank::open().await;
    let queue = bank.queue();
    let bank = fails_first(bank, queue, |_| Box::pin(async { panic!("no") })).await;
    bank.all_charged_once().await;
}

#[tokio::test]
async fn a_timeout_after_the_writes_rolls_them_back() {
    let bank = Bank::open().await;
    let queue = bank.queue().timeout(LIMIT);
    let bank = fails_first(bank, queue, |_tx| Box::pin(std::future::pending())).await;
    bank.all_charged_once().await;
}

/// In the middle of a statement, which the server goes on with. The second run, a second after the timeout, waits for
/// its end: both the timeout of the first and that of the second are some seconds away from that.
#[tokio::test]
async fn a_timeout_in_a_statement_rolls_back() {
    let bank = Bank::open().await;
    let queue = bank.queue().timeout(7 * SECOND);
    let bank = fails_first(bank, queue, |mut tx| {
        Box::pin(async move {
            sqlx::raw_sql("select pg_sleep(11.5)").execute(&mut *tx).await?;
            Ok(())
        })
    })
    .await;
    bank.all_charged_once().await;
}

#[tokio::test]
async fn max_run_rolls_back() {
    let bank = Bank::open().await;
    let queue = bank.queue().max_run(LIMIT);
    let bank = fails_first(bank, queue, |_tx| Box::pin(std::future::pending())).await;
    bank.all_charged_once().await;
}

#[tokio::test]
async fn a_statement_that_failed_and_was_ignored_does_not_commit_half() {
    let bank = Bank::open().await;
    let queue = bank.queue();
    let bank = fails_first(bank, queue, |mut tx| {
        Box::pin(async move {
            assert!(sqlx::raw_sql("select 1 / 0").execute(&mut *tx).await.is_err());
            Ok(())
        })
    })
    .await;
    bank.all_charged_once().await;
}

/// Each in-process try has a transaction of its own; it is one attempt.
#[tokio::test]
async fn tries_in_process_do_not_share_a_transaction() {
    let bank = Bank::open().await;
    let queue = bank.queue().tries(2);
    let bank = fails_first(bank, queue, |_| Box::pin(async { Err("no".into()) })).await;
    assert_eq!(bank.log.count(|kind| matches!(kind, EventKind::Claimed(_))), 1);
    bank.all_charged_once().await;
}

#[tokio::test]
async fn a_savepoint_may_be_rolled_back() {
    let bank = Bank::open().await;
    bank.charge("ada").await;
    let twice = format!("update {}.accounts set charged = charged + 10", bank.place.schema);
    let process = bank.start(bank.queue().handler(bank.handler(move |mut tx, _| {
        let twice = twice.clone();
        Box::pin(async move {
            let mut savepoint = tx.begin().await?;
            sqlx::raw_sql(AssertSqlSafe(twice)).execute(&mut *savepoint).await?;
            savepoint.rollback().await?;
            Ok(())
        })
    })));
    bank.drained().await;
    process.stop().await.unwrap();
    bank.all_charged_once().await;
}

/// The line is cut at each statement, in each way. Wherever it is known that a commit took effect, the handler
/// does not run again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_connection_at_any_statement_charges_once() {
    for at in [At::Begin, At::Write, At::Complete, At::Commit] {
        for cut in [Cut::Lost, Cut::Unanswered, Cut::Stranded] {
            let bank = Bank::open().await;
            bank.proxy.cut(at, cut);
            bank.charge("ada").await;
            // A session that is stranded before its commit keeps the account until the server ends it; one
            // that is stranded in its commit is looked for and ended.
            let idle = if at == At::Commit { 600 * SECOND } else { LIMIT };
            let queue = bank.queue_of(bank.inbox.clone().idle_limit(idle));
            let process = bank.start(queue.handler(bank.handler(|_, _| Box::pin(async { Ok(()) }))));
            bank.drained().await;
            process.stop().await.unwrap();
            assert!(bank.proxy.has_cut(), "{at:?} {cut:?}");
            let runs = match (at, cut) {
                (At::Begin, _) | (At::Commit, Cut::Unanswered) => 1,
                _ => 2,
            };
            assert_eq!(bank.runs(), runs, "{at:?} {cut:?}");
            bank.all_charged_once().await;
        }
    }
}

/// The pool is the application's: a transaction left open in one of its connections would take in what somebody else
/// writes there.
#[tokio::test]
async fn a_begin_that_nobody_waits_for_any_more_leaves_no_transaction_in_the_pool() {
    let bank = Bank::open().await;
    bank.proxy.cut(At::Begin, Cut::Held);
    bank.charge("ada").await;
    let queue = bank.queue_of(bank.inbox.clone().idle_limit(600 * SECOND)).max_run(LIMIT);
    let process = bank.start(queue.handler(bank.handler(|_, _| Box::pin(async { Ok(()) }))));
    bank.drained().await;
    process.stop().await.unwrap();
    assert!(bank.proxy.has_cut());
    assert_eq!(bank.log.count(|kind| *kind == EventKind::Failed(Cause::MaxRun)), 1);
    let open = "select count(*) from pg_stat_activity where application_name = '{s}' and state = 'idle in transaction'";
    assert_eq!(bank.place.number(open).await, 1, "begun, and not yet answered");
    bank.proxy.let_go();
    until("it is rolled back", || async { bank.place.number(open).await == 0 }).await;
    bank.all_charged_once().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_killed_all_the_time_charge_once() {
    let bank = Bank::open().await;
    let mut accounts = (0..).map(|number| format!("account-{number}"));
    for account in accounts.by_ref().take(60) {
        bank.charge(&account).await;
    }
    let process = bank.start(bank.queue().tries(3).concurrency(8).max_attempts(1_000).handler(bank.handler(
        |_tx, _| {
            Box::pin(async {
                sleep(MOMENT).await;
                Ok(())
            })
        },
    )));
    let kill = "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = '{s}'";
    let mut killed = 0;
    let give_up_at = Instant::now() + 120 * SECOND;
    // Between two kills a quick machine may charge many, so there are more of them until enough were killed.
    while killed <= 20 {
        assert!(Instant::now() < give_up_at, "{killed} sessions killed within two minutes");
        bank.charge(&accounts.next().unwrap()).await;
        sleep(3 * MOMENT).await;
        killed += bank.place.number(kill).await;
    }
    let broker = bank.broker.clone();
    let drained = broker.drained(CHARGES);
    let mut drained = std::pin::pin!(drained);
    while timeout(3 * MOMENT, drained.as_mut()).await.is_err() {
        assert!(Instant::now() < give_up_at, "drained within two minutes");
        bank.place.number(kill).await;
    }
    process.stop().await.unwrap();
    bank.all_charged_once().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_at_once_in_several_processes_charge_once() {
    let bank = Bank::open().await;
    let processes = [bank.start(bank.charging()), bank.start(bank.charging()), bank.start(bank.charging())];
    for number in 0..40 {
        bank.account(&format!("account-{number}")).await;
        for _ in 0..5 {
            bank.send(&format!("account-{number}"));
        }
    }
    bank.drained().await;
    for process in processes {
        process.stop().await.unwrap();
    }
    assert_eq!(bank.runs(), 40);
    bank.all_charged_once().await;
}

/// An inbox whose process can be killed: from then on its store hears nothing more.
#[derive(Debug)]
struct Killable {
    inbox: PostgresInbox,
    store: FaultyStore,
}

#[async_trait]
impl Inbox for Killable {
    fn store(&self) -> Arc<dyn DedupStore> {
        Arc::new(self.store.clone())
    }

    async fn begin(&self, claim: InboxClaim) -> Result<Box<dyn InboxTransaction>, BoxError> {
        self.inbox.begin(claim).await
    }
}

/// A process that is killed at this point, and another one after it.
async fn killed_at(at: fn(&EventKind) -> bool, runs: usize) {
    let bank = Bank::open().await;
    bank.charge("ada").await;
    let store = FaultyStore::new(PostgresStore::clone(&bank.place.store().await));
    let (reached, crash) = (Arc::new(Notify::new()), store.clone());
    let tell = Arc::clone(&reached);
    let tripwire = Tripwire::observer(&bank.log, at, move || {
        crash.set_down(true);
        tell.notify_one();
    });
    let queue = bank.queue_of(Killable { inbox: bank.inbox.clone(), store: store.clone() });
    let queue = queue.observer(tripwire).handler(bank.handler(|_, _| Box::pin(async { Ok(()) })));
    let process = Process::spawn(store, Consumer::new(bank.broker.clone()).queue(queue));
    reached.notified().await;
    process.kill().await;
    let next = bank.start(bank.charging());
    bank.drained().await;
    next.stop().await.unwrap();
    assert_eq!(bank.runs(), runs);
    assert_eq!(bank.charged("ada").await, 1);
    bank.close().await;
}

/// F4: the one gap of every other store.
#[tokio::test]
async fn f4_a_process_killed_between_the_commit_and_dedups_complete_charges_once() {
    killed_at(|kind| *kind == EventKind::Ran, 1).await;
}

#[tokio::test]
async fn f6_a_process_killed_between_the_commit_and_the_ack_charges_once() {
    killed_at(|kind| *kind == EventKind::Completed, 1).await;
}

/// F3: with its writes in an open transaction.
#[tokio::test]
async fn f3_a_process_killed_in_its_handler_charges_once() {
    let bank = Bank::open().await;
    bank.charge("ada").await;
    let store = FaultyStore::new(PostgresStore::clone(&bank.place.store().await));
    let written = Arc::new(Notify::new());
    let tell = Arc::clone(&written);
    let queue = bank.queue_of(Killable { inbox: bank.inbox.clone(), store: store.clone() });
    let queue = queue.handler(bank.handler(move |_tx, _| {
        tell.notify_one();
        Box::pin(std::future::pending())
    }));
    let process = Process::spawn(store, Consumer::new(bank.broker.clone()).queue(queue));
    written.notified().await;
    process.kill().await;
    let next = bank.start(bank.charging());
    bank.drained().await;
    next.stop().await.unwrap();
    assert_eq!(bank.runs(), 2);
    assert_eq!(bank.charged("ada").await, 1);
    bank.close().await;
}

/// F14: its claim ran out and was taken while it stood still with its writes in an open transaction.
#[tokio::test]
async fn f14_a_zombie_cannot_commit() {
    let bank = Bank::open().await;
    bank.charge("ada").await;
    let (written, wake) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, woken) = (Arc::clone(&written), Arc::clone(&wake));
    let queue = bank.queue().handler(bank.handler(move |_tx, run| {
        let (tell, woken) = (Arc::clone(&tell), Arc::clone(&woken));
        Box::pin(async move {
            if run == 1 {
                tell.notify_one();
                woken.notified().await;
            }
            Ok(())
        })
    }));
    let process = bank.start(queue);
    written.notified().await;
    // Another one takes it in the moment between two renewals.
    let (store, key) = (bank.inbox.store(), key("ada"));
    let ask = Ask { alone: true, ..Ask::new(Token::random(), 60 * SECOND, HOUR) };
    let fence = loop {
        bank.place.sql("update {s}.claims set until = 1").await;
        if let Claim::Acquired { fence, .. } = store.claim(&key, &ask).await.unwrap() {
            break fence;
        }
    };
    wake.notify_one();
    until("the zombie has ended", || async {
        bank.log.count(|kind| *kind == EventKind::Failed(Cause::LeaseLost)) == 1
    })
    .await;
    assert_eq!(bank.charged("ada").await, 0, "the zombie did not commit");
    let run = Run { token: ask.token, fence };
    store.release(&key, run, Release::Failed { not_before: Duration::ZERO }).await.unwrap();
    bank.drained().await;
    process.stop().await.unwrap();
    assert_eq!(bank.runs(), 2);
    assert_eq!(bank.charged("ada").await, 1);
    bank.close().await;
}

/// Long after its lease, and not taken by anybody: it is still the only one.
#[tokio::test]
async fn a_claim_that_ran_out_and_was_not_taken_commits() {
    let bank = Bank::open().await;
    bank.charge("ada").await;
    let schema = bank.place.schema.clone();
    let pool = bank.place.pool.clone();
    let process = bank.start(bank.queue().handler(bank.handler(move |_tx, _| {
        let (expire, pool) = (format!("update {schema}.claims set until = 1"), pool.clone());
        Box::pin(async move {
            sqlx::raw_sql(AssertSqlSafe(expire)).execute(&pool).await?;
            Ok(())
        })
    })));
    bank.drained().await;
    process.stop().await.unwrap();
    assert_eq!(bank.runs(), 1);
    bank.all_charged_once().await;
}

/// A handler longer than its lease and several renewals; a renewal that is some seconds late is in time.
#[tokio::test]
async fn renewals_and_the_transaction_do_not_get_in_each_others_way() {
    let bank = Bank::open().await;
    for number in 0..10 {
        bank.charge(&format!("account-{number}")).await;
    }
    let queue = bank.queue().lease(6 * SECOND).handler(bank.handler(|_tx, _| {
        Box::pin(async {
            sleep(7 * SECOND).await;
            Ok(())
        })
    }));
    let process = bank.start(queue);
    bank.drained().await;
    process.stop().await.unwrap();
    assert_eq!(bank.log.count(|kind| *kind == EventKind::LeaseLost), 0);
    assert_eq!(bank.runs(), 10);
    bank.all_charged_once().await;
}

/// Handlers that read what the others write, all of them before one commits: all but one are a conflict, and run again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_serialization_failure_is_tried_again() {
    let bank = Bank::open().await;
    for number in 0..8 {
        bank.charge(&format!("account-{number}")).await;
    }
    let queue = bank.queue_of(bank.inbox.clone().isolation(Isolation::Serializable)).tries(3);
    // A renewal would be a conflict too: there is none while they wait for each other.
    let queue = queue.lease(60 * SECOND);
    let sum = format!("select sum(charged) from {}.accounts", bank.place.schema);
    let all_have_read = Arc::new(Barrier::new(8));
    let process = bank.start(queue.handler(bank.handler(move |mut tx, run| {
        let (sum, all_have_read) = (sum.clone(), Arc::clone(&all_have_read));
        Box::pin(async move {
            sqlx::raw_sql(AssertSqlSafe(sum)).execute(&mut *tx).await?;
            if run == 1 {
                all_have_read.wait().await;
            }
            Ok(())
        })
    })));
    bank.drained().await;
    process.stop().await.unwrap();
    assert!(bank.runs() > 8, "{} runs: there was a conflict", bank.runs());
    bank.all_charged_once().await;
}

/// A constraint that is checked at the commit: the server says no, and that is an answer.
#[tokio::test]
async fn a_commit_that_is_refused_is_a_failure() {
    let bank = Bank::open().await;
    let other = "create table {s}.receipts (name text references {s}.accounts deferrable initially deferred)";
    bank.place.sql(other).await;
    let schema = bank.place.schema.clone();
    bank.charge("ada").await;
    let process = bank.start(bank.queue().handler(bank.handler(move |mut tx, run| {
        let receipt = format!("insert into {schema}.receipts values ('nobody')");
        Box::pin(async move {
            if run == 1 {
                sqlx::raw_sql(AssertSqlSafe(receipt)).execute(&mut *tx).await?;
            }
            Ok(())
        })
    })));
    bank.drained().await;
    process.stop().await.unwrap();
    assert_eq!(bank.runs(), 2);
    bank.all_charged_once().await;
}

/// What a handler must not do with its transaction ends in a dead letter that says so, not in a silent repetition.
async fn misused(bank: Bank, misuse: fn(PostgresTransaction) -> BoxFuture<Handled>, says: &str) -> Bank {
    bank.charge("ada").await;
    let process = bank.start(bank.queue().handler(bank.handler(move |tx, _| misuse(tx))));
    bank.drained().await;
    process.stop().await.unwrap();
    assert_eq!(bank.runs(), 1);
    let letter = guestlist::broker::copy::DeadLetter::read(&bank.broker.messages(DEAD).unwrap()[0]).unwrap();
    assert_eq!(letter.cause, "permanent");
    assert!(letter.error.contains(says), "{}", letter.error);
    assert_eq!(bank.record("ada").await, Some(State::Parked));
    bank
}

#[tokio::test]
async fn a_commit_by_hand_is_noticed() {
    let bank = Bank::open().await;
    let by_hand = |mut tx: PostgresTransaction| -> BoxFuture<Handled> {
        Box::pin(async move {
            sqlx::raw_sql("COMMIT").execute(&mut *tx).await?;
            Ok(())
        })
    };
    misused(bank, by_hand, "by itself").await.close().await;
}

#[tokio::test]
async fn another_transaction_begun_by_hand_is_noticed() {
    let bank = Bank::open().await;
    let by_hand = |mut tx: PostgresTransaction| -> BoxFuture<Handled> {
        Box::pin(async move {
            sqlx::raw_sql("ROLLBACK; BEGIN").execute(&mut *tx).await?;
            Ok(())
        })
    };
    let bank = misused(bank, by_hand, "by itself").await;
    assert_eq!(bank.charged("ada").await, 0);
    bank.close().await;
}

#[tokio::test]
async fn a_transaction_kept_by_a_task_is_noticed_and_rolled_back() {
    let bank = Bank::open().await;
    let kept = |tx: PostgresTransaction| -> BoxFuture<Handled> {
        Box::pin(async move {
            tokio::spawn(async move {
                sleep(20 * MOMENT).await;
                drop(tx);
            });
            Ok(())
        })
    };
    let bank = misused(bank, kept, "elsewhere").await;
    // The account's row is free again once the task has let go.
    let lock = "select count(*) from (select 1 from {s}.accounts for update) locked";
    timeout(30 * SECOND, bank.place.number(lock)).await.expect("rolled back");
    assert_eq!(bank.charged("ada").await, 0);
    bank.close().await;
}

#[tokio::test]
async fn a_pool_that_leads_elsewhere_is_refused() {
    let bank = Bank::open().await;
    bank.place.sql("create schema {s}_b").await;
    let other = bank.place.builder().schema(format!("{}_b", bank.place.schema));
    other.migrate().await.unwrap();
    // The same names in another place: a search path cannot lead there, but another database can.
    let database = &bank.place.schema;
    bank.place.sql(&format!("create database {database}")).await;
    let mut url = url::Url::parse(&bank.place.url).unwrap();
    url.set_path(database);
    let elsewhere = PostgresStore::builder(url.as_str()).unwrap().schema(&**database);
    elsewhere.migrate().await.unwrap();
    let pool = PgPool::connect(url.as_str()).await.unwrap();
    let error = PostgresInbox::new(bank.place.store().await, pool.clone()).await.unwrap_err();
    assert!(error.to_string().contains("same database"), "{error}");
    pool.close().await;
    bank.place.sql(&format!("drop schema {database}_b cascade")).await;
    bank.place.sql(&format!("drop database {database} with (force)")).await;
    bank.close().await;
}

/// What does not fit together is refused before anything is consumed.
#[tokio::test]
async fn handlers_and_settings_that_do_not_fit_are_refused_at_the_start() {
    let bank = Bank::open().await;
    let charging = bank.handler(|_, _| Box::pin(async { Ok(()) }));
    let plain = || Queue::new(CHARGES).dead_letter(DEAD);
    let inbox = || plain().inbox(bank.inbox.clone());
    let refused = [
        (plain().handler(charging.clone()), "add `.inbox(…)`"),
        (inbox().handler(async |_: Message| Ok(())), "takes no transaction"),
        (inbox().store(bank.inbox.store()).handler(charging.clone()), "brings its own store"),
        (inbox().missing_id(MissingId::Process).handler(charging.clone()), "remove `missing_id"),
    ];
    for (queue, says) in refused {
        let error = Consumer::new(bank.broker.clone()).queue(queue).run_until(async {}).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(says) || format!("{error:?}").contains(says), "{error:?}");
    }
    bank.close().await;
}

/// No connection left: the message waits, and no attempt is spent.
#[tokio::test]
async fn a_pool_without_a_connection_costs_no_attempt() {
    let bank = Bank::open().await;
    bank.charge("ada").await;
    let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(5 * MOMENT);
    let pool = pool.connect_lazy(&bank.place.url).unwrap();
    // So short a time may also be over before there is a connection.
    let store = bank.place.store().await;
    let inbox = at_last("the pool has brought a connection", || async {
        PostgresInbox::new(store.clone(), pool.clone()).await.ok()
    })
    .await;
    let held = at_last("the connection is held", || async { pool.acquire().await.ok() }).await;
    let attempts = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&attempts);
    let queue = bank.queue_of(inbox).max_attempts(1).handler(
        move |guestlist::Attempt(attempt): guestlist::Attempt, mut tx: PostgresTransaction| {
            seen.store(attempt, Ordering::SeqCst);
            async move {
                sqlx::raw_sql("select 1").execute(&mut *tx).await?;
                Ok(())
            }
        },
    );
    let process = bank.start(queue);
    until("it was handed back twice", || async {
        bank.log.count(|kind| *kind == EventKind::Failed(Cause::StoreDown)) >= 2
    })
    .await;
    drop(held);
    bank.drained().await;
    process.stop().await.unwrap();
    assert_eq!(attempts.load(Ordering::SeqCst), 1);
    assert_eq!(bank.broker.depth(DEAD).unwrap(), 0);
    pool.close().await;
    bank.close().await;
}
