//! Images made by hand: layers of any bytes, in a layout that is right or is not.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_image::digest::Digest;
use kiln_image::layout::{Writer, canonical};
use serde_json::{Value, json};
use tar::{EntryType, Header};

/// A tar archive being written, entry by entry, with no checks at all.
#[derive(Clone, Default)]
pub struct Layer(pub Vec<u8>);

/// Of all entries unless it is set.
pub const TIME: u64 = 1_600_000_000;

impl Layer {
    /// Any header and data; padded.
    pub fn raw(mut self, header: &Header, data: &[u8]) -> Self {
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.raw(&header(name, EntryType::Regular, data.len() as u64), data)
    }

    pub fn dir(self, name: &str) -> Self {
        self.raw(&header(name, EntryType::Directory, 0), b"")
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(&linking(name, EntryType::Symlink, target), b"")
    }

    pub fn link(self, name: &str, target: &str) -> Self {
        self.raw(&linking(name, EntryType::Link, target), b"")
    }

    /// An extended header for the next entry.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let data = pax_records(records);
        self.raw(&header("pax", EntryType::XHeader, data.len() as u64), &data)
    }

    /// A last entry and the end of the archive.
    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub fn pax_records(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length += 1;
        }
        data.extend_from_slice(format!("{length} {key}=").as_bytes());
        data.extend_from_slice(value);
        data.push(b'\n');
    }
    data
}

/// A header whose name may be anything that fits.
pub fn header(name: &str, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(TIME);
    header.set_size(size);
    header.set_cksum();
    header
}

pub fn linking(name: &str, kind: EntryType, target: &str) -> Header {
    let mut header = header(name, kind, 0);
    header.as_mut_bytes()[157..157 + target.len()].copy_from_slice(target.as_bytes());
    header.set_cksum();
    header
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

/// What a layout may lie about.
pub struct Spec {
    pub layers: Vec<(Vec<u8>, Compression)>,
    pub config: Value,
    /// Changes to the finished configuration and manifest.
    pub edit: fn(&mut Value, &mut Value),
}

impl Spec {
    pub fn new(layers: Vec<Vec<u8>>) -> Self {
        let layers = layers.into_iter().map(|layer| (layer, Compression::Gzip)).collect();
        Self { layers, config: json!({}), edit: |_, _| () }
    }

    /// Writes the layout; gives the manifest's digest.
    pub fn write(self, dir: &Path) -> Digest {
        let writer = Writer::create(dir).unwrap();
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for (layer, compression) in self.layers {
            diff_ids.push(Digest::of(&layer));
            let (bytes, suffix) = compress(&layer, compression);
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
            layers.push(writer.add_bytes(&media_type, &bytes).unwrap().to_json());
        }
        let mut config = json!({
            "architecture": kiln_image::disk::host_architecture(), "os": "linux", "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let mut manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": layers,
        });
        (self.edit)(&mut config, &mut manifest);
        let media_type = "application/vnd.oci.image.config.v1+json";
        let config = writer.add_bytes(media_type, &canonical(&config)).unwrap();
        if manifest.get("config").is_none() {
            manifest["config"] = config.to_json();
        }
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = writer.add_bytes(media_type, &canonical(&manifest)).unwrap();
        writer.finish(&manifest, &json!({})).unwrap();
        manifest.digest
    }
}

pub fn compress(bytes: &[u8], compression: Compression) -> (Vec<u8>, &'static str) {
    match compression {
        Compression::None => (bytes.to_vec(), ""),
        Compression::Gzip => {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut out, bytes).unwrap();
            (out.finish().unwrap(), "+gzip")
        }
        Compression::Zstd => (zstd::encode_all(bytes, 1).unwrap(), "+zstd"),
    }
}

/// A place with a layout of these layers.
pub fn layout(layers: Vec<Vec<u8>>) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    fs::create_dir(&layout).unwrap();
    Spec::new(layers).write(&layout);
    (dir, layout)
}
