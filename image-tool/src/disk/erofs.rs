//! The merged tree as an EROFS file system: read-only, uncompressed, without free space or a journal.
//!
//! The format is small enough to be written here (Linux, `Documentation/filesystems/erofs.rst` and
//! `fs/erofs/erofs_fs.h`); mkfs.erofs before 1.7 packs directories only, and those would have to be made as root.
//!
//! ```text
//! block 0: superblock │ inodes, 64 bytes and attributes each │ directories, links, files, each from a new block
//! ```
//! Extended inodes (64 bytes) and plain data only: what every kernel with EROFS (5.4 and later) reads.

#![allow(
    clippy::cast_possible_truncation,
    reason = "fields of a format; names, attributes and blocks have bounds that fit them"
)]

use std::fs::File;
use std::io::{self, BufWriter, Write};

use tokio_util::sync::CancellationToken;

use super::room::Room;
use super::spool::Spooled;
use super::tree::{Content, EPOCH, Id, Node, ROOT, Tree};

const BLOCK: usize = 4096;
/// A number of an inode counts these from the first block of inodes.
const SLOT: u64 = 32;
/// An extended inode; each begins at a multiple, so that none lies across two blocks.
const INODE: usize = 64;
/// Block 0 has the superblock alone.
const INODES_AT: u64 = 1;
/// Number 0 is left free: a directory entry with it would look deleted.
const FIRST: u64 = 2;
const MAGIC: u32 = 0xe0f5_e1e2;
const SUPERBLOCK_AT: usize = 1024;
/// Of a directory entry without its name.
const DIRENT: usize = 12;
/// Written at a time.
const BUFFER: usize = 1024 * 1024;

/// The file system cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// 2^32 blocks.
    #[error("the image takes more than the 16 TiB that an EROFS file system can have")]
    Large,
    /// Reading contents or writing the disk.
    #[error("cannot write the disk")]
    Write(#[from] io::Error),
}

/// An inode and where its data goes.
struct Plan {
    id: Id,
    parent: usize,
    number: u64,
    links: u32,
    /// First block and length of its data.
    at: u32,
    size: u64,
}

/// Writes the file system to an empty file; gives its length in bytes and how many inodes it has.
pub fn write(
    tree: &Tree,
    contents: &Spooled,
    output: &File,
    uuid: [u8; 16],
    room: Room,
    cancel: &CancellationToken,
) -> Result<(u64, u64), ErofsError> {
    let image = Image::plan(tree)?;
    room.require(output, u64::from(image.blocks) * BLOCK as u64)?;
    let mut output = Blocks { file: BufWriter::with_capacity(BUFFER, output), at: 0 };
    output.write_all(&image.superblock(uuid))?;
    for plan in &image.plans {
        output.pad_to((INODES_AT * BLOCK as u64) + plan.number * SLOT)?;
        output.write_all(&image.inode(plan))?;
    }
    for plan in image.plans.iter().filter(|plan| plan.size > 0) {
        if cancel.is_cancelled() {
            return Err(io::Error::other("cancelled").into());
        }
        output.pad_to(u64::from(plan.at) * BLOCK as u64)?;
        match &tree.node(plan.id).content {
            Content::Dir => output.write_all(&image.dir(plan))?,
            Content::Symlink(target) => output.write_all(target.as_bytes())?,
            &Content::File { at, size } => {
                let copied = io::copy(&mut contents.content(at, size), &mut output)?;
                if copied != size {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
            }
            _ => {}
        }
    }
    let end = u64::from(image.blocks) * BLOCK as u64;
    output.pad_to(end)?;
    output.flush()?;
    Ok((end, image.plans.len() as u64))
}

/// All of it but contents, laid out.
struct Image<'a> {
    tree: &'a Tree,
    /// In the order of their numbers.
    plans: Vec<Plan>,
    /// The tree's number of a node → its plan.
    of: Vec<Option<usize>>,
    blocks: u32,
}

impl<'a> Image<'a> {
    fn plan(tree: &'a Tree) -> Result<Self, ErofsError> {
        let mut image = Self { tree, plans: Vec::new(), of: vec![None; tree.len()], blocks: 0 };
        let mut number = FIRST;
        image.add(ROOT, 0, &mut number);
        let mut next = 0;
        while next < image.plans.len() {
            let node = tree.node(image.plans[next].id);
            for &child in node.children.values() {
                match image.of[child] {
                    Some(known) => image.plans[known].links += 1,
                    None => image.add(child, next, &mut number),
                }
                let is_dir = tree.node(child).content == Content::Dir;
                image.plans[next].links += u32::from(is_dir);
            }
            next += 1;
        }
        let mut block = INODES_AT + (number * SLOT).div_ceil(BLOCK as u64);
        for i in 0..image.plans.len() {
            let plan = &image.plans[i];
            let size = match &tree.node(plan.id).content {
                Content::Dir => image.dir(plan).len() as u64,
                Content::Symlink(target) => target.len() as u64,
                Content::File { size, .. } => *size,
                _ => 0,
            };
            let at = if size > 0 { block } else { 0 };
            let at = u32::try_from(at).map_err(|_| ErofsError::Large)?;
            (image.plans[i].at, image.plans[i].size) = (at, size);
            block += size.div_ceil(BLOCK as u64);
        }
        image.blocks = u32::try_from(block).map_err(|_| ErofsError::Large)?;
        Ok(image)
    }

    fn add(&mut self, id: Id, parent: usize, number: &mut u64) {
        let node = self.tree.node(id);
        self.of[id] = Some(self.plans.len());
        let links = if node.content == Content::Dir { 2 } else { 1 };
        self.plans.push(Plan { id, parent, number: *number, links, at: 0, size: 0 });
        let length = (INODE + attributes(node).len()).next_multiple_of(INODE);
        *number += length as u64 / SLOT;
    }

    /// `struct erofs_super_block`, in its block.
    fn superblock(&self, uuid: [u8; 16]) -> Vec<u8> {
        let mut block = vec![0; SUPERBLOCK_AT];
        block.extend(MAGIC.to_le_bytes());
        // No checksum (it is an optional feature), none of the other features.
        block.extend([0; 8]);
        // 2^12 bytes a block; no extension slots.
        block.extend([12, 0]);
        // The root is the first, so its number is small.
        block.extend((FIRST as u16).to_le_bytes());
        block.extend((self.plans.len() as u64).to_le_bytes());
        block.extend(EPOCH.to_le_bytes());
        block.extend(0_u32.to_le_bytes());
        block.extend(self.blocks.to_le_bytes());
        block.extend((INODES_AT as u32).to_le_bytes());
        // No shared attributes.
        block.extend(0_u32.to_le_bytes());
        block.extend(uuid);
        block.resize(BLOCK, 0);
        block
    }

    /// `struct erofs_inode_extended` and the attributes behind it.
    fn inode(&self, plan: &Plan) -> Vec<u8> {
        const EXTENDED_PLAIN: u16 = 1;
        let node = self.tree.node(plan.id);
        let meta = &node.meta;
        let attributes = attributes(node);
        // 12 bytes count as one, then four bytes each.
        let count = if attributes.is_empty() { 0 } else { 1 + (attributes.len() - 12) / 4 };
        let place = match node.content {
            Content::Char(major, minor) | Content::Block(major, minor) => {
                (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
            }
            _ => plan.at,
        };
        let mut inode = Vec::with_capacity(INODE + attributes.len());
        inode.extend(EXTENDED_PLAIN.to_le_bytes());
        inode.extend((count as u16).to_le_bytes());
        inode.extend((kind(node).1 | meta.mode).to_le_bytes());
        inode.extend(0_u16.to_le_bytes());
        inode.extend(plan.size.to_le_bytes());
        inode.extend(place.to_le_bytes());
        // For programs with 32-bit numbers.
        inode.extend((plan.number as u32).to_le_bytes());
        inode.extend(meta.uid.to_le_bytes());
        inode.extend(meta.gid.to_le_bytes());
        inode.extend(meta.mtime.0.to_le_bytes());
        inode.extend(meta.mtime.1.to_le_bytes());
        inode.extend(plan.links.to_le_bytes());
        inode.resize(INODE, 0);
        inode.extend(attributes);
        inode
    }

    /// Blocks of entries in the order of their bytes, each with its names behind them.
    fn dir(&self, plan: &Plan) -> Vec<u8> {
        let node = self.tree.node(plan.id);
        let mut entries: Vec<(&str, usize)> = vec![(".", 0); 2];
        entries[0].1 = self.of[plan.id].unwrap_or_default();
        entries[1] = ("..", plan.parent);
        let children = node.children.iter();
        entries.extend(children.map(|(name, id)| (&**name, self.of[*id].unwrap_or_default())));
        entries.sort_unstable();
        let mut data = Vec::new();
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let mut used = 0;
            let fits = |(name, _): &&(&str, usize)| {
                used += DIRENT + name.len();
                used <= BLOCK
            };
            let count = rest.iter().take_while(fits).count();
            let (block, more) = rest.split_at(count);
            let mut name_at = count * DIRENT;
            for (name, target) in block {
                let target = &self.plans[*target];
                data.extend(target.number.to_le_bytes());
                data.extend((name_at as u16).to_le_bytes());
                data.extend([kind(self.tree.node(target.id)).0, 0]);
                name_at += name.len();
            }
            for (name, _) in block {
                data.extend(name.as_bytes());
            }
            if !more.is_empty() {
                data.resize(data.len().next_multiple_of(BLOCK), 0);
            }
            rest = more;
        }
        data
    }
}

/// The type in a directory entry, and in a mode.
fn kind(node: &Node) -> (u8, u16) {
    match node.content {
        Content::File { .. } => (1, 0o100_000),
        Content::Dir => (2, 0o040_000),
        Content::Char(..) => (3, 0o020_000),
        Content::Block(..) => (4, 0o060_000),
        Content::Fifo => (5, 0o010_000),
        Content::Symlink(_) => (7, 0o120_000),
    }
}

/// `struct erofs_xattr_ibody_header` and its entries; nothing when there are none.
fn attributes(node: &Node) -> Vec<u8> {
    const PREFIXES: &[(&str, u8)] = &[
        ("user.", 1),
        ("system.posix_acl_access", 2),
        ("system.posix_acl_default", 3),
        ("trusted.", 4),
        ("security.", 6),
    ];
    let mut bytes = Vec::new();
    for (name, value) in &node.meta.xattrs {
        let known = PREFIXES.iter().find_map(|(p, index)| Some((name.strip_prefix(p)?, *index)));
        // All that are kept have one of these.
        let Some((name, index)) = known else { continue };
        if bytes.is_empty() {
            bytes.resize(12, 0);
        }
        bytes.extend([name.len() as u8, index]);
        bytes.extend((value.len() as u16).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Knows how far it is.
struct Blocks<W: Write> {
    file: BufWriter<W>,
    at: u64,
}

impl<W: Write> Blocks<W> {
    fn pad_to(&mut self, at: u64) -> io::Result<()> {
        io::copy(&mut io::Read::take(io::repeat(0), at - self.at), self).map(drop)
    }
}

impl<W: Write> Write for Blocks<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
