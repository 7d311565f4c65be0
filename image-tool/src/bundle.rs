//! A builder bundle: the three files that a VM boots from, and `bundle.json` that describes them.
//!
//! ```text
//! DIR/ kernel  initrd  root.erofs  bundle.json  inputs.json
//!      oci-layout  index.json  blobs/sha256/…      the same files by other names, for publishing
//! ```

mod manifest;

use std::path::{Path, PathBuf};

use kiln_protocol::version::VersionRange;
use oci_spec::image::MediaType;

use crate::digest::Digest;
use crate::file::{self, FileError};
use crate::layout::{self, Blob, Layout, LayoutError, Manifest as OciManifest};

pub use manifest::{AgentInfo, FileInfo, Files, KernelInfo, Manifest};

/// `artifactType` of a published bundle.
pub const ARTIFACT_TYPE: &str = "application/vnd.kiln.builder.v1+json";
/// Media type of `bundle.json`.
pub const CONFIG_TYPE: &str = "application/vnd.kiln.builder.config.v1+json";
/// The only form of `bundle.json` so far.
pub const SCHEMA: u32 = 1;

/// `bundle.json` has a few KB.
const MAX_BUNDLE_JSON: u64 = 256 * 1024;

/// A bundle on this machine.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The kernel image.
    pub kernel: PathBuf,
    /// Agent and modules.
    pub initrd: PathBuf,
    /// The root disk.
    pub root: PathBuf,
    /// What `bundle.json` says.
    pub manifest: Manifest,
    /// Digest of the OCI manifest: the name under which the bundle is, or would be, published.
    pub digest: Digest,
    dir: PathBuf,
}

/// A directory is no usable bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// No `bundle.json`.
    #[error("{} is not a builder bundle; make one with: kiln-image build images/builder -o {}", .0.display(), .0.display())]
    NotABundle(PathBuf, #[source] FileError),
    /// A file of it.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// `bundle.json` does not have the form.
    #[error("{} is not valid", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
    /// From a newer Kiln.
    #[error("bundle.json has schema {0}; this Kiln reads {SCHEMA}")]
    Schema(u64),
    /// Agent and host would not understand each other.
    #[error(
        "the bundle's agent speaks protocol {bundle}, this Kiln {host}; build or pull a bundle of this version"
    )]
    Protocol {
        /// The agent's range.
        bundle: VersionRange,
        /// Ours.
        host: VersionRange,
    },
    /// A file was cut or exchanged.
    #[error("{} has {actual} bytes, bundle.json says {expected}; build or pull the bundle again", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Found.
        actual: u64,
        /// Stated.
        expected: u64,
    },
    /// A file was changed.
    #[error("{} has digest {actual}, bundle.json says {expected}; build or pull the bundle again", path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// Found.
        actual: Digest,
        /// Stated.
        expected: Digest,
    },
    /// The layout describes something else.
    #[error("the OCI layout of {} does not describe the bundle beside it", .0.display())]
    Disagree(PathBuf),
}

impl Bundle {
    /// Opens a bundle: `bundle.json` is read and checked, and the files have the sizes that it states.
    /// Digests are checked by [`Bundle::measure`] and [`Bundle::verify`], which read everything.
    pub fn open(dir: &Path) -> Result<Self, BundleError> {
        let path = dir.join("bundle.json");
        let bytes = file::read_bounded(&path, MAX_BUNDLE_JSON)
            .map_err(|e| BundleError::NotABundle(dir.to_owned(), e))?;
        let manifest = Manifest::parse(&bytes, &path)?;
        let digest = published_digest(dir, &bytes, &manifest)?;
        let file = |name| dir.join(name);
        let bundle = Self {
            kernel: file("kernel"),
            initrd: file("initrd"),
            root: file("root.erofs"),
            manifest,
            digest,
            dir: dir.to_owned(),
        };
        for (name, _, expected) in bundle.manifest.files.each() {
            let path = file(name);
            let metadata = path.metadata().map_err(|e| FileError::new("open", &path, e))?;
            if !metadata.is_file() || metadata.len() != expected.size {
                let (actual, expected) = (metadata.len(), expected.size);
                return Err(BundleError::Size { path, actual, expected });
            }
        }
        Ok(bundle)
    }

    /// Whether this host can talk to the bundle's agent.
    pub fn check_protocol(&self) -> Result<(), BundleError> {
        self.manifest.check_protocol()
    }

    /// Hashes the three files that a VM boots from: each has to be what `bundle.json` says.
    pub fn measure(&self) -> Result<(), BundleError> {
        for (name, _, expected) in self.manifest.files.each() {
            let path = self.dir.join(name);
            let (actual, _) = Digest::of_file(&path)?;
            if actual != expected.digest {
                let expected = expected.digest.clone();
                return Err(BundleError::Digest { path, actual, expected });
            }
        }
        Ok(())
    }

    /// Hashes every file, and the layout's blobs where they are not the same files.
    pub fn verify(&self) -> Result<(), BundleError> {
        self.measure()?;
        let mut layout = Layout::open(&self.dir)?;
        let files = self.manifest.files.each().map(|(name, _, info)| (self.dir.join(name), info));
        layout.blobs.retain(|blob| {
            let same = |(path, info): &(PathBuf, &FileInfo)| {
                info.digest == blob.digest
                    && same_file(path, &Layout::blob_path(&self.dir, &blob.digest))
            };
            !files.iter().any(same)
        });
        Ok(layout.verify()?)
    }
}

/// Writes `bundle.json` and the layout beside the three files, which are there already.
pub fn write(dir: &Path, manifest: &Manifest) -> Result<Digest, BundleError> {
    let config = layout::canonical(manifest);
    let config_blob = Blob {
        media_type: CONFIG_TYPE.to_owned(),
        digest: Digest::of(&config),
        size: config.len() as u64,
        title: None,
    };
    let layers: Vec<_> = manifest.layers().iter().map(Blob::to_json).collect();
    let oci = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": MediaType::ImageManifest.to_string(),
        "artifactType": ARTIFACT_TYPE,
        "config": config_blob.to_json(),
        "layers": layers,
    });
    write_as_published(dir, manifest, &config, &layout::canonical(&oci))
}

/// The same from the bytes that a registry had: they are kept as they are, and so is the digest.
pub fn write_as_published(
    dir: &Path,
    manifest: &Manifest,
    config: &[u8],
    oci: &[u8],
) -> Result<Digest, BundleError> {
    file::write(&dir.join("bundle.json"), config)?;
    let writer = layout::Writer::create(dir)?;
    writer.add_bytes(CONFIG_TYPE, config)?;
    for layer in manifest.layers() {
        let path = dir.join(layer.title.as_deref().unwrap_or_default());
        writer.add_link(&path, layer)?;
    }
    let oci = writer.add_bytes(MediaType::ImageManifest.as_ref(), oci)?;
    writer.finish(&oci, &serde_json::json!({ "artifactType": ARTIFACT_TYPE }))?;
    Ok(oci.digest)
}

/// Whether two names are hard links of one file, which then need not be read twice.
fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |p: &Path| p.metadata().ok().map(|m| (m.dev(), m.ino()));
    identity(a).is_some_and(|a| identity(b) == Some(a))
}

/// The OCI manifest's digest, once it is certain that it describes this very `bundle.json`.
fn published_digest(dir: &Path, json: &[u8], manifest: &Manifest) -> Result<Digest, BundleError> {
    let layout = Layout::open(dir)?;
    let disagree = || BundleError::Disagree(dir.to_owned());
    let (blob, bytes) = layout.root().ok_or_else(disagree)?;
    check_artifact(&blob.media_type, bytes, json, manifest).then_some(()).ok_or_else(disagree)?;
    Ok(blob.digest.clone())
}

/// Whether an OCI manifest is that of the bundle which `bundle.json` describes.
pub fn check_artifact(media_type: &str, oci: &[u8], json: &[u8], manifest: &Manifest) -> bool {
    let Ok(OciManifest::Image(oci)) = OciManifest::parse(media_type, oci, "manifest") else {
        return false;
    };
    let blob = |d| Blob::from_descriptor(d, "manifest").ok();
    let layers: Option<Vec<Blob>> = oci.layers().iter().map(blob).collect();
    oci.artifact_type().as_ref().is_some_and(|t| t.to_string() == ARTIFACT_TYPE)
        && blob(oci.config()).is_some_and(|c| c.digest == Digest::of(json))
        && layers.is_some_and(|l| l == manifest.layers())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use std::fs;

    use kiln_protocol::version::Version;

    use super::*;

    /// A complete small bundle.
    pub(crate) fn sample(dir: &Path) -> Digest {
        for (name, data) in [("kernel", "KERNEL"), ("initrd", "INITRD"), ("root.erofs", "ROOT")] {
            fs::write(dir.join(name), data).unwrap();
        }
        write(dir, &manifest()).unwrap()
    }

    fn manifest() -> Manifest {
        let info =
            |data: &str| FileInfo { digest: Digest::of(data.as_bytes()), size: data.len() as u64 };
        let root = info("ROOT");
        Manifest {
            schema: SCHEMA,
            name: "builder".into(),
            identity: format!("builder@{}", root.digest),
            architecture: "amd64".into(),
            suite: "trixie".into(),
            protocol: VersionRange { min: Version(1), max: Version(1) },
            agent: AgentInfo { version: "0.1.0".into(), digest: Digest::of(b"AGENT") },
            kernel: KernelInfo {
                release: "6.1.0-56-cloud-amd64".into(),
                version: Some("6.1.0-56-cloud-amd64 Debian 6.1.192-2".into()),
                suite: "bookworm".into(),
                modules: vec!["virtio_ring".into(), "virtio".into()],
            },
            engine: [("buildah".into(), "1.39.3+ds1-1".into())].into(),
            files: Files { kernel: info("KERNEL"), initrd: info("INITRD"), root },
            created: None,
        }
    }

    #[test]
    fn bundle_json_is_what_it_always_was() {
        let dir = tempfile::tempdir().unwrap();
        let digest = sample(dir.path());
        insta::assert_snapshot!(fs::read_to_string(dir.path().join("bundle.json")).unwrap(), @r#"
        {
          "agent": {
            "digest": "sha256:b62db7d0b79d11100c7103df97dd87bc90ff6ffbd88de6019cf1e933069c8525",
            "version": "0.1.0"
          },
          "architecture": "amd64",
          "engine": {
            "buildah": "1.39.3+ds1-1"
          },
          "files": {
            "initrd": {
              "digest": "sha256:f5e3dba158c542884540793cb24e361afb19e6874c5934e2a0304203b7626fe4",
              "size": 6
            },
            "kernel": {
              "digest": "sha256:a204d4ad1de3e9b07751899e5cf4d4a3017328c41372c70fdcc8db9587bb38fb",
              "size": 6
            },
            "root.erofs": {
              "digest": "sha256:fed4199357214dfb94724176c68a76698dbc3c2d36317a895320207ac910dea6",
              "size": 4
            }
          },
          "identity": "builder@sha256:fed4199357214dfb94724176c68a76698dbc3c2d36317a895320207ac910dea6",
          "kernel": {
            "modules": [
              "virtio_ring",
              "virtio"
            ],
            "release": "6.1.0-56-cloud-amd64",
            "suite": "bookworm",
            "version": "6.1.0-56-cloud-amd64 Debian 6.1.192-2"
          },
          "name": "builder",
          "protocol": {
            "max": 1,
            "min": 1
          },
          "schema": 1,
          "suite": "trixie"
        }
        "#);
        assert_eq!(
            digest.as_str(),
            "sha256:bc0f59b1f6dadf614839e9c1aa38656730b1c4766de9f8844b1f9e03ba448fa2"
        );
        let bundle = Bundle::open(dir.path()).unwrap();
        assert_eq!((bundle.manifest.clone(), bundle.digest.clone()), (manifest(), digest));
        bundle.check_protocol().unwrap();
        bundle.verify().unwrap();
    }

    #[test]
    fn a_cut_file_is_found_on_opening_and_a_changed_one_by_verifying() {
        let dir = tempfile::tempdir().unwrap();
        sample(dir.path());
        fs::write(dir.path().join("root.erofs"), "ROOF").unwrap();
        let bundle = Bundle::open(dir.path()).unwrap();
        for error in [bundle.measure().unwrap_err(), bundle.verify().unwrap_err()] {
            assert!(error.to_string().contains("root.erofs has digest sha256:"), "{error}");
        }
        fs::write(dir.path().join("root.erofs"), "ROO").unwrap();
        let error = Bundle::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("has 3 bytes, bundle.json says 4"), "{error}");
    }

    #[test]
    fn a_bundle_json_that_the_layout_does_not_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        sample(dir.path());
        let path = dir.path().join("bundle.json");
        let text = fs::read_to_string(&path).unwrap().replace("trixie", "forky");
        fs::remove_file(&path).unwrap();
        fs::write(&path, text).unwrap();
        assert!(matches!(Bundle::open(dir.path()), Err(BundleError::Disagree(_))));
    }

    #[test]
    fn other_protocols_and_schemas_are_refused_with_what_to_do() {
        let mut other = manifest();
        other.protocol = VersionRange { min: Version(7), max: Version(9) };
        let error = other.check_protocol().unwrap_err().to_string();
        assert!(error.contains("speaks protocol v7 to v9, this Kiln v1"), "{error}");
        let newer = br#"{"schema": 2, "anything": []}"#;
        let error = Manifest::parse(newer, Path::new("b")).unwrap_err();
        assert!(matches!(error, BundleError::Schema(2)));
        let error = Bundle::open(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(error.contains("kiln-image build images/builder -o /nowhere"), "{error}");
    }

    #[test]
    fn bundle_json_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let size = usize::try_from(MAX_BUNDLE_JSON).unwrap();
        fs::write(dir.path().join("bundle.json"), vec![b' '; size]).unwrap();
        assert!(matches!(Bundle::open(dir.path()), Err(BundleError::Malformed { .. })));
        fs::write(dir.path().join("bundle.json"), vec![b' '; size + 1]).unwrap();
        assert!(matches!(Bundle::open(dir.path()), Err(BundleError::NotABundle(..))));
    }
}
