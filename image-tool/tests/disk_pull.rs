//! Disks of images in a real registry, by the library and by the program.
// Each test uses a part of what they share.
#![allow(clippy::unwrap_used, clippy::pedantic, missing_docs, dead_code)]

#[path = "support/ext4.rs"]
mod ext4;
#[path = "support/image.rs"]
mod image;
mod support;

use std::fs;
use std::path::Path;

use image::{Layer, Spec};
use kiln_image::disk::{self, DiskError, Limits};
use kiln_image::publish::{pinned, push_layout};
use kiln_image::registry::{Options, parse_reference};
use serde_json::json;
use support::{CREDS, Registry};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

fn provider() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

fn access() -> Options {
    let creds = Some((CREDS.0.to_owned(), CREDS.1.to_owned()));
    Options { plain_http: true, creds, bearer: None }
}

fn small() -> disk::Options {
    disk::Options { free_bytes: 1024 * 1024, ..disk::Options::default() }
}

fn write_image(dir: &Path, text: &[u8]) -> kiln_image::digest::Digest {
    fs::create_dir(dir).unwrap();
    let mut spec = Spec::new(vec![
        Layer::default().file("etc/x", b"old").file("etc/gone", b"1").end(),
        Layer::default().file("etc/x", text).file("etc/.wh.gone", b"").end(),
    ]);
    spec.config = json!({ "Cmd": ["/bin/x"] });
    spec.write(dir)
}

#[tokio::test]
async fn an_image_is_pulled_and_becomes_the_disk_that_its_layout_gives() {
    provider();
    let registry = Registry::start(true).await;
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    let digest = write_image(&layout, b"new");
    let reference = parse_reference(&format!("{}/app:v1", registry.host)).unwrap();
    push_layout(&layout, &reference, &access(), &|_| ()).await.unwrap();

    let place = dir.path().join("place");
    let out = place.join("disk");
    let cancel = CancellationToken::new();
    let made = disk::pull(&reference, &access(), &out, &small(), &cancel).await.unwrap();
    assert_eq!((&made.digest, made.config.cmd.as_slice()), (&digest, &["/bin/x".to_owned()][..]));
    let disk = ext4::read(&out);
    assert_eq!(disk["etc/x"].text(), "new");
    assert!(!disk.contains_key("etc/gone"));
    assert_eq!(fs::read_dir(&place).unwrap().count(), 1);

    let local = dir.path().join("local");
    let source = disk::Source::of(&layout);
    let from = tokio::task::spawn_blocking({
        let local = local.clone();
        move || disk::make(&source, &local, &small(), &CancellationToken::new())
    });
    assert_eq!(from.await.unwrap().unwrap(), made);
    assert!(fs::read(&local).unwrap() == fs::read(&out).unwrap());

    // Too large, by what the manifest announces: nothing is transferred.
    let limits = Limits { compressed_bytes: 10, ..Limits::default() };
    let options = disk::Options { limits, ..small() };
    let error = disk::pull(&reference, &access(), &out, &options, &cancel).await.unwrap_err();
    assert!(matches!(error, DiskError::TooLarge(_)), "{error}");

    // By the program, by digest.
    let reference = pinned(&reference, &digest);
    let run = move || {
        let mut command = assert_cmd::Command::cargo_bin("kiln-image").unwrap();
        command.args(["disk", &reference]).arg(&out).args(["--plain-http", "--free-mb", "1"]);
        command.env("KILN_IMAGE_CREDS", format!("{}:{}", CREDS.0, CREDS.1));
        (command.output().unwrap(), out)
    };
    let (output, out) = tokio::task::spawn_blocking(run).await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.starts_with(digest.as_str()) && said.contains("2 layers, 3 files"), "{said}");
    assert!(fs::read(&local).unwrap() == fs::read(&out).unwrap());
}

#[tokio::test]
async fn a_wrong_password_makes_no_disk_and_a_cancelled_pull_ends() {
    provider();
    let registry = Registry::start(true).await;
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("disk");
    let reference = parse_reference(&format!("{}/app:v1", registry.host)).unwrap();
    let wrong = Options { creds: Some((CREDS.0.into(), "guess".into())), ..access() };
    let cancel = CancellationToken::new();
    let error = disk::pull(&reference, &wrong, &out, &small(), &cancel).await.unwrap_err();
    assert!(matches!(error, DiskError::Pull(_)), "{error}");

    // A registry that never answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap();
    let reference = parse_reference(&format!("{host}/app:v1")).unwrap();
    let (access, options) = (access(), small());
    let pull = disk::pull(&reference, &access, &out, &options, &cancel);
    let ended = async {
        let (_held, _) = listener.accept().await.unwrap();
        cancel.cancel();
        std::future::pending::<()>().await;
    };
    let error =
        tokio::select! { result = pull => result.unwrap_err(), () = ended => unreachable!() };
    assert!(matches!(error, DiskError::Cancelled), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// What the host does: a token of its own making.
#[tokio::test]
async fn a_bearer_token_is_sent_as_it_is() {
    provider();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap();
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = seen.clone();
    let serve = tokio::spawn(async move {
        // The greeting asks for a token; the manifest is not there.
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(client.read_u8().await.unwrap());
            }
            let request = String::from_utf8(request).unwrap();
            let asks =
                "www-authenticate: Bearer realm=\"http://127.0.0.1:1/\",service=\"kiln\"\r\n";
            let (status, more) = if request.contains("/manifests/") {
                ("404 Not Found", "")
            } else {
                ("401 No", asks)
            };
            let answer = format!(
                "HTTP/1.1 {status}\r\n{more}content-length: 0\r\nconnection: close\r\n\r\n"
            );
            log.lock().unwrap().push(request.to_lowercase());
            client.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let reference = parse_reference(&format!("{host}/app:v1")).unwrap();
    let access = Options { plain_http: true, creds: None, bearer: Some("t0ken".into()) };
    let cancel = CancellationToken::new();
    let error = disk::pull(&reference, &access, &dir.path().join("disk"), &small(), &cancel).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("does not have what is needed"), "{error}");
    serve.abort();
    let seen = seen.lock().unwrap();
    assert!(seen.iter().any(|request| request.contains("authorization: bearer t0ken")), "{seen:?}");
}
