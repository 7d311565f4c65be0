//! A source on its way to the disk: bounded, hashed, checked by its first bytes, durable.

use sha2::{Digest, Sha256};
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncWriteExt, BufWriter};
use tokio::task::spawn_blocking;

use crate::build::BuildId;
use crate::sources::{Coming, Sources};

/// The source's file in the directory of its build.
pub const SOURCE_FILE: &str = "source";
/// Bytes that are gathered before they are written: a write is a trip to another thread.
const BUFFER: usize = 256 * 1024;
/// After so many bytes is looked whether there is room for more.
const LOOK: u64 = 8 << 20;
/// Bytes that tell what an archive is: a tar's first header.
const HEAD: usize = 512;

/// A source being received. What is not [kept](Received::keep) is removed when it is dropped.
pub(super) struct Upload {
    dir: Coming,
    file: BufWriter<File>,
    hasher: Sha256,
    head: Vec<u8>,
    bytes: u64,
    limit: u64,
    sources: Sources,
}

/// A source that is on the disk.
pub(super) struct Received {
    dir: Coming,
    /// `sha256:…` over every byte.
    pub(super) digest: String,
    /// Its length.
    pub(super) bytes: u64,
}

/// Why a source is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    #[error("source is not an archive by its first bytes; send a tar, tar.gz or tar.zst")]
    NotAnArchive,
    #[error("source is larger than the {0} bytes that this host takes")]
    TooLarge(u64),
    #[error("the source cannot be stored")]
    Io(#[from] std::io::Error),
}

impl Upload {
    /// Begins one in a directory of its own.
    pub(super) async fn begin(
        sources: &Sources,
        id: &BuildId,
        limit: u64,
    ) -> Result<Self, SourceError> {
        let dir = sources.begin(id).await?;
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(dir.path().join(SOURCE_FILE))
            .await?;
        let file = BufWriter::with_capacity(BUFFER, file);
        Ok(Self {
            dir,
            file,
            hasher: Sha256::new(),
            head: Vec::with_capacity(HEAD),
            bytes: 0,
            limit,
            sources: sources.clone(),
        })
    }

    /// Takes the next bytes.
    pub(super) async fn write(&mut self, chunk: &[u8]) -> Result<(), SourceError> {
        let before = self.bytes / LOOK;
        self.bytes += chunk.len() as u64;
        if self.bytes > self.limit {
            return Err(SourceError::TooLarge(self.limit));
        }
        if self.bytes / LOOK > before && !self.sources.have_room() {
            return Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into());
        }
        if self.head.len() < HEAD {
            let missing = HEAD - self.head.len();
            self.head.extend_from_slice(&chunk[..missing.min(chunk.len())]);
            // Before the rest is received for nothing.
            if self.head.len() == HEAD && !is_archive(&self.head) {
                return Err(SourceError::NotAnArchive);
            }
        }
        self.hasher.update(chunk);
        self.file.write_all(chunk).await?;
        Ok(())
    }

    /// Everything is there: it is made durable.
    pub(super) async fn finish(mut self) -> Result<Received, SourceError> {
        if !is_archive(&self.head) {
            return Err(SourceError::NotAnArchive);
        }
        self.file.flush().await?;
        let (file, path) = (self.file.into_inner().into_std().await, self.dir.path());
        let synced = spawn_blocking(move || {
            file.sync_all()?;
            std::fs::File::open(path)?.sync_all()
        });
        synced.await.map_err(std::io::Error::other)??;
        self.dir.sync().await?;
        let digest = format!("sha256:{}", hex::encode(self.hasher.finalize()));
        Ok(Received { dir: self.dir, digest, bytes: self.bytes })
    }
}

impl Received {
    /// A build stands on it now: it stays.
    pub(super) fn keep(self) {
        self.dir.stay();
    }
}

/// Whether bytes begin as gzip (RFC 1952), zstd (RFC 8878) or tar (POSIX ustar; an empty one is
/// zero blocks) does. `head` is the first [`HEAD`] bytes, or all of them where they are fewer.
fn is_archive(head: &[u8]) -> bool {
    const GZIP: [u8; 2] = [0x1f, 0x8b];
    const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
    // A skippable frame before the first one: pzstd's archives begin with one.
    let is_skippable = matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
    head.starts_with(&GZIP)
        || head.starts_with(&ZSTD)
        || is_skippable
        || (head.len() >= HEAD && (&head[257..262] == b"ustar" || head.iter().all(|b| *b == 0)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tar_head() -> Vec<u8> {
        let mut head = vec![b'a'; HEAD];
        head[257..262].copy_from_slice(b"ustar");
        head
    }

    #[test]
    fn archives_are_known_by_their_first_bytes() {
        let zstd = [[0x28, 0xb5, 0x2f, 0xfd], [0x50, 0x2a, 0x4d, 0x18], [0x5f, 0x2a, 0x4d, 0x18]];
        for good in [&tar_head()[..], &[0; HEAD], &[0x1f, 0x8b], &zstd[0], &zstd[1], &zstd[2]] {
            assert!(is_archive(good));
        }
        for bad in
            [&b""[..], &[0x1f], &[0; HEAD - 1], &tar_head()[..HEAD - 1], b"PK\x03\x04", &[1; HEAD]]
        {
            assert!(!is_archive(bad), "{bad:?}");
        }
    }

    fn id() -> BuildId {
        BuildId::new("b1").unwrap()
    }

    #[tokio::test]
    async fn a_source_is_hashed_bounded_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources::new(dir.path().join("builds"));
        let tar = tar_head();
        let mut upload = Upload::begin(&sources, &id(), HEAD as u64).await.unwrap();
        for byte in &tar {
            upload.write(&[*byte]).await.unwrap();
        }
        let received = upload.finish().await.unwrap();
        assert_eq!(received.digest, format!("sha256:{}", hex::encode(Sha256::digest(&tar))));
        assert_eq!(received.bytes, 512);
        received.keep();
        assert_eq!(std::fs::read(sources.of(&id()).join("source")).unwrap(), tar);
        assert!(
            matches!(Upload::begin(&sources, &id(), 1).await, Err(SourceError::Io(_))),
            "not twice"
        );
    }

    #[tokio::test]
    async fn what_is_refused_or_dropped_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources::new(dir.path().to_owned());
        let begin = async || Upload::begin(&sources, &id(), 600).await;
        let mut upload = begin().await.unwrap();
        upload.write(&tar_head()).await.unwrap();
        upload.write(&[0; 88]).await.unwrap();
        assert!(matches!(upload.write(&[0]).await, Err(SourceError::TooLarge(600))));
        drop(upload);
        let mut upload = begin().await.unwrap();
        assert!(matches!(upload.write(&[1; HEAD]).await, Err(SourceError::NotAnArchive)));
        drop(upload);
        let mut upload = begin().await.unwrap();
        upload.write(b"PK").await.unwrap();
        assert!(matches!(upload.finish().await, Err(SourceError::NotAnArchive)));
        let mut upload = begin().await.unwrap();
        upload.write(&[0x1f, 0x8b]).await.unwrap();
        drop(upload.finish().await.unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
