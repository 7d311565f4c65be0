//! Safe unpacking of the source: a stranger's archive into a directory, and nowhere else.
//!
//! ```text
//! session ─▶ feed ─▶ format (gzip, zstd) ─▶ tar's reader ─▶ tree (by directory handle)
//! ```
//! - Names are relative and have no `..`; names that are not UTF-8 are kept as they are.
//! - Symbolic links are made as they are and never followed out of the tree; hard links only
//!   join files of the tree. Devices, FIFOs and unknown kinds are refused.
//! - A later entry of a name replaces an earlier one.
//! - Permissions, the sticky bit and the times of files are kept. **Set-user-id and set-group-id
//!   bits are dropped**, owners, extended attributes and the times of directories too: everything
//!   belongs to root.
//! - Sparse files (GNU's old form) are filled with zeros and count with their whole size.
//! - Everything is bounded: bytes, entries, names, depth, headers, what follows the end.
//!
//! On a refusal what was unpacked before it stays; the VM that it is in goes.

mod error;
mod feed;
mod format;
mod guard;
mod lockfiles;
mod tree;

use std::io::{BufReader, Read};
use std::path::Path;
use std::time::{Duration, SystemTime};

use tar::{Archive, Entry, EntryType};

pub use self::error::SourceError;
use self::error::{Place, Problem, shown};
pub use self::feed::{Feed, FeedError, Feeder, feed};
use self::guard::Guard;
pub use self::lockfiles::lockfiles;
use self::tree::{Meta, Name, Refusal, Tree};

/// Decompressed bytes that are read ahead of tar's reader, which reads headers one by one.
const READ_AHEAD: usize = 64 * 1024;

/// Most bytes after an archive's end, all zero: tar programs fill up their last record, usually
/// of 10 KiB.
const MAX_PADDING: u64 = 1024 * 1024;

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
    let tree = Tree::open(into, limits.entries).map_err(disk)?;
    let mut unpacking = Unpacking { tree, limits, bytes_left: limits.bytes, last: None, stop };
    let ended = unpacking.run(archive);
    // Whatever a reader says once the build has been ended, that is the reason.
    if stop() { Err(SourceError::Stopped) } else { ended }
}

struct Unpacking<'a> {
    tree: Tree,
    limits: SourceLimits,
    bytes_left: u64,
    /// The name of the last entry, for messages.
    last: Option<Vec<u8>>,
    stop: &'a dyn Fn() -> bool,
}

impl Unpacking<'_> {
    fn run(&mut self, archive: impl Read) -> Result<(), SourceError> {
        let decoder = match format::open(archive) {
            Ok(Ok(decoder)) => decoder,
            Ok(Err(unsupported)) => return Err(SourceError::Unsupported(unsupported.0)),
            Err(cause) => return Err(self.damaged("archive", cause)),
        };
        let format = decoder.name();
        let (guard, control) = Guard::new(BufReader::with_capacity(READ_AHEAD, decoder));
        let mut archive = Archive::new(guard);
        let mut entries = archive.entries().map_err(|cause| self.damaged(format, cause))?;
        loop {
            if (self.stop)() {
                return Err(SourceError::Stopped);
            }
            control.headers_begin();
            let next = entries.next();
            control.headers_end();
            match next {
                Some(Ok(mut entry)) => self.entry(&mut entry, format)?,
                None if control.has_ended() => return Err(self.cut_off()),
                None => break,
                Some(Err(_)) if control.headers_too_long() => {
                    return Err(SourceError::Headers { place: self.place() });
                }
                Some(Err(_)) if control.has_ended() && self.last.is_some() => {
                    return Err(self.cut_off());
                }
                Some(Err(cause)) => return Err(self.damaged(format, cause)),
            }
        }
        self.padding(archive.into_inner(), format)
    }

    fn entry<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        format: &'static str,
    ) -> Result<(), SourceError> {
        let name = entry.path_bytes().into_owned();
        self.last = Some(name.clone());
        self.make(entry, &name).map_err(|refusal| match refusal {
            Refusal::Problem(problem) => SourceError::Entry { name: shown(&name), problem },
            Refusal::Disk(cause) => SourceError::Disk { name: shown(&name), cause },
            Refusal::Read(cause) if cause.kind() == std::io::ErrorKind::UnexpectedEof => {
                self.cut_off()
            }
            Refusal::Read(cause) => self.damaged(format, cause),
            Refusal::TooMany => {
                SourceError::TooMany { limit: self.limits.entries, name: shown(&name) }
            }
            Refusal::TooLarge => {
                SourceError::TooLarge { limit: self.limits.bytes, name: shown(&name) }
            }
            Refusal::Stopped => SourceError::Stopped,
        })?;
        Ok(())
    }

    fn make<R: Read>(&mut self, entry: &mut Entry<'_, R>, name: &[u8]) -> Result<(), Refusal> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            // A comment of the archive, such as git's commit id.
            return self.tree.count();
        }
        if kind == EntryType::XHeader {
            // One that tar's reader did not take for an extended header. Its content is unbounded.
            return Err(Problem::BadHeaders.into());
        }
        check_extensions(entry)?;
        let meta = Meta {
            mode: entry.header().mode().map_err(|_| Problem::BadHeaders)?,
            modified: entry.header().mtime().ok().and_then(time),
        };
        let parsed = Name::parse(name)?;
        // Before there was a kind for directories, a slash at the end of the name was one.
        let is_old_directory = kind == EntryType::Regular && name.ends_with(b"/");
        let is_directory = kind == EntryType::Directory || is_old_directory;
        let Some(name) = parsed else {
            return if is_directory { self.tree.count() } else { Err(Problem::Root.into()) };
        };
        match kind {
            _ if is_directory => self.tree.directory(&name, meta),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(entry, &name, meta)
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default();
                self.tree.symlink(&name, &target)
            }
            EntryType::Link => {
                let target = entry.link_name_bytes().unwrap_or_default();
                self.tree.hard_link(&name, &target)
            }
            EntryType::Char | EntryType::Block => Err(Problem::Device.into()),
            EntryType::Fifo => Err(Problem::Fifo.into()),
            other => {
                let shown = char::from(other.as_byte());
                let shown = if shown.is_ascii_graphic() { shown } else { '?' };
                Err(Problem::UnknownKind(shown).into())
            }
        }
    }

    fn file<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        name: &Name,
        meta: Meta,
    ) -> Result<(), Refusal> {
        let size = entry.size();
        // Before a byte of it is written.
        self.bytes_left = self.bytes_left.checked_sub(size).ok_or(Refusal::TooLarge)?;
        let written = self.tree.file(name, meta, entry, self.stop)?;
        if written == size {
            Ok(())
        } else {
            Err(Refusal::Read(std::io::ErrorKind::UnexpectedEof.into()))
        }
    }

    /// Reads to the very end: a compressed archive's checksum stands there.
    fn padding(&self, rest: impl Read, format: &'static str) -> Result<(), SourceError> {
        let mut rest = rest.take(MAX_PADDING + 1);
        let mut buffer = [0; 4096];
        let mut total = 0;
        loop {
            match rest.read(&mut buffer) {
                Ok(0) if total > MAX_PADDING => return Err(SourceError::TrailingData),
                Ok(0) => return Ok(()),
                Ok(len) if buffer[..len].iter().any(|byte| *byte != 0) => {
                    return Err(SourceError::TrailingData);
                }
                Ok(len) => total += len as u64,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(self.damaged(format, cause)),
            }
        }
    }

    fn place(&self) -> Place {
        Place(self.last.as_deref().map(shown))
    }

    fn cut_off(&self) -> SourceError {
        SourceError::Truncated { place: self.place() }
    }

    fn damaged(&self, format: &'static str, cause: std::io::Error) -> SourceError {
        match cause.kind() {
            std::io::ErrorKind::UnexpectedEof => self.cut_off(),
            // The first header of something that is no tar.
            _ if format == "tar" && self.last.is_none() => SourceError::NotAnArchive,
            _ => SourceError::Damaged { format, place: self.place(), cause },
        }
    }
}

fn time(seconds: u64) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Extended headers must make sense, and must not say what tar's reader does not know.
fn check_extensions<R: Read>(entry: &mut Entry<'_, R>) -> Result<(), Problem> {
    let extensions = entry.pax_extensions().map_err(|_| Problem::BadHeaders)?;
    for extension in extensions.into_iter().flatten() {
        let extension = extension.map_err(|_| Problem::BadHeaders)?;
        if extension.key_bytes().starts_with(b"GNU.sparse.") {
            return Err(Problem::Sparse);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
