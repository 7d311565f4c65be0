//! What breaks out of a guest into QEMU, or into the vsock device, gets nowhere.
//!
//! Each probe is a system call that such a thing would make, made by the real process in its real jail: a tracer stops
//! it, lets it make the call, and looks at what it gets. The same call is made by a process outside, where it has to succeed: so it is
//! the jail that refuses it, and not the call that is wrong.
#![allow(clippy::unwrap_used, missing_docs)]
#![allow(clippy::cast_sign_loss, reason = "arguments of system calls, as the kernel takes them")]

use std::fs::{self, File};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use kiln::vmm::{Accel, DEFAULT_UID_BASE, Vm, VmSpec, Vmm, VmmConfig};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What a process got for a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Got {
    Value(i64),
    Refused(Errno),
    /// QEMU's own filter ends it.
    Ended(Signal),
}

/// `ERESTARTSYS` to `ERESTART_RESTARTBLOCK`, which only a tracer sees.
const RESTARTED: std::ops::RangeInclusive<i64> = -516..=-512;

/// A process that is stopped, and makes the calls that it is told to.
struct Inside {
    pid: Pid,
    was: libc::user_regs_struct,
    /// Of a `syscall` instruction.
    site: u64,
    /// The call that it has still to make.
    again: Option<u64>,
    memory: File,
    /// The next free place below its stack.
    top: u64,
    alive: bool,
}

impl Inside {
    /// Stops it where it waits in a system call, or where it makes the next one.
    fn stop(pid: i32) -> Self {
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"));
        let (pid, memory) = (Pid::from_raw(pid), memory.unwrap());
        let stopped = || waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap();
        ptrace::attach(pid).unwrap();
        assert!(matches!(stopped(), WaitStatus::Stopped(_, Signal::SIGSTOP)));
        let mut was = ptrace::getregs(pid).unwrap();
        let mut code = [0; 2];
        memory.read_exact_at(&mut code, was.rip - 2).unwrap();
        let mut again = RESTARTED.contains(&was.rax.cast_signed()).then_some(was.orig_rax);
        if code != [0x0f, 0x05] {
            let next_stop = || {
                ptrace::syscall(pid, None).unwrap();
                assert!(matches!(stopped(), WaitStatus::Stopped(_, Signal::SIGTRAP)));
            };
            next_stop();
            was = ptrace::getregs(pid).unwrap();
            again = Some(was.orig_rax);
            // That call is not made now.
            was.orig_rax = u64::MAX;
            ptrace::setregs(pid, was).unwrap();
            next_stop();
        }
        // Beyond the red zone.
        let top = (was.rsp - 0x1000) & !0xf;
        Self { pid, was, site: was.rip - 2, again, memory, top, alive: true }
    }

    fn put(&mut self, bytes: &[u8]) -> u64 {
        self.top = (self.top - bytes.len() as u64) & !0xf;
        self.memory.write_all_at(bytes, self.top).unwrap();
        self.top
    }

    fn text(&mut self, text: &Path) -> u64 {
        self.put(&[text.as_os_str().as_encoded_bytes(), b"\0"].concat())
    }

    fn call(&mut self, number: libc::c_long, arguments: &[u64]) -> Got {
        let mut given = [0; 6];
        given[..arguments.len()].copy_from_slice(arguments);
        let [rdi, rsi, rdx, r10, r8, r9] = given;
        let rax = number.unsigned_abs();
        let regs = libc::user_regs_struct {
            rip: self.site,
            rax,
            orig_rax: u64::MAX,
            rsp: self.top - 0x100,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.was
        };
        ptrace::setregs(self.pid, regs).unwrap();
        ptrace::step(self.pid, None).unwrap();
        match self.stopped_again() {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                let rax = ptrace::getregs(self.pid).unwrap().rax.cast_signed();
                if (-4095..0).contains(&rax) {
                    Got::Refused(Errno::from_raw(i32::try_from(-rax).unwrap()))
                } else {
                    Got::Value(rax)
                }
            }
            WaitStatus::Signaled(_, signal, _) => {
                self.alive = false;
                Got::Ended(signal)
            }
            // It would end it.
            WaitStatus::Stopped(_, signal) => Got::Ended(signal),
            other => panic!("{other:?}"),
        }
    }

    /// How the call ended. A filter may end the thread alone, of which the kernel tells nobody while the process has others.
    fn stopped_again(&self) -> WaitStatus {
        let stat = format!("/proc/{}/stat", self.pid);
        loop {
            match waitpid(self.pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)).unwrap() {
                WaitStatus::StillAlive => {}
                status => return status,
            }
            if fs::read_to_string(&stat).unwrap_or_default().contains(") Z ") {
                return WaitStatus::Signaled(self.pid, Signal::SIGSYS, false);
            }
            std::thread::yield_now();
        }
    }

    /// Lets it go on as if nothing had been.
    fn go_on(self) {
        if !self.alive {
            return;
        }
        let mut regs = self.was;
        if let Some(number) = self.again {
            (regs.rip, regs.rax) = (self.site, number);
        }
        // To the kernel this stop is in no call.
        regs.orig_rax = u64::MAX;
        ptrace::setregs(self.pid, regs).unwrap();
        ptrace::detach(self.pid, None).unwrap();
    }
}

/// What there is to be reached on the host, and of another VM.
struct World {
    dir: PathBuf,
    other: PathBuf,
    other_qemu: i32,
    /// A process of the server's user.
    bystander: i32,
    bystander_stack: u64,
    tcp: std::net::SocketAddr,
    udp: std::net::SocketAddr,
    abstract_name: String,
}

type Probe = (&'static str, By, fn(&mut Inside, &World) -> Got);

/// What refuses a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// A filter of system calls: ours, or QEMU's own, which ends QEMU.
    Filter,
    /// What it names is not in the root that the process sees.
    Root,
    /// There is no program in that root but its own; QEMU may not even try.
    RootOrFilter,
    /// Nobody listens in its network.
    Network,
    /// The user that it is. The filter forbids the device to try.
    User,
    /// The same, for a file that only QEMU has.
    FileOfQemu,
}

impl By {
    fn is(self, whose: Whose, got: Got) -> bool {
        let by_filter = match whose {
            Whose::Qemu => [
                Got::Refused(Errno::EPERM),
                Got::Ended(Signal::SIGSYS),
                // `clone3`, which the C library then does without.
                Got::Refused(Errno::ENOSYS),
            ]
            .contains(&got),
            Whose::VsockDevice => got == Got::Refused(Errno::ENOSYS),
        };
        match (self, whose) {
            (Self::Filter, _)
            | (Self::RootOrFilter, Whose::Qemu)
            | (Self::User, Whose::VsockDevice) => by_filter,
            (Self::Root | Self::RootOrFilter, _) | (Self::FileOfQemu, Whose::VsockDevice) => {
                got == Got::Refused(Errno::ENOENT)
            }
            (Self::Network, _) => got == Got::Refused(Errno::ECONNREFUSED),
            (Self::User, Whose::Qemu) => got == Got::Refused(Errno::EPERM),
            (Self::FileOfQemu, Whose::Qemu) => got == Got::Refused(Errno::EACCES),
        }
    }
}

fn open(inside: &mut Inside, path: &Path) -> Got {
    let path = inside.text(path);
    inside.call(libc::SYS_openat, &[at_cwd(), path, libc::O_RDONLY as u64])
}

fn at_cwd() -> u64 {
    i64::from(libc::AT_FDCWD).cast_unsigned()
}

fn connect(inside: &mut Inside, domain: i32, kind: i32, address: &[u8]) -> Got {
    let socket = match inside.call(libc::SYS_socket, &[domain as u64, kind as u64, 0]) {
        Got::Value(fd) => fd.cast_unsigned(),
        refused => return refused,
    };
    let at = inside.put(address);
    inside.call(libc::SYS_connect, &[socket, at, address.len() as u64])
}

fn inet(address: std::net::SocketAddr) -> Vec<u8> {
    let std::net::SocketAddr::V4(v4) = address else { panic!("{address}") };
    let family = u16::try_from(libc::AF_INET).unwrap().to_ne_bytes();
    [&family[..], &v4.port().to_be_bytes(), &v4.ip().octets(), &[0; 8]].concat()
}

fn unix(path: &[u8]) -> Vec<u8> {
    let family = u16::try_from(libc::AF_UNIX).unwrap().to_ne_bytes();
    let mut address = [&family[..], path].concat();
    assert!(address.len() < 110, "a socket's name is too long: {}", address.len());
    if path[0] != 0 {
        address.push(0);
    }
    address
}

fn connect_path(inside: &mut Inside, path: &Path) -> Got {
    connect(inside, libc::AF_UNIX, libc::SOCK_STREAM, &unix(path.as_os_str().as_encoded_bytes()))
}

fn exec(inside: &mut Inside, path: &Path) -> Got {
    let path = inside.text(path);
    let none = inside.put(&[0; 8]);
    inside.call(libc::SYS_execve, &[path, none, none])
}

/// In the directory that it is in: the device's is where the host opens the VM's sockets.
fn plant(inside: &mut Inside, number: libc::c_long) -> Got {
    let at = inside.text(Path::new(&format!("planted-{number}")));
    match number {
        libc::SYS_symlinkat => {
            let target = inside.text(Path::new("/etc/passwd"));
            inside.call(number, &[target, at_cwd(), at])
        }
        libc::SYS_linkat => {
            let source = inside.text(Path::new("v"));
            inside.call(number, &[at_cwd(), source, at_cwd(), at, 0])
        }
        _ => inside.call(number, &[at_cwd(), at, u64::from(libc::S_IFIFO | 0o600), 0]),
    }
}

fn vector(inside: &mut Inside, base: u64, length: u64) -> u64 {
    inside.put(&[base.to_ne_bytes(), length.to_ne_bytes()].concat())
}

/// What is tried.
const PROBES: &[Probe] = &[
    // Other programs.
    ("execve of a shell", By::RootOrFilter, |p, _| exec(p, Path::new("/bin/sh"))),
    ("execveat of a shell", By::Filter, |p, _| {
        let (path, none) = (p.text(Path::new("/bin/sh")), p.put(&[0; 8]));
        p.call(libc::SYS_execveat, &[at_cwd(), path, none, none, 0])
    }),
    // Users and privileges.
    ("setuid", By::Filter, |p, _| p.call(libc::SYS_setuid, &[0])),
    ("setresuid", By::Filter, |p, _| p.call(libc::SYS_setresuid, &[0, 0, 0])),
    ("setresgid", By::Filter, |p, _| p.call(libc::SYS_setresgid, &[0, 0, 0])),
    ("setgroups", By::Filter, |p, _| {
        let list = p.put(&[0; 4]);
        p.call(libc::SYS_setgroups, &[1, list])
    }),
    ("capset", By::Filter, |p, _| {
        let version_3 = 0x2008_0522_u64;
        // `CAP_CHOWN`, effective and permitted.
        let chown = p.put(&[1_u32, 1, 0, 0, 0, 0].map(u32::to_ne_bytes).concat());
        let head = p.put(&version_3.to_ne_bytes());
        p.call(libc::SYS_capset, &[head, chown])
    }),
    // Another VM's.
    ("another VM's disk", By::Root, |p, w| {
        let disks = w.dir.join("disks");
        let open_there = descriptors(w.other_qemu);
        let (fd, _) = open_there.iter().find(|(_, what)| what.starts_with(&disks)).unwrap();
        open(p, Path::new(&format!("/proc/{}/fd/{fd}", w.other_qemu)))
    }),
    ("another VM's record", By::Root, |p, w| open(p, &w.other.join("record.json"))),
    ("another VM's monitor", By::Root, |p, w| connect_path(p, &w.other.join("qmp"))),
    ("another VM's vsock device", By::Root, |p, w| connect_path(p, &w.other.join("sock/v"))),
    ("another VM's control port", By::Root, |p, w| connect_path(p, &w.other.join("sock/v_5001"))),
    // The host's files.
    ("a key of the server's", By::Root, |p, w| open(p, &w.dir.join("key"))),
    ("a file that all may read", By::Root, |p, w| open(p, &w.dir.join("public"))),
    ("the list of users", By::Root, |p, _| open(p, Path::new("/etc/passwd"))),
    ("the server's directory", By::Root, |p, w| open(p, &w.dir)),
    ("cgroups", By::Root, |p, _| open(p, Path::new("/sys/fs/cgroup"))),
    ("the first process", By::Root, |p, _| open(p, Path::new("/proc/1/status"))),
    ("the server's root", By::Root, |p, _| {
        open(p, Path::new(&format!("/proc/{}/root", std::process::id())))
    }),
    ("the server's variables", By::Root, |p, _| {
        open(p, Path::new(&format!("/proc/{}/environ", std::process::id())))
    }),
    ("another VM's memory", By::Root, |p, w| {
        open(p, Path::new(&format!("/proc/{}/mem", w.other_qemu)))
    }),
    ("the kernel's settings", By::Root, |p, _| open(p, Path::new("/proc/sys/kernel/hostname"))),
    ("the host's devices", By::Root, |p, _| open(p, Path::new("/dev/null"))),
    ("writing the builder's disk", By::FileOfQemu, |p, _| {
        let path = bundle().join("root.erofs").canonicalize().unwrap();
        let held = descriptors(p.pid.as_raw()).into_iter().find(|(_, what)| *what == path);
        let by = |fd| PathBuf::from(format!("/proc/self/fd/{fd}"));
        let path = p.text(&held.map_or(path, |(fd, _)| by(fd)));
        p.call(libc::SYS_openat, &[at_cwd(), path, libc::O_RDWR as u64])
    }),
    // Networks.
    ("TCP", By::Filter, |p, w| connect(p, libc::AF_INET, libc::SOCK_STREAM, &inet(w.tcp))),
    ("UDP", By::Filter, |p, w| connect(p, libc::AF_INET, libc::SOCK_DGRAM, &inet(w.udp))),
    ("an abstract socket", By::Network, |p, w| {
        let name = [b"\0", w.abstract_name.as_bytes()].concat();
        connect(p, libc::AF_UNIX, libc::SOCK_STREAM, &unix(&name))
    }),
    ("a local socket", By::Root, |p, w| connect_path(p, &w.dir.join("service"))),
    ("netlink", By::Filter, |p, _| {
        p.call(libc::SYS_socket, &[libc::AF_NETLINK as u64, libc::SOCK_RAW as u64, 0])
    }),
    ("raw packets", By::Filter, |p, _| {
        p.call(libc::SYS_socket, &[libc::AF_PACKET as u64, libc::SOCK_RAW as u64, 0])
    }),
    // Other processes.
    ("ptrace", By::Filter, |p, w| {
        p.call(libc::SYS_ptrace, &[u64::from(libc::PTRACE_SEIZE), w.bystander as u64, 0, 0])
    }),
    ("process_vm_readv", By::Filter, |p, w| {
        let place = p.put(&[0; 8]);
        let (ours, theirs) = (vector(p, place, 8), vector(p, w.bystander_stack, 8));
        p.call(libc::SYS_process_vm_readv, &[w.bystander as u64, ours, 1, theirs, 1, 0])
    }),
    ("pidfd_getfd", By::Filter, |p, w| {
        match p.call(libc::SYS_pidfd_open, &[w.bystander as u64, 0]) {
            Got::Value(fd) => p.call(libc::SYS_pidfd_getfd, &[fd.cast_unsigned(), 0, 0]),
            refused => refused,
        }
    }),
    ("kill", By::User, |p, w| p.call(libc::SYS_kill, &[w.bystander as u64, libc::SIGCONT as u64])),
    // Namespaces and mounts.
    ("a user namespace", By::Filter, |p, _| {
        p.call(libc::SYS_unshare, &[libc::CLONE_NEWUSER as u64])
    }),
    ("a process in a user namespace", By::Filter, |p, _| {
        p.call(libc::SYS_clone, &[(libc::CLONE_NEWUSER | libc::SIGCHLD) as u64, 0, 0, 0, 0])
    }),
    ("a process in one by clone3", By::Filter, |p, _| {
        let words = [libc::CLONE_NEWUSER as u64, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
        let arguments = p.put(&words.map(u64::to_ne_bytes).concat());
        p.call(libc::SYS_clone3, &[arguments, 64])
    }),
    ("mount", By::Filter, |p, _| {
        let (none, at, kind) =
            (p.text(Path::new("none")), p.text(Path::new(".")), p.text(Path::new("tmpfs")));
        p.call(libc::SYS_mount, &[none, at, kind, 0, 0])
    }),
    ("chroot", By::Filter, |p, _| {
        let at = p.text(Path::new("."));
        p.call(libc::SYS_chroot, &[at])
    }),
    // Where the host opens what the VM makes.
    ("a device's node", By::Filter, |p, _| {
        let at = p.text(Path::new("null"));
        let null = libc::makedev(1, 3);
        p.call(libc::SYS_mknodat, &[at_cwd(), at, u64::from(libc::S_IFCHR | 0o666), null])
    }),
    ("a symbolic link", By::Filter, |p, _| plant(p, libc::SYS_symlinkat)),
    ("a hard link", By::Filter, |p, _| plant(p, libc::SYS_linkat)),
    ("a fifo", By::Filter, |p, _| plant(p, libc::SYS_mknodat)),
    // What holes of the kernel are reached through.
    ("io_uring", By::Filter, |p, _| {
        let parameters = p.put(&[0; 120]);
        p.call(libc::SYS_io_uring_setup, &[1, parameters])
    }),
    ("bpf", By::Filter, |p, _| {
        let array = p.put(&[2_u32, 4, 4, 1].map(u32::to_ne_bytes).concat());
        p.call(libc::SYS_bpf, &[0, array, 16])
    }),
    ("userfaultfd", By::Filter, |p, _| p.call(libc::SYS_userfaultfd, &[0])),
    ("keys", By::Filter, |p, _| {
        let (kind, name, value) =
            (p.text(Path::new("user")), p.text(Path::new("k")), p.text(Path::new("v")));
        let process = i64::from(libc::KEY_SPEC_PROCESS_KEYRING).cast_unsigned();
        p.call(libc::SYS_add_key, &[kind, name, value, 1, process])
    }),
];

fn bundle() -> PathBuf {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.kiln/builder");
    let dir = std::env::var_os("KILN_TEST_BUNDLE").map_or(default, PathBuf::from);
    assert!(
        dir.join("kernel").exists(),
        "there is no builder bundle in {}: run scripts/test, or set KILN_TEST_BUNDLE to one",
        dir.display()
    );
    dir
}

/// Open descriptors of a process, and what they are.
fn descriptors(pid: i32) -> Vec<(i32, PathBuf)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(Result::unwrap);
    let number = |entry: &fs::DirEntry| entry.file_name().to_str().unwrap().parse().unwrap();
    entries.map(|entry| (number(&entry), fs::read_link(entry.path()).unwrap())).collect()
}

fn stack_of(pid: i32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let stack = maps.lines().find(|line| line.ends_with("[stack]")).unwrap();
    u64::from_str_radix(stack.split('-').next().unwrap(), 16).unwrap()
}

/// A process outside, with all that root has, in a directory and mounts of its own.
struct Outside(Child);

impl Outside {
    fn new(dir: &Path) -> Self {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sleep", "1000"]).current_dir(dir).stdin(Stdio::null());
        let child = command.spawn().unwrap();
        let name = format!("/proc/{}/comm", child.id());
        while fs::read_to_string(&name).unwrap().trim() != "sleep" {
            std::thread::yield_now();
        }
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id().try_into().unwrap()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Host {
    dir: tempfile::TempDir,
    vmm: Vmm,
}

impl Host {
    async fn new(name: &str) -> Self {
        let (dir, bundle) = (tempfile::tempdir().unwrap(), bundle());
        let config = VmmConfig {
            instance: format!("test-{name}-{}", std::process::id()),
            run_dir: dir.path().join("run"),
            disk_dir: dir.path().join("disks"),
            qemu: "qemu-system-x86_64".into(),
            vsock_device: "vhost-device-vsock".into(),
            kernel: bundle.join("kernel"),
            initrd: bundle.join("initrd"),
            root: bundle.join("root.erofs"),
            accel: Accel::Tcg,
            require_isolation: false,
            default_disk_gb: 1,
            uid_base: Some(DEFAULT_UID_BASE),
        };
        Self { dir, vmm: Vmm::new(config).await.unwrap() }
    }

    async fn vm(&self, id: &str) -> Vm {
        let spec = VmSpec { id: id.to_owned(), memory_mb: 256, cpus: 1, disk_gb: 1, image: None };
        let vm = self.vmm.start(spec).await.unwrap();
        // Its monitor has answered: QEMU is as it will be, and waits in its loop.
        vm.console_tail().await;
        vm
    }
}

/// Whose calls they are.
#[derive(Clone, Copy, Debug)]
enum Whose {
    Qemu,
    VsockDevice,
}

async fn every_probe_fails(whose: Whose) {
    let host = Host::new(&format!("jail-{whose:?}")).await;
    let other = host.vm("other").await;
    let dir = host.dir.path().to_owned();
    for (name, mode) in [("key", 0o600), ("public", 0o644)] {
        fs::write(dir.join(name), "secret").unwrap();
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let abstract_name = format!("kiln-test-{}", std::process::id());
    let by_name = SocketAddr::from_abstract_name(&abstract_name).unwrap();
    let _abstract = UnixListener::bind_addr(&by_name).unwrap();
    let _service = UnixListener::bind(dir.join("service")).unwrap();
    let bystander = Outside::new(&dir);
    let qemu = other.pids().qemu.pid;
    let world = World {
        other: other.dir().to_owned(),
        other_qemu: qemu,
        bystander: bystander.pid(),
        bystander_stack: stack_of(bystander.pid()),
        tcp: tcp.local_addr().unwrap(),
        udp: udp.local_addr().unwrap(),
        abstract_name,
        dir,
    };

    let mut vm = None;
    let mut wrong = vec![];
    for (n, (name, by, probe)) in PROBES.iter().enumerate() {
        let room = world.dir.join(format!("outside-{n}"));
        fs::create_dir(&room).unwrap();
        fs::write(room.join("v"), "").unwrap();
        let outside = Outside::new(&room);
        let victim = match &mut vm {
            Some(vm) => vm,
            none => none.insert(host.vm(&format!("n{n}")).await),
        };
        let pids = victim.pids();
        let pid = match whose {
            Whose::Qemu => pids.qemu.pid,
            Whose::VsockDevice => pids.vsock_device.pid,
        };
        // A tracer is a thread.
        let (jailed, control, lives) = std::thread::scope(|scope| {
            let world = &world;
            scope
                .spawn(move || {
                    let mut inside = Inside::stop(pid);
                    let jailed = probe(&mut inside, world);
                    let lives = inside.alive && !matches!(jailed, Got::Ended(_));
                    inside.go_on();
                    let mut control = Inside::stop(outside.pid());
                    let got = probe(&mut control, world);
                    drop(outside);
                    (jailed, got, lives)
                })
                .join()
                .unwrap()
        });
        println!("{whose:?}: {name}: {jailed:?} (outside: {control:?})");
        if !by.is(whose, jailed) || !matches!(control, Got::Value(_)) {
            wrong.push(format!("{name}: {jailed:?}, not by {by:?} (outside: {control:?})"));
        }
        if !lives {
            vm.take().unwrap().destroy().await.unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    if let Some(vm) = vm {
        vm.destroy().await.unwrap();
    }
    other.destroy().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_can_be_done_from_inside_qemu() {
    every_probe_fails(Whose::Qemu).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_can_be_done_from_inside_the_vsock_device() {
    every_probe_fails(Whose::VsockDevice).await;
}

/// What the kernel says of a process.
fn status(pid: i32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_have_filters_no_privileges_and_only_what_was_handed_over() {
    let host = Host::new("jail-state").await;
    let (one, two) = (host.vm("one").await, host.vm("two").await);
    let of = |pid: i32, kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    for (vm, other) in [(&one, &two), (&two, &one)] {
        let pids = vm.pids();
        // QEMU's own filter is the third.
        for (process, filters) in [(pids.qemu, 3), (pids.vsock_device, 1)] {
            let pid = process.pid;
            assert_eq!(status(pid, "Seccomp:"), "2");
            assert_eq!(status(pid, "Seccomp_filters:"), filters.to_string());
            assert_eq!(status(pid, "NoNewPrivs:"), "1");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
                assert_eq!(status(pid, set), "0000000000000000", "{set}");
            }
            assert_eq!(status(pid, "Groups:"), "");
            assert_ne!(status(pid, "Uid:"), status(other.pids().qemu.pid, "Uid:"));
            for kind in ["mnt", "net", "ipc", "uts"] {
                assert_ne!(of(pid, kind), of(other.pids().qemu.pid, kind), "{kind}");
                assert_ne!(of(pid, kind), of(std::process::id().cast_signed(), kind), "{kind}");
            }
        }
        let bundle = bundle().canonicalize().unwrap();
        let disks = host.dir.path().join("disks");
        let (mut disk, mut memory) = (0, 0);
        for (fd, what) in descriptors(pids.qemu.pid) {
            let name = what.to_str().unwrap();
            let its_own = ["socket:", "pipe:", "anon_inode:", "/memfd:kiln-qemu", "/dev/null"];
            memory += i32::from(name.starts_with("/memfd:mem"));
            disk += i32::from(what.starts_with(&disks));
            let known = its_own.iter().any(|kind| name.starts_with(kind))
                || name.starts_with("/memfd:")
                || what.starts_with(&bundle)
                || what.starts_with(&disks);
            assert!(known, "{fd}: {name}");
        }
        assert!(disk > 0 && memory > 0, "{disk} {memory}");
    }
    one.destroy().await.unwrap();
    two.destroy().await.unwrap();
}
