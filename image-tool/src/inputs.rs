//! What a result was made from, as digests: equal inputs need no new build, and each part is made
//! again only when its own inputs changed.
//!
//! Packages at a mirror are *not* inputs: they change without the recipe. `build --force` fetches them anew.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::digest::{self, Digest};
use crate::file::{self, FileError};
use crate::layout::canonical;
use crate::recipe::{Builder, Kernel, Root};
use crate::rootfs::{self, EntryKind, RootfsError};

/// The file in a result.
pub const FILE: &str = "inputs.json";
/// Raised when this tool makes something else of the same recipe.
const FORMAT: u32 = 2;
/// Three digests.
const MAX_SIZE: u64 = 64 * 1024;

/// Part → digest of its inputs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Inputs(BTreeMap<String, Digest>);

impl Inputs {
    /// Reads those of an earlier result. `None` when there are none that can be understood: then all
    /// is made anew, which is always right.
    pub fn load(dir: &Path) -> Option<Self> {
        let bytes = file::read_bounded(&dir.join(FILE), MAX_SIZE).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes them beside a new result.
    pub fn save(&self, dir: &Path) -> Result<(), FileError> {
        file::write(&dir.join(FILE), &canonical(self))
    }

    /// Adds a part.
    #[must_use]
    pub fn with(mut self, part: &str, digest: Digest) -> Self {
        self.0.insert(part.to_owned(), digest);
        self
    }

    /// Whether a part has the same inputs in both.
    pub fn same(&self, other: &Self, part: &str) -> bool {
        self.0.get(part).is_some_and(|own| other.0.get(part) == Some(own))
    }
}

/// Inputs of a root disk.
pub fn root(root: &Root, engine: &[String], files: &Path) -> Result<Digest, RootfsError> {
    let mut stream = Stream::new("root");
    stream.add(&canonical(root));
    stream.add(&canonical(&engine));
    for entry in rootfs::entries(files)? {
        stream.add(entry.relative.as_os_str().as_encoded_bytes());
        match entry.kind {
            EntryKind::Dir => stream.add(b"directory"),
            EntryKind::Link(target) => stream.add(target.as_os_str().as_encoded_bytes()),
            EntryKind::File { executable } => {
                let (digest, _) = Digest::of_file(&files.join(&entry.relative))?;
                stream.add(if executable { b"program" } else { b"file" });
                stream.add(digest.as_str().as_bytes());
            }
        }
    }
    Ok(stream.finish())
}

/// Inputs of kernel and modules.
pub fn kernel(kernel: &Kernel) -> Digest {
    let mut stream = Stream::new("kernel");
    stream.add(&canonical(kernel));
    stream.finish()
}

/// Inputs of the initrd beside the modules.
pub fn agent(recipe: &Builder, agent: &[u8]) -> Digest {
    let mut stream = Stream::new("agent");
    stream.add(env!("CARGO_PKG_VERSION").as_bytes());
    stream.add(recipe.name.as_bytes());
    stream.add(agent);
    stream.finish()
}

/// Inputs of a base image's configuration.
pub fn image(name: &str, image: &crate::recipe::Image) -> Digest {
    let mut stream = Stream::new("image");
    stream.add(name.as_bytes());
    stream.add(&canonical(image));
    stream.finish()
}

/// Values with their lengths, so that no two lists of values look alike.
struct Stream(digest::Hashing<std::io::Sink>);

impl Stream {
    fn new(part: &str) -> Self {
        let mut stream = Self(digest::Hashing::new(std::io::sink()));
        stream.add(part.as_bytes());
        stream.add(&FORMAT.to_le_bytes());
        stream.add(&crate::tools::epoch().to_le_bytes());
        stream
    }

    fn add(&mut self, value: &[u8]) {
        let hashed = Sha256::digest(value);
        // A sink takes everything.
        let _ = self.0.write_all(&hashed);
    }

    fn finish(self) -> Digest {
        self.0.finish().0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn spec(extra: &str) -> Root {
        toml::from_str(&format!("suite = 'trixie'\npackages = ['a']\n{extra}")).unwrap()
    }

    #[test]
    fn every_input_of_a_root_counts_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let files = dir.path().join("files");
        let digest = |s: &Root| root(s, &[], &files).unwrap();
        let first = digest(&spec(""));
        assert_eq!(first, digest(&spec("# a comment")));
        assert_ne!(first, digest(&spec("exclude = ['/x']")));

        fs::create_dir_all(files.join("etc")).unwrap();
        let with_dir = digest(&spec(""));
        fs::write(files.join("etc/f"), "1").unwrap();
        let with_file = digest(&spec(""));
        fs::write(files.join("etc/f"), "2").unwrap();
        let changed = digest(&spec(""));
        fs::set_permissions(files.join("etc/f"), fs::Permissions::from_mode(0o755)).unwrap();
        let program = digest(&spec(""));
        let all = [&first, &with_dir, &with_file, &changed, &program];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{i}");
        }
        fs::set_permissions(files.join("etc/f"), fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(program, digest(&spec("")), "only the executable bit of a mode is an input");
    }

    #[test]
    fn parts_are_compared_one_by_one_and_survive_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let old = Inputs::default().with("root", Digest::of(b"r")).with("agent", Digest::of(b"1"));
        old.save(dir.path()).unwrap();
        let new = Inputs::default().with("root", Digest::of(b"r")).with("agent", Digest::of(b"2"));
        let old = Inputs::load(dir.path()).unwrap();
        assert!(new.same(&old, "root") && !new.same(&old, "agent") && !new.same(&old, "kernel"));
        assert_ne!(old, new);
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(Inputs::load(dir.path()), None);
    }
}
