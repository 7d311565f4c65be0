//! The log of a build: events are stored, then readers are woken.
//!
//! ```text
//! append ─▶ the store ─▶ wake ─▶ the build's reader ─▶ Recent ─▶ followers that are up to date: shared blocks
//!               └──────────────────────────────────────────────▶ followers that are behind: pages of their own
//! ```
//!
//! Everything is read from the store, in order: a wake carries no event, only that there is one. For those who have seen all
//! that was stored it is read and made into text once, by a task of the build's, however many they are; they take it at their own pace. Who
//! comes later, or falls behind what is kept (`recent`), reads the store alone until it has come up. So a slow follower
//! costs a page, and nobody waits for it.
//!
//! A follower subscribes before it looks, so that nothing falls between. A build has a channel and its task only while somebody follows
//! it. See [`payload`] for what events say, and `gaps` for those that are not kept any more.

pub mod blocks;
mod gaps;
pub mod payload;
mod recent;
mod waiting;

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use self::blocks::Blocks;
use self::recent::{Look, Recent};
use self::waiting::{Place, Waiting};
use crate::build::{Build, BuildId, Change, Failure, Millis};
use crate::causes::chain;
use crate::metrics::Metrics;
use crate::store::{Claimed, Fence, NewEvent, Store, StoreError};
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
    channels: Mutex<HashMap<BuildId, Arc<Channel>>>,
}

/// What those share who follow one build.
struct Channel {
    /// Something was stored: the channel's task looks.
    stored: watch::Sender<()>,
    shared: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    recent: Recent,
    /// For more in `recent`, or for nothing to be read for all any more.
    waiting: Waiting,
    followers: usize,
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
            channel.stored.send_replace(());
        }
    }

    /// Reads a build's events after a number: what is stored, and with `follow` what comes until
    /// the final status. The build exists; whether it may be read is the caller's business. To be called in a runtime.
    pub fn read(&self, id: &BuildId, after: u64, follow: bool) -> Follower {
        let following = follow.then(|| {
            let mut channels = self.inner.channels();
            let channel = channels.entry(id.clone()).or_insert_with(|| self.channel(id));
            channel.shared().followers += 1;
            Following { channel: Arc::clone(channel), place: Arc::default() }
        });
        Follower { log: self.clone(), id: id.clone(), after, following, known_final: None }
    }

    /// A channel with its task, which ends with it.
    fn channel(&self, id: &BuildId) -> Arc<Channel> {
        let (stored, looks) = watch::channel(());
        let channel = Arc::new(Channel { stored, shared: Mutex::default() });
        let (inner, weak) = (&self.inner, Arc::downgrade(&channel));
        tokio::spawn(read_for_all(Arc::clone(&inner.store), id.clone(), weak, looks));
        tokio::spawn(tell_of_silence(inner.quiet, Arc::downgrade(&channel)));
        channel
    }

    /// How many builds have a channel, which is how many are followed.
    pub fn channels(&self) -> usize {
        self.inner.channels().len()
    }
}

impl Inner {
    fn channels(&self) -> MutexGuard<'_, HashMap<BuildId, Arc<Channel>>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Channel {
    fn shared(&self) -> MutexGuard<'_, Shared> {
        // Every change is whole when the lock is given back.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is after a number.
    fn look(&self, after: u64) -> Look {
        self.shared().recent.look(after)
    }

    /// A follower has seen all up to here that was stored.
    fn begin(&self, at: u64) -> bool {
        let begun = self.shared().recent.begin(at);
        if begun {
            // For what was stored since that follower looked.
            self.stored.send_replace(());
        }
        begun
    }
}

/// Reads what is stored of a build, once for all who follow it.
async fn read_for_all(
    store: Arc<dyn Store>,
    id: BuildId,
    channel: Weak<Channel>,
    mut stored: watch::Receiver<()>,
) {
    // Its sender is the channel's.
    while stored.changed().await.is_ok() {
        loop {
            let Some(channel) = channel.upgrade() else { return };
            let Some(after) = channel.shared().recent.read() else { break };
            match store.events_after(&id, after, PAGE).await {
                Ok(events) if events.is_empty() => break,
                Ok(events) => match Blocks::new(events) {
                    // Where something is missing, what is told of it depends on who asks.
                    Some(blocks) if blocks.seqs().eq(after + 1..=blocks.last()) => {
                        channel.shared().recent.push(after, blocks);
                    }
                    _ => channel.shared().recent.give_up(),
                },
                Err(error) => {
                    // They will find it too, each for itself.
                    tracing::warn!(build = %id, error = %chain(&error), "cannot read events for those who follow");
                    channel.shared().recent.give_up();
                }
            }
            let woken = channel.shared().waiting.all();
            woken.wake();
        }
    }
}

/// Wakes those who have waited for so long.
async fn tell_of_silence(quiet: Duration, channel: Weak<Channel>) {
    let mut at = Instant::now() + quiet;
    loop {
        sleep_until(at).await;
        let Some(channel) = channel.upgrade() else { return };
        let now = Instant::now();
        let mut shared = channel.shared();
        let due = shared.waiting.due(now);
        // Whoever begins to wait from now on has still so long.
        at = shared.waiting.first().unwrap_or(now + quiet).min(now + quiet);
        drop(shared);
        due.wake();
    }
}

/// What a follower has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Batch {
    /// The next events, and what is told of those that are gone.
    Events(Blocks),
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
    following: Option<Following>,
    /// Whether the build was final when it was last looked at, if it was.
    known_final: Option<bool>,
}

/// How a follower hears of more.
struct Following {
    channel: Arc<Channel>,
    place: Arc<Place>,
}

impl Follower {
    /// The next batch. Cancel-safe: a call that was dropped has taken nothing.
    pub async fn next(&mut self) -> Result<Batch, StoreError> {
        let quiet_at = Instant::now() + self.log.inner.quiet;
        let mut silent = false;
        loop {
            if let Some(following) = &mut self.following {
                let look = if silent {
                    // A writer elsewhere does not wake: the store itself is looked at.
                    Look::Unknown
                } else {
                    following.channel.look(self.after)
                };
                match look {
                    Look::Found(blocks) => return Ok(self.found(blocks)),
                    Look::Ended => return Ok(Batch::End),
                    // Whoever began to read for all knew that the build had not ended, and its end would have been read. One who has seen
                    // that end (alone, and before that) is not to wait for it.
                    Look::Nothing if self.known_final != Some(true) => {
                        silent = following.hears_nothing(self.after, quiet_at).await;
                        if silent {
                            self.known_final = None;
                        }
                        continue;
                    }
                    Look::Nothing | Look::Unknown => {}
                }
            }
            let events = self.log.inner.store.events_after(&self.id, self.after, PAGE).await?;
            if let Some(blocks) = Blocks::new(gaps::told(self.after, events)) {
                if let Some(following) = self.following.as_ref().filter(|_| silent) {
                    following.channel.stored.send_replace(());
                }
                return Ok(self.found(blocks));
            }
            let Some(following) = &mut self.following else {
                return Ok(Batch::End);
            };
            match self.known_final {
                // It was final before this look, which found nothing.
                Some(true) => return Ok(Batch::End),
                // Its end will be an event: one look at the state is enough, until it is quiet.
                None => {
                    let build = self.log.inner.store.build(&self.id).await?;
                    self.known_final = Some(build.is_none_or(|build| build.status.is_final()));
                }
                Some(false) if silent => return Ok(Batch::Quiet),
                Some(false) => {
                    let channel = &following.channel;
                    if !channel.begin(self.after) && channel.look(self.after) == Look::Unknown {
                        // There was more, and it has gone: so has the build, or soon.
                        self.known_final = None;
                    }
                }
            }
        }
    }

    fn found(&mut self, blocks: Blocks) -> Batch {
        self.after = blocks.last();
        if blocks.is_final() {
            self.known_final = Some(true);
        }
        Batch::Events(blocks)
    }
}

impl Following {
    /// Waits until there is something after a number, or until then. Whether there was nothing.
    async fn hears_nothing(&self, after: u64, until: Instant) -> bool {
        poll_fn(|context| {
            let mut shared = self.channel.shared();
            if shared.recent.look(after) != Look::Nothing {
                return Poll::Ready(false);
            }
            if Instant::now() >= until {
                return Poll::Ready(true);
            }
            shared.waiting.enter(&self.place, context.waker(), until);
            Poll::Pending
        })
        .await
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let Some(Following { channel, place }) = self.following.take() else { return };
        place.leave();
        let mut channels = self.log.inner.channels();
        let mut shared = channel.shared();
        shared.followers -= 1;
        if shared.followers == 0
            && channels.get(&self.id).is_some_and(|one| Arc::ptr_eq(one, &channel))
        {
            channels.remove(&self.id);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
