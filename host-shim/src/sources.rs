//! The directories of builds, `<data>/builds/<id>`: a build's source, and what it stages.
//!
//! One is made before its build is in the store, when the source begins to come, and goes before the build's end is stored.
//! What a crash, or a disk that failed, left all the same is swept, also while sources come: those are known by name.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::fs::DirBuilder;

use crate::build::BuildId;
use crate::store::{Store, StoreError};

/// The directories of a server's builds. Cheap to clone; clones know the same sources.
#[derive(Clone, Debug)]
pub struct Sources {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    /// Whose sources are coming: from before there is a directory until there is a build, or no directory any more.
    coming: Mutex<HashSet<BuildId>>,
}

impl Sources {
    /// Those in a directory, which is made with the first of them.
    pub fn new(dir: PathBuf) -> Self {
        Self { inner: Arc::new(Inner { dir, coming: Mutex::default() }) }
    }

    /// Where all of them are.
    pub(crate) fn root(&self) -> &Path {
        &self.inner.dir
    }

    /// A build's.
    pub fn of(&self, id: &BuildId) -> PathBuf {
        self.inner.dir.join(id.as_str())
    }

    /// Makes the directory of a build that is not in the store yet.
    pub(crate) async fn begin(&self, id: &BuildId) -> io::Result<Coming> {
        if !self.coming().insert(id.clone()) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        // From here on it is forgotten however this ends; there is nothing to remove yet.
        let mut coming = Coming { sources: self.clone(), id: id.clone(), stays: true };
        DirBuilder::new().recursive(true).mode(0o700).create(self.root()).await?;
        DirBuilder::new().mode(0o700).create(self.of(id)).await?;
        coming.stays = false;
        Ok(coming)
    }

    /// Removes the directories that no build needs: of sources that were cut off, and of builds that have ended. How many
    /// there were.
    pub async fn sweep(&self, store: &dyn Store) -> Result<u64, StoreError> {
        let io = |source: io::Error| StoreError::Database {
            operation: "sweep partial sources",
            source: source.into(),
        };
        let mut removed = 0;
        let mut entries = match tokio::fs::read_dir(self.root()).await {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(io(error)),
        };
        while let Some(entry) = entries.next_entry().await.map_err(io)? {
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|name| BuildId::new(name).ok()) else { continue };
            // In this order: what does not come any more is in the store, if it is to stay.
            let comes = self.coming().contains(&id);
            if comes || store.build(&id).await?.is_some_and(|build| !build.status.is_final()) {
                continue;
            }
            match tokio::fs::remove_dir_all(entry.path()).await {
                Ok(()) => removed += 1,
                // Whoever ended the build was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io(error)),
            }
        }
        Ok(removed)
    }

    fn coming(&self) -> MutexGuard<'_, HashSet<BuildId>> {
        // Every change is a single step, so a panic elsewhere leaves nothing half done.
        self.inner.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A directory whose build is not in the store. It goes when this is dropped, unless it [stays](Self::stay).
#[derive(Debug)]
pub(crate) struct Coming {
    sources: Sources,
    id: BuildId,
    stays: bool,
}

impl Coming {
    /// Where it is.
    pub(crate) fn path(&self) -> PathBuf {
        self.sources.of(&self.id)
    }

    /// A build stands on it now.
    pub(crate) fn stay(mut self) {
        self.stays = true;
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        let path = self.path();
        if !self.stays
            && let Err(error) = std::fs::remove_dir_all(&path)
        {
            tracing::warn!(path = %path.display(), %error, "a partial source cannot be removed");
        }
        self.sources.coming().remove(&self.id);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::build::tests::queued;
    use crate::store::sqlite::SqliteStore;

    fn id(name: &str) -> BuildId {
        BuildId::new(name).unwrap()
    }

    #[tokio::test]
    async fn a_directory_is_made_once_and_goes_unless_it_is_to_stay() {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources::new(dir.path().join("builds"));
        let first = sources.begin(&id("b1")).await.unwrap();
        let twice = sources.begin(&id("b1")).await.unwrap_err();
        assert_eq!(twice.kind(), io::ErrorKind::AlreadyExists);
        assert!(first.path().exists());
        drop(first);
        assert!(!sources.of(&id("b1")).exists());
        sources.begin(&id("b1")).await.unwrap().stay();
        assert!(sources.begin(&id("b1")).await.is_err(), "what is there is not taken");
        assert!(sources.of(&id("b1")).exists() && sources.coming().is_empty());
    }

    #[tokio::test]
    async fn a_sweep_takes_what_no_build_stands_on() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        let sources = Sources::new(dir.path().join("builds"));
        assert_eq!(sources.sweep(&store).await.unwrap(), 0);
        let coming = sources.begin(&id("coming")).await.unwrap();
        std::fs::create_dir_all(sources.of(&id("lost")).join("staging")).unwrap();
        std::fs::create_dir_all(sources.root().join("Not-An-Id")).unwrap();
        let build = queued();
        let of_build = sources.begin(&build.id).await.unwrap();
        assert_eq!(sources.sweep(&store).await.unwrap(), 1);
        assert!(coming.path().exists() && sources.root().join("Not-An-Id").exists());

        store.insert_build(&build, &[], None, &[]).await.unwrap();
        of_build.stay();
        assert_eq!(sources.sweep(&store).await.unwrap(), 0, "it waits");
        assert!(sources.of(&build.id).exists());
        store.cancel_queued(&build.id, 20, &[]).await.unwrap();
        assert_eq!(sources.sweep(&store).await.unwrap(), 1);
        assert!(!sources.of(&build.id).exists() && !sources.of(&id("lost")).exists());
    }
}
