//! `kiln serve --builder DIR`: the files of a bundle are measured before anything is served.

use std::path::Path;

use kiln_image::bundle;
use kiln_image::digest::Digest;

use super::*;

const FILES: [(&str, &str); 3] =
    [("kernel", "KERNEL"), ("initrd", "INITRD"), ("root.erofs", "ROOT")];

/// A whole bundle, as `kiln-image build` lays one out, of three small files.
fn whole(dir: &Path) {
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

/// The server's end, at a port that another has: a bundle that is believed gets it that far.
async fn start(builder: &Path) -> Output {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let data = tempfile::tempdir().unwrap();
    let dirs = ["--data-dir", text(data.path()), "--run-dir", text(data.path())];
    let args = [&["serve", "--listen", &address, "--builder", text(builder)][..], &dirs].concat();
    let mut command = kiln_at("http://127.0.0.1:1", &args);
    command.env_remove("RUST_LOG");
    output(command).await
}

#[tokio::test]
async fn a_bundle_is_measured_and_a_changed_file_of_it_is_named() {
    let dir = tempfile::tempdir().unwrap();
    whole(dir.path());
    let said = ["measured the builder bundle", "milliseconds=", "cannot listen on 127.0.0.1:"];
    ended(&start(dir.path()).await, 1, "", &said);

    for (name, data) in FILES {
        let path = dir.path().join(name);
        // The same length: only its digest tells.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, data.to_lowercase()).unwrap();
        let said = format!(
            "kiln: the builder bundle is not what it says: {} has digest {}, bundle.json says {}; \
             build or pull the bundle again",
            path.display(),
            Digest::of(data.to_lowercase().as_bytes()),
            Digest::of(data.as_bytes())
        );
        let output = start(dir.path()).await;
        ended(&output, 1, "", &[&said]);
        assert!(!stderr(&output).contains("cannot listen"), "{}", stderr(&output));
        std::fs::write(&path, data).unwrap();
    }
}
