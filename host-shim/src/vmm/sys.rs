//! The unsafe corner of the VMM: what runs between fork and exec, where only async-signal-safe calls are allowed
//! (system calls without allocation, locks or formatting), and waiting for a bare descriptor.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::BpfProgram;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::jail::Identity;
use super::namespaces;
use super::root::Root;

pub(crate) struct Setup {
    pub keep: Vec<RawFd>,
    pub cgroup_procs: Vec<RawFd>,
    pub identity: Option<Identity>,
    pub root: Option<Root>,
    pub filters: Vec<BpfProgram>,
    pub max_files: u64,
    pub max_tasks: u64,
}

pub(crate) fn prepare(command: &mut Command, setup: Setup) {
    let groups: Vec<Gid> =
        setup.identity.iter().flat_map(|who| &who.groups).map(|gid| Gid::from_raw(*gid)).collect();
    // SAFETY: `enter` only makes system calls, through rustix's raw back end and libc's thin
    // wrappers, on values that were allocated before the fork.
    unsafe { command.pre_exec(move || enter(&setup, &groups)) };
}

fn enter(setup: &Setup, groups: &[Gid]) -> io::Result<()> {
    rustix::process::setsid()?;
    if let Some(root) = &setup.root {
        rustix::process::umask(rustix::fs::Mode::empty());
        namespaces::enter(root)?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    for procs in &setup.cgroup_procs {
        // SAFETY: the parent keeps the file open until the spawn returns.
        rustix::io::write(unsafe { BorrowedFd::borrow_raw(*procs) }, b"0")?;
    }
    only_these_descriptors(&setup.keep)?;
    limit(Resource::Core, 0)?;
    limit(Resource::Nofile, setup.max_files)?;
    if let Some(who) = &setup.identity {
        limit(Resource::Nproc, setup.max_tasks)?;
        become_user(who, groups)?;
    }
    rustix::thread::set_no_new_privs(true)?;
    // Last: some of the above is what they refuse.
    for filter in &setup.filters {
        seccompiler::apply_filter(filter).map_err(|_| io::Error::last_os_error())?;
    }
    Ok(())
}

/// Everything is closed at exec, also what some library opened without close-on-exec, but for these.
fn only_these_descriptors(keep: &[RawFd]) -> io::Result<()> {
    // SAFETY: close_range with CLOEXEC changes flags only.
    let done = unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    for fd in keep {
        // SAFETY: the parent owns these until the spawn returns.
        rustix::io::fcntl_setfd(
            unsafe { BorrowedFd::borrow_raw(*fd) },
            rustix::io::FdFlags::empty(),
        )?;
    }
    Ok(())
}

/// Changing the user from root clears its capabilities; the bounding and inheritable sets are emptied too.
fn become_user(who: &Identity, groups: &[Gid]) -> io::Result<()> {
    for capability in 0..=63 {
        // SAFETY: a prctl with integers. It fails with EINVAL above the kernel's last capability.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
    let (uid, gid) = (Uid::from_raw(who.uid), Gid::from_raw(who.uid));
    rustix::thread::set_thread_groups(groups)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?;
    Ok(())
}

fn limit(resource: Resource, most: u64) -> io::Result<()> {
    Ok(rustix::process::setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?)
}

/// Lets the runtime wait for a descriptor to be readable.
pub(crate) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps its descriptor open and never changes it, and nobody here replaces it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
