//! The parts of a server, made from its configuration.

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use async_trait::async_trait;
use kiln_image::bundle::Bundle;
use kiln_image::pull::pull_bundle;
use kiln_image::registry::{Options, parse_reference};
use kiln_protocol::job::MAX_EGRESS_CA;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::ready::{Facilities, ROOM};
use crate::build::{BuildId, Tenant};
use crate::config::{ConfigError, ServeConfig};
use crate::gateway::managed::Managed;
use crate::gateway::rights::{Authorizer, Caller};
use crate::gateway::{Backing, Upstreams, upstream};
use crate::lock;
use crate::queue::Egress;
use crate::retention;
use crate::store::sqlite::SqliteStore;
use crate::store::{Store, StoreError};
use crate::token::{self, AuthError, Uses};
use crate::vmm::{Engine, Vmm, VmmConfig};

/// As many descriptors as the host allows: every connection of a client and of a VM takes one.
pub(super) fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// One server for a data directory: the lock is held as long as the process lives.
pub(super) fn lock(data_dir: &Path) -> anyhow::Result<File> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(data_dir)
        .with_context(|| format!("cannot make the data directory {}", data_dir.display()))?;
    let path = data_dir.join("lock");
    let lock = lock::exclusive(&path).with_context(|| format!("cannot lock {}", path.display()))?;
    lock.with_context(|| {
        format!(
            "another kiln serve uses {}; stop it, or choose another --data-dir",
            data_dir.display()
        )
    })
}

/// What VMs run, its digests checked: from a directory, or pulled from a registry into the data directory.
pub(super) async fn bundle(config: &ServeConfig) -> anyhow::Result<Bundle> {
    let dir = Path::new(&config.builder);
    let bundle = if dir.is_dir() {
        measured(dir).await?
    } else {
        let reference = parse_reference(&config.builder).map_err(|_| {
            let allowed = "a bundle's directory, as kiln-image build makes one, or a reference";
            ConfigError::refused("builder", &config.builder, allowed)
        })?;
        let options =
            Options { plain_http: is_loopback(reference.registry()), ..Options::default() };
        let place = config.data_dir.join("builder-pulled");
        pull_bundle(&reference, &options, &place)
            .await
            .with_context(|| format!("cannot pull --builder {}", config.builder))?
    };
    bundle.check_protocol()?;
    Ok(bundle)
}

/// A directory's bundle, once its files are what it says of them: builds are told its digests as what they ran
/// in. What is pulled is measured on its way.
async fn measured(dir: &Path) -> anyhow::Result<Bundle> {
    let bundle = Bundle::open(dir)?;
    let begun = Instant::now();
    let files = bundle.clone();
    tokio::task::spawn_blocking(move || files.measure())
        .await
        .context("the measuring of the builder bundle broke down")?
        .context("the builder bundle is not what it says")?;
    let milliseconds = begun.elapsed().as_millis();
    tracing::info!(digest = %bundle.digest, milliseconds, "measured the builder bundle");
    Ok(bundle)
}

/// Whether `HOST[:PORT]` is this machine: only there are registries spoken to without TLS.
fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

pub(super) async fn store(config: &ServeConfig) -> anyhow::Result<Arc<dyn Store>> {
    let dir = &config.data_dir;
    let store = SqliteStore::open(dir)
        .await
        .with_context(|| format!("cannot open the database in {}", dir.display()))?;
    Ok(Arc::new(store))
}

/// Tells this server's VMs from another's on the same host: by its data directory.
pub(super) fn instance(config: &ServeConfig) -> String {
    let hash = Sha256::digest(config.data_dir.as_os_str().as_encoded_bytes());
    hex::encode(&hash[..6])
}

/// This server's part of the run directory. Short: the path of a socket holds 107 bytes.
pub(super) fn run_dir(config: &ServeConfig) -> PathBuf {
    config.run_dir.join(instance(config))
}

pub(super) async fn vmm(config: &ServeConfig, bundle: &Bundle) -> anyhow::Result<Vmm> {
    let vmm = Vmm::new(VmmConfig {
        instance: instance(config),
        run_dir: run_dir(config),
        disk_dir: config.data_dir.join("vm"),
        qemu: config.qemu.clone(),
        vsock_device: config.vhost_device_vsock.clone(),
        kernel: bundle.kernel.clone(),
        initrd: bundle.initrd.clone(),
        root: bundle.root.clone(),
        accel: config.accel,
        require_isolation: config.require_isolation,
        default_disk_gb: 10,
        uid_base: Some(crate::vmm::DEFAULT_UID_BASE),
    });
    vmm.await.context("cannot prepare for VMs")
}

/// The registry behind the gateway, and its process where it is Kiln's own.
pub(super) async fn registry(config: &ServeConfig) -> anyhow::Result<(Option<Managed>, Backing)> {
    if let Some(url) = &config.registry {
        let backing = Backing::external(url.as_str(), config.registry_config.as_deref())?;
        return Ok((None, backing));
    }
    let dir = config.data_dir.join("registry");
    let managed = Managed::start_program(&config.docker_registry, &dir)
        .await
        .context("cannot start the registry")?;
    let backing = managed.backing().clone();
    Ok((Some(managed), backing))
}

/// Where retention makes room.
pub(super) fn room(
    config: &ServeConfig,
    registry: Option<&Managed>,
    upstreams: Upstreams,
) -> retention::Room {
    let percent = config.gc_disk_percent;
    retention::Room {
        registry: registry.map(|registry| registry.garbage().clone()),
        upstreams: Some(upstreams),
        disk: (percent > 0).then(|| retention::Disk::new(config.data_dir.clone(), percent)),
    }
}

/// The other registries that builds pull from.
pub(super) fn upstreams(config: &ServeConfig) -> anyhow::Result<Upstreams> {
    let settings = upstream::Settings {
        specs: config.upstream.clone(),
        logins: config.registry_config.clone(),
        guard: upstream::Guard {
            permitted: config.egress_permit.iter().map(|cidr| cidr.0).collect(),
        },
        dir: config.data_dir.join("upstream-cache"),
        cache_bytes: config.upstream_cache_bytes,
    };
    Upstreams::open(&settings).context("cannot prepare for upstreams")
}

pub(super) fn egress(config: &ServeConfig) -> anyhow::Result<Egress> {
    let permitted = config.egress_permit.iter().map(|cidr| cidr.0).collect();
    let ca = config.egress_ca.as_deref().map(certificates).transpose()?.unwrap_or_default();
    Ok(Egress { permitted, ca })
}

/// A file of certificates that a job can carry.
fn certificates(file: &Path) -> anyhow::Result<Vec<u8>> {
    let pem = std::fs::read(file)
        .with_context(|| format!("--egress-ca {} cannot be read", file.display()))?;
    let begins = pem.windows(27).any(|window| window == b"-----BEGIN CERTIFICATE-----");
    anyhow::ensure!(begins, "--egress-ca {} holds no certificate as PEM", file.display());
    anyhow::ensure!(
        pem.len() <= MAX_EGRESS_CA,
        "--egress-ca {} is longer than {MAX_EGRESS_CA} bytes: name only the certificates that are not public",
        file.display()
    );
    Ok(pem)
}

/// `HOST:PORT` of image references. A port of 0 was chosen by the system.
pub(super) fn public_host(config: &ServeConfig, address: SocketAddr) -> String {
    match config.public_host.strip_suffix(":0") {
        Some(host) => format!("{host}:{}", address.port()),
        None => config.public_host.clone(),
    }
}

/// What `/ready` looks at, beside the store.
pub(super) fn facilities(
    config: &ServeConfig,
    bundle: &Bundle,
    vmm: &Vmm,
    backing: Backing,
    draining: CancellationToken,
) -> Facilities {
    let Bundle { kernel, initrd, root, .. } = bundle.clone();
    Facilities {
        draining,
        backing,
        bundle: [("kernel", kernel), ("initrd", initrd), ("root disk", root)],
        programs: [
            ("QEMU", config.qemu.clone()),
            ("the vsock device", config.vhost_device_vsock.clone()),
        ],
        kvm: vmm.engine() == Engine::Kvm,
        run_dir: run_dir(config),
        data_dir: config.data_dir.clone(),
        room: ROOM,
    }
}

/// API tokens and builds, as the gateway asks for them.
pub(super) struct StoreAuthorizer(pub Arc<dyn Store>, pub Uses);

#[async_trait]
impl Authorizer for StoreAuthorizer {
    async fn api_token(&self, token: &str) -> Result<Option<Caller>, StoreError> {
        let now = crate::clock::now();
        match token::verify(self.0.as_ref(), token, now).await {
            Ok(caller) => {
                self.1.note(&caller.token_id, now);
                Ok(Some(Caller { tenant: caller.tenant, role: caller.role }))
            }
            Err(AuthError::Store(error)) => Err(error),
            Err(_) => Ok(None),
        }
    }

    async fn build_owner(&self, id: &BuildId) -> Result<Option<Tenant>, StoreError> {
        Ok(self.0.build(id).await?.map(|build| build.tenant))
    }
}
