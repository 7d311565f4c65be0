//! Sending sources as they are, and what a process costs.

#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::support::{Server, text};

/// How much more memory a large input may cost than a tiny one, on either side.
pub const MEMORY_ROOM: u64 = 32 << 20;

/// Posts an archive with more fields. The status, and the build or the problem.
pub fn post(server: &Server, archive: &Path, fields: &[(&str, &str)]) -> (u16, Value) {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "-w", "\n%{http_code}"])
        .args(["-H", &format!("Authorization: Bearer {}", server.token)])
        .args(["-F", &format!("source=@{}", archive.display())]);
    for (name, value) in fields {
        curl.args(["--form-string", &format!("{name}={value}")]);
    }
    let out = curl.arg(format!("http://{}/builds", server.address)).output().unwrap();
    let answer = text(out.stdout);
    assert!(out.status.success(), "{answer}{}", text(out.stderr));
    let (body, status) = answer.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), serde_json::from_str(body).unwrap())
}

/// Posts an archive that is accepted; the build's id.
pub fn accepted(server: &Server, archive: &[u8], fields: &[(&str, &str)]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), archive).unwrap();
    let (status, build) = post(server, file.path(), fields);
    assert_eq!(status, 202, "{build}");
    build["id"].as_str().unwrap().to_owned()
}

/// The server's own memory, from now on.
pub struct Memory {
    pid: u32,
    before: u64,
}

impl Memory {
    /// Forgets the peak so far.
    pub fn watch(pid: u32) -> Self {
        // 5 resets the peak (proc_pid_clear_refs(5)).
        std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
        Self { pid, before: peak(pid) }
    }

    /// By how much the peak has gone up.
    pub fn rise(&self) -> u64 {
        peak(self.pid).saturating_sub(self.before)
    }
}

fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// The most memory that the agent had in a build's VM.
pub fn agent_peak(build: &Value) -> u64 {
    build["usage"]["agent_memory_peak_bytes"].as_u64().unwrap_or_else(|| panic!("{build:#}"))
}

/// How far one peak is over another.
pub fn over(peak: u64, base: u64) -> String {
    let mib = |bytes: u64| format!("{}.{} MiB", bytes >> 20, ((bytes % (1 << 20)) * 10) >> 20);
    format!("{} over {}", mib(peak.saturating_sub(base)), mib(base))
}

/// Every path below a directory: what it is, and of files and links what is in them.
pub fn survey(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut look = vec![root.to_owned()];
    while let Some(dir) = look.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten() {
            let path = entry.unwrap().path();
            // Something that ends just now, such as the database's journal, is not there.
            let Ok(meta) = std::fs::symlink_metadata(&path) else { continue };
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            let kind = meta.file_type();
            let mut what = format!("{:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
            if kind.is_symlink() {
                write!(what, " -> {}", std::fs::read_link(&path).unwrap().display()).unwrap();
            } else if kind.is_dir() {
                look.push(path);
            } else if kind.is_file() {
                write!(what, " {} bytes, {} names", meta.len(), meta.nlink()).unwrap();
            } else {
                assert!(kind.is_socket() || kind.is_fifo(), "{name} is a device");
            }
            found.insert(name, what);
        }
    }
    found
}

/// What is in an image's layers: name to kind, mode, owner, and content or target.
pub fn image_entries(server: &Server, image: &str) -> BTreeMap<Vec<u8>, ImageEntry> {
    let dir = tempfile::tempdir().unwrap();
    let creds = format!("any:{}", server.token);
    let out = Command::new("skopeo")
        .args(["copy", "--quiet", "--src-tls-verify=false", "--src-creds", &creds])
        .arg(format!("docker://{image}"))
        .arg(format!("dir:{}", dir.path().display()))
        .output()
        .unwrap();
    assert!(out.status.success(), "{image}: {}", text(out.stderr));
    let manifest = std::fs::read(dir.path().join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let mut entries = BTreeMap::new();
    for layer in manifest["layers"].as_array().unwrap() {
        let digest = layer["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
        let packed = std::fs::read(dir.path().join(digest)).unwrap();
        let unpacked = super::archive::gunzip(&packed);
        let mut archive = tar::Archive::new(&unpacked[..]);
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            let target = entry.link_name_bytes().map(std::borrow::Cow::into_owned);
            let extensions = entry.pax_extensions().unwrap().into_iter().flatten();
            let keys = extensions.map(|extension| extension.unwrap().key().unwrap().to_owned());
            let xattrs = keys.filter(|key| key.contains("xattr")).collect();
            let header = entry.header();
            let found = ImageEntry {
                kind: header.entry_type(),
                mode: header.mode().unwrap() & 0o7777,
                owner: (header.uid().unwrap(), header.gid().unwrap()),
                content: target.unwrap_or(content),
                xattrs,
            };
            let name = entry.path_bytes().into_owned();
            let name = name.strip_suffix(b"/").map_or(name.clone(), <[u8]>::to_vec);
            entries.insert(name, found);
        }
    }
    entries
}

/// An entry of an image's layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageEntry {
    pub kind: tar::EntryType,
    pub mode: u32,
    pub owner: (u64, u64),
    /// A link's target.
    pub content: Vec<u8>,
    /// The keys of its extended attributes.
    pub xattrs: Vec<String>,
}
