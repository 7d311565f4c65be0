//! The source's lockfiles: lists of exact versions that package managers write.
//!
//! Their hashes go into the build's provenance, marked as what the guest says: the host never takes
//! a source apart.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use kiln_protocol::event::{Lockfile, MAX_LOCKFILE_PATH, MAX_LOCKFILES};
use sha2::{Digest, Sha256};

/// What package managers call them.
const NAMES: [&str; 24] = [
    "Cargo.lock",
    "Gemfile.lock",
    "Package.resolved",
    "Pipfile.lock",
    "bun.lock",
    "bun.lockb",
    "composer.lock",
    "conan.lock",
    "deno.lock",
    "flake.lock",
    "go.sum",
    "gradle.lockfile",
    "mix.lock",
    "npm-shrinkwrap.json",
    "package-lock.json",
    "packages.lock.json",
    "pdm.lock",
    "pnpm-lock.yaml",
    "poetry.lock",
    "pubspec.lock",
    "pylock.toml",
    "requirements.txt",
    "uv.lock",
    "yarn.lock",
];

/// Others' sources in the source.
const SKIPPED: [&str; 4] = [".git", "node_modules", "vendor", ".venv"];

/// Projects of a repository are rarely deeper.
const MAX_DEPTH: usize = 5;
/// Larger ones are none.
const MAX_SIZE: u64 = 64 << 20;

/// The lockfiles below a directory, by path. Links are not followed.
pub fn lockfiles(source: &Path) -> Vec<Lockfile> {
    let mut walk =
        walkdir::WalkDir::new(source).max_depth(MAX_DEPTH).sort_by_file_name().into_iter();
    let mut found = Vec::new();
    while let Some(entry) = walk.next() {
        let Ok(entry) = entry else { continue };
        let Some(name) = entry.file_name().to_str() else { continue };
        if entry.file_type().is_dir() {
            if entry.depth() > 0 && SKIPPED.contains(&name) {
                walk.skip_current_dir();
            }
            continue;
        }
        if !entry.file_type().is_file() || !NAMES.contains(&name) {
            continue;
        }
        let path = entry.path().strip_prefix(source).ok().and_then(Path::to_str);
        let Some(path) = path.filter(|path| path.len() <= MAX_LOCKFILE_PATH) else { continue };
        // Provenance is no reason to fail: what cannot be read is not listed.
        if let Ok(Some(sha256)) = hash(entry.path()) {
            found.push(Lockfile { path: path.to_owned(), sha256 });
        }
        if found.len() == MAX_LOCKFILES {
            break;
        }
    }
    found
}

fn hash(path: &Path) -> io::Result<Option<[u8; 32]>> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() > MAX_SIZE {
        return Ok(None);
    }
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    Ok(Some(hasher.finalize().into()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn they_are_found_by_name_and_hashed() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, name).unwrap();
        };
        for name in
            ["Cargo.lock", "web/package-lock.json", "web/node_modules/a/yarn.lock", "x.lock"]
        {
            put(name);
        }
        put("a/b/c/d/e/f/go.sum");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("uv.lock")).unwrap();
        std::fs::create_dir(dir.path().join("go.sum")).unwrap();
        let found = lockfiles(dir.path());
        let paths: Vec<_> = found.iter().map(|lockfile| lockfile.path.as_str()).collect();
        assert_eq!(paths, ["Cargo.lock", "web/package-lock.json"]);
        assert_eq!(found[0].sha256, <[u8; 32]>::from(Sha256::digest("Cargo.lock")));
    }

    #[test]
    fn their_number_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        for index in 0..=MAX_LOCKFILES {
            std::fs::create_dir(dir.path().join(index.to_string())).unwrap();
            std::fs::write(dir.path().join(index.to_string()).join("go.sum"), "").unwrap();
        }
        assert_eq!(lockfiles(dir.path()).len(), MAX_LOCKFILES);
    }
}
