//! Why a source cannot be unpacked, in words for the one who sent it.

use std::io;

use kiln_protocol::event::FailureKind;

/// Longest part of a name that is shown. Names may have 4 KiB and hold anything.
const SHOWN_NAME: usize = 200;

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

/// What is wrong with an entry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("has no name; leave it out")]
    NoName,
    #[error("has an absolute name; pack names relative to the source's directory")]
    Absolute,
    #[error("has `..` in its name; pack names relative to the source's directory")]
    ParentDir,
    #[error("has a name that is longer than {0} bytes; shorten it")]
    LongName(usize),
    #[error("lies more than {0} directories deep; pack fewer levels")]
    TooDeep(usize),
    #[error("is the source's directory itself, but not a directory; leave it out")]
    Root,
    #[error("goes through a symbolic link that leaves the source; leave the entry or the link out")]
    Escapes,
    #[error("lies in something that is not a directory; leave one of the two out")]
    NoParent,
    #[error("would replace a directory that has files in it; leave one of the two out")]
    ReplacesDirectory,
    #[error("is a hard link to `{0}`, which is not a file of the source packed before it")]
    BadHardLink(String),
    #[error("is a symbolic link without a target, or with one that is too long; leave it out")]
    BadSymlink,
    #[error("is a device; leave it out")]
    Device,
    #[error("is a FIFO; leave it out")]
    Fifo,
    #[error("is a sparse file in a form that is not understood; pack without --sparse")]
    Sparse,
    #[error("has extended headers that are damaged; pack it again")]
    BadHeaders,
    #[error("is of a kind that is not understood (`{0}`); leave it out")]
    UnknownKind(char),
}

/// Where in the archive something was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(pub Option<String>);

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some(name) => write!(f, "at or after its entry `{name}`"),
            None => f.write_str("at its start"),
        }
    }
}

impl SourceError {
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

/// A name, or another text, of the archive as it may be shown: no control characters, no endless text.
pub fn shown(name: &[u8]) -> String {
    let name = &name[..name.len().min(SHOWN_NAME + 1)];
    let mut text: String = String::from_utf8_lossy(name)
        .chars()
        .take(SHOWN_NAME)
        .flat_map(char::escape_debug)
        .collect();
    if name.len() > SHOWN_NAME {
        text.push('…');
    }
    text
}
