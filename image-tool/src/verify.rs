//! Checks that an image is whole: every blob has its digest and size, and a bundle's description fits
//! its files and this Kiln's protocol.

use std::io::{self, Write as _};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use oci_client::manifest::OciDescriptor;
use oci_client::{Reference, RegistryOperation};
use oci_spec::image::MediaType;
use tokio::io::AsyncWrite;

use crate::bundle::{self, Bundle, BundleError, Manifest};
use crate::digest::{Digest, Hashing};
use crate::layout::{Blob, Layout, LayoutError, Manifest as OciManifest};
use crate::publish::by_digest;
use crate::registry::{Options, Registry, RegistryError};

/// `bundle.json` and image configurations have a few KB.
pub(crate) const MAX_CONFIG: u64 = 4 * 1024 * 1024;
/// What can be asked for: images, artifacts, and lists of them, in OCI's and Docker's form.
const ACCEPT: &[&str] = &[
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// An image is damaged, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A layout or manifest.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The configuration is larger than any real one.
    #[error("the configuration {digest} has {size} bytes; at most {MAX_CONFIG} are read")]
    LargeConfig {
        /// Its digest.
        digest: Digest,
        /// Its stated size.
        size: u64,
    },
    /// A list of images where one image was expected.
    #[error("{0} is a list of images for several platforms; name one by its digest")]
    List(String),
}

/// What is known of an image.
#[derive(Debug)]
pub struct Image {
    /// Of the manifest.
    pub digest: Digest,
    /// Of an artifact.
    pub artifact_type: Option<String>,
    /// The configuration's descriptor.
    pub config: Blob,
    /// The layers' descriptors.
    pub layers: Vec<Blob>,
    /// The configuration's bytes.
    pub config_bytes: Vec<u8>,
    /// The manifest's media type and bytes.
    pub manifest: (String, Vec<u8>),
}

impl Image {
    /// `bundle.json`, when this is a bundle whose parts fit together.
    pub fn bundle(&self) -> Result<Option<Manifest>, BundleError> {
        if self.artifact_type.as_deref() != Some(bundle::ARTIFACT_TYPE) {
            return Ok(None);
        }
        let name = Path::new("bundle.json");
        let manifest = Manifest::parse(&self.config_bytes, name)?;
        let (media_type, bytes) = &self.manifest;
        if bundle::check_artifact(media_type, bytes, &self.config_bytes, &manifest) {
            Ok(Some(manifest))
        } else {
            Err(BundleError::Disagree(name.to_owned()))
        }
    }

    fn parse(digest: Digest, manifest: (String, Vec<u8>)) -> Result<(Self, Blob), VerifyError> {
        let what = digest.to_string();
        let oci = match OciManifest::parse(&manifest.0, &manifest.1, &what)? {
            OciManifest::Image(oci) => oci,
            OciManifest::Index(_) => return Err(VerifyError::List(what)),
        };
        let config = Blob::from_descriptor(oci.config(), &what)?;
        if config.size > MAX_CONFIG {
            return Err(VerifyError::LargeConfig { digest: config.digest, size: config.size });
        }
        let layers: Result<_, _> =
            oci.layers().iter().map(|l| Blob::from_descriptor(l, &what)).collect();
        let image = Self {
            digest,
            artifact_type: oci.artifact_type().as_ref().map(ToString::to_string),
            config: config.clone(),
            layers: layers?,
            config_bytes: Vec::new(),
            manifest,
        };
        Ok((image, config))
    }
}

/// Reads what a directory holds; no blob but the configuration.
pub fn inspect_dir(dir: &Path) -> Result<Image, VerifyError> {
    let layout = Layout::open(dir)?;
    let (root, bytes) =
        layout.root().ok_or(LayoutError::NotOne { dir: dir.to_owned(), count: 0 })?;
    let (mut image, config) =
        Image::parse(root.digest.clone(), (root.media_type.clone(), bytes.clone()))?;
    image.config_bytes = crate::file::read_bounded(&layout.path(&config.digest), MAX_CONFIG)
        .map_err(LayoutError::File)?;
    Ok(image)
}

/// Checks a bundle or layout on this machine; gives the manifest's digest.
pub fn verify_dir(dir: &Path) -> Result<Digest, VerifyError> {
    if dir.join("bundle.json").exists() {
        let bundle = Bundle::open(dir)?;
        bundle.verify()?;
        bundle.check_protocol()?;
        return Ok(bundle.digest);
    }
    let layout = Layout::open(dir)?;
    layout.verify()?;
    let (root, _) = layout.root().ok_or(LayoutError::NotOne { dir: dir.to_owned(), count: 0 })?;
    Ok(root.digest.clone())
}

/// Reads what a registry holds; no blob but the configuration.
pub async fn inspect_ref(reference: &Reference, options: &Options) -> Result<Image, VerifyError> {
    let registry = Registry::connect(reference, options, RegistryOperation::Pull).await?;
    registry.inspect().await
}

/// Checks an image in a registry by reading every blob; gives the manifest's digest.
pub async fn verify_ref(reference: &Reference, options: &Options) -> Result<Digest, VerifyError> {
    let registry = Registry::connect(reference, options, RegistryOperation::Pull).await?;
    let image = registry.inspect().await?;
    for layer in &image.layers {
        registry.pull_blob(layer, &mut tokio::io::sink()).await?;
    }
    if let Some(manifest) = image.bundle()? {
        manifest.check_protocol()?;
    }
    Ok(image.digest)
}

impl Registry {
    pub(crate) async fn inspect(&self) -> Result<Image, VerifyError> {
        let (digest, media_type, bytes) = self.manifest(&self.reference).await?;
        let (mut image, config) = Image::parse(digest, (media_type, bytes))?;
        let mut bytes = Vec::new();
        self.pull_blob(&config, &mut bytes).await?;
        image.config_bytes = bytes;
        Ok(image)
    }

    /// A manifest's digest, media type and bytes.
    pub(crate) async fn manifest(
        &self,
        reference: &Reference,
    ) -> Result<(Digest, String, Vec<u8>), VerifyError> {
        let pull = || self.client.pull_manifest_raw(reference, &self.auth, ACCEPT);
        let (bytes, digest) = self.retry("read the manifest", 0, pull).await?;
        // The client compared the digest with the bytes; computed here, it is ours whatever it does.
        tracing::debug!(%digest, "manifest");
        let actual = Digest::of(&bytes);
        match reference.digest().map(Digest::parse) {
            Some(Ok(expected)) if expected != actual => {
                let size = bytes.len() as u64;
                let expected_size = size;
                Err(LayoutError::Mismatch { expected, expected_size, actual, size }.into())
            }
            _ => Ok((actual, media_type(&bytes), bytes.to_vec())),
        }
    }

    /// The manifest that an index lists.
    pub(crate) async fn manifest_blob(
        &self,
        blob: &Blob,
    ) -> Result<(Digest, String, Vec<u8>), VerifyError> {
        self.manifest(&by_digest(&self.reference, &blob.digest)).await
    }

    /// Reads a blob into `output`, no more than its descriptor says, and checks its digest.
    pub(crate) async fn pull_blob(
        &self,
        blob: &Blob,
        output: &mut (impl AsyncWrite + Unpin + Rewind),
    ) -> Result<(), VerifyError> {
        let size = i64::try_from(blob.size).unwrap_or(i64::MAX);
        let descriptor =
            OciDescriptor { digest: blob.digest.to_string(), size, ..OciDescriptor::default() };
        let reference = by_digest(&self.reference, &blob.digest);
        let action = format!("read blob {}", blob.digest);
        let output = tokio::sync::Mutex::new(output);
        let pull = || async {
            let mut output = output.lock().await;
            output.rewind().await?;
            let mut checked = Checked::new(&mut **output, blob.size);
            self.client.pull_blob(&reference, &descriptor, &mut checked).await?;
            Ok(checked.hash.finish())
        };
        let (actual, got) = self.retry(&action, blob.size, pull).await?;
        if actual != blob.digest || got != blob.size {
            let (expected, expected_size) = (blob.digest.clone(), blob.size);
            let wrong = LayoutError::Mismatch { expected, expected_size, actual, size: got };
            return Err(wrong.into());
        }
        Ok(())
    }
}

/// A place for a blob that can begin anew when a transfer broke.
pub(crate) trait Rewind {
    fn rewind(&mut self) -> impl Future<Output = io::Result<()>> + Send;
}

impl Rewind for tokio::io::Sink {
    async fn rewind(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Rewind for Vec<u8> {
    async fn rewind(&mut self) -> io::Result<()> {
        self.clear();
        Ok(())
    }
}

impl Rewind for tokio::fs::File {
    async fn rewind(&mut self) -> io::Result<()> {
        self.set_len(0).await?;
        tokio::io::AsyncSeekExt::rewind(self).await.map(drop)
    }
}

/// A list or an image, by what the manifest itself says: both forms have `mediaType` or a telling field.
fn media_type(bytes: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Form {
        media_type: Option<String>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    match serde_json::from_slice(bytes) {
        Ok(Form { manifests: Some(_), .. }) => MediaType::ImageIndex.to_string(),
        Ok(Form { media_type: Some(stated), .. }) => stated,
        _ => MediaType::ImageManifest.to_string(),
    }
}

/// Passes on at most as much as was announced.
struct Checked<W> {
    inner: W,
    hash: Hashing<io::Sink>,
    left: u64,
}

impl<W> Checked<W> {
    fn new(inner: W, size: u64) -> Self {
        Self { inner, hash: Hashing::new(io::sink()), left: size }
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Checked<W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.len() as u64 > self.left {
            let why = "the registry sends more than the descriptor announced";
            return Poll::Ready(Err(io::Error::other(why)));
        }
        let written = std::task::ready!(Pin::new(&mut self.inner).poll_write(cx, bytes))?;
        self.left -= written as u64;
        self.hash.write_all(&bytes[..written])?;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn no_more_than_announced_is_taken() {
        let mut out = Vec::new();
        Checked::new(&mut out, 4).write_all(b"kiln").await.unwrap();
        let error = Checked::new(&mut out, 3).write_all(b"kiln").await.unwrap_err();
        assert!(error.to_string().contains("more than the descriptor announced"));
        assert_eq!(out, b"kiln");
    }

    #[test]
    fn lists_are_told_from_images() {
        let index = MediaType::ImageIndex.to_string();
        assert_eq!(media_type(br#"{"manifests": []}"#), index);
        assert_eq!(media_type(br#"{"mediaType": "x", "manifests": []}"#), index);
        assert_eq!(media_type(br#"{"mediaType": "x"}"#), "x");
        assert_eq!(media_type(b"?"), MediaType::ImageManifest.to_string());
    }

    #[test]
    fn a_bundle_and_a_layout_are_verified() {
        let dir = tempfile::tempdir().unwrap();
        let digest = bundle::tests::sample(dir.path());
        assert_eq!(verify_dir(dir.path()).unwrap(), digest);
        let image = inspect_dir(dir.path()).unwrap();
        assert_eq!(image.bundle().unwrap().unwrap().name, "builder");

        let dir = tempfile::tempdir().unwrap();
        let manifest = crate::layout::tests::sample(dir.path(), b"data");
        assert_eq!(verify_dir(dir.path()).unwrap(), manifest.digest);
        assert_eq!(inspect_dir(dir.path()).unwrap().bundle().unwrap(), None);
    }
}
