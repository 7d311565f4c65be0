//! Whether there is room for another VM, and who goes when there is none. Pure but for asking the kernel.

use std::fs;

use super::Lease;
use crate::build::{BuildId, Tenant};

/// What is to be left for the host itself, in MiB.
const RESERVE_MB: u64 = 512;

/// Whether the host has so much memory free. One that cannot be asked is taken to have it.
pub(super) fn has_room_for(memory_mb: u32) -> bool {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    available_mb(&meminfo).is_none_or(|free| free >= u64::from(memory_mb) + RESERVE_MB)
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

fn available_mb(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
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
    fn what_is_available_is_read() {
        let meminfo = "MemTotal:       24567890 kB\nMemAvailable:    2097152 kB\n";
        assert_eq!(available_mb(meminfo), Some(2048));
        assert_eq!(available_mb("MemTotal: 1 kB\n"), None);
        assert!(has_room_for(0));
        assert!(!has_room_for(u32::MAX));
    }
}
