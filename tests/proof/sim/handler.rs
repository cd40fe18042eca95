//! The handler: plays the story of its message, and leaves an effect where it succeeds.

use std::future::pending;
use std::sync::Arc;

use guestlist::{BoxFuture, CancellationToken, Failure, Handled, Message};
use tokio::time::sleep;

use super::plan::{Ending, Plan, Step};
use super::process::Process;
use super::truth::Started;

pub(super) fn of(
    process: &Arc<Process>,
) -> impl Fn(Message, CancellationToken) -> BoxFuture<Handled> + Clone + Send + Sync + 'static {
    let process = Arc::clone(process);
    move |message, cancel| {
        let process = Arc::clone(&process);
        Box::pin(async move { run(&process, message, cancel).await })
    }
}

async fn run(process: &Arc<Process>, message: Message, cancel: CancellationToken) -> Handled {
    if process.is_dead() {
        pending::<()>().await;
    }
    let world = &process.world;
    // In the same instant in which the layer looked at its lease.
    let run = world.truth.starts(process, &message);
    let step = step_of(process, &message, &run);
    process.point("crash in a handler").await;
    let work = async {
        sleep(step.takes).await;
        process.alive().await;
    };
    if step.heeds {
        tokio::select! {
            biased;
            () = cancel.cancelled() => return ends(process, &run, "heeds the loss of its claim", Err("no claim".into())),
            () = work => {}
        }
    } else {
        work.await;
    }
    process.point("crash in a handler").await;
    end(process, &run, step).await
}

fn step_of(process: &Process, message: &Message, run: &Started) -> Step {
    let steps = &process.world.plan.stories[run.id].steps;
    if message.generation() > 0 {
        return Plan::repaired();
    }
    steps[run.number.min(steps.len() - 1)]
}

async fn end(process: &Arc<Process>, run: &Started, step: Step) -> Handled {
    let world = &process.world;
    match step.end {
        Ending::Ok => {
            world.truth.succeeds(process, run);
            ends(process, run, "succeeds", Ok(()))
        }
        Ending::Transient => ends(process, run, "fails", Err(Failure::transient("busy"))),
        Ending::Permanent => ends(process, run, "fails for good", Err(Failure::permanent("never"))),
        Ending::Defer(after) => ends(process, run, "defers", Err(Failure::defer(after))),
        Ending::Panic => {
            world.log.handler(process.number, run.id, run.attempt, "panics");
            world.log.fault(Some(process.number), "handler panics");
            // Not `panic!`: the hook need not hear of it.
            std::panic::resume_unwind(Box::new("as planned"))
        }
        Ending::Never => {
            world.log.fault(Some(process.number), "handler never ends");
            pending().await
        }
        Ending::Crash => {
            world.log.fault(Some(process.number), "handler kills its process");
            process.crash();
            pending().await
        }
    }
}

fn ends(process: &Process, run: &Started, how: &'static str, end: Handled) -> Handled {
    process.world.log.handler(process.number, run.id, run.attempt, how);
    if end.is_err() {
        process.world.log.fault(Some(process.number), "handler fails");
    }
    end
}
