//! [`Walk`]: letter by letter, as a stream.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::SystemTime;

use async_trait::async_trait;
use futures_core::Stream;

use super::{Fate, Filter, Listed, Summary};
use crate::broker::Letters;
use crate::delivery::BoxFuture;
use crate::identity::Ids;
use crate::{CancellationToken, Error};

/// A walk over the letters that were there when it began: a [`Stream`](futures_core::Stream) with one letter in memory at a time.
///
/// It works when it is asked for the next letter, and ends after the last one, after an error, at its limit, or when it
/// is cancelled. Dropped, it leaves behind what it has not removed; a letter in flight may have been published already.
///
/// ```
/// # use guestlist::admin::{Admin, Filter};
/// # async fn list(admin: Admin) -> guestlist::Result {
/// let mut letters = admin.letters(Filter::new()).await?;
/// while let Some(letter) = letters.next().await {
///     println!("{}", letter?);
/// }
/// # Ok(()) }
/// ```
#[must_use = "a walk does nothing unless it is asked for its letters"]
pub struct Walk<T> {
    stage: Stage<T>,
    summary: Summary,
}

/// Where a walk is between two polls. Boxed futures that own the walk, since a stream of ours has no name for them.
enum Stage<T> {
    Resting(Box<dyn Steps<T>>),
    Stepping(Stepping<T>),
    Over,
}

/// One step, which gives the walk back.
type Stepping<T> = BoxFuture<(Box<dyn Steps<T>>, Result<Met<T>, Error>)>;

/// What one step came to.
pub(super) enum Met<T> {
    /// A letter that was not meant.
    Other,
    /// A letter that was, and what became of it.
    Letter(T, Option<Fate>),
    /// The limit is reached, or the walk is cancelled.
    Stopped,
    /// No more letters.
    End,
}

/// A walk that can be asked for one step.
#[async_trait]
pub(super) trait Steps<T>: Send {
    async fn step(&mut self) -> Result<Met<T>, Error>;
}

/// What is done to each letter that is meant.
#[async_trait]
pub(super) trait Act: Send + 'static {
    type Item: Send + 'static;

    /// Ends when it is time for another letter.
    async fn ready(&mut self) {}

    async fn treat(
        &mut self,
        letter: Listed,
        letters: &mut dyn Letters,
    ) -> Result<(Self::Item, Option<Fate>), Error>;
}

/// How far a walk goes at most.
#[derive(Clone, Debug, Default)]
pub(super) struct Bounds {
    pub(super) limit: Option<u64>,
    pub(super) until: CancellationToken,
}

/// A walk with its filter and its act.
pub(super) struct Round<A> {
    pub(super) letters: Option<Box<dyn Letters>>,
    pub(super) filter: Filter,
    pub(super) ids: Ids,
    pub(super) begun: SystemTime,
    pub(super) bounds: Bounds,
    pub(super) act: A,
}

#[async_trait]
impl<A: Act> Steps<A::Item> for Round<A> {
    async fn step(&mut self) -> Result<Met<A::Item>, Error> {
        if self.stopped().await {
            return self.close(Met::Stopped).await;
        }
        let Some(letters) = &mut self.letters else {
            return Ok(Met::Stopped);
        };
        let Some(letter) = letters.next().await? else {
            return self.close(Met::End).await;
        };
        let letter = Listed::new(letter, &self.ids);
        if !self.filter.fits(&letter, self.begun) {
            return Ok(Met::Other);
        }
        let (item, fate) = self.act.treat(letter, &mut **letters).await?;
        self.count(fate);
        Ok(Met::Letter(item, fate))
    }
}

impl<A: Act> Round<A> {
    /// Between two letters: nothing is in flight.
    async fn stopped(&mut self) -> bool {
        let ready = self.bounds.until.run_until_cancelled(self.act.ready()).await;
        ready.is_none() || self.bounds.until.is_cancelled() || self.bounds.limit == Some(0)
    }

    fn count(&mut self, fate: Option<Fate>) {
        if let (Some(left), Some(Fate::Redriven | Fate::Discarded)) = (&mut self.bounds.limit, fate) {
            *left -= 1;
        }
    }

    async fn close<T>(&mut self, met: Met<T>) -> Result<Met<T>, Error> {
        if let Some(letters) = self.letters.take() {
            letters.close().await?;
        }
        Ok(met)
    }
}

impl<T: Send + 'static> Walk<T> {
    pub(super) fn new(steps: impl Steps<T> + 'static) -> Self {
        Self { stage: Stage::Resting(Box::new(steps)), summary: Summary::default() }
    }

    /// The next letter.
    ///
    /// # Errors
    ///
    /// The broker or the store did not answer, or refused. The walk is over then, and nothing is lost: another one
    /// begins where this one ended.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropped before it ends, it goes on at the next call.
    pub async fn next(&mut self) -> Option<Result<T, Error>> {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// What has become of the letters so far.
    pub fn summary(&self) -> Summary {
        self.summary
    }

    /// Walks to the end.
    ///
    /// # Errors
    ///
    /// As for [`next`](Self::next).
    ///
    /// # Cancel safety
    ///
    /// Dropped before it ends, it has done what it has done; another walk goes on.
    pub async fn finish(mut self) -> Result<Summary, Error> {
        while let Some(letter) = self.next().await {
            letter?;
        }
        Ok(self.summary)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<T, Error>>> {
        loop {
            let mut stepping = match std::mem::replace(&mut self.stage, Stage::Over) {
                Stage::Over => return Poll::Ready(None),
                Stage::Resting(walk) => step(walk),
                Stage::Stepping(stepping) => stepping,
            };
            let Poll::Ready((walk, met)) = stepping.as_mut().poll(cx) else {
                self.stage = Stage::Stepping(stepping);
                return Poll::Pending;
            };
            match met {
                Ok(Met::Other) => self.summary.passed_over += 1,
                Ok(Met::Letter(letter, fate)) => {
                    self.summary.count(fate);
                    self.stage = Stage::Resting(walk);
                    return Poll::Ready(Some(Ok(letter)));
                }
                Ok(Met::Stopped) => return Poll::Ready(None),
                Ok(Met::End) => {
                    self.summary.whole = true;
                    return Poll::Ready(None);
                }
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
            self.stage = Stage::Resting(walk);
        }
    }
}

fn step<T: Send + 'static>(mut walk: Box<dyn Steps<T>>) -> Stepping<T> {
    Box::pin(async move {
        let met = walk.step().await;
        (walk, met)
    })
}

impl<T: Send + 'static> Stream for Walk<T> {
    type Item = Result<T, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll(cx)
    }
}

impl<T> fmt::Debug for Walk<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walk").field("summary", &self.summary).finish_non_exhaustive()
    }
}
