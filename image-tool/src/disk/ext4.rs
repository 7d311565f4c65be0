//! The merged tree as an ext4 file system: first all metadata, then contents, each written once.
//!
//! mkext4 lays everything out before a byte of content is written, so the size is known beforehand and nothing
//! is ever moved. Everything that could differ between two runs (ids, times, order) comes from the image.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use mkext4::{FsBuilder, InodeCount, InodeHandle, RegionSink, SpecialKind};
use tokio_util::sync::CancellationToken;

use super::room::Room;
use super::spool::Spooled;
use super::tree::{Content, EPOCH, Id, Meta, ROOT, Tree};
use super::xattr;

const BLOCK: u64 = 4096;
/// Of a fixed geometry: blocks that one bitmap block counts.
const GROUP_BLOCKS: u64 = 8 * BLOCK;
const INODE: u64 = 256;
/// Inodes of the file system's own.
const OWN_INODES: u64 = 11;
/// Inodes for files that are made when the disk is mounted to be written: one for 16 KiB of free room, as mke2fs.
const BYTES_PER_INODE: u64 = 16 * 1024;
/// Times of ext4 with 34 bits for seconds.
const TIMES: std::ops::RangeInclusive<i64> = -(1 << 31)..=(1 << 34) - (1 << 31) - 1;
/// Made by every mkfs for e2fsck; an image's own cannot stand beside it.
const LOST_FOUND: &str = "lost+found";

/// The file system cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// An image that ext4 has no room or form for.
    #[error("ext4 cannot hold {path:?}")]
    Node {
        /// In the image.
        path: String,
        /// Why.
        #[source]
        source: mkext4::Error,
    },
    /// Something of the whole.
    #[error("cannot lay out the ext4 file system of {size} bytes")]
    Layout {
        /// Its size.
        size: u64,
        /// Why.
        #[source]
        source: mkext4::Error,
    },
    /// A name that the file system needs.
    #[error("the image has something in /{LOST_FOUND}, which is ext4's own")]
    LostFound,
    /// Reading contents or writing the disk.
    #[error("cannot write the disk")]
    Write(#[from] io::Error),
}

/// What is wanted of a file system, besides its content.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Its id.
    pub uuid: [u8; 16],
    /// Bytes of free room in it.
    pub free: u64,
    /// Looks after the room for its file.
    pub room: Room,
}

/// Writes the file system to an empty file; gives its length in bytes and how many nodes it has.
pub fn write(
    tree: &Tree,
    contents: &Spooled,
    output: &File,
    wanted: Wanted,
    cancel: &CancellationToken,
) -> Result<(u64, u64), Ext4Error> {
    let Wanted { uuid, free, room } = wanted;
    let need = Need::of(tree);
    // Free room is holes.
    room.require(output, need.size(0))?;
    let size = need.size(free);
    let layout_error = |source| Ext4Error::Layout { size, source };
    let mut builder = FsBuilder::new(options(&need, uuid, free)).map_err(layout_error)?;
    let files = declare(tree, &mut builder, cancel)?;
    let layout = builder.seal().map_err(layout_error)?;
    output.set_len(size)?;
    let mut writer = layout.writer(Disk { file: output, room }).map_err(write_error)?;
    for (handle, at, size) in files {
        check(cancel)?;
        writer.fill(handle, &mut contents.content(at, size)).map_err(write_error)?;
    }
    writer.finish().map_err(write_error)?;
    Ok((size, need.nodes))
}

fn check(cancel: &CancellationToken) -> io::Result<()> {
    if cancel.is_cancelled() { Err(io::Error::other("cancelled")) } else { Ok(()) }
}

fn options(need: &Need, uuid: [u8; 16], free: u64) -> mkext4::Options {
    let mut options = mkext4::Options::new(need.size(free), uuid, EPOCH);
    options.inodes = InodeCount::Exact(u32::try_from(need.inodes(free)).unwrap_or(u32::MAX));
    // Kept for root's daemons on a machine that people share; here it would only be lost.
    options.reserved_percent = 0;
    options
}

/// What a file's content goes to, and where it is in the spool: in the order of the disk.
type Files = Vec<(InodeHandle, u64, u64)>;

/// Depth first, names in order.
fn declare(
    tree: &Tree,
    builder: &mut FsBuilder,
    cancel: &CancellationToken,
) -> Result<Files, Ext4Error> {
    let mut files = Files::new();
    let mut known: HashMap<Id, InodeHandle> = HashMap::new();
    set(builder, mkext4::ROOT, &tree.node(ROOT).meta).map_err(|source| node_error("/", source))?;
    // Directories whose content is yet to be declared.
    let mut open: Vec<(Id, InodeHandle, String)> = vec![(ROOT, mkext4::ROOT, String::new())];
    while let Some((dir, parent, path)) = open.pop() {
        let first = open.len();
        for (name, &child) in &tree.node(dir).children {
            check(cancel)?;
            let failed = |source| node_error(&format!("{path}/{name}"), source);
            let node = tree.node(child);
            if dir == ROOT && &**name == LOST_FOUND {
                if node.content == Content::Dir && node.children.is_empty() {
                    continue;
                }
                return Err(Ext4Error::LostFound);
            }
            if let Some(handle) = known.get(&child) {
                builder.hardlink(parent, name, *handle).map_err(failed)?;
                continue;
            }
            let meta = stat(&node.meta);
            let special = |builder: &mut FsBuilder, kind| builder.mknod(parent, name, meta, kind);
            let handle = match &node.content {
                Content::Dir => builder.mkdir(parent, name, meta),
                Content::File { size, .. } => builder.file(parent, name, meta, *size),
                Content::Symlink(target) => builder.symlink(parent, name, target, meta),
                &Content::Char(major, minor) => {
                    special(builder, SpecialKind::Char { major, minor })
                }
                &Content::Block(major, minor) => {
                    special(builder, SpecialKind::Block { major, minor })
                }
                Content::Fifo => special(builder, SpecialKind::Fifo),
            }
            .map_err(failed)?;
            set(builder, handle, &node.meta).map_err(failed)?;
            match node.content {
                Content::Dir => open.push((child, handle, format!("{path}/{name}"))),
                Content::File { at, size } => {
                    known.insert(child, handle);
                    // Nothing to fill.
                    if size > 0 {
                        files.push((handle, at, size));
                    }
                }
                _ => drop(known.insert(child, handle)),
            }
        }
        open[first..].reverse();
    }
    Ok(files)
}

fn stat(meta: &Meta) -> mkext4::Meta {
    let (seconds, nanos) = meta.mtime;
    let (first, last) = (*TIMES.start(), *TIMES.end());
    // Out of ext4's range: the nearest time in it, as the kernel does.
    let time =
        if TIMES.contains(&seconds) { (seconds, nanos) } else { (seconds.clamp(first, last), 0) };
    mkext4::Meta::new(meta.mode, meta.uid, meta.gid, time)
}

fn set(builder: &mut FsBuilder, handle: InodeHandle, meta: &Meta) -> Result<(), mkext4::Error> {
    builder.set_meta(handle, stat(meta))?;
    for (name, value) in &meta.xattrs {
        builder.set_xattr(handle, name, &xattr::on_ext4(name, value))?;
    }
    Ok(())
}

fn node_error(path: &str, source: mkext4::Error) -> Ext4Error {
    Ext4Error::Node { path: path.to_owned(), source }
}

fn write_error(error: mkext4::Error) -> Ext4Error {
    match error {
        mkext4::Error::Io(source) => source.into(),
        other => io::Error::other(other).into(),
    }
}

/// The disk's file, empty before: what is zero need not be written.
struct Disk<'a> {
    file: &'a File,
    room: Room,
}

impl RegionSink for Disk<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.room.before(self.file, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset)
    }

    fn zeros(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// How much room the tree takes, counted generously: the rest is free space.
#[derive(Default)]
struct Need {
    nodes: u64,
    blocks: u64,
}

impl Need {
    fn of(tree: &Tree) -> Self {
        let mut need = Self::default();
        let mut seen = std::collections::HashSet::new();
        let mut open = vec![ROOT];
        while let Some(id) = open.pop() {
            let node = tree.node(id);
            if node.content != Content::Dir && !seen.insert(id) {
                continue;
            }
            need.nodes += 1;
            need.blocks += u64::from(!node.meta.xattrs.is_empty());
            need.blocks += match &node.content {
                Content::Dir => dir_blocks(node.children.keys().map(|name| name.len() as u64)),
                Content::File { size, .. } => file_blocks(*size),
                Content::Symlink(_) => 1,
                _ => 0,
            };
            open.extend(node.children.values());
        }
        need
    }

    fn inodes(&self, free: u64) -> u64 {
        OWN_INODES + self.nodes + free / BYTES_PER_INODE
    }

    /// Bytes of a disk with at least `free` bytes of room.
    fn size(&self, free: u64) -> u64 {
        /// The smallest file system that has a journal, with room to spare.
        const SMALLEST: u64 = 4096;
        // The journal (at most 1 GiB, by mke2fs's table) and what is lost at its edges.
        let journal = |blocks: u64| match blocks {
            0..=32_767 => 1024,
            32_768..=262_143 => 4096,
            262_144..=524_287 => 8192,
            524_288..=4_194_303 => 16_384,
            4_194_304..=8_388_607 => 32_768,
            8_388_608..=16_777_215 => 65_536,
            16_777_216..=33_554_431 => 131_072,
            _ => 262_144,
        };
        let content = self.blocks + free.div_ceil(BLOCK) + 16;
        let mut blocks = SMALLEST;
        // Overhead grows with the size, much slower than it: a few rounds settle it.
        loop {
            let groups = blocks.div_ceil(GROUP_BLOCKS);
            // Inode tables are rounded up in every group; a table that does not fit before a backup is put behind.
            let tables = (self.inodes(free) * INODE).div_ceil(BLOCK) + 2 * groups;
            let table = tables.div_ceil(groups);
            let descriptors = (groups * 32).div_ceil(BLOCK) + 1;
            let overhead =
                tables + table * groups.div_ceil(16) + groups * (2 + descriptors) + journal(blocks);
            let wanted = content + overhead;
            if wanted <= blocks {
                return blocks * BLOCK;
            }
            blocks = wanted;
        }
    }
}

/// Blocks of a file, and of the tree of its extents where it has many.
fn file_blocks(size: u64) -> u64 {
    /// Of an extent; each may be cut once by a group's own blocks.
    const EXTENT: u64 = 32_768;
    const EXTENTS_PER_BLOCK: u64 = 340;
    let blocks = size.div_ceil(BLOCK);
    let extents = 2 * blocks.div_ceil(EXTENT);
    let tree = if extents > 4 { extents.div_ceil(EXTENTS_PER_BLOCK) + 2 } else { 0 };
    blocks + tree
}

/// Blocks of a directory with an index: half-filled at worst, by long names that do not go together.
fn dir_blocks(names: impl Iterator<Item = u64>) -> u64 {
    /// Number, length, type and padding of an entry.
    const ENTRY: u64 = 12;
    let bytes: u64 = names.map(|length| ENTRY + length).sum();
    let leaves = (bytes * 107).div_ceil(100 * (BLOCK - 300)) + 1;
    // The index, and the tree of extents where the directory is cut.
    leaves + leaves.div_ceil(400) + 2
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::limits::{Budget, Limits};
    use super::super::tree::{Change, Diff};
    use super::*;

    /// Lays out, and writes nothing.
    fn laid_out(entries: impl Iterator<Item = (String, Content)>, free: u64) -> u64 {
        let put = |(path, content): (String, Content)| {
            (path.into(), Change::Put(Meta::default(), content))
        };
        let diff = Diff { entries: entries.map(put).collect(), ..Diff::default() };
        let mut tree = Tree::default();
        let never = CancellationToken::new();
        tree.apply(diff, &mut Budget::new(Limits::default()), &never).unwrap();
        let need = Need::of(&tree);
        let mut builder = FsBuilder::new(options(&need, [7; 16], free)).unwrap();
        declare(&tree, &mut builder, &never).unwrap();
        builder.seal().unwrap().image_len()
    }

    #[test]
    fn there_is_room_for_every_shape_of_tree() {
        const MIB: u64 = 1024 * 1024;
        let file = |size| Content::File { at: 0, size };
        for free in [0, 1, 127 * MIB, 128 * MIB, 5000 * MIB, 200_000 * MIB] {
            laid_out(std::iter::empty(), free);
            for size in [1, 4096, 126 * MIB, 128 * MIB, 2100 * MIB, 300_000 * MIB] {
                let length = laid_out([("f".to_owned(), file(size))].into_iter(), free);
                assert!(length > size + free);
            }
        }
        for free in [0, 300 * MIB] {
            laid_out((0..40_000).map(|i| (format!("{i}"), file(i % 9000))), free);
            laid_out((0..9000).map(|i| (format!("{i:0>250}"), file(0))), free);
            laid_out((0..20_000).map(|i| (format!("{}/{i}", i % 500), Content::Dir)), free);
            let link = || Content::Symlink("x".repeat(200).into());
            laid_out((0..9000).map(|i| (format!("{i}"), link())), free);
        }
    }
}
