//! Connecting and declaring: what is wrong is refused by name, and secrets stay secret.

use std::time::Duration;

use guestlist::broker::amqp::Amqp;
use guestlist::broker::{
    AmqpOptions, Broker, BrokerError, BrokerErrorKind, Copy, Declare, HoldSteps, QueueKind, QueueSpec,
};
use guestlist::{Disposition, Message};
use tokio::io::AsyncReadExt;

use super::rabbit::{Rabbit, delivery, env, hold_queue, prepared, spec, unique, url};

/// The error's whole chain, as people and logs see it.
fn told(error: &BrokerError) -> String {
    let chain = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    chain.map(|error| format!("{error} {error:?}")).collect::<Vec<_>>().join(" ")
}

fn assert_refused(answer: Result<impl Sized, BrokerError>, words: &[&str]) {
    let error = answer.err().expect("it must be refused");
    assert_eq!(error.kind(), BrokerErrorKind::Refused, "{error:?}");
    for word in words {
        assert!(error.to_string().contains(word), "{word:?} is not in: {error}");
    }
}

#[tokio::test]
async fn a_missing_queue_is_refused_with_its_name_and_the_fix() {
    let broker = Amqp::connect(&url()).await.unwrap();
    let queue = QueueSpec::new(unique("missing"));
    assert_refused(broker.prepare(&queue).await, &[&queue.name, "Declare::Create"]);
    assert!(!Rabbit::new().await.exists(&hold_queue(&queue)).await, "nothing is made for it");
}

#[tokio::test]
async fn a_queue_of_another_kind_is_refused_with_its_name_and_the_fix() {
    let (broker, mut queue) = prepared("other_kind", QueueKind::Classic).await;
    queue.amqp = AmqpOptions::default();
    assert_refused(broker.prepare(&queue).await, &[&queue.name, "Declare::Check"]);
    queue.declare = Declare::Check;
    broker.prepare(&queue).await.unwrap();
}

#[tokio::test]
async fn a_missing_dead_letter_queue_is_refused_unless_allowed() {
    let (broker, mut queue) = prepared("no_dead", QueueKind::Quorum).await;
    queue.declare = Declare::Check;
    queue.dead_letter = Some(unique("missing_dead").into());
    let name = queue.dead_letter.clone().unwrap();
    assert_refused(broker.prepare(&queue).await, &[name.name(), &queue.name, "allow"]);
    queue.allow_missing_dead_letter = true;
    broker.prepare(&queue).await.unwrap();
}

#[tokio::test]
async fn a_dead_letter_queue_of_any_kind_will_do() {
    let broker = Amqp::connect(&url()).await.unwrap();
    let queue = spec("classic_dead", QueueKind::Quorum);
    Rabbit::new().await.declare(queue.dead_letter.as_ref().unwrap().name(), &[]).await;
    broker.prepare(&queue).await.unwrap();
}

#[tokio::test]
async fn names_that_amqp_cannot_carry_are_refused() {
    let broker = Amqp::connect(&url()).await.unwrap();
    let create = |name: String| {
        let mut queue = QueueSpec::new(name);
        queue.declare = Declare::Create;
        queue
    };
    let long = unique(&"x".repeat(255));
    assert_refused(broker.prepare(&create(long.clone())).await, &["the queue's name", "255"]);
    assert_refused(broker.subscribe(&create(long.clone())).await, &["255"]);
    let no_room_for_hold = long[..250].to_owned();
    assert_refused(broker.prepare(&create(no_room_for_hold)).await, &["hold queue", "255"]);
    assert_refused(broker.prepare(&create(String::new())).await, &["empty"]);
    let mut queue = spec("long_dead", QueueKind::Quorum);
    queue.dead_letter = Some(long.as_str().into());
    assert_refused(broker.prepare(&queue).await, &["dead-letter", "255"]);
    let message = Message::builder("x").build();
    assert_refused(broker.publish(&long.into(), &Copy::hold(&message)).await, &["255"]);
    let vhost = format!("amqp://localhost/{}", "v".repeat(256));
    assert_refused(Amqp::connect(&vhost).await, &["vhost", "255"]);
}

#[tokio::test]
async fn loops_are_refused() {
    let broker = Amqp::connect(&url()).await.unwrap();
    let mut queue = spec("loop", QueueKind::Quorum);
    queue.dead_letter = Some(queue.name.as_str().into());
    assert_refused(broker.prepare(&queue).await, &[&queue.name, "its own dead-letter queue"]);
    queue.dead_letter = None;
    queue.holds = HoldSteps::new([Duration::from_micros(900)]);
    assert_refused(broker.prepare(&queue).await, &["hold step"]);
}

#[tokio::test]
async fn a_wrong_password_is_refused_and_appears_nowhere() {
    let mut wrong = url::Url::parse(&url()).unwrap();
    wrong.set_password(Some("hunter2secret")).unwrap();
    let error = Amqp::connect(wrong.as_str()).await.unwrap_err();
    assert_eq!(error.kind(), BrokerErrorKind::Refused);
    assert!(!told(&error).contains("hunter2secret"), "{}", told(&error));
    for url in [
        "amqp:guest:hunter2secret@host",
        "http://u:hunter2secret@host",
        "hunter2secret",
        "amqp://u:hunter2secret@host?heartbeat=x",
        "amqp://u:hunter2secret@host:99999",
    ] {
        let error = Amqp::connect(url).await.unwrap_err();
        assert_eq!(error.kind(), BrokerErrorKind::Refused);
        assert!(!told(&error).contains("hunter2secret"), "{}", told(&error));
    }
    let mut right = url::Url::parse(&url()).unwrap();
    let secret = right.password().unwrap().to_owned();
    right.set_path("/");
    let broker = Amqp::connect(right.as_str()).await.unwrap();
    let shown = format!("{broker:?} {:?}", Amqp::options().client_identity("x", "hunter2secret"));
    assert!(!shown.contains(&format!(":{secret}@")) && !shown.contains("hunter2"), "{shown}");
}

#[tokio::test]
async fn a_vhost_that_is_not_there_is_refused() {
    let mut other = url::Url::parse(&url()).unwrap();
    other.set_path("/no-such-vhost");
    assert_refused(Amqp::connect(other.as_str()).await, &["no-such-vhost"]);
}

#[tokio::test]
async fn a_closed_port_is_unreachable() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = Amqp::connect(&format!("amqp://127.0.0.1:{port}")).await.unwrap_err();
    assert_eq!(error.kind(), BrokerErrorKind::Unreachable);
    let message = error.to_string();
    assert!(message.contains(&port.to_string()), "{message}");
}

#[tokio::test]
async fn a_broker_that_keeps_silent_is_given_up_and_hung_up_on() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut greeting = Vec::new();
        // Ends when the other side hangs up.
        let _ = socket.read_to_end(&mut greeting).await;
        greeting
    });
    let silent = format!("amqp://127.0.0.1:{port}?connection_timeout=3000");
    let error = Amqp::connect(&silent).await.unwrap_err();
    assert_eq!(error.kind(), BrokerErrorKind::Unreachable);
    let greeting = tokio::time::timeout(Duration::from_secs(5), heard).await.expect("nobody hung up");
    assert_eq!(greeting.unwrap(), b"AMQP\0\0\x09\x01");
}

#[tokio::test]
async fn the_default_scope_names_vhost_and_queue() {
    let broker = Amqp::connect(&url()).await.unwrap();
    assert_eq!(broker.default_scope(&QueueSpec::new("charges")), "amqp://charges");
    assert_eq!(broker.system(), "rabbitmq");
}

fn tls_file(name: &str) -> Vec<u8> {
    std::fs::read(std::path::Path::new(&env("GUESTLIST_TLS_DIR")).join(name)).unwrap()
}

fn ca() -> String {
    String::from_utf8(tls_file("ca.pem")).unwrap()
}

/// Sends a message round by this broker.
async fn assert_works(broker: &Amqp) {
    let queue = spec("tls", QueueKind::Quorum);
    broker.prepare(&queue).await.unwrap();
    let message = Message::builder("x").build();
    broker.publish(&queue.name.as_str().into(), &Copy::hold(&message)).await.unwrap();
    let mut subscription = broker.subscribe(&queue).await.unwrap();
    delivery(&mut subscription).await.into_parts().1.settle(Disposition::Ack).await.unwrap();
    subscription.close().await;
    broker.close().await;
}

#[tokio::test]
async fn tls_with_a_password() {
    let broker = Amqp::options().root_certificates(ca()).connect(&env("GUESTLIST_AMQPS_URL")).await;
    assert_works(&broker.unwrap()).await;
}

#[tokio::test]
async fn tls_with_a_certificate_in_place_of_user_and_password() {
    let url = format!("{}?auth_mechanism=external", env("GUESTLIST_AMQPS_URL"));
    let options = Amqp::options().root_certificates(ca()).name("by certificate");
    let identity = options.client_identity(tls_file("client.p12"), env("GUESTLIST_TLS_P12_PASSWORD"));
    assert_works(&identity.connect(&url).await.unwrap()).await;
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_refused() {
    assert_refused(Amqp::connect(&env("GUESTLIST_AMQPS_URL")).await, &["TLS"]);
}

#[tokio::test]
async fn a_key_file_with_another_password_is_refused() {
    let options = Amqp::options().root_certificates(ca()).client_identity(tls_file("client.p12"), "hunter2");
    assert_refused(options.connect(&env("GUESTLIST_AMQPS_URL")).await, &["TLS"]);
}

#[tokio::test]
async fn after_close_the_next_call_connects_again() {
    let (broker, queue) = prepared("closed_broker", QueueKind::Classic).await;
    broker.close().await;
    broker.prepare(&queue).await.unwrap();
    assert_works(&broker).await;
}
