//! Unfinished uploads: bytes that come in chunks, are counted, hashed, and become a blob only when
//! the digest is what the sender said.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt;

use super::{Digest, MAX_UPLOADS, Staging, StagingError};

/// Names an upload. Random and long, so that it cannot be guessed; a safe file name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UploadId(uuid::Uuid);

impl UploadId {
    pub(super) fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }

    /// The id that the text writes.
    pub fn parse(text: &str) -> Option<Self> {
        uuid::Uuid::try_parse(text).ok().map(Self)
    }
}

impl fmt::Display for UploadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.simple().fmt(f)
    }
}

#[derive(Debug)]
pub(super) struct Upload {
    file: tokio::fs::File,
    path: PathBuf,
    hasher: Sha256,
    written: u64,
    /// A write has begun and not returned: how much of it is in the file is not known.
    in_write: bool,
}

impl Staging {
    /// Starts an upload.
    pub async fn begin_upload(&self) -> Result<UploadId, StagingError> {
        let id = UploadId::random();
        let path = self.dir.join("uploads").join(id.to_string());
        self.room_for_an_upload()?;
        let mut options = tokio::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let file = options.open(&path).await.map_err(StagingError::io("write to"))?;
        let upload =
            Upload { file, path: path.clone(), hasher: Sha256::new(), written: 0, in_write: false };
        let refused = {
            let mut state = self.state();
            let refused = state.room_for_an_upload().err();
            if refused.is_none() {
                state.uploads.insert(id, Arc::new(tokio::sync::Mutex::new(upload)));
            }
            refused
        };
        match refused {
            Some(error) => {
                discard_file(&path).await;
                Err(error)
            }
            None => Ok(id),
        }
    }

    /// How many bytes the upload has.
    pub fn upload_offset(&self, id: UploadId) -> Result<u64, StagingError> {
        let upload = self.upload(id)?;
        let upload = upload.try_lock().map_err(|_| StagingError::Busy)?;
        if upload.in_write { Err(StagingError::UnknownUpload) } else { Ok(upload.written) }
    }

    /// Adds a chunk and returns how many bytes the upload has then. A chunk that says where it
    /// starts must start at the end of the last one. Bytes that came before the sender broke off
    /// are kept, so that it can go on; an upload that broke a limit is given up, and so is one whose
    /// request was dropped inside of a write: the sender has to begin anew.
    pub async fn append<S, E>(
        &self,
        id: UploadId,
        start: Option<u64>,
        body: S,
    ) -> Result<u64, StagingError>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let shared = self.upload(id)?;
        let mut upload = shared.try_lock().map_err(|_| StagingError::Busy)?;
        if upload.in_write {
            self.give_up(id, &upload).await;
            return Err(StagingError::UnknownUpload);
        }
        match self.write(&mut upload, start, body).await {
            Ok(()) => Ok(upload.written),
            Err(error @ (StagingError::WrongOffset { .. } | StagingError::Body(_))) => Err(error),
            Err(error) => {
                self.give_up(id, &upload).await;
                Err(error)
            }
        }
    }

    /// Adds the last chunk, and makes a blob of the upload when its digest is right; it is given up
    /// otherwise. Returns the blob's size.
    pub async fn finish<S, E>(
        &self,
        id: UploadId,
        start: Option<u64>,
        body: S,
        digest: Digest,
    ) -> Result<u64, StagingError>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.append(id, start, body).await?;
        let shared = self.upload(id)?;
        let mut upload = shared.try_lock().map_err(|_| StagingError::Busy)?;
        let actual = Digest::from_hasher(upload.hasher.clone());
        if actual != digest {
            self.give_up(id, &upload).await;
            return Err(StagingError::DigestMismatch { expected: digest, actual });
        }
        // tokio's file writes in the background: only a flush tells whether all went well.
        let kept = match upload.file.flush().await {
            Ok(()) => self.keep(id, &upload, digest).await,
            Err(source) => Err(StagingError::Io { operation: "write to", source }),
        };
        match kept {
            Ok(()) => Ok(upload.written),
            Err(error) => {
                self.give_up(id, &upload).await;
                Err(error)
            }
        }
    }

    /// Gives an upload up.
    pub async fn cancel_upload(&self, id: UploadId) -> Result<(), StagingError> {
        let shared = self.upload(id)?;
        let upload = shared.try_lock().map_err(|_| StagingError::Busy)?;
        self.give_up(id, &upload).await;
        Ok(())
    }

    async fn write<S, E>(
        &self,
        upload: &mut Upload,
        start: Option<u64>,
        mut body: S,
    ) -> Result<(), StagingError>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if let Some(actual) = start.filter(|start| *start != upload.written) {
            return Err(StagingError::WrongOffset { expected: upload.written, actual });
        }
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|error| StagingError::Body(error.into()))?;
            self.state().reserve(chunk.len() as u64, self.limits)?;
            // Counted before it is written: what a failed write leaves is released with the rest.
            upload.written += chunk.len() as u64;
            upload.hasher.update(&chunk);
            upload.in_write = true;
            upload.file.write_all(&chunk).await.map_err(StagingError::io("write to"))?;
            upload.in_write = false;
        }
        Ok(())
    }

    async fn keep(
        &self,
        id: UploadId,
        upload: &Upload,
        digest: Digest,
    ) -> Result<(), StagingError> {
        {
            let state = self.state();
            let limit = self.limits.max_blobs;
            if state.removed {
                return Err(StagingError::Removed);
            }
            if !state.blobs.contains_key(&digest) && state.blobs.len() >= limit {
                return Err(StagingError::TooMany { what: "blobs", limit });
            }
        }
        let target = self.blob_path(&digest);
        tokio::fs::rename(&upload.path, &target).await.map_err(StagingError::io("write to"))?;
        let over = {
            let mut state = self.state();
            state.uploads.remove(&id);
            let again = state.blobs.insert(digest, upload.written).is_some();
            let over = !again && state.blobs.len() > self.limits.max_blobs;
            if again {
                // The same content was there: the rename has replaced it.
                state.release(upload.written);
            } else if over {
                // Another upload took the last place meanwhile.
                state.blobs.remove(&digest);
                state.release(upload.written);
            }
            over
        };
        if over {
            discard_file(&target).await;
            let limit = self.limits.max_blobs;
            return Err(StagingError::TooMany { what: "blobs", limit });
        }
        Ok(())
    }

    async fn give_up(&self, id: UploadId, upload: &Upload) {
        {
            let mut state = self.state();
            if state.uploads.remove(&id).is_none() {
                return;
            }
            state.release(upload.written);
        }
        discard_file(&upload.path).await;
    }

    fn upload(&self, id: UploadId) -> Result<Arc<tokio::sync::Mutex<Upload>>, StagingError> {
        self.state().uploads.get(&id).cloned().ok_or(StagingError::UnknownUpload)
    }

    fn room_for_an_upload(&self) -> Result<(), StagingError> {
        self.state().room_for_an_upload()
    }
}

impl super::State {
    fn room_for_an_upload(&self) -> Result<(), StagingError> {
        if self.removed {
            Err(StagingError::Removed)
        } else if self.uploads.len() >= MAX_UPLOADS {
            Err(StagingError::TooMany { what: "uploads at a time", limit: MAX_UPLOADS })
        } else {
            Ok(())
        }
    }
}

/// What cannot be deleted now goes with the whole directory.
async fn discard_file(path: &std::path::Path) {
    if let Err(error) = tokio::fs::remove_file(path).await
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "a file of a staging area stays for now");
    }
}
