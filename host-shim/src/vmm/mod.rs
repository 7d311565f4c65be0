//! VMs: QEMU and vhost-device-vsock, behind a few functions.
//!
//! ```text
//! <run>/<id>/               ours alone
//!           record.json     what to end and remove, or to go on with, for the server after us
//!           qmp             QEMU's monitor
//!           sock/           the VM's user's, and the vsock device's working directory
//!                v_5001 v_5003 v_5004   bound before the VM starts
//!                vu         the device's, for QEMU     v   the device's, for the host's dials
//! <disks>/templates/        formatted scratch disks; the VMs' own have no name
//! <disks>/kvm.json          whether KVM runs guests
//! ```
//!
//! `start`: directory, listeners, cgroup, record → device (jail) → its socket appears → QEMU (jail), which
//! inherits everything by descriptor. Nothing is polled and nothing sleeps.
//!
//! **Invariant**: every process, socket, cgroup, disk and file made for a VM is gone when it is; what a
//! killed server leaves is gone after the next one's [`Vmm::sweep`]. One server owns a run directory.

mod accel;
mod adopt;
mod cgroup;
mod device;
mod dial;
mod isolation;
mod jail;
mod limits;
mod listener;
mod namespaces;
mod process;
mod qemu_args;
mod qmp;
mod record;
mod root;
mod scratch;
mod seccomp;
mod slots;
mod start;
mod sweep;
mod sys;
mod vm;
mod vsock;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{self, Context, SHA256};

pub use self::accel::Accel;
pub use self::dial::{DialError, Dialer};
pub use self::listener::GuestListener;
pub use self::process::ProcessId;
pub use self::qemu_args::Engine;
pub use self::qmp::GuestEnd;
pub use self::sweep::Swept;
pub use self::vm::{Pids, Vm, VmExit};

use self::cgroup::CgroupRoot;
use self::jail::{Identity, Program};
use self::root::System;
use self::scratch::Scratch;
use self::seccomp::Filters;
use self::slots::Slots;
use self::start::QEMU_MAX_FILES;

/// Removal of a VM ends within this, whatever its processes do. A killed QEMU gives back its memory in
/// well under a second.
pub(crate) const REMOVAL_DEADLINE: Duration = Duration::from_millis(1800);

/// The first of the users that VMs run as. systemd's table of user ids has this range unassigned; a
/// container's users end at 0x6fff_ffff.
pub const DEFAULT_UID_BASE: u32 = 0x7069_0000;

/// Where things are, and what VMs are to be.
#[derive(Clone, Debug)]
pub struct VmmConfig {
    /// Names this server among others on the host, in cgroups: 1 to 64 of letters, digits, `-`, `_`, `.`.
    pub instance: String,
    /// For sockets and records; this server's alone.
    pub run_dir: PathBuf,
    /// For scratch disks and their templates: a file system with room for all VMs' disks.
    pub disk_dir: PathBuf,
    /// QEMU: a path, or a name to look for.
    pub qemu: PathBuf,
    /// vhost-device-vsock: a path, or a name to look for.
    pub vsock_device: PathBuf,
    /// The builder bundle's kernel.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: PathBuf,
    /// Its root disk.
    pub root: PathBuf,
    /// How guests run.
    pub accel: Accel,
    /// Refuse to work without KVM and the whole jail.
    pub require_isolation: bool,
    /// The size of scratch disk whose template is made beforehand.
    pub default_disk_gb: u32,
    /// The first of the users that VMs run as, where the server is root. Without one, and without root, they run as the
    /// server's own user.
    pub uid_base: Option<u32>,
}

/// What one VM is to be.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// Names its directory and cgroup: 1 to 64 of letters, digits, `-`, `_`.
    pub id: String,
    /// In MiB.
    pub memory_mb: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Of the scratch disk, in GiB.
    pub disk_gb: u32,
    /// A third disk, read-only: the image that an instance runs.
    pub image: Option<Arc<File>>,
}

/// What went wrong with VMs.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The system refused something.
    #[error("cannot {what}")]
    Io {
        /// What was tried, and on what.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A program that is needed is not there.
    #[error("{0} was not found: install it, or configure its path")]
    NoProgram(PathBuf),
    /// Isolation is required and incomplete.
    #[error("isolation is required, but {0}")]
    NotIsolated(String),
    /// A VM's id or size, or the instance's name.
    #[error("{0}")]
    Bad(String),
    /// The id is that of a living VM.
    #[error("there is a VM {0} already, or there are too many")]
    Taken(String),
    /// The vsock device did not come up.
    #[error("the vsock device did not start: {why}{said}")]
    VsockDevice {
        /// What happened.
        why: String,
        /// Its own words, when it had any.
        said: String,
    },
    /// QEMU could not be stopped, or let go on.
    #[error("VM {id}: its QEMU could not be stopped or let go on: {why}")]
    Unmoved {
        /// Which VM.
        id: String,
        /// What happened.
        why: String,
    },
    /// A removed VM left something.
    #[error("VM {id} was not wholly removed: {what}")]
    Left {
        /// Which VM.
        id: String,
        /// What stays.
        what: String,
    },
}

impl VmmError {
    /// For `map_err`: names what was tried, on which path.
    fn io(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let what = format!("{what} {}", path.display());
        move |source| Self::Io { what, source }
    }
}

/// The maker of VMs. What can be prepared, it has prepared.
#[derive(Debug)]
pub struct Vmm {
    config: VmmConfig,
    programs: Programs,
    filters: Filters,
    bundle: BundleFiles,
    scratch: Scratch,
    cgroups: Option<Arc<CgroupRoot>>,
    slots: Slots,
    boot: String,
    engine: Engine,
    /// Of a VM's user, beside its own: to open `/dev/kvm`.
    groups: Vec<u32>,
    /// What VMs' own roots have of the host's, or why they have none of their own.
    roots: Result<System, String>,
    warnings: Vec<String>,
}

#[derive(Debug)]
struct Programs {
    qemu: Program,
    vsock_device: Program,
}

#[derive(Debug)]
struct BundleFiles {
    kernel: File,
    initrd: File,
    root: File,
}

impl Vmm {
    /// Opens programs and bundle, finds out how guests run, makes the default disk's template. Removes nothing:
    /// call [`Vmm::sweep`] first thing after it.
    pub async fn new(config: VmmConfig) -> Result<Self, VmmError> {
        if !is_name(&config.instance, true) {
            return Err(VmmError::Bad(format!("{:?} cannot name an instance", config.instance)));
        }
        for dir in [&config.run_dir, &config.disk_dir] {
            make_private(dir).map_err(VmmError::io("make the directory", dir))?;
        }
        let boot =
            record::boot_id().map_err(VmmError::io("read", Path::new("the kernel's boot id")))?;
        let programs = Programs {
            qemu: open_program(&config.qemu)?,
            vsock_device: open_program(&config.vsock_device)?,
        };
        let bundle = BundleFiles {
            kernel: open_for_all(&config.kernel)?,
            initrd: open_for_all(&config.initrd)?,
            root: File::open(&config.root).map_err(VmmError::io("open", &config.root))?,
        };
        let filters = Filters::new().map_err(io::Error::other);
        let filters =
            filters.map_err(VmmError::io("make a filter of system calls for", &config.qemu))?;
        let cgroups = CgroupRoot::find(&config.instance).map(Arc::new);
        let mut vmm = Self {
            scratch: Scratch::new(&config.disk_dir)?,
            config,
            programs,
            filters,
            bundle,
            cgroups,
            slots: Slots::default(),
            boot,
            engine: Engine::Tcg,
            groups: vec![],
            roots: Err("there are no users for them".to_owned()),
            warnings: vec![],
        };
        vmm.try_roots().await;
        vmm.choose_engine().await?;
        vmm.judge_isolation()?;
        if let Some(sentence) = device::warning(&vmm.config.vsock_device).await {
            vmm.warn(sentence);
        }
        vmm.scratch.template(vmm.config.default_disk_gb).await?;
        Ok(vmm)
    }

    /// How guests run.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// What operators should know, one sentence each. Already logged.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Waits until VMs that were dropped are gone, or for as long as a removal may take.
    pub async fn wait_for_removals(&self) {
        let slots = self.slots.clone();
        let waited = tokio::task::spawn_blocking(move || slots.wait_for_removals(REMOVAL_DEADLINE));
        if let Err(error) = waited.await {
            tracing::error!(%error, "cannot wait for the removal of VMs");
        }
    }

    /// Ends and removes what an earlier server with this run directory left. VMs of this one are left alone.
    pub async fn sweep(&self) -> Result<Swept, VmmError> {
        let (run_dir, cgroups) = (self.config.run_dir.clone(), self.cgroups.clone());
        let (boot, live) = (self.boot.clone(), self.slots.live());
        let swept = tokio::task::spawn_blocking(move || {
            sweep::sweep(&run_dir, cgroups.as_deref(), &boot, &live)
        });
        let swept = swept.await.map_err(io::Error::other);
        swept.map_err(VmmError::io("sweep", &self.config.run_dir))
    }

    /// The same where no server runs: `instance` and `run_dir` are those of the one that was killed.
    pub async fn sweep_leftovers(instance: &str, run_dir: &Path) -> Result<Swept, VmmError> {
        let boot =
            record::boot_id().map_err(VmmError::io("read", Path::new("the kernel's boot id")))?;
        let (instance, dir) = (instance.to_owned(), run_dir.to_owned());
        let swept = tokio::task::spawn_blocking(move || {
            let cgroups = CgroupRoot::find(&instance);
            sweep::sweep(&dir, cgroups.as_ref(), &boot, &BTreeSet::new())
        });
        swept.await.map_err(io::Error::other).map_err(VmmError::io("sweep", run_dir))
    }

    async fn choose_engine(&mut self) -> Result<(), VmmError> {
        let access = accel::access();
        if let accel::Access::Group(gid) = access {
            self.groups = vec![gid];
        }
        let verdict = match self.config.accel {
            Accel::Kvm => match access {
                accel::Access::None(why) if self.isolates_users() => {
                    return Err(VmmError::Bad(format!("KVM was asked for, but {why}")));
                }
                _ => accel::Verdict { runs: true, why: "KVM was configured".to_owned() },
            },
            Accel::Tcg => {
                accel::Verdict { runs: false, why: "emulation was configured".to_owned() }
            }
            Accel::Auto => match access {
                accel::Access::None(why) if self.isolates_users() => {
                    accel::Verdict { runs: false, why }
                }
                _ => self.probed().await?,
            },
        };
        tracing::info!(kvm = verdict.runs, why = verdict.why, "chose how guests run");
        if verdict.runs {
            self.engine = Engine::Kvm;
        } else {
            self.engine = Engine::Tcg;
            self.groups = vec![];
            self.warn(format!(
                "guests are emulated by QEMU's TCG, which is no isolation boundary: build only what you trust ({})",
                verdict.why
            ));
        }
        Ok(())
    }

    async fn probed(&self) -> Result<accel::Verdict, VmmError> {
        let file = self.config.disk_dir.join("kvm.json");
        let key = self.probe_key().await?;
        if let Some(verdict) = accel::recall(&file, &key) {
            return Ok(verdict);
        }
        let verdict = self.probe_kvm().await?;
        accel::remember(&file, &key, &verdict);
        Ok(verdict)
    }

    /// Kernel, QEMU, this boot, and whether VMs have users of their own.
    async fn probe_key(&self) -> Result<String, VmmError> {
        let files = [&self.bundle.kernel, &self.programs.qemu.file].map(File::try_clone);
        let mut hash = Context::new(&SHA256);
        hash.update(format!("{} {:?}", self.boot, self.identity(0)).as_bytes());
        let hashed = tokio::task::spawn_blocking(move || {
            for file in files {
                hash.update(digest_of(&file?)?.as_ref());
            }
            Ok(hex::encode(hash.finish()))
        });
        let hashed = hashed.await.map_err(io::Error::other).flatten();
        hashed.map_err(VmmError::io("read", &self.config.kernel))
    }

    fn warn(&mut self, sentence: String) {
        tracing::warn!("{sentence}");
        self.warnings.push(sentence);
    }

    fn isolates_users(&self) -> bool {
        self.config.uid_base.is_some() && rustix::process::geteuid().is_root()
    }

    /// Who the VM in a slot is; the server itself when that cannot be changed.
    fn identity(&self, slot: u32) -> Option<Identity> {
        let base = self.config.uid_base.filter(|_| self.isolates_users())?;
        Some(Identity { uid: base.saturating_add(slot), groups: self.groups.clone() })
    }
}

impl Drop for Vmm {
    /// VMs that were dropped before are gone when this is: a server that ends leaves nothing.
    fn drop(&mut self) {
        self.slots.wait_for_removals(REMOVAL_DEADLINE);
    }
}

/// A name that is a single plain component of a path.
fn is_name(name: &str, dots: bool) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_' || (dots && b == b'.');
    (1..=64).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

/// Nobody else looks into it; VMs' users get what they need by descriptor.
fn make_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn open_for_all(path: &Path) -> Result<File, VmmError> {
    File::open(path).and_then(jail::readable_by_all).map_err(VmmError::io("open", path))
}

/// Opens a program by its path, or by its name along `PATH`.
fn open_program(program: &Path) -> Result<Program, VmmError> {
    let open = |path: &Path| -> io::Result<Program> {
        let path = std::fs::canonicalize(path)?;
        Ok(Program { file: File::open(&path)?, path })
    };
    if program.components().count() > 1 {
        return open(program).map_err(VmmError::io("open the program", program));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).find_map(|dir| open(&dir.join(program)).ok());
    found.ok_or_else(|| VmmError::NoProgram(program.to_owned()))
}

fn digest_of(file: &File) -> io::Result<digest::Digest> {
    use std::os::unix::fs::FileExt;
    let (mut hash, mut at, mut chunk) = (Context::new(&SHA256), 0, vec![0; 1 << 20]);
    loop {
        match file.read_at(&mut chunk, at)? {
            0 => return Ok(hash.finish()),
            n => {
                hash.update(&chunk[..n]);
                at += n as u64;
            }
        }
    }
}
