//! What was fetched from upstreams, on the host's disk, by digest; the least recently used goes when there is no room.
//!
//! ```text
//! DIR/tmp/…                       on its way; removed at the start
//! DIR/<registry>/blobs/<hex>      whole, and what its digest says
//! DIR/<registry>/manifests/<hex>  a line with the media type before it
//! ```
//! Each registry has its own: a tenant that may not pull from one gets nothing of it, whatever it knows the digest of.
//! A file has its name only when all of it is there and on the disk, so a crash leaves nothing but `tmp/`. When it
//! was last used is its time of modification, so that a restart forgets no order.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tempfile::NamedTempFile;

use super::error::UpstreamError;
use crate::staging::Digest;

/// What the cache leaves of its file system, as instances' disks do.
const LEFT_FREE: u64 = 1 << 30;
/// Of files on their way.
const TEMPORARY: &str = "tmp";

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Blob,
    Manifest,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Blob, Self::Manifest];

    fn directory(self) -> &'static str {
        match self {
            Self::Blob => "blobs",
            Self::Manifest => "manifests",
        }
    }
}

/// Names a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The registry's directory: its name as it is in a repository's.
    pub registry: Arc<str>,
    pub kind: Kind,
    pub digest: Digest,
}

/// The cache. One process has it: the data directory is locked.
#[derive(Debug)]
pub(super) struct Cache {
    dir: PathBuf,
    limit: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<Key, Entry>,
    /// By when they were last used.
    order: BTreeMap<u64, Key>,
    /// The next place in the order.
    next: u64,
    /// Bytes of the entries.
    kept: u64,
    /// Bytes of what is on its way.
    coming: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    size: u64,
    at: u64,
}

impl Cache {
    /// Takes what is there of these registries, removes the rest, and what is over the limit.
    pub fn open(dir: &Path, limit: u64, registries: &[Arc<str>]) -> Result<Self, UpstreamError> {
        let cache = Self { dir: dir.to_owned(), limit, state: Mutex::default() };
        make_dir(dir)?;
        let known: HashSet<&str> = registries.iter().map(AsRef::as_ref).collect();
        for entry in list(dir)? {
            if !entry.file_name().to_str().is_some_and(|name| known.contains(name)) {
                remove(&entry.path())?;
            }
        }
        make_dir(&dir.join(TEMPORARY))?;
        let mut found = Vec::new();
        for registry in registries {
            make_dir(&dir.join(&**registry))?;
            for kind in Kind::ALL {
                let files = dir.join(&**registry).join(kind.directory());
                make_dir(&files)?;
                for file in list(&files)? {
                    match look(&file) {
                        Some((digest, size, used)) => {
                            let key = Key { registry: Arc::clone(registry), kind, digest };
                            found.push((used, key, size));
                        }
                        None => remove(&file.path())?,
                    }
                }
            }
        }
        found.sort_by_key(|(used, ..)| *used);
        {
            let mut state = cache.state();
            for (_, key, size) in found {
                state.insert(key, size);
            }
            cache.make_room(&mut state, 0);
        }
        Ok(cache)
    }

    /// The file, which then counts as used now.
    pub fn get(&self, key: &Key) -> Option<(File, u64)> {
        let mut state = self.state();
        let size = state.touch(key)?;
        let opened = File::open(self.path(key)).and_then(|file| {
            file.set_modified(SystemTime::now())?;
            Ok((file.metadata()?.len(), file))
        });
        match opened {
            Ok((actual, file)) if actual == size => Some((file, size)),
            other => {
                tracing::warn!(?key, ?other, "a file of the cache of upstreams is gone or changed");
                self.remove_entry(&mut state, key);
                None
            }
        }
    }

    /// Removes what turned out to be something else than its name says.
    pub fn forget(&self, key: &Key) {
        self.remove_entry(&mut self.state(), key);
    }

    /// A place for so many bytes; `None` where there is none even when all that may go has gone. It blocks.
    pub fn place(self: &Arc<Self>, size: u64) -> Result<Option<Place>, UpstreamError> {
        {
            let mut state = self.state();
            if !self.make_room(&mut state, size) {
                return Ok(None);
            }
            state.coming += size;
        }
        let mut place = Place { cache: Arc::clone(self), size, file: None };
        let temporary = self.dir.join(TEMPORARY);
        place.file =
            Some(NamedTempFile::new_in(&temporary).map_err(failed("write to", &temporary))?);
        Ok(Some(place))
    }

    /// Bytes that are kept.
    pub fn kept(&self) -> u64 {
        self.state().kept
    }

    /// Removes the least recently used, so many bytes at least, if there are so many; how many. It blocks.
    pub fn give_up(&self, bytes: u64) -> u64 {
        let mut state = self.state();
        let before = state.kept;
        while before - state.kept < bytes
            && let Some(oldest) = state.order.first_key_value().map(|(_, key)| key.clone())
        {
            self.remove_entry(&mut state, &oldest);
        }
        before - state.kept
    }

    /// Removes the least recently used until there is room for `size` more.
    fn make_room(&self, state: &mut State, size: u64) -> bool {
        loop {
            let within = state.kept.saturating_add(state.coming).saturating_add(size) <= self.limit;
            if within && self.is_free(size) {
                return true;
            }
            // What cannot fit empties nothing for others.
            let fits = state.coming.saturating_add(size) <= self.limit;
            let oldest = state.order.first_key_value().map(|(_, key)| key.clone());
            let Some(oldest) = oldest.filter(|_| fits) else { return false };
            self.remove_entry(state, &oldest);
        }
    }

    fn is_free(&self, size: u64) -> bool {
        rustix::fs::statvfs(&self.dir).is_ok_and(|stat| {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            size == 0 || free >= size.saturating_add(LEFT_FREE)
        })
    }

    fn remove_entry(&self, state: &mut State, key: &Key) {
        if state.remove(key)
            && let Err(error) = fs::remove_file(self.path(key))
        {
            tracing::warn!(%error, ?key, "cannot remove a file of the cache of upstreams");
        }
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(&*key.registry).join(key.kind.directory()).join(key.digest.hex())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn insert(&mut self, key: Key, size: u64) {
        self.remove(&key);
        let at = self.next;
        self.next += 1;
        self.order.insert(at, key.clone());
        self.entries.insert(key, Entry { size, at });
        self.kept += size;
    }

    fn remove(&mut self, key: &Key) -> bool {
        let Some(entry) = self.entries.remove(key) else { return false };
        self.order.remove(&entry.at);
        self.kept -= entry.size;
        true
    }

    fn touch(&mut self, key: &Key) -> Option<u64> {
        let size = self.entries.get(key)?.size;
        self.insert(key.clone(), size);
        Some(size)
    }
}

/// Room for one file, and the file until it has its name.
#[derive(Debug)]
pub(super) struct Place {
    cache: Arc<Cache>,
    size: u64,
    file: Option<NamedTempFile>,
}

impl Place {
    /// The file as it grows.
    pub fn file(&self) -> Result<File, UpstreamError> {
        let file = self.file.as_ref().ok_or(UpstreamError::Broken)?;
        file.as_file().try_clone().map_err(failed("write to", file.path()))
    }

    /// Gives it its name: all of it is there, and is what the digest says. It blocks.
    pub fn keep(mut self, key: &Key) -> Result<(), UpstreamError> {
        let file = self.file.take().ok_or(UpstreamError::Broken)?;
        let path = self.cache.path(key);
        file.as_file().sync_data().map_err(failed("write to", file.path()))?;
        let mut state = self.cache.state();
        file.persist(&path).map_err(|error| failed("name", &path)(error.error))?;
        state.insert(key.clone(), self.size);
        Ok(())
    }

    /// Writes all of it and keeps it. It blocks.
    pub fn keep_bytes(self, key: &Key, parts: &[&[u8]]) -> Result<(), UpstreamError> {
        let mut file = self.file()?;
        for part in parts {
            file.write_all(part).map_err(failed("write to", &self.cache.dir))?;
        }
        self.keep(key)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.cache.state().coming -= self.size;
    }
}

/// The digest, the size, and when it was last used; `None` for what is none of the cache's.
fn look(file: &fs::DirEntry) -> Option<(Digest, u64, SystemTime)> {
    let digest = Digest::parse(&format!("sha256:{}", file.file_name().to_str()?)).ok()?;
    let meta = file.metadata().ok().filter(fs::Metadata::is_file)?;
    Some((digest, meta.len(), meta.modified().ok()?))
}

fn list(dir: &Path) -> Result<Vec<fs::DirEntry>, UpstreamError> {
    fs::read_dir(dir).and_then(Iterator::collect).map_err(failed("read", dir))
}

fn make_dir(dir: &Path) -> Result<(), UpstreamError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(failed("make", dir))
}

fn remove(path: &Path) -> Result<(), UpstreamError> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(failed("remove", path))
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> UpstreamError {
    let path = path.display().to_string();
    move |source| UpstreamError::Cache { operation, path, source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read as _;
    use std::time::Duration;

    use super::*;

    struct Bench {
        dir: tempfile::TempDir,
        registries: Vec<Arc<str>>,
    }

    impl Bench {
        fn new() -> Self {
            let registries = vec![Arc::from("docker.io"), Arc::from("quay.io")];
            Self { dir: tempfile::tempdir().unwrap(), registries }
        }

        fn open(&self, limit: u64) -> Arc<Cache> {
            Arc::new(Cache::open(&self.dir.path().join("cache"), limit, &self.registries).unwrap())
        }

        fn key(&self, content: &[u8]) -> Key {
            let registry = Arc::clone(&self.registries[0]);
            Key { registry, kind: Kind::Blob, digest: Digest::of(content) }
        }

        fn keep(&self, cache: &Arc<Cache>, content: &[u8]) -> bool {
            let place = cache.place(content.len() as u64).unwrap();
            place.map(|place| place.keep_bytes(&self.key(content), &[content]).unwrap()).is_some()
        }
    }

    fn read(cache: &Cache, key: &Key) -> Option<Vec<u8>> {
        let (mut file, size) = cache.get(key)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, size);
        Some(bytes)
    }

    #[test]
    fn the_least_recently_used_goes_when_there_is_no_room() {
        let bench = Bench::new();
        let cache = bench.open(10);
        assert!(bench.keep(&cache, b"1111") && bench.keep(&cache, b"2222"));
        assert_eq!(read(&cache, &bench.key(b"1111")).unwrap(), b"1111");
        assert!(bench.keep(&cache, b"33"), "at the limit");
        assert_eq!(cache.kept(), 10);
        assert!(bench.keep(&cache, b"4"));
        assert!(cache.get(&bench.key(b"2222")).is_none());
        assert!(cache.get(&bench.key(b"1111")).is_some() && cache.get(&bench.key(b"33")).is_some());
        // What is larger than all of it empties nothing.
        assert!(!bench.keep(&cache, b"12345678901"));
        assert_eq!(cache.kept(), 7);
        assert!(bench.keep(&cache, b"1234567890"), "all of it");
        assert_eq!(cache.kept(), 10);
    }

    #[test]
    fn it_gives_up_the_least_recently_used_and_no_more_than_it_must() {
        let bench = Bench::new();
        let cache = bench.open(100);
        for content in [b"1111", b"2222", b"3333"] {
            bench.keep(&cache, content);
        }
        assert!(cache.get(&bench.key(b"1111")).is_some());
        assert_eq!(cache.give_up(0), 0);
        assert_eq!(cache.give_up(5), 8);
        assert!(cache.get(&bench.key(b"1111")).is_some());
        assert!(!cache.path(&bench.key(b"2222")).exists());
        assert_eq!((cache.give_up(5), cache.kept()), (4, 0));
    }

    #[test]
    fn what_is_on_its_way_has_its_room() {
        let bench = Bench::new();
        let cache = bench.open(10);
        let coming = cache.place(8).unwrap().unwrap();
        assert!(!bench.keep(&cache, b"333"));
        drop(coming);
        assert!(bench.keep(&cache, b"333"));
        let temporary = bench.dir.path().join("cache/tmp");
        assert_eq!(fs::read_dir(temporary).unwrap().count(), 0);
    }

    #[test]
    fn a_restart_keeps_what_is_whole_and_its_order() {
        let bench = Bench::new();
        let cache = bench.open(100);
        for content in [b"1111", b"2222", b"3333"] {
            bench.keep(&cache, content);
        }
        let path = |content: &[u8]| cache.path(&bench.key(content));
        let hours = |n: u64| SystemTime::now() - Duration::from_secs(n * 3600);
        for (content, ago) in [(b"1111", 3), (b"2222", 1), (b"3333", 2)] {
            File::open(path(content)).unwrap().set_modified(hours(ago)).unwrap();
        }
        let root = bench.dir.path().join("cache");
        for junk in ["tmp/half", "docker.io/blobs/nonsense", "junk"] {
            fs::write(root.join(junk), "x").unwrap();
        }
        fs::create_dir_all(root.join("gone.example/blobs")).unwrap();
        // Smaller than before: the oldest goes.
        let again = bench.open(8);
        assert_eq!(again.kept(), 8);
        assert!(read(&again, &bench.key(b"1111")).is_none());
        assert!(again.get(&bench.key(b"2222")).is_some());
        for gone in ["tmp/half", "docker.io/blobs/nonsense", "junk", "gone.example"] {
            assert!(!root.join(gone).exists(), "{gone}");
        }
        assert!(!path(b"1111").exists());
    }

    #[test]
    fn registries_do_not_share_and_a_changed_file_is_none() {
        let bench = Bench::new();
        let cache = bench.open(100);
        bench.keep(&cache, b"1111");
        let key = bench.key(b"1111");
        let other = Key { registry: Arc::clone(&bench.registries[1]), ..key.clone() };
        assert!(cache.get(&other).is_none());
        assert!(cache.get(&Key { kind: Kind::Manifest, ..key.clone() }).is_none());
        fs::write(cache.path(&key), b"11").unwrap();
        assert!(cache.get(&key).is_none());
        assert_eq!(cache.kept(), 0);
        assert!(!cache.path(&key).exists());
    }
}
