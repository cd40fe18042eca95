//! Guards: a claim that is dropped is released, whatever dropped it.

use std::fmt;
use std::sync::Arc;

use super::claims::{Claims, Lease};
use super::protocol::{Before, Release, Run, Token};
use super::suspects::SuspectPermit;
use crate::DedupKey;
use crate::events::{Claimant, EventKind};
use crate::settlement::{Completion, Holder};

/// A claim in hand. It ends by `complete` or `release`; dropped, it is released as last said
/// by [`release_on_drop`](Self::release_on_drop), in a task that outlives whoever dropped it. If
/// even that cannot happen, the lease ends it.
pub(crate) struct HeldClaim {
    claims: Arc<Claims>,
    lease: Arc<Lease>,
    slot: u64,
    attempt: u32,
    before: Before,
    on_drop: End,
    ran: bool,
    ended: bool,
    /// Given back when the end of the claim has been answered.
    permit: Option<SuspectPermit>,
}

/// How a claim ends.
#[derive(Clone, Copy)]
enum End {
    Release(Release),
    Complete,
}

impl HeldClaim {
    pub(crate) fn new(
        claims: Arc<Claims>,
        lease: Arc<Lease>,
        slot: u64,
        attempt: u32,
        before: Before,
        permit: Option<SuspectPermit>,
    ) -> Self {
        let on_drop = End::Release(Release::NotStarted);
        Self { claims, lease, slot, attempt, before, on_drop, ran: false, ended: false, permit }
    }

    pub(crate) fn attempt(&self) -> u32 {
        self.attempt
    }

    /// As the settlement rules ask for it.
    pub(crate) fn holder(&self) -> Holder {
        Holder { attempt: self.attempt, before: self.before, in_force: self.in_force() }
    }

    pub(crate) fn run(&self) -> Run {
        self.lease.run
    }

    /// What events say of it.
    pub(crate) fn claimant(&self) -> Claimant {
        self.lease.claimant()
    }

    pub(crate) fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    /// Whether the handler ran under this claim.
    pub(crate) fn ran(&self) -> bool {
        self.ran
    }

    /// Whether the holder may still act on it.
    pub(crate) fn in_force(&self) -> bool {
        self.lease.in_force()
    }

    /// The handler starts: from here a drop is an interruption.
    pub(crate) fn start(&mut self) {
        self.ran = true;
        self.on_drop = End::Release(Release::Interrupted);
    }

    pub(crate) fn release_on_drop(&mut self, release: Release) {
        self.on_drop = End::Release(release);
    }

    /// Remembers the id as done.
    ///
    /// Dropped in mid-wait, this goes on in the background: the work is done, and to release the
    /// id would be to repeat it.
    pub(crate) async fn complete(mut self) -> Completion {
        self.on_drop = End::Complete;
        self.claims.let_go(self.slot, &self.lease);
        let completion = self.claims.complete(&self.lease).await;
        self.ended = true;
        completion
    }

    /// Gives the claim up, as `why`, and waits for the store's answer: whether it was ours to give up.
    ///
    /// Dropped in mid-wait, the release goes on in the background.
    pub(crate) async fn release(mut self, why: Release) -> bool {
        self.on_drop = End::Release(why);
        self.claims.let_go(self.slot, &self.lease);
        let released = self.claims.release(&self.lease, why).await;
        self.ended = true;
        released
    }
}

impl Drop for HeldClaim {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.claims.let_go(self.slot, &self.lease);
        let (claims, lease, end) = (Arc::clone(&self.claims), Arc::clone(&self.lease), self.on_drop);
        let permit = self.permit.take();
        let ending = async move {
            claims.end(&lease, end).await;
            drop(permit);
        };
        if self.claims.store.in_process().is_some() {
            // Answers at its first poll: no task is needed.
            poll_once(ending);
        } else {
            self.claims.in_background(ending);
        }
    }
}

impl Claims {
    async fn end(&self, lease: &Lease, end: End) {
        match end {
            End::Release(why) => {
                self.release(lease, why).await;
            }
            End::Complete => {
                if self.complete(lease).await == Completion::Recorded {
                    self.events.emit(&lease.message, Some(lease.claimant()), EventKind::Completed);
                }
            }
        }
    }
}

fn poll_once(future: impl Future<Output = ()>) {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let _ = std::pin::pin!(future).poll(&mut context);
}

impl fmt::Debug for HeldClaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldClaim")
            .field("key", &self.lease.key)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

/// A claim that was asked for and not answered. Dropped so, it is released by its token.
pub(crate) struct Unanswered {
    claims: Option<Arc<Claims>>,
    key: DedupKey,
    token: Token,
    permit: Option<SuspectPermit>,
}

impl Unanswered {
    pub(crate) fn new(
        claims: Arc<Claims>,
        key: DedupKey,
        token: Token,
        permit: Option<SuspectPermit>,
    ) -> Self {
        Self { claims: Some(claims), key, token, permit }
    }

    /// The answer came: the permit goes on with the claim.
    pub(crate) fn answered(&mut self) -> Option<SuspectPermit> {
        self.claims = None;
        self.permit.take()
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(claims) = self.claims.take() {
            claims.release_unanswered(self.key, self.token, self.permit.take());
        }
    }
}
