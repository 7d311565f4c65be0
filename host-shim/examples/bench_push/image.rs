//! An image whose layers nobody has seen and nothing packs.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::Context;
use flate2::Compression;
use flate2::write::GzEncoder;
use kiln::staging::Digest;
use serde_json::{Value, json};

/// 128 MiB in layers as images have them: a large one, and smaller ones.
const LAYERS: [u64; 4] = [64 << 20, 32 << 20, 24 << 20, 8 << 20];
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Content with its digest.
pub struct Blob {
    pub digest: Digest,
    pub bytes: Vec<u8>,
}

impl Blob {
    fn of(bytes: Vec<u8>) -> Self {
        Self { digest: Digest::of(&bytes), bytes }
    }

    fn descriptor(&self, kind: &str) -> Value {
        json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": self.digest.to_string(),
            "size": self.bytes.len()})
    }
}

/// Layers, configuration and manifest.
pub struct Image {
    pub layers: Vec<Blob>,
    pub config: Blob,
    pub manifest: Blob,
}

impl Image {
    /// Another one each time. The layers are gzip's, stored: a client that looks has nothing to compress.
    pub fn fresh() -> anyhow::Result<Self> {
        let (mut layers, mut ids) = (vec![], vec![]);
        let mut random = File::open("/dev/urandom")?;
        for size in LAYERS {
            let mut content = vec![];
            Read::by_ref(&mut random).take(size).read_to_end(&mut content)?;
            ids.push(Digest::of(&content).to_string());
            let mut gzip = GzEncoder::new(Vec::new(), Compression::none());
            gzip.write_all(&content)?;
            layers.push(Blob::of(gzip.finish()?));
        }
        let config = json!({"architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": ids}});
        let config = Blob::of(config.to_string().into_bytes());
        let of_layers: Vec<_> = layers.iter().map(|l| l.descriptor("layer.v1.tar+gzip")).collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST,
            "config": config.descriptor("config.v1+json"), "layers": of_layers});
        let manifest = Blob::of(manifest.to_string().into_bytes());
        Ok(Self { layers, config, manifest })
    }

    /// All that it consists of.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        self.layers.iter().chain([&self.config, &self.manifest])
    }

    /// Writes it as an OCI layout, with the name `image`.
    pub fn layout(&self, dir: &Path) -> anyhow::Result<()> {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs)
            .with_context(|| format!("cannot make {}", dir.display()))?;
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        for blob in self.blobs() {
            std::fs::write(blobs.join(blob.digest.hex()), &blob.bytes)?;
        }
        let mut entry = self.manifest.descriptor("manifest.v1+json");
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": "image"});
        let index = json!({"schemaVersion": 2, "manifests": [entry]});
        Ok(std::fs::write(dir.join("index.json"), index.to_string())?)
    }
}
