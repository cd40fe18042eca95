//! The AMQP broker against a real RabbitMQ: the contract, and what only AMQP has.

mod contract;
mod copies;
mod endings;
mod letters;
mod proxy;
mod rabbit;
mod settling;
mod starting;
