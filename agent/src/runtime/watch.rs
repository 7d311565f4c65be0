//! Who asks for a step's state waits until there is news.
//!
//! buildah asks the runtime for the state of a running container ten times a second, each time with
//! a process. Under emulation crun takes longer than that to start, so that asking alone would keep
//! a processor busy while the step wants it. The monitor holds a lock for as long as the step runs;
//! the wrapper takes the question to crun when the lock is free. When the monitor is killed, the
//! kernel frees it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// The lock of a step that runs.
#[derive(Debug)]
pub struct Held {
    path: PathBuf,
    _lock: File,
}

impl Held {
    /// Takes the lock of a step. `directory` is made where needed.
    pub fn take(directory: &Path, id: &str) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let path = lock_path(directory, id)?;
        let lock = File::create(&path)?;
        lock.lock()?;
        Ok(Self { path, _lock: lock })
    }

    /// Frees it.
    pub fn release(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Waits until no monitor watches the step.
pub fn wait_until_over(directory: &Path, id: &str) -> io::Result<()> {
    match lock_path(directory, id).and_then(File::open) {
        Ok(lock) => lock.lock_shared(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// An id is one plain name.
fn lock_path(directory: &Path, id: &str) -> io::Result<PathBuf> {
    if id.is_empty() || id.starts_with('.') || id.contains('/') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(directory.join(id))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn who_asks_waits_for_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let locks = directory.path().join("steps");
        wait_until_over(&locks, "unknown").unwrap();
        let held = Held::take(&locks, "one").unwrap();
        wait_until_over(&locks, "other").unwrap();
        let over = locks.join("over");
        let asking = thread::spawn({
            let (locks, over) = (locks.clone(), over.clone());
            move || {
                wait_until_over(&locks, "one").unwrap();
                over.exists()
            }
        });
        fs::write(&over, "").unwrap();
        held.release();
        assert!(asking.join().unwrap());
        assert!(!locks.join("one").exists());
    }

    #[test]
    fn an_id_is_no_path() {
        for id in ["", ".", "..", "a/b", "/a"] {
            assert!(Held::take(Path::new("/nonexistent"), id).is_err());
            assert!(lock_path(Path::new("/x"), id).is_err(), "{id}");
        }
    }
}
