//! The command lines of QEMU. Pure, and golden-tested: a change here is a change of the machine.
//!
//! QEMU gets everything by file descriptor, so it needs no file of ours by name: disks as fd sets,
//! the vsock device and the monitor as connected sockets, kernel and initrd as `/proc/self/fd/N`.

use std::os::fd::RawFd;

/// How the guest's instructions run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Hardware virtualisation: an isolation boundary.
    Kvm,
    /// QEMU's emulation: for development, no isolation boundary by QEMU's own policy.
    Tcg,
}

/// The descriptors that QEMU inherits, by their numbers in it.
#[derive(Clone, Copy, Debug)]
pub struct Fds {
    /// The kernel's image.
    pub kernel: RawFd,
    /// The initial RAM disk.
    pub initrd: RawFd,
    /// The read-only root disk: `/dev/vda`.
    pub root: RawFd,
    /// The scratch disk: `/dev/vdb`.
    pub scratch: RawFd,
    /// The read-only disk of an instance's image: `/dev/vdc`.
    pub image: Option<RawFd>,
    /// Connected to the vsock device.
    pub vsock: RawFd,
    /// Our end's peer of the monitor.
    pub qmp: RawFd,
}

/// What differs between VMs.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// Shown in process lists.
    pub name: &'a str,
    /// How it runs.
    pub engine: Engine,
    /// Of the guest, in MiB.
    pub memory_mb: u32,
    /// Of the guest.
    pub cpus: u32,
    /// What it inherits.
    pub fds: Fds,
}

/// How much of the guest's console is kept. A power of two, as QEMU wants.
pub const CONSOLE_BYTES: u32 = 64 * 1024;

/// The CID that every guest has. Each VM has a vsock device of its own, so it need not be unique.
pub const GUEST_CID: u32 = 3;

/// No legacy devices: less for a guest to attack, and less for its kernel to look for. Without
/// an HPET the boot is slower under TCG, so that stays.
const MACHINE: &str = "q35,memory-backend=mem,smm=off,sata=off,i8042=off,smbus=off,usb=off,vmport=off,\
                       mem-merge=off,dump-guest-core=off";

/// Every packet that the guest queues is announced. QEMU enables the device's queues without waiting for its answer, and the
/// device drops what is announced before (vhost-user-backend 0.20 `event_loop.rs`): on a busy host that is the
/// guest's first dial. With event indexes the guest then announces nothing ever again and the VM is out of
/// reach for good; without them the agent's next try gets through.
const VSOCK_DEVICE: &str = "vhost-user-vsock-pci,chardev=vsock,event_idx=off";

/// QEMU's own system-call filter; it works without privileges and costs nothing measurable.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// `panic=-1`: a panic resets at once, which QEMU reports and does not do. `cryptomgr.notests`
/// saves 0.3–0.5 s under TCG. `8250.nr_uarts=1`: there is one. `no_timer_check`: a busy host must
/// not make the kernel believe that its timer is broken. The blacklisted two test a key derivation
/// that nothing here uses and make files of a tracer: 0.15–0.25 s under TCG. `rcu_expedited`: nobody waits
/// for a grace period of RCU; the move of a process to its cgroup took 20 ms for that.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests 8250.nr_uarts=1 audit=0 \
                       no_timer_check initcall_blacklist=crypto_kdf108_init,init_kprobe_trace \
                       rcupdate.rcu_expedited=1";

/// The kernel's command line. An emulated CPU does not speculate, so there is nothing to mitigate; its
/// clock is QEMU's own and needs no watching, which on a busy host finds faults that are not there.
pub fn kernel_cmdline(engine: Engine) -> String {
    match engine {
        Engine::Kvm => CMDLINE.to_owned(),
        Engine::Tcg => format!("{CMDLINE} mitigations=off tsc=reliable"),
    }
}

/// The arguments for a VM.
pub fn vm(machine: &Machine<'_>) -> Vec<String> {
    let Machine { name, engine, memory_mb, cpus, fds } = machine;
    let mut args = common(*engine, *memory_mb, *cpus, name);
    let mut add = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
    disk(&mut add, 1, "root", fds.root, "read-only=on", "");
    disk(&mut add, 2, "scratch", fds.scratch, "discard=unmap", ",detect-zeroes=unmap");
    if let Some(image) = fds.image {
        disk(&mut add, 3, "image", image, "read-only=on", "");
    }
    add("-chardev", format!("socket,id=vsock,fd={}", fds.vsock));
    add("-device", VSOCK_DEVICE.to_owned());
    add("-object", "rng-builtin,id=rng".to_owned());
    add("-device", "virtio-rng-pci,rng=rng".to_owned());
    // It listens: another server can go on with the VM.
    add("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", fds.qmp));
    add("-mon", "chardev=qmp,mode=control".to_owned());
    add("-chardev", format!("ringbuf,id=console,size={CONSOLE_BYTES}"));
    add("-serial", "chardev:console".to_owned());
    // A guest that ends, however, leaves QEMU paused: the console can still be read.
    add("-action", "reboot=shutdown,shutdown=pause,panic=pause".to_owned());
    add("-kernel", format!("/proc/self/fd/{}", fds.kernel));
    add("-initrd", format!("/proc/self/fd/{}", fds.initrd));
    add("-append", kernel_cmdline(*engine));
    args
}

/// Of the guest that finds out whether KVM runs guests, in MiB.
pub(super) const PROBE_MB: u32 = 512;

/// The arguments for the boot that finds out whether KVM runs guests: no disks, no vsock, and a
/// console that talks from the kernel's first line on.
pub fn kvm_probe(kernel: RawFd, initrd: RawFd, console: RawFd) -> Vec<String> {
    let mut args = common(Engine::Kvm, PROBE_MB, 1, "kiln-probe");
    let mut add = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
    add("-chardev", format!("socket,id=console,fd={console}"));
    add("-serial", "chardev:console".to_owned());
    add("-action", "reboot=shutdown,shutdown=poweroff".to_owned());
    add("-kernel", format!("/proc/self/fd/{kernel}"));
    add("-initrd", format!("/proc/self/fd/{initrd}"));
    add("-append", "console=ttyS0 panic=-1".to_owned());
    args
}

fn common(engine: Engine, memory_mb: u32, cpus: u32, name: &str) -> Vec<String> {
    let (accel, cpu) = match engine {
        Engine::Kvm => ("kvm", "host"),
        Engine::Tcg => ("tcg,thread=multi", "Nehalem"),
    };
    let mut args: Vec<String> =
        ["-nodefaults", "-no-user-config", "-display", "none", "-nic", "none"]
            .map(str::to_owned)
            .to_vec();
    let mut add = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
    // It is executed by descriptor; without this, process lists would show a number.
    add("-name", format!("{name},process=qemu-system-x86"));
    add("-sandbox", SANDBOX.to_owned());
    add("-M", MACHINE.to_owned());
    add("-accel", accel.to_owned());
    add("-cpu", cpu.to_owned());
    add("-smp", cpus.to_string());
    add("-m", format!("{memory_mb}M"));
    // Shared, because the vsock device reads and writes the guest's rings.
    add("-object", format!("memory-backend-memfd,id=mem,size={memory_mb}M,share=on"));
    args
}

/// A raw disk. Nothing on it outlives the VM, so the guest's flushes need not reach the host's disk.
fn disk(
    add: &mut impl FnMut(&str, String),
    set: u8,
    name: &str,
    fd: RawFd,
    option: &str,
    format_option: &str,
) {
    add("-add-fd", format!("fd={fd},set={set}"));
    add(
        "-blockdev",
        format!(
            "driver=file,node-name={name}-file,filename=/dev/fdset/{set},locking=off,cache.direct=off,\
             cache.no-flush=on,{option}"
        ),
    );
    add(
        "-blockdev",
        format!(
            "driver=raw,node-name={name},file={name}-file,cache.no-flush=on,{option}{format_option}"
        ),
    );
    add("-device", format!("virtio-blk-pci,drive={name},serial=kiln-{name}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    const FDS: Fds =
        Fds { kernel: 10, initrd: 11, root: 12, scratch: 13, image: None, vsock: 14, qmp: 15 };

    /// One flag and its value a line.
    fn shown(args: &[String]) -> String {
        let mut text = String::new();
        for arg in args {
            if arg.starts_with('-') && !text.is_empty() {
                text.push('\n');
            } else if !text.is_empty() {
                text.push(' ');
            }
            text.push_str(arg);
        }
        text
    }

    #[test]
    fn the_machine_under_tcg() {
        let machine =
            Machine { name: "b1", engine: Engine::Tcg, memory_mb: 2048, cpus: 2, fds: FDS };
        insta::assert_snapshot!("vm_tcg", shown(&vm(&machine)));
    }

    #[test]
    fn the_machine_under_kvm() {
        let machine =
            Machine { name: "b1", engine: Engine::Kvm, memory_mb: 4096, cpus: 4, fds: FDS };
        insta::assert_snapshot!("vm_kvm", shown(&vm(&machine)));
    }

    #[test]
    fn the_machine_of_an_instance() {
        let fds = Fds { image: Some(16), ..FDS };
        let machine = Machine { name: "i1", engine: Engine::Tcg, memory_mb: 1024, cpus: 1, fds };
        insta::assert_snapshot!("vm_instance", shown(&vm(&machine)));
    }

    #[test]
    fn the_probe() {
        insta::assert_snapshot!("kvm_probe", shown(&kvm_probe(10, 11, 12)));
    }
}
