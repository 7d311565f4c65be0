//! Pushes a layout to a registry: what is there already is skipped, blobs go first, the manifest with
//! the tag last, so that nobody ever sees an image with missing parts. Manifests are sent as the
//! bytes that the layout has; nothing is serialised again.

use std::path::Path;

use futures_util::TryStreamExt as _;
use oci_client::errors::OciDistributionError;
use oci_client::{Reference, RegistryOperation};
use tokio_util::io::ReaderStream;

use crate::digest::Digest;
use crate::layout::{Blob, Layout, LayoutError};
use crate::registry::{Options, Registry, RegistryError};

/// A part of a file that is in memory at a time.
const CHUNK: usize = 256 * 1024;

/// The image was not published, or not completely; its tag still points where it did.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The layout on this machine.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The reference has a digest, and the layout another one.
    #[error("the reference asks for {wanted}, the layout holds {found}")]
    OtherDigest {
        /// In the reference.
        wanted: String,
        /// In the layout.
        found: Digest,
    },
    /// The registry changed the manifest.
    #[error(
        "the registry stored the manifest as {stored}, not as {sent}; it rewrites manifests and cannot be used"
    )]
    Rewritten {
        /// What we sent.
        sent: Digest,
        /// What it has.
        stored: String,
    },
}

/// What was published.
#[derive(Debug, PartialEq, Eq)]
pub struct Published {
    /// Of the manifest.
    pub digest: Digest,
    /// Blobs that were sent.
    pub sent: usize,
    /// Blobs that were there.
    pub skipped: usize,
}

/// Pushes the image in `dir` to `reference` (its tag, or `latest`). `progress` gets a line for each blob.
pub async fn push_layout(
    dir: &Path,
    reference: &Reference,
    options: &Options,
    progress: &(dyn Fn(&str) + Send + Sync),
) -> Result<Published, PublishError> {
    let layout = Layout::open(dir)?;
    let (root, _) = layout.root().ok_or(LayoutError::NotOne { dir: dir.to_owned(), count: 0 })?;
    if let Some(wanted) = reference.digest()
        && wanted != root.digest.as_str()
    {
        let (wanted, found) = (wanted.to_owned(), root.digest.clone());
        return Err(PublishError::OtherDigest { wanted, found });
    }
    let registry = Registry::connect(reference, options, RegistryOperation::Push).await?;
    let mut published = Published { digest: root.digest.clone(), sent: 0, skipped: 0 };
    for blob in &layout.blobs {
        if registry.push_blob(&layout, blob, progress).await? {
            published.sent += 1;
        } else {
            published.skipped += 1;
        }
    }
    let last = layout.manifests.len().saturating_sub(1);
    for (i, (blob, bytes)) in layout.manifests.iter().enumerate() {
        // Children go by digest; only the image itself gets the tag.
        let target = if i == last { reference.clone() } else { by_digest(reference, &blob.digest) };
        registry.push_manifest(&target, blob, bytes).await?;
    }
    let stored = registry
        .retry("confirm the manifest", 0, || {
            registry.client.fetch_manifest_digest(reference, &registry.auth)
        })
        .await?;
    if stored != published.digest.as_str() {
        return Err(PublishError::Rewritten { sent: published.digest, stored });
    }
    Ok(published)
}

/// `HOST/REPOSITORY@DIGEST`: what to pull to get exactly this.
pub fn pinned(reference: &Reference, digest: &Digest) -> String {
    by_digest(reference, digest).whole()
}

pub(crate) fn by_digest(reference: &Reference, digest: &Digest) -> Reference {
    let (registry, repository) = (reference.registry(), reference.repository());
    Reference::with_digest(registry.to_owned(), repository.to_owned(), digest.to_string())
}

impl Registry {
    /// Whether the blob had to be sent.
    async fn push_blob(
        &self,
        layout: &Layout,
        blob: &Blob,
        progress: &(dyn Fn(&str) + Send + Sync),
    ) -> Result<bool, RegistryError> {
        let digest = blob.digest.as_str();
        let name = blob.title.as_deref().unwrap_or(digest);
        let exists = || self.client.blob_exists(&self.reference, digest);
        if self.retry(&format!("look for blob {digest}"), 0, exists).await? {
            progress(&format!("{name}: there already"));
            return Ok(false);
        }
        progress(&format!("{name}: sending {} bytes", blob.size));
        let path = layout.path(&blob.digest);
        // Opened for each try: a stream cannot be rewound.
        let send = || async {
            let file = tokio::fs::File::open(&path).await?;
            let stream =
                ReaderStream::with_capacity(file, CHUNK).map_err(OciDistributionError::from);
            self.client.push_blob_stream(&self.reference, stream, digest, Some(blob.size)).await
        };
        self.retry(&format!("send blob {digest}"), blob.size, send).await?;
        Ok(true)
    }

    async fn push_manifest(
        &self,
        target: &Reference,
        blob: &Blob,
        bytes: &[u8],
    ) -> Result<(), RegistryError> {
        let action = format!("send manifest {}", blob.digest);
        let send = || async {
            let media_type = blob.media_type.parse().map_err(|_| {
                OciDistributionError::UnsupportedMediaTypeError(blob.media_type.clone())
            })?;
            self.client.push_manifest_raw(target, bytes.to_vec(), media_type).await
        };
        self.retry(&action, blob.size, send).await.map(drop)
    }
}
