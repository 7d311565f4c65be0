//! A blob's bytes: a whole file, or a part of an archive. Read by position, so that windows of one file do
//! not disturb each other.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use nix::libc::O_NONBLOCK;

use crate::file::FileError;

/// A part of a file. As a [`Read`] it gives that part once.
#[derive(Clone, Debug)]
pub struct Window {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Window {
    /// All of a regular file.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        // A named pipe in a layout would wait for a writer for ever.
        let file = File::options().read(true).custom_flags(O_NONBLOCK).open(path);
        let file = file.map_err(|e| FileError::new("open", path, e))?;
        Self::of(file).map_err(|e| FileError::new("read", path, e))
    }

    /// All of a regular file that is open.
    pub fn of(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        Ok(Self { file: Arc::new(file), at: 0, end: metadata.len() })
    }

    /// A part of this one, which must lie in it.
    pub fn part(&self, offset: u64, length: u64) -> Option<Self> {
        let at = self.at.checked_add(offset)?;
        let end = at.checked_add(length)?;
        (end <= self.end).then(|| Self { file: Arc::clone(&self.file), at, end })
    }

    /// Bytes left.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.end - self.at
    }

    /// Reads all of it, when that is not more than `limit`.
    pub fn read_bounded(mut self, limit: u64) -> io::Result<Vec<u8>> {
        if self.len() > limit {
            return Err(io::Error::other(format!("it is longer than {limit} bytes")));
        }
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length =
            usize::try_from(self.len()).map_or(buffer.len(), |left| left.min(buffer.len()));
        let n = self.file.read_at(&mut buffer[..length], self.at)?;
        if n == 0 && length > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file was made shorter"));
        }
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_in_their_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "0123456789").unwrap();
        let whole = Window::open(&path).unwrap();
        let part = whole.part(2, 5).unwrap();
        assert_eq!(part.part(1, 2).unwrap().read_bounded(2).unwrap(), b"34");
        assert_eq!(part.clone().read_bounded(5).unwrap(), b"23456");
        assert!(part.clone().read_bounded(4).is_err());
        assert!(part.part(1, 5).is_none() && whole.part(u64::MAX, 1).is_none());
        assert_eq!(whole.part(10, 0).unwrap().read_bounded(0).unwrap(), b"");
    }

    #[test]
    fn only_regular_files_are_opened_and_nothing_waits() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(Window::open(&pipe).is_err());
        assert!(Window::open(dir.path()).is_err());
    }
}
