//! Free room in the file system that a disk is made in. Others write there too, so it is asked for while the disk grows
//! and not only before.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;

use nix::sys::statvfs::fstatvfs;

/// How much is written between two looks. Makers that run at one time may each be so much beyond.
const STRIDE: u64 = 64 * 1024 * 1024;

/// The file system would have less room than must stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the file system has {free} bytes of free room, of which {keep} must stay, and {wanted} are wanted: make room, \
     or use a smaller image"
)]
pub struct NoRoom {
    /// What there is.
    pub free: u64,
    /// What must stay.
    pub keep: u64,
    /// What would be written next.
    pub wanted: u64,
}

impl From<NoRoom> for io::Error {
    /// As the system says it of a file system that is full.
    fn from(error: NoRoom) -> Self {
        Self::new(io::ErrorKind::StorageFull, error)
    }
}

/// Looks after the room while a file is written.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    keep: u64,
    unseen: u64,
}

impl Room {
    /// `keep` bytes must stay free. Nothing is looked at where that is 0: the system tells of a file system that is full.
    pub fn new(keep: u64) -> Self {
        // So that the first byte is looked at.
        Self { keep, unseen: STRIDE }
    }

    /// To be called before so many bytes are written to `file`.
    pub fn before(&mut self, file: &File, bytes: u64) -> io::Result<()> {
        self.unseen = self.unseen.saturating_add(bytes);
        if self.keep == 0 || self.unseen < STRIDE {
            return Ok(());
        }
        self.unseen = 0;
        self.require(file, bytes)
    }

    /// Whether so many bytes can be written to `file`, looked at now.
    pub fn require(&self, file: &File, bytes: u64) -> io::Result<()> {
        if self.keep == 0 {
            return Ok(());
        }
        let there = fstatvfs(file.as_fd())?;
        let free = there.blocks_available().saturating_mul(there.fragment_size());
        enough(free, self.keep, bytes)?;
        Ok(())
    }
}

fn enough(free: u64, keep: u64, wanted: u64) -> Result<(), NoRoom> {
    if keep.saturating_add(wanted) > free { Err(NoRoom { free, keep, wanted }) } else { Ok(()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_below_at_and_above_it() {
        assert_eq!(enough(10, 4, 5), Ok(()));
        assert_eq!(enough(10, 4, 6), Ok(()));
        assert_eq!(enough(10, 4, 7), Err(NoRoom { free: 10, keep: 4, wanted: 7 }));
        assert!(enough(10, u64::MAX, 1).is_err(), "no overflow");
    }

    #[test]
    fn the_first_byte_and_then_every_stride_are_looked_at() {
        let file = tempfile::tempfile().unwrap();
        // More than any file system has.
        let mut room = Room::new(u64::MAX);
        let full = |looked: io::Result<()>| {
            looked.is_err_and(|error| error.kind() == io::ErrorKind::StorageFull)
        };
        assert!(full(room.before(&file, 1)));
        assert!(!full(room.before(&file, STRIDE - 1)));
        assert!(full(room.before(&file, 1)));
        assert!(full(room.require(&file, 0)));
        let mut room = Room::new(0);
        assert!(!full(room.before(&file, u64::MAX)), "the system tells");
        assert!(!full(Room::new(1).before(&file, 1)));
    }
}
