//! [`Redeliver`].

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use tower_service::Service;

use super::policy::Policy;
use crate::pipeline::OutsideDedup;
use crate::settlement;
use crate::{BoxError, Cause, Failure, FailureClass, Message, Outcome};

/// Middleware that plans when a failed delivery comes again. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct Redeliver<S> {
    inner: S,
    policy: Arc<Policy>,
}

impl<S> Redeliver<S> {
    pub(super) const fn new(inner: S, policy: Arc<Policy>) -> Self {
        Self { inner, policy }
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
        let inner = self.inner.call(message.clone());
        RedeliverFuture { inner, message, policy: Arc::clone(&self.policy) }
    }
}

pin_project! {
    /// The future of [`Redeliver`].
    #[derive(Debug)]
    pub struct RedeliverFuture<F> {
        #[pin]
        inner: F,
        message: Message,
        policy: Arc<Policy>,
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
            Err(error) => Err(planned(Failure::from_error(error.into()), this.message, this.policy)),
        };
        Poll::Ready(answer.map_err(Failure::into_error))
    }
}

/// The first plan stands.
fn planned(mut failure: Failure, message: &Message, policy: &Policy) -> Failure {
    if failure.plan().is_some() {
        return failure;
    }
    let Some(backoff) = policy.delay(&failure, message.attempt()) else {
        failure.reclassify(FailureClass::Permanent, Cause::Permanent);
        return failure;
    };
    let class = match failure.class() {
        FailureClass::Deferred(after) => FailureClass::Deferred(policy.cut(after)),
        class => class,
    };
    if let Some(plan) = settlement::redelivery(class, backoff) {
        failure.set_plan(plan);
    }
    failure
}
