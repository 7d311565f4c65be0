//! The VM's file systems: the kernel's own, then disk and scratch as one root, then that root as /.
//!
//! Nothing of it is ever written back: the disk is read-only and the scratch disk goes with the VM.
//! So every promise of durability is given up for speed (no barriers, a volatile overlay, no sync).

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::Context;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout, sethostname};

/// The builder image's root disk.
pub const LOWER_DEVICE: &str = "/dev/vda";
/// The scratch disk, an ext4 without partitions.
pub const SCRATCH_DEVICE: &str = "/dev/vdb";

const LOWER: &str = "/mnt/lower";
const SCRATCH: &str = "/mnt/scratch";
const NEW: &str = "/mnt/root";

/// Directories of the scratch disk that the new root has as they are, with their modes. An overlay
/// cannot be the upper layer of buildah's own overlays, and big files need not go through one.
const ON_SCRATCH: [(&str, &str, u32); 3] = [
    ("containers", "/var/lib/containers", 0o700),
    ("tmp", "/var/tmp", 0o1777),
    ("kiln", "/var/lib/kiln", 0o700),
];

const HOSTS: &str = "127.0.0.1 localhost kiln\n::1 localhost\n";

/// Mounts /proc, /sys and /dev, where later steps find devices and the console.
pub fn mount_kernel_file_systems() -> anyhow::Result<()> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_new("proc", "/proc", "proc", plain, "")?;
    mount_new("sysfs", "/sys", "sysfs", plain, "")?;
    mount_new("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=0755")?;
    mount_new(
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        "gid=5,mode=620,ptmxmode=666",
    )?;
    mount_new("tmpfs", "/dev/shm", "tmpfs", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=1777")?;
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        symlink(target, link).with_context(|| format!("{link} cannot be made"))?;
    }
    Ok(())
}

/// An initrd need not have a console for the kernel to open: whatever it opened, this is better.
pub fn open_console() -> anyhow::Result<()> {
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NOCTTY.bits())
        .open("/dev/console")?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}

/// Puts the new root together and moves into it.
pub fn build_and_switch() -> anyhow::Result<()> {
    mount_new(LOWER_DEVICE, LOWER, "erofs", MsFlags::MS_RDONLY, "")?;
    let scratch = MsFlags::MS_NOATIME | MsFlags::MS_NODEV;
    mount_new(SCRATCH_DEVICE, SCRATCH, "ext4", scratch, "nobarrier")?;
    for directory in ["upper", "work"] {
        make_directory(&format!("{SCRATCH}/{directory}"), 0o755)?;
    }
    let layers =
        format!("lowerdir={LOWER},upperdir={SCRATCH}/upper,workdir={SCRATCH}/work,volatile");
    mount_new("overlay", NEW, "overlay", MsFlags::MS_NOATIME, &layers)?;
    for (directory, target, mode) in ON_SCRATCH {
        let directory = format!("{SCRATCH}/{directory}");
        make_directory(&directory, mode)?;
        bind(&directory, &format!("{NEW}{target}"))?;
    }
    // The binds and the overlay hold them.
    for hidden in [SCRATCH, LOWER] {
        umount2(hidden, MntFlags::MNT_DETACH).with_context(|| format!("{hidden} stays mounted"))?;
    }
    let memory = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_new("tmpfs", &format!("{NEW}/run"), "tmpfs", memory, "mode=0755")?;
    mount_new("tmpfs", &format!("{NEW}/tmp"), "tmpfs", memory, "mode=1777")?;
    place_agent()?;
    for moved in ["/proc", "/sys", "/dev"] {
        let target = format!("{NEW}{moved}");
        fs::create_dir_all(&target).with_context(|| format!("{target} cannot be made"))?;
        mount(Some(moved), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .with_context(|| format!("{moved} cannot be moved to the new root"))?;
    }
    switch().context("the new root cannot become /")?;
    sethostname("kiln").context("the host name cannot be set")?;
    fs::write("/etc/hosts", HOSTS).context("/etc/hosts cannot be written")
}

/// Makes this program reachable in the new root under both its names. It is the initrd's own file,
/// bound and not copied, so that the pages that run are the only ones in memory; and read-only, so
/// that nobody can change what PID 1 runs.
fn place_agent() -> anyhow::Result<()> {
    let directory = format!("{NEW}/run/kiln");
    make_directory(&directory, 0o755)?;
    let agent = format!("{directory}/agent");
    File::create(&agent).with_context(|| format!("{agent} cannot be made"))?;
    let flags = MsFlags::MS_BIND;
    mount(Some("/init"), agent.as_str(), None::<&str>, flags, None::<&str>)
        .and_then(|()| {
            let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, agent.as_str(), None::<&str>, flags, None::<&str>)
        })
        .with_context(|| format!("{agent} cannot be bound to /init"))?;
    let runtime = format!("{directory}/kiln-oci-runtime");
    symlink("/run/kiln/agent", &runtime).with_context(|| format!("{runtime} cannot be made"))
}

/// As switch_root(8): the initrd's own root stays below, out of reach and all but empty.
fn switch() -> nix::Result<()> {
    chdir(NEW)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")
}

/// Mounts something on a directory, which is made.
pub fn mount_new(
    source: &str,
    target: &str,
    kind: &str,
    flags: MsFlags,
    options: &str,
) -> anyhow::Result<()> {
    fs::create_dir_all(target).with_context(|| format!("{target} cannot be made"))?;
    mount(Some(source), target, Some(kind), flags, Some(options))
        .with_context(|| format!("{source} ({kind}) cannot be mounted on {target}"))
}

fn bind(source: &str, target: &str) -> anyhow::Result<()> {
    fs::create_dir_all(target).with_context(|| format!("{target} cannot be made"))?;
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("{source} cannot be bound to {target}"))
}

fn make_directory(path: &str, mode: u32) -> anyhow::Result<()> {
    let path = Path::new(path);
    fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("{} cannot be made", path.display()))
}
