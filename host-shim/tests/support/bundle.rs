//! A bundle for servers whose VMs are never to start.

use std::path::Path;

use kiln_image::bundle;
use kiln_image::digest::Digest;
use serde_json::json;

pub const FILES: [(&str, &str); 3] =
    [("kernel", "KERNEL"), ("initrd", "INITRD"), ("root.erofs", "ROOT")];

/// A whole bundle, as `kiln-image build` lays one out, of three small files.
pub fn whole(dir: &Path) {
    let mut files = serde_json::Map::new();
    for (name, data) in FILES {
        std::fs::write(dir.join(name), data).unwrap();
        let info = json!({"digest": Digest::of(data.as_bytes()), "size": data.len()});
        files.insert(name.into(), info);
    }
    let manifest = json!({
        "schema": 1, "name": "builder", "identity": "builder@x", "architecture": "amd64", "suite": "trixie",
        "protocol": {"min": 1, "max": 1},
        "agent": {"version": "0.1.0", "digest": Digest::of(b"AGENT")},
        "kernel": {"release": "6.1.0", "suite": "bookworm", "modules": []},
        "engine": {}, "files": files,
    });
    bundle::write(dir, &serde_json::from_value(manifest).unwrap()).unwrap();
}
