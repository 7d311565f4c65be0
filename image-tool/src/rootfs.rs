//! A Debian root: made by mmdebstrap, filled with the recipe's files, cleaned, and packed as a disk
//! or as a tar archive.
//!
//! The root is untrusted enough to be opened by directory handle: `var/run` in it is an absolute
//! link, and following one would reach the host.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cap_std::ambient_authority;
use cap_std::fs::{Dir, Permissions, PermissionsExt as _};
use walkdir::WalkDir;

use crate::file::{self, FileError};
use crate::recipe::Root;
use crate::tools::{self, MKFS_EROFS, MMDEBSTRAP, TAR, ToolError};

/// Downloads at a modem's speed still fit; a mirror that hangs does not.
const BOOTSTRAP_LIMIT: Duration = Duration::from_mins(30);
/// A root of a few hundred MB takes seconds on a free machine, a minute on a busy one.
const PACK_LIMIT: Duration = Duration::from_mins(15);
/// A disk of the same bytes must be the same disk, so its id is fixed ("kiln" in ASCII at its end).
const EROFS_UUID: &str = "00000000-0000-4000-8000-00006b696c6e";

/// What mmdebstrap leaves of the host, of the moment, or of no use.
const LEFTOVERS: &[&str] = &[
    "etc/hostname",
    "etc/resolv.conf",
    "etc/passwd-",
    "etc/group-",
    "etc/shadow-",
    "etc/gshadow-",
    "etc/subuid-",
    "etc/subgid-",
    "var/cache/ldconfig/aux-cache",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/statoverride-old",
    "var/lib/dpkg/status-old",
];

/// A root could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A program failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A file of the recipe or of the result.
    #[error(transparent)]
    File(#[from] FileError),
    /// The recipe's `files/` has something that is no file, directory or link.
    #[error("{} is neither a file, a directory nor a symbolic link", .0.display())]
    SpecialFile(PathBuf),
    /// Something inside the root.
    #[error("cannot {operation} /{path} in the new root")]
    Inside {
        /// A verb.
        operation: &'static str,
        /// Inside the root.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A package that the recipe names is not in the root.
    #[error("the root has no package {0}, which the recipe lists under engine")]
    NoPackage(String),
}

/// Makes the root that the recipe describes in `dir`, which must not exist.
pub async fn bootstrap(root: &Root, files: &Path, dir: &Path) -> Result<(), RootfsError> {
    tools::run(MMDEBSTRAP, bootstrap_args(root, dir), None, BOOTSTRAP_LIMIT).await?;
    let inside = Dir::open_ambient_dir(dir, ambient_authority())
        .map_err(|e| FileError::new("open", dir, e))?;
    clean(&inside, &root.remove)?;
    install(files, &inside)?;
    Ok(())
}

fn bootstrap_args(root: &Root, dir: &Path) -> Vec<OsString> {
    let mut args: Vec<OsString> =
        ["--mode=root", "--format=directory", "--variant=minbase"].map(OsString::from).into();
    if !root.packages.is_empty() {
        args.push(format!("--include={}", root.packages.join(",")).into());
    }
    // dpkg's last match wins, so exceptions come after what they except.
    args.extend(root.exclude.iter().map(|p| format!("--dpkgopt=path-exclude={p}").into()));
    args.extend(root.include.iter().map(|p| format!("--dpkgopt=path-include={p}").into()));
    // No mirror: the machine's own configuration decides.
    args.extend([OsString::from(&root.suite), dir.into()]);
    args
}

fn clean(root: &Dir, more: &[String]) -> Result<(), RootfsError> {
    for path in LEFTOVERS {
        match root.remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(inside("remove", path, e)),
            _ => {}
        }
    }
    for path in more.iter().map(|p| p.trim_start_matches('/')) {
        // One that is not there is a recipe that has gone stale: say so.
        let kind = root.symlink_metadata(path).map_err(|e| inside("remove", path, e))?;
        let removed =
            if kind.is_dir() { root.remove_dir_all(path) } else { root.remove_file(path) };
        removed.map_err(|e| inside("remove", path, e))?;
    }
    Ok(())
}

/// Copies the recipe's `files/` over the root: owned by root, 0755 for directories and programs, 0644
/// for the rest, whatever the umask of the checkout was.
fn install(files: &Path, root: &Dir) -> Result<(), RootfsError> {
    for entry in entries(files)? {
        let relative = entry.relative.as_path();
        let name = || relative.display().to_string();
        match &entry.kind {
            EntryKind::Dir => {
                if !root.is_dir(relative) {
                    root.create_dir(relative).map_err(|e| inside("create", &name(), e))?;
                    root.set_permissions(relative, Permissions::from_mode(0o755))
                        .map_err(|e| inside("set the mode of", &name(), e))?;
                }
                continue;
            }
            EntryKind::Link(_) | EntryKind::File { .. } => match root.remove_file(relative) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(inside("replace", &name(), e));
                }
                _ => {}
            },
        }
        match entry.kind {
            EntryKind::Dir => {}
            EntryKind::Link(target) => {
                root.symlink_contents(target, relative).map_err(|e| inside("link", &name(), e))?;
            }
            EntryKind::File { executable } => {
                let mut input = file::open(&files.join(relative))?;
                let mut output = root.create(relative).map_err(|e| inside("create", &name(), e))?;
                io::copy(&mut input, &mut output).map_err(|e| inside("write", &name(), e))?;
                let mode = if executable { 0o755 } else { 0o644 };
                root.set_permissions(relative, Permissions::from_mode(mode))
                    .map_err(|e| inside("set the mode of", &name(), e))?;
            }
        }
    }
    Ok(())
}

/// Something in the recipe's `files/`.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it goes.
    pub relative: PathBuf,
    /// What it is.
    pub kind: EntryKind,
}

/// What an entry is.
#[derive(Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Dir,
    /// A file; of its mode only this counts.
    File {
        /// Whether its owner may execute it.
        executable: bool,
    },
    /// A symbolic link and its target.
    Link(PathBuf),
}

/// All of `files/`, parents first, in the same order everywhere. None when the directory is missing.
pub fn entries(files: &Path) -> Result<Vec<Entry>, RootfsError> {
    use std::os::unix::fs::PermissionsExt as _;
    if !files.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in WalkDir::new(files).min_depth(1).sort_by_file_name() {
        let entry = entry.map_err(|e| FileError::new("read", files, e.into()))?;
        let path = entry.path();
        let metadata = entry.metadata().map_err(|e| FileError::new("read", path, e.into()))?;
        let kind = if metadata.is_dir() {
            EntryKind::Dir
        } else if metadata.is_file() {
            EntryKind::File { executable: metadata.permissions().mode() & 0o100 != 0 }
        } else if metadata.is_symlink() {
            EntryKind::Link(path.read_link().map_err(|e| FileError::new("read", path, e))?)
        } else {
            return Err(RootfsError::SpecialFile(path.to_owned()));
        };
        let relative = path.strip_prefix(files).unwrap_or(path).to_owned();
        found.push(Entry { relative, kind });
    }
    Ok(found)
}

/// Packs a root as a compressed read-only disk.
pub async fn to_erofs(dir: &Path, disk: &Path) -> Result<(), RootfsError> {
    let args = vec![
        "--quiet".into(),
        "-zlz4hc".into(),
        format!("-T{}", tools::epoch()).into(),
        format!("-U{EROFS_UUID}").into(),
        disk.into(),
        dir.into(),
    ];
    Ok(tools::run(MKFS_EROFS, args, None, PACK_LIMIT).await?)
}

/// Packs a root as an uncompressed tar archive, without what is mounted over anyway.
pub async fn to_tar(dir: &Path, archive: File) -> Result<(), RootfsError> {
    let mut args: Vec<OsString> = [
        "--create",
        "--sort=name",
        "--numeric-owner",
        "--format=posix",
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
        "--xattrs",
        "--xattrs-include=*",
        "--exclude=./dev/*",
        "--exclude=./proc/*",
        "--exclude=./sys/*",
        "--exclude=./run/*",
    ]
    .map(OsString::from)
    .into();
    args.push(format!("--mtime=@{}", tools::epoch()).into());
    args.push(tools::with_path("--directory=", dir));
    args.push(".".into());
    Ok(tools::run(TAR, args, Some(archive), PACK_LIMIT).await?)
}

/// The versions of these packages, from dpkg's list in the root.
pub fn versions(dir: &Path, packages: &[String]) -> Result<BTreeMap<String, String>, RootfsError> {
    /// Debian's whole archive would fit.
    const MAX_STATUS: u64 = 256 * 1024 * 1024;
    let status = file::read_bounded(&dir.join("var/lib/dpkg/status"), MAX_STATUS)?;
    let installed = installed(&String::from_utf8_lossy(&status));
    let version = |name: &String| {
        let version = installed.get(name).ok_or_else(|| RootfsError::NoPackage(name.clone()))?;
        Ok((name.clone(), version.clone()))
    };
    packages.iter().map(version).collect()
}

/// Package → version of what dpkg's status file (deb822 paragraphs) lists as installed.
fn installed(status: &str) -> BTreeMap<String, String> {
    let paragraph = |text: &str| {
        let field = |name: &str| {
            text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": ")).map(str::to_owned)
        };
        let present = field("Status")?.ends_with(" installed");
        present.then_some((field("Package")?, field("Version")?))
    };
    status.split("\n\n").filter_map(paragraph).collect()
}

fn inside(operation: &'static str, path: &str, source: io::Error) -> RootfsError {
    RootfsError::Inside { operation, path: path.to_owned(), source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn root(text: &str) -> Root {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn the_command_line_is_as_expected() {
        let root = root(
            "suite = 'trixie'\npackages = ['buildah', 'crun']\nexclude = ['/a/*']\ninclude = ['/a/b']",
        );
        let args = bootstrap_args(&root, Path::new("/out/root"));
        assert_eq!(
            args,
            [
                "--mode=root",
                "--format=directory",
                "--variant=minbase",
                "--include=buildah,crun",
                "--dpkgopt=path-exclude=/a/*",
                "--dpkgopt=path-include=/a/b",
                "trixie",
                "/out/root"
            ]
        );
    }

    #[test]
    fn files_are_put_in_with_fixed_modes_and_without_leaving_the_root() {
        let temp = tempfile::tempdir().unwrap();
        let (files, target, host) =
            (temp.path().join("files"), temp.path().join("root"), temp.path().join("host"));
        fs::create_dir_all(files.join("etc/kiln")).unwrap();
        fs::create_dir_all(&host).unwrap();
        fs::create_dir_all(target.join("etc")).unwrap();
        fs::write(files.join("etc/kiln/conf"), "new").unwrap();
        fs::write(files.join("etc/prog"), "#!").unwrap();
        fs::set_permissions(files.join("etc/kiln/conf"), fs::Permissions::from_mode(0o600))
            .unwrap();
        fs::set_permissions(files.join("etc/prog"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink("/run/x", files.join("etc/link")).unwrap();
        symlink(host.join("conf"), target.join("etc/prog")).unwrap();
        let inside = Dir::open_ambient_dir(&target, ambient_authority()).unwrap();

        install(&files, &inside).unwrap();
        install(&files, &inside).unwrap();

        let mode =
            |p: &str| fs::symlink_metadata(target.join(p)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(
            (mode("etc/kiln/conf"), mode("etc/prog"), mode("etc/kiln")),
            (0o644, 0o755, 0o755)
        );
        assert_eq!(fs::read_to_string(target.join("etc/kiln/conf")).unwrap(), "new");
        assert_eq!(fs::read_link(target.join("etc/link")).unwrap(), Path::new("/run/x"));
        assert!(!host.join("conf").exists(), "a link of the root was followed to the host");

        // A directory of the root that is a link out of it is an error, not a way out.
        fs::create_dir_all(files.join("out")).unwrap();
        fs::write(files.join("out/f"), "x").unwrap();
        symlink(&host, target.join("out")).unwrap();
        install(&files, &inside).unwrap_err();
        assert!(!host.join("f").exists());
    }

    #[test]
    fn cleaning_removes_leftovers_and_reports_a_stale_recipe() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join("etc")).unwrap();
        fs::create_dir_all(temp.path().join("usr/share/big/deep")).unwrap();
        fs::write(temp.path().join("etc/hostname"), "host").unwrap();
        let inside = Dir::open_ambient_dir(temp.path(), ambient_authority()).unwrap();
        clean(&inside, &["/usr/share/big".to_owned()]).unwrap();
        assert!(
            !temp.path().join("etc/hostname").exists()
                && !temp.path().join("usr/share/big").exists()
        );
        let error = clean(&inside, &["/usr/share/big".to_owned()]).unwrap_err();
        assert_eq!(error.to_string(), "cannot remove /usr/share/big in the new root");
    }

    #[test]
    fn versions_are_those_of_installed_packages() {
        let status = "Package: buildah\nStatus: install ok installed\nVersion: 1.39.3+ds1-1+b4\nDescription: x\n Version: 9\n\n\
                      Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n\
                      Package: crun\nStatus: install ok installed\nVersion: 1.21-1\n";
        let found = installed(status);
        assert_eq!(found.get("buildah").map(String::as_str), Some("1.39.3+ds1-1+b4"));
        assert_eq!(found.keys().collect::<Vec<_>>(), ["buildah", "crun"]);

        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join("var/lib/dpkg")).unwrap();
        fs::write(temp.path().join("var/lib/dpkg/status"), status).unwrap();
        let error = versions(temp.path(), &["crun".into(), "gone".into()]).unwrap_err();
        assert!(error.to_string().contains("no package gone"));
    }
}
