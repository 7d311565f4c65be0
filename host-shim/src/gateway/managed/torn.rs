//! What a registry that was killed may leave: a file that was made and not written. It answers 500 for what such a file
//! links to, and takes an empty blob for the blob, for ever. Without the file it knows that it has nothing, and the next
//! push of it writes it.

use std::io;
use std::path::Path;

use nix::unistd::{Gid, Uid};

use super::child;

/// The directory of a blob is its digest, and of one kind of blob nothing is all of it.
const NOTHING: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Removes such files below `dir/storage` and returns how many, while no registry runs. As the registry's own user, who
/// may have put links there that lead elsewhere.
pub(super) fn remove(dir: &Path, identity: Option<(Uid, Gid)>) -> io::Result<usize> {
    let v2 = "./docker/registry/v2";
    let output = child::setpriv(identity)
        .current_dir(dir.join("storage"))
        .args(["find", ".", "-type", "f"])
        .args(["(", "-path", &format!("{v2}/blobs/*/data")])
        .args(["-o", "-path", &format!("{v2}/repositories/*/link"), ")"])
        .args(["!", "-path", &format!("*/{NOTHING}/data")])
        .args(["-empty", "-delete", "-printf", "."])
        .output()?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("find: {}", why.trim().escape_debug())));
    }
    Ok(output.stdout.len())
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
