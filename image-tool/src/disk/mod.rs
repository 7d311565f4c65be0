//! From an image to a disk that a VM can boot from: without root, without mounting, and without believing
//! the image anything.
//!
//! ```text
//! layout │ archive │ registry ─▶ source: manifest, configuration, layers
//!                                   │ each layer, the lowest first
//!   decode (own thread): blob ─▶ digest ─▶ gunzip/unzstd ─▶ chunks ─▶ diff_id, limits
//!                                   │
//!   layer: tar entries, checked ────┼──▶ contents ─▶ spool (a file without a name, beside OUT)
//!                                   ▼
//!   tree: whiteouts, opaque directories, entries ─ in memory, charged to the budget
//!                                   │ when all digests fit
//!   ext4 │ erofs: metadata, then contents ─▶ OUT's temporary file ─▶ fsync ─▶ rename
//! ```
//!
//! **Invariant:** nothing is written on this machine but the spool and the disk; no path of an image is ever a path of
//! the host. Each layer is unpacked once, and each content written once to the spool and once to the disk.
//!
//! What the disk has is what the image has: owners, modes with set-user-id, times, extended attributes
//! (capabilities among them), hard links, device nodes and named pipes too, since it is a VM that boots it.
//! How layers are merged is described in `tree`, what of an archive is refused in `tar` and `layer`, which
//! attributes are kept in `xattr`. In short:
//!
//! - Refused by name: `..`, names that are not UTF-8 or too long for Linux, hard links to what is not there yet or is
//!   a directory, sparse entries, sizes of what has no data, extended headers that contradict each
//!   other, anything in `/lost+found` (ext4), other digests than the manifest's and the configuration's.
//! - Left out: attributes that Linux does not know, and an overlay file system's own (`trusted.overlay.*`).
//! - No symbolic link of an image is followed: `a/b` over a link `a` makes `a` a directory.
//!
//! The same image gives the same bytes, whoever makes the disk, wherever and whenever.

mod config;
mod decode;
mod erofs;
mod ext4;
mod layer;
mod limits;
mod manifest;
mod output;
mod path;
mod pull;
mod room;
mod source;
mod spool;
mod tar;
mod tree;
mod window;
mod xattr;

use std::io;
use std::path::Path;

use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

pub use config::Config;
pub use erofs::ErofsError;
pub use ext4::Ext4Error;
pub use layer::{EntryProblem, LayerError};
pub use limits::{Limits, TooLarge};
pub use manifest::{ManifestError, host_architecture};
pub use output::OutputError;
pub use path::PathProblem;
pub use pull::pull;
pub use room::{NoRoom, Room};
pub use source::{Source, SourceError};
pub use tar::TarError;
pub use tree::Conflict;
pub use xattr::XattrProblem;

use crate::digest::Digest;
use crate::verify::VerifyError;
use limits::Budget;
use output::Output;
use source::Image;
use spool::Spool;
use tree::Tree;

/// The file system of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// ext4 with a journal and free space: it can be mounted to be read and written.
    #[default]
    Ext4,
    /// EROFS, uncompressed: read-only and smaller; `free_bytes` does not apply.
    Erofs,
}

/// How a disk is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Its file system.
    pub format: Format,
    /// What the image may cost.
    pub limits: Limits,
    /// Bytes of free room in the file system. They are holes of the disk's file and take no room in it.
    pub free_bytes: u64,
    /// Bytes that must stay free in the file system that the disk is made in; 0: it may be filled.
    pub keep_free: u64,
    /// Whether it is written out before it appears. One that does not outlive its user need not be, and a cancel cannot
    /// hurry that.
    pub durable: bool,
    /// Which image of several, in Go's words (`amd64`, `arm64`); the configuration must say the same.
    pub architecture: String,
}

/// Enough for what a system writes when it starts.
const FREE_BYTES: u64 = 256 * 1024 * 1024;

impl Default for Options {
    fn default() -> Self {
        Self {
            format: Format::default(),
            limits: Limits::default(),
            free_bytes: FREE_BYTES,
            keep_free: 0,
            durable: true,
            architecture: host_architecture().to_owned(),
        }
    }
}

/// A disk was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Of the image's manifest. Docker's archives have none: of the configuration, which is Docker's image id.
    pub digest: Digest,
    /// How the image wants to be run.
    pub config: Config,
    /// The disk file's length in bytes.
    pub size: u64,
    /// Layers that were merged.
    pub layers: usize,
    /// Files, directories, links and devices in the file system.
    pub nodes: u64,
}

/// No disk was made; what was at its place is still there.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The registry.
    #[error(transparent)]
    Pull(#[from] VerifyError),
    /// The image's kind.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The place of the result.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Too much of the whole.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The configuration.
    #[error("the configuration of {0} is not one of a container image")]
    Config(Digest, #[source] serde_json::Error),
    /// Another machine's image.
    #[error("{digest} is an image for {found}; linux/{wanted} is expected")]
    Platform {
        /// The image.
        digest: Digest,
        /// What it is for.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// Manifest and configuration disagree.
    #[error("{digest} has {layers} layers, its configuration has {diff_ids}")]
    LayerCount {
        /// The image.
        digest: Digest,
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
    /// A layer.
    #[error("layer {number} ({diff_id}) is refused")]
    Layer {
        /// From 1, the lowest.
        number: usize,
        /// Its name in the configuration.
        diff_id: Digest,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// A layer whose bytes are others.
    #[error("layer {number} has the {what} {actual}; {expected} is expected")]
    Digest {
        /// From 1, the lowest.
        number: usize,
        /// Which digest.
        what: &'static str,
        /// By manifest or configuration.
        expected: Digest,
        /// Of its bytes.
        actual: Digest,
    },
    /// An entry that does not fit what is below.
    #[error("layer {number} ({diff_id}): entry {entry:?} does not fit")]
    Conflict {
        /// From 1, the lowest.
        number: usize,
        /// Its name in the configuration.
        diff_id: Digest,
        /// The entry.
        entry: String,
        /// Why.
        #[source]
        source: Conflict,
    },
    /// The temporary file.
    #[error("cannot use a temporary file beside the disk")]
    Spool(#[source] io::Error),
    /// The file system.
    #[error(transparent)]
    Ext4(#[from] Ext4Error),
    /// The file system.
    #[error(transparent)]
    Erofs(#[from] ErofsError),
    /// The caller's wish.
    #[error("cancelled; no disk was made")]
    Cancelled,
}

/// Makes a disk from an image on this machine. Blocks: from async code, call it by `spawn_blocking`.
///
/// `cancel` is looked at for every entry and every block of data; a cancelled call returns within
/// milliseconds, or when a system call does. `out` appears when all is done, replaces an older disk in one step,
/// and is untouched otherwise.
pub fn make(
    source: &Source,
    out: &Path,
    options: &Options,
    cancel: &CancellationToken,
) -> Result<Made, DiskError> {
    let image = source::open(source, &options.architecture)?;
    make_from(&image, Output::prepare(out)?, options, cancel)
}

fn make_from(
    image: &Image,
    output: Output,
    options: &Options,
    cancel: &CancellationToken,
) -> Result<Made, DiskError> {
    let made = merge_and_write(image, &output, options, cancel);
    // Whatever a cancelled thread stumbled over, this is why.
    if cancel.is_cancelled() {
        return Err(DiskError::Cancelled);
    }
    let made = made?;
    if options.durable {
        output.commit_durably()?;
    } else {
        output.commit()?;
    }
    Ok(made)
}

fn merge_and_write(
    image: &Image,
    output: &Output,
    options: &Options,
    cancel: &CancellationToken,
) -> Result<Made, DiskError> {
    let config = check_config(image, options)?;
    let mut budget = Budget::new(options.limits);
    let room = Room::new(options.keep_free);
    let mut spool = Spool::create(output.dir(), room).map_err(DiskError::Spool)?;
    let mut tree = Tree::default();
    for (i, (layer, diff_id)) in image.layers.iter().zip(&config.rootfs.diff_ids).enumerate() {
        let number = i + 1;
        let limit = budget.next_layer();
        let what = "bytes in a layer, unpacked, or in all";
        let (diff, blob, unpacked) =
            decode::unpack(layer.blob.clone(), limit, what, cancel, |archive| {
                layer::read(archive, &mut spool, &mut budget, cancel)
            })
            .map_err(|source| DiskError::Layer {
                number,
                diff_id: diff_id.clone(),
                source,
            })?;
        let differs = |what, expected: &Digest, actual| {
            Err(DiskError::Digest { number, what, expected: expected.clone(), actual })
        };
        match &layer.digest {
            Some(expected) if *expected != blob.0 => return differs("digest", expected, blob.0),
            _ if *diff_id != unpacked.0 => return differs("diff_id", diff_id, unpacked.0),
            _ => budget.layer(unpacked.1)?,
        }
        tree.apply(diff, &mut budget, cancel).map_err(|(entry, source)| {
            let entry = crate::text::printable(&entry);
            DiskError::Conflict { number, diff_id: diff_id.clone(), entry, source }
        })?;
    }
    let contents = spool.finish(cancel).map_err(DiskError::Spool)?;
    let (file, uuid) = (output.file(), uuid(&image.digest));
    let (size, nodes) = match options.format {
        Format::Ext4 => {
            let wanted = ext4::Wanted { uuid, free: options.free_bytes, room };
            ext4::write(&tree, &contents, file, wanted, cancel)?
        }
        Format::Erofs => erofs::write(&tree, &contents, file, uuid, room, cancel)?,
    };
    let (digest, layers) = (image.digest.clone(), image.layers.len());
    Ok(Made { digest, config: config.config, size, layers, nodes })
}

/// The configuration, when it is one of an image that can be booted here and fits the manifest.
fn check_config(image: &Image, options: &Options) -> Result<config::Image, DiskError> {
    let limits = &options.limits;
    let config: config::Image = serde_json::from_slice(&image.config)
        .map_err(|e| DiskError::Config(image.digest.clone(), e))?;
    if config.os != "linux" || config.architecture != options.architecture {
        return Err(DiskError::Platform {
            digest: image.digest.clone(),
            found: crate::text::printable(&format!("{}/{}", config.os, config.architecture)),
            wanted: options.architecture.clone(),
        });
    }
    let (layers, diff_ids) = (image.layers.len(), config.rootfs.diff_ids.len());
    if layers != diff_ids {
        return Err(DiskError::LayerCount { digest: image.digest.clone(), layers, diff_ids });
    }
    check_sizes(image.layers.iter().map(|layer| layer.blob.len()), limits)?;
    Ok(config)
}

/// Of layers as they are stored.
fn check_sizes(sizes: impl ExactSizeIterator<Item = u64>, limits: &Limits) -> Result<(), TooLarge> {
    if sizes.len() > limits.layers {
        return Err(TooLarge { what: "layers", limit: limits.layers as u64 });
    }
    let (what, limit) = ("bytes in all layers, as they are stored", limits.compressed_bytes);
    let total = sizes.fold(0_u64, u64::saturating_add);
    if total > limit { Err(TooLarge { what, limit }) } else { Ok(()) }
}

/// The file system's id: of the image, so that two images' differ. In the form of RFC 9562's version 8.
fn uuid(digest: &Digest) -> [u8; 16] {
    let hash = Sha256::new_with_prefix(format!("kiln disk {digest}")).finalize();
    let mut id = [0; 16];
    id.copy_from_slice(&hash[..16]);
    id[6] = 0x80 | (id[6] & 0x0f);
    id[8] = 0x80 | (id[8] & 0x3f);
    id
}
