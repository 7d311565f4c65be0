//! Layers applied over one another (OCI image-spec 1.1, `layer.md`, "Applying Changesets"), in memory and
//! without a file system: contents are places in the spool.
//!
//! A layer is a set of changes to paths of the image, and paths are taken literally: **no symbolic link is
//! ever followed**. So `a/passwd` over a lower `a -> /etc` makes `a` a directory, as Docker's and
//! Podman's overlay storage does, and nothing of it reaches `etc/passwd`.
//!
//! - Whiteouts and opaque directories of a layer are applied before its entries: they hide what is
//!   below, never what the layer itself has, in whatever order it has it.
//! - Then entries apply in their order; the last of a name wins. A directory over a directory keeps what is in it and takes
//!   the new owner, mode, time and attributes; anything else replaces, with all below it.
//! - A parent that no layer has an entry for is a directory 0755 of root's.
//! - A hard link is another name of the file that its target names *then*: from an earlier entry, or
//!   from a lower layer. It keeps that file when an upper layer replaces the target.

use std::collections::BTreeMap;

use super::limits::{Budget, TooLarge};

/// Seconds since 1970 of what no layer has a time for: 2025-01-01, so that it depends on nothing.
pub const EPOCH: i64 = 1_735_689_600;

/// What a node costs in the layer that brings it, in the tree, and in the maker of the file system, its name
/// aside; measured.
pub(super) const NODE_COST: u64 = 1536;
/// A block of the file system that is made in memory: one for a directory, a long link, attributes.
pub(super) const BLOCK_COST: u64 = 4096;

/// Owner, mode, time, attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits, with set-user-id, set-group-id and sticky.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes, each name once.
    pub xattrs: Vec<(Box<str>, Box<[u8]>)>,
}

impl Default for Meta {
    fn default() -> Self {
        Self { mode: 0o755, uid: 0, gid: 0, mtime: (EPOCH, 0), xattrs: Vec::new() }
    }
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A directory.
    Dir,
    /// A regular file, its bytes in the spool.
    File {
        /// Where they begin.
        at: u64,
        /// How many there are.
        size: u64,
    },
    /// A symbolic link.
    Symlink(Box<str>),
    /// A character device: major and minor number.
    Char(u32, u32),
    /// A block device: major and minor number.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A change that a layer makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new file, directory, link or device.
    Put(Meta, Content),
    /// Another name of the file at this path.
    Link(Box<str>),
}

/// What a layer does. Paths are relative to the root, which is `""`, with single slashes and no `.` or `..`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// Lower paths that are hidden.
    pub whiteouts: Vec<Box<str>>,
    /// Directories whose lower content is hidden.
    pub opaques: Vec<Box<str>>,
    /// Entries, in their order.
    pub entries: Vec<(Box<str>, Change)>,
}

/// Why a layer does not fit what is below it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// Too much of it.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// Nothing to link to.
    #[error("it is a hard link to {0:?}, which neither this layer up to here nor a lower one has")]
    NoTarget(String),
    /// Directories have one name.
    #[error("it is a hard link to {0:?}, a directory")]
    LinkToDir(String),
    /// The root is a directory.
    #[error("the root of the image is something else than a directory")]
    Root,
}

/// A node's number.
pub type Id = usize;
const ROOT: Id = 0;

/// A file system in memory, without contents.
#[derive(Clone, Debug)]
pub struct Tree {
    // What was replaced stays until the end: the budget bounds it.
    nodes: Vec<Node>,
}

/// A node, which may have several names.
#[derive(Clone, Debug)]
pub struct Node {
    /// Owner and so on.
    pub meta: Meta,
    /// What it is.
    pub content: Content,
    /// Of a directory, by name.
    pub children: BTreeMap<Box<str>, Id>,
}

impl Node {
    fn new(meta: Meta, content: Content) -> Self {
        Self { meta, content, children: BTreeMap::new() }
    }
}

impl Default for Tree {
    fn default() -> Self {
        Self { nodes: vec![Node::new(Meta::default(), Content::Dir)] }
    }
}

impl Tree {
    /// The root directory.
    pub fn root(&self) -> Id {
        ROOT
    }

    /// A node.
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// Applies the next layer. An error names the entry that does not fit; the tree is of no use then.
    pub fn apply(&mut self, diff: Diff, budget: &mut Budget) -> Result<(), (Box<str>, Conflict)> {
        for path in diff.whiteouts {
            let (parent, name) = split(&path);
            if let Some(parent) = self.find(parent) {
                self.nodes[parent].children.remove(name);
            }
        }
        for path in diff.opaques {
            if let Some(dir) = self.find(&path) {
                self.nodes[dir].children.clear();
            }
        }
        for (path, change) in diff.entries {
            if let Err(conflict) = self.change(&path, change, budget) {
                return Err((path, conflict));
            }
        }
        Ok(())
    }

    fn change(&mut self, path: &str, change: Change, budget: &mut Budget) -> Result<(), Conflict> {
        let (parent, name) = split(path);
        match change {
            Change::Put(meta, Content::Dir) => {
                let dir = self.make_dir(path, budget)?;
                self.nodes[dir].meta = meta;
            }
            _ if path.is_empty() => return Err(Conflict::Root),
            Change::Put(meta, content) => {
                let parent = self.make_dir(parent, budget)?;
                self.insert(parent, name, Node::new(meta, content));
            }
            Change::Link(target) => {
                let file = self.find(&target);
                let file = file.ok_or_else(|| Conflict::NoTarget(target.to_string()))?;
                if self.nodes[file].content == Content::Dir {
                    return Err(Conflict::LinkToDir(target.into()));
                }
                let parent = self.make_dir(parent, budget)?;
                self.nodes[parent].children.insert(name.into(), file);
            }
        }
        Ok(())
    }

    /// The directory at a path; what is missing is made, and what is none is replaced.
    fn make_dir(&mut self, path: &str, budget: &mut Budget) -> Result<Id, Conflict> {
        let mut dir = ROOT;
        for name in components(path) {
            dir = match self.nodes[dir].children.get(name) {
                Some(&child) if self.nodes[child].content == Content::Dir => child,
                _ => {
                    budget.memory(NODE_COST + BLOCK_COST + name.len() as u64)?;
                    self.insert(dir, name, Node::new(Meta::default(), Content::Dir))
                }
            };
        }
        Ok(dir)
    }

    fn insert(&mut self, parent: Id, name: &str, node: Node) -> Id {
        let id = self.nodes.len();
        self.nodes.push(node);
        self.nodes[parent].children.insert(name.into(), id);
        id
    }

    fn find(&self, path: &str) -> Option<Id> {
        components(path).try_fold(ROOT, |dir, name| self.nodes[dir].children.get(name).copied())
    }
}

fn components(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|name| !name.is_empty())
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}
