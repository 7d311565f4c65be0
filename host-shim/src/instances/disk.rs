//! From an image in the registry to an instance's disk: its layout, the disk, and no more. The one place that knows how.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_image::disk::{self, Limits, Options, Room, Source};
use tokio_util::sync::CancellationToken;

use super::pull::{PullError, Resolved};
use super::quota::{Full, Held};
use crate::gateway::Backing;

/// What VMs are.
const ARCHITECTURE: &str = "amd64";
const GIB: u64 = 1 << 30;
/// Bytes of a block as the kernel counts a file's.
const BLOCK: u64 = 512;

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

/// What disks leave free in the file system of the data directory: builds and the database are there too.
const KEEP_FREE: u64 = GIB;

/// How long it may take to pull an image and to make its disk: the largest one that is taken, on a slow disk.
const DEADLINE: Duration = Duration::from_mins(15);

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file system of the data directory is nearly full.
    #[error("the host has no room for the image's disk")]
    Room(#[source] io::Error),
    /// Instances take as much as they may.
    #[error("there is no room for the image's disk")]
    Full(#[from] Full),
    /// The image cannot be had.
    #[error("the image could not be pulled")]
    Pull(#[from] PullError),
    /// The image is not taken, or the host cannot.
    #[error("the image's disk could not be made")]
    Made(#[from] disk::DiskError),
    /// A file of it.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The thread that made it broke down.
    #[error("the making of the image's disk broke down")]
    Thread(#[source] tokio::task::JoinError),
    /// It took too long.
    #[error("the image's disk was not ready within {} s", .0.as_secs())]
    Late(Duration),
    /// The caller's wish.
    #[error("it was cancelled")]
    Cancelled,
}

/// An image's disk, opened for reading. It has no name any more: it goes with its last descriptor.
#[derive(Debug)]
pub struct Disk {
    /// For a VM.
    pub file: Arc<File>,
    /// It counts for as long as it is there.
    _held: Held,
}

/// Makes an image's disk in a directory of its own, which is the caller's to remove. Nobody may drop the future;
/// `cancel` ends it soon.
pub async fn prepare(
    backing: &Backing,
    image: &Resolved,
    dir: &Path,
    held: Held,
    cancel: &CancellationToken,
) -> Result<Disk, DiskError> {
    in_time(DEADLINE, cancel, |stop| pull_and_make(backing, image, dir, held, stop)).await
}

/// Whether so many bytes more leave `keep` in the file system of a directory.
pub(super) fn require_room(dir: &Path, keep: u64, bytes: u64) -> io::Result<()> {
    Room::new(keep).require(&File::open(dir)?, bytes)
}

/// Cancels what takes too long, and waits for its end all the same.
async fn in_time<T, F>(
    deadline: Duration,
    cancel: &CancellationToken,
    work: impl FnOnce(CancellationToken) -> F,
) -> Result<T, DiskError>
where
    F: Future<Output = Result<T, DiskError>>,
{
    let stop = cancel.child_token();
    let mut working = std::pin::pin!(work(stop.clone()));
    tokio::select! {
        biased;
        done = &mut working => done,
        () = tokio::time::sleep(deadline) => {
            stop.cancel();
            match working.await {
                Err(DiskError::Cancelled) if !cancel.is_cancelled() => Err(DiskError::Late(deadline)),
                done => done,
            }
        }
    }
}

async fn pull_and_make(
    backing: &Backing,
    image: &Resolved,
    dir: &Path,
    mut held: Held,
    stop: CancellationToken,
) -> Result<Disk, DiskError> {
    let (layout, place) = (dir.join("layout"), dir.join("disk"));
    let stored = image.stored_bytes();
    held.resize(stored)?;
    require_room(dir, KEEP_FREE, stored).map_err(DiskError::Room)?;
    let pulling = image.write_layout(backing, &layout);
    stop.run_until_cancelled(pulling).await.ok_or(DiskError::Cancelled)??;
    let made = {
        let layout = layout.clone();
        tokio::task::spawn_blocking(move || make(&layout, &place, &stop))
    };
    let file = made.await.map_err(DiskError::Thread)??;
    let removed = tokio::fs::remove_dir_all(&layout).await;
    removed.map_err(failed("remove", &layout))?;
    // Only now is it known; it may be a hole for the most part.
    let blocks = file.metadata().map_err(failed("look at", dir))?.blocks();
    held.resize(blocks.saturating_mul(BLOCK))?;
    Ok(Disk { file: Arc::new(file), _held: held })
}

/// Blocks.
fn make(layout: &Path, place: &Path, stop: &CancellationToken) -> Result<File, DiskError> {
    let options = Options {
        limits: LIMITS,
        // An instance writes to another disk.
        free_bytes: 0,
        keep_free: KEEP_FREE,
        // It has no name in a moment, and is gone with this host's power.
        durable: false,
        architecture: ARCHITECTURE.to_owned(),
        ..Options::default()
    };
    let made = disk::make(&Source::Layout(layout.to_owned()), place, &options, stop);
    made.map_err(|error| match error {
        disk::DiskError::Cancelled => DiskError::Cancelled,
        error => error.into(),
    })?;
    let opened = File::open(place).map_err(failed("open", place))?;
    std::fs::remove_file(place).map_err(failed("remove", place))?;
    Ok(opened)
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError + use<> {
    let path = path.to_owned();
    move |source| DiskError::File { operation, path, source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_takes_too_long_is_cancelled_and_waited_for() {
        let deadline = Duration::from_secs(5);
        let cancel = CancellationToken::new();
        let mut ended = false;
        let late: Result<(), _> = in_time(deadline, &cancel, async |stop| {
            stop.cancelled().await;
            // As a thread that is in a system call.
            tokio::time::sleep(Duration::from_secs(1)).await;
            ended = true;
            Err(DiskError::Cancelled)
        })
        .await;
        assert!(matches!(late, Err(DiskError::Late(after)) if after == deadline), "{late:?}");
        assert!(ended);
        // What was done at the last moment is done.
        let done = in_time(deadline, &cancel, async |stop| {
            stop.cancelled().await;
            Ok(1)
        });
        assert_eq!(done.await.unwrap(), 1);
        assert!(!cancel.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancel_is_not_a_deadline() {
        let cancel = CancellationToken::new();
        cancel.cancel();
        let cancelled: Result<(), _> = in_time(Duration::from_secs(5), &cancel, async |stop| {
            stop.cancelled().await;
            Err(DiskError::Cancelled)
        })
        .await;
        assert!(matches!(cancelled, Err(DiskError::Cancelled)), "{cancelled:?}");
    }

    #[test]
    fn room_that_no_file_system_has_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        require_room(dir.path(), 1, 0).unwrap();
        let error = require_room(dir.path(), 1, u64::MAX).unwrap_err();
        assert!(error.to_string().contains("make room"), "{error}");
    }
}
