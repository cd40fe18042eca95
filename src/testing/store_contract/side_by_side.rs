//! Runs cases side by side in one task: most of their time they wait.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

/// A case that runs.
pub(super) struct Case<'a> {
    name: &'static str,
    run: Pin<Box<dyn Future<Output = ()> + Send + 'a>>,
}

impl<'a> Case<'a> {
    pub(super) fn new(name: &'static str, run: Pin<Box<dyn Future<Output = ()> + Send + 'a>>) -> Self {
        Self { name, run }
    }

    /// Names itself if its promise is broken: among fifty that run, a panic alone does not say whose it is.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match catch_unwind(AssertUnwindSafe(|| self.run.as_mut().poll(cx))) {
            Ok(poll) => poll,
            Err(panic) => {
                println!("store contract: BROKEN: {}", self.name);
                resume_unwind(panic)
            }
        }
    }

    fn has_ended(&mut self, cx: &mut Context<'_>) -> bool {
        let ended = self.poll(cx).is_ready();
        if ended {
            println!("store contract: {}", self.name);
        }
        ended
    }
}

/// Ends when all of them have.
pub(super) async fn side_by_side(mut cases: Vec<Case<'_>>) {
    poll_fn(|cx| {
        cases.retain_mut(|case| !case.has_ended(cx));
        if cases.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// One after the other.
pub(super) async fn in_turn(cases: Vec<Case<'_>>) {
    for case in cases {
        side_by_side(vec![case]).await;
    }
}
