//! Every setting of `kiln serve`: as a flag, a `KILN_…` variable and a key of the TOML file.
//!
//! A flag wins over a variable, a variable over the file, the file over the default. clap reads the
//! first two, serde the file, both into [`ServeArgs`]; [`ServeArgs::resolve`] makes a
//! [`ServeConfig`] of them, which is complete and checked. `docs/CONFIG.md` has the table.

mod cidr;
mod host;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use kiln_protocol::job::MAX_UPSTREAMS;
use serde::Deserialize;
use url::Url;

pub use self::cidr::{BadCidr, Cidr};
pub use self::host::Host;
use crate::api::{Limits, Maxima};
use crate::build::{NetworkMode, Tenant};
use crate::gateway::upstream::Spec;
use crate::retention::Keep;
pub use crate::vmm::Accel;

/// What hypeman's clients call by default.
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 4973);
/// The most memory that a setting can name, in MiB.
const MOST_MEMORY_MB: u32 = 4 * 1024 * 1024;
/// Largest configuration file: a hundred times what every setting together needs.
const MAX_FILE: u64 = 1024 * 1024;

/// How `kiln serve` was called, and what its file says: settings as they were given.
#[derive(Clone, Debug, Default, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct ServeArgs {
    /// TOML file with any of these settings, names with '_' for '-'
    #[arg(long, env = "KILN_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Address and port of the API and the registry gateway [default: 127.0.0.1:4973]
    #[arg(long, env = "KILN_LISTEN", value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// HOST:PORT as clients reach it, for image references [default: that of --listen]
    #[arg(long, env = "KILN_PUBLIC_HOST", value_name = "HOST:PORT")]
    pub public_host: Option<String>,
    /// Certificate of the API and the gateway, with its chain (PEM); with --tls-key. Read again at SIGHUP
    #[arg(long, env = "KILN_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key (PEM, without a passphrase)
    #[arg(long, env = "KILN_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Where builds, images and keys are kept [default: /var/lib/kiln, or a user's own]
    #[arg(long, env = "KILN_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where sockets of VMs are [default: $XDG_RUNTIME_DIR/kiln, or /run/kiln]
    #[arg(long, env = "KILN_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,

    /// Builder bundle to run builds in [default: `builder` in the data directory]
    #[arg(long, env = "KILN_BUILDER", value_name = "DIR|REF")]
    pub builder: Option<String>,
    /// VMs at one time [default: one for each processor]
    #[arg(long, env = "KILN_MAX_VMS", value_name = "N")]
    pub max_vms: Option<u32>,
    /// Memory of all VMs together [default: the host's, less an eighth and 512 MiB]
    #[arg(long, env = "KILN_MAX_VM_MEMORY_MB", value_name = "MB")]
    pub max_vm_memory_mb: Option<u32>,
    /// How VMs run: auto finds out whether KVM works here [default: auto]
    #[arg(long, env = "KILN_ACCEL", value_name = "MODE")]
    pub accel: Option<Accel>,
    /// Refuse to start without KVM and the whole jail
    #[arg(long, env = "KILN_REQUIRE_ISOLATION", value_name = "true|false")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub require_isolation: Option<bool>,

    /// Network of builds that do not say [default: open]
    #[arg(long, env = "KILN_NETWORK_DEFAULT", value_name = "MODE")]
    pub network_default: Option<NetworkMode>,
    /// Private addresses that builds may reach all the same; may be repeated
    #[arg(long, env = "KILN_EGRESS_PERMIT", value_name = "CIDR", value_delimiter = ',')]
    pub egress_permit: Option<Vec<Cidr>>,
    /// Certificates (PEM) that steps trust besides the public ones; never part of an image
    #[arg(long, env = "KILN_EGRESS_CA", value_name = "FILE")]
    pub egress_ca: Option<PathBuf>,

    /// OCI registry that keeps the images, below the URL's path if it has one [default: a docker-registry of Kiln's own]
    #[arg(long, env = "KILN_REGISTRY", value_name = "URL")]
    pub registry: Option<Url>,
    /// Logins for --registry and --upstream, in the format of Docker's config.json
    #[arg(long, env = "KILN_REGISTRY_CONFIG", value_name = "FILE")]
    pub registry_config: Option<PathBuf>,

    /// Other registry that builds may pull from, by its name and where it really is; may be repeated
    #[arg(long, env = "KILN_UPSTREAM", value_name = "HOST[=URL]", value_delimiter = ',')]
    pub upstream: Option<Vec<Spec>>,
    /// What is kept of upstreams, in GiB; 0 for nothing [default: 20]
    #[arg(long, env = "KILN_UPSTREAM_CACHE_GB", value_name = "GB")]
    pub upstream_cache_gb: Option<u32>,

    /// Log of one build, in MiB [default: 256]
    #[arg(long, env = "KILN_LOG_LIMIT_MB", value_name = "MB")]
    pub log_limit_mb: Option<u32>,
    /// Source of one build as it is sent, in MiB [default: 4096]
    #[arg(long, env = "KILN_MAX_SOURCE_MB", value_name = "MB")]
    pub max_source_mb: Option<u32>,
    /// Longest timeout that a build may ask for [default: 86400]
    #[arg(long, env = "KILN_MAX_TIMEOUT_SECONDS", value_name = "SECONDS")]
    pub max_timeout_seconds: Option<u32>,
    /// Most memory that a build may ask for [default: 65536]
    #[arg(long, env = "KILN_MAX_MEMORY_MB", value_name = "MB")]
    pub max_memory_mb: Option<u32>,
    /// Most processors that a build may ask for [default: 64]
    #[arg(long, env = "KILN_MAX_CPUS", value_name = "N")]
    pub max_cpus: Option<u32>,
    /// Largest scratch disk that a build may ask for [default: 500]
    #[arg(long, env = "KILN_MAX_DISK_GB", value_name = "GB")]
    pub max_disk_gb: Option<u32>,
    /// Disks and logs of all instances, in GiB; one tenant gets half [default: 100]
    #[arg(long, env = "KILN_INSTANCE_DISKS_GB", value_name = "GB")]
    pub instance_disks_gb: Option<u32>,
    /// Failed builds whose VMs are kept at one time; the oldest goes first [default: 4]
    #[arg(long, env = "KILN_MAX_KEPT", value_name = "N")]
    pub max_kept: Option<u32>,
    /// Days that an ended session stays in the audit log; 0 for ever [default: 90]
    #[arg(long, env = "KILN_KEEP_SESSIONS_DAYS", value_name = "DAYS")]
    pub keep_sessions_days: Option<u32>,
    /// Days that the log of a finished build stays; 0 for ever [default: 90]
    #[arg(long, env = "KILN_KEEP_LOGS_DAYS", value_name = "DAYS")]
    pub keep_logs_days: Option<u32>,
    /// Logs of all finished builds, in GiB; the oldest go first; 0 without a bound [default: 20]
    #[arg(long, env = "KILN_KEEP_LOGS_GB", value_name = "GB")]
    pub keep_logs_gb: Option<u32>,
    /// Days that a finished build stays, with its image where that has no name; 0 for ever [default: 0]
    #[arg(long, env = "KILN_KEEP_BUILDS_DAYS", value_name = "DAYS")]
    pub keep_builds_days: Option<u32>,
    /// The registry, in GiB; the oldest images without a name go first; 0 without a bound [default: 0]
    #[arg(long, env = "KILN_KEEP_IMAGES_GB", value_name = "GB")]
    pub keep_images_gb: Option<u32>,
    /// How full the data directory's disk may get before images without a name go; 0: none goes for it [default: 0]
    #[arg(long, env = "KILN_GC_DISK_PERCENT", value_name = "PERCENT")]
    pub gc_disk_percent: Option<u32>,
    /// Queued builds of one tenant [default: 1000]
    #[arg(long, env = "KILN_MAX_QUEUED", value_name = "N")]
    pub max_queued: Option<u32>,
    /// How long a build may wait in the queue before it fails [default: 3600]
    #[arg(long, env = "KILN_MAX_QUEUE_SECONDS", value_name = "SECONDS")]
    pub max_queue_seconds: Option<u32>,
    /// Sources that are received at one time [default: 64]
    #[arg(long, env = "KILN_MAX_UPLOADS", value_name = "N")]
    pub max_uploads: Option<u32>,

    /// How long builds that run may go on once the server is told to stop; at the second time they end [default: 5]
    #[arg(long, env = "KILN_DRAIN_SECONDS", value_name = "SECONDS")]
    pub drain_seconds: Option<u32>,

    /// Requests of one token in a second [default: 1000]
    #[arg(long, env = "KILN_MAX_REQUESTS_PER_SECOND", value_name = "N")]
    pub max_requests_per_second: Option<u32>,

    /// What single tenants may ask for: tables of the file, `[tenant.NAME]`
    #[arg(skip)]
    pub tenant: Option<BTreeMap<Tenant, Maxima>>,

    /// Form of the log on stderr: text, or json with an object a line [default: text]
    #[arg(long, env = "KILN_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Answer GET /metrics without a token
    #[arg(long, env = "KILN_METRICS_OPEN", value_name = "true|false")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub metrics_open: Option<bool>,

    /// QEMU [default: qemu-system-x86_64, looked for]
    #[arg(long, env = "KILN_QEMU", value_name = "FILE")]
    pub qemu: Option<PathBuf>,
    /// The vsock device [default: vhost-device-vsock, looked for]
    #[arg(long, env = "KILN_VHOST_DEVICE_VSOCK", value_name = "FILE")]
    pub vhost_device_vsock: Option<PathBuf>,
    /// The registry that Kiln runs without --registry [default: docker-registry, looked for]
    #[arg(long, env = "KILN_DOCKER_REGISTRY", value_name = "FILE")]
    pub docker_registry: Option<PathBuf>,
}

/// Form of the server's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// What TLS needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and its chain, PEM.
    pub cert: PathBuf,
    /// The private key, PEM.
    pub key: PathBuf,
}

/// Every setting, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// `HOST:PORT` as clients reach it.
    pub public_host: String,
    /// TLS on the listener; `None`: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// What survives is in here.
    pub data_dir: PathBuf,
    /// What does not.
    pub run_dir: PathBuf,
    /// A bundle's directory, or its reference in a registry.
    pub builder: String,
    /// At one time.
    pub max_vms: u32,
    /// Of all VMs together.
    pub max_vm_memory_mb: u32,
    /// How VMs run.
    pub accel: Accel,
    /// Without KVM and the whole jail, no start.
    pub require_isolation: bool,
    /// Addresses that the egress proxy lets through though they are not public.
    pub egress_permit: Vec<Cidr>,
    /// Certificates that steps trust besides the public ones.
    pub egress_ca: Option<PathBuf>,
    /// The registry; `None`: one of Kiln's own.
    pub registry: Option<Url>,
    /// Its login, and those of upstreams.
    pub registry_config: Option<PathBuf>,
    /// Other registries that builds may pull from.
    pub upstream: Vec<Spec>,
    /// What is kept of them, in bytes.
    pub upstream_cache_bytes: u64,
    /// Of one build, in bytes.
    pub log_limit_bytes: u64,
    /// Of disks and logs of all instances, in bytes.
    pub instance_disks_bytes: u64,
    /// VMs of failed builds that are kept at one time.
    pub max_kept: usize,
    /// For how long sessions, logs and builds stay, and how many images.
    pub keep: Keep,
    /// How full the data directory's file system may get; 0 for whatever.
    pub gc_disk_percent: u32,
    /// Of the log.
    pub log_format: LogFormat,
    /// Whether `/metrics` needs no token.
    pub metrics_open: bool,
    /// How long a build may wait in the queue.
    pub max_queue_seconds: u32,
    /// How long builds may go on once the server is told to stop.
    pub drain_seconds: u32,
    /// What the API lets a build ask for.
    pub limits: Limits,
    /// What some tenants may ask for, where that is less.
    pub tenants: BTreeMap<Tenant, Maxima>,
    /// A program's path; its bare name where it was not found.
    pub qemu: PathBuf,
    /// A program's path; its bare name where it was not found.
    pub vhost_device_vsock: PathBuf,
    /// A program's path; its bare name where it was not found.
    pub docker_registry: PathBuf,
}

/// A setting that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there, or cannot be read.
    #[error("--config {path}: the file cannot be read")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is larger than any configuration.
    #[error("--config {0}: the file is larger than {MAX_FILE} bytes")]
    TooLarge(PathBuf),
    /// The file is not of the form, or has a key that there is not. The message shows the line.
    #[error("--config {path}: {message}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// What and where.
        message: String,
    },
    /// A value is not allowed.
    #[error("--{flag} is {value}; it must be {allowed}")]
    Value {
        /// The setting, by its flag.
        flag: &'static str,
        /// As it was given.
        value: String,
        /// What would be.
        allowed: String,
    },
    /// There is no default here.
    #[error("--{flag} is needed here: {why}")]
    Missing {
        /// The setting, by its flag.
        flag: &'static str,
        /// Why it has no default.
        why: &'static str,
    },
}

impl ConfigError {
    /// A value that is not allowed, and what would be.
    pub(crate) fn refused(
        flag: &'static str,
        value: impl Display,
        allowed: impl Into<String>,
    ) -> Self {
        Self::Value { flag, value: value.to_string(), allowed: allowed.into() }
    }
}

impl ServeArgs {
    /// The settings of this process: flags and variables, then the file, then defaults.
    pub fn resolve(self) -> Result<ServeConfig, ConfigError> {
        self.resolve_on(&Host::current())
    }

    /// The same on a host that is given: pure, but for the file and for looking up programs.
    pub fn resolve_on(self, host: &Host) -> Result<ServeConfig, ConfigError> {
        let file = self.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
        self.over(file).complete(host)
    }

    /// These settings, and another's where these have none.
    fn over(self, file: Self) -> Self {
        Self {
            config: self.config,
            listen: self.listen.or(file.listen),
            public_host: self.public_host.or(file.public_host),
            tls_cert: self.tls_cert.or(file.tls_cert),
            tls_key: self.tls_key.or(file.tls_key),
            data_dir: self.data_dir.or(file.data_dir),
            run_dir: self.run_dir.or(file.run_dir),
            builder: self.builder.or(file.builder),
            max_vms: self.max_vms.or(file.max_vms),
            max_vm_memory_mb: self.max_vm_memory_mb.or(file.max_vm_memory_mb),
            accel: self.accel.or(file.accel),
            require_isolation: self.require_isolation.or(file.require_isolation),
            network_default: self.network_default.or(file.network_default),
            egress_permit: self.egress_permit.or(file.egress_permit),
            egress_ca: self.egress_ca.or(file.egress_ca),
            registry: self.registry.or(file.registry),
            registry_config: self.registry_config.or(file.registry_config),
            upstream: self.upstream.or(file.upstream),
            upstream_cache_gb: self.upstream_cache_gb.or(file.upstream_cache_gb),
            log_limit_mb: self.log_limit_mb.or(file.log_limit_mb),
            max_source_mb: self.max_source_mb.or(file.max_source_mb),
            max_timeout_seconds: self.max_timeout_seconds.or(file.max_timeout_seconds),
            max_memory_mb: self.max_memory_mb.or(file.max_memory_mb),
            max_cpus: self.max_cpus.or(file.max_cpus),
            max_disk_gb: self.max_disk_gb.or(file.max_disk_gb),
            instance_disks_gb: self.instance_disks_gb.or(file.instance_disks_gb),
            max_kept: self.max_kept.or(file.max_kept),
            keep_sessions_days: self.keep_sessions_days.or(file.keep_sessions_days),
            keep_logs_days: self.keep_logs_days.or(file.keep_logs_days),
            keep_logs_gb: self.keep_logs_gb.or(file.keep_logs_gb),
            keep_builds_days: self.keep_builds_days.or(file.keep_builds_days),
            keep_images_gb: self.keep_images_gb.or(file.keep_images_gb),
            gc_disk_percent: self.gc_disk_percent.or(file.gc_disk_percent),
            max_queued: self.max_queued.or(file.max_queued),
            max_queue_seconds: self.max_queue_seconds.or(file.max_queue_seconds),
            max_uploads: self.max_uploads.or(file.max_uploads),
            drain_seconds: self.drain_seconds.or(file.drain_seconds),
            max_requests_per_second: self.max_requests_per_second.or(file.max_requests_per_second),
            tenant: self.tenant.or(file.tenant),
            log_format: self.log_format.or(file.log_format),
            metrics_open: self.metrics_open.or(file.metrics_open),
            qemu: self.qemu.or(file.qemu),
            vhost_device_vsock: self.vhost_device_vsock.or(file.vhost_device_vsock),
            docker_registry: self.docker_registry.or(file.docker_registry),
        }
    }

    fn complete(self, host: &Host) -> Result<ServeConfig, ConfigError> {
        let listen = self.listen.unwrap_or(DEFAULT_LISTEN);
        let data_dir = match self.data_dir {
            Some(dir) => path("data-dir", &dir)?,
            None => host.data_dir().ok_or(ConfigError::Missing {
                flag: "data-dir",
                why: "there is neither XDG_DATA_HOME nor HOME",
            })?,
        };
        let run_dir = match self.run_dir {
            Some(dir) => path("run-dir", &dir)?,
            None => host.run_dir().ok_or(ConfigError::Missing {
                flag: "run-dir",
                why: "there is no XDG_RUNTIME_DIR",
            })?,
        };
        let builder = match self.builder {
            Some(builder) if builder.is_empty() => {
                return Err(ConfigError::refused(
                    "builder",
                    "empty",
                    "a bundle's directory or reference",
                ));
            }
            Some(builder) => builder,
            None => data_dir.join("builder").display().to_string(),
        };
        let accel = self.accel.unwrap_or_default();
        let require_isolation = self.require_isolation.unwrap_or(false);
        if require_isolation && accel == Accel::Tcg {
            return Err(ConfigError::refused(
                "accel",
                "tcg",
                "auto or kvm with --require-isolation: emulation isolates nothing",
            ));
        }
        let defaults = Limits::default();
        let max_vm_memory_mb = number(
            "max-vm-memory-mb",
            self.max_vm_memory_mb,
            host.vm_memory_mb(),
            256..=MOST_MEMORY_MB,
        )?;
        let mb = |n: u32| u64::from(n) * 1024 * 1024;
        let max_source = number("max-source-mb", self.max_source_mb, 4096, 1..=1024 * 1024)?;
        Ok(ServeConfig {
            listen,
            public_host: public_host(self.public_host, listen)?,
            tls: tls(self.tls_cert, self.tls_key)?,
            builder,
            max_vms: number("max-vms", self.max_vms, host.cpus(), 1..=1024)?,
            max_vm_memory_mb,
            accel,
            require_isolation,
            egress_permit: self.egress_permit.unwrap_or_default(),
            egress_ca: self.egress_ca,
            registry: self.registry.map(registry).transpose()?,
            registry_config: self
                .registry_config
                .map(|file| path("registry-config", &file))
                .transpose()?,
            upstream: upstreams(self.upstream.unwrap_or_default())?,
            upstream_cache_bytes: 1024
                * mb(number("upstream-cache-gb", self.upstream_cache_gb, 20, 0..=1024 * 1024)?),
            log_limit_bytes: mb(number("log-limit-mb", self.log_limit_mb, 256, 1..=64 * 1024)?),
            max_kept: number("max-kept", self.max_kept, 4, 0..=1024)? as usize,
            keep: Keep {
                sessions_days: days("keep-sessions-days", self.keep_sessions_days, 90)?,
                logs_days: days("keep-logs-days", self.keep_logs_days, 90)?,
                logs_bytes: 1024
                    * mb(number("keep-logs-gb", self.keep_logs_gb, 20, 0..=1024 * 1024)?),
                builds_days: days("keep-builds-days", self.keep_builds_days, 0)?,
                images_bytes: 1024
                    * mb(number("keep-images-gb", self.keep_images_gb, 0, 0..=1024 * 1024)?),
            },
            gc_disk_percent: number("gc-disk-percent", self.gc_disk_percent, 0, 0..=99)?,
            max_queue_seconds: number(
                "max-queue-seconds",
                self.max_queue_seconds,
                3600,
                1..=30 * 24 * 60 * 60,
            )?,
            // As long as the longest build, at most.
            drain_seconds: number("drain-seconds", self.drain_seconds, 5, 0..=30 * 24 * 60 * 60)?,
            instance_disks_bytes: 1024
                * mb(number("instance-disks-gb", self.instance_disks_gb, 100, 1..=1024 * 1024)?),
            log_format: self.log_format.unwrap_or_default(),
            metrics_open: self.metrics_open.unwrap_or(false),
            tenants: self.tenant.unwrap_or_default(),
            limits: Limits {
                max_source_bytes: mb(max_source),
                max_timeout_seconds: number(
                    "max-timeout-seconds",
                    self.max_timeout_seconds,
                    defaults.max_timeout_seconds,
                    1..=30 * 24 * 60 * 60,
                )?,
                max_memory_mb: number(
                    "max-memory-mb",
                    self.max_memory_mb,
                    defaults.max_memory_mb,
                    256..=MOST_MEMORY_MB,
                )?
                // More could never start.
                .min(max_vm_memory_mb),
                max_cpus: number("max-cpus", self.max_cpus, defaults.max_cpus, 1..=255)?,
                max_disk_gb: number(
                    "max-disk-gb",
                    self.max_disk_gb,
                    defaults.max_disk_gb,
                    1..=16 * 1024,
                )?,
                max_queued: number(
                    "max-queued",
                    self.max_queued,
                    defaults.max_queued,
                    1..=100_000,
                )?,
                max_uploads: number("max-uploads", self.max_uploads, 64, 1..=10_000)? as usize,
                max_requests_per_second: number(
                    "max-requests-per-second",
                    self.max_requests_per_second,
                    defaults.max_requests_per_second,
                    1..=1_000_000,
                )?,
                network_default: self.network_default.unwrap_or(defaults.network_default),
            },
            qemu: host.program("qemu", self.qemu, "qemu-system-x86_64")?,
            vhost_device_vsock: host.program(
                "vhost-device-vsock",
                self.vhost_device_vsock,
                "vhost-device-vsock",
            )?,
            docker_registry: host.program(
                "docker-registry",
                self.docker_registry,
                "docker-registry",
            )?,
            data_dir,
            run_dir,
        })
    }
}

fn read_file(path: &Path) -> Result<ServeArgs, ConfigError> {
    use std::io::Read;
    let read = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(read)?;
    if file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(read)? as u64 > MAX_FILE {
        return Err(ConfigError::TooLarge(path.to_owned()));
    }
    toml::from_str(&text).map_err(|error| ConfigError::Parse {
        path: path.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    })
}

fn number(
    flag: &'static str,
    given: Option<u32>,
    default: u32,
    range: RangeInclusive<u32>,
) -> Result<u32, ConfigError> {
    let value = given.unwrap_or(default);
    if range.contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::refused(
        flag,
        value,
        format!("a number from {} to {}", range.start(), range.end()),
    ))
}

/// How long something is kept: up to a hundred years, and 0.
fn days(flag: &'static str, given: Option<u32>, default: u32) -> Result<u32, ConfigError> {
    number(flag, given, default, 0..=36500)
}

/// Absolute, so that it means the same whatever the process does later.
fn path(flag: &'static str, given: &Path) -> Result<PathBuf, ConfigError> {
    std::path::absolute(given).map_err(|_| ConfigError::refused(flag, "empty", "a path"))
}

/// Both, or neither.
fn tls(cert: Option<PathBuf>, key: Option<PathBuf>) -> Result<Option<TlsFiles>, ConfigError> {
    match (cert, key) {
        (None, None) => Ok(None),
        (Some(cert), Some(key)) => {
            let (cert, key) = (path("tls-cert", &cert)?, path("tls-key", &key)?);
            Ok(Some(TlsFiles { cert, key }))
        }
        (Some(_), None) => {
            Err(ConfigError::Missing { flag: "tls-key", why: "--tls-cert is given" })
        }
        (None, Some(_)) => {
            Err(ConfigError::Missing { flag: "tls-cert", why: "--tls-key is given" })
        }
    }
}

fn registry(url: Url) -> Result<Url, ConfigError> {
    let plain = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && crate::gateway::backing::prefix_of(&url).is_some()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    if plain {
        return Ok(url);
    }
    // Not repeated: it may hold a password.
    let allowed = "http(s)://HOST[:PORT][/PREFIX], with the login in --registry-config";
    Err(ConfigError::refused("registry", "something else", allowed))
}

/// Each once, and no more than a job names.
fn upstreams(given: Vec<Spec>) -> Result<Vec<Spec>, ConfigError> {
    let mut hosts = BTreeSet::new();
    if let Some(twice) = given.iter().find(|spec| !hosts.insert(spec.host.as_str())) {
        return Err(ConfigError::refused("upstream", &twice.host, "each registry once"));
    }
    if given.len() > MAX_UPSTREAMS {
        let allowed = format!("at most {MAX_UPSTREAMS} registries");
        return Err(ConfigError::refused("upstream", given.len(), allowed));
    }
    Ok(given)
}

fn public_host(given: Option<String>, listen: SocketAddr) -> Result<String, ConfigError> {
    let Some(text) = given else {
        // Listening everywhere is no address; on this host, loopback reaches it.
        let ip = match listen.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        return Ok(SocketAddr::new(ip, listen.port()).to_string());
    };
    // What a reference can begin with: a host, and a port or a dot, else it would be a repository.
    let parsed = Url::parse(&format!("http://{text}")).ok();
    let same = parsed.is_some_and(|url| {
        let (host, port) = (url.host_str().unwrap_or_default(), url.port());
        text == port.map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
            || (text.ends_with(":80") && text == format!("{host}:80"))
    });
    if same && (text.contains(':') || text.contains('.')) {
        return Ok(text);
    }
    Err(ConfigError::refused(
        "public-host",
        format!("{text:?}"),
        "HOST:PORT, such as kiln.example.com:4973",
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
