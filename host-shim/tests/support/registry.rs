//! Another registry than Kiln's.

use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::json;

use super::{sha256, text};

/// User and password.
pub const LOGIN: &str = "operator:hunter2-of-the-operator";
/// What the registry knows of it: the password by bcrypt.
const LOGINS: &str = "operator:$2b$10$abcdefghijklmnopqrstuu5VpTZTyxrIVATI/XZsCdM.PR4Z.siGm\n";

/// Somebody's docker-registry, which writes down what it is asked for.
pub struct Registry {
    child: Child,
    dir: tempfile::TempDir,
    /// What pushes as well as pulls need, where it wants any.
    login: Option<&'static str>,
    pub address: String,
}

impl Registry {
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// One that wants [`LOGIN`].
    pub fn with_login() -> Self {
        Self::start_with(Some(LOGIN))
    }

    fn start_with(login: Option<&'static str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let logins = dir.path().join("logins");
        std::fs::write(&logins, LOGINS).unwrap();
        let auth = match login {
            Some(_) => {
                format!("auth:\n  htpasswd:\n    realm: r\n    path: {}\n", logins.display())
            }
            None => String::new(),
        };
        let config = dir.path().join("config.yml");
        let storage = dir.path().join("storage");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
                 http:\n  addr: 127.0.0.1:0\n{auth}",
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
        Self { child, dir, login, address: address.unwrap() }
    }

    /// Pushes busybox as an image; returns its digest.
    pub fn push(&self, name: &str) -> String {
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
            .args(self.login.map(|login| format!("--dest-creds={login}")))
            .arg(format!("--digestfile={}", file.display()))
            .arg(format!("oci:{}:image", dir.display()))
            .arg(to)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", text(out.stderr));
        std::fs::read_to_string(file).unwrap().trim().to_owned()
    }

    /// How often a blob's content was asked for.
    pub fn blobs(&self) -> usize {
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
