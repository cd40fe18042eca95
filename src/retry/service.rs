//! [`Retry`].

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
use tower_service::Service;

use crate::pipeline::InsideDedup;
use crate::{Backoff, BoxError, Cause, Failure, FailureClass, Message};

/// Middleware that tries again in process. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct Retry<S> {
    inner: S,
    tries: u32,
    backoff: Backoff,
}

impl<S> Retry<S> {
    pub(super) const fn new(inner: S, tries: u32, backoff: Backoff) -> Self {
        Self { inner, tries, backoff }
    }
}

impl<S> Service<Message> for Retry<S>
where
    S: Service<Message> + Clone,
    S::Response: InsideDedup,
    S::Error: Into<BoxError>,
{
    type Response = ();
    type Error = BoxError;
    type Future = RetryFuture<S, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, message: Message) -> Self::Future {
        // The clone may not be ready; the service that was polled is. Move that one.
        let clone = self.inner.clone();
        let mut service = std::mem::replace(&mut self.inner, clone);
        let state = State::Trying { inner: service.call(message.clone()) };
        RetryFuture {
            state,
            service,
            message,
            left: self.tries.saturating_sub(1),
            failures: 0,
            backoff: self.backoff,
        }
    }
}

pin_project! {
    /// The future of [`Retry`].
    pub struct RetryFuture<S, F> {
        #[pin]
        state: State<F>,
        service: S,
        message: Message,
        left: u32,
        failures: u32,
        backoff: Backoff,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F> {
        // A try is under way.
        Trying { #[pin] inner: F },
        // The backoff before the next one.
        Resting { #[pin] rest: Sleep },
        // The service gets ready for the next one.
        Readying,
    }
}

impl<S, F> std::fmt::Debug for RetryFuture<S, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RetryFuture").field("left", &self.left).finish_non_exhaustive()
    }
}

impl<S> Future for RetryFuture<S, S::Future>
where
    S: Service<Message>,
    S::Response: InsideDedup,
    S::Error: Into<BoxError>,
{
    type Output = Result<(), BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProjection::Trying { inner } => {
                    let Err(error) = ready!(inner.poll(cx)) else { return Poll::Ready(Ok(())) };
                    let failure = Failure::from_error(error.into());
                    if *this.left == 0 || !worth_another_try(&failure) {
                        return Poll::Ready(Err(failure.into_error()));
                    }
                    *this.left -= 1;
                    *this.failures += 1;
                    this.state.set(State::Resting { rest: sleep(this.backoff.delay(*this.failures)) });
                }
                StateProjection::Resting { rest } => {
                    ready!(rest.poll(cx));
                    this.state.set(State::Readying);
                }
                StateProjection::Readying => {
                    ready!(this.service.poll_ready(cx)).map_err(Into::into)?;
                    if this.message.run().is_some_and(|run| !run.in_force()) {
                        return Poll::Ready(Err(too_late()));
                    }
                    let inner = this.service.call(this.message.clone());
                    this.state.set(State::Trying { inner });
                }
            }
        }
    }
}

fn worth_another_try(failure: &Failure) -> bool {
    failure.class() == FailureClass::Transient && failure.plan().is_none()
}

/// Another holder may have the id by now: no handler starts without a lease.
fn too_late() -> BoxError {
    let text = "the claim ran out between two tries";
    Failure::new(FailureClass::Transient, Cause::LeaseLost, text).into_error()
}
