//! The contents of all layers' files, one behind the other, in a file without a name. It lies where the disk
//! will, because that is where there is room, and is gone with the process, however that ends.

use std::fs::File;
use std::io::{self, BufRead, BufWriter, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use tokio_util::sync::CancellationToken;

use super::room::Room;

/// Small files go together to the file.
const BUFFER: usize = 1024 * 1024;

/// Being filled.
pub struct Spool {
    file: BufWriter<File>,
    end: u64,
    room: Room,
}

/// Being read.
pub struct Spooled {
    file: File,
    cancel: CancellationToken,
}

impl Spool {
    /// Makes an empty one in a directory, which looks after the room there.
    pub fn create(dir: &Path, room: Room) -> io::Result<Self> {
        let file = BufWriter::with_capacity(BUFFER, tempfile::tempfile_in(dir)?);
        Ok(Self { file, end: 0, room })
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
            self.room.before(self.file.get_ref(), length as u64)?;
            self.file.write_all(bytes)?;
            self.end += length as u64;
            content.consume(length);
        }
    }

    /// Ends the filling. What reads it afterwards fails once it is cancelled, in the middle of a content too.
    pub fn finish(self, cancel: &CancellationToken) -> io::Result<Spooled> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(Spooled { file, cancel: cancel.clone() })
    }
}

impl Spooled {
    /// A content's bytes.
    pub fn content(&self, at: u64, size: u64) -> Content<'_> {
        Content { spooled: self, at, left: size }
    }
}

/// Reads one content.
pub struct Content<'a> {
    spooled: &'a Spooled,
    at: u64,
    left: u64,
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.spooled.cancel.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let length = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let n = self.spooled.file.read_at(&mut buffer[..length], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_content_is_read_until_it_is_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = Spool::create(dir.path(), Room::new(0)).unwrap();
        spool.add(&mut &b"before"[..]).unwrap();
        let at = spool.add(&mut &b"content"[..]).unwrap();
        let cancel = CancellationToken::new();
        let spooled = spool.finish(&cancel).unwrap();
        let mut content = spooled.content(at, 7);
        let mut half = [0; 4];
        content.read_exact(&mut half).unwrap();
        assert_eq!(&half, b"cont");
        cancel.cancel();
        assert!(content.read(&mut half).is_err());
    }

    #[test]
    fn the_room_that_must_stay_is_not_filled() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = Spool::create(dir.path(), Room::new(u64::MAX)).unwrap();
        let error = spool.add(&mut &b"x"[..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().contains("must stay"), "{error}");
    }
}
