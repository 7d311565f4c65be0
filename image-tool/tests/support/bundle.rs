//! A small bundle.

use std::fs;
use std::path::Path;

use kiln_image::bundle::{self, AgentInfo, FileInfo, Files, KernelInfo, Manifest};
use kiln_image::digest::Digest;
use kiln_protocol::version::VersionRange;

/// Larger than one chunk, so that streaming is really streaming.
pub const ROOT_SIZE: usize = 2 * 256 * 1024 + 17;

/// Writes one into a directory.
pub fn sample(dir: &Path, protocol: VersionRange) -> Digest {
    fs::write(dir.join("kernel"), "KERNEL").unwrap();
    fs::write(dir.join("initrd"), "INITRD").unwrap();
    fs::write(dir.join("root.erofs"), vec![b'r'; ROOT_SIZE]).unwrap();
    let info = |name: &str| FileInfo::of(&dir.join(name)).unwrap();
    let files = Files { kernel: info("kernel"), initrd: info("initrd"), root: info("root.erofs") };
    let manifest = Manifest {
        schema: bundle::SCHEMA,
        name: "builder".into(),
        identity: format!("builder@{}", files.root.digest),
        architecture: "amd64".into(),
        suite: "trixie".into(),
        protocol,
        agent: AgentInfo { version: "0.1.0".into(), digest: Digest::of(b"AGENT") },
        kernel: KernelInfo {
            release: "6.1".into(),
            version: None,
            suite: "bookworm".into(),
            modules: Vec::new(),
        },
        engine: [("buildah".into(), "1.39.3".into())].into(),
        files,
        created: None,
    };
    bundle::write(dir, &manifest).unwrap()
}
