//! Filters of system calls that a VM's processes start with, made once.
//!
//! QEMU's is a list of what it may not call, for what it calls changes with its version; its own filter (`-sandbox`) comes on top of
//! it and forbids new programs and processes. The vsock device has no filter of its own, is one small program, and has a list of
//! what it may call: anything else does not exist for it.

use nix::libc;
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

/// The filters of both programs.
#[derive(Debug)]
pub(crate) struct Filters {
    pub qemu: Vec<BpfProgram>,
    pub vsock_device: Vec<BpfProgram>,
}

impl Filters {
    pub(crate) fn new() -> Result<Self, Error> {
        Ok(Self { qemu: qemu()?, vsock_device: vec![vsock_device()?] })
    }
}

/// What nothing that emulates a machine has to do with; each is refused with `EPERM`. `execve` is not among them: the program
/// itself has to be executed.
const NOT_QEMU: &[libc::c_long] = &[
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_execveat,
    // Users and privileges.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    // Namespaces, mounts and roots. User namespaces are what most holes of the kernel are reached through.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    // Names in directories: QEMU has everything by descriptor and writes nowhere.
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    // Parts of the kernel that are large, and have been its weak ones.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // The host.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_syslog,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_vhangup,
];

/// What the vsock device calls (0.3, Rust's standard library and glibc), and what allocators and thread libraries of other versions
/// do in its stead. `socket` is only for local ones, `clone` only for threads.
const VSOCK_DEVICE: &[libc::c_long] = &[
    // To be started, by whoever made the filter; there is nothing else to execute in its root.
    libc::SYS_execve,
    libc::SYS_arch_prctl,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_openat,
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_uname,
    libc::SYS_getrandom,
    libc::SYS_prlimit64,
    libc::SYS_sysinfo,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Memory: its own, and the guest's, which QEMU hands over.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    // Threads, and signals among them.
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_membarrier,
    libc::SYS_prctl,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    // Time.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    // Descriptors, events and local sockets, in its own directory.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_socketpair,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// Namespaces that `clone` can make.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// System calls of x32 have this bit: other numbers for the same calls.
const X32: u32 = 0x4000_0000;

/// `BPF_JMP | BPF_JGE | BPF_K` (linux/bpf_common.h).
const JUMP_IF_AT_LEAST: u16 = 0x35;

/// `BPF_RET | BPF_K`.
const RETURN: u16 = 0x06;

fn qemu() -> Result<Vec<BpfProgram>, Error> {
    let mut denied: Vec<_> = NOT_QEMU.iter().map(|call| (*call, vec![])).collect();
    denied.push((libc::SYS_socket, vec![rule(0, SeccompCmpOp::Ne, libc::AF_UNIX)?]));
    let namespaces = NAMESPACES.iter().map(|flag| rule(0, masked(*flag), *flag));
    denied.push((libc::SYS_clone, namespaces.collect::<Result<_, _>>()?));
    let main = compiled(denied, SeccompAction::Allow, errno(libc::EPERM))?;
    // Its flags are in memory, where no filter can look. Whoever is told that it does not exist uses `clone`.
    let clone3 = vec![(libc::SYS_clone3, vec![])];
    Ok(vec![main, compiled(clone3, SeccompAction::Allow, errno(libc::ENOSYS))?])
}

fn vsock_device() -> Result<BpfProgram, Error> {
    let mut allowed: Vec<_> = VSOCK_DEVICE.iter().map(|call| (*call, vec![])).collect();
    allowed.push((libc::SYS_socket, vec![rule(0, SeccompCmpOp::Eq, libc::AF_UNIX)?]));
    allowed.push((libc::SYS_clone, vec![rule(0, masked(libc::CLONE_THREAD), libc::CLONE_THREAD)?]));
    // Not `EPERM`: what is newer than the list is then done in the older way that is on it.
    compiled(allowed, errno(libc::ENOSYS), SeccompAction::Allow)
}

fn errno(errno: libc::c_int) -> SeccompAction {
    SeccompAction::Errno(errno.unsigned_abs())
}

fn masked(flag: libc::c_int) -> SeccompCmpOp {
    SeccompCmpOp::MaskedEq(u64::from(flag.unsigned_abs()))
}

fn rule(argument: u8, is: SeccompCmpOp, value: libc::c_int) -> Result<SeccompRule, Error> {
    let value = u64::from(value.unsigned_abs());
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, is, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

/// Another architecture's calls end the process, those of x32 do not exist.
fn compiled(
    rules: Vec<(libc::c_long, Vec<SeccompRule>)>,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, Error> {
    let rules = rules.into_iter().collect();
    let filter = SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64)?;
    let mut program = BpfProgram::try_from(filter)?;
    // Behind the check of the architecture (three instructions) and the load of the number.
    let statement = |code, jf, k| sock_filter { code, jt: 0, jf, k };
    let numbers_of_x32 =
        [statement(JUMP_IF_AT_LEAST, 1, X32), statement(RETURN, 0, u32::from(errno(libc::ENOSYS)))];
    program.splice(4..4, numbers_of_x32);
    Ok(program)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;
    const ALLOWED: u32 = libc::SECCOMP_RET_ALLOW;

    fn with(errno: libc::c_int) -> u32 {
        libc::SECCOMP_RET_ERRNO | errno.unsigned_abs()
    }

    /// What the kernel does with a filter: the instructions that ours consist of.
    fn judged(program: &BpfProgram, arch: u32, number: u32, first: u64) -> u32 {
        let data = [&number.to_ne_bytes()[..], &arch.to_ne_bytes(), &[0; 8], &first.to_ne_bytes()];
        let data = data.concat();
        let (mut at, mut value) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let branch = |taken| usize::from(if taken { jt } else { jf });
            at += 1;
            match u32::from(code) {
                0x20 => {
                    let k = k as usize;
                    value = u32::from_ne_bytes(data[k..k + 4].try_into().unwrap());
                }
                0x54 => value &= k,
                0x05 => at += k as usize,
                0x15 => at += branch(value == k),
                0x25 => at += branch(value > k),
                0x35 => at += branch(value >= k),
                0x06 => return k,
                other => panic!("{other:#x}"),
            }
        }
    }

    fn call(programs: &[BpfProgram], number: libc::c_long, first: libc::c_int) -> u32 {
        let (number, first) = (u32::try_from(number).unwrap(), u64::from(first.unsigned_abs()));
        let refusals: Vec<_> = programs
            .iter()
            .map(|program| judged(program, X86_64, number, first))
            .filter(|action| *action != ALLOWED)
            .collect();
        refusals.first().copied().unwrap_or(ALLOWED)
    }

    #[test]
    fn qemu_may_do_what_emulators_do() {
        let filters = Filters::new().unwrap().qemu;
        for number in [libc::SYS_execve, libc::SYS_ioctl, libc::SYS_memfd_create, libc::SYS_openat]
        {
            assert_eq!(call(&filters, number, 0), ALLOWED, "{number}");
        }
        for number in NOT_QEMU {
            assert_eq!(call(&filters, *number, 0), with(libc::EPERM), "{number}");
        }
        assert_eq!(call(&filters, libc::SYS_clone3, 0), with(libc::ENOSYS));
        let thread = libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND;
        assert_eq!(call(&filters, libc::SYS_clone, thread), ALLOWED);
        for flag in NAMESPACES {
            assert_eq!(call(&filters, libc::SYS_clone, flag | libc::SIGCHLD), with(libc::EPERM));
        }
        assert_eq!(call(&filters, libc::SYS_socket, libc::AF_UNIX), ALLOWED);
        for domain in [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_VSOCK] {
            assert_eq!(call(&filters, libc::SYS_socket, domain), with(libc::EPERM));
        }
    }

    #[test]
    fn the_device_may_do_nothing_else() {
        let filters = Filters::new().unwrap().vsock_device;
        let (all, no) = (0..500, with(libc::ENOSYS));
        for number in all {
            let on_list = VSOCK_DEVICE.contains(&number);
            let expected = if on_list { ALLOWED } else { no };
            assert_eq!(call(&filters, number, 0), expected, "{number}");
        }
        assert_eq!(call(&filters, libc::SYS_clone, libc::CLONE_VM | libc::CLONE_THREAD), ALLOWED);
        assert_eq!(call(&filters, libc::SYS_clone, libc::SIGCHLD), no);
        assert_eq!(call(&filters, libc::SYS_socket, libc::AF_UNIX), ALLOWED);
        assert_eq!(call(&filters, libc::SYS_socket, libc::AF_INET), no);
    }

    #[test]
    fn no_other_set_of_numbers_gets_around_them() {
        let Filters { qemu, vsock_device } = Filters::new().unwrap();
        for program in qemu.iter().chain(&vsock_device) {
            for number in [0, 59, 101, 359] {
                assert_eq!(judged(program, I386, number, 0), libc::SECCOMP_RET_KILL_PROCESS);
                assert_eq!(judged(program, X86_64, X32 | number, 0), with(libc::ENOSYS));
            }
        }
    }
}
