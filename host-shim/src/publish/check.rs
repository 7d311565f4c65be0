//! Whether what the guest pushed is the image that it reported, whole; and writing that down, so
//! that a host that is killed can still publish it.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use oci_spec::image::ImageManifest;
use serde::{Deserialize, Serialize};

use super::PublishError;
use crate::gateway::GuestContext;
use crate::staging::{Digest, MAX_MANIFEST_BYTES, blob_path, read_bounded};

/// The media types of an image's manifest. Indexes are not published yet.
pub(crate) const MANIFEST_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// Most layers of an image. overlayfs mounts 500; engines stop at 127.
const MAX_LAYERS: usize = 512;
/// What was checked, in the staging area's directory.
const FILE: &str = "checked.json";
/// Largest such file: the manifest, escaped, and a line for each blob.
const MAX_FILE_BYTES: u64 = 4 * MAX_MANIFEST_BYTES as u64;

/// An image that may be published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Of the manifest.
    pub digest: Digest,
    /// Of the manifest.
    pub media_type: String,
    /// The manifest byte for byte. It is JSON, so it is UTF-8.
    pub manifest: String,
    /// Config and layers, each once.
    pub blobs: Vec<CheckedBlob>,
    /// The staging area's directory.
    #[serde(skip)]
    pub(super) dir: PathBuf,
}

/// A part of an image that may be published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckedBlob {
    /// Of its content.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// Whether it is in the staging area.
    pub staged: bool,
    /// The repository that the build pulled it from.
    pub source: Option<String>,
}

/// Checks the image that the guest says it pushed.
pub async fn check(ctx: &GuestContext, reported: &str) -> Result<Checked, PublishError> {
    let staging = ctx.staging();
    let digest = Digest::parse(reported).map_err(|_| PublishError::BadDigest)?;
    let staged = staging.manifest(&digest).await?;
    let staged = staged.ok_or(PublishError::ManifestMissing(digest))?;
    if Digest::of(&staged.bytes) != digest {
        return Err(PublishError::ManifestMissing(digest));
    }
    let manifest = parse_manifest(&staged.media_type, &staged.bytes)?;
    let text = std::str::from_utf8(&staged.bytes);
    let text = text.map_err(|e| PublishError::NotAnImage(e.to_string()))?;
    let mut blobs = Vec::new();
    for (digest, expected) in blobs_of(&manifest)? {
        let pulled = ctx.pulled_blob(&digest);
        let in_staging = staging.blob(&digest);
        let known = in_staging.or(pulled.as_ref().map(|blob| blob.size));
        let actual = known.ok_or(PublishError::BlobMissing(digest))?;
        if actual != expected {
            return Err(PublishError::BlobSize { digest, expected, actual });
        }
        let source = pulled.map(|blob| blob.repository.to_string());
        blobs.push(CheckedBlob { digest, size: expected, staged: in_staging.is_some(), source });
    }
    let checked = Checked {
        digest,
        media_type: staged.media_type,
        manifest: text.to_owned(),
        blobs,
        dir: staging.dir().to_owned(),
    };
    let keep = checked.clone();
    let kept = tokio::task::spawn_blocking(move || keep.write_down()).await;
    kept.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(|source| {
        PublishError::Io { operation: "write to", path: checked.dir.display().to_string(), source }
    })?;
    Ok(checked)
}

impl Checked {
    /// What was checked before the host was killed; `None` when it had not come so far.
    pub async fn load(dir: &Path) -> Result<Option<Self>, PublishError> {
        let path = dir.join(FILE);
        let failed = |source| PublishError::Io {
            operation: "read",
            path: path.display().to_string(),
            source,
        };
        let bytes = match read_bounded(&path, MAX_FILE_BYTES).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let checked: Self = serde_json::from_slice(&bytes).map_err(|e| failed(e.into()))?;
        Ok(Some(Self { dir: dir.to_owned(), ..checked }))
    }

    /// Where a staged blob is.
    pub(super) fn path(&self, blob: &CheckedBlob) -> PathBuf {
        blob_path(&self.dir, &blob.digest)
    }

    /// Makes the blobs and what is known of them survive a crash of the machine: the driver is
    /// about to record that this image will be published.
    fn write_down(&self) -> io::Result<()> {
        for blob in self.blobs.iter().filter(|blob| blob.staged) {
            let file = std::fs::File::open(self.path(blob))?;
            if file.metadata()?.len() != blob.size {
                return Err(io::Error::other(format!("{} was changed", blob.digest)));
            }
            file.sync_all()?;
        }
        let temporary = self.dir.join("checked.new");
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        serde_json::to_writer(io::BufWriter::new(&file), self)?;
        file.sync_all()?;
        std::fs::rename(&temporary, self.dir.join(FILE))?;
        for dir in [self.dir.join("blobs/sha256"), self.dir.clone()] {
            std::fs::File::open(dir)?.sync_all()?;
        }
        Ok(())
    }
}

/// Parses the manifest of one image; indexes and artifacts of other schemas are refused.
pub(crate) fn parse_manifest(
    media_type: &str,
    bytes: &[u8],
) -> Result<ImageManifest, PublishError> {
    let not_an_image = |why: String| PublishError::NotAnImage(why);
    if !MANIFEST_TYPES.contains(&media_type) {
        return Err(not_an_image("its media type is not that of an image manifest".into()));
    }
    // An index read as a manifest must not pass, nor the other way round (CVE-2021-41190).
    let outline: Outline =
        serde_json::from_slice(bytes).map_err(|error| not_an_image(error.to_string()))?;
    if outline.manifests.is_some() {
        return Err(not_an_image("it lists manifests, as an index does".into()));
    }
    if outline.media_type.is_some_and(|inner| inner != media_type) {
        return Err(not_an_image("its mediaType is not the one that it was pushed with".into()));
    }
    let manifest = ImageManifest::from_reader(bytes).map_err(|e| not_an_image(e.to_string()))?;
    if manifest.schema_version() != 2 {
        return Err(not_an_image("its schemaVersion is not 2".into()));
    }
    if manifest.layers().len() > MAX_LAYERS {
        return Err(not_an_image(format!("it has more than {MAX_LAYERS} layers")));
    }
    Ok(manifest)
}

#[derive(Deserialize)]
struct Outline {
    #[serde(rename = "mediaType")]
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

/// Config and layers with their sizes, each once.
pub(crate) fn blobs_of(manifest: &ImageManifest) -> Result<BTreeMap<Digest, u64>, PublishError> {
    let mut blobs = BTreeMap::new();
    for descriptor in std::iter::once(manifest.config()).chain(manifest.layers()) {
        let digest = Digest::parse(descriptor.digest().as_ref());
        let digest = digest.map_err(|e| PublishError::NotAnImage(e.to_string()))?;
        let size = descriptor.size();
        if blobs.insert(digest, size).is_some_and(|other| other != size) {
            return Err(PublishError::NotAnImage(format!("it gives {digest} two sizes")));
        }
    }
    Ok(blobs)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn descriptor(of: &[u8], size: u64) -> Value {
        json!({"mediaType": "application/octet-stream", "digest": Digest::of(of).to_string(), "size": size})
    }

    fn manifest() -> Value {
        json!({"schemaVersion": 2, "mediaType": MANIFEST_TYPES[0],
               "config": descriptor(b"c", 1), "layers": [descriptor(b"l", 2)]})
    }

    fn parse(media_type: &str, manifest: &Value) -> Result<ImageManifest, PublishError> {
        parse_manifest(media_type, manifest.to_string().as_bytes())
    }

    #[test]
    fn images_of_both_kinds_are_taken() {
        assert!(parse(MANIFEST_TYPES[0], &manifest()).is_ok());
        let mut docker = manifest();
        docker["mediaType"] = json!(MANIFEST_TYPES[1]);
        let docker = parse(MANIFEST_TYPES[1], &docker).unwrap();
        let blobs = blobs_of(&docker).unwrap();
        assert_eq!(blobs, BTreeMap::from([(Digest::of(b"c"), 1), (Digest::of(b"l"), 2)]));
    }

    #[test]
    fn what_is_not_plainly_an_image_is_refused() {
        let with = |key: &str, value: Value| {
            let mut changed = manifest();
            changed[key] = value;
            changed
        };
        let oci = MANIFEST_TYPES[0];
        let index = "application/vnd.oci.image.index.v1+json";
        assert!(parse(index, &manifest()).is_err());
        for (what, manifest) in [
            ("an index's type", with("mediaType", json!(index))),
            ("the other type", with("mediaType", json!(MANIFEST_TYPES[1]))),
            ("an index in disguise", with("manifests", json!([]))),
            ("schema 1", with("schemaVersion", json!(1))),
            ("no config", with("config", Value::Null)),
            (
                "negative size",
                with("layers", json!([{"mediaType": "x", "digest": "sha256:0", "size": -1}])),
            ),
            ("not an object", json!([1])),
        ] {
            assert!(parse(oci, &manifest).is_err(), "{what}");
        }
        let layers = |n| with("layers", json!(vec![descriptor(b"l", 2); n]));
        assert!(parse(oci, &layers(MAX_LAYERS)).is_ok());
        assert!(parse(oci, &layers(MAX_LAYERS + 1)).is_err());

        let two_sizes = with("layers", json!([descriptor(b"l", 2), descriptor(b"l", 3)]));
        assert!(blobs_of(&parse(oci, &two_sizes).unwrap()).is_err());
        let long = format!("sha512:{}", "a".repeat(128));
        let sha512 = with("layers", json!([{"mediaType": "x", "digest": long, "size": 1}]));
        assert!(parse(oci, &sha512).and_then(|m| blobs_of(&m)).is_err());
    }
}
