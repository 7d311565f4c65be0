//! An image of the registry behind Kiln: what it is, and all of it as an OCI layout on this host.
//!
//! Every byte is checked against the digest that names it, and counted against a limit before it is kept.

use std::io;
use std::path::{Path, PathBuf};

use futures_util::StreamExt;
use http::{HeaderValue, Method, StatusCode, header};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

use super::launch::ImageConfig;
use super::reference::Image;
use crate::gateway::backing::{Backing, BackingError};
use crate::gateway::path::{Name, Reference, Route};
use crate::gateway::relay;
use crate::publish::{MANIFEST_TYPES, blobs_of, parse_manifest};
use crate::staging::{Digest, MAX_MANIFEST_BYTES};

/// The media types of lists of manifests.
pub(crate) const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// What the VMs are.
const OS: &str = "linux";
const ARCHITECTURE: &str = "amd64";

/// Most bytes of an image as it is stored.
pub(super) const MAX_IMAGE_BYTES: u64 = 16 << 30;
/// Most bytes of an image's config, which is read as a whole.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// An image that can be run.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Its repository.
    pub name: Name,
    /// Of its manifest for this platform.
    pub digest: Digest,
    /// How its program is started.
    pub config: ImageConfig,
    /// The digests of its layers as they are unpacked, the lowest first.
    pub diff_ids: Vec<String>,
    media_type: String,
    manifest: Vec<u8>,
    /// Config and layers, each once, with their sizes.
    blobs: Vec<(Digest, u64)>,
}

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// There is none.
    #[error("the registry has no image {0}")]
    Missing(String),
    /// It is none that can be run.
    #[error("{image} cannot be run: {why}")]
    NotRunnable {
        /// Which image.
        image: String,
        /// What is wrong.
        why: String,
    },
    /// It is not what its digest says.
    #[error("the registry served something else than {0}")]
    Changed(String),
    /// The registry does not do as it should.
    #[error("the registry answered {status} when asked for {what}")]
    Refused {
        /// For what it was asked.
        what: String,
        /// What it answered.
        status: StatusCode,
    },
    /// It cannot be reached.
    #[error("the registry could not serve {what}")]
    Backing {
        /// For what it was asked.
        what: String,
        /// Why.
        #[source]
        source: BackingError,
    },
    /// The disk failed.
    #[error("the image cannot be written to {}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Listed>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    media_type: String,
    digest: Digest,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

/// An image's config, as far as it is looked at.
#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    config: Option<ImageConfig>,
    #[serde(default)]
    rootfs: RootFs,
}

/// What a config says of an image's layers.
#[derive(Default, Deserialize)]
pub(crate) struct RootFs {
    /// Their digests as they are unpacked, the lowest first.
    #[serde(default)]
    pub(crate) diff_ids: Vec<String>,
}

/// Finds out what an image is.
pub async fn resolve(backing: &Backing, image: &Image) -> Result<Resolved, PullError> {
    let not_runnable = |why: String| PullError::NotRunnable { image: image.to_string(), why };
    let (mut media_type, mut manifest) = manifest(backing, &image.name, &image.reference).await?;
    if INDEX_TYPES.contains(&media_type.as_str()) {
        let reference = Reference::Digest(listed(&manifest).map_err(not_runnable)?);
        (media_type, manifest) = self::manifest(backing, &image.name, &reference).await?;
    }
    let parsed =
        parse_manifest(&media_type, &manifest).map_err(|error| not_runnable(error.to_string()))?;
    let blobs = blobs_of(&parsed).map_err(|error| not_runnable(error.to_string()))?;
    let blobs: Vec<(Digest, u64)> = blobs.into_iter().collect();
    let total = blobs.iter().try_fold(0_u64, |total, (_, size)| total.checked_add(*size));
    if total.is_none_or(|total| total > MAX_IMAGE_BYTES) {
        let most = MAX_IMAGE_BYTES >> 30;
        return Err(not_runnable(format!("it is larger than {most} GiB")));
    }
    let config = Digest::parse(parsed.config().digest().as_ref())
        .map_err(|error| not_runnable(error.to_string()))?;
    let config = config_file(backing, image, config, parsed.config().size()).await?;
    if (config.os.as_str(), config.architecture.as_str()) != (OS, ARCHITECTURE) {
        let ConfigFile { os, architecture, .. } = &config;
        let is = format!("{os}/{architecture}").escape_debug().to_string();
        return Err(not_runnable(format!("it is for {is}, not for {OS}/{ARCHITECTURE}")));
    }
    Ok(Resolved {
        name: image.name.clone(),
        digest: Digest::of(&manifest),
        config: config.config.unwrap_or_default(),
        diff_ids: config.rootfs.diff_ids,
        media_type,
        manifest,
        blobs,
    })
}

/// The manifest for this platform in a list of them.
pub(crate) fn listed(index: &[u8]) -> Result<Digest, String> {
    let index: Index = serde_json::from_slice(index).map_err(|error| error.to_string())?;
    let fits = |listed: &&Listed| {
        let platform = listed.platform.as_ref();
        MANIFEST_TYPES.contains(&listed.media_type.as_str())
            && platform.is_some_and(|p| p.os == OS && p.architecture == ARCHITECTURE)
    };
    let listed = index.manifests.iter().find(fits);
    listed.map(|listed| listed.digest).ok_or_else(|| format!("it is not for {OS}/{ARCHITECTURE}"))
}

/// A manifest with its media type; a digest that named it holds.
async fn manifest(
    backing: &Backing,
    name: &Name,
    reference: &Reference,
) -> Result<(String, Vec<u8>), PullError> {
    let what = format!("{name} {reference}");
    let failed = |source| PullError::Backing { what: what.clone(), source };
    let route = Route::Manifest(name.clone(), reference.clone());
    let mut request = backing.request(Method::GET, route);
    for media_type in INDEX_TYPES.into_iter().chain(MANIFEST_TYPES) {
        request = request.header(header::ACCEPT, HeaderValue::from_static(media_type));
    }
    let answer = request.send().await.map_err(failed)?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => {
            return Err(PullError::Missing(
                Image { name: name.clone(), reference: reference.clone() }.to_string(),
            ));
        }
        status => return Err(PullError::Refused { what, status }),
    }
    let media_type = answer.headers().get(header::CONTENT_TYPE);
    let media_type = media_type.and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
    let bytes = relay::collect(answer, MAX_MANIFEST_BYTES).await.map_err(failed)?;
    match reference {
        Reference::Digest(digest) if Digest::of(&bytes) != *digest => Err(PullError::Changed(what)),
        _ => Ok((media_type, bytes.into())),
    }
}

async fn config_file(
    backing: &Backing,
    image: &Image,
    digest: Digest,
    size: u64,
) -> Result<ConfigFile, PullError> {
    let not_runnable = |why: String| PullError::NotRunnable { image: image.to_string(), why };
    if size > MAX_CONFIG_BYTES {
        return Err(not_runnable(format!("its config is larger than {MAX_CONFIG_BYTES} bytes")));
    }
    let answer = blob(backing, &image.name, digest).await?;
    let limit = usize::try_from(size).unwrap_or(usize::MAX);
    let bytes = relay::collect(answer, limit).await;
    let bytes = bytes.map_err(|source| PullError::Backing { what: digest.to_string(), source })?;
    if Digest::of(&bytes) != digest {
        return Err(PullError::Changed(digest.to_string()));
    }
    serde_json::from_slice(&bytes).map_err(|error| not_runnable(format!("its config: {error}")))
}

async fn blob(
    backing: &Backing,
    name: &Name,
    digest: Digest,
) -> Result<reqwest::Response, PullError> {
    let answer = backing.request(Method::GET, Route::Blob(name.clone(), digest)).send().await;
    let answer =
        answer.map_err(|source| PullError::Backing { what: digest.to_string(), source })?;
    match answer.status() {
        StatusCode::OK => Ok(answer),
        StatusCode::NOT_FOUND => Err(PullError::Missing(format!("{name}@{digest}"))),
        status => Err(PullError::Refused { what: digest.to_string(), status }),
    }
}

impl Resolved {
    /// Of all of it as it is stored, which is what its layout takes.
    pub fn stored_bytes(&self) -> u64 {
        let blobs = self.blobs.iter().map(|(_, size)| *size);
        blobs.fold(self.manifest.len() as u64, u64::saturating_add)
    }

    /// Writes the whole image into a directory, as an OCI layout. Dropping the future stops it; what it has
    /// written is the caller's to remove.
    pub async fn write_layout(&self, backing: &Backing, dir: &Path) -> Result<(), PullError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| PullError::Io { path, source }
        };
        let blobs = dir.join("blobs/sha256");
        tokio::fs::create_dir_all(&blobs).await.map_err(failed(&blobs))?;
        for (digest, size) in &self.blobs {
            self.write_blob(backing, *digest, *size, &blobs.join(digest.hex())).await?;
        }
        let index = json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": self.media_type,
                "digest": self.digest.to_string(),
                "size": self.manifest.len(),
            }],
        });
        let files = [
            (blobs.join(self.digest.hex()), self.manifest.clone()),
            (dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            (dir.join("index.json"), index.to_string().into_bytes()),
        ];
        for (path, content) in files {
            tokio::fs::write(&path, content).await.map_err(failed(&path))?;
        }
        Ok(())
    }

    async fn write_blob(
        &self,
        backing: &Backing,
        digest: Digest,
        size: u64,
        path: &Path,
    ) -> Result<(), PullError> {
        let failed = |source| PullError::Io { path: path.to_owned(), source };
        let mut body = std::pin::pin!(relay::patient(blob(backing, &self.name, digest).await?));
        let mut file = File::create(path).await.map_err(failed)?;
        let (mut hash, mut written) = (Sha256::new(), 0_u64);
        while let Some(chunk) = body.next().await {
            let chunk =
                chunk.map_err(|source| PullError::Backing { what: digest.to_string(), source })?;
            written += chunk.len() as u64;
            if written > size {
                return Err(PullError::Changed(digest.to_string()));
            }
            hash.update(&chunk);
            file.write_all(&chunk).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        if written != size || Digest::from_hasher(hash) != digest {
            return Err(PullError::Changed(digest.to_string()));
        }
        Ok(())
    }
}
