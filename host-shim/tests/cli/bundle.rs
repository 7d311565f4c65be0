//! `kiln serve --builder DIR`: the files of a bundle are measured before anything is served.

use std::path::Path;

use kiln_image::digest::Digest;

use super::small_bundle::{FILES, whole};
use super::*;

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
