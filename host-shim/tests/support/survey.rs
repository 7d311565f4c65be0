//! What a server, its builds and its instances have on the host, to be compared with what they had before.

#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::support::{Server, children_of};

/// For how long a client of the registry keeps a connection that it does not need: reqwest looks for those every 90 s, and
/// closes what was not used for as long; with a reserve.
const CONNECTION_KEPT: Duration = Duration::from_secs(200);

/// All that a VM could leave behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Survey {
    processes: usize,
    /// How many of each.
    descriptors: BTreeMap<String, usize>,
    sockets: BTreeSet<String>,
    mounts: Vec<String>,
    cgroups: BTreeSet<String>,
    /// Path and bytes of every file but the database, the log and the registry's images. The server's
    /// temporary files would be among them.
    files: BTreeSet<(String, u64)>,
    /// What the registry did not take as an image's part in the end.
    pub uploads: BTreeSet<(String, u64)>,
}

impl Survey {
    /// The next one that has no more open than an earlier one had. Fewer is no leftover.
    pub fn at_rest(server: &Server, before: &Self) -> Self {
        let begun = Instant::now();
        loop {
            let mut after = Self::of(server);
            if after
                .descriptors
                .iter()
                .all(|(what, count)| before.descriptors.get(what) >= Some(count))
            {
                after.descriptors.clone_from(&before.descriptors);
                return after;
            }
            if begun.elapsed() > CONNECTION_KEPT {
                return after;
            }
            // A connection that is closed for want of use tells nobody outside.
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    pub fn of(server: &Server) -> Self {
        let dir = server.data().parent().unwrap().to_owned();
        let lines = |file: &str| std::fs::read_to_string(file).unwrap();
        let mine = |line: &&str| line.contains(dir.to_str().unwrap());
        // vm_canary, which may run at the same time, mounts a file.
        let may_be_kilns = |line: &&str| !line.starts_with("/dev/loop");
        let mut files = BTreeSet::new();
        list(&dir, &mut files);
        let is_upload = |path: &str| path.contains("/registry/") && path.contains("/_uploads/");
        let uploads = files.iter().filter(|(path, _)| is_upload(path)).cloned().collect();
        let kept = |(path, _): &(String, u64)| {
            !path.contains("/registry/")
                && !path.contains("kiln.db")
                && !path.ends_with("serve.log")
        };
        files.retain(kept);
        Self {
            processes: children_of(server.pid()).len(),
            descriptors: descriptors(server.pid()),
            sockets: lines("/proc/net/unix").lines().filter(mine).map(path_of).collect(),
            mounts: lines("/proc/self/mounts")
                .lines()
                .filter(may_be_kilns)
                .map(str::to_owned)
                .collect(),
            cgroups: cgroups_of(server),
            files,
            uploads,
        }
    }
}

/// What a process has open, all sockets being one thing. The database is not among it: it has a writer and one or two
/// readers, as many as were ever needed at one time.
fn descriptors(pid: u32) -> BTreeMap<String, usize> {
    let mut open = BTreeMap::new();
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(Result::unwrap) {
        // One may be closed meanwhile.
        let Ok(target) = std::fs::read_link(fd.path()) else { continue };
        let target = target.display().to_string();
        let what = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind);
        if !what.contains("kiln.db") {
            *open.entry(what.to_owned()).or_default() += 1;
        }
    }
    open
}

fn path_of(line: &str) -> String {
    line.split_whitespace().last().unwrap().to_owned()
}

fn list(dir: &Path, into: &mut BTreeSet<(String, u64)>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(meta) = entry.metadata() else { continue };
        into.insert((
            entry.path().display().to_string(),
            if meta.is_dir() { 0 } else { meta.blocks() },
        ));
        if meta.is_dir() {
            list(&entry.path(), into);
        }
    }
}

/// Those of a server, its own and its VMs'.
fn cgroups_of(server: &Server) -> BTreeSet<String> {
    let name = Sha256::digest(server.data().as_os_str().as_encoded_bytes());
    let own = format!("/kiln/{}", hex::encode(&name[..6]));
    let found: BTreeSet<_> = cgroups().into_iter().filter(|path| path.contains(&own)).collect();
    assert!(!found.is_empty(), "there is no {own}");
    found
}

/// Every cgroup that has Kiln's name.
pub fn cgroups() -> BTreeSet<String> {
    walkdir(Path::new("/sys/fs/cgroup"), 4)
        .into_iter()
        .filter(|path| path.contains("kiln"))
        .collect()
}

fn walkdir(dir: &Path, depth: u32) -> Vec<String> {
    let mut found = vec![dir.display().to_string()];
    if depth > 0 {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.extend(walkdir(&entry.path(), depth - 1));
            }
        }
    }
    found
}
