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

/// What images have left when they were removed, and what it could have been: layers that others have, too, such as those of a common base,
/// stay. Each look at that is work for docker-registry, so as many go at one time as will probably do.
#[derive(Debug, Default)]
struct Yield {
    hoped: u64,
    had: u64,
}

impl Yield {
    /// At the least a part like this is expected, so that what goes at one time grows step by step.
    const LEAST: u64 = 8;

    fn note(&mut self, hoped: u64, had: u64) {
        self.hoped = self.hoped.saturating_add(hoped);
        self.had = self.had.saturating_add(had.min(hoped));
    }

    /// What an image will probably leave that could leave so much.
    fn of(&self, at_most: u64) -> u64 {
        if self.hoped == 0 {
            return at_most;
        }
        let had = self.had.max(self.hoped / Self::LEAST);
        let part = u128::from(at_most) * u128::from(had) / u128::from(self.hoped);
        u64::try_from(part).unwrap_or(at_most)
    }
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
        let mut yielded = Yield::default();
        loop {
            let mut over = self.excess(bound).await?;
            if over == 0 {
                return Ok(true);
            }
            let (before, swept) = (self.removed, self.swept.bytes);
            let mut hoped = 0;
            for id in self.oldest().await? {
                let at_most = self.remove(&id).await?.unwrap_or_default();
                hoped += at_most;
                over = over.saturating_sub(yielded.of(at_most));
                if over == 0 {
                    break;
                }
            }
            if self.removed == before {
                return Ok(false);
            }
            self.sweep().await?;
            yielded.note(hoped, self.swept.bytes - swept);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_leaves_is_taken_from_those_before_it() {
        let mut yielded = Yield::default();
        assert_eq!(yielded.of(100), 100);
        yielded.note(100, 50);
        assert_eq!(yielded.of(100), 50);
        // Other garbage went with it.
        yielded.note(100, 1000);
        assert_eq!(yielded.of(100), 75);
        let mut nothing = Yield::default();
        nothing.note(u64::MAX, 0);
        assert_eq!(nothing.of(80), 9);
        assert_eq!(nothing.of(u64::MAX), u64::MAX / 8);
    }
}
