//! One server for a directory: a locked file, for as long as its process lives.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a lock may outlive its process: what a killed server was about to start holds it until it has become its
/// own program.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two tries. Nothing tells of a lock's end but a wait that has none.
const PAUSE: Duration = Duration::from_millis(20);

/// Locks the file, which is made; `None` where another process has it. Blocks its thread, for two seconds at most.
///
/// # Errors
/// The file cannot be opened or locked.
pub fn exclusive(path: &Path) -> io::Result<Option<File>> {
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(PAUSE);
            }
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_one_servers_and_waited_for_while_its_process_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = exclusive(&path).unwrap().expect("nobody has it");
        assert!(exclusive(&path).unwrap().is_none());
        let ends = std::thread::spawn(move || {
            std::thread::sleep(PATIENCE / 10);
            drop(first);
        });
        assert!(exclusive(&path).unwrap().is_some());
        ends.join().unwrap();
    }
}
