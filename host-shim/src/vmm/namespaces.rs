//! Enters a [`Root`] between fork and exec: system calls only, on what was made before the fork.
//!
//! The namespaces and mounts are the child's own and go with it: there is nothing to remove afterwards.

use std::ffi::CStr;
use std::io;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use super::root::{Root, Step};

/// Of the new root itself. Libraries lie on mounts of their own.
const BARE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// A directory's entries, no content.
const SIZE: &CStr = c"mode=755,size=64k";

/// Only what belongs to the process's own user (proc(5)); since Linux 5.8 without the kernel's own files.
const OWN_PROCESSES: &CStr = c"hidepid=2,subset=pid";

/// Makes the root, and leaves the host's. The process is root still, and has no umask.
pub(super) fn enter(root: &Root) -> io::Result<()> {
    unshare()?;
    rustix::mount::mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    rustix::mount::mount(c"none", &root.at, c"tmpfs", BARE, SIZE)?;
    for step in &root.steps {
        take(step)?;
    }
    rustix::mount::mount_remount(&root.at, MountFlags::BIND | MountFlags::RDONLY | BARE, c"")?;
    rustix::process::chdir(&root.at)?;
    // The old root goes below the new one, where nobody sees it, and then away (pivot_root(2)).
    match rustix::process::pivot_root(c".", c".") {
        Ok(()) => rustix::mount::unmount(c".", UnmountFlags::DETACH)?,
        // A server that runs in a chroot itself, or on an initial RAM disk. Without capabilities and without an open directory of
        // outside there is no way out of this one either.
        Err(Errno::INVAL) => rustix::process::chroot(c".")?,
        Err(error) => return Err(error.into()),
    }
    rustix::process::chdir(&root.work)?;
    Ok(())
}

#[allow(unsafe_code)]
fn unshare() -> io::Result<()> {
    let own =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: the child has one thread, and no descriptor's table or memory is unshared.
    Ok(unsafe { rustix::thread::unshare_unsafe(own) }?)
}

fn take(step: &Step) -> io::Result<()> {
    match step {
        Step::Directory(at) => match rustix::fs::mkdir(at, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        },
        Step::File(at) => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::open(at, flags, Mode::from_raw_mode(0o644))?;
            Ok(())
        }
        Step::Link { to, at } => Ok(rustix::fs::symlink(to, at)?),
        Step::ReadOnly { source, at } => {
            let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
            bind(source, at, flags)
        }
        Step::Device { source, at } => bind(source, at, MountFlags::NOSUID | MountFlags::NOEXEC),
        Step::Work { at } => bind(c".", at, BARE),
        Step::Proc { at } => Ok(rustix::mount::mount(c"proc", at, c"proc", BARE, OWN_PROCESSES)?),
    }
}

/// Flags of a bind mount count only when it is mounted again.
fn bind(source: &CStr, at: &CStr, flags: MountFlags) -> io::Result<()> {
    rustix::mount::mount_bind(source, at)?;
    Ok(rustix::mount::mount_remount(at, MountFlags::BIND | flags, c"")?)
}
