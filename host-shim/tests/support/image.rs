//! What is in a published image, as text that can be compared.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::Server;

/// An image that was copied out of the registry.
pub struct Image {
    dir: tempfile::TempDir,
    /// The digests of its layers, the lowest first.
    pub layers: Vec<String>,
    /// The whole configuration.
    pub config: Value,
}

impl Image {
    /// Copies `HOST:PORT/REPOSITORY@DIGEST` from a server's registry.
    pub fn copy(server: &Server, image: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let creds = format!("any:{}", server.token);
        let out = Command::new("skopeo")
            .args(["copy", "--quiet", "--src-tls-verify=false", "--src-creds", &creds])
            .arg(format!("docker://{image}"))
            .arg(format!("dir:{}", dir.path().display()))
            .output()
            .unwrap();
        assert!(out.status.success(), "{image}: {}", String::from_utf8_lossy(&out.stderr));
        let manifest = json(&dir.path().join("manifest.json"));
        let digest = |value: &Value| {
            value["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned()
        };
        let layers = manifest["layers"].as_array().unwrap().iter().map(digest).collect();
        let config = json(&dir.path().join(digest(&manifest["config"])));
        Self { dir, layers, config }
    }

    /// Publishes it as `dev/NAME` with one more value in its configuration, as an image that was built elsewhere has it.
    pub fn publish_with(&self, server: &Server, name: &str, field: &str, value: Value) {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        let mut config = self.config.clone();
        config["config"][field] = value;
        let config = serde_json::to_vec(&config).unwrap();
        let digest = hex::encode(Sha256::digest(&config));
        std::fs::write(dir.path().join(&digest), &config).unwrap();
        let path = dir.path().join("manifest.json");
        let mut manifest = json(&path);
        manifest["config"]["digest"] = format!("sha256:{digest}").into();
        manifest["config"]["size"] = config.len().into();
        std::fs::write(path, manifest.to_string()).unwrap();
        let creds = format!("any:{}", server.token);
        let out = Command::new("skopeo")
            .args(["copy", "--quiet", "--dest-tls-verify=false", "--dest-creds", &creds])
            .arg(format!("dir:{}", dir.path().display()))
            .arg(format!("docker://{}/dev/{name}:latest", server.address))
            .output()
            .unwrap();
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// What the image is run with, and every entry of the layers that `base` does not have.
    pub fn describe(&self, base: &Image) -> String {
        let over_base = self.layers.starts_with(&base.layers);
        let skipped = if over_base { base.layers.len() } else { 0 };
        let mut text = serde_json::to_string_pretty(&self.run_config()).unwrap();
        let base = if over_base { "the base" } else { "nothing" };
        let added = self.layers.len() - skipped;
        let part = |name| self.config[name].as_str().unwrap_or("unknown");
        let platform = format!("{}/{}", part("os"), part("architecture"));
        let variant = self.config["variant"].as_str().map(|variant| format!("/{variant}"));
        write!(text, "\n\nplatform {platform}{}\n", variant.unwrap_or_default()).unwrap();
        writeln!(text, "layers over {base}: {added}").unwrap();
        for line in self.entries(skipped).into_values() {
            writeln!(text, "{line}").unwrap();
        }
        text
    }

    /// Whether these bytes are anywhere in it: manifest, configuration, history, or a layer as it is unpacked.
    pub fn holds(&self, bytes: &[u8]) -> bool {
        let within = |content: &[u8]| content.windows(bytes.len()).any(|window| window == bytes);
        std::fs::read_dir(self.dir.path()).unwrap().any(|entry| {
            let content = std::fs::read(entry.unwrap().path()).unwrap();
            let mut unpacked = vec![];
            match content[..] {
                [0x1f, 0x8b, ..] => {
                    let mut layer = flate2::read::MultiGzDecoder::new(&content[..]);
                    layer.read_to_end(&mut unpacked).unwrap();
                }
                [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                    unpacked = zstd::decode_all(&content[..]).unwrap();
                }
                _ => {}
            }
            within(&content) || within(&unpacked)
        })
    }

    /// The configuration without what differs from build to build, and without what says nothing.
    fn run_config(&self) -> Value {
        let mut config = self.config["config"].clone();
        if let Some(fields) = config.as_object_mut() {
            fields.retain(|name, value| {
                let empty = value.is_null()
                    || value == false
                    || value == ""
                    || value.as_array().is_some_and(Vec::is_empty)
                    || value.as_object().is_some_and(serde_json::Map::is_empty);
                !empty && name != "Image" && name != "Hostname"
            });
        }
        config
    }

    fn entries(&self, skipped: usize) -> BTreeMap<Vec<u8>, String> {
        let mut entries = BTreeMap::new();
        for layer in &self.layers[skipped..] {
            let file = std::fs::File::open(self.dir.path().join(layer)).unwrap();
            let mut tar = tar::Archive::new(flate2::read::MultiGzDecoder::new(file));
            for entry in tar.entries().unwrap() {
                let mut entry = entry.unwrap();
                let name = entry.path_bytes().into_owned();
                let line = describe_entry(&mut entry);
                entries.insert(name, line);
            }
        }
        entries
    }
}

fn describe_entry(entry: &mut tar::Entry<'_, impl std::io::Read>) -> String {
    let header = entry.header();
    let kind = match header.entry_type() {
        tar::EntryType::Regular => '-',
        tar::EntryType::Directory => 'd',
        tar::EntryType::Symlink => 'l',
        tar::EntryType::Link => 'h',
        tar::EntryType::Fifo => 'p',
        tar::EntryType::Char => 'c',
        tar::EntryType::Block => 'b',
        other => panic!("an entry of type {other:?}"),
    };
    let mode = header.mode().unwrap() & 0o7777;
    let (uid, gid) = (header.uid().unwrap(), header.gid().unwrap());
    let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
    let mut line = format!("{kind}{mode:04o} {uid}:{gid} /{name}");
    if let Some(target) = entry.link_name_bytes() {
        write!(line, " -> {}", String::from_utf8_lossy(&target)).unwrap();
    }
    if kind == '-' {
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        match String::from_utf8(content) {
            Ok(short) if short.len() <= 400 => write!(line, " {short:?}").unwrap(),
            Ok(long) => write!(line, " {}", hash(long.as_bytes())).unwrap(),
            // A program of the machine's: another one after an update.
            Err(_) => line.push_str(" (binary)"),
        }
    }
    line
}

fn hash(bytes: &[u8]) -> String {
    format!("{} bytes, sha256 {}", bytes.len(), hex::encode(Sha256::digest(bytes)))
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}
