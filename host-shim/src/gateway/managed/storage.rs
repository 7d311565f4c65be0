//! What the managed registry has stored, as Kiln looks at it and removes from it.
//!
//! ```text
//! storage/docker/registry/v2/
//! ├─ blobs/sha256/XX/HEX/data
//! └─ repositories/builds/ID/_manifests/revisions/sha256/HEX/link    an image without a name
//! ```
//! The directories are the registry's user's, who may have put links there that lead elsewhere, and Kiln may be root: so every step goes
//! down from an open directory, and none through a link. All of it blocks.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, statat, unlinkat};
use rustix::io::Errno;

use crate::build::BuildId;
use crate::staging::{Digest, MAX_MANIFEST_BYTES};

/// Below the registry's directory.
const V2: &str = "storage/docker/registry/v2";
/// Images without a name, by their builds.
const NAMELESS: &str = "repositories/builds";
const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY);

/// What is stored.
pub(super) struct Storage {
    v2: OwnedFd,
}

/// A blob's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blob {
    pub size: u64,
    modified: SystemTime,
}

impl Blob {
    /// Whether it was last written so long ago. What comes from the future is young.
    pub fn is_older(&self, than: Duration) -> bool {
        self.modified.elapsed().is_ok_and(|age| age >= than)
    }
}

impl Storage {
    /// That of the registry in this directory; `None` where nothing was ever pushed as a whole.
    pub fn open(dir: &Path) -> io::Result<Option<Self>> {
        let dir = File::open(dir)?;
        let v2 = found(below(&dir.into(), V2, DIRECTORY))?;
        let Some(v2) = v2 else { return Ok(None) };
        let storage = Self { v2 };
        // docker-registry fails to read what it has not made yet.
        for part in ["repositories", "blobs"] {
            if found(below(&storage.v2, part, DIRECTORY))?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(storage))
    }

    /// One blob, if it is there.
    pub fn blob(&self, digest: &Digest) -> io::Result<Option<Blob>> {
        let Some(dir) = found(below(&self.v2, &directory(digest), DIRECTORY))? else {
            return Ok(None);
        };
        data(&dir)
    }

    /// The size of all blobs together.
    pub fn bytes(&self) -> io::Result<u64> {
        let Some(all) = found(below(&self.v2, "blobs/sha256", DIRECTORY))? else { return Ok(0) };
        let mut bytes = 0;
        for first in names(&all)? {
            let Some(some) = found(below(&all, &first, DIRECTORY))? else { continue };
            for name in names(&some)? {
                // Others are none of the registry's.
                let Ok(digest) = Digest::parse(&format!("sha256:{name}")) else { continue };
                let dir = found(below(&some, &digest.hex(), DIRECTORY))?;
                let blob = dir.map(|dir| data(&dir)).transpose()?.flatten();
                bytes += blob.map_or(0, |blob| blob.size);
            }
        }
        Ok(bytes)
    }

    /// Removes a blob.
    pub fn remove_blob(&self, digest: &Digest) -> io::Result<()> {
        let hex = digest.hex();
        let parent = below(&self.v2, &format!("blobs/sha256/{}", &hex[..2]), DIRECTORY)?;
        let dir = below(&parent, &hex, DIRECTORY)?;
        unlinkat(&dir, "data", AtFlags::empty())?;
        drop(dir);
        // Without `data` it is no blob any more, whatever else is in it.
        let _ = unlinkat(&parent, &hex, AtFlags::REMOVEDIR);
        Ok(())
    }

    /// A manifest's content, of which what is too large for one is left out.
    pub fn manifest(&self, digest: &Digest) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let path = format!("{}/data", directory(digest));
        // A pipe would wait for somebody to write.
        let Some(file) = found(below(&self.v2, &path, OFlags::RDONLY | OFlags::NONBLOCK))? else {
            return Ok(bytes);
        };
        File::from(file).take(MAX_MANIFEST_BYTES as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The builds that have an image without a name, or what is left of one, in the order of their ids: they begin with the time at
    /// which they were made.
    pub fn nameless(&self) -> io::Result<Vec<BuildId>> {
        let Some(builds) = found(below(&self.v2, NAMELESS, DIRECTORY))? else { return Ok(vec![]) };
        let mut ids: Vec<_> =
            names(&builds)?.into_iter().filter_map(|name| BuildId::new(name).ok()).collect();
        ids.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        Ok(ids)
    }

    /// The manifests of an image without a name.
    pub fn manifests(&self, id: &BuildId) -> io::Result<Vec<Digest>> {
        let path = format!("{NAMELESS}/{id}/_manifests/revisions/sha256");
        let Some(dir) = found(below(&self.v2, &path, DIRECTORY))? else { return Ok(vec![]) };
        let names = names(&dir)?.into_iter();
        Ok(names.filter_map(|name| Digest::parse(&format!("sha256:{name}")).ok()).collect())
    }

    /// Removes an image without a name, with its repository; whether it was there.
    pub fn remove_nameless(&self, id: &BuildId) -> io::Result<bool> {
        let Some(builds) = found(below(&self.v2, NAMELESS, DIRECTORY))? else { return Ok(false) };
        // By the open directory, so that nothing above it can be a link; the standard library follows none below it.
        let path = format!("/proc/self/fd/{}/{id}", builds.as_raw_fd());
        match std::fs::remove_dir_all(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A blob's, by its digest alone.
fn directory(digest: &Digest) -> String {
    let hex = digest.hex();
    format!("blobs/sha256/{}/{hex}", &hex[..2])
}

/// Opens what is below a directory, through no link.
fn below(dir: &OwnedFd, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    openat2(dir, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), how)
}

/// What is a link, or a file in the place of a directory, is nothing of the registry's.
fn found(opened: rustix::io::Result<OwnedFd>) -> io::Result<Option<OwnedFd>> {
    match opened {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn names(dir: &OwnedFd) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        if let Ok(name) = entry?.file_name().to_str()
            && !matches!(name, "." | "..")
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// The file of a blob in its directory.
fn data(dir: &OwnedFd) -> io::Result<Option<Blob>> {
    let stat = match statat(dir, "data", AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let seconds = u64::try_from(stat.st_mtime).unwrap_or_default();
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    Ok(Some(Blob { size: u64::try_from(stat.st_size).unwrap_or_default(), modified }))
}
