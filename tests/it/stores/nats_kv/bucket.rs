//! Opening a bucket: made or checked, and refused with a reason.

use guestlist::broker::nats::async_nats::jetstream::stream;
use guestlist::dedup::StoreError;

use guestlist::dedup::protocol::Release;

use super::server::Server;
use super::*;

async fn refusal(opening: impl Future<Output = Result<NatsKvStore, StoreError>>) -> String {
    let error = opening.await.expect_err("the store is refused");
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Makes a good bucket unfit.
type Spoil = fn(&mut stream::Config);

fn url() -> String {
    env("GUESTLIST_NATS_URL")
}

#[tokio::test]
async fn a_bucket_is_made_as_a_key_value_bucket_and_found_again() {
    let bucket = unique("made");
    open(&bucket).await;
    // No window: the bucket's.
    let again = NatsKvStore::connect(&format!("{}/{bucket}", url())).await.unwrap();
    assert_eq!(again.window(), HOUR);
    let js = stranger(&url()).await;
    let status = js.get_key_value(&bucket).await.unwrap().status().await.unwrap();
    assert_eq!((status.history(), status.max_age()), (1, HOUR));
}

#[tokio::test]
async fn what_a_url_says_is_heeded() {
    let bucket = unique("url");
    let store = NatsKvStore::connect(&format!("{}/{bucket}?window=90m", url())).await.unwrap();
    assert_eq!(store.window(), Duration::from_secs(90 * 60));
    assert!(format!("{store:?}").contains(&bucket));
}

#[tokio::test]
async fn another_window_is_refused_and_both_are_named() {
    let bucket = unique("window");
    open(&bucket).await;
    let text = refusal(options(&bucket).window(2 * HOUR).connect(&url())).await;
    assert!(text.contains("3600s") && text.contains("7200s"), "{text}");
}

/// Else every claim of it would be refused, and the queue would pause for ever.
#[tokio::test]
async fn a_queue_that_needs_more_than_the_bucket_keeps_is_refused_at_its_start() {
    use guestlist::broker::memory::MemoryBroker;
    use guestlist::{Backoff, Consumer, Handled, Message, Queue};

    async fn start(change: impl FnOnce(Queue) -> Queue) -> Result<(), guestlist::Error> {
        let broker = MemoryBroker::new();
        broker.declare("orders");
        let queue = Queue::new("orders").reject_failed().store(open(&unique("needs")).await);
        let queue = change(queue).handler(async |_: Message| -> Handled { Ok(()) });
        Consumer::new(broker).queue(queue).run_until(std::future::ready(())).await
    }
    let brief = || Backoff::new(SECOND, 1, Duration::ZERO);
    start(|queue| queue.backoff(brief())).await.unwrap();
    let too_long: [fn(Queue) -> Queue; 2] =
        [|queue| queue.window(2 * HOUR), |queue| queue.backoff(Backoff::new(SECOND, 2, HOUR))];
    for change in too_long {
        let error = start(|queue| change(queue.backoff(Backoff::new(SECOND, 1, Duration::ZERO)))).await;
        let text = format!("{:?}", error.unwrap_err());
        assert!(text.contains("orders") && text.contains("7200s") && text.contains("3600s"), "{text}");
    }
}

/// Else the server would drop its record meanwhile, with the attempts and the suspect mark.
#[tokio::test]
async fn a_deferral_longer_than_the_bucket_keeps_its_record_comes_early() {
    use guestlist::broker::memory::MemoryBroker;
    use guestlist::testing::Recorder;
    use guestlist::{Backoff, Consumer, EventKind, Failure, Handled, Message, Queue};

    let store = options(&unique("defer")).window(HOUR + 10 * SECOND).connect(&url()).await.unwrap();
    let (broker, recorder) = (MemoryBroker::new(), Recorder::new());
    broker.declare("orders");
    broker.send("orders", Message::builder("{}").transport_id("1")).unwrap();
    let queue = Queue::new("orders").reject_failed().store(store).observer(recorder.observer());
    let queue = queue.backoff(Backoff::new(SECOND, 1, Duration::ZERO));
    let queue = queue.handler(async |_: Message| -> Handled { Err(Failure::defer(24 * HOUR)) });
    let deferred = Release::Deferred { not_before: 10 * SECOND };
    let released = || async { recorder.count(|event| *event == EventKind::Released(deferred)) > 0 };
    let consumer = Consumer::new(broker).queue(queue);
    consumer.run_until(until("it is deferred for what the bucket can keep", released)).await.unwrap();
}

/// As a hand-built stack with a longer window than the bucket's asks.
#[tokio::test]
async fn a_claim_that_outlives_the_bucket_is_refused_and_both_lengths_are_named() {
    let store = open(&unique("outlive")).await;
    for ask in [Ask { retain: 2 * HOUR, ..ask(SECOND) }, ask(2 * HOUR)] {
        let text = store.claim(&key(), &ask).await.unwrap_err().to_string();
        assert!(text.contains("3600s") && text.contains("7200s"), "{text}");
    }
}

#[tokio::test]
async fn an_unfit_bucket_is_refused() {
    let js = stranger(&url()).await;
    let kv = |name: &str| stream::Config {
        name: format!("KV_{name}"),
        subjects: vec![format!("$KV.{name}.>")],
        max_messages_per_subject: 1,
        max_age: HOUR,
        discard: stream::DiscardPolicy::New,
        ..stream::Config::default()
    };
    let unfit: [(&str, Spoil); 4] = [
        ("max_age", |config| config.max_age = Duration::ZERO),
        ("discard", |config| {
            config.discard = stream::DiscardPolicy::Old;
            config.max_messages = 10;
        }),
        ("subjects", |config| config.subjects.push(format!("{}.more", config.name))),
        ("no_ack", |config| config.no_ack = true),
    ];
    for (reason, spoil) in unfit {
        let bucket = unique("unfit");
        let mut config = kv(&bucket);
        spoil(&mut config);
        js.create_stream(config).await.unwrap();
        let text = refusal(NatsKvStore::options().bucket(&bucket).connect(&url())).await;
        assert!(text.contains(reason), "{reason}: {text}");
    }
}

#[tokio::test]
async fn a_name_that_is_none_is_refused() {
    let text = refusal(options("a.b").connect(&url())).await;
    assert!(text.contains("a.b"), "{text}");
}

#[tokio::test]
async fn a_server_without_jetstream_is_refused_clearly() {
    // The script turns JetStream on; an account has it only if it says so.
    let server =
        Server::start_with("accounts { A { users: [{user: a, password: secret}] } }\nno_auth_user: a\n")
            .await;
    let text = refusal(options("b").connect(&server.url())).await;
    assert!(text.contains("JetStream is not enabled"), "{text}");
}

#[tokio::test]
async fn a_missing_permission_is_named() {
    let may = |publish: &str| {
        format!(
            "accounts {{ A {{ jetstream: enabled, users: [{{user: a, password: secret, permissions: {{\n\
             publish: [{publish}], subscribe: [\"_INBOX.>\"] }} }}] }} }}\nno_auth_user: a\n"
        )
    };
    let needed = [
        "\"$JS.API.STREAM.INFO.KV_b\"",
        "\"$JS.API.STREAM.CREATE.KV_b\"",
        "\"$JS.API.STREAM.MSG.GET.KV_b\"",
        "\"$KV.b.>\"",
    ];
    let server = Server::start_with(&may(&needed.join(", "))).await;
    let store = options("b").connect(&server.url()).await.expect("these are all that are needed");
    win(&store, &key(), &ask(SECOND)).await;

    for missing in [2, 3] {
        let rest: Vec<_> = (0..4).filter(|i| *i != missing).map(|i| needed[i]).collect();
        let server = Server::start_with(&may(&rest.join(", "))).await;
        let text = refusal(options("b").connect(&server.url())).await;
        assert!(text.contains("may not publish"), "{text}");
        assert!(!text.contains("secret"), "{text}");
    }
}

#[tokio::test]
async fn a_record_of_a_future_format_suppresses_nothing_and_is_an_error() {
    let bucket = unique("future");
    let (store, key) = (open(&bucket).await, key());
    let kv = stranger(&url()).await.get_key_value(&bucket).await.unwrap();
    kv.put(key.to_string(), vec![2; 60].into()).await.unwrap();
    let text = store.claim(&key, &ask(SECOND)).await.unwrap_err().to_string();
    assert!(text.contains("format 2"), "{text}");
    kv.delete(key.to_string()).await.unwrap();
    win(&store, &key, &ask(SECOND)).await;
}
