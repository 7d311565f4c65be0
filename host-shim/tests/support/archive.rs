//! Source archives made header by header, so that they can say what no tar program would.

#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::io::Write as _;
use std::process::{Command, Stdio};

pub use tar::{EntryType, Header};

/// An archive that grows entry by entry.
#[derive(Clone, Default)]
pub struct Tar(pub Vec<u8>);

/// A header with a right checksum, in GNU's form. Names that are too long for it are cut.
pub fn header(kind: EntryType, name: &[u8], link: &[u8], size: u64) -> Header {
    let mut header = Header::new_gnu();
    let cut = |text: &[u8]| text.len().min(100);
    header.as_old_mut().name[..cut(name)].copy_from_slice(&name[..cut(name)]);
    header.as_old_mut().linkname[..cut(link)].copy_from_slice(&link[..cut(link)]);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_mtime(1_000_000_000);
    header.set_size(size);
    header.set_cksum();
    header
}

impl Tar {
    pub fn raw(mut self, header: &Header, content: &[u8]) -> Self {
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, name: impl AsRef<[u8]>, content: &[u8]) -> Self {
        let header = header(EntryType::Regular, name.as_ref(), b"", content.len() as u64);
        self.raw(&header, content)
    }

    /// A file with another mode.
    pub fn mode(self, name: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = header(EntryType::Regular, name.as_bytes(), b"", content.len() as u64);
        header.set_mode(mode);
        header.set_cksum();
        self.raw(&header, content)
    }

    pub fn of(self, kind: EntryType, name: &str, link: &str) -> Self {
        self.raw(&header(kind, name.as_bytes(), link.as_bytes(), 0), b"")
    }

    pub fn dir(self, name: &str) -> Self {
        let mut header = header(EntryType::Directory, name.as_bytes(), b"", 0);
        header.set_mode(0o755);
        header.set_cksum();
        self.raw(&header, b"")
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.of(EntryType::Symlink, name, target)
    }

    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.of(EntryType::Link, name, target)
    }

    /// An extended header of records for the next entry.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        self.extended(EntryType::XHeader, records)
    }

    /// An extended header of records for all entries that follow.
    pub fn pax_of_all(self, records: &[(&str, &[u8])]) -> Self {
        self.extended(EntryType::XGlobalHeader, records)
    }

    fn extended(self, kind: EntryType, records: &[(&str, &[u8])]) -> Self {
        let content: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.raw(&header(kind, b"pax", b"", content.len() as u64), &content)
    }

    /// GNU's long name for the next entry.
    pub fn long_name(self, name: &[u8]) -> Self {
        let header = header(EntryType::GNULongName, b"././@LongLink", b"", name.len() as u64);
        self.raw(&header, name)
    }

    /// GNU's long target for the next entry, which is a link.
    pub fn long_link(self, target: &[u8]) -> Self {
        let header = header(EntryType::GNULongLink, b"././@LongLink", b"", target.len() as u64);
        self.raw(&header, target)
    }

    /// A file with holes in GNU's old form: `data` at `offset`, and so long in all.
    pub fn sparse(self, name: &str, offset: u64, data: &[u8], real_size: u64) -> Self {
        let mut header = header(EntryType::GNUSparse, name.as_bytes(), b"", data.len() as u64);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.sparse[0].set_offset(offset);
        gnu.sparse[0].set_length(data.len() as u64);
        gnu.set_real_size(real_size);
        header.set_cksum();
        self.raw(&header, data)
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

/// A record of an extended header: its own length, in decimal, counts too.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    through("gzip", &["-1c"], bytes)
}

pub fn gunzip(bytes: &[u8]) -> Vec<u8> {
    through("gzip", &["-dc"], bytes)
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    through("zstd", &["-qc"], bytes)
}

pub fn xz(bytes: &[u8]) -> Vec<u8> {
    through("xz", &["-0c"], bytes)
}

fn through(program: &str, args: &[&str], bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let out = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(out.status.success(), "{program}");
    out.stdout
}
