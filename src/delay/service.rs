//! [`Delay`].

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::SystemTime;

use pin_project_lite::pin_project;
use tower_service::Service;

use super::due::due;
use crate::pipeline::OutsideDedup;
use crate::settlement::Plan;
use crate::{BoxError, Cause, Failure, FailureClass, Message, Outcome};

/// Middleware that hands back what is not due. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct Delay<S> {
    inner: S,
}

impl<S> Delay<S> {
    pub(super) const fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Message> for Delay<S>
where
    S: Service<Message>,
    S::Response: OutsideDedup,
    S::Error: Into<BoxError>,
{
    type Response = Outcome;
    type Error = BoxError;
    type Future = DelayFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, message: Message) -> Self::Future {
        match not_now(&message) {
            // The slot that `poll_ready` reserved stays with the inner service, for the next message.
            Some(failure) => DelayFuture::NotNow { failure: Some(failure) },
            None => DelayFuture::Now { inner: self.inner.call(message) },
        }
    }
}

/// Why the message is not handled now.
fn not_now(message: &Message) -> Option<Failure> {
    let now = SystemTime::now();
    match due(message, now) {
        Ok(due) => {
            let left = due?.duration_since(now).ok().filter(|left| !left.is_zero())?;
            Some(Failure::planned(Cause::Scheduled, Plan::hand_back(left), "its time has not come"))
        }
        Err(no_time) => Some(Failure::new(FailureClass::Permanent, Cause::Undecodable, no_time)),
    }
}

pin_project! {
    /// The future of [`Delay`].
    #[project = DelayProject]
    #[derive(Debug)]
    #[allow(missing_docs, reason = "its variants are nobody's business")]
    pub enum DelayFuture<F> {
        #[doc(hidden)]
        NotNow { failure: Option<Failure> },
        #[doc(hidden)]
        Now { #[pin] inner: F },
    }
}

impl<F, R, E> Future for DelayFuture<F>
where
    F: Future<Output = Result<R, E>>,
    R: OutsideDedup,
    E: Into<BoxError>,
{
    type Output = Result<Outcome, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            DelayProject::Now { inner } => {
                inner.poll(cx).map(|answer| answer.map(Into::into).map_err(Into::into))
            }
            DelayProject::NotNow { failure } => match failure.take() {
                Some(failure) => Poll::Ready(Err(failure.into_error())),
                None => Poll::Pending,
            },
        }
    }
}
