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

use tokio_util::sync::CancellationToken;

use super::limits::{Budget, TooLarge};
use super::xattr::Xattrs;

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
    pub xattrs: Xattrs,
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
    /// The caller's wish.
    #[error("it was cancelled")]
    Cancelled,
}

/// A node's number.
pub type Id = usize;
/// The root directory's.
pub const ROOT: Id = 0;

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
    /// How many numbers there are; not all nodes can still be reached.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// A node.
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// Applies the next layer. An error names the entry that does not fit, or before which it was cancelled; the tree
    /// is of no use then.
    pub fn apply(
        &mut self,
        diff: Diff,
        budget: &mut Budget,
        cancel: &CancellationToken,
    ) -> Result<(), (Box<str>, Conflict)> {
        for path in diff.whiteouts {
            if cancel.is_cancelled() {
                return Err((path, Conflict::Cancelled));
            }
            let (parent, name) = split(&path);
            if let Some(parent) = self.find(parent) {
                self.nodes[parent].children.remove(name);
            }
        }
        for path in diff.opaques {
            if cancel.is_cancelled() {
                return Err((path, Conflict::Cancelled));
            }
            if let Some(dir) = self.find(&path) {
                self.nodes[dir].children.clear();
            }
        }
        for (path, change) in diff.entries {
            if cancel.is_cancelled() {
                return Err((path, Conflict::Cancelled));
            }
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::limits::Limits;
    use super::*;

    /// A path's node in the oracle: the number of the file, or a directory and its mode.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Seen {
        Dir(u16),
        File(u64),
    }

    /// All paths flat, as the specification speaks of them: no tree, no nodes, prefixes only.
    fn oracle(layers: &[Diff]) -> Option<BTreeMap<String, Seen>> {
        let mut seen: BTreeMap<String, Seen> = [(String::new(), Seen::Dir(0o755))].into();
        let below = |path: &str| if path.is_empty() { String::new() } else { format!("{path}/") };
        for layer in layers {
            for hidden in &layer.whiteouts {
                let prefix = below(hidden);
                seen.retain(|path, _| **path != **hidden && !path.starts_with(&prefix));
            }
            for dir in &layer.opaques {
                let prefix = below(dir);
                seen.retain(|path, _| {
                    path.is_empty() || **path == **dir || !path.starts_with(&prefix)
                });
            }
            for (path, change) in &layer.entries {
                let linked = match change {
                    Change::Link(target) => match seen.get(&**target)? {
                        Seen::File(number) => Some(*number),
                        Seen::Dir(_) => return None,
                    },
                    Change::Put(..) => None,
                };
                let mut parents: Vec<&str> =
                    path.match_indices('/').map(|(i, _)| &path[..i]).collect();
                if let Change::Put(_, Content::Dir) = change {
                    parents.push(path);
                }
                for parent in parents {
                    if !matches!(seen.get(parent), Some(Seen::Dir(_))) {
                        seen.insert(parent.to_owned(), Seen::Dir(0o755));
                    }
                }
                let new = match change {
                    Change::Put(meta, Content::Dir) => Seen::Dir(meta.mode),
                    Change::Put(_, Content::File { at, .. }) => Seen::File(*at),
                    _ => Seen::File(linked?),
                };
                if matches!(new, Seen::File(_)) {
                    let prefix = below(path);
                    seen.retain(|other, _| !other.starts_with(&prefix));
                }
                seen.insert(path.to_string(), new);
            }
        }
        Some(seen)
    }

    fn flat(tree: &Tree) -> BTreeMap<String, Seen> {
        let mut seen = BTreeMap::new();
        let mut open = vec![(String::new(), ROOT)];
        while let Some((path, id)) = open.pop() {
            let node = tree.node(id);
            for (name, child) in &node.children {
                let path =
                    if path.is_empty() { name.to_string() } else { format!("{path}/{name}") };
                open.push((path, *child));
            }
            let what = match node.content {
                Content::File { at, .. } => Seen::File(at),
                _ => Seen::Dir(node.meta.mode),
            };
            seen.insert(path, what);
        }
        seen
    }

    fn path() -> impl Strategy<Value = Box<str>> {
        prop::collection::vec("[abc]", 1..4).prop_map(|names| names.join("/").into())
    }

    fn entry() -> impl Strategy<Value = (Box<str>, Change)> {
        let dir = (0_u16..0o1000)
            .prop_map(|mode| Change::Put(Meta { mode, ..Meta::default() }, Content::Dir));
        let file =
            any::<u64>().prop_map(|at| Change::Put(Meta::default(), Content::File { at, size: 0 }));
        (path(), prop_oneof![3 => dir, 4 => file, 1 => path().prop_map(Change::Link)])
    }

    fn diff() -> impl Strategy<Value = Diff> {
        let paths = || prop::collection::vec(path(), 0..3);
        (paths(), paths(), prop::collection::vec(entry(), 0..8))
            .prop_map(|(whiteouts, opaques, entries)| Diff { whiteouts, opaques, entries })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn merging_is_what_the_flat_model_says(layers in prop::collection::vec(diff(), 1..5)) {
            let mut tree = Tree::default();
            let mut budget = Budget::new(Limits::default());
            let never = CancellationToken::new();
            let merged: Result<(), _> =
                layers.iter().try_for_each(|layer| tree.apply(layer.clone(), &mut budget, &never));
            let expected = oracle(&layers);
            prop_assert_eq!(merged.is_ok(), expected.is_some(), "{:?}", merged);
            if let Some(expected) = expected {
                prop_assert_eq!(flat(&tree), expected);
            }
        }
    }

    #[test]
    fn the_root_can_be_emptied_and_stays_a_directory() {
        let mut tree = Tree::default();
        let mut budget = Budget::new(Limits::default());
        let never = CancellationToken::new();
        let file = || Change::Put(Meta::default(), Content::File { at: 0, size: 0 });
        let lower = Diff { entries: vec![("a/b".into(), file())], ..Diff::default() };
        tree.apply(lower, &mut budget, &never).unwrap();
        let opaque = Diff { opaques: vec!["".into()], ..Diff::default() };
        tree.apply(opaque, &mut budget, &never).unwrap();
        assert!(tree.node(ROOT).children.is_empty());
        let root = Diff { entries: vec![("".into(), file())], ..Diff::default() };
        assert_eq!(tree.apply(root, &mut budget, &never), Err(("".into(), Conflict::Root)));
    }

    #[test]
    fn a_cancelled_layer_is_not_gone_on_with() {
        let cancelled = CancellationToken::new();
        cancelled.cancel();
        let dir = || ("a".into(), Change::Put(Meta::default(), Content::Dir));
        for diff in [
            Diff { whiteouts: vec!["a".into()], ..Diff::default() },
            Diff { opaques: vec!["a".into()], ..Diff::default() },
            Diff { entries: vec![dir()], ..Diff::default() },
        ] {
            let mut tree = Tree::default();
            let mut budget = Budget::new(Limits::default());
            let applied = tree.apply(diff, &mut budget, &cancelled);
            assert_eq!(applied, Err(("a".into(), Conflict::Cancelled)));
            assert!(tree.node(ROOT).children.is_empty());
        }
    }
}
