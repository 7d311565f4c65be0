//! What is on an ext4 disk: checked by e2fsck, which is nobody's of ours, and read by a crate.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use mkext4::reader::Fs;

/// A node as the disk has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub inode: u32,
    /// With the type's bits.
    pub mode: u16,
    pub owner: (u32, u32),
    pub links: u16,
    pub mtime: (i64, u32),
    /// Of a file its bytes, of a link its target.
    pub data: Vec<u8>,
    pub xattrs: Vec<(u8, Vec<u8>, Vec<u8>)>,
}

impl Node {
    pub fn text(&self) -> &str {
        str::from_utf8(&self.data).unwrap()
    }
}

/// All of it, by path without the first slash; `lost+found` is left out. The root is `""`.
pub fn read(disk: &Path) -> BTreeMap<String, Node> {
    check(disk);
    let bytes = std::fs::read(disk).unwrap();
    let fs = Fs::open(&bytes[..]).unwrap();
    assert_eq!(fs.verify().unwrap(), []);
    let mut found = BTreeMap::new();
    let mut open = vec![(String::new(), 2)];
    while let Some((path, number)) = open.pop() {
        let inode = fs.inode(number).unwrap();
        let data = match inode.mode >> 12 {
            0o4 => {
                for entry in fs.read_dir(number).unwrap() {
                    let name = String::from_utf8(entry.name.clone()).unwrap();
                    if matches!(name.as_str(), "." | ".." | "lost+found") {
                        continue;
                    }
                    let path = if path.is_empty() { name } else { format!("{path}/{name}") };
                    open.push((path, entry.inode));
                }
                Vec::new()
            }
            0o10 => fs.read_file(number).unwrap(),
            0o12 => fs.symlink_target(number).unwrap(),
            _ => Vec::new(),
        };
        let xattrs = fs.xattrs(number).unwrap();
        let xattrs = xattrs.into_iter().map(|x| (x.name_index, x.name, x.value)).collect();
        let mtime = mkext4::spec::Inode::timestamp(inode.mtime, inode.mtime_extra);
        let owner = (inode.uid, inode.gid);
        let (mode, links) = (inode.mode, inode.links_count);
        let node = Node { inode: number, mode, owner, links, mtime, data, xattrs };
        assert!(found.insert(path, node).is_none());
    }
    found
}

pub fn check(disk: &Path) {
    let output = Command::new("e2fsck").arg("-fn").arg(disk).output();
    let output = output.expect("e2fsck is needed: apt-get install e2fsprogs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    // It exits well after some complaints too.
    assert!(!said.contains('?') && !said.contains("WARNING"), "{said}");
}

/// A command of debugfs: its words.
pub fn debugfs(disk: &Path, request: &str) -> String {
    let output = Command::new("debugfs").args(["-R", request]).arg(disk).output();
    let output = output.expect("debugfs is needed: apt-get install e2fsprogs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
