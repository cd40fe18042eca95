//! The stream of our own beside a durable: long delays, what is sent back to work, and the room that both share.

use std::collections::BTreeSet;
use std::task::Poll;

use futures_util::future::join;
use guestlist::broker::nats::async_nats::ConnectOptions;

use super::*;
use crate::support::LogCapture;

/// Long enough to be told from none, short enough for a test; and no sum of the times that requests wait at the server.
const DELAY: Duration = Duration::from_millis(2700);
/// No delay of these tests may be later than this: less than a second delay, more than a busy machine takes.
const LATE: Duration = Duration::from_millis(2500);

/// Less than the client waits for an answer that does not come.
const LESS_THAN_CONFIRM: Duration = Duration::from_millis(4500);

/// A queue in whose view [`DELAY`] is long.
fn patient(name: &str) -> QueueSpec {
    let mut spec = queue(name);
    spec.nats = spec.nats.long_delay(Duration::from_secs(1));
    spec
}

/// The same queue, as who does not know that it goes without sees it.
fn with_own(spec: &QueueSpec) -> QueueSpec {
    let mut spec = spec.clone();
    spec.nats.without_own_stream = false;
    spec
}

async fn subscribed(spec: &QueueSpec) -> (Nats, Box<dyn Subscription>, jetstream::Context) {
    let nats = nats().await;
    nats.prepare(spec).await.expect("prepared");
    let inbox = nats.subscribe(spec).await.expect("subscribed");
    (nats, inbox, stranger().await)
}

/// The stream of our own of a queue whose stream and durable have its name.
fn own(spec: &QueueSpec) -> String {
    format!("guestlist-{0}-{0}-{1}", spec.name, spec.name.len())
}

fn schedules() -> bool {
    env("GUESTLIST_BROKERS") == "current"
}

/// How many messages the durable has handed out, or keeps for later.
async fn pending(js: &jetstream::Context, stream: &str, durable: &str) -> usize {
    let stream = js.get_stream_no_info(stream).await.expect("a handle");
    stream.consumer_info(durable).await.expect("the durable is there").num_ack_pending
}

fn requeue() -> Disposition {
    Disposition::Requeue { after: DELAY }
}

fn in_time(begin: Instant) {
    let took = begin.elapsed();
    println!("asked for {DELAY:?}, took {took:?}");
    assert!(took >= DELAY, "{took:?} is early");
    assert!(took < DELAY + LATE, "{took:?} is late");
}

fn redriven<'a>(letter: &'a Message, id: &str) -> Copy<'a> {
    Copy::redrive(letter, id, letter.generation() + 1)
}

/// A message of this body, as if it had been parked and read from the dead letters.
fn letter(spec: &QueueSpec, id: &str) -> Message {
    Message::builder(id.to_owned())
        .header(copy::ID, id.to_owned())
        .header(copy::ATTEMPT, "5")
        .header(copy::CAUSE, "exhausted")
        .header(copy::QUEUE, spec.name.clone())
        .header(copy::STREAM, spec.name.clone())
        .header(copy::SEQUENCE, "17")
        .build()
}

async fn redrive(nats: &Nats, spec: &QueueSpec, id: &str) -> Result<(), BrokerError> {
    nats.publish(&nats.again(spec), &redriven(&letter(spec, id), id)).await
}

/// The client does not keep the order of headers.
fn headers(message: &Message) -> BTreeSet<(&str, &[u8])> {
    message.headers().iter().map(|(name, value)| (name, value.as_ref())).collect()
}

fn body(delivery: &Delivery) -> String {
    String::from_utf8(delivery.message().payload().to_vec()).expect("text")
}

// ---------------------------------------------------------------- long delays

#[tokio::test]
async fn a_long_delay_frees_the_sources_place_and_comes_on_time() {
    let spec = patient("long");
    let (_nats, mut inbox, js) = subscribed(&spec).await;
    send_with(&js, &spec.name, &[("Nats-Msg-Id", "id-1"), ("h", "v"), ("Nats-TTL-ish", "x")], b"body").await;
    let first = next(&mut inbox).await;
    let original = first.message().clone();
    let begin = Instant::now();
    settle(first, requeue()).await;
    until("the source is free of it", || async {
        stored(&js, &spec.name).await == 0 && pending(&js, &spec.name, &spec.name).await == 0
    })
    .await;
    assert_eq!(stored(&js, &own(&spec)).await, 1);
    stays_quiet(&mut inbox).await;
    let waiting = usize::from(!schedules());
    assert_eq!(pending(&js, &own(&spec), &spec.name).await, waiting, "on schedule it takes no place at all");
    let again = next(&mut inbox).await;
    in_time(begin);
    let message = again.message().clone();
    assert_eq!(message.source(), original.source());
    assert_eq!((message.payload(), message.id()), (original.payload(), original.id()));
    assert_eq!(headers(&message), headers(&original));
    assert_eq!((message.attempt(), message.broker_deliveries(), message.redelivered()), (2, Some(1), false));
    let millis = |message: &Message| {
        let stored = message.timestamp().expect("the server says when it stored it");
        stored.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_millis()
    };
    assert_eq!(millis(&message), millis(&original), "a copy is as old as its original");
    settle(again, Disposition::Ack).await;
    until("nothing is left of it", || async { stored(&js, &own(&spec)).await == 0 }).await;
    stays_quiet(&mut inbox).await;
}

#[tokio::test]
async fn a_long_delay_goes_on_over_a_restart_of_the_consumer() {
    let spec = patient("restart");
    let (nats, mut inbox, js) = subscribed(&spec).await;
    send(&js, &spec.name, "x").await;
    let begin = Instant::now();
    settle(next(&mut inbox).await, requeue()).await;
    stays_quiet(&mut inbox).await;
    inbox.close().await;
    nats.close().await;
    let (_nats, mut inbox, _) = subscribed(&spec).await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
    in_time(begin);
}

#[tokio::test]
async fn attempts_are_counted_over_copies_and_a_wait_is_none() {
    let mut spec = queue("counted");
    spec.nats = spec.nats.long_delay(Duration::from_millis(100));
    let (_nats, mut inbox, js) = subscribed(&spec).await;
    send(&js, &spec.name, "x").await;
    let after = Duration::from_millis(200);
    let begin = Instant::now();
    for attempt in 1..=3 {
        let delivery = next(&mut inbox).await;
        assert_eq!(delivery.message().attempt(), attempt);
        settle(delivery, Disposition::Requeue { after }).await;
    }
    assert!(begin.elapsed() >= after * 2);
    let waited = next(&mut inbox).await;
    assert_eq!(waited.message().attempt(), 4);
    settle(waited, Disposition::Ack).await;
    send(&js, &spec.name, "y").await;
    let fresh = next(&mut inbox).await;
    settle(fresh, Disposition::Release { after }).await;
    let waited = next(&mut inbox).await;
    assert_eq!((body(&waited), waited.message().attempt()), ("y".to_owned(), 1), "a wait is no attempt");
    settle(waited, Disposition::Ack).await;
}

#[tokio::test]
async fn a_hundred_delays_end_together_and_none_is_lost() {
    let mut spec = patient("wave");
    spec.prefetch = 100;
    let (_nats, mut inbox, js) = subscribed(&spec).await;
    for n in 0..100 {
        send(&js, &spec.name, &n.to_string()).await;
    }
    let mut waves = BTreeSet::new();
    for delivery in take(&mut inbox, 100).await {
        settle(delivery, requeue()).await;
    }
    for delivery in take(&mut inbox, 100).await {
        waves.insert(body(&delivery));
        settle(delivery, Disposition::Ack).await;
    }
    assert_eq!(waves.len(), 100);
    until("both streams are empty", || async {
        stored(&js, &spec.name).await + stored(&js, &own(&spec)).await == 0
    })
    .await;
}

#[tokio::test]
async fn a_copy_that_cannot_be_kept_leaves_the_delay_with_the_source() {
    let spec = patient("unkept");
    let (_nats, mut inbox, js) = subscribed(&spec).await;
    send(&js, &spec.name, "x").await;
    let delivery = next(&mut inbox).await;
    js.delete_stream(own(&spec)).await.expect("deleted");
    let begin = Instant::now();
    settle(delivery, requeue()).await;
    until("the source keeps it", || async { pending(&js, &spec.name, &spec.name).await == 1 }).await;
    assert!(end(&mut inbox).await.to_string().contains("durable"), "the loss is noticed");
    inbox.close().await;
    let (_nats, mut inbox, _) = subscribed(&spec).await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
    in_time(begin);
}

#[tokio::test]
async fn f10_a_copy_whose_original_was_not_acked_leads_to_one_run() {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use guestlist::{Consumer, Queue};

    let spec = patient("f10");
    let js = stranger().await;
    let limits = stream::Config {
        name: spec.name.clone(),
        subjects: vec![spec.name.clone()],
        ..stream::Config::default()
    };
    js.create_stream(limits).await.expect("made");
    let (nats, mut inbox, _) = subscribed(&spec).await;
    send_with(&js, &spec.name, &[("Nats-Msg-Id", "once")], b"x").await;
    settle(next(&mut inbox).await, requeue()).await;
    inbox.close().await;
    // The server forgets the ack, as if it had never been sent.
    js.delete_consumer_from_stream(&spec.name, &spec.name).await.expect("deleted");
    nats.prepare(&spec).await.expect("made again");
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let queue =
        Queue::new(spec.name.as_str()).reject_failed().nats(spec.nats.clone()).handler(move |_: Message| {
            counted.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Ok(()))
        });
    let consumer = Consumer::new(nats).queue(queue);
    let status = consumer.status();
    let ended =
        || async { status.queue(&spec.name).is_some_and(|queue| queue.handled + queue.duplicates == 2) };
    let both = async { until("original and copy have ended", ended).await };
    consumer.run_until(both).await.expect("it runs");
    assert_eq!(runs.load(Ordering::Relaxed), 1);
}

// ---------------------------------------------------------------- whose clock

/// The clocks of this process stand still, as those of a suspended machine: the server's goes on.
fn suspend() {
    tokio::time::pause();
    std::thread::sleep(DELAY * 2);
    tokio::time::resume();
}

#[tokio::test]
async fn f17_a_delay_after_a_suspension_is_whole() {
    let spec = patient("suspended");
    let (_nats, mut inbox, js) = subscribed(&spec).await;
    suspend();
    send(&js, &spec.name, "x").await;
    let first = next(&mut inbox).await;
    let begin = Instant::now();
    settle(first, Disposition::Release { after: DELAY }).await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
    in_time(begin);
}

#[tokio::test]
async fn f17_a_message_in_hand_over_a_suspension_does_not_go_round_and_round() {
    let spec = patient("in-hand");
    let (_nats, mut inbox, js) = subscribed(&spec).await;
    send(&js, &spec.name, "x").await;
    let mut delivery = next(&mut inbox).await;
    suspend();
    for round in 0.. {
        let begin = Instant::now();
        settle(delivery, Disposition::Release { after: DELAY }).await;
        delivery = next(&mut inbox).await;
        if begin.elapsed() >= DELAY {
            in_time(begin);
            break;
        }
        assert_eq!(round, 0, "the first copy tells the time");
    }
    settle(delivery, Disposition::Ack).await;
}

#[tokio::test]
async fn f17_without_the_servers_time_nothing_is_put_on_its_schedule() {
    let spec = patient("timeless");
    let nats =
        Nats::connect(&between(|said| swap(said, b"\"ts\":", b"\"no\":")).await).await.expect("connects");
    let prepared = nats.prepare(&spec).await;
    if schedules() {
        let error = prepared.expect_err("it is asked again later");
        assert_eq!(error.kind(), BrokerErrorKind::Unreachable, "{error:?}");
        assert!(error.to_string().contains("server's time"), "{error}");
        assert!(nats.subscribe(&spec).await.is_err());
    } else {
        prepared.expect("a server of 2.9 never says");
    }
}

// ---------------------------------------------------------------- to this durable, and to nobody else

/// A server of 2.9 looks for the text `Nats-Msg-Id` in all headers, in an order that the client does not keep.
#[tokio::test]
async fn a_copy_published_twice_is_kept_once_whatever_its_original_was_called() {
    let (nats, _, _, js) = ready("twice").await;
    let spec = patient("twice");
    nats.prepare(&spec).await.expect("prepared");
    for number in 0..20 {
        let name = format!("letter-{number}");
        let message = Message::builder(name.clone()).header("Nats-Msg-Id", "the original's").build();
        for _ in 0..2 {
            let copy = Copy::redrive(&message, &name, 1);
            nats.publish(&nats.again(&spec), &copy).await.expect("confirmed, also as a duplicate");
        }
    }
    assert_eq!(stored(&js, &own(&spec)).await, 20);
}

#[tokio::test]
async fn other_durables_of_the_stream_see_no_copy() {
    let (mut spec, js) = (patient("mine"), stranger().await);
    let limits = stream::Config {
        name: spec.name.clone(),
        subjects: vec![spec.name.clone()],
        ..stream::Config::default()
    };
    let stream = js.create_stream(limits).await.expect("made");
    let other = consumer::pull::Config {
        durable_name: Some("other".to_owned()),
        filter_subject: spec.name.clone(),
        ..consumer::pull::Config::default()
    };
    stream.create_consumer(other).await.expect("made");
    spec.prefetch = 1;
    let (nats, mut inbox, _) = subscribed(&spec).await;
    send_with(&js, &spec.name, &[("Nats-Msg-Id", "id")], b"x").await;
    settle(next(&mut inbox).await, requeue()).await;
    settle(next(&mut inbox).await, Disposition::Ack).await;
    redrive(&nats, &spec, "id").await.expect("sent back");
    settle(next(&mut inbox).await, Disposition::Ack).await;
    let info = stream.consumer_info("other").await.expect("there");
    assert_eq!((stored(&js, &spec.name).await, info.num_pending), (1, 1), "the original, and no copy");
}

#[tokio::test]
async fn a_redriven_letter_arrives_once_as_its_original() {
    let spec = queue("redriven");
    let (nats, mut inbox, js) = subscribed(&spec).await;
    send_with(&js, &spec.name, &[("Nats-Msg-Id", "id")], b"x").await;
    let failed = next(&mut inbox).await;
    let original = failed.message().clone();
    park(&nats, &dead(&spec), &original).await.expect("parked");
    settle(failed, Disposition::Ack).await;
    let letter = letters(dead(&spec).name()).await.remove(0);
    // NATS 2.9 overlooks a copy's id behind the original's, which was moved aside: there dedup skips the second one.
    for _ in 0..if schedules() { 2 } else { 1 } {
        nats.publish(&nats.again(&spec), &redriven(&letter, "letter-1")).await.expect("sent back");
    }
    let again = next(&mut inbox).await;
    assert_eq!(again.message().source(), original.source());
    assert_eq!(again.message().id(), original.id());
    assert_eq!((again.message().generation(), again.message().attempt()), (1, 1));
    assert_eq!(headers(again.message()), headers(&original));
    settle(again, Disposition::Ack).await;
    stays_quiet(&mut inbox).await;
    assert_eq!(stored(&js, &spec.name).await, 0);
}

#[tokio::test]
async fn without_a_stream_of_its_own_nothing_can_be_sent_back_to_it() {
    let (nats, mut spec) = (nats().await, patient("without"));
    spec.nats = spec.nats.without_own_stream();
    let (_, mut inbox, js) = subscribed(&spec).await;
    assert!(js.get_stream(own(&spec)).await.is_err());
    let error = redrive(&nats, &with_own(&spec), "id").await.expect_err("there is no place for it");
    assert_eq!(error.kind(), BrokerErrorKind::NotRouted);
    assert!(error.to_string().contains("no stream of its own"), "{error}");
    assert!(refusal(redrive(&nats, &spec, "id").await).contains("`without_own_stream`"));
    send(&js, &spec.name, "x").await;
    let begin = Instant::now();
    settle(next(&mut inbox).await, requeue()).await;
    assert_eq!(pending(&js, &spec.name, &spec.name).await, 1, "the source keeps the delay");
    settle(next(&mut inbox).await, Disposition::Ack).await;
    in_time(begin);
    spec.nats = NatsOptions::new().core();
    assert!(refusal(redrive(&nats, &spec, "id").await).contains("core NATS"));
}

#[tokio::test]
async fn a_stream_left_over_gets_nothing_and_what_is_in_it_is_told_of() {
    let mut spec = patient("left-over");
    let (nats, mut inbox, js) = subscribed(&spec).await;
    send(&js, &spec.name, "x").await;
    settle(next(&mut inbox).await, Disposition::Requeue { after: LONG }).await;
    until("its copy waits", || async { stored(&js, &own(&spec)).await == 1 }).await;
    inbox.close().await;
    let waits = "this queue goes without a stream of its own, in which messages wait";
    let logs = LogCapture::begin();
    nats.subscribe(&spec).await.expect("subscribed").close().await;
    assert!(!logs.text().contains(waits), "it is pulled: {}", logs.text());
    spec.nats = spec.nats.without_own_stream();
    nats.prepare(&spec).await.expect("prepared");
    nats.subscribe(&spec).await.expect("subscribed").close().await;
    let told = logs.text();
    let told: Vec<&str> = told.lines().filter(|line| line.contains(waits)).collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("messages=1") && told[0].contains(&own(&spec)), "{told:?}");
    let text = refusal(redrive(&nats, &spec, "id").await);
    assert!(text.contains("`without_own_stream`") && text.contains(&spec.name), "{text}");
    assert_eq!(stored(&js, &own(&spec)).await, 1, "no copy is stranded beside it");
}

#[tokio::test]
async fn a_stranger_stream_that_keeps_our_subjects_gets_nothing() {
    let server = Server::start("").await;
    let (nats, js) =
        (Nats::connect(&server.url()).await.expect("connects"), stranger_at(&server.url()).await);
    let greedy = stream::Config {
        name: "greedy".to_owned(),
        subjects: vec!["guestlist.>".to_owned()],
        ..stream::Config::default()
    };
    js.create_stream(greedy).await.expect("made");
    let spec = patient("greedy");
    nats.prepare(&spec).await.expect("it goes without");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    send(&js, &spec.name, "x").await;
    settle(next(&mut inbox).await, requeue()).await;
    let error = redrive(&nats, &spec, "id").await.expect_err("nobody pulls it there");
    assert_eq!(error.kind(), BrokerErrorKind::NotRouted, "{error:?}");
    settle(next(&mut inbox).await, Disposition::Ack).await;
    assert_eq!(stored(&js, "greedy").await, 0);
}

// ---------------------------------------------------------------- room

#[tokio::test]
async fn with_one_place_both_go_on_and_never_two_are_in_hand() {
    let mut spec = queue("one");
    spec.prefetch = 1;
    let (nats, mut inbox, js) = subscribed(&spec).await;
    for n in 0..40 {
        send(&js, &spec.name, &format!("s{n}")).await;
        redrive(&nats, &spec, &format!("a{n}")).await.expect("sent back");
    }
    let (begin, mut order, mut swift) = (Instant::now(), Vec::new(), 0);
    for n in 0..80 {
        let round = Instant::now();
        let delivery = next(&mut inbox).await;
        if n % 10 == 0 {
            let more = poll_fn(|cx| Poll::Ready(inbox.poll_next(cx, 1))).await;
            assert!(more.is_pending(), "two are in hand");
        }
        let out = pending(&js, &spec.name, &spec.name).await + pending(&js, &own(&spec), &spec.name).await;
        // A request of which a slow server does not tell the end in time is given up, and both sides may have a place.
        if round.elapsed() < Duration::from_millis(400) {
            assert_eq!(out, 1, "one is out");
            swift += 1;
        }
        order.push(body(&delivery));
        let acked = delivery.into_parts().1.settle(Disposition::Ack);
        acked.await.expect("acked");
        until("the ack is there", || async {
            pending(&js, &spec.name, &spec.name).await + pending(&js, &own(&spec), &spec.name).await == 0
        })
        .await;
    }
    println!("80 by one place: {:?}", begin.elapsed());
    assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), 80);
    for side in ["s", "a"] {
        let early = order.iter().take(40).filter(|body| body.starts_with(side)).count();
        assert!(early >= 5, "{side}: {early} of the first 40: {order:?}");
    }
    assert!(swift >= 40, "{swift} of 80 were swift");
    assert!(begin.elapsed() < PATIENCE);
}

#[tokio::test]
async fn with_many_places_both_get_theirs_and_no_more_than_those_are_out() {
    let mut spec = queue("many");
    spec.prefetch = 12;
    let (nats, mut inbox, js) = subscribed(&spec).await;
    for n in 0..60 {
        send(&js, &spec.name, &format!("s{n}")).await;
        redrive(&nats, &spec, &format!("a{n}")).await.expect("sent back");
    }
    let (mut seen, mut in_hand) = (BTreeSet::new(), Vec::new());
    while seen.len() < 120 {
        let delivery = next(&mut inbox).await;
        assert!(seen.insert(body(&delivery)), "no message comes twice");
        in_hand.push(delivery);
        if in_hand.len() == 12 {
            until("all places are used, and no more", || async {
                let out = pending(&js, &spec.name, &spec.name).await;
                out + pending(&js, &own(&spec), &spec.name).await == 12
            })
            .await;
            for delivery in in_hand.drain(..) {
                settle(delivery, Disposition::Ack).await;
            }
        }
        if seen.len() == 60 {
            let redriven = seen.iter().filter(|body| body.starts_with('a')).count();
            assert!((10..=50).contains(&redriven), "{redriven} of 60 are copies");
        }
    }
}

#[tokio::test]
async fn a_quiet_side_is_heard_at_once() {
    for prefetch in [1, 2, 24] {
        let mut spec = queue("quiet");
        spec.prefetch = prefetch;
        let (nats, mut inbox, js) = subscribed(&spec).await;
        stays_quiet(&mut inbox).await;
        for n in 0..3 {
            let begin = Instant::now();
            redrive(&nats, &spec, &format!("a{n}")).await.expect("sent back");
            settle(next(&mut inbox).await, Disposition::Ack).await;
            let copy = begin.elapsed();
            send(&js, &spec.name, "s").await;
            settle(next(&mut inbox).await, Disposition::Ack).await;
            println!(
                "prefetch {prefetch}: a copy after {copy:?}, a message after {:?}",
                begin.elapsed().saturating_sub(copy)
            );
            assert!(begin.elapsed() < LATE * 2, "prefetch {prefetch}: {:?}", begin.elapsed());
        }
    }
}

#[tokio::test]
async fn a_full_source_does_not_starve_a_copy() {
    for prefetch in [1, 2, 24] {
        let mut spec = queue("full");
        spec.prefetch = prefetch;
        let (nats, mut inbox, js) = subscribed(&spec).await;
        for n in 0..500 {
            js.publish(spec.name.clone(), n.to_string().into()).await.expect("sent");
        }
        settle(next(&mut inbox).await, Disposition::Ack).await;
        redrive(&nats, &spec, "copy").await.expect("sent back");
        let (begin, mut before) = (Instant::now(), 0);
        loop {
            let delivery = next(&mut inbox).await;
            let is_copy = body(&delivery) == "copy";
            sleep(Duration::from_millis(5)).await;
            settle(delivery, Disposition::Ack).await;
            if is_copy {
                break;
            }
            before += 1;
        }
        println!("prefetch {prefetch}: the copy came after {before} messages, {:?}", begin.elapsed());
        assert!(before < 450, "prefetch {prefetch}: after {before}");
    }
}

#[tokio::test]
async fn cancel_hands_back_from_both() {
    in_one_of_three_tries(both_hand_back).await;
}

async fn both_hand_back() -> bool {
    let mut spec = queue("both-back");
    spec.prefetch = 40;
    let (nats, inbox, js) = subscribed(&spec).await;
    inbox.close().await;
    for n in 0..20 {
        send(&js, &spec.name, &format!("s{n}")).await;
        redrive(&nats, &spec, &format!("a{n}")).await.expect("sent back");
    }
    for round in 0..6 {
        let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
        if round % 2 == 0 {
            assert!(poll_fn(|cx| Poll::Ready(inbox.poll_next(cx, 40))).await.is_pending());
        } else {
            settle(next(&mut inbox).await, Disposition::Release { after: Duration::ZERO }).await;
        }
        inbox.cancel().await;
        assert!(poll(&mut inbox, 40).await.is_none());
        inbox.close().await;
    }
    let came = come_soon(&nats, &spec, 40).await;
    if came {
        until("both are empty", || async {
            stored(&js, &spec.name).await + stored(&js, &own(&spec)).await == 0
        })
        .await;
    }
    came
}

// ---------------------------------------------------------------- made, checked, gone

#[tokio::test]
async fn our_own_stream_is_made_whatever_is_declared_and_again_when_it_is_gone() {
    let mut spec = patient("gone");
    let (nats, mut inbox, js) = subscribed(&spec).await;
    spec.declare = Declare::Check;
    stays_quiet(&mut inbox).await;
    let begin = Instant::now();
    let (_, deleted) = join(end(&mut inbox), js.delete_stream(own(&spec))).await;
    deleted.expect("deleted");
    assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
    inbox.close().await;
    nats.prepare(&spec).await.expect("made again");
    let mut inbox = nats.subscribe(&spec).await.expect("subscribed");
    redrive(&nats, &spec, "id").await.expect("sent back");
    settle(next(&mut inbox).await, Disposition::Ack).await;
    js.delete_consumer_from_stream(&spec.name, own(&spec)).await.expect("deleted");
    end(&mut inbox).await;
    let mut inbox = nats.subscribe(&spec).await.expect("made again");
    redrive(&nats, &spec, "other").await.expect("sent back");
    settle(next(&mut inbox).await, Disposition::Ack).await;
}

#[tokio::test]
async fn our_own_stream_in_another_shape_is_refused_or_brought_up_to_date() {
    let (nats, js) = (nats().await, stranger().await);
    let (spec, plain) = (patient("shape"), patient("plain"));
    let config = |spec: &QueueSpec| stream::Config {
        name: own(spec),
        subjects: vec![
            format!("guestlist.again.{0}.{0}", spec.name),
            format!("guestlist.hold.{0}.{0}.*", spec.name),
        ],
        retention: stream::RetentionPolicy::WorkQueue,
        ..stream::Config::default()
    };
    let short = stream::Config { max_age: LONG * 60, ..config(&spec) };
    js.create_stream(short).await.expect("made");
    let text = refusal(nats.prepare(&spec).await);
    assert!(text.contains(&own(&spec)) && text.contains("max_age") && text.contains("empty"), "{text}");

    js.create_stream(config(&plain)).await.expect("made");
    nats.prepare(&plain).await.expect("it is brought up to date");
    let found = js.get_stream(own(&plain)).await.expect("there").cached_info().config.clone();
    assert_eq!(found.allow_message_schedules, schedules());
}

#[tokio::test]
async fn where_it_is_not_permitted_a_queue_goes_without() {
    let spec = patient("forbidden");
    let (name, dead_name) = (spec.name.clone(), dead(&spec).name().to_owned());
    let basics = format!(
        "\"$JS.API.STREAM.INFO.{name}\", \"$JS.API.CONSUMER.INFO.{name}.{name}\", \
         \"$JS.API.CONSUMER.MSG.NEXT.{name}.{name}\", \"$JS.ACK.{name}.{name}.>\", \"{dead_name}\", \
         \"$JS.API.STREAM.NAMES\", \"$JS.API.STREAM.INFO.{dead_name}\", \"$JS.API.STREAM.MSG.GET.{dead_name}\""
    );
    let own = own(&spec);
    // All but the last step: the stream and the durable are there, and cannot be pulled from.
    let half = format!("{basics}, \"$JS.API.STREAM.INFO.{own}\", \"$JS.API.CONSUMER.INFO.{own}.{name}\"");
    let user = |user: &str, publish: &str| {
        format!(
            "{{ user: {user}, password: x, permissions: {{ publish: [ {publish} ], subscribe: [ \"_INBOX.>\" ] }} }}"
        )
    };
    let users = format!(
        "authorization {{ users: [ {}, {}, {{ user: admin, password: x }} ] }}\n",
        user("none", &basics),
        user("half", &half)
    );
    let server = Server::start(&users).await;
    let url = |user: &str| server.url().replace("://", &format!("://{user}:x@"));
    let admin = Nats::connect(&url("admin")).await.expect("connects");
    admin.prepare(&spec).await.expect("made");
    redrive(&admin, &spec, "left").await.expect("it waits where nobody pulls");
    let login = ConnectOptions::with_user_and_password("admin".to_owned(), "x".to_owned());
    let js = jetstream::new(login.connect(server.url()).await.expect("connects"));
    let mut check = spec.clone();
    check.declare = Declare::Check;
    for who in ["none", "half"] {
        let nats = Nats::connect(&url(who)).await.expect("connects");
        let begin = Instant::now();
        nats.prepare(&check).await.expect("it goes without");
        let logs = LogCapture::begin();
        let mut inbox = nats.subscribe(&check).await.expect("subscribed");
        // The one may not ask how much there is.
        assert_eq!(logs.text().contains("messages=1"), who == "half", "{}", logs.text());
        drop(logs);
        assert!(begin.elapsed() < LESS_THAN_CONFIRM, "a denial is not waited for: {:?}", begin.elapsed());
        send(&js, &spec.name, who).await;
        let begin = Instant::now();
        settle(next(&mut inbox).await, requeue()).await;
        until("the source keeps the delay", || async { pending(&js, &name, &name).await == 1 }).await;
        settle(next(&mut inbox).await, Disposition::Ack).await;
        in_time(begin);
        let refused = timeout(LESS_THAN_CONFIRM, redrive(&nats, &spec, who)).await.expect("at once");
        let text = refusal(refused);
        assert!(text.contains("may not publish to `guestlist.again."), "{text}");
    }
}
