//! The root directory of a VM's process: its program, the system's libraries and QEMU's firmware, all read-only, a `/proc` of
//! its own processes, and at most one directory to write in. With it come namespaces of its own for mounts, network, System V
//! IPC and host names, so that what breaks out of a guest finds no file, no interface and no abstract socket of the host's.
//!
//! ```text
//! System::find (once) ─▶ Root::new (each process) ─▶ fork ─▶ sys::enter ─▶ namespaces::enter(&Root) ─▶ exec
//! ```
//! What is in a root is decided here, before the fork; what is done between fork and exec only makes system calls.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What programs of a distribution need to start: the loader and libraries, QEMU's modules and firmware. None of it is of
/// the host's own.
const SYSTEM: [&str; 10] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/local/share/qemu",
    "/nix/store",
    "/etc/ld.so.cache",
];

/// Where the directory to write in is.
const WORK: &str = "/sock";

/// The parts of this host's system that every root has.
#[derive(Clone, Debug)]
pub(crate) struct System(Vec<(PathBuf, Kind)>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
    Link(PathBuf),
}

/// What the child does, in order, below the new root's mount point.
#[derive(Debug)]
pub(crate) enum Step {
    /// A directory, if it is not there yet.
    Directory(CString),
    /// An empty file to bind on.
    File(CString),
    /// A symbolic link.
    Link { to: CString, at: CString },
    /// A read-only view of a file or directory.
    ReadOnly { source: CString, at: CString },
    /// A device's node, to be opened.
    Device { source: CString, at: CString },
    /// The working directory, to write in.
    Work { at: CString },
    /// `/proc`, with the user's own processes and nothing of the kernel's.
    Proc { at: CString },
}

/// A root that is to be made.
#[derive(Debug)]
pub(crate) struct Root {
    /// The directory that the new root is mounted on: in the child's namespace alone, so any will do.
    pub at: CString,
    pub steps: Vec<Step>,
    /// The working directory, in the new root.
    pub work: CString,
}

impl System {
    /// What is there.
    pub(crate) fn find() -> Self {
        let kind = |path: &Path| {
            let file_type = fs::symlink_metadata(path).ok()?.file_type();
            if file_type.is_symlink() {
                Some(Kind::Link(fs::read_link(path).ok()?))
            } else {
                Some(if file_type.is_dir() { Kind::Directory } else { Kind::File })
            }
        };
        let parts = SYSTEM.iter().map(PathBuf::from);
        Self(parts.filter_map(|path| Some((path.clone(), kind(&path)?))).collect())
    }
}

impl Root {
    /// For a program by its canonical path. `work`: the launch's directory is there to write in, and is where it begins.
    pub(crate) fn new(
        system: &System,
        at: &Path,
        program: &Path,
        devices: &[&str],
        work: bool,
    ) -> io::Result<Self> {
        let mut made = Making { at, steps: vec![] };
        for (path, kind) in &system.0 {
            match kind {
                Kind::Link(to) => made.link(path, to)?,
                Kind::Directory => made.bind(path, false)?,
                Kind::File => made.bind(path, true)?,
            }
        }
        made.bind(program, true)?;
        for device in devices.iter().map(Path::new) {
            made.parents(device)?;
            let at = made.place(device)?;
            made.steps.push(Step::File(at.clone()));
            made.steps.push(Step::Device { source: text(device)?, at });
        }
        made.directory(Path::new("/proc"))?;
        let proc = made.place(Path::new("/proc"))?;
        made.steps.push(Step::Proc { at: proc });
        if work {
            made.directory(Path::new(WORK))?;
            let place = made.place(Path::new(WORK))?;
            made.steps.push(Step::Work { at: place });
        }
        let begin = Path::new(if work { WORK } else { "/" });
        Ok(Self { at: text(at)?, steps: made.steps, work: text(begin)? })
    }
}

struct Making<'a> {
    at: &'a Path,
    steps: Vec<Step>,
}

impl Making<'_> {
    fn place(&self, path: &Path) -> io::Result<CString> {
        text(&self.at.join(path.strip_prefix("/").unwrap_or(path)))
    }

    fn directory(&mut self, path: &Path) -> io::Result<()> {
        let place = self.place(path)?;
        self.steps.push(Step::Directory(place));
        Ok(())
    }

    /// Those above, from the top.
    fn parents(&mut self, path: &Path) -> io::Result<()> {
        let mut above: Vec<_> = path.ancestors().skip(1).filter(|p| *p != Path::new("/")).collect();
        above.reverse();
        above.into_iter().try_for_each(|dir| self.directory(dir))
    }

    fn link(&mut self, path: &Path, to: &Path) -> io::Result<()> {
        self.parents(path)?;
        let at = self.place(path)?;
        self.steps.push(Step::Link { to: text(to)?, at });
        Ok(())
    }

    fn bind(&mut self, path: &Path, file: bool) -> io::Result<()> {
        self.parents(path)?;
        let at = self.place(path)?;
        self.steps.push(if file { Step::File(at.clone()) } else { Step::Directory(at.clone()) });
        self.steps.push(Step::ReadOnly { source: text(path)?, at });
        Ok(())
    }
}

fn text(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}
