//! The initrd: a newc archive with the agent as `/init`, the kernel modules in load order, and the text
//! that says which image this is. It is not compressed: it is fetched once and unpacked at each boot,
//! which under emulation takes 0.08 s longer with zstd.
//!
//! The same input gives the same bytes: fixed order, no times, consecutive inode numbers.

use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use cpio::newc::{Builder, ModeFileType, Reader, trailer};

use crate::file::{self, FileError};

/// Where the agent finds modules, named `NN-name.ko`.
pub const MODULES_DIR: &str = "lib/kiln/modules";
/// Where the agent finds the image's identity.
pub const IDENTITY_FILE: &str = "etc/kiln/image";

/// An initrd has some 8 MB; a larger one is not ours.
const MAX_SIZE: u64 = 512 * 1024 * 1024;
/// Directories that must be there to be mounted on, and parents of files.
const DIRS: &[&str] =
    &["dev", "etc", "etc/kiln", "lib", "lib/kiln", MODULES_DIR, "mnt", "proc", "run", "sys", "tmp"];

/// A kernel module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedModule {
    /// Without number and suffix.
    pub name: String,
    /// The decompressed object.
    pub data: Vec<u8>,
}

/// An initrd could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is larger than the format can say.
    #[error("{0} is too large for an initrd")]
    TooLarge(String),
    /// Writing the archive.
    #[error("cannot write the initrd")]
    Write(#[source] io::Error),
}

/// Writes the archive.
pub fn write(
    output: impl Write,
    agent: &[u8],
    modules: &[LoadedModule],
    identity: &str,
) -> Result<(), InitrdError> {
    let mut archive = Archive { output, inode: 0 };
    for dir in DIRS {
        archive.entry(dir, ModeFileType::Directory, 0o755, &[])?;
    }
    // The kernel opens it for init's standard streams before anything is mounted.
    archive.console()?;
    archive.entry("init", ModeFileType::Regular, 0o755, agent)?;
    archive.entry(
        IDENTITY_FILE,
        ModeFileType::Regular,
        0o644,
        format!("{identity}\n").as_bytes(),
    )?;
    // Name order is load order, so all numbers have the same width.
    let width = modules.len().to_string().len().max(2);
    for (i, module) in modules.iter().enumerate() {
        let path = format!("{MODULES_DIR}/{i:0width$}-{}.ko", module.name);
        archive.entry(&path, ModeFileType::Regular, 0o644, &module.data)?;
    }
    trailer(&mut archive.output).map_err(InitrdError::Write)?;
    Ok(())
}

struct Archive<W> {
    output: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn entry(
        &mut self,
        path: &str,
        kind: ModeFileType,
        mode: u32,
        data: &[u8],
    ) -> Result<(), InitrdError> {
        let size = u32::try_from(data.len()).map_err(|_| InitrdError::TooLarge(path.to_owned()))?;
        let head = self.head(path).mode(mode).set_mode_file_type(kind);
        let mut entry = head.write(&mut self.output, size);
        entry.write_all(data).and_then(|()| entry.finish().map(drop)).map_err(InitrdError::Write)
    }

    fn console(&mut self) -> Result<(), InitrdError> {
        let head = self.head("dev/console").mode(0o600).set_mode_file_type(ModeFileType::Char);
        let head = head.rdev_major(5).rdev_minor(1);
        head.write(&mut self.output, 0).finish().map(drop).map_err(InitrdError::Write)
    }

    fn head(&mut self, path: &str) -> Builder {
        self.inode += 1;
        Builder::new(path).ino(self.inode)
    }
}

/// The modules of an initrd that this tool wrote, so that a new agent needs no kernel package.
pub fn read_modules(path: &Path) -> Result<Vec<LoadedModule>, InitrdError> {
    let broken = |e| FileError::new("read initrd", path, e);
    let mut stream = BufReader::new(file::open(path)?).take(MAX_SIZE);
    let mut modules = Vec::new();
    loop {
        let mut entry = Reader::new(stream).map_err(broken)?;
        if entry.entry().is_trailer() {
            return Ok(modules);
        }
        let file = entry.entry().name().strip_prefix(MODULES_DIR).and_then(|n| n.strip_prefix('/'));
        if let Some((_, name)) = file.and_then(|f| f.strip_suffix(".ko")?.split_once('-')) {
            let name = name.to_owned();
            let mut data = Vec::new();
            entry.read_to_end(&mut data).map_err(broken)?;
            modules.push(LoadedModule { name, data });
        }
        stream = entry.finish().map_err(broken)?;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn module(name: &str, data: &[u8]) -> LoadedModule {
        LoadedModule { name: name.into(), data: data.into() }
    }

    fn list(mut archive: &[u8]) -> String {
        let mut lines = String::new();
        loop {
            let entry = Reader::new(archive).unwrap();
            let e = entry.entry();
            if e.is_trailer() {
                return lines;
            }
            let line = format!(
                "{:06o} {}:{} {} {},{} t{} {}\n",
                e.mode(),
                e.uid(),
                e.gid(),
                e.file_size(),
                e.rdev_major(),
                e.rdev_minor(),
                e.mtime(),
                e.name()
            );
            lines.push_str(&line);
            archive = entry.finish().unwrap();
        }
    }

    #[test]
    fn the_archive_lists_as_it_always_did() {
        let mut archive = Vec::new();
        let modules = [module("virtio", b"12345"), module("crc32c-intel", b"1")];
        write(&mut archive, b"ELF", &modules, "builder@sha256:00").unwrap();
        insta::assert_snapshot!(list(&archive), @r"
        040755 0:0 0 0,0 t0 dev
        040755 0:0 0 0,0 t0 etc
        040755 0:0 0 0,0 t0 etc/kiln
        040755 0:0 0 0,0 t0 lib
        040755 0:0 0 0,0 t0 lib/kiln
        040755 0:0 0 0,0 t0 lib/kiln/modules
        040755 0:0 0 0,0 t0 mnt
        040755 0:0 0 0,0 t0 proc
        040755 0:0 0 0,0 t0 run
        040755 0:0 0 0,0 t0 sys
        040755 0:0 0 0,0 t0 tmp
        020600 0:0 0 5,1 t0 dev/console
        100755 0:0 3 0,0 t0 init
        100644 0:0 18 0,0 t0 etc/kiln/image
        100644 0:0 5 0,0 t0 lib/kiln/modules/00-virtio.ko
        100644 0:0 1 0,0 t0 lib/kiln/modules/01-crc32c-intel.ko
        ");
    }

    #[test]
    fn modules_come_back_in_order_and_bytes_are_stable() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initrd");
        let modules: Vec<_> = (0..101u8).map(|i| module(&format!("m-{i}"), &[i; 33])).collect();
        let mut first = Vec::new();
        write(&mut first, b"agent", &modules, "x").unwrap();
        std::fs::write(&path, &first).unwrap();
        assert_eq!(read_modules(&path).unwrap(), modules);
        let mut second = Vec::new();
        write(&mut second, b"agent", &modules, "x").unwrap();
        assert_eq!(first, second);
    }

    #[test]
    fn a_broken_initrd_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initrd");
        let mut bytes = Vec::new();
        write(&mut bytes, b"agent", &[module("a", &[1; 5000])], "x").unwrap();
        for cut in [0, 10, bytes.len() / 2] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            read_modules(&path).unwrap_err();
        }
    }
}
