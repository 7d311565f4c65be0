//! Safe unpacking of the source: a stranger's archive into a directory, and nowhere else.
//!
//! ```text
//! session ─▶ feed ─▶ format (gzip, zstd) ─▶ kiln_archive (by directory handle)
//! ```
//! What is kept, refused and bounded of an archive is said in [`kiln_archive`]. Everything belongs to root, and a later
//! entry of a name replaces an earlier one.
//!
//! On a refusal what was unpacked before it stays; the VM that it is in goes.

mod error;
mod feed;
mod format;
mod lockfiles;

use std::io::Read;
use std::path::Path;

use kiln_archive::{Limits, Tree};

pub use self::error::SourceError;
pub use self::feed::{Feed, FeedError, Feeder, feed};
pub use self::lockfiles::lockfiles;

/// What a source may use up.
#[derive(Clone, Copy, Debug)]
pub struct SourceLimits {
    /// Bytes of all files together.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: u64,
}

/// Unpacks an archive into an existing directory. It blocks; `stop` is asked often.
pub fn unpack(
    archive: impl Read,
    into: &Path,
    limits: SourceLimits,
    stop: &dyn Fn() -> bool,
) -> Result<(), SourceError> {
    let disk = |cause| SourceError::Disk { name: ".".to_owned(), cause };
    let SourceLimits { bytes, entries } = limits;
    let tree = Tree::open(into, entries).map_err(disk)?;
    let decoder = match format::open(archive) {
        _ if stop() => return Err(SourceError::Stopped),
        Ok(Ok(decoder)) => decoder,
        Ok(Err(unsupported)) => return Err(SourceError::Unsupported(unsupported.0)),
        Err(cause) => return Err(error::unreadable("archive", cause)),
    };
    let format = decoder.name();
    kiln_archive::unpack(decoder, tree, Limits { bytes, entries }, stop)
        .map_err(|error| SourceError::of(error, format))
}

#[cfg(test)]
mod tests;
