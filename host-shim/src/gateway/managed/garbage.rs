//! Removes from the managed registry while it runs: images without a name, and blobs that nothing refers to.
//!
//! ```text
//! the gate closes ─▶ mark (docker-registry's dry run) ─▶ less what a manifest of a repository refers to all the same
//!                 ─▶ each: old enough? nobody wants it? ─▶ its directory goes ─▶ the gate opens
//! ```
//! docker-registry looks at its storage for each request, as long as it is configured without a cache: what is removed is
//! gone at once, and whoever pushes it again writes it again.
//!
//! **Invariant**: no blob that a manifest in a repository refers to is removed, tagged or not.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::files::Files;
use super::mark::{digests_in, unreferenced};
use super::storage::Storage;
use super::torn;
use crate::build::BuildId;
use crate::gateway::gate::Gate;
use crate::staging::Digest;

/// How long docker-registry may take to say what nothing refers to: whoever publishes waits for it. It reads some thousand
/// manifests in a second where they are in memory.
const PATIENCE: Duration = Duration::from_mins(10);

/// What can be removed from the managed registry. Cheap to clone.
#[derive(Clone)]
pub struct Garbage {
    program: PathBuf,
    files: Arc<Files>,
    gate: Gate,
}

impl fmt::Debug for Garbage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Garbage").field("dir", &self.files.dir()).finish_non_exhaustive()
    }
}

/// What a sweep has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Of them.
    pub blobs: u64,
    /// Their sizes.
    pub bytes: u64,
}

/// An image that was removed.
#[derive(Clone, Debug, Default)]
pub struct Removed {
    /// What it consisted of, its manifest too: it may be swept however young it is.
    pub digests: HashSet<Digest>,
    /// Of those, at the most that can be had back.
    pub bytes: u64,
}

/// The registry's garbage could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum GarbageError {
    /// docker-registry did not say what nothing refers to.
    #[error("cannot find out which blobs of the registry nothing refers to")]
    Mark(#[source] io::Error),
    /// The storage cannot be read, or not be changed.
    #[error("cannot {operation} in the registry's storage")]
    Storage {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Then what was found out may be wrong.
    #[error("the registry ended while it was found out which of its blobs nothing refers to")]
    Restarted,
}

impl Garbage {
    pub(super) fn new(program: PathBuf, files: Arc<Files>, gate: Gate) -> Self {
        Self { program, files, gate }
    }

    /// The size of all blobs together.
    pub async fn blob_bytes(&self) -> Result<u64, GarbageError> {
        let bytes = self.with("measure blobs", Storage::bytes).await?;
        Ok(bytes.unwrap_or_default())
    }

    /// The builds that have an image without a name, the oldest first.
    pub async fn nameless(&self) -> Result<Vec<BuildId>, GarbageError> {
        let ids = self.with("list images", Storage::nameless).await?;
        Ok(ids.unwrap_or_default())
    }

    /// Removes the image that a build without a name for it has published, with its repository; `None` where there is none. What it
    /// consisted of is there until the next sweep.
    pub async fn remove_nameless(&self, id: &BuildId) -> Result<Option<Removed>, GarbageError> {
        let _none_changes = self.gate.close().await;
        let id = id.clone();
        let removed = self.with("remove an image", move |storage| {
            let digests = consists_of(storage, &id)?;
            if !storage.remove_nameless(&id)? {
                return Ok(None);
            }
            let mut bytes = 0;
            for digest in &digests {
                bytes += storage.blob(digest)?.map_or(0, |blob| blob.size);
            }
            Ok(Some(Removed { digests, bytes }))
        });
        Ok(removed.await?.flatten())
    }

    /// Removes the blobs that nothing refers to, that nobody wants, and that are older than the grace or among the `freed`.
    pub async fn sweep(&self, freed: &HashSet<Digest>) -> Result<Swept, GarbageError> {
        let mut swept = Swept::default();
        // Where nothing was ever pushed docker-registry has nothing to read.
        if self.with("look", |_| Ok(())).await?.is_none() {
            return Ok(swept);
        }
        let _none_changes = self.gate.close().await;
        for digest in self.unreferenced().await? {
            let (grace, is_freed) = (self.gate.grace(), freed.contains(&digest));
            let old = self.with("look at a blob", move |storage| {
                Ok(storage.blob(&digest)?.filter(|blob| is_freed || blob.is_older(grace)))
            });
            let Some(blob) = old.await?.flatten() else { continue };
            let Some(none_begins) = self.gate.may_go(&digest).await else { continue };
            let removed = self.with("remove a blob", move |storage| {
                // As long as it takes, also where nobody waits for it any more.
                let _none_begins = none_begins;
                storage.remove_blob(&digest)
            });
            removed.await?;
            swept.blobs += 1;
            swept.bytes += blob.size;
        }
        Ok(swept)
    }

    /// What docker-registry says, less what it may have missed. It leaves out a repository in which no layer was ever pushed, which
    /// an index may be alone in; and where a file is gone that it had listed, the rest of the repository.
    async fn unreferenced(&self) -> Result<Vec<Digest>, GarbageError> {
        let sweeps = self.files.sweeps();
        let marked = timeout(PATIENCE, unreferenced(&self.program, &self.files)).await;
        let marked = marked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let mut marked = marked.map_err(GarbageError::Mark)?;
        if marked.is_empty() {
            return Ok(marked);
        }
        let (dir, identity) = (self.files.dir().to_owned(), self.files.identity);
        let linked = spawn_blocking(move || torn::manifests(&dir, identity)).await;
        let linked = linked.unwrap_or_else(|error| Err(io::Error::other(error)));
        let linked = linked.map_err(failed("list manifests"))?;
        let missed: Vec<_> = marked.iter().filter(|one| linked.contains(one)).copied().collect();
        if !missed.is_empty() {
            tracing::debug!(manifests = missed.len(), "manifests that docker-registry had missed");
            let spared = self.with("read manifests", move |storage| {
                let mut spared = HashSet::new();
                for digest in missed {
                    spared.extend(digests_in(&storage.manifest(&digest)?));
                    spared.insert(digest);
                }
                Ok(spared)
            });
            let spared = spared.await?.unwrap_or_default();
            marked.retain(|digest| !spared.contains(digest));
        }
        // Files that a registry had not written when it died are removed before the next one.
        if self.files.sweeps() == sweeps { Ok(marked) } else { Err(GarbageError::Restarted) }
    }

    /// `None` where nothing was ever pushed.
    async fn with<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Storage) -> io::Result<T> + Send + 'static,
    ) -> Result<Option<T>, GarbageError> {
        let dir = self.files.dir().to_owned();
        let done =
            spawn_blocking(move || Storage::open(&dir)?.map(|storage| work(&storage)).transpose());
        let done = done.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        done.map_err(failed(operation))
    }
}

/// The manifests of an image, and what they refer to.
fn consists_of(storage: &Storage, id: &BuildId) -> io::Result<HashSet<Digest>> {
    let mut digests = HashSet::new();
    for manifest in storage.manifests(id)? {
        digests.extend(digests_in(&storage.manifest(&manifest)?));
        digests.insert(manifest);
    }
    Ok(digests)
}

fn failed(operation: &'static str) -> impl FnOnce(io::Error) -> GarbageError {
    move |source| GarbageError::Storage { operation, source }
}
