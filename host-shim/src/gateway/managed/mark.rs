//! Which blobs nothing refers to, as docker-registry itself says: it reads its storage as it wrote it, and knows every kind of
//! manifest that it takes. It is asked for a dry run and removes nothing.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Command;

use super::child;
use super::files::Files;
use crate::staging::Digest;

/// What it says of one.
const ELIGIBLE: &str = "blob eligible for deletion: ";
/// Longest line that is read; a repository's name has 255 bytes.
const MAX_LINE: u64 = 4096;
/// How much of its complaints is repeated.
const MAX_COMPLAINT: u64 = 1024;

/// The blobs that no manifest of any repository refers to. No manifest may come or go meanwhile.
pub(super) async fn unreferenced(program: &Path, files: &Files) -> io::Result<Vec<Digest>> {
    let mut command = Command::from(child::setpriv(files.identity));
    command
        .arg(program)
        .args(["garbage-collect", "--dry-run", "config.yml"])
        .current_dir(files.dir())
        .env_clear()
        .env("PATH", child::PATH)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut process = command.spawn()?;
    let (Some(output), Some(mut errors)) = (process.stdout.take(), process.stderr.take()) else {
        return Err(io::Error::other("it has no output"));
    };
    let complaints = tokio::spawn(async move {
        let mut text = Vec::new();
        let _ = (&mut errors).take(MAX_COMPLAINT).read_to_end(&mut text).await;
        // What does not fit is read all the same, or it would wait.
        let _ = tokio::io::copy(&mut errors, &mut tokio::io::sink()).await;
        text
    });
    let (mut list, mut output) = (List::default(), BufReader::new(output));
    let mut line = String::new();
    while (&mut output).take(MAX_LINE).read_line(&mut line).await? > 0 {
        list.line(line.trim_end());
        line.clear();
    }
    let status = process.wait().await?;
    let complaints = complaints.await.unwrap_or_default();
    if !status.success() {
        let why = String::from_utf8_lossy(&complaints);
        return Err(io::Error::other(format!("{status}: {}", why.trim().escape_debug())));
    }
    list.whole()
}

/// Its output, line by line.
#[derive(Debug, Default)]
struct List {
    digests: HashSet<Digest>,
    /// How many it says that there are.
    said: Option<usize>,
}

impl List {
    fn line(&mut self, line: &str) {
        if let Some(digest) = line.strip_prefix(ELIGIBLE) {
            // What is none of Kiln's kind stays.
            self.digests.extend(Digest::parse(digest));
        } else if let Some((_, rest)) = line.split_once(" blobs marked, ")
            && let Some((number, _)) = rest.split_once(" blobs and ")
        {
            self.said = number.parse().ok();
        }
    }

    /// Everything that it has said, if that is all of it.
    fn whole(self) -> io::Result<Vec<Digest>> {
        let said = self.said.ok_or_else(|| io::Error::other("it did not come to its end"))?;
        if self.digests.len() > said {
            return Err(io::Error::other("its output is not understood"));
        }
        Ok(self.digests.into_iter().collect())
    }
}

/// Every digest that stands in a manifest, of whatever kind it is: what it refers to is among them.
pub(super) fn digests_in(manifest: &[u8]) -> HashSet<Digest> {
    let text = String::from_utf8_lossy(manifest);
    let after = text.split("sha256:").skip(1).filter_map(|rest| rest.get(..64));
    after.filter_map(|hex| Digest::parse(&format!("sha256:{hex}")).ok()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn read(output: &str) -> io::Result<Vec<Digest>> {
        let mut list = List::default();
        output.lines().for_each(|line| list.line(line));
        let mut digests = list.whole()?;
        digests.sort_by_key(Digest::hex);
        Ok(digests)
    }

    #[test]
    fn only_what_it_says_to_its_end_counts() {
        let (a, b) = (Digest::of(b"3"), Digest::of(b"1"));
        let output = format!(
            "dev/app\ndev/app: marking manifest {a} \ndev/app: marking blob {b}\n\n\
             2 blobs marked, 2 blobs and 0 manifests eligible for deletion\n\
             blob eligible for deletion: {a}\nblob eligible for deletion: {b}\n"
        );
        let mut both = vec![a, b];
        both.sort_by_key(Digest::hex);
        assert_eq!(read(&output).unwrap(), both);
        let half = output.replace("blobs marked", "blobs");
        assert!(read(&half).is_err());
        assert_eq!(read("0 blobs marked, 0 blobs and 0 manifests eligible").unwrap(), []);
        let odd =
            "0 blobs marked, 1 blobs and 0 manifests\nblob eligible for deletion: sha256:../x\n";
        assert_eq!(read(odd).unwrap(), []);
    }

    #[test]
    fn digests_are_found_wherever_they_stand() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let manifest =
            format!("{{\"layers\":[{{\"digest\":\"{a}\"}}],\"x\":\"{b}\",\"y\":\"sha256:é\"}}");
        assert_eq!(digests_in(manifest.as_bytes()), HashSet::from([a, b]));
        assert_eq!(digests_in(b"sha256:"), HashSet::new());
    }
}
