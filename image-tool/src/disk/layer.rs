//! One layer: its tar archive's entries, checked, as a [`Diff`]; the contents of its files go to the spool.

use std::io::{self, BufRead};

use tokio_util::sync::CancellationToken;

use super::limits::{Budget, TooLarge};
use super::path::{self, PathProblem};
use super::spool::Spool;
use super::tar::{Entry, Kind, Reader, TarError};
use super::tree::{BLOCK_COST, Change, Content, Diff, Meta, NODE_COST};
use super::xattr::{self, XattrProblem};
use crate::text::printable;

/// Begins a whiteout's name (image-spec, `layer.md`, "Whiteouts").
const WHITEOUT: &str = ".wh.";
/// In a directory: nothing below it is from lower layers.
const OPAQUE: &str = ".wh..wh..opq";
/// AUFS kept its own files under such names, and old layers have them. They are no content.
const AUFS: &str = ".wh..wh.";
/// Longer links are no links to Linux: PATH_MAX without the NUL.
const MAX_LINK: usize = 4095;
/// Shorter links are in the inode itself.
const MAX_FAST_LINK: usize = 59;
/// What a device number of ext4, and of Linux, can have.
const MAX_MAJOR: u64 = 0xfff;
const MAX_MINOR: u64 = 0xf_ffff;

/// A layer is refused.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Reading it: the blob, its compression, its length.
    #[error("it cannot be unpacked")]
    Unpack(#[from] io::Error),
    /// Writing its contents.
    #[error("cannot write the content of {entry} to the temporary file")]
    Spool {
        /// Its name.
        entry: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The archive.
    #[error("its tar archive is damaged or not taken, after {after}")]
    Tar {
        /// The last good entry.
        after: String,
        /// Why.
        #[source]
        source: TarError,
    },
    /// One entry.
    #[error("entry {entry}")]
    Entry {
        /// Its name.
        entry: String,
        /// Why.
        #[source]
        source: Box<EntryProblem>,
    },
}

/// Why an entry is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryProblem {
    /// Its name.
    #[error(transparent)]
    Path(#[from] PathProblem),
    /// Its target.
    #[error("its target cannot be one")]
    Target(#[source] PathProblem),
    /// Its attributes.
    #[error(transparent)]
    Xattr(#[from] XattrProblem),
    /// Too much of it.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The root can only be a directory (umoci's CVE-2021-29136).
    #[error("it names the root and is no directory")]
    Root,
    /// A whiteout of nothing, of `.` or of `..`.
    #[error("it is a whiteout that names nothing")]
    Whiteout,
    /// A name for a directory on something else.
    #[error("its name ends in a slash and it is no directory")]
    Slash,
    /// No owner of Linux's.
    #[error("its owner {0} is not a number below 2^32 - 1")]
    Owner(u64),
    /// No device of Linux's.
    #[error("its device number {0}:{1} is out of range")]
    Device(u64, u64),
}

/// Reads a layer's archive to its end.
pub fn read(
    archive: &mut impl BufRead,
    spool: &mut Spool,
    budget: &mut Budget,
    cancel: &CancellationToken,
) -> Result<Diff, LayerError> {
    let mut reader = Reader::new(archive);
    let mut diff = Diff::default();
    let mut last = "its beginning".to_owned();
    loop {
        let entry = reader.entry().map_err(|source| tar_error(&last, source))?;
        let Some(entry) = entry else { return Ok(diff) };
        if cancel.is_cancelled() {
            return Err(io::Error::other("cancelled").into());
        }
        last = shown(&entry.path);
        let refused =
            |problem| LayerError::Entry { entry: shown(&entry.path), source: Box::new(problem) };
        let item = Item::of(&entry, budget).map_err(refused)?;
        match item {
            Item::Whiteout(path) => diff.whiteouts.push(path),
            Item::Opaque(path) => diff.opaques.push(path),
            Item::Nothing => {}
            Item::Entry(path, change) => diff.entries.push((path, change)),
            Item::File(path, meta) => {
                let at = spool.add(&mut reader).map_err(|e| content_error(&last, e))?;
                let content = Content::File { at, size: entry.size };
                diff.entries.push((path, Change::Put(meta, content)));
            }
        }
    }
}

/// The archive may have ended, and the disk be full: the kind tells.
fn content_error(entry: &str, error: io::Error) -> LayerError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => tar_error(entry, TarError::Truncated),
        // Of the room that must stay, or the system's own.
        io::ErrorKind::StorageFull => LayerError::Spool { entry: entry.to_owned(), source: error },
        // Errors of the unpacking side are not the system's.
        _ if error.raw_os_error().is_none() => error.into(),
        _ => LayerError::Spool { entry: entry.to_owned(), source: error },
    }
}

fn tar_error(after: &str, source: TarError) -> LayerError {
    match source {
        TarError::Read(source) => source.into(),
        source => LayerError::Tar { after: after.to_owned(), source },
    }
}

/// A name for a message: bounded, quoted, without what steers a terminal.
pub(super) fn shown(path: &[u8]) -> String {
    /// Enough to find it.
    const MAX: usize = 200;
    let text = String::from_utf8_lossy(&path[..path.len().min(MAX)]);
    format!(
        "\"{}{}\"",
        printable(&text).replace('\n', "\u{fffd}"),
        if path.len() > MAX { "…" } else { "" }
    )
}

/// What an entry means.
enum Item {
    Whiteout(Box<str>),
    Opaque(Box<str>),
    Nothing,
    Entry(Box<str>, Change),
    /// Its content is yet to be read.
    File(Box<str>, Meta),
}

impl Item {
    fn of(entry: &Entry, budget: &mut Budget) -> Result<Self, EntryProblem> {
        budget.entry()?;
        let path = path::normal(&entry.path)?;
        budget.memory(NODE_COST + 2 * path.len() as u64)?;
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return match hidden {
                _ if name == OPAQUE => Ok(Self::Opaque(parent.into())),
                _ if name.starts_with(AUFS) => Ok(Self::Nothing),
                "" | "." | ".." => Err(EntryProblem::Whiteout),
                _ => Ok(Self::Whiteout(path::join(parent, hidden))),
            };
        }
        if path.is_empty() && entry.kind != Kind::Dir {
            return Err(EntryProblem::Root);
        }
        if entry.path.ends_with(b"/") && entry.kind != Kind::Dir {
            return Err(EntryProblem::Slash);
        }
        if entry.kind == Kind::HardLink {
            let target = path::normal(&entry.link).map_err(EntryProblem::Target)?;
            budget.memory(target.len() as u64)?;
            return Ok(Self::Entry(path, Change::Link(target)));
        }
        let mut meta = meta(entry, budget)?;
        if entry.kind == Kind::Symlink {
            // Linux gives links no other, whatever the archive says.
            meta.mode = 0o777;
        }
        let content = match entry.kind {
            Kind::File | Kind::HardLink => return Ok(Self::File(path, meta)),
            Kind::Dir => Content::Dir,
            Kind::Fifo => Content::Fifo,
            Kind::Symlink => {
                let target = path::text(&entry.link, MAX_LINK).map_err(EntryProblem::Target)?;
                let block = if target.len() > MAX_FAST_LINK { BLOCK_COST } else { 0 };
                budget.memory(target.len() as u64 + block)?;
                Content::Symlink(target.into())
            }
            Kind::Char => {
                let (major, minor) = device(entry.device)?;
                Content::Char(major, minor)
            }
            Kind::Block => {
                let (major, minor) = device(entry.device)?;
                Content::Block(major, minor)
            }
        };
        Ok(Self::Entry(path, Change::Put(meta, content)))
    }
}

fn meta(entry: &Entry, budget: &mut Budget) -> Result<Meta, EntryProblem> {
    let owner = |id: u64| {
        // The last number means "no change" to Linux.
        let id32 = u32::try_from(id).ok().filter(|id| *id != u32::MAX);
        id32.ok_or(EntryProblem::Owner(id))
    };
    let xattrs = xattr::kept(&entry.xattrs)?;
    if !xattrs.is_empty() {
        let bytes: usize = xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        budget.memory(BLOCK_COST + 2 * bytes as u64)?;
    }
    Ok(Meta {
        // Masked: it fits.
        mode: u16::try_from(entry.mode & 0o7777).unwrap_or_default(),
        uid: owner(entry.uid)?,
        gid: owner(entry.gid)?,
        mtime: entry.mtime,
        xattrs,
    })
}

fn device((major, minor): (u64, u64)) -> Result<(u32, u32), EntryProblem> {
    let number = |n: u64, max| u32::try_from(n).ok().filter(|_| n <= max);
    let both = number(major, MAX_MAJOR).zip(number(minor, MAX_MINOR));
    both.ok_or(EntryProblem::Device(major, minor))
}
