//! Why a source cannot be unpacked, in words for the one who sent it.

use std::io;

use kiln_archive::{ArchiveError, Place, Problem, shown};
use kiln_protocol::event::FailureKind;

/// A source that cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The build was ended meanwhile.
    #[error("unpacking the source was stopped")]
    Stopped,
    /// The bytes are no tar.
    #[error("the source is not a tar archive: send a tar, plain or compressed with gzip or zstd")]
    NotAnArchive,
    /// The bytes are something else.
    #[error("the source is packed with {0}: send a tar, plain or compressed with gzip or zstd")]
    Unsupported(&'static str),
    /// The compressed data or the archive's structure is broken.
    #[error(
        "the source archive ({format}) is damaged {place}: {}; pack and send it again",
        shown(cause.to_string().as_bytes())
    )]
    Damaged {
        /// What it is packed in.
        format: &'static str,
        /// After which entry.
        place: Place,
        /// What the reader says. It may quote the archive.
        cause: io::Error,
    },
    /// It ends too early.
    #[error("the source archive is cut off {place}; pack and send it again")]
    Truncated {
        /// After which entry.
        place: Place,
    },
    /// There is more after the end.
    #[error(
        "the source archive goes on after its end; send one archive, not several joined together"
    )]
    TrailingData,
    /// The archive's headers for one entry are absurdly long.
    #[error("the source archive has over-long headers {place}; pack it without them")]
    Headers {
        /// After which entry.
        place: Place,
    },
    /// One entry is refused.
    #[error("the source's entry `{name}` {problem}")]
    Entry {
        /// Its name, safe to show.
        name: String,
        /// What is wrong with it, and what to do.
        problem: Problem,
    },
    /// Over the limit.
    #[error(
        "the source is larger than {limit} bytes unpacked (at entry `{name}`); send less, for \
         example with a .dockerignore, or have the limit raised"
    )]
    TooLarge {
        /// The limit.
        limit: u64,
        /// The entry that does not fit, safe to show.
        name: String,
    },
    /// Over the limit.
    #[error(
        "the source has more than {limit} files and directories (at entry `{name}`); send less, \
         for example with a .dockerignore, or have the limit raised"
    )]
    TooMany {
        /// The limit.
        limit: u64,
        /// The entry that does not fit, safe to show.
        name: String,
    },
    /// The VM's disk.
    #[error("the source's entry `{name}` cannot be written: {cause}")]
    Disk {
        /// Its name, safe to show.
        name: String,
        /// What the system says.
        cause: io::Error,
    },
}

/// A source whose very beginning cannot be read.
pub fn unreadable(format: &'static str, cause: io::Error) -> SourceError {
    match cause.kind() {
        io::ErrorKind::UnexpectedEof => SourceError::Truncated { place: Place(None) },
        _ => SourceError::Damaged { format, place: Place(None), cause },
    }
}

impl SourceError {
    /// What is wrong with a source in that format.
    pub fn of(error: ArchiveError, format: &'static str) -> Self {
        match error {
            ArchiveError::Stopped => Self::Stopped,
            ArchiveError::NotAnArchive { .. } if format == "tar" => Self::NotAnArchive,
            ArchiveError::NotAnArchive { cause } => unreadable(format, cause),
            ArchiveError::Damaged { place, cause } => Self::Damaged { format, place, cause },
            ArchiveError::Truncated { place } => Self::Truncated { place },
            ArchiveError::TrailingData => Self::TrailingData,
            ArchiveError::Headers { place } => Self::Headers { place },
            ArchiveError::Entry { name, problem } => Self::Entry { name, problem },
            ArchiveError::TooLarge { limit, name } => Self::TooLarge { limit, name },
            ArchiveError::TooMany { limit, name } => Self::TooMany { limit, name },
            ArchiveError::Disk { name, cause } => Self::Disk { name, cause },
        }
    }

    /// The cause that a build's failure names.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Stopped => FailureKind::Internal,
            Self::Disk { cause, .. } => match cause.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FailureKind::DiskFull,
                _ => FailureKind::Internal,
            },
            _ => FailureKind::SourceInvalid,
        }
    }
}
