//! The check at the start, through the public API.

use std::future::{pending, ready};
use std::time::Duration;

use guestlist::broker::memory::MemoryBroker;
use guestlist::prelude::*;
use guestlist::{Error, Severity};

use crate::support::LogCapture;

fn broker() -> MemoryBroker {
    let broker = MemoryBroker::new();
    broker.declare("orders");
    broker.declare("orders.dead");
    broker
}

fn queue() -> Queue {
    Queue::new("orders").dead_letter("orders.dead").handler(async |_: Message| Ok(()))
}

/// What makes a queue unsafe, and what is said of it.
type Unsafe = (fn(Queue) -> Queue, &'static [&'static str]);

/// Starts, and stops at once.
async fn start(queue: Queue) -> Result<(), Error> {
    Consumer::new(broker()).queue(queue).run_until(ready(())).await
}

#[tokio::test]
async fn what_is_refused_at_the_start_is_what_a_check_refuses() {
    let unsafe_ones: [Unsafe; 4] = [
        (|queue| queue.max_attempts(0), &["max_attempts is 0", "at least 1"]),
        (|queue| queue.window(Duration::from_secs(29)), &["window of 29s", "lease of 30s"]),
        (|queue| queue.concurrency(4).prefetch(3), &["concurrency 4", "prefetch 3"]),
        (|queue| queue.hold_steps([]), &["no hold steps"]),
    ];
    for (change, names) in unsafe_ones {
        let findings = change(queue()).check(&broker()).await.unwrap();
        let refused: Vec<_> =
            findings.iter().filter(|finding| finding.severity == Severity::Refuse).collect();
        let [refused] = refused[..] else { panic!("one is refused, not {findings:?}") };
        let error = start(change(queue())).await.unwrap_err();
        for name in names {
            let told = (refused.to_string(), format!("{error:?}"));
            assert!(told.0.contains(name) && told.1.contains(name), "{name}: {told:?}");
        }
        assert!(refused.to_string().starts_with("queue `orders`: "), "{refused}");
    }
    assert_eq!(queue().check(&broker()).await.unwrap(), []);
}

#[tokio::test]
async fn what_is_risky_starts_and_is_warned_about_once() {
    let risky = || queue().timeout(Duration::from_secs(3600)).max_attempts(2);
    let consumer = Consumer::new(broker()).drain(Duration::from_secs(7200)).queue(risky());
    let findings = consumer.check().await.unwrap();
    assert!(findings.iter().all(|finding| finding.severity == Severity::Warn), "{findings:?}");
    assert_eq!(findings.len(), 2, "{findings:?}");

    let log = LogCapture::begin();
    consumer.run_until(ready(())).await.unwrap();
    let text = log.text();
    for finding in &findings {
        assert_eq!(text.matches(&finding.message).count(), 1, "{finding} in {text}");
    }
    assert_eq!(text.matches(" WARN ").count(), 2, "{text}");
}

/// A hand-built stack has no start of its own.
#[tokio::test]
async fn a_pipeline_refuses_and_warns_as_well() {
    let pipeline = |queue| guestlist::Pipeline::new(queue, std::sync::Arc::new(broker()));
    let error = pipeline(queue().max_attempts(0)).unwrap_err();
    assert!(error.to_string().contains("max_attempts is 0"), "{error}");
    let log = LogCapture::begin();
    pipeline(queue().max_attempts(2)).unwrap();
    assert_eq!(log.text().matches("max_attempts is 2").count(), 1, "{}", log.text());
}

#[tokio::test]
async fn a_drain_shorter_than_the_timeout_is_the_consumers_to_find() {
    let consumer = Consumer::new(broker()).drain(Duration::from_secs(1));
    let consumer = consumer.queue(queue().timeout(Duration::from_secs(2)));
    let findings = consumer.check().await.unwrap();
    assert!(
        findings[0].message.contains("drain of 1s") && findings[0].message.contains("2s"),
        "{findings:?}"
    );
    let never = tokio::time::timeout(Duration::from_millis(50), consumer.run_until(pending())).await;
    assert!(never.is_err(), "it runs");
}
