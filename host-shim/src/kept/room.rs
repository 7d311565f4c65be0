//! Whether there is room for another VM, and who goes when there is none. Pure but for asking the kernel.

use std::fs;

use super::Lease;
use crate::build::{BuildId, Tenant};

/// What is to be left for the host itself, in MiB.
const RESERVE_MB: u64 = 512;

/// The memory of VMs, all of it, and what the host has given them so far. In MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) of_vm: u32,
    pub(super) given: u64,
}

impl Memory {
    /// Of the VM that this process runs. What cannot be asked has been given nothing.
    pub(super) fn of(of_vm: u32, qemu: Option<i32>) -> Self {
        let status = qemu.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok());
        let given = status.as_deref().and_then(|status| mib(status, "RssShmem:")).unwrap_or(0);
        Self { of_vm, given }
    }

    /// What the host may have to give it yet.
    fn owed(self) -> u64 {
        u64::from(self.of_vm).saturating_sub(self.given)
    }
}

/// The host's memory that nobody uses, in MiB. `None` when it cannot be asked.
pub(super) fn free_mb() -> Option<u64> {
    mib(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// The host's memory, in MiB. `None` when it cannot be asked.
pub(crate) fn total_mb() -> Option<u64> {
    mib(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// Whether there is room for a VM of so much memory, where this much is free: every kept VM may come to use all of its
/// own, and so may those that are being started. A host that cannot be asked is taken to have it.
pub(super) fn has_room_for(
    memory_mb: u32,
    free_mb: Option<u64>,
    kept: impl Iterator<Item = Memory>,
    starting_mb: u64,
) -> bool {
    let owed: u64 = kept.map(Memory::owed).sum();
    let wanted = u64::from(memory_mb) + owed + starting_mb + RESERVE_MB;
    free_mb.is_none_or(|free| free >= wanted)
}

/// The first to go: the oldest that nobody is in, or else the oldest.
pub(super) fn first_to_go<'a>(
    mut leases: impl Iterator<Item = &'a Lease> + Clone,
) -> Option<&'a BuildId> {
    let idle = leases.clone().find(|lease| lease.sessions == 0);
    idle.or_else(|| leases.next()).map(|lease| &lease.id)
}

/// Which of these, the oldest first, has to go before one more of the tenant's comes in: one tenant has half of the
/// places at most, and at least one.
pub(super) fn in_the_way<'a>(
    leases: &(impl Iterator<Item = &'a Lease> + Clone),
    tenant: &Tenant,
    most: usize,
) -> Option<&'a BuildId> {
    let own = leases.clone().filter(|lease| lease.tenant == *tenant);
    if own.clone().count() >= (most / 2).max(1) {
        first_to_go(own)
    } else if leases.clone().count() >= most {
        first_to_go(leases.clone())
    } else {
        None
    }
}

/// A field of one of the kernel's tables, in MiB.
fn mib(table: &str, field: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lease(id: &str, tenant: &str, sessions: usize) -> Lease {
        let (id, tenant) = (BuildId::new(id).unwrap(), Tenant::new(tenant).unwrap());
        Lease { id, tenant, memory_mb: 1, since: 0, until: 1, sessions }
    }

    #[test]
    fn a_tenant_puts_out_its_own_and_the_idle_go_first() {
        let vms = [lease("a1", "a", 1), lease("b1", "b", 0), lease("a2", "a", 0)];
        let goes = |tenant: &str, most| {
            in_the_way(&vms.iter(), &Tenant::new(tenant).unwrap(), most).map(BuildId::as_str)
        };
        assert_eq!(goes("a", 4), Some("a2"), "its share is two, and somebody is in the older one");
        assert_eq!(goes("b", 4), None);
        assert_eq!(goes("c", 3), Some("b1"));
        assert_eq!(goes("b", 2), Some("b1"));
        assert_eq!(goes("c", 1), Some("b1"));
        assert_eq!(first_to_go(vms[..1].iter()).map(BuildId::as_str), Some("a1"));
        assert_eq!(first_to_go([].iter()), None);
    }

    #[test]
    fn what_a_kept_vm_has_not_touched_is_taken_all_the_same() {
        let vm = |of_vm, given| Memory { of_vm, given };
        let has = |memory_mb, free, kept: &[Memory], starting| {
            has_room_for(memory_mb, Some(free), kept.iter().copied(), starting)
        };
        assert!(has(2048, 2048 + RESERVE_MB, &[], 0));
        assert!(!has(2048, 2047 + RESERVE_MB, &[], 0));
        // It used 200 MiB of its 2 GiB: the rest is no longer anybody else's.
        assert!(has(2048, 2048 + 1848 + RESERVE_MB, &[vm(2048, 200)], 0));
        assert!(!has(2048, 2047 + 1848 + RESERVE_MB, &[vm(2048, 200)], 0));
        // One that has all of it is in what the kernel says already.
        assert!(has(2048, 2048 + RESERVE_MB, &[vm(512, 512), vm(512, 700)], 0));
        assert!(!has(2048, 2048 + RESERVE_MB, &[], 1));
        assert!(has(1, 513 + 10 + 20 + 30, &[vm(10, 0), vm(25, 5)], 30));
        assert!(!has(1, 512 + 10 + 20 + 30, &[vm(10, 0), vm(25, 5)], 30));
        assert!(has_room_for(u32::MAX, None, [vm(1, 0)].into_iter(), u64::from(u32::MAX)));
    }

    #[test]
    fn what_the_kernel_says_is_read() {
        let meminfo = "MemTotal:       24567890 kB\nMemAvailable:    2097152 kB\n";
        assert_eq!(mib(meminfo, "MemAvailable:"), Some(2048));
        assert_eq!(mib("MemTotal: 1 kB\n", "MemAvailable:"), None);
        let status = "VmRSS:\t  300000 kB\nRssAnon:\t   95200 kB\nRssShmem:\t  204800 kB\n";
        assert_eq!(mib(status, "RssShmem:"), Some(200));
        assert!(free_mb().is_some());
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(Memory::of(64, Some(own)).given < 64);
        assert_eq!(Memory::of(64, None), Memory { of_vm: 64, given: 0 });
        assert_eq!(Memory::of(64, Some(-1)).owed(), 64);
    }
}
