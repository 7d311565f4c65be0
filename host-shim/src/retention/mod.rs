//! What goes when it is old, or when there is too much of it: logs of finished builds, finished builds, sessions of the audit log; images
//! without a name, blobs that nothing refers to; and directories of builds that have ended.
//!
//! ```text
//! serve: at the start, once a day ──▶ Retention::collect ─┬▶ sessions, builds, logs ─▶ the store, in pieces; its free room back
//! api::gc: POST /gc ────────────────▶ one at a time       ├▶ sources ─▶ directories that no build needs
//! pressure: the disk is too full ───▶                     ├▶ images ─▶ the managed registry
//!                                                         └▶ pressure ─▶ the cache of upstreams, more images
//! ```
//! Upstreams' images have a cache with a bound of its own ([`crate::gateway::upstream`]), and images that have a name are the users'.
//!
//! **Invariant**: nothing of a build that has not ended is removed, and nobody who writes waits for more than one piece.

mod builds;
mod disk;
mod images;
mod logs;
mod pressure;
mod sessions;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use self::disk::Disk;
use self::images::{Bound, Images, ImagesError};
use self::pressure::Stuck;
use crate::build::Millis;
use crate::causes::chain;
use crate::gateway::{Garbage, Upstreams};
use crate::kept::Kept;
use crate::metrics::Metrics;
use crate::sources::Sources;
use crate::store::{Store, StoreError};

const DAY: Duration = Duration::from_hours(24);

/// So many rows go at one time, and are then on the disk: whoever else wants to write does not wait for all of them.
const BATCH: u32 = 1000;

/// For how long, and how much. 0 is for ever, and without a bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// Days that a session stays in the audit log after its end.
    pub sessions_days: u32,
    /// Days that a build's log stays after its end.
    pub logs_days: u32,
    /// Of the logs of all finished builds together.
    pub logs_bytes: u64,
    /// Days that a build stays after its end.
    pub builds_days: u32,
    /// Of the registry's blobs together; what has a name stays all the same.
    pub images_bytes: u64,
}

/// Where room is that others may need more.
#[derive(Clone, Debug, Default)]
pub struct Room {
    /// The managed registry; of another one nothing is removed.
    pub registry: Option<Garbage>,
    /// What is kept of other registries.
    pub upstreams: Option<Upstreams>,
    /// How full the data directory's file system may get.
    pub disk: Option<Disk>,
}

/// What a round has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Lines of logs, those of removed builds too.
    pub log_events: u64,
    /// What they took in the store.
    pub log_bytes: u64,
    /// Finished builds.
    pub builds: u64,
    /// Entries of the audit log.
    pub sessions: u64,
    /// Directories of sources and of what was staged, that no build needs.
    pub sources: u64,
    /// Images without a name.
    pub images: u64,
    /// Blobs of the registry that nothing referred to.
    pub blobs: u64,
    /// What they took.
    pub blob_bytes: u64,
}

/// Removes what is not to be kept. Cheap to clone.
#[derive(Clone)]
pub struct Retention {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn Store>,
    kept: Kept,
    sources: Sources,
    metrics: Metrics,
    keep: Keep,
    room: Room,
    round: Mutex<()>,
    stuck: Stuck,
}

impl Retention {
    /// Of a store. A build whose VM is kept stays with it.
    pub fn new(
        store: Arc<dyn Store>,
        kept: Kept,
        sources: Sources,
        metrics: Metrics,
        keep: Keep,
        room: Room,
    ) -> Self {
        let (round, stuck) = (Mutex::default(), Stuck::default());
        let inner = Inner { store, kept, sources, metrics, keep, room, round, stuck };
        Self { inner: Arc::new(inner) }
    }

    /// A round now, one each day, and one when the disk is too full, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let work = async {
            loop {
                if let Err(error) = self.collect(crate::clock::now()).await {
                    // What is left stays for another day.
                    tracing::error!(error = chain(&error), "what is old cannot be removed");
                }
                let a_day_later = Instant::now() + DAY;
                tokio::select! {
                    () = tokio::time::sleep_until(a_day_later) => {}
                    () = self.presses() => {}
                }
            }
        };
        stop.run_until_cancelled(work).await;
    }

    /// One round; it waits for one that is under way. Where it is dropped or fails, what it has removed is removed.
    pub async fn collect(&self, now: Millis) -> Result<Collected, StoreError> {
        let _alone = self.inner.round.lock().await;
        let mut all = Collected::default();
        let Inner { store, room, .. } = &*self.inner;
        let mut images =
            room.registry.as_ref().map(|registry| Images::new(registry, store.as_ref()));
        let ended = self.round(now, images.as_mut(), &mut all).await;
        // Also where the store fails, as it does when the disk is full.
        if let Err(error) = self.make_room(images.as_mut()).await {
            tracing::error!(error = chain(&error), "what nobody needs in the registry stays");
        }
        if let Some(Images { removed, swept, .. }) = images {
            (all.images, all.blobs, all.blob_bytes) = (removed, swept.blobs, swept.bytes);
        }
        self.inner.metrics.removed(&all);
        if all != Collected::default() {
            let Collected { log_events, log_bytes, builds, sessions, sources, .. } = all;
            let Collected { images, blobs, blob_bytes, .. } = all;
            tracing::info!(
                log_events,
                log_bytes,
                builds,
                sessions,
                sources,
                images,
                blobs,
                blob_bytes,
                "removed what was old"
            );
        }
        ended.map(|()| all)
    }

    async fn round(
        &self,
        now: Millis,
        images: Option<&mut Images<'_>>,
        all: &mut Collected,
    ) -> Result<(), StoreError> {
        let Inner { store, kept, sources, keep, .. } = &*self.inner;
        let store = store.as_ref();
        all.sessions = sessions::forget(store, keep.sessions_days, now).await?;
        builds::remove(store, kept, keep.builds_days, now, images, all).await?;
        logs::remove(store, keep, now, all).await?;
        all.sources = sources.sweep(store).await?;
        // Also what an earlier round left that was cut off.
        while store.shrink().await? {}
        Ok(())
    }

    /// In the registry, and then wherever the disk needs it: also where the registry fails.
    async fn make_room(&self, mut images: Option<&mut Images<'_>>) -> Result<(), ImagesError> {
        let usual = match &mut images {
            Some(images) => self.in_registry(images).await,
            None => Ok(()),
        };
        usual.and(self.relieve(images).await)
    }

    async fn in_registry(&self, images: &mut Images<'_>) -> Result<(), ImagesError> {
        images.sweep().await?;
        let bytes = self.inner.keep.images_bytes;
        if bytes > 0 && !images.shrink(Bound::Bytes(bytes)).await? {
            tracing::warn!(
                bytes,
                "the registry is larger than --keep-images-gb, and nothing else of it may be removed"
            );
        }
        Ok(())
    }
}

/// When what is just so many days old was new; `None` where all stays for ever.
fn days_ago(days: u32, now: Millis) -> Option<Millis> {
    (days > 0).then(|| now.saturating_sub(i64::from(days) * 24 * 60 * 60 * 1000))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
