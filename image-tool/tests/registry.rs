//! Publishing, inspecting, verifying and pulling, against a real registry.
#![allow(clippy::unwrap_used, clippy::pedantic, missing_docs)]

mod support;

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use kiln_image::bundle::Bundle;
use kiln_image::digest::Digest;
use kiln_image::publish::{PublishError, Published, pinned, push_layout};
use kiln_image::pull::{PullError, pull_bundle};
use kiln_image::registry::{Options, RegistryError, parse_reference};
use kiln_image::verify::{inspect_ref, verify_ref};
use kiln_protocol::version::{SUPPORTED, Version, VersionRange};
use support::bundle::{ROOT_SIZE, sample};
use support::{CREDS, Registry};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

/// TLS is not used here, but the client wants a provider.
fn provider() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

fn plain(creds: Option<(&str, &str)>) -> Options {
    let creds = creds.map(|(user, password)| (user.to_owned(), password.to_owned()));
    Options { plain_http: true, creds, bearer: None }
}

/// Not the developer's own configuration; a registry without authentication ignores them.
fn anonymous() -> Options {
    plain(Some(("nobody", "")))
}

#[tokio::test]
async fn a_bundle_is_published_once_and_pulled_byte_by_byte() {
    provider();
    let registry = Registry::start(false).await;
    let dir = tempfile::tempdir().unwrap();
    let digest = sample(dir.path(), SUPPORTED);
    let reference = parse_reference(&format!("{}/kiln/builder:v1", registry.host)).unwrap();
    let options = anonymous();

    let lines = Mutex::new(Vec::new());
    let note = |line: &str| lines.lock().unwrap().push(line.to_owned());
    let first = push_layout(dir.path(), &reference, &options, &note).await.unwrap();
    assert_eq!(first, Published { digest: digest.clone(), sent: 4, skipped: 0 });
    assert!(lines.lock().unwrap().contains(&format!("root.erofs: sending {ROOT_SIZE} bytes")));
    let second = push_layout(dir.path(), &reference, &options, &|_| ()).await.unwrap();
    assert_eq!(second, Published { digest: digest.clone(), sent: 0, skipped: 4 });

    let image = inspect_ref(&reference, &options).await.unwrap();
    assert_eq!(image.digest, digest);
    assert_eq!(image.bundle().unwrap().unwrap().name, "builder");
    assert_eq!(verify_ref(&reference, &options).await.unwrap(), digest);

    // By digest too, into an empty place; then nothing is left to do.
    let out = dir.path().join("pulled");
    let by_digest = parse_reference(&pinned(&reference, &digest)).unwrap();
    let bundle = pull_bundle(&by_digest, &options, &out).await.unwrap();
    assert_eq!(bundle.digest, digest);
    bundle.verify().unwrap();
    for name in ["kernel", "initrd", "root.erofs", "bundle.json"] {
        assert!(
            fs::read(out.join(name)).unwrap() == fs::read(dir.path().join(name)).unwrap(),
            "{name}"
        );
    }
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let before = inode(&bundle.root);
    let again = pull_bundle(&reference, &options, &out).await.unwrap();
    assert_eq!(inode(&again.root), before, "an undamaged bundle was loaded again");
    fs::write(&bundle.root, vec![b'x'; ROOT_SIZE]).unwrap();
    pull_bundle(&reference, &options, &out).await.unwrap().verify().unwrap();
}

#[tokio::test]
async fn wrong_credentials_are_refused_and_right_ones_work() {
    provider();
    let registry = Registry::start(true).await;
    let dir = tempfile::tempdir().unwrap();
    let digest = sample(dir.path(), SUPPORTED);
    let reference = parse_reference(&format!("{}/builder:v1", registry.host)).unwrap();

    let wrong = plain(Some((CREDS.0, "guess")));
    let error = push_layout(dir.path(), &reference, &wrong, &|_| ()).await.unwrap_err();
    let PublishError::Registry(RegistryError::Refused { registry: host, .. }) = &error else {
        panic!("{error}");
    };
    assert_eq!(host, &registry.host);
    assert!(error.to_string().contains("--creds"), "{error}");
    assert!(!error.to_string().contains("guess"), "{error}");

    let right = plain(Some(CREDS));
    push_layout(dir.path(), &reference, &right, &|_| ()).await.unwrap();
    assert_eq!(verify_ref(&reference, &right).await.unwrap(), digest);
    inspect_ref(&reference, &wrong).await.unwrap_err();
}

/// Through the program, whose environment can be set: a file with credentials, none, and a broken one.
#[tokio::test]
async fn dockers_configuration_is_used() {
    provider();
    let dir = tempfile::tempdir().unwrap();
    let (layout, docker) = (dir.path().join("layout"), dir.path().join("docker"));
    fs::create_dir(&layout).unwrap();
    let digest = sample(&layout, SUPPORTED);
    let publish = async |registry: &Registry| {
        let reference = format!("{}/builder:v1", registry.host);
        let (layout, docker) = (layout.clone(), docker.clone());
        let run = move || {
            let mut command = assert_cmd::Command::cargo_bin("kiln-image").unwrap();
            command.arg("publish").arg(layout).args([&reference, "--plain-http"]);
            command.env("DOCKER_CONFIG", docker).env_remove("KILN_IMAGE_CREDS").output().unwrap()
        };
        tokio::task::spawn_blocking(run).await.unwrap()
    };
    let open = Registry::start(false).await;
    let output = publish(&open).await;
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(printed, format!("{}/builder@{digest}\n", open.host));

    let closed = Registry::start(true).await;
    assert_eq!(publish(&closed).await.status.code(), Some(1), "no credentials");
    fs::create_dir(&docker).unwrap();
    // base64 of `kiln:secret`.
    let config = format!(r#"{{"auths": {{"{}": {{"auth": "a2lsbjpzZWNyZXQ="}}}}}}"#, closed.host);
    fs::write(docker.join("config.json"), config).unwrap();
    assert_eq!(publish(&closed).await.status.code(), Some(0));
    fs::write(docker.join("config.json"), "{").unwrap();
    let said = String::from_utf8(publish(&open).await.stderr).unwrap();
    assert!(said.contains("config.json is of no use"), "{said}");
}

#[tokio::test]
async fn what_is_not_there_is_called_that() {
    provider();
    let registry = Registry::start(false).await;
    let reference = parse_reference(&format!("{}/nothing:here", registry.host)).unwrap();
    let error = inspect_ref(&reference, &anonymous()).await.unwrap_err().to_string();
    assert!(error.contains("does not have what is needed to read the manifest"), "{error}");
}

#[tokio::test]
async fn a_bundle_of_another_protocol_is_not_pulled_and_a_digest_must_fit() {
    provider();
    let registry = Registry::start(false).await;
    let dir = tempfile::tempdir().unwrap();
    let digest = sample(dir.path(), VersionRange { min: Version(70), max: Version(71) });
    let reference = parse_reference(&format!("{}/builder:v70", registry.host)).unwrap();
    let options = anonymous();
    push_layout(dir.path(), &reference, &options, &|_| ()).await.unwrap();
    let out = dir.path().join("pulled");
    let error = pull_bundle(&reference, &options, &out).await.unwrap_err();
    assert!(matches!(error, PullError::Verify(_)), "{error}");
    assert!(error.to_string().contains("speaks protocol v70 to v71"), "{error}");
    assert!(!out.exists());
    verify_ref(&reference, &options).await.unwrap_err();

    let other = parse_reference(&pinned(&reference, &Digest::of(b"other"))).unwrap();
    let error = push_layout(dir.path(), &other, &options, &|_| ()).await.unwrap_err();
    assert!(matches!(error, PublishError::OtherDigest { .. }), "{error}");
    let own = parse_reference(&pinned(&reference, &digest)).unwrap();
    push_layout(dir.path(), &own, &options, &|_| ()).await.unwrap();
}

/// The first connections break at different places; the rest reach the registry.
#[tokio::test]
async fn broken_connections_are_tried_again() {
    provider();
    let registry = Registry::start(false).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let behind = registry.host.clone();
    let broken = tokio::spawn(async move {
        let mut seen = 0;
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            seen += 1;
            match seen {
                // Closed before anything was read.
                1 => drop(client),
                // Closed after a part of the request.
                2 => drop(client.read(&mut [0; 16]).await),
                // An answer that says: later.
                3 => {
                    let _ = client.read(&mut [0; 4096]).await;
                    let answer =
                        b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                    client.write_all(answer).await.unwrap();
                }
                _ => {
                    let mut server = TcpStream::connect(&behind).await.unwrap();
                    tokio::spawn(async move { copy_bidirectional(&mut client, &mut server).await });
                }
            }
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let digest = sample(dir.path(), SUPPORTED);
    let reference = parse_reference(&format!("{host}/builder:v1")).unwrap();
    let published = push_layout(dir.path(), &reference, &anonymous(), &|_| ()).await.unwrap();
    assert_eq!(published.digest, digest);
    broken.abort();
}

#[tokio::test]
async fn a_damaged_blob_is_not_published() {
    provider();
    let registry = Registry::start(false).await;
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path(), SUPPORTED);
    // The same size, other bytes: only the registry's own check can see it.
    fs::write(dir.path().join("kernel"), "kernel").unwrap();
    let reference = parse_reference(&format!("{}/builder:v1", registry.host)).unwrap();
    push_layout(dir.path(), &reference, &anonymous(), &|_| ()).await.unwrap_err();
    inspect_ref(&reference, &anonymous()).await.unwrap_err();
    assert!(Bundle::open(dir.path()).unwrap().verify().is_err());
}
