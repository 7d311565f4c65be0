//! Packs what is at a path while others may change it: links are links, and none is followed on the way down.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstatfs, openat, readlinkat, statat};
use tar::{Builder, EntryType, Header};

use super::left_out::LeftOut;
use super::spot::Spot;

/// Directories that are open at one time, each with a descriptor.
const MAX_DEPTH: usize = 256;

/// Of a file that says that it is empty, as those of the kernel do, so many bytes are read.
const MAX_OF_EMPTY: u64 = 1024 * 1024;

/// File systems that are the kernel's own words and not files, by their magic numbers (`linux/magic.h`): proc, sysfs,
/// cgroup, cgroup2, debugfs, tracefs, devpts, mqueue, bpf, securityfs.
const KERNELS: [u64; 10] = [
    0x9fa0,
    0x6265_6572,
    0x0027_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x1cd1,
    0x1980_0202,
    0xcafe_4a11,
    0x7363_6673,
];

/// Something that is there, to be packed.
#[derive(Debug)]
pub struct Packing {
    directory: OwnedFd,
    leaf: OsString,
    stat: Stat,
    base: PathBuf,
}

impl Packing {
    /// Finds what is at the path. `open` opens a directory, with links followed. A link at the path's end is packed
    /// as one, unless a slash follows. A device, FIFO or socket is refused.
    pub fn find(path: &Path, open: impl Fn(&Path) -> io::Result<OwnedFd>) -> io::Result<Self> {
        let Spot { directory, leaf, base } = Spot::of(path);
        let directory = open(&directory)?;
        let leaf = leaf.unwrap_or_else(|| ".".into());
        let stat = statat(&directory, &leaf, AtFlags::SYMLINK_NOFOLLOW)?;
        if let Some(kind) = unpacked_kind(&stat) {
            return Err(io::Error::new(ErrorKind::Unsupported, format!("it is a {kind}")));
        }
        Ok(Self { directory, leaf, stat, base: base.into() })
    }

    /// Writes it as an archive, and says what had to be left out. It blocks; `stop` is asked often.
    pub fn pack(self, out: impl Write, stop: &dyn Fn() -> bool) -> io::Result<LeftOut> {
        let (tar, left_out) = (Builder::new(out), LeftOut::default());
        let mut packer = Packer { tar, links: HashMap::new(), left_out, stop };
        packer.tar.mode(tar::HeaderMode::Complete);
        packer.all(&self)?;
        packer.tar.into_inner()?.flush()?;
        Ok(packer.left_out)
    }
}

/// What cannot be in an archive that others unpack.
fn unpacked_kind(stat: &Stat) -> Option<&'static str> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice | FileType::BlockDevice => Some("device"),
        FileType::Fifo => Some("FIFO"),
        FileType::Socket => Some("socket"),
        FileType::RegularFile | FileType::Directory | FileType::Symlink => None,
        FileType::Unknown => Some("file of an unknown kind"),
    }
}

struct Packer<'a, W: Write> {
    tar: Builder<W>,
    /// The first name of each file that has several, by device and number.
    links: HashMap<(u64, u64), PathBuf>,
    left_out: LeftOut,
    stop: &'a dyn Fn() -> bool,
}

/// A directory that is being packed.
struct Level {
    entries: Dir,
    name: PathBuf,
    device: u64,
}

impl<W: Write> Packer<'_, W> {
    fn all(&mut self, top: &Packing) -> io::Result<()> {
        let first = self.entry(top.directory.as_fd(), &top.leaf, &top.base, &top.stat, None)?;
        let mut levels = Vec::from_iter(first);
        while let Some(level) = levels.last_mut() {
            let Some(next) = level.entries.read() else {
                levels.pop();
                continue;
            };
            let next = next.map_err(|e| named(&level.name, &e.into()))?;
            let leaf = OsStr::from_bytes(next.file_name().to_bytes());
            if leaf == "." || leaf == ".." {
                continue;
            }
            let (name, device) = (level.name.join(leaf), level.device);
            let directory = level.entries.fd()?;
            let packed = match statat(directory, leaf, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => self.entry(directory, leaf, &name, &stat, Some(device)),
                Err(error) => Err(error.into()),
            };
            match packed {
                Ok(deeper) => levels.extend(deeper),
                // It was there a moment ago.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            if levels.len() > MAX_DEPTH {
                let why = format!("it lies more than {MAX_DEPTH} directories deep");
                return Err(named(&name, &io::Error::other(why)));
            }
        }
        Ok(())
    }

    /// Packs one, and opens it where it is a directory with more in it.
    fn entry(
        &mut self,
        directory: BorrowedFd<'_>,
        leaf: &OsStr,
        name: &Path,
        stat: &Stat,
        above: Option<u64>,
    ) -> io::Result<Option<Level>> {
        if (self.stop)() {
            return Err(io::Error::other("packing was stopped"));
        }
        let mut header = header(stat);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let found = openat(directory, leaf, flags, Mode::empty());
                let below = found.map_err(|e| named(name, &e.into()))?;
                header.set_entry_type(EntryType::Directory);
                let at_top = name.as_os_str().is_empty();
                self.tar.append_data(
                    &mut header,
                    if at_top { Path::new(".") } else { name },
                    io::empty(),
                )?;
                // What is mounted below is packed, but for what is none.
                if above.is_some_and(|device| device != stat.st_dev) && is_kernels(&below)? {
                    return Ok(None);
                }
                let entries = Dir::new(below).map_err(|e| named(name, &e.into()))?;
                Ok(Some(Level { entries, name: name.to_owned(), device: stat.st_dev }))
            }
            FileType::Symlink => {
                let target = readlinkat(directory, leaf, vec![])?;
                header.set_entry_type(EntryType::Symlink);
                self.link(header, name, target.to_bytes())?;
                Ok(None)
            }
            FileType::RegularFile => {
                if stat.st_nlink > 1 {
                    if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                        let first = first.as_os_str().as_bytes().to_vec();
                        header.set_entry_type(EntryType::Link);
                        self.link(header, name, &first)?;
                        return Ok(None);
                    }
                    self.links.insert((stat.st_dev, stat.st_ino), name.to_owned());
                }
                self.file(directory, leaf, name).map(|()| None)
            }
            _ => {
                self.left_out.add(name);
                Ok(None)
            }
        }
    }

    fn file(&mut self, directory: BorrowedFd<'_>, leaf: &OsStr, name: &Path) -> io::Result<()> {
        // It may have become a link or a FIFO since it was looked at.
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = openat(directory, leaf, flags, Mode::empty());
        let file = File::from(file.map_err(|e| named(name, &e.into()))?);
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(changed(name));
        }
        let mut header = header(&stat);
        header.set_entry_type(EntryType::Regular);
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size == 0 {
            let mut content = vec![];
            file.take(MAX_OF_EMPTY).read_to_end(&mut content).map_err(|e| named(name, &e))?;
            header.set_size(content.len() as u64);
            return self.tar.append_data(&mut header, name, &content[..]);
        }
        header.set_size(size);
        let content = Exact { file, left: size, name, stop: self.stop };
        self.tar.append_data(&mut header, name, content)
    }

    /// A link with exactly that target, of any length: the crate would tidy it.
    fn link(&mut self, mut header: Header, name: &Path, target: &[u8]) -> io::Result<()> {
        if header.set_link_name_literal(target).is_err() {
            let mut long = Header::new_gnu();
            let mark = b"././@LongLink";
            long.as_mut_bytes()[..mark.len()].copy_from_slice(mark);
            long.set_mode(0o644);
            long.set_entry_type(EntryType::GNULongLink);
            long.set_size(target.len() as u64 + 1);
            long.set_cksum();
            self.tar.append(&long, target.chain(&b"\0"[..]))?;
        }
        self.tar.append_data(&mut header, name, io::empty())
    }
}

fn header(stat: &Stat) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    // A tar's time is not negative.
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_size(0);
    header
}

fn is_kernels(directory: &OwnedFd) -> io::Result<bool> {
    #[allow(clippy::cast_sign_loss, reason = "a magic number is bits")]
    let kind = fstatfs(directory)?.f_type as u64 & 0xffff_ffff;
    Ok(KERNELS.contains(&kind))
}

fn named(name: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", name.display()))
}

fn changed(name: &Path) -> io::Error {
    io::Error::other(format!("{}: it changed while it was read; copy it again", name.display()))
}

/// Reads exactly as much as the header says: an early end is an error, more is not read.
struct Exact<'a> {
    file: File,
    left: u64,
    name: &'a Path,
    stop: &'a dyn Fn() -> bool,
}

impl Read for Exact<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        if (self.stop)() {
            return Err(io::Error::other("packing was stopped"));
        }
        let read = self.file.read(&mut buffer[..most]).map_err(|e| named(self.name, &e))?;
        if read == 0 {
            return Err(changed(self.name));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
