//! File operations whose errors name the file, and whose reads have a bound.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// An operation on a file failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}", path.display())]
pub struct FileError {
    operation: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl FileError {
    /// `operation` is a verb that fits "cannot … PATH".
    pub fn new(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self { operation, path: path.to_owned(), source }
    }

    /// Whether the file was not there.
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Reads a whole file that must not be longer than `limit`.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    let read = open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|e| FileError::new("read", path, e))?;
    if bytes.len() as u64 > limit {
        let why = io::Error::other(format!("it is longer than {limit} bytes"));
        return Err(FileError::new("read", path, why));
    }
    Ok(bytes)
}

/// Opens a file for reading.
pub fn open(path: &Path) -> Result<File, FileError> {
    File::open(path).map_err(|e| FileError::new("open", path, e))
}

/// Creates a file that must not exist yet.
pub fn create(path: &Path) -> Result<File, FileError> {
    File::create_new(path).map_err(|e| FileError::new("create", path, e))
}

/// Writes a new file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    use std::io::Write as _;
    create(path)?.write_all(bytes).map_err(|e| FileError::new("write", path, e))
}

/// Creates a directory and those above it.
pub fn create_dir_all(path: &Path) -> Result<(), FileError> {
    fs::create_dir_all(path).map_err(|e| FileError::new("create directory", path, e))
}

/// Gives a file a second name; both must lie on one file system.
pub fn hard_link(from: &Path, to: &Path) -> Result<(), FileError> {
    fs::hard_link(from, to).map_err(|e| FileError::new("link", to, e))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_read_stops_at_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write(&path, b"12345").unwrap();
        assert_eq!(read_bounded(&path, 5).unwrap(), b"12345");
        assert_eq!(read_bounded(&path, 6).unwrap(), b"12345");
        let error = read_bounded(&path, 4).unwrap_err();
        assert!(error.source.to_string().contains("longer than 4 bytes"));
    }

    #[test]
    fn errors_name_the_file() {
        let error = open(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.is_not_found());
        assert_eq!(error.to_string(), "cannot open /nowhere/at/all");
    }
}
