//! Where a result goes: made in a directory beside it, then put in its place in one step.
//!
//! ```text
//! parent/ .NAME.lock   held while a build writes      .NAME.new   the result being made
//!         NAME         what others see: the old result, or the new one, never a mixture
//! ```
//! Programs that have the old result open keep it until they close it.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::file::{self, FileError};
use crate::inputs;

/// The place is not usable.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another process is at it.
    #[error("another kiln-image is writing {}; wait for it to end", .0.display())]
    Busy(PathBuf),
    /// It would delete something that is not ours.
    #[error("{} exists and is not a result of kiln-image; choose another directory or remove it", .0.display())]
    NotOurs(PathBuf),
    /// A path without a last part.
    #[error("{} cannot be replaced by a result; name a directory", .0.display())]
    NoName(PathBuf),
    /// Left by a killed run; deleting through a mount would delete the host's files.
    #[error("{} is still mounted inside an unfinished result; unmount it first", .0.display())]
    Mounted(PathBuf),
}

/// A result being made. Dropped before [`Place::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct Place {
    out: PathBuf,
    new: PathBuf,
    // Held until the end: the lock goes with the file.
    _lock: File,
}

impl Place {
    /// Takes the lock, checks what is there now, sweeps what a killed run left.
    pub fn prepare(out: &Path) -> Result<Self, PlaceError> {
        let out = std::path::absolute(out).map_err(|e| FileError::new("resolve", out, e))?;
        let (Some(name), Some(parent)) = (out.file_name(), out.parent()) else {
            return Err(PlaceError::NoName(out));
        };
        file::create_dir_all(parent)?;
        let sibling = |suffix: &str| {
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(suffix);
            parent.join(hidden)
        };
        let lock_path = sibling(".lock");
        let lock = File::create(&lock_path).map_err(|e| FileError::new("create", &lock_path, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(PlaceError::Busy(out)),
            Err(TryLockError::Error(e)) => return Err(FileError::new("lock", &lock_path, e).into()),
        }
        check_ours(&out)?;
        let new = sibling(".new");
        remove_tree(&new)?;
        fs::create_dir(&new).map_err(|e| FileError::new("create directory", &new, e))?;
        Ok(Self { out, new, _lock: lock })
    }

    /// The directory to fill.
    pub fn dir(&self) -> &Path {
        &self.new
    }

    /// A directory for what is not part of the result. It must be gone before the commit; see
    /// [`Place::discard`].
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.new.join(name)
    }

    /// Removes a scratch directory.
    pub fn discard(&self, scratch: &Path) -> Result<(), PlaceError> {
        remove_tree(scratch)
    }

    /// Makes the new result durable and visible, and removes the old one.
    pub fn commit(self) -> Result<(), PlaceError> {
        sync_tree(&self.new)?;
        let renamed = |e: Errno| FileError::new("replace", &self.out, e.into());
        match renameat2(AT_FDCWD, &self.new, AT_FDCWD, &self.out, RenameFlags::RENAME_EXCHANGE) {
            // The old result is now under the hidden name; dropping `self` removes it.
            Ok(()) => {}
            // Nothing there to exchange with, or a file system that cannot.
            Err(Errno::ENOENT | Errno::EINVAL) => {
                remove_tree(&self.out)?;
                fs::rename(&self.new, &self.out)
                    .map_err(|e| FileError::new("replace", &self.out, e))?;
            }
            Err(e) => return Err(renamed(e).into()),
        }
        if let Some(parent) = self.out.parent() {
            sync(parent)?;
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.new) {
            // The next run sweeps it.
            tracing::warn!(%error, "an unfinished result remains");
        }
    }
}

/// Ours are: nothing, an empty directory, a bundle, a result with inputs.
fn check_ours(out: &Path) -> Result<(), PlaceError> {
    let not_ours = || PlaceError::NotOurs(out.to_owned());
    match out.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(FileError::new("open", out, e).into()),
        Ok(metadata) if !metadata.is_dir() => return Err(not_ours()),
        Ok(_) => {}
    }
    let mut entries = fs::read_dir(out).map_err(|e| FileError::new("read", out, e))?;
    let ours = ["bundle.json", inputs::FILE].iter().any(|f| out.join(f).is_file());
    if ours || entries.next().is_none() { Ok(()) } else { Err(not_ours()) }
}

fn remove_tree(dir: &Path) -> Result<(), PlaceError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|e| FileError::new("read", Path::new("/proc/self/mountinfo"), e))?;
    if let Some(mount) = mount_below(&mounts, dir) {
        return Err(PlaceError::Mounted(mount));
    }
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(FileError::new("remove", dir, e).into())
        }
        _ => Ok(()),
    }
}

/// The first mount point at or below `dir` (proc(5): field 5 of mountinfo, octal escapes for blanks).
fn mount_below(mountinfo: &str, dir: &Path) -> Option<PathBuf> {
    let point = |line: &str| {
        let field = line.split(' ').nth(4)?;
        Some(PathBuf::from(
            field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"),
        ))
    };
    mountinfo.lines().filter_map(point).find(|p| p.starts_with(dir))
}

fn sync_tree(dir: &Path) -> Result<(), FileError> {
    for entry in walkdir::WalkDir::new(dir).contents_first(true) {
        let entry = entry.map_err(|e| FileError::new("read", dir, e.into()))?;
        if entry.file_type().is_file() || entry.file_type().is_dir() {
            sync(entry.path())?;
        }
    }
    Ok(())
}

fn sync(path: &Path) -> Result<(), FileError> {
    file::open(path)?.sync_all().map_err(|e| FileError::new("write out", path, e))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn fill(place: &Place, text: &str) {
        fs::write(place.dir().join("bundle.json"), text).unwrap();
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_result_appears_whole_and_replaces_the_older_one() {
        let temp = tempfile::tempdir().unwrap();
        let out = temp.path().join("a/out");
        for text in ["one", "two"] {
            let place = Place::prepare(&out).unwrap();
            fill(&place, text);
            let before = fs::read_to_string(out.join("bundle.json")).ok();
            assert_ne!(before.as_deref(), Some(text), "visible before the commit");
            place.commit().unwrap();
            assert_eq!(fs::read_to_string(out.join("bundle.json")).unwrap(), text);
        }
        assert_eq!(names(&temp.path().join("a")), [".out.lock", "out"]);
    }

    #[test]
    fn a_failed_build_leaves_the_old_result() {
        let temp = tempfile::tempdir().unwrap();
        let out = temp.path().join("out");
        let place = Place::prepare(&out).unwrap();
        fill(&place, "one");
        place.commit().unwrap();
        let place = Place::prepare(&out).unwrap();
        fill(&place, "two");
        drop(place);
        assert_eq!(fs::read_to_string(out.join("bundle.json")).unwrap(), "one");
        assert_eq!(names(temp.path()), [".out.lock", "out"]);
    }

    #[test]
    fn an_open_file_of_the_old_result_stays_readable() {
        let temp = tempfile::tempdir().unwrap();
        let out = temp.path().join("out");
        let place = Place::prepare(&out).unwrap();
        fill(&place, "one");
        place.commit().unwrap();
        let open = File::open(out.join("bundle.json")).unwrap();
        let place = Place::prepare(&out).unwrap();
        fill(&place, "two");
        place.commit().unwrap();
        assert_eq!(io::read_to_string(open).unwrap(), "one");
    }

    #[test]
    fn two_builds_of_one_result_do_not_mix() {
        let temp = tempfile::tempdir().unwrap();
        let out = temp.path().join("out");
        let first = Place::prepare(&out).unwrap();
        assert!(matches!(Place::prepare(&out), Err(PlaceError::Busy(_))));
        drop(first);
        Place::prepare(&out).unwrap();
    }

    #[test]
    fn what_a_killed_run_left_is_swept() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join(".out.new/root/usr")).unwrap();
        let place = Place::prepare(&temp.path().join("out")).unwrap();
        assert!(names(place.dir()).is_empty());
    }

    #[test]
    fn foreign_directories_are_not_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let home = temp.path().join("home");
        fs::create_dir(&home).unwrap();
        Place::prepare(&home).unwrap();
        fs::write(home.join("thesis"), "x").unwrap();
        assert!(matches!(Place::prepare(&home), Err(PlaceError::NotOurs(_))));
        assert!(matches!(Place::prepare(&home.join("thesis")), Err(PlaceError::NotOurs(_))));
        assert!(matches!(Place::prepare(Path::new("/")), Err(PlaceError::NoName(_))));
        assert_eq!(fs::read_to_string(home.join("thesis")).unwrap(), "x");
    }

    #[test]
    fn mounts_below_are_seen() {
        let info = "22 1 0:21 / / rw - ext4 a rw\n30 22 0:5 / /o/.x.new/root/proc rw - proc proc rw\n31 22 0:5 / /o/with\\040blank rw - proc p rw\n";
        assert_eq!(mount_below(info, Path::new("/o/.x.new")), Some("/o/.x.new/root/proc".into()));
        assert_eq!(mount_below(info, Path::new("/o/.x")), None);
        assert_eq!(mount_below(info, Path::new("/o/with blank")), Some("/o/with blank".into()));
    }
}
