//! The layers around a loop that you already have, with lapin:
//!
//! ```text
//! cargo run --example existing_lapin_loop --features amqp -- amqp://localhost orders
//! ```
//!
//! Your connection, channel and consumer stay yours. Three lines change: the stack is built once, each delivery is
//! split, and its end is concluded. The queue must exist, and `orders.dead` for what cannot be handled.

use std::sync::Arc;

use futures_util::StreamExt;
use guestlist::broker::amqp::lapin::options::{BasicConsumeOptions, BasicQosOptions};
use guestlist::broker::amqp::lapin::types::FieldTable;
use guestlist::broker::amqp::lapin::{Connection, ConnectionProperties};
use guestlist::broker::amqp::{self, Amqp};
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
    let (Some(url), Some(queue)) = (args.next(), args.next()) else {
        return Err("usage: existing_lapin_loop amqp://… QUEUE".into());
    };

    // The loop that you already have.
    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.basic_qos(16, BasicQosOptions::default()).await?;
    let (name, tag) = (queue.as_str().into(), "existing-loop".into());
    let mut deliveries =
        channel.basic_consume(name, tag, BasicConsumeOptions::default(), FieldTable::default()).await?;

    // New: the layers, built once. Dead letters are published over a connection of their own.
    let dead_letters = Arc::new(Amqp::connect(&url).await?);
    let settings = Queue::new(&queue).dead_letter(format!("{queue}.dead"));
    let mut stack = Pipeline::new(settings, dead_letters)?.handler(order)?;

    let stop = guestlist::signal();
    tokio::pin!(stop);
    loop {
        let delivery = tokio::select! {
            delivery = deliveries.next() => delivery,
            () = &mut stop => break,
        };
        let Some(delivery) = delivery else { break };
        // New: what arrived, and the right to settle it once.
        let (message, acker) = amqp::split(delivery?);
        let answer = stack.ready().await?.call(message);
        tokio::spawn(async move {
            // New: the claim is released as planned, then the delivery is settled.
            match acker.conclude(answer.await).await {
                Ok(disposition) => println!("  {disposition:?}"),
                Err(error) => eprintln!("  comes again: {error}"),
            }
        });
    }
    connection.close(200, "bye".into()).await?;
    Ok(())
}
