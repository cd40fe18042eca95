//! Handlers: their arguments, their failures, and what is refused before anything is consumed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use guestlist::broker::memory::MemoryBroker;
use guestlist::dedup::StorePolicy;
use guestlist::{
    Attempt, BoxError, CancellationToken, Cause, Consumer, Error, ErrorKind, EventKind, Failure,
    FailureClass, Fence, FromMessage, Handled, HandlerService, Json, Message, MessageId, MissingId, Needs,
    Pipeline, Queue,
};
use tokio::time::sleep;
use tower::{Service, ServiceExt};

use crate::support::{DEAD, Lab, ORDERS};

fn message(body: &str) -> Message {
    Message::builder(body.to_owned()).transport_id("order-1").build()
}

fn failure_of(handled: Result<(), BoxError>) -> Failure {
    Failure::from_error(handled.unwrap_err())
}

#[derive(serde::Deserialize)]
struct Charge {
    cents: u32,
}

struct Tenant(String);

impl FromMessage for Tenant {
    fn from_message(message: &Message) -> Result<Self, Failure> {
        let tenant = message.headers().get_str("tenant").ok_or_else(|| Failure::permanent("no tenant"))?;
        Ok(Self(tenant.to_owned()))
    }
}

async fn charge(Json(charge): Json<Charge>, id: MessageId, fence: Fence, attempt: Attempt) -> Handled {
    assert_eq!((charge.cents, id.as_str(), attempt), (7, Some("order-1"), Attempt(1)));
    assert!(fence > Fence(0));
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_handler_takes_what_it_asks_for() {
    let lab = Lab::new();
    let order = Message::builder(r#"{"cents":7}"#).transport_id("order-1").header("tenant", "7");
    lab.broker.send(ORDERS, order).unwrap();
    let process = lab.start(lab.queue().handler(charge));
    lab.drained().await;
    assert_eq!(process.orders().handled, 1);
    process.stop().await.unwrap();

    let none = HandlerService::new(async || Ok(()));
    none.oneshot(message("")).await.unwrap();
    let four = HandlerService::new(
        |Json(_): Json<Charge>, m: Message, _: Tenant, cancel: CancellationToken| async move {
            assert!(!cancel.is_cancelled());
            assert_eq!(m.headers().get_str("tenant"), Some("7"));
            Ok(())
        },
    );
    let order = Message::builder(r#"{"cents":7}"#).header("tenant", "7").build();
    four.oneshot(order).await.unwrap();
    let own = HandlerService::new(async |tenant: Tenant| {
        assert_eq!(tenant.0, "7");
        Ok(())
    });
    let failure = failure_of(own.oneshot(message("")).await);
    assert_eq!((failure.class(), failure.chain().as_str()), (FailureClass::Permanent, "no tenant"));
}

#[tokio::test]
async fn a_body_of_another_shape_is_undecodable_and_not_quoted() {
    let service = HandlerService::new(async |_: Json<Charge>| Ok(()));
    for body in ["secret", r#"{"secret":1}"#, r#"{"cents":"secret"}"#, "", r#"{"cents":-1}"#] {
        let failure = failure_of(service.clone().oneshot(message(body)).await);
        assert_eq!(
            (failure.class(), failure.cause()),
            (FailureClass::Permanent, Cause::Undecodable),
            "{body}"
        );
        assert!(!failure.chain().contains("secret"), "{}", failure.chain());
    }
}

#[tokio::test]
async fn arguments_that_need_a_claim_say_so_without_one() {
    let fence = failure_of(HandlerService::new(async |_: Fence| Ok(())).oneshot(message("")).await);
    assert_eq!(fence.chain(), "`Fence` needs a claim, and this message runs without dedup");
    let id = HandlerService::new(async |_: MessageId| Ok(()));
    let id = failure_of(id.oneshot(Message::builder("").build()).await);
    assert_eq!(id.chain(), "`MessageId` needs a claim, and this message runs without dedup");
}

#[test]
fn needs_add_up() {
    assert_eq!(<(Message, Attempt) as guestlist::Arguments>::NEEDS, Needs::NOTHING);
    assert_eq!(<(Message, Fence) as guestlist::Arguments>::NEEDS, Needs::CLAIM);
    let both = Needs::CLAIM.or(Needs::CANCELLATION);
    assert_eq!(<(CancellationToken, Message, MessageId) as guestlist::Arguments>::NEEDS, both);
}

async fn refused(queue: Queue) -> Error {
    let broker = MemoryBroker::new();
    broker.declare(ORDERS);
    broker.declare(DEAD);
    let ended = Consumer::new(broker).queue(queue).run_until(sleep(Duration::from_secs(1))).await;
    ended.expect_err("it consumes")
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_some_messages_would_not_have_is_refused_at_the_start() {
    for (setting, queue) in [
        ("missing_id(MissingId::Process)", Queue::new(ORDERS).missing_id(MissingId::Process)),
        ("on_store_failure(StorePolicy::Process)", Queue::new(ORDERS).on_store_failure(StorePolicy::Process)),
    ] {
        let text = format!(
            "the consumer's settings: the handler of queue `orders` takes a `Fence` or `MessageId`, which \
             messages without a claim do not have; remove `{setting}` or the argument"
        );
        let queue = queue.dead_letter(DEAD);
        let error = refused(queue.handler(async |_: Fence| Ok(()))).await;
        assert_eq!((error.kind(), format!("{error:?}")), (ErrorKind::Config, text));
    }
    let queue = || Queue::new(ORDERS).missing_id(MissingId::Process).dead_letter(DEAD);
    let error = refused(queue().handler(async |_: Message, _: MessageId| Ok(()))).await;
    assert_eq!(error.kind(), ErrorKind::Config);
    let pipeline = Pipeline::new(queue(), Arc::new(MemoryBroker::new())).unwrap();
    assert!(pipeline.handler(async |_: Fence| Ok(())).is_err());
    let pipeline = Pipeline::new(queue(), Arc::new(MemoryBroker::new())).unwrap();
    assert!(pipeline.handler(async |_: Attempt, _: CancellationToken| Ok(())).is_ok());
}

#[tokio::test]
async fn a_panic_is_a_transient_failure_wherever_it_happens() {
    struct Bomb;
    impl FromMessage for Bomb {
        fn from_message(_: &Message) -> Result<Self, Failure> {
            panic!("in an argument")
        }
    }
    let argument = HandlerService::new(async |_: Bomb| Ok(()));
    #[expect(unreachable_code, reason = "the call itself panics, before there is a future")]
    let call = HandlerService::new(|_: Message| {
        panic!("in the call");
        async { Ok(()) }
    });
    let body = HandlerService::new(async |_: Message| {
        tokio::task::yield_now().await;
        panic!("in the {}", "body")
    });
    let odd = HandlerService::new(async |_: Message| std::panic::panic_any(7));
    for (handled, text) in [
        (argument.oneshot(message("")).await, "in an argument"),
        (call.oneshot(message("")).await, "in the call"),
        (body.oneshot(message("")).await, "in the body"),
        (odd.oneshot(message("")).await, "(no text)"),
    ] {
        let failure = failure_of(handled);
        assert_eq!((failure.class(), failure.cause()), (FailureClass::Transient, Cause::Panic));
        assert!(failure.chain().ends_with(text), "{}", failure.chain());
    }
}

mod question_mark {
    use super::*;

    fn io() -> Result<(), std::io::Error> {
        Err(std::io::Error::other("io"))
    }

    async fn all_kinds(kind: &str) -> Handled {
        match kind {
            "io" => io()?,
            "parse" => drop("x".parse::<i32>()?),
            "str" => Err("a text")?,
            "string" => Err("a text".to_owned())?,
            "boxed" => Err(BoxError::from("boxed"))?,
            "anyhow" => Err(anyhow::anyhow!("an anyhow"))?,
            "elapsed" => tokio::time::timeout(Duration::ZERO, std::future::pending()).await?,
            "joined" => tokio::spawn(async { panic!("on purpose") }).await?,
            "permanent" => Err(Failure::permanent("no"))?,
            "deferred" => Err(Failure::defer(Duration::from_secs(7)))?,
            "classified" => drop("x".parse::<i32>().map_err(Failure::permanent)?),
            "classified anyhow" => Err(anyhow::anyhow!("no")).map_err(Failure::permanent)?,
            _ => return Err(kind.into()),
        }
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn works_on_every_error_and_keeps_the_class() {
        let transient = ["io", "parse", "str", "string", "boxed", "anyhow", "elapsed", "joined", "other"];
        for kind in transient {
            let failure = all_kinds(kind).await.unwrap_err();
            assert_eq!(
                (failure.class(), failure.cause()),
                (FailureClass::Transient, Cause::Transient),
                "{kind}"
            );
        }
        for kind in ["permanent", "classified", "classified anyhow"] {
            let failure = all_kinds(kind).await.unwrap_err();
            assert_eq!(
                (failure.class(), failure.cause()),
                (FailureClass::Permanent, Cause::Permanent),
                "{kind}"
            );
        }
        let deferred = all_kinds("deferred").await.unwrap_err();
        assert_eq!(deferred.class(), FailureClass::Deferred(Duration::from_secs(7)));
    }
}

#[test]
fn a_failure_is_the_same_after_it_was_a_boxed_error() {
    let failure = Failure::permanent(std::io::Error::other("disk")).into_error();
    assert_eq!(failure.to_string(), "permanent: disk");
    let failure = Failure::from_error(failure);
    assert_eq!((failure.class(), failure.cause()), (FailureClass::Permanent, Cause::Permanent));
    assert!(failure.error().is::<std::io::Error>());
}

/// Documented on `Failure`: anyhow hides what it wraps.
#[test]
fn a_failure_in_an_anyhow_error_arrives_as_transient() {
    let wrapped = anyhow::Error::from_boxed(Failure::permanent("no").into_error());
    assert_eq!(Failure::from(wrapped).class(), FailureClass::Transient);
}

#[test]
fn the_errors_of_towers_layers_have_their_own_causes() {
    let timeout = Failure::from_error(Box::new(tower::timeout::error::Elapsed::new()));
    assert_eq!((timeout.class(), timeout.cause()), (FailureClass::Transient, Cause::Timeout));
    let shed = Failure::from_error(Box::new(tower::load_shed::error::Overloaded::new()));
    assert_eq!(shed.cause(), Cause::Overloaded);
}

#[test]
fn the_chain_of_causes_is_in_one_line() {
    let error = anyhow::anyhow!("root").context("middle").context("top");
    assert_eq!(Failure::from(error).chain(), "top: middle: root");
    assert_eq!(Failure::transient("alone").chain(), "alone");
}

/// An argument that counts how often it is made.
struct Counted;

static MADE: AtomicU32 = AtomicU32::new(0);

impl FromMessage for Counted {
    fn from_message(_: &Message) -> Result<Self, Failure> {
        MADE.fetch_add(1, Ordering::SeqCst);
        Ok(Self)
    }
}

/// In the task that runs the handler, where a panic is caught and a slow body stops nobody else.
#[tokio::test]
async fn arguments_are_made_at_the_first_poll_and_once() {
    let mut service = HandlerService::new(async |_: Counted| {
        tokio::task::yield_now().await;
        Ok(())
    });
    let call = service.call(message(""));
    assert_eq!(MADE.load(Ordering::SeqCst), 0);
    call.await.unwrap();
    assert_eq!(MADE.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_handler_is_not_called_if_an_argument_cannot_be_made() {
    let called = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&called);
    let service = HandlerService::new(move |_: Tenant, _: Json<Charge>| {
        counted.fetch_add(1, Ordering::SeqCst);
        std::future::ready(Ok(()))
    });
    let failure = failure_of(service.oneshot(message("no JSON")).await);
    assert_eq!(failure.chain(), "no tenant", "the first one that cannot be made");
    assert_eq!(called.load(Ordering::SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_panics_each_time_takes_nobody_with_it() {
    let lab = Lab::new();
    let handler = lab.handler(async |run| {
        assert_ne!(run.id(), "poison", "each time");
        Ok(())
    });
    let process = lab.start_in_process(lab.queue().concurrency(1).handler(handler));
    for id in ["before", "poison", "beside", "after"] {
        lab.send(id);
    }
    lab.drained().await;
    assert_eq!(process.orders().handled, 3);
    process.stop().await.unwrap();
    assert_eq!(lab.journal.attempts("poison"), [1, 2, 3, 4, 5]);
    assert_eq!(lab.count(EventKind::Failed(Cause::Panic)), 5);
    assert_eq!(lab.causes(), ["exhausted"]);
    assert!(lab.letters()[0].error.starts_with("the handler panicked: "), "the story says how");
    lab.check();
}

#[tokio::test(start_paused = true)]
async fn an_anyhow_error_is_tried_again_and_one_that_is_classified_is_not() {
    let no_such_account = || -> anyhow::Result<()> { anyhow::bail!("no such account") };
    for (classified, attempts, cause) in [(false, 5, "exhausted"), (true, 1, "permanent")] {
        let lab = Lab::new();
        lab.send("order-1");
        let handler = lab.handler(move |_| async move {
            let found = no_such_account();
            if classified {
                found.map_err(Failure::permanent)?;
            } else {
                found?;
            }
            Ok(())
        });
        let process = lab.start_in_process(lab.queue().handler(handler));
        lab.drained().await;
        process.stop().await.unwrap();
        assert_eq!(lab.journal.runs("order-1"), attempts);
        assert_eq!(lab.causes(), [cause]);
        assert_eq!(lab.letters()[0].error, "no such account");
    }
}
