//! Handlers: async functions of typed arguments.

use std::fmt;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tower_service::Service;

use crate::dedup::protocol::Fence;
use crate::{BoxError, Cause, Failure, FailureClass, Message, MessageId};

/// What a handler returns. `Ok` means done: the id is remembered, the delivery acked.
pub type Handled = Result<(), Failure>;

/// An async function of up to four [arguments](FromMessage).
///
/// The trait says only that it can be called; what the arguments and the answer must be is
/// asked by [`Queue::handler`](crate::Queue::handler), so that a compile error names the culprit.
///
/// ```
/// # use guestlist::{Failure, Message, Queue};
/// async fn handler(message: Message) -> Result<(), Failure> { Ok(()) }
/// # let queue = Queue::new("orders").handler(handler);
/// ```
///
/// An answer of another type: "expected `Result<(), Failure>`, found `Result<(), Error>`".
///
/// ```compile_fail
/// # use guestlist::{Failure, Message, Queue};
/// async fn handler(message: Message) -> Result<(), std::io::Error> { Ok(()) }
/// # let queue = Queue::new("orders").handler(handler);
/// ```
///
/// `Ok` means done, so there is nothing to say with it: a handler that wants another delivery fails.
///
/// ```compile_fail
/// # use guestlist::{Disposition, Failure, Message, Queue};
/// async fn handler(message: Message) -> Result<Disposition, Failure> { Ok(Disposition::Ack) }
/// # let queue = Queue::new("orders").handler(handler);
/// ```
///
/// What is held over an `.await` must be `Send`: "future returned by `handler` is not `Send`".
///
/// ```compile_fail
/// # use guestlist::{Failure, Message, Queue};
/// async fn handler(message: Message) -> Result<(), Failure> {
///     let shared = std::rc::Rc::new(1);
///     std::future::ready(()).await;
///     drop(shared);
///     Ok(())
/// }
/// # let queue = Queue::new("orders").handler(handler);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a guestlist handler",
    label = "expected `async fn(up to four arguments) -> Result<(), Failure>`"
)]
pub trait Handler<Args>: Clone + Send + Sync + 'static {
    /// What the call returns.
    type Future: Future;

    /// Calls the function.
    fn call(&self, args: Args) -> Self::Future;
}

/// The arguments of a handler, made of a message.
pub trait Arguments: Sized {
    /// What they need of the layers around the handler.
    const NEEDS: Needs;

    /// Makes them.
    ///
    /// # Errors
    ///
    /// The failure of the first argument that cannot be made.
    fn from_message(message: &Message) -> Result<Self, Failure>;
}

/// One argument of a handler.
///
/// ```
/// use guestlist::{Failure, FromMessage, Message};
///
/// struct Tenant(String);
///
/// impl FromMessage for Tenant {
///     fn from_message(message: &Message) -> Result<Self, Failure> {
///         let tenant = message.headers().get_str("tenant");
///         tenant.map(|t| Tenant(t.to_owned())).ok_or_else(|| Failure::permanent("no tenant header"))
///     }
/// }
///
/// async fn handler(tenant: Tenant, message: Message) -> Result<(), Failure> { Ok(()) }
/// # let queue = guestlist::Queue::new("q").handler(handler);
/// ```
///
/// Any other type: "`String` cannot be an argument of a guestlist handler".
///
/// ```compile_fail
/// # use guestlist::Failure;
/// async fn handler(body: String) -> Result<(), Failure> { Ok(()) }
/// # let queue = guestlist::Queue::new("q").handler(handler);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an argument of a guestlist handler",
    note = "arguments are `Json<T>`, `Message`, `MessageId`, `Fence`, `Attempt`, `CancellationToken`, and types of your own that implement `FromMessage`"
)]
pub trait FromMessage: Sized {
    /// What it needs of the layers around the handler; checked when the pipeline is built.
    const NEEDS: Needs = Needs::NOTHING;

    /// Makes it.
    ///
    /// # Errors
    ///
    /// A failure, usually a permanent one: the same message will not do better next time.
    fn from_message(message: &Message) -> Result<Self, Failure>;
}

/// What an argument needs of the layers around the handler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Needs {
    /// A claim: the queue must not let messages pass without dedup.
    pub claim: bool,
    /// A cancellation token for each run.
    pub cancellation: bool,
    /// A transaction for each try: the queue must have an [inbox](crate::inbox).
    pub transaction: bool,
}

impl Needs {
    /// Nothing.
    pub const NOTHING: Self = Self { claim: false, cancellation: false, transaction: false };
    /// A claim.
    pub const CLAIM: Self = Self { claim: true, ..Self::NOTHING };
    /// A cancellation token, and so a claim that can be lost.
    pub const CANCELLATION: Self = Self { cancellation: true, ..Self::NOTHING };
    /// A transaction, which completes a claim.
    pub const TRANSACTION: Self = Self { claim: true, transaction: true, ..Self::NOTHING };

    /// What this or the other needs.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self {
            claim: self.claim || other.claim,
            cancellation: self.cancellation || other.cancellation,
            transaction: self.transaction || other.transaction,
        }
    }
}

/// The body as JSON. A body that is not is a permanent failure, cause `undecodable`.
///
/// ```
/// # use guestlist::{Failure, Json, Queue};
/// #[derive(serde::Deserialize)]
/// struct Charge { cents: i64 }
/// async fn handler(Json(charge): Json<Charge>) -> Result<(), Failure> { Ok(()) }
/// # let queue = Queue::new("orders").handler(handler);
/// ```
///
/// A type that cannot be read: "consider adding `#[derive(serde::Deserialize)]`".
///
/// ```compile_fail
/// # use guestlist::{Failure, Json, Queue};
/// struct Charge { cents: i64 }
/// async fn handler(Json(charge): Json<Charge>) -> Result<(), Failure> { Ok(()) }
/// # let queue = Queue::new("orders").handler(handler);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned> FromMessage for Json<T> {
    fn from_message(message: &Message) -> Result<Self, Failure> {
        serde_json::from_slice(message.payload()).map(Json).map_err(|error| undecodable(&error))
    }
}

/// Says where, not what: serde's own text quotes the body, which does not belong in a log.
fn undecodable(error: &serde_json::Error) -> Failure {
    let kind = match error.classify() {
        serde_json::error::Category::Syntax => "not valid JSON",
        serde_json::error::Category::Data => "JSON of another shape than the handler's type",
        serde_json::error::Category::Eof => "JSON that ends early",
        serde_json::error::Category::Io => "unreadable",
    };
    let text = format!("the body is {kind} (line {}, column {})", error.line(), error.column());
    Failure::new(FailureClass::Permanent, Cause::Undecodable, text)
}

impl FromMessage for Message {
    fn from_message(message: &Message) -> Result<Self, Failure> {
        Ok(message.clone())
    }
}

impl FromMessage for MessageId {
    const NEEDS: Needs = Needs::CLAIM;

    fn from_message(message: &Message) -> Result<Self, Failure> {
        message.id().cloned().ok_or_else(|| unclaimed("MessageId"))
    }
}

impl FromMessage for Fence {
    const NEEDS: Needs = Needs::CLAIM;

    fn from_message(message: &Message) -> Result<Self, Failure> {
        message.run().map(|run| run.fence).ok_or_else(|| unclaimed("Fence"))
    }
}

/// Which attempt at this id this is, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt(pub u32);

impl FromMessage for Attempt {
    fn from_message(message: &Message) -> Result<Self, Failure> {
        Ok(Self(message.attempt()))
    }
}

impl FromMessage for CancellationToken {
    const NEEDS: Needs = Needs::CANCELLATION;

    /// Fires when the claim is lost. Without dedup there is none to lose: it never fires.
    fn from_message(message: &Message) -> Result<Self, Failure> {
        Ok(message.run().and_then(|run| run.cancel.clone()).unwrap_or_default())
    }
}

fn unclaimed(argument: &str) -> Failure {
    Failure::permanent(format!("`{argument}` needs a claim, and this message runs without dedup"))
}

macro_rules! handlers {
    ($($arg:ident),*) => {
        impl<H, Fut, $($arg),*> Handler<($($arg,)*)> for H
        where
            H: Fn($($arg),*) -> Fut + Clone + Send + Sync + 'static,
            Fut: Future,
        {
            type Future = Fut;

            #[allow(non_snake_case)]
            fn call(&self, ($($arg,)*): ($($arg,)*)) -> Fut {
                self($($arg),*)
            }
        }

        impl<$($arg: FromMessage),*> Arguments for ($($arg,)*) {
            const NEEDS: Needs = Needs::NOTHING$(.or($arg::NEEDS))*;

            #[allow(unused_variables)]
            fn from_message(message: &Message) -> Result<Self, Failure> {
                Ok(($($arg::from_message(message)?,)*))
            }
        }
    };
}

handlers!();
handlers!(A);
handlers!(A, B);
handlers!(A, B, C);
handlers!(A, B, C, D);

/// A [`Handler`] as a tower service, the innermost of a stack. Always ready.
///
/// ```
/// use guestlist::{Failure, HandlerService, Message};
/// use tower::ServiceExt;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let service = HandlerService::new(async |message: Message| {
///     assert_eq!(message.payload(), "hello");
///     Ok(())
/// });
/// service.oneshot(Message::builder("hello").build()).await.unwrap();
/// # }
/// ```
pub struct HandlerService<H, Args> {
    handler: H,
    args: PhantomData<fn(Args)>,
}

impl<H, Args> HandlerService<H, Args> {
    /// The service of this handler.
    pub fn new(handler: H) -> Self
    where
        H: Handler<Args, Future: Future<Output = Handled> + Send + 'static>,
        Args: Arguments,
    {
        Self { handler, args: PhantomData }
    }
}

impl<H: Clone, Args> Clone for HandlerService<H, Args> {
    fn clone(&self) -> Self {
        Self { handler: self.handler.clone(), args: PhantomData }
    }
}

impl<H, Args> fmt::Debug for HandlerService<H, Args> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HandlerService")
    }
}

impl<H, Args> Service<Message> for HandlerService<H, Args>
where
    H: Handler<Args, Future: Future<Output = Handled> + Send + 'static>,
    Args: Arguments,
{
    type Response = ();
    type Error = BoxError;
    type Future = HandlerFuture<H, Args, H::Future>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, message: Message) -> Self::Future {
        HandlerFuture { state: State::Waiting { handler: self.handler.clone(), message, args: PhantomData } }
    }
}

pin_project! {
    /// The future of a [`HandlerService`]. Arguments are decoded at its first poll, in the task
    /// that runs the handler; a panic in them or in the handler is a failure, cause `panic`.
    pub struct HandlerFuture<H, Args, Fut> {
        #[pin]
        state: State<H, Args, Fut>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<H, Args, Fut> {
        Waiting { handler: H, message: Message, args: PhantomData<fn(Args)> },
        Running { #[pin] future: Fut },
    }
}

impl<H, Args, Fut> fmt::Debug for HandlerFuture<H, Args, Fut> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HandlerFuture")
    }
}

impl<H, Args, Fut> Future for HandlerFuture<H, Args, Fut>
where
    H: Handler<Args, Future = Fut>,
    Args: Arguments,
    Fut: Future<Output = Handled>,
{
    type Output = Result<(), BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let state = self.project().state;
        let step = catch_unwind(AssertUnwindSafe(|| poll_state(state, cx)));
        let handled = match step {
            Ok(poll) => ready!(poll),
            Err(panic) => Err(panicked(&*panic)),
        };
        Poll::Ready(handled.map_err(Failure::into_error))
    }
}

fn poll_state<H, Args, Fut>(mut state: Pin<&mut State<H, Args, Fut>>, cx: &mut Context<'_>) -> Poll<Handled>
where
    H: Handler<Args, Future = Fut>,
    Args: Arguments,
    Fut: Future<Output = Handled>,
{
    if let StateProjection::Waiting { handler, message, .. } = state.as_mut().project() {
        let future = handler.call(Args::from_message(message)?);
        state.set(State::Running { future });
    }
    match state.project() {
        StateProjection::Running { future } => future.poll(cx),
        StateProjection::Waiting { .. } => unreachable!("set to running above"),
    }
}

/// Makes a call and waits for it. A panic in either is a failure, cause `panic`: services of a
/// user's own are caught as handlers are.
pub(crate) async fn caught<F: Future>(call: impl FnOnce() -> F) -> Result<F::Output, Failure> {
    let caught = |panic: Box<dyn std::any::Any + Send>| panicked(&*panic);
    let future = catch_unwind(AssertUnwindSafe(call)).map_err(caught)?;
    let mut future = std::pin::pin!(future);
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(poll) => poll.map(Ok),
        Err(panic) => Poll::Ready(Err(caught(panic))),
    })
    .await
}

/// A panic's text may quote the message; its type is all that is kept unless it is a plain string.
fn panicked(panic: &(dyn std::any::Any + Send)) -> Failure {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let text = format!("the handler panicked: {}", text.unwrap_or("(no text)"));
    Failure::new(FailureClass::Transient, Cause::Panic, text)
}
