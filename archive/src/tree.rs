//! The directory that an archive is unpacked into, reached by its handle only.
//!
//! cap-std resolves every path beneath that handle: the kernel itself refuses to leave it, at the
//! moment of use and not in a check before. The last part of a name is never followed.

use std::ffi::{OsStr, OsString};
use std::fs::{File, FileTimes, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::SystemTime;

use cap_std::ambient_authority;
use cap_std::fs::{Dir, MetadataExt, OpenOptions, OpenOptionsExt};
use nix::libc::ELOOP;
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};

use super::problem::{Problem, shown};
use super::spot::Naming;

/// Longest name of a file or directory, in bytes (Linux's NAME_MAX).
pub const MAX_COMPONENT: usize = 255;
/// Longest name of an entry, in bytes (Linux's PATH_MAX, less the final zero).
pub const MAX_PATH: usize = 4095;
/// Most directories above an entry. The deepest real trees, of nested packages, have some dozens.
pub const MAX_DEPTH: usize = 256;

/// Of a mode, what is kept: permissions and the sticky bit. Set-user-id and set-group-id are not:
/// a build that wants them says so in its Dockerfile, where a reader sees it.
const KEPT_MODE: u32 = 0o1777;

/// The mode of directories that no entry names.
const MADE_MODE: u32 = 0o755;

/// The mode of a directory while things are made in it, which its own may forbid.
const WORKING_MODE: u32 = 0o700;

/// Why an entry was not made.
#[derive(Debug)]
pub enum Refusal {
    /// The entry is at fault.
    Problem(Problem),
    /// The disk is.
    Disk(io::Error),
    /// The archive ends or breaks within the entry's content.
    Read(io::Error),
    /// One entry too many.
    TooMany,
    /// More bytes than there may be.
    TooLarge,
    /// The build was ended.
    Stopped,
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

/// The tree, and what may still be made in it.
#[derive(Debug)]
pub struct Tree {
    root: Rc<Dir>,
    /// The directory that was used last. One is enough: archives list a directory's files
    /// together. It cannot go stale: whatever replaces it is made through another directory,
    /// which then takes this place.
    last: (PathBuf, Rc<Dir>),
    entries_left: u64,
    buffer: Vec<u8>,
    rules: Rules,
    naming: Naming,
    /// Directories that were made, and what they get when nothing more is made in them.
    made: Vec<(Name, Meta)>,
}

/// How a tree is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// Who everything belongs to: user and group. Without it, to whoever makes it.
    pub owner: Option<(u32, u32)>,
    /// What was there before is not the archive's: it is never replaced by another kind of file, and a directory stays as
    /// it is.
    pub merge: bool,
}

/// What is kept of a file's metadata. The owner is not, whatever the archive says.
#[derive(Clone, Copy, Debug)]
pub struct Meta {
    /// The mode, of which permissions and the sticky bit are kept.
    pub mode: u32,
    /// When it was last changed; of files only.
    pub modified: Option<SystemTime>,
}

/// Bytes copied at once.
const COPY_BYTES: usize = 128 * 1024;

impl Tree {
    /// A tree in an existing directory, which may get `entries` entries.
    pub fn open(root: &Path, entries: u64) -> io::Result<Self> {
        let root = Dir::open_ambient_dir(root, ambient_authority())?;
        Ok(Self::new(root, Naming::AsTheyAre, Rules::default(), entries))
    }

    /// A tree in a directory that is open.
    pub(super) fn new(root: Dir, naming: Naming, rules: Rules, entries: u64) -> Self {
        let root = Rc::new(root);
        let last = (PathBuf::new(), Rc::clone(&root));
        let buffer = vec![0; COPY_BYTES];
        Self { root, last, entries_left: entries, buffer, rules, naming, made: vec![] }
    }

    /// The place of an entry. `None` is the root itself.
    pub(super) fn name(&mut self, name: &[u8]) -> Result<Option<Name>, Problem> {
        self.naming.place(Name::parse(name)?)
    }

    /// Gives directories their modes and times: nothing more is made in them.
    pub(super) fn settle(&mut self) -> Result<(), Refusal> {
        for (name, meta) in std::mem::take(&mut self.made).into_iter().rev() {
            // What another has taken away meanwhile, or replaced, is not ours any more.
            let Ok(parent) = self.root.open_dir(at_or_dot(&name.parent)) else { continue };
            let Ok(directory) = own_directory(&parent, &name.leaf) else { continue };
            if let Some(modified) = meta.modified {
                let _ = directory.set_times(FileTimes::new().set_modified(modified));
            }
            let mode = Permissions::from_mode(meta.mode & KEPT_MODE);
            directory.set_permissions(mode).map_err(Refusal::Disk)?;
        }
        Ok(())
    }

    /// Counts an entry that makes nothing.
    pub fn count(&mut self) -> Result<(), Refusal> {
        self.entries_left = self.entries_left.checked_sub(1).ok_or(Refusal::TooMany)?;
        Ok(())
    }

    /// Makes a file of all that `content` gives, and returns how many bytes that was.
    pub fn file(
        &mut self,
        name: &Name,
        meta: Meta,
        content: &mut impl Read,
        stop: &dyn Fn() -> bool,
    ) -> Result<u64, Refusal> {
        self.count()?;
        let parent = self.parent(name)?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let opened = match parent.open_with(&name.leaf, &options) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                remove(&parent, &name.leaf, self.rules)?;
                parent.open_with(&name.leaf, &options)
            }
            opened => opened,
        };
        let mut file = opened.map_err(Refusal::Disk)?.into_std();
        let mut written = 0;
        loop {
            if stop() {
                return Err(Refusal::Stopped);
            }
            let len = match content.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(Refusal::Read(error)),
            };
            file.write_all(&self.buffer[..len]).map_err(Refusal::Disk)?;
            written += len as u64;
        }
        if let Some((user, group)) = self.rules.owner {
            std::os::unix::fs::fchown(&file, Some(user), Some(group)).map_err(Refusal::Disk)?;
        }
        let mode = Permissions::from_mode(meta.mode & KEPT_MODE);
        file.set_permissions(mode).map_err(Refusal::Disk)?;
        if let Some(modified) = meta.modified {
            // A time that the file system cannot hold is not worth a failed build.
            let _ = file.set_times(FileTimes::new().set_modified(modified));
        }
        Ok(written)
    }

    /// Makes a directory, or gives one that is there its mode.
    pub fn directory(&mut self, name: &Name, meta: Meta) -> Result<(), Refusal> {
        self.count()?;
        let parent = self.parent(name)?;
        if self.rules.merge {
            return self.merged_directory(&parent, name, meta);
        }
        make_directory(&parent, &name.leaf, self.rules)?;
        set_mode(&parent, &name.leaf, meta.mode & KEPT_MODE)
    }

    /// Makes a directory, or leaves one that is there as it is.
    fn merged_directory(&mut self, parent: &Dir, name: &Name, meta: Meta) -> Result<(), Refusal> {
        match parent.create_dir(&name.leaf) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let there = parent.symlink_metadata(&name.leaf).map_err(Refusal::Disk)?;
                return if there.is_dir() { Ok(()) } else { Err(Problem::NotDirectory.into()) };
            }
            Err(error) => return Err(Refusal::Disk(error)),
        }
        self.own(parent, &name.leaf)?;
        set_mode(parent, &name.leaf, WORKING_MODE)?;
        self.made.push((name.clone(), meta));
        Ok(())
    }

    /// Gives something that was just made, and is no file, to its owner.
    fn own(&self, parent: &Dir, leaf: &OsStr) -> Result<(), Refusal> {
        let Some((user, group)) = self.rules.owner else { return Ok(()) };
        let (user, group) = (Some(Uid::from_raw(user)), Some(Gid::from_raw(group)));
        rustix::fs::chownat(parent, leaf, user, group, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| Refusal::Disk(error.into()))
    }

    /// Makes a symbolic link with exactly that target, wherever it leads: nobody here follows it.
    pub fn symlink(&mut self, name: &Name, target: &[u8]) -> Result<(), Refusal> {
        self.count()?;
        if target.is_empty() || target.len() > MAX_PATH || target.contains(&0) {
            return Err(Problem::BadSymlink.into());
        }
        let parent = self.parent(name)?;
        let target = OsStr::from_bytes(target);
        match parent.symlink_contents(target, &name.leaf) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                remove(&parent, &name.leaf, self.rules)?;
                parent.symlink_contents(target, &name.leaf)
            }
            made => made,
        }
        .map_err(Refusal::Disk)?;
        self.own(&parent, &name.leaf)
    }

    /// Makes another name for a file of this tree.
    pub fn hard_link(&mut self, name: &Name, target: &[u8]) -> Result<(), Refusal> {
        self.count()?;
        let bad = || Refusal::Problem(Problem::BadHardLink(shown(target)));
        let target = self.name(target).ok().flatten().ok_or_else(bad)?;
        let target_parent = self.root.open_dir(at_or_dot(&target.parent)).map_err(|_| bad())?;
        let existing = target_parent.symlink_metadata(&target.leaf).map_err(|_| bad())?;
        if existing.is_dir() {
            return Err(bad());
        }
        let parent = self.parent(name)?;
        if let Ok(replaced) = parent.symlink_metadata(&name.leaf) {
            if (replaced.dev(), replaced.ino()) == (existing.dev(), existing.ino()) {
                return Ok(());
            }
            remove(&parent, &name.leaf, self.rules)?;
        }
        target_parent.hard_link(&target.leaf, &parent, &name.leaf).map_err(Refusal::Disk)
    }

    /// The directory that an entry lies in, made if it is not there.
    fn parent(&mut self, name: &Name) -> Result<Rc<Dir>, Refusal> {
        if self.last.0 == name.parent {
            return Ok(Rc::clone(&self.last.1));
        }
        let parent = match self.root.open_dir(at_or_dot(&name.parent)) {
            Err(error) if error.kind() == ErrorKind::NotFound => self.make_all(&name.parent)?,
            opened => opened.map_err(through)?,
        };
        self.last = (name.parent.clone(), Rc::new(parent));
        Ok(Rc::clone(&self.last.1))
    }

    fn make_all(&mut self, path: &Path) -> Result<Dir, Refusal> {
        let mut at = PathBuf::new();
        let mut opened = self.root.try_clone().map_err(Refusal::Disk)?;
        for part in path {
            at.push(part);
            opened = match self.root.open_dir(&at) {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    self.count()?;
                    match opened.create_dir(part) {
                        // A link that leads nowhere.
                        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                            return Err(Problem::NoParent.into());
                        }
                        made => made.map_err(Refusal::Disk)?,
                    }
                    self.own(&opened, part)?;
                    set_mode(&opened, part, MADE_MODE)?;
                    opened.open_dir(part).map_err(Refusal::Disk)?
                }
                opened => opened.map_err(through)?,
            };
        }
        Ok(opened)
    }
}

fn at_or_dot(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

/// What it means that a parent cannot be opened.
fn through(error: io::Error) -> Refusal {
    match error.kind() {
        ErrorKind::NotADirectory => Problem::NoParent.into(),
        // How cap-std says that a path leaves the root.
        ErrorKind::PermissionDenied | ErrorKind::CrossesDevices => Problem::Escapes.into(),
        _ if error.raw_os_error() == Some(ELOOP) => Problem::Escapes.into(),
        _ => Refusal::Disk(error),
    }
}

fn make_directory(parent: &Dir, leaf: &OsStr, rules: Rules) -> Result<(), Refusal> {
    match parent.create_dir(leaf) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        made => return made.map_err(Refusal::Disk),
    }
    if parent.symlink_metadata(leaf).map_err(Refusal::Disk)?.is_dir() {
        return Ok(());
    }
    remove(parent, leaf, rules)?;
    parent.create_dir(leaf).map_err(Refusal::Disk)
}

/// Gives a directory its mode, whatever the process's umask is.
fn set_mode(parent: &Dir, leaf: &OsStr, mode: u32) -> Result<(), Refusal> {
    let directory = own_directory(parent, leaf).map_err(Refusal::Disk)?;
    directory.set_permissions(Permissions::from_mode(mode)).map_err(Refusal::Disk)
}

/// A directory, and nothing that a link leads to.
fn own_directory(parent: &Dir, leaf: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(parent, leaf, flags, Mode::empty())?))
}

/// Makes way for a later entry of the same name.
fn remove(parent: &Dir, leaf: &OsStr, rules: Rules) -> Result<(), Refusal> {
    if !parent.symlink_metadata(leaf).map_err(Refusal::Disk)?.is_dir() {
        return parent.remove_file(leaf).map_err(Refusal::Disk);
    }
    if rules.merge {
        return Err(Problem::ReplacesDirectory.into());
    }
    match parent.remove_dir(leaf) {
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {
            Err(Problem::ReplacesDirectory.into())
        }
        removed => removed.map_err(Refusal::Disk),
    }
}

/// The name of an entry: plain parts below the root, in any bytes that Linux allows. A name that
/// is not UTF-8 is kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    parent: PathBuf,
    leaf: OsString,
}

impl Name {
    /// A name at the top.
    pub(super) fn top(leaf: &OsStr) -> Self {
        Self { parent: PathBuf::new(), leaf: leaf.to_owned() }
    }

    /// Its first part.
    pub(super) fn first(&self) -> &OsStr {
        self.parent.iter().next().unwrap_or(&self.leaf)
    }

    /// The same below a directory.
    pub(super) fn below(self, directory: &OsStr) -> Self {
        Self { parent: Path::new(directory).join(self.parent), leaf: self.leaf }
    }

    /// The same with another first part.
    pub(super) fn with_first(self, first: &OsStr) -> Self {
        let mut parts = self.parent.iter();
        match parts.next() {
            None => Self::top(first),
            Some(_) => Self { parent: parts.as_path().to_owned(), leaf: self.leaf }.below(first),
        }
    }

    /// Takes an archive's name apart. `None` is the root itself (`.` or `./`).
    pub fn parse(name: &[u8]) -> Result<Option<Self>, Problem> {
        match name {
            [] => return Err(Problem::NoName),
            [b'/', ..] => return Err(Problem::Absolute),
            _ if name.len() > MAX_PATH => return Err(Problem::LongName(MAX_PATH)),
            _ if name.contains(&0) => return Err(Problem::BadHeaders),
            _ => {}
        }
        let mut parts = Vec::new();
        for part in name.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(Problem::ParentDir),
                _ if part.len() > MAX_COMPONENT => return Err(Problem::LongName(MAX_COMPONENT)),
                _ => parts.push(OsStr::from_bytes(part)),
            }
        }
        let Some(leaf) = parts.pop() else { return Ok(None) };
        if parts.len() > MAX_DEPTH {
            return Err(Problem::TooDeep(MAX_DEPTH));
        }
        Ok(Some(Self { parent: parts.into_iter().collect(), leaf: leaf.to_owned() }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let name = Name::parse(b"./a//b/./c").unwrap().unwrap();
        assert_eq!(
            (name.parent.as_path(), name.leaf.as_os_str()),
            (Path::new("a/b"), OsStr::new("c"))
        );
        assert_eq!(Name::parse(b"./").unwrap(), None);
        assert_eq!(Name::parse(b".").unwrap(), None);
        assert!(Name::parse(b"\xff\xfe").unwrap().is_some());
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        assert_eq!(Name::parse(b""), Err(Problem::NoName));
        assert_eq!(Name::parse(b"/etc/passwd"), Err(Problem::Absolute));
        for name in ["..", "../x", "a/../b", "a/.."] {
            assert_eq!(Name::parse(name.as_bytes()), Err(Problem::ParentDir), "{name}");
        }
        assert_eq!(Name::parse(b"a\0b"), Err(Problem::BadHeaders));
    }

    #[test]
    fn every_bound_of_a_name_holds_at_and_breaks_above() {
        let part = |n| "x".repeat(n).into_bytes();
        assert!(Name::parse(&part(MAX_COMPONENT)).is_ok());
        assert_eq!(Name::parse(&part(MAX_COMPONENT + 1)), Err(Problem::LongName(MAX_COMPONENT)));

        let deep = |n| format!("{}leaf", "d/".repeat(n)).into_bytes();
        assert!(Name::parse(&deep(MAX_DEPTH)).is_ok());
        assert_eq!(Name::parse(&deep(MAX_DEPTH + 1)), Err(Problem::TooDeep(MAX_DEPTH)));

        let long = |n: usize| format!("{}x", "./".repeat(n / 2)).into_bytes();
        assert_eq!(long(MAX_PATH - 1).len(), MAX_PATH);
        assert!(Name::parse(&long(MAX_PATH - 1)).is_ok());
        assert_eq!(Name::parse(&long(MAX_PATH + 1)), Err(Problem::LongName(MAX_PATH)));
    }
}
