//! [`Trace`].

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use tower_service::Service;
use tracing::Span;
use tracing::field::{Empty, display};

use crate::pipeline::OutsideDedup;
use crate::{BoxError, Failure, Message, Outcome, Source};

/// Middleware that traces each delivery. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct Trace<S> {
    inner: S,
}

impl<S> Trace<S> {
    pub(super) const fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Message> for Trace<S>
where
    S: Service<Message>,
    S::Response: OutsideDedup,
    S::Error: Into<BoxError>,
{
    type Response = Outcome;
    type Error = BoxError;
    type Future = TraceFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, message: Message) -> Self::Future {
        let span = span(&message);
        let inner = span.in_scope(|| self.inner.call(message.clone()));
        TraceFuture { inner, span, message }
    }
}

fn span(message: &Message) -> Span {
    let source = message.source();
    let span = tracing::info_span!(
        target: "guestlist",
        "process",
        messaging.system = source.system,
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.destination.name = Empty,
        messaging.consumer.group.name = Empty,
        messaging.rabbitmq.destination.routing_key = Empty,
        messaging.message.body.size = message.payload().len(),
        guestlist.delivery = message.delivery_number(),
        guestlist.attempt = Empty,
        guestlist.key = Empty,
        guestlist.outcome = Empty,
        error.type = Empty,
    );
    record_source(&span, source);
    span
}

/// A queue is consumed from by name; a subject by a durable, which is the consumer group.
fn record_source(span: &Span, source: &Source) {
    if source.stream.is_empty() {
        span.record("messaging.destination.name", &*source.queue);
        span.record("messaging.rabbitmq.destination.routing_key", &*source.routing_key);
    } else {
        span.record("messaging.destination.name", &*source.routing_key);
        span.record("messaging.consumer.group.name", &*source.queue);
    }
}

pin_project! {
    /// The future of [`Trace`].
    #[derive(Debug)]
    pub struct TraceFuture<F> {
        #[pin]
        inner: F,
        span: Span,
        message: Message,
    }
}

impl<F, R, E> Future for TraceFuture<F>
where
    F: Future<Output = Result<R, E>>,
    R: OutsideDedup,
    E: Into<BoxError>,
{
    type Output = Result<Outcome, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let entered = this.span.enter();
        let answer =
            ready!(this.inner.poll(cx)).map(Into::into).map_err(|error| Failure::from_error(error.into()));
        drop(entered);
        record(this.span, this.message, &answer);
        Poll::Ready(answer.map_err(Failure::into_error))
    }
}

fn record(span: &Span, message: &Message, answer: &Result<Outcome, Failure>) {
    if span.is_disabled() {
        return;
    }
    span.record("guestlist.attempt", message.attempt());
    if let Some(found) = message.identified() {
        span.record("guestlist.key", display(found.key));
    }
    match answer {
        Ok(outcome) => span.record("guestlist.outcome", outcome.name()),
        Err(failure) => span.record("error.type", failure.cause().name()),
    };
}
