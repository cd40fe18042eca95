//! [`Redeliver`].

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use tower_service::Service;

use crate::pipeline::OutsideDedup;
use crate::settlement;
use crate::{Backoff, BoxError, Failure, Message, Outcome};

/// Middleware that plans when a failed delivery comes again. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct Redeliver<S> {
    inner: S,
    backoff: Backoff,
}

impl<S> Redeliver<S> {
    pub(super) const fn new(inner: S, backoff: Backoff) -> Self {
        Self { inner, backoff }
    }
}

impl<S> Service<Message> for Redeliver<S>
where
    S: Service<Message>,
    S::Response: OutsideDedup,
    S::Error: Into<BoxError>,
{
    type Response = Outcome;
    type Error = BoxError;
    type Future = RedeliverFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, message: Message) -> Self::Future {
        RedeliverFuture { inner: self.inner.call(message.clone()), message, backoff: self.backoff }
    }
}

pin_project! {
    /// The future of [`Redeliver`].
    #[derive(Debug)]
    pub struct RedeliverFuture<F> {
        #[pin]
        inner: F,
        message: Message,
        backoff: Backoff,
    }
}

impl<F, R, E> Future for RedeliverFuture<F>
where
    F: Future<Output = Result<R, E>>,
    R: OutsideDedup,
    E: Into<BoxError>,
{
    type Output = Result<Outcome, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = match ready!(this.inner.poll(cx)) {
            Ok(outcome) => Ok(outcome.into()),
            Err(error) => Err(planned(Failure::from_error(error.into()), this.message, this.backoff)),
        };
        Poll::Ready(answer.map_err(Failure::into_error))
    }
}

/// The first plan stands.
fn planned(mut failure: Failure, message: &Message, backoff: &Backoff) -> Failure {
    if failure.plan().is_some() {
        return failure;
    }
    if let Some(plan) = settlement::redelivery(failure.class(), backoff.delay(message.attempt())) {
        failure.set_plan(plan);
    }
    failure
}
