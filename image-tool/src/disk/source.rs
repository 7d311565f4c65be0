//! Where an image is: a layout, an archive of one, an archive of `docker save`. Opened, and its layers found; none is
//! read yet.
//!
//! An archive is not unpacked: its members are windows of its file.

use std::collections::BTreeMap;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use oci_spec::image::ImageIndex;
use serde::Deserialize;

use super::manifest::{self, ManifestError};
use super::path;
use super::tar::{Kind, Reader, TarError};
use super::window::Window;
use crate::digest::Digest;
use crate::file::FileError;
use crate::layout::{Blob, Layout, LayoutError, MAX_MANIFEST, Manifest};

/// Members of an archive: several for each layer of every image in it.
const MAX_MEMBERS: usize = 100_000;
/// Of an archive, read at a time.
const HEADERS: usize = 4096;
/// Of tar.
const BLOCK: u64 = 512;
/// Indexes in indexes are legal, but nobody makes more.
const MAX_DEPTH: usize = 3;

/// An image on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory: an OCI image layout.
    Layout(PathBuf),
    /// A tar archive of a layout, or one that `docker save` made. Not compressed.
    Archive(PathBuf),
}

impl Source {
    /// A directory is a layout, a file an archive.
    pub fn of(path: &Path) -> Self {
        if path.is_dir() { Self::Layout(path.into()) } else { Self::Archive(path.into()) }
    }
}

/// The image was not found in its source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A manifest or layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The image's kind.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The archive.
    #[error("{} is no tar archive of an image (a compressed one must be unpacked first)", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// Why.
        #[source]
        source: TarError,
    },
    /// Another archive.
    #[error("{} is an archive of something else: it has neither index.json nor manifest.json", .0.display())]
    NoImage(PathBuf),
    /// It refers to what it has not got.
    #[error("the image has no {0:?}")]
    Missing(String),
    /// One of its files.
    #[error("cannot read {what:?} of the image")]
    Read {
        /// Its name.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An image whose layers can be read.
pub struct Image {
    /// Of the manifest; of Docker's archive, which has none, of the configuration.
    pub digest: Digest,
    /// The configuration's bytes; their digest is checked.
    pub config: Vec<u8>,
    /// The lowest first.
    pub layers: Vec<LayerBlob>,
}

/// A layer as it is stored.
pub struct LayerBlob {
    /// By the manifest. Docker's archives state none: their layers are checked by their `diff_id` alone.
    pub digest: Option<Digest>,
    /// Its bytes.
    pub blob: Window,
}

/// Finds the image for an architecture (Go's name).
pub fn open(source: &Source, architecture: &str) -> Result<Image, SourceError> {
    match source {
        Source::Layout(dir) => {
            let files = Files::Dir(dir.clone());
            files.read("oci-layout").map_err(|e| match e {
                SourceError::File(e) => LayoutError::NotALayout(dir.clone(), e).into(),
                other => other,
            })?;
            oci(&files, architecture)
        }
        Source::Archive(path) => {
            let files = Files::Archive(Archive::open(path)?);
            if files.has("index.json") {
                oci(&files, architecture)
            } else if files.has("manifest.json") {
                docker(&files)
            } else {
                Err(SourceError::NoImage(path.clone()))
            }
        }
    }
}

fn oci(files: &Files, architecture: &str) -> Result<Image, SourceError> {
    let mut what = "index.json".to_owned();
    let mut index: ImageIndex = parse(&what, &files.read(&what)?)?;
    for _ in 0..MAX_DEPTH {
        let chosen = manifest::select(&index, architecture, &what)?;
        let bytes = files.checked(&chosen)?;
        what = chosen.digest.to_string();
        match Manifest::parse(&chosen.media_type, &bytes, &what)? {
            Manifest::Index(inner) => index = *inner,
            Manifest::Image(manifest) => {
                let (config, layers) = manifest::parts(&manifest, &what)?;
                let config = files.checked(&config)?;
                let open = |layer: Blob| {
                    let blob = files.blob(&layer)?;
                    Ok(LayerBlob { digest: Some(layer.digest), blob })
                };
                let layers: Result<_, SourceError> = layers.into_iter().map(open).collect();
                return Ok(Image { digest: chosen.digest, config, layers: layers? });
            }
        }
    }
    Err(LayoutError::TooLarge(what).into())
}

/// `manifest.json` of `docker save` (moby, `image/tarexport`): names of members.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    layers: Vec<String>,
}

fn docker(files: &Files) -> Result<Image, SourceError> {
    let what = "manifest.json";
    let saved: Vec<Saved> = parse(what, &files.read(what)?)?;
    let [saved] = saved.as_slice() else {
        let (what, count) = (what.to_owned(), saved.len());
        let architecture = "any".to_owned();
        return Err(ManifestError::NotOne { what, count, architecture }.into());
    };
    let config = files.read(&saved.config)?;
    let open = |name: &String| Ok(LayerBlob { digest: None, blob: files.open(name)? });
    let layers: Result<_, SourceError> = saved.layers.iter().map(open).collect();
    Ok(Image { digest: Digest::of(&config), config, layers: layers? })
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, LayoutError> {
    serde_json::from_slice(bytes)
        .map_err(|source| LayoutError::Malformed { what: what.to_owned(), source })
}

/// A layout's files.
enum Files {
    Dir(PathBuf),
    Archive(Archive),
}

impl Files {
    fn has(&self, name: &str) -> bool {
        self.open(name).is_ok()
    }

    /// `name` is one of ours, or of an archive's own members.
    fn open(&self, name: &str) -> Result<Window, SourceError> {
        match self {
            Self::Dir(dir) => Ok(Window::open(&dir.join(name))?),
            Self::Archive(archive) => {
                archive.member(name).ok_or_else(|| SourceError::Missing(name.to_owned()))
            }
        }
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        let bytes = self.open(name)?.read_bounded(MAX_MANIFEST);
        bytes.map_err(|source| SourceError::Read { what: name.to_owned(), source })
    }

    fn blob(&self, blob: &Blob) -> Result<Window, SourceError> {
        // A digest is 64 digits and no path.
        let name = Layout::blob_path(Path::new(""), &blob.digest);
        let window = self.open(&name.to_string_lossy())?;
        if window.len() == blob.size {
            return Ok(window);
        }
        let what = blob.digest.to_string();
        let why = format!("it has {} bytes, {} were announced", window.len(), blob.size);
        Err(SourceError::Read { what, source: io::Error::other(why) })
    }

    /// A small blob whose digest fits.
    fn checked(&self, blob: &Blob) -> Result<Vec<u8>, SourceError> {
        let bytes = self.blob(blob)?.read_bounded(MAX_MANIFEST);
        let what = || blob.digest.to_string();
        let bytes = bytes.map_err(|source| SourceError::Read { what: what(), source })?;
        let actual = Digest::of(&bytes);
        if actual == blob.digest {
            return Ok(bytes);
        }
        let (expected, size) = (blob.digest.clone(), blob.size);
        Err(LayoutError::Mismatch { expected, expected_size: size, actual, size }.into())
    }
}

/// A tar archive's members: where their bytes are.
struct Archive {
    members: BTreeMap<Box<str>, Member>,
}

enum Member {
    File(Window),
    /// `docker save` wrote a layer once and linked it where it stood again.
    Link(Box<str>),
}

impl Archive {
    fn open(path: &Path) -> Result<Self, SourceError> {
        let whole = Window::open(path)?;
        let refused = |source| SourceError::Archive { path: path.to_owned(), source };
        let mut members = BTreeMap::new();
        let mut at = 0;
        // From header to header, over the data: an archive of gigabytes is listed by reading little.
        while let Some(rest) = whole.part(at, whole.len().saturating_sub(at)) {
            let mut reader = Reader::new(BufReader::with_capacity(HEADERS, rest));
            let Some(entry) = reader.entry().map_err(refused)? else { break };
            let input = reader.into_inner();
            let data = whole.len() - input.get_ref().len() - input.buffer().len() as u64;
            let window =
                whole.part(data, entry.size).ok_or_else(|| refused(TarError::Truncated))?;
            at = data + entry.size.next_multiple_of(BLOCK);
            // Names that are none of an image's are none that are asked for.
            let Ok(name) = path::normal(&entry.path) else { continue };
            let member = match entry.kind {
                Kind::File => Member::File(window),
                Kind::Symlink | Kind::HardLink => {
                    match link_target(&name, entry.kind, &entry.link) {
                        Some(target) => Member::Link(target),
                        None => continue,
                    }
                }
                _ => continue,
            };
            members.insert(name, member);
            if members.len() > MAX_MEMBERS {
                let why = io::Error::other(format!("it has more than {MAX_MEMBERS} members"));
                return Err(refused(TarError::Read(why)));
            }
        }
        Ok(Self { members })
    }

    fn member(&self, name: &str) -> Option<Window> {
        let name = path::normal(name.as_bytes()).ok()?;
        match self.members.get(&name)? {
            Member::File(window) => Some(window.clone()),
            // One step: nobody links links.
            Member::Link(target) => match self.members.get(target)? {
                Member::File(window) => Some(window.clone()),
                Member::Link(_) => None,
            },
        }
    }
}

/// The member that a link names: inside the archive, by its text alone.
fn link_target(name: &str, kind: Kind, target: &[u8]) -> Option<Box<str>> {
    let target = path::text(target, usize::MAX).ok()?;
    if kind == Kind::HardLink {
        return path::normal(target.as_bytes()).ok();
    }
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/").into())
}
