//! Room on the disk for what has to be stored when there is no other: how builds ended.
//!
//! A file of nothing, which is removed when a driver finds the disk full, and made again when there is plenty.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};
use tokio_util::sync::CancellationToken;

/// Its name in the data directory.
const NAME: &str = "reserve";
/// The ends of some thousand builds.
const BYTES: u64 = 16 << 20;
/// What is free beside it when it is made again.
const BESIDE: u64 = 2 * BYTES;
/// How often is looked whether it is there.
const EVERY: Duration = Duration::from_secs(10);

/// The reserve of a data directory.
#[derive(Clone, Debug)]
pub struct Reserve {
    path: PathBuf,
}

impl Reserve {
    /// In this directory.
    pub fn new(data_dir: &Path) -> Self {
        Self { path: data_dir.join(NAME) }
    }

    /// Gives the room to whoever writes next. Whether there was any.
    pub(super) fn give(&self) -> bool {
        match std::fs::remove_file(&self.path) {
            Ok(()) => {
                tracing::error!(
                    "the disk is full; what was kept for this is given to builds that end. Make room: kiln gc"
                );
                true
            }
            Err(_) => false,
        }
    }

    /// Keeps it there, where there is room for it, until `stop`.
    pub async fn keep(self, stop: CancellationToken) {
        loop {
            if let Err(error) = self.make() {
                tracing::warn!(%error, "no room is kept for the ends of builds");
            }
            if stop.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_none() {
                return;
            }
        }
    }

    /// Makes it, unless it is there or there is too little room.
    fn make(&self) -> io::Result<()> {
        let file =
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error),
            };
        let made = fill(&file);
        if !matches!(made, Ok(true)) {
            std::fs::remove_file(&self.path)?;
        }
        made.map(drop)
    }
}

/// Takes the room for it. Whether there was enough.
fn fill(file: &File) -> io::Result<bool> {
    let disk = rustix::fs::fstatvfs(file)?;
    if disk.f_bavail.saturating_mul(disk.f_frsize) < BYTES + BESIDE {
        return Ok(false);
    }
    match fallocate(file, FallocateFlags::empty(), 0, BYTES) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::NOSPC) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn it_takes_room_and_gives_it_once() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::new(dir.path());
        assert!(!reserve.give());
        for _ in 0..2 {
            reserve.make().unwrap();
            let made = std::fs::metadata(&reserve.path).unwrap();
            assert!(made.blocks() * 512 >= BYTES, "{made:?}");
        }
        assert!(reserve.give());
        assert!(!reserve.give());
    }
}
