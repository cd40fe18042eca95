//! The layers around a loop that you already have, with async-nats:
//!
//! ```text
//! cargo run --example existing_nats_loop --features nats -- nats://localhost STREAM DURABLE
//! ```
//!
//! Your client, stream and durable stay yours. Three lines change: the stack is built once, each message is split, and
//! its end is concluded. Heartbeats stay yours as well: keep handlers shorter than the durable's `ack_wait`, or send
//! progress with [`Acker::progress`](guestlist::Acker::progress). A stream must keep the subject `DURABLE.dead`.

use std::sync::Arc;

use futures_util::StreamExt;
use guestlist::broker::nats::async_nats::jetstream;
use guestlist::broker::nats::async_nats::jetstream::consumer::PullConsumer;
use guestlist::broker::nats::{self, Nats, async_nats};
use guestlist::prelude::*;
use guestlist::{BoxError, Pipeline};
use tower::{Service, ServiceExt};

/// The handler that you already have.
async fn order(message: Message) -> Result<(), Failure> {
    println!("handling {} bytes", message.payload().len());
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut args = std::env::args().skip(1);
    let (Some(url), Some(stream), Some(durable)) = (args.next(), args.next(), args.next()) else {
        return Err("usage: existing_nats_loop nats://… STREAM DURABLE".into());
    };

    // The loop that you already have.
    let client = async_nats::connect(&url).await?;
    let consumer: PullConsumer = jetstream::new(client).get_consumer_from_stream(&durable, &stream).await?;
    // No more than are handled at once: the deadline of a message in a buffer is running.
    let mut messages = consumer.stream().max_messages_per_batch(16).messages().await?;

    // New: the layers, built once. Dead letters are published over a connection of their own.
    let dead_letters = Arc::new(Nats::connect(&url).await?);
    let settings = Queue::new(&durable)
        .nats(guestlist::broker::NatsOptions::new().stream(&stream))
        .dead_letter(format!("{durable}.dead"));
    let mut stack = Pipeline::new(settings, dead_letters)?.handler(order)?;

    let stop = guestlist::signal();
    tokio::pin!(stop);
    loop {
        let message = tokio::select! {
            message = messages.next() => message,
            () = &mut stop => break,
        };
        let Some(message) = message else { break };
        // New: what arrived, and the right to settle it once.
        let (message, acker) = nats::split(message?);
        let answer = stack.ready().await?.call(message);
        tokio::spawn(async move {
            // New: the claim is released as planned, then the delivery is settled.
            match acker.conclude(answer.await).await {
                Ok(disposition) => println!("  {disposition:?}"),
                Err(error) => eprintln!("  comes again: {error}"),
            }
        });
    }
    Ok(())
}
