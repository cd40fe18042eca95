//! The same handler over any broker, consuming what somebody else publishes:
//!
//! ```text
//! cargo run --example orders --features amqp,nats -- --broker amqp://localhost --queue orders
//! cargo run --example orders --features amqp,nats -- --broker nats://localhost --queue orders
//! ```
//!
//! It makes the queue if it is missing, prints a line for each delivery and the totals at the end (Ctrl-C). A body
//! that says `fail` fails once and is tried again; one that says `poison` goes to the dead letters (`QUEUE.dead`).

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use guestlist::prelude::*;
use guestlist::{Disposition, Event, EventKind, Observer, QueueStatus};

/// The handler knows nothing of the broker.
async fn order(message: Message, Attempt(attempt): Attempt) -> Result<(), Failure> {
    match message.payload().as_ref() {
        b"poison" => Err(Failure::permanent("this order can never be handled")),
        b"fail" if attempt == 1 => Err("this order fails the first time".into()),
        _ => Ok(()),
    }
}

#[tokio::main]
async fn main() -> guestlist::Result<ExitCode> {
    let Some(options) = Options::parse(std::env::args().skip(1)) else {
        eprintln!(
            "usage: orders --broker amqp://…|amqps://…|nats://…|tls://…|memory: --queue NAME [--seconds N]"
        );
        return Ok(ExitCode::from(2));
    };
    // Warnings say what went wrong, and what happens next.
    tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::WARN).init();
    let queue = Queue::new(&options.queue)
        .declare()
        .dead_letter(format!("{}.dead", options.queue))
        .observer(Arc::new(Lines::default()))
        .handler(order);
    let consumer = Consumer::connect(&options.broker).await?.queue(queue);
    let status = consumer.status();
    println!("consuming `{}`; Ctrl-C stops", options.queue);
    consumer.run_until(options.stop()).await?;
    for queue in status.queues() {
        print_totals(&queue);
    }
    Ok(ExitCode::SUCCESS)
}

struct Options {
    broker: String,
    queue: String,
    seconds: Option<u64>,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Option<Self> {
        let (mut broker, mut queue, mut seconds) = (None, None, None);
        while let Some(name) = args.next() {
            let value = args.next()?;
            match name.as_str() {
                "--broker" => broker = Some(value),
                "--queue" => queue = Some(value),
                "--seconds" => seconds = Some(value.parse().ok()?),
                _ => return None,
            }
        }
        Some(Self { broker: broker?, queue: queue?, seconds })
    }

    /// Ctrl-C, SIGTERM, or the end of the time.
    async fn stop(&self) {
        let time = async {
            match self.seconds {
                Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = guestlist::signal() => {}
            () = time => {}
        }
    }
}

fn print_totals(queue: &QueueStatus) {
    println!("\n{}: {} deliveries", queue.name, queue.received);
    println!("  handled       {}", queue.handled);
    println!("  skipped       {}", queue.duplicates);
    for (cause, count) in &queue.failures {
        println!("  came again    {count}   {cause}");
    }
    for (cause, count) in &queue.dead_letters {
        println!("  dead letters  {count}   {cause}");
    }
}

/// One line for each delivery, when it ends.
#[derive(Default)]
struct Lines(AtomicU64);

impl Observer for Lines {
    fn observe(&self, event: &Event) {
        let what = match event.kind {
            EventKind::Acked(outcome) => outcome.name().to_owned(),
            EventKind::Returned(Disposition::Requeue { after }) => {
                format!("failed, comes again after {after:.1?}")
            }
            EventKind::Returned(disposition) => format!("goes back: {disposition:?}"),
            EventKind::Unsettled => "the broker could not be told; comes again".to_owned(),
            _ => return,
        };
        let line = self.0.fetch_add(1, Ordering::Relaxed) + 1;
        let key = event.key.map_or_else(|| "no id".to_owned(), |key| key.to_string()[..8].to_owned());
        println!("{line:>6}  {key}  attempt {}  {what}", event.attempt);
    }
}
