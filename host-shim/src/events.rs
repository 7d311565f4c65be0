//! The log of a build: events are stored, then readers are woken.
//!
//! A reader subscribes before it looks, so that nothing falls between replaying and following, and
//! reads from the store alone, at its own pace: a wake carries no event, only that there is one. A
//! slow reader costs one page of events, and nobody waits for it.
//!
//! A build has a channel only while somebody follows it. See [`payload`] for what events say, and `gaps` for those that
//! are not kept any more.

mod gaps;
pub mod payload;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::build::{Build, BuildId, Change, Failure, Millis, Status};
use crate::metrics::Metrics;
use crate::store::{Claimed, Fence, NewEvent, Store, StoreError, StoredEvent};
use crate::traces::Traces;

/// A follower looks at the store again after so long without a wake, and says that it is quiet.
pub const QUIET: Duration = Duration::from_secs(15);
/// Most events of one batch.
const PAGE: u32 = 128;

/// Stores events, counts what they tell, and wakes those who follow.
#[derive(Clone)]
pub struct EventLog {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn Store>,
    quiet: Duration,
    metrics: Metrics,
    traces: Traces,
    /// Of builds that somebody follows.
    channels: Mutex<HashMap<BuildId, watch::Sender<()>>>,
}

impl EventLog {
    /// A log over a store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self::traced(store, QUIET, Traces::default())
    }

    /// A log whose followers report silence after `quiet`.
    pub fn with_quiet(store: Arc<dyn Store>, quiet: Duration) -> Self {
        Self::traced(store, quiet, Traces::default())
    }

    /// The same, with traces of what passes.
    pub fn traced(store: Arc<dyn Store>, quiet: Duration, traces: Traces) -> Self {
        let (metrics, channels) = (Metrics::default(), Mutex::default());
        Self { inner: Arc::new(Inner { store, quiet, metrics, traces, channels }) }
    }

    /// What is counted on the way.
    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// What becomes of traces.
    pub fn traces(&self) -> &Traces {
        &self.inner.traces
    }

    /// A build's VM has said Hello so long after its start.
    pub fn booted(&self, build: &Build, after: Duration) {
        self.inner.metrics.booted(build, after);
        self.inner.traces.booted(build, crate::clock::now());
    }

    /// Stores events, wakes the readers and returns the highest number.
    pub async fn append(&self, id: &BuildId, events: &[NewEvent]) -> Result<u64, StoreError> {
        let stored = self.inner.store.append_events(id, events).await;
        self.inner.metrics.tried(&stored);
        let highest = stored?;
        self.inner.metrics.stored(events);
        self.inner.traces.stored(id, events);
        self.wake(id);
        Ok(highest)
    }

    /// [`Store::claim`], then wakes.
    pub async fn claim(
        &self,
        owner: &str,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Option<Claimed>, StoreError> {
        self.claim_within(owner, now, events, u32::MAX).await
    }

    /// [`Store::claim_within`], then wakes.
    pub async fn claim_within(
        &self,
        owner: &str,
        now: Millis,
        events: &[NewEvent],
        most_mb: u32,
    ) -> Result<Option<Claimed>, StoreError> {
        let claimed = self.inner.store.claim_within(owner, now, events, most_mb).await;
        self.inner.metrics.tried(&claimed);
        let claimed = claimed?;
        if let Some(claimed) = &claimed {
            self.inner.metrics.claimed(&claimed.build, now);
            self.inner.traces.claimed(&claimed.build, now);
            self.inner.metrics.stored(events);
            self.wake(&claimed.build.id);
        }
        Ok(claimed)
    }

    /// [`Store::change`], then wakes.
    pub async fn change(
        &self,
        id: &BuildId,
        fence: Fence,
        change: Change,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Build, StoreError> {
        let changed = self.inner.store.change(id, fence, change, now, events).await;
        self.changed(id, changed, now, events)
    }

    /// [`Store::cancel_queued`], then wakes.
    pub async fn cancel_queued(
        &self,
        id: &BuildId,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Build, StoreError> {
        let changed = self.inner.store.cancel_queued(id, now, events).await;
        self.changed(id, changed, now, events)
    }

    fn changed(
        &self,
        id: &BuildId,
        changed: Result<Build, StoreError>,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Build, StoreError> {
        self.inner.metrics.tried(&changed);
        let build = changed?;
        self.inner.metrics.changed(&build, now);
        self.inner.traces.changed(&build, now);
        self.inner.metrics.stored(events);
        self.wake(id);
        Ok(build)
    }

    /// [`Store::expire_queued`], then wakes.
    pub async fn expire_queued(
        &self,
        before: Millis,
        at_most: u32,
        failure: &Failure,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Vec<BuildId>, StoreError> {
        let store = &self.inner.store;
        let expired = store.expire_queued(before, at_most, failure, now, events).await?;
        for id in &expired {
            self.wake(id);
        }
        Ok(expired)
    }

    /// Wakes those who follow a build, after something was stored without this log.
    pub fn wake(&self, id: &BuildId) {
        if let Some(channel) = self.inner.channels().get(id) {
            channel.send_replace(());
        }
    }

    /// Reads a build's events after a number: what is stored, and with `follow` what comes until
    /// the final status. The build exists; whether it may be read is the caller's business.
    pub fn read(&self, id: &BuildId, after: u64, follow: bool) -> Follower {
        let wakes = follow.then(|| {
            let mut channels = self.inner.channels();
            channels.entry(id.clone()).or_insert_with(|| watch::Sender::new(())).subscribe()
        });
        Follower { log: self.clone(), id: id.clone(), after, wakes, known_final: None }
    }

    /// How many builds have a channel, which is how many are followed.
    pub fn channels(&self) -> usize {
        self.inner.channels().len()
    }
}

impl Inner {
    fn channels(&self) -> MutexGuard<'_, HashMap<BuildId, watch::Sender<()>>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a follower has found.
#[derive(Clone, Debug, PartialEq)]
pub enum Batch {
    /// The next events, at least one, and what is told of those that are gone.
    Events(Vec<StoredEvent>),
    /// Nothing for [`QUIET`].
    Quiet,
    /// There will be no more.
    End,
}

/// A reader of one build's events.
pub struct Follower {
    log: EventLog,
    id: BuildId,
    after: u64,
    /// `None`: what is stored is all that is wanted.
    wakes: Option<watch::Receiver<()>>,
    /// Whether the build was final when it was last looked at, if it was.
    known_final: Option<bool>,
}

impl Follower {
    /// The next batch. Cancel-safe: a call that was dropped has taken nothing.
    pub async fn next(&mut self) -> Result<Batch, StoreError> {
        let quiet_at = Instant::now() + self.log.inner.quiet;
        let mut silent = false;
        loop {
            if let Some(wakes) = &mut self.wakes {
                // Before the look, so that what is stored after it wakes.
                wakes.mark_unchanged();
            }
            let events = self.log.inner.store.events_after(&self.id, self.after, PAGE).await?;
            if let Some(last) = events.last() {
                let before = std::mem::replace(&mut self.after, last.seq);
                let ended =
                    |e: &StoredEvent| payload::status_of(&e.payload).is_some_and(Status::is_final);
                if events.iter().any(ended) {
                    self.known_final = Some(true);
                }
                return Ok(Batch::Events(gaps::told(before, events)));
            }
            let Some(wakes) = &mut self.wakes else {
                return Ok(Batch::End);
            };
            match self.known_final {
                // It was final before this look, which found nothing.
                Some(true) => return Ok(Batch::End),
                // Its end will be an event: one look at the state is enough, until it is quiet.
                None => {
                    let build = self.log.inner.store.build(&self.id).await?;
                    self.known_final = Some(build.is_none_or(|build| build.status.is_final()));
                    continue;
                }
                Some(false) => {}
            }
            if silent {
                return Ok(Batch::Quiet);
            }
            silent = tokio::time::timeout_at(quiet_at, wakes.changed()).await.is_err();
            if silent {
                // A writer elsewhere does not wake: look at both again.
                self.known_final = None;
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let Some(wakes) = self.wakes.take() else { return };
        let mut channels = self.log.inner.channels();
        drop(wakes);
        if channels.get(&self.id).is_some_and(|channel| channel.receiver_count() == 0) {
            channels.remove(&self.id);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
