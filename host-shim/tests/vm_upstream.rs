//! Unmodified Dockerfiles whose images are another registry's: a real one, and real VMs.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use support::image::Image;
use support::{Server, sha256, text};

/// Somebody's docker-registry, which writes down what it is asked for.
struct Registry {
    child: Child,
    dir: tempfile::TempDir,
    address: String,
}

impl Registry {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.yml");
        let storage = dir.path().join("storage");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
                 http:\n  addr: 127.0.0.1:0\n",
                storage.display()
            ),
        )
        .unwrap();
        let log = std::fs::File::create(dir.path().join("requests")).unwrap();
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address = lines.by_ref().find_map(|line| {
            let (_, rest) = line.split_once("listening on ")?;
            Some(rest.trim_matches(|c: char| !c.is_ascii_digit()).split('"').next()?.to_owned())
        });
        // What it says later is read, so that it can say it.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, dir, address: address.unwrap() }
    }

    /// Pushes busybox as an image; returns its digest.
    fn push(&self, name: &str) -> String {
        let dir = self.dir.path().join("image");
        layout(&dir);
        let to = format!("docker://{}/{name}", self.address);
        let file = self.dir.path().join("digest");
        let out = Command::new("skopeo")
            .args([
                "--insecure-policy",
                "copy",
                "--quiet",
                "--dest-tls-verify=false",
                "--preserve-digests",
            ])
            .arg(format!("--digestfile={}", file.display()))
            .arg(format!("oci:{}:image", dir.display()))
            .arg(to)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", text(out.stderr));
        std::fs::read_to_string(file).unwrap().trim().to_owned()
    }

    /// How often a blob's content was asked for.
    fn blobs(&self) -> usize {
        let requests = std::fs::read_to_string(self.dir.path().join("requests")).unwrap();
        let is_blob = |line: &&str| line.contains("\"GET /v2/") && line.contains("/blobs/sha256:");
        requests.lines().filter(is_blob).count()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An OCI layout of an image with busybox and a file.
fn layout(dir: &Path) {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, mode: u32, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        tar.append_data(&mut header, path, content).unwrap();
    };
    let busybox = std::fs::read("/bin/busybox").unwrap();
    add("bin/sh", 0o755, &busybox);
    add("from", 0o644, b"elsewhere\n");
    let tar = tar.into_inner().unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let layer = gzip.finish().unwrap();
    let config = json!({"architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&tar))]}});
    let config = config.to_string().into_bytes();
    let blob = |kind: &str, bytes: &[u8]| {
        std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        std::fs::write(dir.join("blobs/sha256").join(sha256(bytes)), bytes).unwrap();
        json!({"mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": format!("sha256:{}", sha256(bytes)), "size": bytes.len()})
    };
    let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", &config), "layers": [blob("layer.v1.tar+gzip", &layer)]});
    let mut manifest = blob("manifest.v1+json", manifest.to_string().as_bytes());
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "image"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn ready(server: &Server, id: &str) -> Value {
    let build = server.wait(id);
    assert_eq!(
        build["status"],
        "ready",
        "{build}\n{}\n{}",
        text(server.run(&["logs", id]).stdout),
        server.log()
    );
    build
}

#[test]
fn vm_an_unmodified_dockerfile_is_built_from_an_upstream_that_is_asked_once() {
    let upstream = Registry::start();
    let digest = upstream.push("some/name:1");
    let flag = format!("docker.io=http://{}", upstream.address);
    let server = Server::start_with(&["--upstream", &flag]);
    let dockerfile = "FROM some/name:1\nRUN echo made >/made\n\
                      COPY --from=docker.io/some/name:1 /from /copied\n\
                      RUN --mount=from=some/name:1,target=/other cat /other/from /copied\n";
    let first = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &[]);
    let build = ready(&server, &first);
    let pulled = json!([{"reference": "docker.io/some/name:1", "digest": digest}]);
    assert_eq!(build["pulled"], pulled);
    let log = text(server.run(&["logs", &first]).stdout);
    assert_eq!(log.matches("elsewhere").count(), 2, "{log}");
    assert_eq!(upstream.blobs(), 2, "the config and the layer");
    let image =
        Image::copy(&server, build["image_ref"].as_str().unwrap_or_else(|| panic!("{build}")));
    assert!(image.layers.len() >= 2, "{:?}", image.layers);

    // The host checks that the base is the one that was asked for.
    let pinned =
        server.post("FROM some/name:1\nRUN echo again >/made\n", &[("base_image_digest", &digest)]);
    let build = ready(&server, &pinned);
    let by_digest =
        json!([{"reference": format!("docker.io/some/name@{digest}"), "digest": digest}]);
    assert_eq!(build["pulled"], by_digest);
    assert_eq!(upstream.blobs(), 2, "they are on this host");

    let asks = "could not be pulled: quay.io is not an upstream of this host: ask the operator for --upstream quay.io";
    for dockerfile in [
        "FROM quay.io/org/name:1\n",
        "FROM some/name:1\nCOPY --from=quay.io/org/name:1 /a /b\n",
        "FROM some/name:1\nRUN --mount=from=quay.io/org/name:1,target=/other true\n",
    ] {
        let unknown = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &[]);
        let build = server.wait(&unknown);
        assert_eq!(build["failure"]["kind"], "pull_failed", "{build}");
        let message = build["failure"]["message"].as_str().unwrap();
        assert_eq!(message, format!("the image quay.io/org/name:1 {asks}"));
    }
    let absent = server.submit(&[("Dockerfile", b"FROM some/other\n")], &[]);
    let build = server.wait(&absent);
    assert_eq!(build["failure"]["kind"], "pull_failed", "{build}");
    let message = build["failure"]["message"].as_str().unwrap();
    assert!(message.contains("docker.io has no some/other:latest"), "{message}");
    server.stop();
}
