//! Starting a VM, and the boot that finds out about KVM: the same directory, user, cgroup and record for both, so that the
//! same removal and the same sweep do for both.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tokio::net::UnixStream;

use super::accel::{self, Verdict};
use super::cgroup::Cgroup;
use super::jail::{self, Identity, Launch, Output};
use super::limits::Limits;
use super::listener::GuestListener;
use super::qemu_args::{self, Engine, Fds, Machine};
use super::qmp::Qmp;
use super::record::Record;
use super::root::Root;
use super::vm::{Remains, Vm};
use super::vsock::{self, Appearing, NotConnected};
use super::{VmSpec, Vmm, VmmError, is_name};

/// The ports that a guest dials: control, registry, egress.
pub(super) const PORTS: [u32; 3] = [5001, 5003, 5004];

/// The directory of a VM's sockets, in the VM's directory.
pub(super) const SOCKETS: &str = "sock";

/// QEMU's monitor, in the VM's directory.
const MONITOR: &str = "qmp";

/// QEMU opens its disks' sets again, firmware, and few other files.
pub(super) const QEMU_MAX_FILES: u64 = 256;

/// A probe's place among the VMs. Not a build's id: those have no dot.
const PROBE_ID: &str = "kvm.probe";

/// The directory of one VM, and who its processes are.
struct Place {
    sock: PathBuf,
    identity: Option<Identity>,
    record: Record,
    cgroup_procs: Vec<File>,
}

impl Vmm {
    /// Starts a VM. Its listeners are bound before it runs; it has just begun to boot when this returns.
    pub async fn start(&self, spec: VmSpec) -> Result<Vm, VmmError> {
        let began = Instant::now();
        check(&spec)?;
        let template = self.scratch.template(spec.disk_gb).await?;
        let limits = Limits::of(
            self.engine,
            spec.memory_mb,
            spec.cpus,
            self.scratch.in_memory(spec.disk_gb),
        );
        let (mut remains, mut place) = self.place(&spec.id, &limits)?;

        let [control, registry, egress] = listen(&place.sock, place.record.uid)?;
        let appearing =
            Appearing::watch(&place.sock).map_err(VmmError::io("watch", &place.sock))?;
        place.hand_over()?;
        let device_output =
            Output::new("kiln-vsock").map_err(VmmError::io("make memory for", &place.sock))?;
        self.launch(
            &mut remains,
            &mut place,
            Program::VsockDevice,
            vsock::args(),
            &[],
            &device_output,
        )?;

        // While the device comes up.
        let scratch = self
            .scratch
            .disk(&template)
            .map_err(VmmError::io("make a scratch disk like", &template))?;
        let qemu_output =
            Output::new("kiln-qemu").map_err(VmmError::io("make memory for", &place.sock))?;
        let (monitor, ours) =
            listening(&remains.dir).map_err(VmmError::io("make a monitor in", &remains.dir))?;

        let device = appearing.connect(&place.sock, &remains.processes[0]).await;
        let device = device.map_err(|error| not_connected(&error, &device_output))?;
        let fds = Fds {
            kernel: self.bundle.kernel.as_raw_fd(),
            initrd: self.bundle.initrd.as_raw_fd(),
            root: self.bundle.root.as_raw_fd(),
            scratch: scratch.as_raw_fd(),
            image: spec.image.as_ref().map(AsRawFd::as_raw_fd),
            vsock: device.as_raw_fd(),
            qmp: monitor.as_raw_fd(),
        };
        let VmSpec { id, memory_mb, cpus, .. } = spec;
        let args = qemu_args::vm(&Machine { name: &id, engine: self.engine, memory_mb, cpus, fds });
        let args = args.into_iter().map(OsString::from).collect();
        let mut keep = vec![fds.kernel, fds.initrd, fds.root, fds.scratch, fds.vsock, fds.qmp];
        keep.extend(fds.image);
        self.launch(&mut remains, &mut place, Program::Qemu, args, &keep, &qemu_output)?;
        let started = Instant::now();
        drop(monitor);
        place.record.started_at = crate::clock::now();
        place
            .record
            .write(&remains.dir)
            .map_err(VmmError::io("write the record in", &remains.dir))?;

        let qmp =
            Qmp::new(to_tokio(ours).map_err(VmmError::io("use the monitor of", &place.sock))?);
        if let Err(error) = qmp.negotiate().await {
            tracing::warn!(vm = id, %error, "QEMU's monitor is lost already");
        }
        tracing::info!(vm = id, pid = remains.processes[1].id().pid, took = ?(started - began), "started a VM");
        Ok(Vm {
            control: Arc::new(control),
            registry: Arc::new(registry),
            egress: Arc::new(egress),
            id,
            started,
            qmp,
            qemu_output,
            device_output,
            console: std::sync::Mutex::default(),
            remains,
        })
    }

    /// Boots the kernel under KVM, and ends it as soon as it has shown what it does.
    pub(super) async fn probe_kvm(&self) -> Result<Verdict, VmmError> {
        let limits = Limits::of(Engine::Kvm, qemu_args::PROBE_MB, 1, 0);
        let (mut remains, mut place) = match self.place(PROBE_ID, &limits) {
            // What a killed server's probe left; its processes are the sweep's to end.
            Err(VmmError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                self.sweep().await?;
                self.place(PROBE_ID, &limits)?
            }
            other => other?,
        };
        place.hand_over()?;
        let output =
            Output::new("kiln-probe").map_err(VmmError::io("make memory for", &place.sock))?;
        let (ours, theirs) =
            StdStream::pair().map_err(VmmError::io("make sockets for", &place.sock))?;
        let keep =
            [self.bundle.kernel.as_raw_fd(), self.bundle.initrd.as_raw_fd(), theirs.as_raw_fd()];
        let args = qemu_args::kvm_probe(keep[0], keep[1], keep[2])
            .into_iter()
            .map(OsString::from)
            .collect();
        self.launch(&mut remains, &mut place, Program::KvmProbe, args, &keep, &output)?;
        drop(theirs);
        let console = to_tokio(ours).map_err(VmmError::io("use the console of", &place.sock))?;
        let mut verdict = accel::sign_of_life(console).await;
        if let Some(said) = output.text().lines().last() {
            verdict.why = format!("{}; QEMU said: {said}", verdict.why);
        }
        let removed = tokio::task::spawn_blocking(move || remains.clear()).await;
        match removed.map_err(|error| error.to_string()) {
            Ok(failures) if failures.is_empty() => Ok(verdict),
            Ok(failures) => {
                Err(VmmError::Left { id: PROBE_ID.to_owned(), what: failures.join("; ") })
            }
            Err(what) => Err(VmmError::Left { id: PROBE_ID.to_owned(), what }),
        }
    }

    /// Directory, user, cgroup and record. Whatever fails, what was made is removed with the [`Remains`].
    fn place(&self, id: &str, limits: &Limits) -> Result<(Remains, Place), VmmError> {
        let slot = self.slots.take(id).ok_or_else(|| VmmError::Taken(id.to_owned()))?;
        let (identity, number) = (self.identity(slot.number()), slot.number());
        let dir = self.config.run_dir.join(id);
        let sock = dir.join(SOCKETS);
        // Not `recursive`: a directory of that name is somebody's.
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(VmmError::io("make the directory", &dir))?;
        let mut remains = Remains::new(dir.clone(), slot);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&sock)
            .map_err(VmmError::io("make the directory", &sock))?;
        let mut record = Record {
            boot: self.boot.clone(),
            uid: 0,
            slot: number,
            started_at: 0,
            cgroup: None,
            limits: vec![],
            processes: vec![],
        };
        record.uid =
            identity.as_ref().map_or_else(|| rustix::process::geteuid().as_raw(), |who| who.uid);
        let mut cgroup_procs = vec![];
        if let Some(root) = &self.cgroups {
            let cgroup: Cgroup =
                root.create(id, limits).map_err(VmmError::io("make a cgroup for", &dir))?;
            let mut dirs = cgroup.dirs().iter().cloned();
            (record.cgroup, record.limits) = (dirs.next(), dirs.collect());
            let cgroup = remains.cgroup.insert(cgroup);
            cgroup_procs = cgroup.procs().map_err(VmmError::io("open the cgroup of", &dir))?;
        }
        record.write(&dir).map_err(VmmError::io("write the record in", &dir))?;
        Ok((remains, Place { sock, identity, record, cgroup_procs }))
    }

    fn launch(
        &self,
        remains: &mut Remains,
        place: &mut Place,
        program: Program,
        args: Vec<OsString>,
        keep: &[RawFd],
        output: &Output,
    ) -> Result<(), VmmError> {
        let (name, file, filters, dir, max_files) = match program {
            Program::Qemu | Program::KvmProbe => (
                "qemu-system-x86_64",
                &self.programs.qemu,
                &self.filters.qemu,
                Path::new("/"),
                QEMU_MAX_FILES,
            ),
            Program::VsockDevice => (
                "vhost-device-vsock",
                &self.programs.vsock_device,
                &self.filters.vsock_device,
                place.sock.as_path(),
                vsock::MAX_FILES,
            ),
        };
        let root = self.root(program, &file.path, &remains.dir);
        let process = jail::launch(Launch {
            name,
            program: file,
            args,
            dir,
            keep,
            output,
            cgroup_procs: &place.cgroup_procs,
            identity: place.identity.as_ref(),
            root: root.map_err(VmmError::io("make a root directory in", &remains.dir))?,
            filters,
            max_files,
        })
        .map_err(|source| VmmError::Io { what: format!("start {name}"), source })?;
        place.record.processes.push(process.id());
        remains.processes.push(process);
        place.record.write(&remains.dir).map_err(VmmError::io("write the record in", &remains.dir))
    }

    /// The root of one of a VM's programs: the device writes in its directory of sockets, QEMU nowhere.
    fn root(&self, program: Program, path: &Path, at: &Path) -> io::Result<Option<Root>> {
        let Ok(system) = &self.roots else { return Ok(None) };
        let kvm = match program {
            Program::Qemu => self.engine == Engine::Kvm,
            Program::KvmProbe => true,
            Program::VsockDevice => false,
        };
        let devices: &[&str] = if kvm { &[accel::DEVICE] } else { &[] };
        let work = matches!(program, Program::VsockDevice);
        Root::new(system, at, path, devices, work).map(Some)
    }
}

/// QEMU's monitor as a socket that listens, and our connection to it: QEMU finds it waiting. By the directory's
/// descriptor, as its path may be longer than a socket's name can be.
fn listening(dir: &Path) -> io::Result<(StdListener, StdStream)> {
    let dir = File::open(dir)?;
    let path = format!("/proc/self/fd/{}/{MONITOR}", dir.as_raw_fd());
    let listener = StdListener::bind(&path)?;
    let ours = StdStream::connect(&path)?;
    Ok((listener, ours))
}

/// Connects to a monitor that listens already.
pub(super) fn monitor(dir: &Path) -> io::Result<StdStream> {
    let dir = File::open(dir)?;
    StdStream::connect(format!("/proc/self/fd/{}/{MONITOR}", dir.as_raw_fd()))
}

/// Binds the guest's ports in a directory that is ours alone as yet. By its descriptor, too.
pub(super) fn listen(sock: &Path, uid: u32) -> Result<[GuestListener; 3], VmmError> {
    let bind = || -> io::Result<[GuestListener; 3]> {
        let dir = File::open(sock)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
        let [control, registry, egress] = PORTS;
        let one = |port| GuestListener::bind(&path, port, uid);
        Ok([one(control)?, one(registry)?, one(egress)?])
    };
    bind().map_err(VmmError::io("bind the guest's ports in", sock))
}

/// Gives the directory of sockets to a user, and nobody else.
pub(super) fn give(sock: &Path, uid: u32) -> Result<(), VmmError> {
    std::os::unix::fs::lchown(sock, Some(uid), Some(uid))
        .map_err(VmmError::io("change the owner of", sock))
}

impl Place {
    /// From here on the directory of sockets is the VM's.
    fn hand_over(&self) -> Result<(), VmmError> {
        match &self.identity {
            None => Ok(()),
            Some(who) => give(&self.sock, who.uid),
        }
    }
}

#[derive(Clone, Copy)]
enum Program {
    Qemu,
    /// QEMU, to find out about KVM.
    KvmProbe,
    VsockDevice,
}

fn check(spec: &VmSpec) -> Result<(), VmmError> {
    let VmSpec { id, memory_mb, cpus, disk_gb, image: _ } = spec;
    if !is_name(id, false) {
        return Err(VmmError::Bad(format!("{id:?} cannot name a VM")));
    }
    // Q35 takes 255; the rest is what the numbers can be at all. Limits of policy are the API's.
    for (name, value, least, most) in [
        ("memory_mb", *memory_mb, 128, 1 << 20),
        ("cpus", *cpus, 1, 255),
        ("disk_gb", *disk_gb, 1, 16 << 10),
    ] {
        if !(least..=most).contains(&value) {
            return Err(VmmError::Bad(format!(
                "{name} of a VM is {value}, but can be {least} to {most}"
            )));
        }
    }
    Ok(())
}

fn not_connected(error: &NotConnected, output: &Output) -> VmmError {
    let said = output.text();
    let said = if said.is_empty() { said } else { format!("; it said: {}", said.trim()) };
    VmmError::VsockDevice { why: error.to_string(), said }
}

pub(super) fn to_tokio(stream: StdStream) -> io::Result<UnixStream> {
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_sizes_have_bounds() {
        let id = "0198-a_Z".to_owned();
        let good = VmSpec { id, memory_mb: 128, cpus: 1, disk_gb: 1, image: None };
        assert!(check(&good).is_ok());
        for id in ["", ".", "..", "a/b", "a.b", "ä", "a b", &"x".repeat(65)] {
            assert!(check(&VmSpec { id: id.to_owned(), ..good.clone() }).is_err(), "{id:?}");
        }
        assert!(check(&VmSpec { id: "x".repeat(64), ..good.clone() }).is_ok());
        assert!(check(&VmSpec { memory_mb: 127, ..good.clone() }).is_err());
        assert!(check(&VmSpec { memory_mb: (1 << 20) + 1, ..good.clone() }).is_err());
        assert!(check(&VmSpec { cpus: 0, ..good.clone() }).is_err());
        assert!(check(&VmSpec { cpus: 256, ..good.clone() }).is_err());
        assert!(check(&VmSpec { disk_gb: 0, ..good.clone() }).is_err());
        assert!(check(&VmSpec { disk_gb: (16 << 10) + 1, ..good }).is_err());
    }
}
