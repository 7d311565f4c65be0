//! A path that somebody names for a copy: what it leads to, and what an entry of it is called.
//!
//! Paths are opened by whoever knows their root; here they are only taken apart.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cap_std::fs::Dir;

use super::problem::Problem;
use super::tree::{Name, Rules, Tree};

/// A path, taken apart. Pure.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Spot {
    /// To be opened, with links followed.
    pub directory: PathBuf,
    /// What is meant in it; the directory itself otherwise.
    pub leaf: Option<OsString>,
    /// What entries are called by; empty where they have no common name.
    pub base: OsString,
}

impl Spot {
    /// A slash at the end says that it is a directory, `/.` that it is the directory's content.
    pub fn of(path: &Path) -> Self {
        let bytes = path.as_os_str().as_bytes();
        let whole = if bytes.is_empty() { Path::new(".") } else { path };
        let content = bytes.ends_with(b"/.");
        match path.file_name() {
            Some(name) if !bytes.ends_with(b"/") && !content => {
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                let directory = parent.unwrap_or(Path::new(".")).to_owned();
                Self { directory, leaf: Some(name.to_owned()), base: name.to_owned() }
            }
            Some(name) if !content => {
                Self { directory: whole.to_owned(), leaf: None, base: name.to_owned() }
            }
            _ => Self { directory: whole.to_owned(), leaf: None, base: OsString::new() },
        }
    }
}

/// What entries are called in the tree.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// As in the archive.
    AsTheyAre,
    /// The one at the top has this name.
    TopIs { name: OsString, top: Option<Top> },
}

/// The one at the archive's top.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Top {
    /// Everything is below `.`.
    Dot,
    /// Everything is below this.
    Named(OsString),
}

impl Naming {
    /// The place of what has that name in the archive.
    pub fn place(&mut self, name: Option<Name>) -> Result<Option<Name>, Problem> {
        let Self::TopIs { name: wanted, top } = self else { return Ok(name) };
        let top = top.get_or_insert_with(|| match &name {
            None => Top::Dot,
            Some(name) => Top::Named(name.first().to_owned()),
        });
        match (top, name) {
            (Top::Dot, None) => Ok(Some(Name::top(wanted))),
            (Top::Dot, Some(name)) => Ok(Some(name.below(wanted))),
            (Top::Named(top), Some(name)) if name.first() == top => {
                Ok(Some(name.with_first(wanted)))
            }
            (Top::Named(_), _) => Err(Problem::SecondTop),
        }
    }
}

/// Where an archive is unpacked.
#[derive(Debug)]
pub struct Landing {
    directory: OwnedFd,
    naming: Naming,
}

/// Why an archive cannot be unpacked at a path.
#[derive(Debug, thiserror::Error)]
pub enum LandError {
    /// The directory that it would be in is missing.
    #[error("there is no directory {0:?}; make it first, or name one that exists")]
    Missing(PathBuf),
    /// It cannot be opened.
    #[error("{path:?} cannot be opened")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// Finds the place for an archive: in the directory that is at the path, or else under the path's own last name.
/// `open` opens a directory, with links followed.
pub fn land(
    path: &Path,
    open: impl Fn(&Path) -> io::Result<OwnedFd>,
) -> Result<Landing, LandError> {
    let spot = Spot::of(path);
    let whole: &Path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let missing =
        |error: &io::Error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory);
    match (open(whole), spot.leaf) {
        (Ok(directory), _) => Ok(Landing { directory, naming: Naming::AsTheyAre }),
        (Err(error), Some(name)) if missing(&error) => match open(&spot.directory) {
            Ok(directory) => Ok(Landing { directory, naming: Naming::TopIs { name, top: None } }),
            Err(error) if missing(&error) => Err(LandError::Missing(spot.directory)),
            Err(cause) => Err(LandError::Open { path: spot.directory, cause }),
        },
        (Err(error), None) if missing(&error) => Err(LandError::Missing(path.to_owned())),
        (Err(cause), _) => Err(LandError::Open { path: path.to_owned(), cause }),
    }
}

impl Landing {
    /// The tree to unpack into. What is there already is left as it is, but for files that have an entry's name.
    pub fn tree(self, owner: Option<(u32, u32)>) -> Tree {
        let root = Dir::from_std_file(File::from(self.directory));
        Tree::new(root, self.naming, Rules { owner, merge: true }, u64::MAX)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_taken_apart() {
        for (path, directory, leaf, base) in [
            ("/srv/app", "/srv", Some("app"), "app"),
            ("app", ".", Some("app"), "app"),
            ("/app", "/", Some("app"), "app"),
            ("/srv/app/", "/srv/app/", None, "app"),
            ("/srv/app/.", "/srv/app/.", None, ""),
            (".", ".", None, ""),
            ("", ".", None, ""),
            ("/", "/", None, ""),
            ("..", "..", None, ""),
            ("a/..", "a/..", None, ""),
        ] {
            let leaf = leaf.map(OsString::from);
            let expected = Spot { directory: directory.into(), leaf, base: base.into() };
            assert_eq!(Spot::of(Path::new(path)), expected, "{path}");
        }
    }

    #[test]
    fn one_entry_at_the_top_gets_the_name() {
        let parse = |name: &str| Name::parse(name.as_bytes()).unwrap();
        let naming = || Naming::TopIs { name: "new".into(), top: None };
        let mut named = naming();
        assert_eq!(named.place(parse("old")), Ok(parse("new")));
        assert_eq!(named.place(parse("old/a/b")), Ok(parse("new/a/b")));
        assert_eq!(named.place(parse("other")), Err(Problem::SecondTop));
        assert_eq!(named.place(parse(".")), Err(Problem::SecondTop));
        let mut dot = naming();
        assert_eq!(dot.place(parse("./")), Ok(parse("new")));
        assert_eq!(dot.place(parse("./a/b")), Ok(parse("new/a/b")));
        assert_eq!(dot.place(parse("c")), Ok(parse("new/c")));
        assert_eq!(Naming::AsTheyAre.place(parse("a/b")), Ok(parse("a/b")));
    }
}
