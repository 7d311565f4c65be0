//! One hostile source, unpacked beside things that must not change. The fuzzer's target, and a test
//! of the agent's own.
//!
//! The first byte says what is done to the rest, so that the fuzzer gets past what it cannot guess:
//!
//! | bit | |
//! |---|---|
//! | 0 | checksums of what looks like headers are made right |
//! | 1, 2 | packed with gzip; with zstd |
//! | 3 | the smallest limits |

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use crate::source::{SourceError, SourceLimits, unpack};

const BLOCK: usize = 512;
/// Where a header has its checksum, and its magic.
const CHECKSUM: std::ops::Range<usize> = 148..156;
const MAGIC: std::ops::Range<usize> = 257..262;

const LIMITS: SourceLimits = SourceLimits { bytes: 1 << 20, entries: 64 };
const SMALLEST: SourceLimits = SourceLimits { bytes: 1000, entries: 3 };

/// A directory for one source after the other, and what lies around it.
pub struct Place {
    dir: PathBuf,
    around: BTreeMap<PathBuf, String>,
}

impl Place {
    /// Makes one in an empty directory.
    pub fn new(dir: &Path) -> std::io::Result<Self> {
        fs::create_dir_all(dir.join("outside/deeper"))?;
        fs::write(dir.join("outside/victim"), "untouched")?;
        fs::write(dir.join("secret"), "untouched")?;
        symlink("outside", dir.join("way"))?;
        Ok(Self { dir: dir.to_owned(), around: survey(dir, "source")? })
    }

    /// Unpacks what the fuzzer gives. It panics where something is wrong.
    pub fn attempt(&self, data: &[u8]) -> Option<Result<(), SourceError>> {
        let (how, archive) = data.split_first()?;
        let mut archive = archive.to_vec();
        if how & 1 != 0 {
            repair(&mut archive);
        }
        if how & 2 != 0 {
            archive = gzip(&archive);
        }
        if how & 4 != 0 {
            archive = zstd::encode_all(&archive[..], 1).expect("memory takes it");
        }
        let limits = if how & 8 != 0 { SMALLEST } else { LIMITS };
        let root = self.dir.join("source");
        fs::create_dir(&root).expect("the last one is gone");
        let result = unpack(&archive[..], &root, limits, &|| false);
        let around = survey(&self.dir, "source").expect("the surroundings are there");
        assert_eq!(around, self.around, "the surroundings changed");
        check(&root, limits);
        if let Err(error) = &result {
            let text = error.to_string();
            assert!(!text.chars().any(char::is_control), "{text:?}");
            assert!(text.len() < 4096, "{text}");
            assert!(!matches!(error, SourceError::Disk { .. }), "not the disk's fault: {text}");
        }
        fs::remove_dir_all(&root).expect("it can be removed");
        Some(result)
    }
}

/// What was made is within the limits and of no kind that gives more rights.
fn check(root: &Path, limits: SourceLimits) {
    let (mut files, mut entries) = (BTreeMap::new(), 0);
    let mut look = vec![root.to_owned()];
    while let Some(dir) = look.pop() {
        for entry in fs::read_dir(dir).expect("it was made") {
            let path = entry.expect("it was made").path();
            let meta = fs::symlink_metadata(&path).expect("it was made");
            entries += 1;
            let kind = meta.file_type();
            assert!(kind.is_file() || kind.is_dir() || kind.is_symlink(), "{}", path.display());
            assert_eq!(meta.mode() & 0o6000, 0, "{}", path.display());
            if kind.is_file() {
                files.insert(meta.ino(), meta.len());
            }
            if kind.is_dir() {
                look.push(path);
            }
        }
    }
    let bytes: u64 = files.values().sum();
    assert!(entries <= limits.entries, "{entries} entries");
    assert!(bytes <= limits.bytes, "{bytes} bytes");
}

/// Every path with what it is and holds, but for one directory of the top.
fn survey(root: &Path, except: &str) -> std::io::Result<BTreeMap<PathBuf, String>> {
    let mut found = BTreeMap::new();
    let mut look = vec![root.to_owned()];
    while let Some(dir) = look.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path == root.join(except) {
                continue;
            }
            let meta = fs::symlink_metadata(&path)?;
            let content = if meta.is_file() { fs::read_to_string(&path)? } else { String::new() };
            let links = if meta.is_file() { meta.nlink() } else { 0 };
            found.insert(path.clone(), format!("{:o} {links} {content}", meta.mode()));
            if meta.is_dir() {
                look.push(path);
            }
        }
    }
    Ok(found)
}

/// Makes the checksums right of every block that has tar's magic.
pub fn repair(archive: &mut [u8]) {
    for block in archive.chunks_exact_mut(BLOCK).filter(|block| &block[MAGIC] == b"ustar") {
        block[CHECKSUM].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("memory takes it")
}

/// Archives to begin with: every kind of entry, and every packing.
pub fn seeds() -> Vec<Vec<u8>> {
    use tar::EntryType as Kind;
    let plain: &[&[Entry<'_>]] = &[
        &[(Kind::Directory, "d/", "", b""), (Kind::Regular, "d/file", "", b"content")],
        &[(Kind::Symlink, "link", "../outside", b""), (Kind::Regular, "link/victim", "", b"evil")],
        &[
            (Kind::Symlink, "link", "d", b""),
            (Kind::Regular, "d/x", "", b"1"),
            (Kind::Regular, "link/x", "", b"2"),
        ],
        &[
            (Kind::Regular, "a", "", b"content"),
            (Kind::Link, "b", "a", b""),
            (Kind::Link, "c", "../secret", b""),
        ],
        &[(Kind::Symlink, ".", "../outside", b""), (Kind::Regular, "victim", "", b"evil")],
        &[
            (Kind::Regular, "same", "", b"one"),
            (Kind::Directory, "same/", "", b""),
            (Kind::Symlink, "same", "x", b""),
        ],
        &[
            (Kind::GNULongName, "././@LongLink", "", b"../secret\0"),
            (Kind::Regular, "x", "", b"evil"),
        ],
        &[
            (Kind::GNULongLink, "././@LongLink", "", b"../outside\0"),
            (Kind::Symlink, "x", "y", b""),
        ],
        &[(Kind::XHeader, "pax", "", b"18 path=../secret\n"), (Kind::Regular, "x", "", b"evil")],
        &[(Kind::XHeader, "pax", "", b"12 size=600\n"), (Kind::Regular, "x", "", &[7; 600])],
        &[(Kind::XGlobalHeader, "pax", "", b"18 path=../secret\n"), (Kind::Regular, "x", "", b"1")],
        &[
            (Kind::Regular, "/etc/x", "", b""),
            (Kind::Char, "c", "", b""),
            (Kind::Fifo, "f", "", b""),
        ],
        &[(Kind::GNUSparse, "holes", "", &[7; 512])],
    ];
    let mut seeds = Vec::new();
    for entries in plain {
        let archive = tar(entries);
        seeds.extend([0, 1, 3, 5, 9].map(|how| [&[how][..], &archive].concat()));
        seeds.push([&[0][..], &gzip(&archive)].concat());
        seeds.push(
            [&[0][..], &zstd::encode_all(&archive[..], 1).expect("memory takes it")].concat(),
        );
    }
    seeds
}

type Entry<'a> = (tar::EntryType, &'a str, &'a str, &'a [u8]);

fn tar(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (kind, name, link, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o6755);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        if let (tar::EntryType::GNUSparse, Some(gnu)) = (kind, header.as_gnu_mut()) {
            gnu.sparse[0].set_offset(512);
            gnu.sparse[0].set_length(content.len() as u64);
            gnu.set_real_size(512 + content.len() as u64);
        }
        header.set_cksum();
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    }
    archive.resize(archive.len() + 2 * BLOCK, 0);
    archive
}
