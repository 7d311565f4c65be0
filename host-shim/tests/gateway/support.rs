//! A managed registry, the gateway in front of it, a guest's door, and small images.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln::build::{BuildId, Tenant};
use kiln::gateway::gate::Gate;
use kiln::gateway::{
    Authorizer, Backing, Caller, GatewayState, GuestContext, Managed, TokenKeys, Upstreams, router,
    serve,
};
use kiln::staging::{Digest, Limits, Staging};
use kiln::store::{Role, StoreError};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::counter::Counter;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const ADMIN: &str = "kiln_admin";
pub const A: &str = "kiln_a";
pub const A_READER: &str = "kiln_a_reader";
pub const B: &str = "kiln_b";

pub struct World {
    pub dir: tempfile::TempDir,
    pub registry: Managed,
    pub gateway: SocketAddr,
    pub keys: Arc<TokenKeys>,
}

impl World {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = Managed::start(&dir.path().join("registry")).await.unwrap();
        let backing = registry.backing().clone();
        Self::of(dir, registry, backing).await
    }

    /// One whose blobs that nothing refers to stay for so long.
    pub async fn with_grace(grace: Duration) -> Self {
        Self::with_gate(Gate::new(grace)).await
    }

    pub async fn with_gate(gate: Gate) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = Path::new("docker-registry");
        let registry =
            Managed::start_gated(program, &dir.path().join("registry"), gate).await.unwrap();
        let backing = registry.backing().clone();
        Self::of(dir, registry, backing).await
    }

    /// One whose gateway reaches its registry through a counter.
    pub async fn counted() -> (Self, Counter) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Managed::start(&dir.path().join("registry")).await.unwrap();
        let counter = Counter::start(&dir.path().join("registry/run/registry.sock")).await;
        let backing = Backing::external(&counter.url, None).unwrap();
        (Self::of(dir, registry, backing).await, counter)
    }

    /// One whose images are below a prefix of somebody's registry, which takes uploads at paths of its own.
    pub async fn below(prefix: &str) -> (Self, Counter, Backing) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Managed::start(&dir.path().join("registry")).await.unwrap();
        let socket = dir.path().join("registry/run/registry.sock");
        let counter = Counter::start_with(&socket, true).await;
        let backing = Backing::external(&format!("{}/{prefix}", counter.url), None).unwrap();
        (Self::of(dir, registry, backing.clone()).await, counter, backing)
    }

    async fn of(dir: tempfile::TempDir, registry: Managed, backing: Backing) -> Self {
        let keys = Arc::new(TokenKeys::load_or_create(&dir.path().join("key")).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gateway = listener.local_addr().unwrap();
        let state = GatewayState {
            backing,
            authorizer: Arc::new(People),
            keys: keys.clone(),
            public_url: format!("http://{gateway}").parse().unwrap(),
        };
        tokio::spawn(async move { axum::serve(listener, router(state)).await });
        Self { dir, registry, gateway, keys }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn staging(&self) -> Arc<Staging> {
        let limits = Limits { max_bytes: 64 * 1024 * 1024, max_blobs: 64 };
        Arc::new(Staging::new(self.path("staging"), limits).unwrap())
    }

    /// A guest of tenant `a`: its context, and a port that stands for its tunnel.
    pub async fn guest(&self) -> (Arc<GuestContext>, SocketAddr) {
        self.guest_of("a", &Upstreams::none()).await
    }

    /// The same of a tenant that may pull from other registries.
    pub async fn guest_of(
        &self,
        tenant: &str,
        upstreams: &Upstreams,
    ) -> (Arc<GuestContext>, SocketAddr) {
        let (build, tenant) = (BuildId::new("b1").unwrap(), Tenant::new(tenant).unwrap());
        let (backing, upstreams) = (self.registry.backing().clone(), upstreams.clone());
        let ctx = GuestContext::new(build, tenant, self.staging(), backing, upstreams);
        let ctx = Arc::new(ctx);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = ctx.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, serving.clone(), CancellationToken::new(), || ()));
            }
        });
        (ctx, address)
    }

    pub fn docker(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.gateway)
    }

    /// skopeo from an OCI layout to the gateway.
    pub async fn push(&self, token: &str, layout: &Path, name: &str) -> Output {
        let from = format!("oci:{}:image", layout.display());
        let creds = format!("any:{token}");
        skopeo(&[
            "copy",
            "--preserve-digests",
            "--dest-tls-verify=false",
            "--dest-creds",
            &creds,
            &from,
            &self.docker(name),
        ])
        .await
    }

    /// `skopeo inspect` through the gateway, the digest only.
    pub async fn inspect(&self, token: &str, name: &str) -> Output {
        let creds = format!("any:{token}");
        skopeo(&[
            "inspect",
            "--tls-verify=false",
            "--creds",
            &creds,
            "--format",
            "{{.Digest}}",
            &self.docker(name),
        ])
        .await
    }
}

/// Runs skopeo apart from the test's own runtime, which serves it.
pub async fn skopeo(arguments: &[&str]) -> Output {
    let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
    tokio::task::spawn_blocking(move || {
        // `--insecure-policy`: the policy file may be missing, and says nothing of our business.
        Command::new("skopeo").arg("--insecure-policy").args(arguments).output().unwrap()
    })
    .await
    .unwrap()
}

#[track_caller]
pub fn ok(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[track_caller]
pub fn fails(output: &Output) -> String {
    assert!(!output.status.success(), "it should have failed");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Who the test's tokens and builds belong to.
pub struct People;

#[async_trait]
impl Authorizer for People {
    async fn api_token(&self, token: &str) -> Result<Option<Caller>, StoreError> {
        let known = HashMap::from([
            (ADMIN, ("dev", Role::Admin)),
            (A, ("a", Role::Tenant)),
            (A_READER, ("a", Role::Reader)),
            (B, ("b", Role::Tenant)),
        ]);
        let caller = known
            .get(token)
            .map(|(tenant, role)| Caller { tenant: Tenant::new(*tenant).unwrap(), role: *role });
        Ok(caller)
    }

    async fn build_owner(&self, id: &BuildId) -> Result<Option<Tenant>, StoreError> {
        Ok((id.as_str() == "of-a").then(|| Tenant::new("a").unwrap()))
    }
}

/// A small image: its parts, and an OCI layout of it.
pub struct Image {
    pub config: Vec<u8>,
    pub layers: Vec<Vec<u8>>,
    pub manifest: Vec<u8>,
}

impl Image {
    /// With one layer for each of the contents.
    pub fn new(contents: &[&str]) -> Self {
        let layers: Vec<_> = contents.iter().map(|content| layer(content)).collect();
        let ids: Vec<_> =
            contents.iter().map(|content| Digest::of(&tar(content)).to_string()).collect();
        let config = json!({"architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": ids}});
        let config = config.to_string().into_bytes();
        let descriptor = |kind: &str, bytes: &[u8]| {
            json!({"mediaType": format!("application/vnd.oci.image.{kind}"),
                "digest": Digest::of(bytes).to_string(), "size": bytes.len()})
        };
        let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": descriptor("config.v1+json", &config),
            "layers": layers.iter().map(|l| descriptor("layer.v1.tar+gzip", l)).collect::<Vec<_>>()});
        Self { config, layers, manifest: manifest.to_string().into_bytes() }
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    pub fn blobs(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.layers.iter().chain([&self.config])
    }

    pub fn layout(&self, dir: PathBuf) -> PathBuf {
        std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        for blob in self.blobs().chain([&self.manifest]) {
            std::fs::write(dir.join("blobs/sha256").join(Digest::of(blob).hex()), blob).unwrap();
        }
        let index: Value = json!({"schemaVersion": 2, "manifests": [{"mediaType": OCI_MANIFEST,
            "digest": self.digest().to_string(), "size": self.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": "image"}}]});
        std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
        dir
    }
}

fn tar(content: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "file", content.as_bytes()).unwrap();
    builder.into_inner().unwrap()
}

fn layer(content: &str) -> Vec<u8> {
    let mut gzip = Command::new("gzip")
        .args(["-n", "-c"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // A layer of a test is smaller than a pipe.
    std::io::Write::write_all(&mut gzip.stdin.take().unwrap(), &tar(content)).unwrap();
    gzip.wait_with_output().unwrap().stdout
}

pub async fn code_of(response: reqwest::Response) -> (u16, String) {
    let status = response.status().as_u16();
    let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap_or_default();
    (status, body["errors"][0]["code"].as_str().unwrap_or_default().to_owned())
}

pub fn http() -> reqwest::Client {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}
