//! When the disk is fuller than it may be, a round does more than what is usual.
//!
//! ```text
//! each minute: is it too full? ─▶ a round ─▶ still? ─▶ the cache of upstreams, least recently used first
//!                                            still? ─▶ images without a name of finished builds, oldest first
//!                                            still? ─▶ nothing else may go: it is said once
//! ```

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::images::{Bound, Images, ImagesError};
use super::{Inner, Retention};
use crate::causes::chain;

/// Where nothing could be removed, blobs are old enough some time later.
const AGAIN: Duration = Duration::from_hours(1);

/// Since when the last round could not remove enough; `None` while one could.
#[derive(Debug, Default)]
pub(super) struct Stuck(Mutex<Option<Instant>>);

impl Stuck {
    fn since(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it was before.
    fn set(&self, since: Option<Instant>) -> Option<Instant> {
        std::mem::replace(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner), since)
    }
}

impl Retention {
    /// Waits until the disk is too full and a round may help.
    pub(super) async fn presses(&self) {
        let Some(disk) = &self.inner.room.disk else { return std::future::pending().await };
        loop {
            tokio::time::sleep(disk.look).await;
            match self.may_help().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(error = chain(&error), "cannot look after the disk");
                }
            }
        }
    }

    async fn may_help(&self) -> Result<bool, ImagesError> {
        let Inner { room, store, stuck, .. } = &*self.inner;
        if room.disk.as_ref().map_or(Ok(0), super::Disk::excess)? == 0 {
            return Ok(false);
        }
        // A round is work: docker-registry reads every manifest.
        if stuck.since().is_none_or(|since| since.elapsed() >= AGAIN)
            || room.upstreams.as_ref().is_some_and(|upstreams| !upstreams.keep_nothing())
        {
            return Ok(true);
        }
        let Some(registry) = &room.registry else { return Ok(false) };
        Ok(!Images::new(registry, store.as_ref()).oldest().await?.is_empty())
    }

    /// Removes what is not needed as much as room, while the disk is too full.
    pub(super) async fn relieve(&self, images: Option<&mut Images<'_>>) -> Result<(), ImagesError> {
        let Inner { room, stuck, .. } = &*self.inner;
        let Some(disk) = &room.disk else { return Ok(()) };
        let over = disk.excess()?;
        if over == 0 {
            stuck.set(None);
            return Ok(());
        }
        let given_up = match room.upstreams.clone() {
            Some(upstreams) => tokio::task::spawn_blocking(move || upstreams.give_up(over)).await,
            None => Ok(0),
        };
        let before = images.as_ref().map_or(0, |images| images.removed);
        let (enough, removed) = match images {
            Some(images) => {
                let enough = images.shrink(Bound::Disk(disk)).await?;
                (enough, images.removed - before)
            }
            None => (disk.excess()? == 0, 0),
        };
        let given_up = given_up.unwrap_or_default();
        if enough || given_up > 0 || removed > 0 {
            tracing::info!(
                bytes_too_many = over,
                upstream_cache_bytes = given_up,
                images_without_a_name = removed,
                "the disk was fuller than --gc-disk-percent; this was removed"
            );
        }
        if enough {
            stuck.set(None);
        } else if stuck.set(Some(Instant::now())).is_none() {
            tracing::warn!(
                bytes_too_many = disk.excess()?,
                "the disk is fuller than --gc-disk-percent, and nothing else may be removed; make room"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::super::{Disk, Keep, Room};
    use super::*;
    use crate::kept::Kept;
    use crate::metrics::Metrics;
    use crate::sources::Sources;
    use crate::store::sqlite::SqliteStore;

    #[tokio::test(start_paused = true)]
    async fn where_nothing_can_be_removed_it_is_not_tried_each_minute() {
        let dir = tempfile::tempdir().unwrap();
        // Before time is paused for it, a pool would find that it waited for too long.
        tokio::time::resume();
        let store = Arc::new(SqliteStore::open(dir.path()).await.unwrap());
        let at = |percent| {
            let room =
                Room { disk: Some(Disk::new(dir.path().to_owned(), percent)), ..Room::default() };
            let sources = Sources::new(dir.path().join("builds"));
            let (store, kept, metrics) = (store.clone(), Kept::new(1), Metrics::default());
            Retention::new(store, kept, sources, metrics, Keep::default(), room)
        };
        // Any file system is fuller than that.
        let retention = at(0);
        assert!(retention.may_help().await.unwrap());
        retention.collect(1).await.unwrap();
        assert!(!retention.may_help().await.unwrap());
        tokio::time::pause();
        tokio::time::advance(AGAIN).await;
        assert!(retention.may_help().await.unwrap());
        assert!(!at(100).may_help().await.unwrap(), "there is room");
    }
}
