//! An image's layout becomes its disk. The one place that knows how.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use kiln_image::disk::{self, Limits, Options, Source};
use tokio_util::sync::CancellationToken;

/// What VMs are.
const ARCHITECTURE: &str = "amd64";
const GIB: u64 = 1 << 30;

/// What one image may cost the host. Disk: twice the unpacked bytes, for as long as the disk is made. Memory: the
/// last of them, which is some 300,000 files.
const LIMITS: Limits = Limits {
    layers: 512,
    compressed_bytes: super::pull::MAX_IMAGE_BYTES,
    layer_bytes: 32 * GIB,
    total_bytes: 32 * GIB,
    entries: 1_000_000,
    metadata_bytes: GIB / 2,
};

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image is not taken, or the host cannot.
    #[error(transparent)]
    Made(#[from] disk::DiskError),
    /// The disk cannot be opened.
    #[error("it cannot be opened")]
    Open(#[source] io::Error),
    /// The thread that made it broke down.
    #[error("its making broke down")]
    Thread(#[source] tokio::task::JoinError),
}

impl DiskError {
    /// Whether it was given up because somebody said so.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Made(disk::DiskError::Cancelled))
    }
}

/// Makes the disk of the image in a layout, opened for reading. It has no name when this returns: it goes with its
/// last descriptor. Nobody may drop the future; `cancel` ends it at once.
pub async fn make(
    layout: PathBuf,
    place: PathBuf,
    cancel: CancellationToken,
) -> Result<File, DiskError> {
    let made = tokio::task::spawn_blocking(move || make_and_open(&layout, &place, &cancel));
    made.await.map_err(DiskError::Thread)?
}

fn make_and_open(
    layout: &Path,
    place: &Path,
    cancel: &CancellationToken,
) -> Result<File, DiskError> {
    let options = Options {
        limits: LIMITS,
        // An instance writes to another disk.
        free_bytes: 0,
        architecture: ARCHITECTURE.to_owned(),
        ..Options::default()
    };
    disk::make(&Source::Layout(layout.to_owned()), place, &options, cancel)?;
    let opened = File::open(place).map_err(DiskError::Open)?;
    std::fs::remove_file(place).map_err(DiskError::Open)?;
    Ok(opened)
}
