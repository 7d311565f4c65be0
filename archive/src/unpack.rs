//! Takes an archive entry by entry and makes each in the tree.

use std::io::{self, BufReader, ErrorKind, Read};
use std::time::{Duration, SystemTime};

use tar::{Archive, Entry, EntryType};

use super::guard::Guard;
use super::problem::{Place, Problem, shown};
use super::tree::{Meta, Name, Refusal, Tree};

/// Bytes that are read ahead of tar's reader, which reads headers one by one.
const READ_AHEAD: usize = 64 * 1024;

/// Most bytes after an archive's end, all zero: tar programs fill up their last record, usually
/// of 10 KiB.
pub const MAX_PADDING: u64 = 1024 * 1024;

/// What an archive may use up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of all files together.
    pub bytes: u64,
    /// Files, directories and links. The tree counts them; this is what messages say.
    pub entries: u64,
}

impl Limits {
    /// The disk is the limit.
    pub const NONE: Self = Self { bytes: u64::MAX, entries: u64::MAX };
}

/// An archive that cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Nobody wants it any more.
    #[error("unpacking was stopped")]
    Stopped,
    /// The bytes are no tar.
    #[error("this is not a tar archive; send one that is not compressed")]
    NotAnArchive {
        /// What the reader says. It may quote the archive.
        cause: io::Error,
    },
    /// The archive's structure is broken, or its bytes cannot be had.
    #[error("the archive is damaged {place}: {}", shown(cause.to_string().as_bytes()))]
    Damaged {
        /// After which entry.
        place: Place,
        /// What the reader says. It may quote the archive.
        cause: io::Error,
    },
    /// It ends too early.
    #[error("the archive is cut off {place}; send it again")]
    Truncated {
        /// After which entry.
        place: Place,
    },
    /// There is more after the end.
    #[error("the archive goes on after its end; send one archive, not several joined together")]
    TrailingData,
    /// The archive's headers for one entry are absurdly long.
    #[error("the archive has over-long headers {place}; pack it without them")]
    Headers {
        /// After which entry.
        place: Place,
    },
    /// One entry is refused.
    #[error("the archive's entry `{name}` {problem}")]
    Entry {
        /// Its name, safe to show.
        name: String,
        /// What is wrong with it, and what to do.
        problem: Problem,
    },
    /// Over the limit.
    #[error("the archive has more than {limit} bytes (at entry `{name}`)")]
    TooLarge {
        /// The limit.
        limit: u64,
        /// The entry that does not fit, safe to show.
        name: String,
    },
    /// Over the limit.
    #[error("the archive has more than {limit} entries (at entry `{name}`)")]
    TooMany {
        /// The limit.
        limit: u64,
        /// The entry that does not fit, safe to show.
        name: String,
    },
    /// The disk.
    #[error("the archive's entry `{name}` cannot be written: {cause}")]
    Disk {
        /// Its name, safe to show.
        name: String,
        /// What the system says.
        cause: io::Error,
    },
}

/// Unpacks an archive, to its very end. It blocks; `stop` is asked often.
pub fn unpack(
    archive: impl Read,
    tree: Tree,
    limits: Limits,
    stop: &dyn Fn() -> bool,
) -> Result<(), ArchiveError> {
    let mut unpacking = Unpacking { tree, limits, bytes_left: limits.bytes, last: None, stop };
    let ended = unpacking.run(archive);
    // What was made before a refusal is as it shall be, too.
    let settled = unpacking.tree.settle().map_err(|refusal| unpacking.refused(refusal, b"."));
    // Whatever a reader says once nobody wants it any more, that is the reason.
    if stop() { Err(ArchiveError::Stopped) } else { ended.and(settled) }
}

struct Unpacking<'a> {
    tree: Tree,
    limits: Limits,
    bytes_left: u64,
    /// The name of the last entry, for messages.
    last: Option<Vec<u8>>,
    stop: &'a dyn Fn() -> bool,
}

impl Unpacking<'_> {
    fn run(&mut self, archive: impl Read) -> Result<(), ArchiveError> {
        let (guard, control) = Guard::new(BufReader::with_capacity(READ_AHEAD, archive));
        let mut archive = Archive::new(guard);
        let mut entries = archive.entries().map_err(|cause| self.damaged(cause))?;
        loop {
            if (self.stop)() {
                return Err(ArchiveError::Stopped);
            }
            control.headers_begin();
            let next = entries.next();
            control.headers_end();
            match next {
                Some(Ok(mut entry)) => self.entry(&mut entry)?,
                None if control.has_ended() => return Err(self.cut_off()),
                None => break,
                Some(Err(_)) if control.headers_too_long() => {
                    return Err(ArchiveError::Headers { place: self.place() });
                }
                Some(Err(_)) if control.has_ended() && self.last.is_some() => {
                    return Err(self.cut_off());
                }
                Some(Err(cause)) => return Err(self.damaged(cause)),
            }
        }
        self.padding(archive.into_inner())
    }

    fn entry<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<(), ArchiveError> {
        let name = entry.path_bytes().into_owned();
        self.last = Some(name.clone());
        self.make(entry, &name).map_err(|refusal| self.refused(refusal, &name))
    }

    fn refused(&self, refusal: Refusal, name: &[u8]) -> ArchiveError {
        let Limits { bytes, entries } = self.limits;
        let name = shown(name);
        match refusal {
            Refusal::Problem(problem) => ArchiveError::Entry { name, problem },
            Refusal::Disk(cause) => ArchiveError::Disk { name, cause },
            Refusal::Read(cause) => self.damaged(cause),
            Refusal::TooMany => ArchiveError::TooMany { limit: entries, name },
            Refusal::TooLarge => ArchiveError::TooLarge { limit: bytes, name },
            Refusal::Stopped => ArchiveError::Stopped,
        }
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
        let parsed = self.tree.name(name)?;
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
        if written == size { Ok(()) } else { Err(Refusal::Read(ErrorKind::UnexpectedEof.into())) }
    }

    /// Reads to the very end: a compressed archive's checksum stands there.
    fn padding(&self, rest: impl Read) -> Result<(), ArchiveError> {
        let mut rest = rest.take(MAX_PADDING + 1);
        let mut buffer = [0; 4096];
        let mut total = 0;
        loop {
            match rest.read(&mut buffer) {
                Ok(0) if total > MAX_PADDING => return Err(ArchiveError::TrailingData),
                Ok(0) => return Ok(()),
                Ok(len) if buffer[..len].iter().any(|byte| *byte != 0) => {
                    return Err(ArchiveError::TrailingData);
                }
                Ok(len) => total += len as u64,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(cause) => return Err(self.damaged(cause)),
            }
        }
    }

    fn place(&self) -> Place {
        Place(self.last.as_deref().map(shown))
    }

    fn cut_off(&self) -> ArchiveError {
        ArchiveError::Truncated { place: self.place() }
    }

    fn damaged(&self, cause: io::Error) -> ArchiveError {
        match cause.kind() {
            ErrorKind::UnexpectedEof => self.cut_off(),
            // The first header of something that is no tar.
            _ if self.last.is_none() => ArchiveError::NotAnArchive { cause },
            _ => ArchiveError::Damaged { place: self.place(), cause },
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
