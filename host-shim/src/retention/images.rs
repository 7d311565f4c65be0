//! Images without a name go with their builds, and the oldest while the registry is too large; blobs that nothing refers to go
//! always. Images that have a name are the users' and stay.

use std::collections::HashSet;

use super::Disk;
use crate::build::BuildId;
use crate::gateway::Garbage;
use crate::gateway::managed::{GarbageError, Removed, Swept};
use crate::staging::Digest;
use crate::store::{Store, StoreError};

/// Images could not be removed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImagesError {
    /// The registry's storage.
    #[error(transparent)]
    Garbage(#[from] GarbageError),
    /// Which builds are finished cannot be known.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// How full the disk is cannot be known.
    #[error("cannot find out how full the data directory's file system is")]
    Disk(#[source] std::io::Error),
}

/// How much room may be taken.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bound<'a> {
    /// By the registry's blobs together.
    Bytes(u64),
    /// On the disk, by whatever.
    Disk(&'a Disk),
}

/// What is removed from a registry in one round.
pub(super) struct Images<'a> {
    registry: &'a Garbage,
    store: &'a dyn Store,
    /// So many have gone.
    pub removed: u64,
    /// And these blobs.
    pub swept: Swept,
    /// Of images that this round has removed: their blobs may go at once.
    freed: HashSet<Digest>,
}

impl<'a> Images<'a> {
    pub fn new(registry: &'a Garbage, store: &'a dyn Store) -> Self {
        let (removed, swept, freed) = Default::default();
        Self { registry, store, removed, swept, freed }
    }

    /// Removes the image of a build, if it is one without a name; at most how many bytes the next sweep gets of it, if there was one.
    pub async fn remove(&mut self, id: &BuildId) -> Result<Option<u64>, GarbageError> {
        let Some(Removed { digests, bytes }) = self.registry.remove_nameless(id).await? else {
            return Ok(None);
        };
        self.freed.extend(digests);
        self.removed += 1;
        Ok(Some(bytes))
    }

    /// Removes the blobs that nothing refers to.
    pub async fn sweep(&mut self) -> Result<(), GarbageError> {
        let swept = self.registry.sweep(&self.freed).await?;
        self.swept.blobs += swept.blobs;
        self.swept.bytes += swept.bytes;
        Ok(())
    }

    /// Removes the oldest images without a name until nothing is beyond the bound; whether nothing is.
    pub async fn shrink(&mut self, bound: Bound<'_>) -> Result<bool, ImagesError> {
        loop {
            let mut over = self.excess(bound).await?;
            if over == 0 {
                return Ok(true);
            }
            let before = self.removed;
            for id in self.oldest().await? {
                // No more than that is had back, and less where others have layers of it: then it goes on with the next.
                over = over.saturating_sub(self.remove(&id).await?.unwrap_or_default());
                if over == 0 {
                    break;
                }
            }
            if self.removed == before {
                return Ok(false);
            }
            self.sweep().await?;
        }
    }

    async fn excess(&self, bound: Bound<'_>) -> Result<u64, ImagesError> {
        match bound {
            Bound::Bytes(bytes) => Ok(self.registry.blob_bytes().await?.saturating_sub(bytes)),
            Bound::Disk(disk) => disk.excess(),
        }
    }

    /// The builds whose images may go, the oldest first: they are finished, or not in the store any more.
    pub async fn oldest(&self) -> Result<Vec<BuildId>, ImagesError> {
        let mut finished = Vec::new();
        for id in self.registry.nameless().await? {
            let build = self.store.build(&id).await?;
            if build.is_none_or(|build| build.status.is_final()) {
                finished.push(id);
            }
        }
        Ok(finished)
    }
}
