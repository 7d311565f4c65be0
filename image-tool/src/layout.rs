//! OCI image layouts (image-spec `image-layout.md`): writing one, and walking one before it is
//! published or checked.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, MediaType, OciLayout};
use serde::Serialize;
use serde_json::Value;

use crate::digest::{Digest, NotADigest};
use crate::file::{self, FileError};

/// Manifests have a few KB; registries refuse those over 4 MiB.
pub const MAX_MANIFEST: u64 = 4 * 1024 * 1024;
/// An index of every platform of every image that we know has fewer.
const MAX_MANIFESTS: usize = 256;
const LAYOUT_VERSION: &str = "1.0.0";

/// A layout could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A file of it.
    #[error(transparent)]
    File(#[from] FileError),
    /// No layout at all.
    #[error("{} is not an OCI image layout", .0.display())]
    NotALayout(PathBuf, #[source] FileError),
    /// JSON that does not have the form.
    #[error("{what} is not valid")]
    Malformed {
        /// A file's path, or a digest.
        what: String,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
    /// A digest of another algorithm, or none.
    #[error("{what} refers to {value:?}")]
    Digest {
        /// A file's path, or a digest.
        what: String,
        /// What stands there.
        value: String,
        /// Why it is refused.
        #[source]
        source: NotADigest,
    },
    /// Nothing, or several images.
    #[error("{} holds {count} images; one is expected", dir.display())]
    NotOne {
        /// The layout.
        dir: PathBuf,
        /// How many there are.
        count: usize,
    },
    /// Indexes in indexes, or too many manifests.
    #[error("{0} is nested too deeply or has too many manifests")]
    TooLarge(String),
    /// A blob's bytes are not what its name says.
    #[error(
        "blob {expected} has {size} bytes with digest {actual}; {expected_size} bytes were expected"
    )]
    Mismatch {
        /// Its name.
        expected: Digest,
        /// Its descriptor's size.
        expected_size: u64,
        /// What the bytes give.
        actual: Digest,
        /// How many there are.
        size: u64,
    },
}

/// A thing in a layout or registry: media type, digest, size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// What it is.
    pub media_type: String,
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// `org.opencontainers.image.title`, where the descriptor has one.
    pub title: Option<String>,
}

const TITLE: &str = "org.opencontainers.image.title";

impl Blob {
    /// Takes what is needed from a descriptor in `what` (for messages).
    pub fn from_descriptor(descriptor: &Descriptor, what: &str) -> Result<Self, LayoutError> {
        let value = descriptor.digest().to_string();
        let digest = Digest::parse(&value).map_err(|source| LayoutError::Digest {
            what: what.to_owned(),
            value,
            source,
        })?;
        let title = descriptor.annotations().as_ref().and_then(|a| a.get(TITLE).cloned());
        let media_type = descriptor.media_type().to_string();
        Ok(Self { media_type, digest, size: descriptor.size(), title })
    }

    /// As JSON for a manifest.
    pub fn to_json(&self) -> Value {
        let mut json = serde_json::json!({
            "mediaType": self.media_type, "digest": self.digest, "size": self.size,
        });
        if let Some(title) = &self.title {
            json["annotations"] = serde_json::json!({ TITLE: title });
        }
        json
    }
}

/// A layout being written.
pub struct Writer {
    dir: PathBuf,
}

impl Writer {
    /// Begins a layout in an existing directory.
    pub fn create(dir: &Path) -> Result<Self, LayoutError> {
        file::create_dir_all(&dir.join("blobs/sha256"))?;
        let layout = serde_json::json!({ "imageLayoutVersion": LAYOUT_VERSION });
        file::write(&dir.join("oci-layout"), &canonical(&layout))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Stores bytes.
    pub fn add_bytes(&self, media_type: &str, bytes: &[u8]) -> Result<Blob, LayoutError> {
        let digest = Digest::of(bytes);
        let path = Layout::blob_path(&self.dir, &digest);
        if !path.exists() {
            file::write(&path, bytes)?;
        }
        Ok(Blob {
            media_type: media_type.to_owned(),
            digest,
            size: bytes.len() as u64,
            title: None,
        })
    }

    /// Stores a file of the same file system by a second name; its digest is already known.
    pub fn add_link(&self, path: &Path, blob: Blob) -> Result<Blob, LayoutError> {
        let to = Layout::blob_path(&self.dir, &blob.digest);
        if !to.exists() {
            file::hard_link(path, &to)?;
        }
        Ok(blob)
    }

    /// Writes the index that points at the one manifest; `extra` goes into its descriptor.
    pub fn finish(self, manifest: &Blob, extra: &Value) -> Result<(), LayoutError> {
        let mut descriptor = manifest.to_json();
        if let (Some(descriptor), Some(extra)) = (descriptor.as_object_mut(), extra.as_object()) {
            descriptor.extend(extra.clone());
        }
        let index = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MediaType::ImageIndex.to_string(),
            "manifests": [descriptor],
        });
        Ok(file::write(&self.dir.join("index.json"), &canonical(&index))?)
    }
}

/// JSON whose bytes depend on its content only: keys sorted, one form of spacing.
pub fn canonical(value: &impl Serialize) -> Vec<u8> {
    // Through `Value`, whose maps are sorted unless a dependency turns that off: sort to be sure.
    let sorted = serde_json::to_value(value).map(|mut value| {
        value.sort_all_objects();
        format!("{value:#}\n").into_bytes()
    });
    // Only maps with keys that are no strings fail, and nothing here has one.
    sorted.unwrap_or_default()
}

/// What a layout holds, in the order of publishing.
#[derive(Debug)]
pub struct Layout {
    dir: PathBuf,
    /// Config and layers of all manifests, each once.
    pub blobs: Vec<Blob>,
    /// Manifests, children before the index that lists them; the last is the image itself.
    pub manifests: Vec<(Blob, Vec<u8>)>,
}

/// A parsed manifest.
#[derive(Debug)]
pub enum Manifest {
    /// Of an image or artifact.
    Image(Box<ImageManifest>),
    /// Of several platforms.
    Index(Box<ImageIndex>),
}

impl Manifest {
    /// Parses by the media type that the descriptor or the registry stated.
    pub fn parse(media_type: &str, bytes: &[u8], what: &str) -> Result<Self, LayoutError> {
        /// Docker's older name for an index.
        const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
        let malformed = |source| LayoutError::Malformed { what: what.to_owned(), source };
        if media_type == MediaType::ImageIndex.to_string() || media_type == DOCKER_LIST {
            return Ok(Self::Index(Box::new(serde_json::from_slice(bytes).map_err(malformed)?)));
        }
        Ok(Self::Image(Box::new(serde_json::from_slice(bytes).map_err(malformed)?)))
    }
}

impl Layout {
    /// Reads a layout that holds one image; checks its manifests' digests, not its blobs'.
    pub fn open(dir: &Path) -> Result<Self, LayoutError> {
        let marker = file::read_bounded(&dir.join("oci-layout"), MAX_MANIFEST)
            .map_err(|e| LayoutError::NotALayout(dir.to_owned(), e))?;
        let marker: OciLayout = parse("oci-layout", &marker)?;
        tracing::debug!(version = marker.image_layout_version(), "layout");
        let bytes = file::read_bounded(&dir.join("index.json"), MAX_MANIFEST)?;
        let index: ImageIndex = parse("index.json", &bytes)?;
        let [root] = index.manifests().as_slice() else {
            return Err(LayoutError::NotOne {
                dir: dir.to_owned(),
                count: index.manifests().len(),
            });
        };
        let root = Blob::from_descriptor(root, "index.json")?;
        let mut layout = Self { dir: dir.to_owned(), blobs: Vec::new(), manifests: Vec::new() };
        layout.collect(root, 0)?;
        let mut seen = BTreeSet::new();
        layout.blobs.retain(|blob| seen.insert(blob.digest.clone()));
        Ok(layout)
    }

    /// The image: an image manifest, or an index.
    pub fn root(&self) -> Option<&(Blob, Vec<u8>)> {
        self.manifests.last()
    }

    /// Where a blob's bytes are.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        Layout::blob_path(&self.dir, digest)
    }

    /// Where the layout in `dir` keeps a blob.
    pub fn blob_path(dir: &Path, digest: &Digest) -> PathBuf {
        dir.join("blobs/sha256").join(digest.hex())
    }

    /// Hashes every blob.
    pub fn verify(&self) -> Result<(), LayoutError> {
        for blob in &self.blobs {
            let (actual, size) = Digest::of_file(&self.path(&blob.digest))?;
            check(blob, actual, size)?;
        }
        Ok(())
    }

    fn collect(&mut self, blob: Blob, depth: usize) -> Result<(), LayoutError> {
        /// An index of images; indexes of indexes are legal but nobody makes them.
        const MAX_DEPTH: usize = 2;
        if depth > MAX_DEPTH || self.manifests.len() >= MAX_MANIFESTS {
            return Err(LayoutError::TooLarge(blob.digest.to_string()));
        }
        let bytes = file::read_bounded(&self.path(&blob.digest), MAX_MANIFEST)?;
        check(&blob, Digest::of(&bytes), bytes.len() as u64)?;
        let what = blob.digest.as_str();
        match Manifest::parse(&blob.media_type, &bytes, what)? {
            Manifest::Image(manifest) => {
                for part in std::iter::once(manifest.config()).chain(manifest.layers()) {
                    self.blobs.push(Blob::from_descriptor(part, what)?);
                }
            }
            Manifest::Index(index) => {
                for child in index.manifests() {
                    self.collect(Blob::from_descriptor(child, what)?, depth + 1)?;
                }
            }
        }
        self.manifests.push((blob, bytes));
        Ok(())
    }
}

fn check(blob: &Blob, actual: Digest, size: u64) -> Result<(), LayoutError> {
    if actual == blob.digest && size == blob.size {
        return Ok(());
    }
    let (expected, expected_size) = (blob.digest.clone(), blob.size);
    Err(LayoutError::Mismatch { expected, expected_size, actual, size })
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, LayoutError> {
    let malformed = |source| LayoutError::Malformed { what: what.to_owned(), source };
    serde_json::from_slice(bytes).map_err(malformed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;

    /// A small artifact whose layer is `data`.
    pub(crate) fn sample(dir: &Path, data: &[u8]) -> Blob {
        let writer = Writer::create(dir).unwrap();
        let config = writer.add_bytes("application/vnd.kiln.test.config+json", b"{}").unwrap();
        let layer = writer.add_bytes("application/vnd.kiln.test.layer", data).unwrap();
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MediaType::ImageManifest.to_string(),
            "artifactType": "application/vnd.kiln.test",
            "config": config.to_json(),
            "layers": [layer.to_json()],
        });
        let manifest =
            writer.add_bytes(MediaType::ImageManifest.as_ref(), &canonical(&manifest)).unwrap();
        writer.finish(&manifest, &serde_json::json!({})).unwrap();
        manifest
    }

    #[test]
    fn digests_are_stable() {
        let dir = tempfile::tempdir().unwrap();
        let manifest = sample(dir.path(), b"kiln");
        assert_eq!(
            manifest.digest.as_str(),
            "sha256:51b099ccc7c8827cbc32970ef5802efe95b879a2b2bc7b6e47a478b6f791cdd5"
        );
        let index = std::fs::read(dir.path().join("index.json")).unwrap();
        assert_eq!(
            Digest::of(&index).as_str(),
            "sha256:12dc4bc69b3981428e3c93267ef978deafc7259bd40a8c882a4ea1fb2ecd4a2e"
        );
        let layout = Layout::open(dir.path()).unwrap();
        layout.verify().unwrap();
        assert_eq!((layout.blobs.len(), layout.manifests.len()), (2, 1));
        assert_eq!(layout.root().unwrap().0, manifest);
    }

    #[test]
    fn damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let manifest = sample(dir.path(), b"kiln");
        let layout = Layout::open(dir.path()).unwrap();
        std::fs::write(layout.path(&Digest::of(b"kiln")), b"Kiln").unwrap();
        assert!(matches!(layout.verify(), Err(LayoutError::Mismatch { size: 4, .. })));
        std::fs::write(layout.path(&manifest.digest), b"{}").unwrap();
        assert!(matches!(Layout::open(dir.path()), Err(LayoutError::Mismatch { size: 2, .. })));
    }

    #[test]
    fn a_digest_cannot_be_a_path() {
        let dir = tempfile::tempdir().unwrap();
        sample(dir.path(), b"kiln");
        let index = dir.path().join("index.json");
        let text = std::fs::read_to_string(&index).unwrap();
        let at = text.find("sha256:").unwrap();
        let evil = format!("{}sha256:../../../etc/passwd{}", &text[..at], &text[at + 71..]);
        std::fs::write(&index, evil).unwrap();
        Layout::open(dir.path()).unwrap_err();
    }

    #[test]
    fn an_index_is_walked_children_first_and_only_so_deep() {
        let dir = tempfile::tempdir().unwrap();
        let image = sample(dir.path(), b"kiln");
        let nest = |inner: &Blob| {
            std::fs::remove_file(dir.path().join("index.json")).unwrap();
            let writer = Writer { dir: dir.path().to_owned() };
            let kind = MediaType::ImageIndex.to_string();
            let index = serde_json::json!({ "schemaVersion": 2, "mediaType": kind, "manifests": [inner.to_json()] });
            let index = writer.add_bytes(&kind, &canonical(&index)).unwrap();
            writer.finish(&index, &serde_json::json!({})).unwrap();
            index
        };
        let one = nest(&image);
        let layout = Layout::open(dir.path()).unwrap();
        let order: Vec<_> = layout.manifests.iter().map(|(b, _)| b.digest.clone()).collect();
        assert_eq!(order, [image.digest.clone(), one.digest.clone()]);
        let two = nest(&one);
        Layout::open(dir.path()).unwrap();
        nest(&two);
        assert!(matches!(Layout::open(dir.path()), Err(LayoutError::TooLarge(_))));
    }

    #[test]
    fn other_directories_are_no_layouts() {
        let dir = tempfile::tempdir().unwrap();
        let error = Layout::open(dir.path()).unwrap_err();
        assert!(error.to_string().ends_with("is not an OCI image layout"));
    }
}
