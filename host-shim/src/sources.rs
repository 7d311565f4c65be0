//! The directories of builds, `<data>/builds/<id>`: a build's source, and what it stages.
//!
//! One is made before its build is in the store, when the source begins to come, and goes before the build's end is stored.
//! What a crash, or a disk that failed, left all the same is swept, also while sources come: those are known by name.

use std::collections::HashSet;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::spawn_blocking;

use crate::build::BuildId;
use crate::store::{Store, StoreError};

/// What has to be free where sources come.
const ROOM: u64 = 64 << 20;

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
    /// How many have asked for their directories' names to be on the disk, and up to which of them they are.
    asked: AtomicU64,
    synced: tokio::sync::Mutex<u64>,
}

impl Sources {
    /// Those in a directory, which is made with the first of them.
    pub fn new(dir: PathBuf) -> Self {
        let (coming, synced) = (Mutex::default(), tokio::sync::Mutex::default());
        Self { inner: Arc::new(Inner { dir, coming, asked: AtomicU64::new(0), synced }) }
    }

    /// Whether another source may come. What is left below that is for the builds that there are: they have to store how they end.
    pub(crate) fn have_room(&self) -> bool {
        // Before the first of them there is no directory but the one that it will be in.
        let dir = std::iter::once(self.root()).chain(self.root().parent());
        let disk = dir.into_iter().find_map(|dir| rustix::fs::statvfs(dir).ok());
        disk.is_none_or(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= ROOM)
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
        let (root, dir) = (self.root().to_owned(), self.of(id));
        spawn_blocking(move || make(&root, &dir)).await.map_err(io::Error::other)??;
        coming.stays = false;
        Ok(coming)
    }

    /// Returns once the names of all directories that were there when it was called are on the disk. Those who ask at one time wait
    /// for the disk once.
    pub(crate) async fn sync(&self) -> io::Result<()> {
        let ours = self.inner.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut synced = self.inner.synced.lock().await;
        if *synced < ours {
            // Whoever has asked by now has made its directory.
            let all = self.inner.asked.load(Ordering::SeqCst);
            let root = self.root().to_owned();
            let done = spawn_blocking(move || File::open(root)?.sync_all()).await;
            done.map_err(io::Error::other)??;
            *synced = all;
        }
        Ok(())
    }

    /// Removes the directories that no build needs: of sources that were cut off, and of builds that have ended. How many
    /// there were.
    pub async fn sweep(&self, store: &dyn Store) -> Result<u64, StoreError> {
        let io = |source: io::Error| StoreError::Database {
            operation: "sweep partial sources",
            disk: None,
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

/// Makes a directory, and where it is to be with the first of them.
fn make(root: &Path, dir: &Path) -> io::Result<()> {
    let mut private = DirBuilder::new();
    private.mode(0o700);
    match private.create(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            private.recursive(true).create(root)?;
            private.recursive(false).create(dir)
        }
        made => made,
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

    /// Returns once its name is on the disk.
    pub(crate) async fn sync(&self) -> io::Result<()> {
        self.sources.sync().await
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

    #[tokio::test]
    async fn those_who_ask_at_one_time_wait_for_the_disk_together() {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources::new(dir.path().join("builds"));
        assert!(sources.sync().await.is_err(), "there is nothing yet");
        let _coming = sources.begin(&id("b1")).await.unwrap();
        let held = sources.inner.synced.lock().await;
        let mut asking: Vec<_> = (0..3).map(|_| Box::pin(sources.sync())).collect();
        for one in &mut asking {
            assert!(futures_util::poll!(one).is_pending());
        }
        drop(held);
        asking.remove(0).await.unwrap();
        // The first has done it for the others: they need no disk any more.
        std::fs::remove_dir_all(sources.root()).unwrap();
        for one in asking {
            one.await.unwrap();
        }
        assert!(sources.sync().await.is_err(), "what comes later is another matter");
    }
}
