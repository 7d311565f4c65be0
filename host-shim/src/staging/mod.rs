//! What one build pushed: blobs and manifests on the host's disk, until the host has published them.
//!
//! ```text
//! DIR/blobs/sha256/<hex>      content whose digest was verified, renamed here from
//! DIR/uploads/<random>        an upload that is not finished
//! DIR/manifests/<hex>         manifests, byte for byte
//! ```
//!
//! **Invariant**: nothing that a guest sends becomes a path; only a parsed [`Digest`] does. Bytes,
//! blobs, uploads and manifests are bounded before they are written.

mod digest;
mod upload;

use std::collections::HashMap;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::io::AsyncReadExt;

pub use self::digest::{BadDigest, Digest};
use self::upload::Upload;
pub use self::upload::UploadId;

/// Largest manifest: what docker-registry and the distribution spec's clients agree on.
pub const MAX_MANIFEST_BYTES: usize = 4 * 1024 * 1024;
/// Most manifests of a build. It pushes one; retries with other compression push a few.
pub const MAX_MANIFESTS: usize = 16;
/// Most tags of a build, of at most 128 bytes each.
pub const MAX_TAGS: usize = 16;
/// Most unfinished uploads at a time. Engines push 6 blobs at a time.
pub const MAX_UPLOADS: usize = 32;

/// What a build may stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of all blobs, uploads and manifests together.
    pub max_bytes: u64,
    /// Finished blobs.
    pub max_blobs: usize,
}

/// The staging area of one build.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Written or promised, of blobs, uploads and manifests.
    bytes: u64,
    blobs: HashMap<Digest, u64>,
    manifests: HashMap<Digest, String>,
    tags: HashMap<String, Digest>,
    uploads: HashMap<UploadId, Arc<tokio::sync::Mutex<Upload>>>,
    removed: bool,
}

/// A manifest as it was pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagedManifest {
    /// Of the bytes.
    pub digest: Digest,
    /// The `Content-Type` it was pushed with.
    pub media_type: String,
    /// Byte for byte.
    pub bytes: Bytes,
}

/// Why something was not staged, or not found.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// Over the byte limit.
    #[error("the image is larger than the {limit} bytes that a build may push")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// Over a limit of another kind.
    #[error("the build pushed more than {limit} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A manifest over [`MAX_MANIFEST_BYTES`].
    #[error("the manifest is larger than {MAX_MANIFEST_BYTES} bytes")]
    ManifestTooLarge,
    /// There is no such upload, or it was given up after an error.
    #[error("there is no such upload")]
    UnknownUpload,
    /// Somebody else writes to it.
    #[error("another request writes to this upload")]
    Busy,
    /// A chunk that does not continue where the upload is.
    #[error("the chunk starts at byte {actual}, but the upload is at byte {expected}")]
    WrongOffset {
        /// Where the upload is.
        expected: u64,
        /// Where the chunk starts.
        actual: u64,
    },
    /// Content that is not what its digest says.
    #[error("the content is {actual}, not {expected}")]
    DigestMismatch {
        /// What the guest said.
        expected: Digest,
        /// What it is.
        actual: Digest,
    },
    /// The sender broke off.
    #[error("the upload broke off")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The staging area was removed: the build is over.
    #[error("the build is over")]
    Removed,
    /// The disk failed.
    #[error("the host could not {operation} the staging area")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl StagingError {
    fn io(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, source }
    }
}

impl Staging {
    /// An empty staging area in `dir`, which is emptied when it exists. (What a host that was killed
    /// had still to publish is found by [`crate::publish::Checked::load`] instead.)
    pub fn new(dir: impl Into<PathBuf>, limits: Limits) -> Result<Self, StagingError> {
        let dir = dir.into();
        remove_tree(&dir).map_err(StagingError::io("empty"))?;
        for part in ["blobs/sha256", "uploads", "manifests"] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir.join(part))
                .map_err(StagingError::io("create"))?;
        }
        Ok(Self { dir, limits, state: Mutex::default() })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the blob is or would be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        blob_path(&self.dir, digest)
    }

    /// The size of a staged blob.
    pub fn blob(&self, digest: &Digest) -> Option<u64> {
        self.state().blobs.get(digest).copied()
    }

    /// Bytes in use, of unfinished uploads too.
    pub fn used_bytes(&self) -> u64 {
        self.state().bytes
    }

    /// Keeps a manifest by its digest, and by the tag where one is given.
    pub async fn put_manifest(
        &self,
        tag: Option<&str>,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Digest, StagingError> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(StagingError::ManifestTooLarge);
        }
        let digest = Digest::of(&bytes);
        let new = {
            let mut state = self.state();
            if tag.is_some_and(|t| !state.tags.contains_key(t)) && state.tags.len() >= MAX_TAGS {
                return Err(StagingError::TooMany { what: "tags", limit: MAX_TAGS });
            }
            let new = !state.manifests.contains_key(&digest);
            if new {
                if state.manifests.len() >= MAX_MANIFESTS {
                    let limit = MAX_MANIFESTS;
                    return Err(StagingError::TooMany { what: "manifests", limit });
                }
                state.reserve(bytes.len() as u64, self.limits)?;
            }
            new
        };
        if new {
            let temporary = self.dir.join("uploads").join(UploadId::random().to_string());
            let (target, content) = (self.manifest_path(&digest), bytes.clone());
            let written = blocking(move || {
                write_new(&temporary, &content).and_then(|()| std::fs::rename(&temporary, &target))
            });
            if let Err(error) = written.await {
                self.state().release(bytes.len() as u64);
                return Err(StagingError::Io { operation: "write to", source: error });
            }
        }
        let mut state = self.state();
        if new && state.manifests.insert(digest, media_type.to_owned()).is_some() {
            // Two requests wrote the same manifest at a time; it is there once.
            state.release(bytes.len() as u64);
        }
        if let Some(tag) = tag {
            state.tags.insert(tag.to_owned(), digest);
        }
        Ok(digest)
    }

    /// The digest behind a tag.
    pub fn tag(&self, tag: &str) -> Option<Digest> {
        self.state().tags.get(tag).copied()
    }

    /// A staged manifest.
    pub async fn manifest(&self, digest: &Digest) -> Result<Option<StagedManifest>, StagingError> {
        let Some(media_type) = self.state().manifests.get(digest).cloned() else {
            return Ok(None);
        };
        let path = self.manifest_path(digest);
        let bytes = tokio::fs::read(path).await.map_err(StagingError::io("read"))?;
        Ok(Some(StagedManifest { digest: *digest, media_type, bytes: bytes.into() }))
    }

    /// A staged blob, opened, with its size.
    pub async fn open_blob(
        &self,
        digest: &Digest,
    ) -> Result<Option<(tokio::fs::File, u64)>, StagingError> {
        let Some(size) = self.blob(digest) else { return Ok(None) };
        let file = tokio::fs::File::open(self.blob_path(digest)).await;
        Ok(Some((file.map_err(StagingError::io("read"))?, size)))
    }

    /// Deletes everything. What is still being written fails from now on.
    pub async fn remove(&self) -> Result<(), StagingError> {
        *self.state() = State { removed: true, ..State::default() };
        let dir = self.dir.clone();
        blocking(move || remove_tree(&dir)).await.map_err(StagingError::io("remove"))
    }

    fn manifest_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("manifests").join(digest.hex())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change below is a single step, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn reserve(&mut self, bytes: u64, limits: Limits) -> Result<(), StagingError> {
        if self.removed {
            return Err(StagingError::Removed);
        }
        let limit = limits.max_bytes;
        match self.bytes.checked_add(bytes) {
            Some(total) if total <= limit => self.bytes = total,
            _ => return Err(StagingError::TooLarge { limit }),
        }
        Ok(())
    }

    fn release(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// Where a blob of the staging area in `dir` is.
pub fn blob_path(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join("blobs/sha256").join(digest.hex())
}

/// Reads a whole small file, refusing one over `limit`.
pub(crate) async fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = tokio::fs::File::open(path).await?;
    file.take(limit + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the file is too large"));
    }
    Ok(bytes)
}

/// Writes a new file that only this user may read.
fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    io::Write::write_all(&mut file, bytes)
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(io::Error::other(error)),
    }
}
