//! What a registry that was killed may leave: a file that was made and not written. It answers 500 for what such a file
//! links to, and takes an empty blob for the blob, for ever. Without the file it knows that it has nothing, and the next
//! push of it writes it.
//!
//! What is to be looked for in all of its storage is looked for here, as its own user.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::process::Command;

use nix::unistd::{Gid, Uid};

use super::child;
use crate::staging::Digest;

/// The directory of a blob is its digest, and of one kind of blob nothing is all of it.
const NOTHING: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Removes such files below `dir/storage` and returns how many, while no registry runs. As the registry's own user, who
/// may have put links there that lead elsewhere.
pub(super) fn remove(dir: &Path, identity: Option<(Uid, Gid)>) -> io::Result<usize> {
    let v2 = "./docker/registry/v2";
    let mut find = find(dir, identity);
    find.args([".", "-type", "f"])
        .args(["(", "-path", &format!("{v2}/blobs/*/data")])
        .args(["-o", "-path", &format!("{v2}/repositories/*/link"), ")"])
        .args(["!", "-path", &format!("*/{NOTHING}/data")])
        .args(["-empty", "-delete", "-printf", "."]);
    Ok(output(find)?.len())
}

/// The manifests that some repository has, while a registry may run: those that have a link of their own.
pub(super) fn manifests(dir: &Path, identity: Option<(Uid, Gid)>) -> io::Result<HashSet<Digest>> {
    let mut find = find(dir, identity);
    // Layers and uploads have links, too, and more of them. No part of a repository's name begins like this.
    find.args(["./docker/registry/v2/repositories", "-ignore_readdir_race"])
        .args(["-type", "d", "(", "-name", "_layers", "-o", "-name", "_uploads", ")", "-prune"])
        .args(["-o", "-type", "f", "-path", "*/_manifests/revisions/sha256/*/link"])
        .args(["-printf", "%h\\n"]);
    let output = output(find)?;
    let directories = String::from_utf8_lossy(&output);
    let hex = directories.lines().filter_map(|path| path.rsplit('/').next());
    Ok(hex.filter_map(|hex| Digest::parse(&format!("sha256:{hex}")).ok()).collect())
}

fn find(dir: &Path, identity: Option<(Uid, Gid)>) -> Command {
    let mut command = child::setpriv(identity);
    command.current_dir(dir.join("storage")).arg("find");
    command
}

fn output(mut find: Command) -> io::Result<Vec<u8>> {
    let output = find.output()?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("find: {}", why.trim().escape_debug())));
    }
    Ok(output.stdout)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_and_not_written_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let v2 = dir.path().join("storage/docker/registry/v2");
        let file = |path: String, content: &str| {
            let path = v2.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, content).unwrap();
            path
        };
        let repo = "repositories/dev/blobs/app";
        let torn = [
            file(format!("{repo}/_manifests/revisions/sha256/aa/link"), ""),
            file(format!("{repo}/_manifests/tags/v1/current/link"), ""),
            file("blobs/sha256/aa/aa11/data".into(), ""),
        ];
        let whole = [
            file(format!("{repo}/_layers/sha256/bb/link"), "sha256:bb"),
            // An upload that has just begun.
            file(format!("{repo}/_uploads/1/data"), ""),
            file("blobs/sha256/bb/bb11/data".into(), "{}"),
            file(format!("blobs/sha256/e3/{NOTHING}/data"), ""),
        ];
        let elsewhere = tempfile::tempdir().unwrap();
        let outside = elsewhere.path().join("link");
        std::fs::write(&outside, "").unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), v2.join("repositories/dev/out")).unwrap();
        assert_eq!(remove(dir.path(), None).unwrap(), torn.len());
        assert!(torn.iter().all(|path| !path.exists()));
        assert!(whole.iter().all(|path| path.exists()) && outside.exists());
        assert_eq!(remove(dir.path(), None).unwrap(), 0);
    }
}
