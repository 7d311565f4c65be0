//! The disk's place: made beside it under a name of its own, made durable where that is wanted, then renamed over.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::file::{self, FileError};

/// The place is not usable.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Something else would be lost: a directory, a device, a link.
    #[error("{} is there and is no regular file; choose another name or remove it", .0.display())]
    NotAFile(PathBuf),
    /// A path without a last part.
    #[error("{} cannot be a disk; name a file", .0.display())]
    NoName(PathBuf),
}

/// A disk being made. Dropped before [`Output::commit`], it leaves nothing; a killed process leaves
/// `.NAME.….new`.
pub struct Output {
    out: PathBuf,
    dir: PathBuf,
    temp: NamedTempFile,
}

impl Output {
    /// Checks the place and makes an empty file beside it, which only its owner can read: what is in
    /// an image may not be everybody's.
    pub fn prepare(out: &Path) -> Result<Self, OutputError> {
        let out = std::path::absolute(out).map_err(|e| FileError::new("resolve", out, e))?;
        let (Some(name), Some(dir)) = (out.file_name(), out.parent()) else {
            return Err(OutputError::NoName(out));
        };
        match out.symlink_metadata() {
            Ok(found) if !found.is_file() => return Err(OutputError::NotAFile(out)),
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(FileError::new("open", &out, e).into());
            }
            _ => {}
        }
        file::create_dir_all(dir)?;
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let temp = tempfile::Builder::new().prefix(&prefix).suffix(".new").tempfile_in(dir);
        let temp = temp.map_err(|e| FileError::new("create a file in", dir, e))?;
        let dir = dir.to_owned();
        Ok(Self { out, dir, temp })
    }

    /// Where there is room for what is needed on the way.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file to fill.
    pub fn file(&self) -> &File {
        self.temp.as_file()
    }

    /// Makes the disk durable and visible; replaces an older one.
    pub fn commit_durably(self) -> Result<(), OutputError> {
        let written = self.temp.as_file().sync_all();
        written.map_err(|e| FileError::new("write out", &self.out, e))?;
        let dir = self.dir.clone();
        self.commit()?;
        let synced = fs::File::open(&dir).and_then(|dir| dir.sync_all());
        synced.map_err(|e| FileError::new("write out", &dir, e))?;
        Ok(())
    }

    /// Makes the disk visible; replaces an older one.
    pub fn commit(self) -> Result<(), OutputError> {
        let persisted = self.temp.persist(&self.out);
        persisted.map_err(|e| FileError::new("replace", &self.out, e.error))?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap();
        names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_disk_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("deep/disk");
        for text in ["one", "two"] {
            let output = Output::prepare(&out).unwrap();
            output.file().write_all(text.as_bytes()).unwrap();
            assert_ne!(fs::read_to_string(&out).ok().as_deref(), Some(text));
            if text == "one" {
                output.commit_durably().unwrap();
            } else {
                output.commit().unwrap();
            }
            assert_eq!(fs::read_to_string(&out).unwrap(), text);
        }
        let output = Output::prepare(&out).unwrap();
        output.file().write_all(b"three").unwrap();
        drop(output);
        assert_eq!(fs::read_to_string(&out).unwrap(), "two");
        assert_eq!(names(&dir.path().join("deep")), ["disk"]);
    }

    #[test]
    fn only_a_regular_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink("/dev/null", &link).unwrap();
        for place in [dir.path(), &link, Path::new("/dev/null")] {
            assert!(matches!(Output::prepare(place), Err(OutputError::NotAFile(_))), "{place:?}");
        }
        assert!(Output::prepare(Path::new("/")).is_err());
    }
}
