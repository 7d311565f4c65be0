//! The contents of all layers' files, one behind the other, in a file without a name. It lies where the disk
//! will, because that is where there is room, and is gone with the process, however that ends.

use std::fs::File;
use std::io::{self, BufRead, BufWriter, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Small files go together to the file.
const BUFFER: usize = 1024 * 1024;

/// Being filled.
pub struct Spool {
    file: BufWriter<File>,
    end: u64,
}

/// Being read.
pub struct Spooled {
    file: File,
}

impl Spool {
    /// Makes an empty one in a directory.
    pub fn create(dir: &Path) -> io::Result<Self> {
        let file = BufWriter::with_capacity(BUFFER, tempfile::tempfile_in(dir)?);
        Ok(Self { file, end: 0 })
    }

    /// Adds all of `content` and says where it begins.
    pub fn add(&mut self, content: &mut impl BufRead) -> io::Result<u64> {
        let at = self.end;
        loop {
            let bytes = content.fill_buf()?;
            if bytes.is_empty() {
                return Ok(at);
            }
            let length = bytes.len();
            self.file.write_all(bytes)?;
            self.end += length as u64;
            content.consume(length);
        }
    }

    /// Ends the filling.
    pub fn finish(self) -> io::Result<Spooled> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(Spooled { file })
    }
}

impl Spooled {
    /// A content's bytes.
    pub fn content(&self, at: u64, size: u64) -> Content<'_> {
        Content { file: &self.file, at, left: size }
    }
}

/// Reads one content.
pub struct Content<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let n = self.file.read_at(&mut buffer[..length], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}
