//! What an EROFS disk says of each node, read by the format's description (Linux, `fs/erofs/erofs_fs.h`): the
//! tools of Debian show neither names nor values of attributes. Extended inodes with plain data only.

use std::collections::BTreeMap;
use std::path::Path;

/// An inode as the disk has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// With the type's bits.
    pub mode: u16,
    pub owner: (u32, u32),
    pub links: u32,
    pub mtime: (i64, u32),
    /// Sorted; the numbers of prefixes are ext4's.
    pub xattrs: Vec<(u8, Vec<u8>, Vec<u8>)>,
}

const SUPERBLOCK: usize = 1024;
const BLOCK: usize = 4096;
const SLOT: usize = 32;
const INODE: usize = 64;
const DIRENT: usize = 12;

/// All of it, by path without the first slash. The root is `""`.
pub fn read(disk: &Path) -> BTreeMap<String, Inode> {
    let disk = std::fs::read(disk).unwrap();
    assert_eq!(u32_at(&disk, SUPERBLOCK), 0xe0f5_e1e2);
    let root = u64::from(u16_at(&disk, SUPERBLOCK + 14));
    let inodes = u32_at(&disk, SUPERBLOCK + 40) as usize * BLOCK;
    let mut found = BTreeMap::new();
    let mut open = vec![(String::new(), root)];
    while let Some((path, number)) = open.pop() {
        let at = inodes + number as usize * SLOT;
        let inode = inode(&disk, at);
        if inode.mode >> 12 == 0o4 {
            let size = u64_at(&disk, at + 8) as usize;
            let from = u32_at(&disk, at + 16) as usize * BLOCK;
            for (name, number) in disk[from..from + size].chunks(BLOCK).flat_map(entries) {
                if matches!(name.as_str(), "." | "..") {
                    continue;
                }
                let path = if path.is_empty() { name } else { format!("{path}/{name}") };
                open.push((path, number));
            }
        }
        assert!(found.insert(path, inode).is_none());
    }
    found
}

fn inode(disk: &[u8], at: usize) -> Inode {
    assert_eq!(u16_at(disk, at), 1, "extended, plain");
    let count = usize::from(u16_at(disk, at + 2));
    let mut xattrs = Vec::new();
    if count > 0 {
        assert_eq!(disk[at + INODE + 4], 0, "none is shared");
        let mut from = at + INODE + 12;
        let end = from + 4 * (count - 1);
        while from < end {
            let name_at = from + 4;
            let value_at = name_at + usize::from(disk[from]);
            let value_end = value_at + usize::from(u16_at(disk, from + 2));
            let (name, value) = (&disk[name_at..value_at], &disk[value_at..value_end]);
            xattrs.push((disk[from + 1], name.to_vec(), value.to_vec()));
            from = value_end.next_multiple_of(4);
        }
        assert_eq!(from, end);
    }
    xattrs.sort();
    Inode {
        mode: u16_at(disk, at + 4),
        owner: (u32_at(disk, at + 24), u32_at(disk, at + 28)),
        links: u32_at(disk, at + 44),
        mtime: (u64_at(disk, at + 32) as i64, u32_at(disk, at + 40)),
        xattrs,
    }
}

/// Of a block of a directory: names and the numbers of their inodes.
fn entries(block: &[u8]) -> Vec<(String, u64)> {
    let name_at = |i: usize| usize::from(u16_at(block, i * DIRENT + 8));
    let count = name_at(0) / DIRENT;
    let entry = |i: usize| {
        let end = if i + 1 < count { name_at(i + 1) } else { block.len() };
        let name = str::from_utf8(&block[name_at(i)..end]).unwrap();
        (name.trim_end_matches('\0').to_owned(), u64_at(block, i * DIRENT))
    };
    (0..count).map(entry).collect()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
