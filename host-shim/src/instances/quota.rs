//! What instances keep on this host's disk, counted in bytes: the disks of those that run, and every log. There is a
//! bound for all of them, and one tenant gets half of it, so that others always have room.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::build::Tenant;

/// The books. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Quota {
    most: u64,
    used: Arc<Mutex<HashMap<Tenant, u64>>>,
}

/// There is no more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// For this tenant.
    #[error(
        "disks and logs of the tenant's instances would take more than {share} bytes, which is a tenant's half of \
         --instance-disks-gb: delete instances, or use smaller images"
    )]
    Tenant {
        /// What one tenant gets.
        share: u64,
    },
    /// For anybody.
    #[error(
        "disks and logs of all instances of this host would take more than {most} bytes, which is \
         --instance-disks-gb: try again when others have ended"
    )]
    Host {
        /// What there is for all.
        most: u64,
    },
}

impl Quota {
    /// So many bytes for all.
    pub fn new(most: u64) -> Self {
        Self { most, used: Arc::default() }
    }

    /// Something of a tenant's that has no bytes yet.
    pub fn hold(&self, tenant: &Tenant) -> Held {
        Held { quota: self.clone(), tenant: tenant.clone(), bytes: 0 }
    }

    fn used(&self) -> MutexGuard<'_, HashMap<Tenant, u64>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that are counted until this is dropped.
#[derive(Debug)]
pub struct Held {
    quota: Quota,
    tenant: Tenant,
    bytes: u64,
}

impl Held {
    /// It has so many bytes now. Refused where that is more than before and more than there is; it counts as it did
    /// then.
    pub fn resize(&mut self, bytes: u64) -> Result<(), Full> {
        let mut used = self.quota.used();
        let of_all: u64 = used.values().sum();
        let of_tenant = used.get(&self.tenant).copied().unwrap_or_default();
        if bytes > self.bytes {
            let more = bytes - self.bytes;
            let (most, share) = (self.quota.most, self.quota.most.div_ceil(2));
            if of_tenant.saturating_add(more) > share {
                return Err(Full::Tenant { share });
            }
            if of_all.saturating_add(more) > most {
                return Err(Full::Host { most });
            }
        }
        set(&mut used, &self.tenant, of_tenant - self.bytes + bytes);
        self.bytes = bytes;
        Ok(())
    }

    /// So many bytes are there already, whether there is room for them or not.
    pub fn found(&mut self, bytes: u64) {
        let mut used = self.quota.used();
        let of_tenant = used.get(&self.tenant).copied().unwrap_or_default();
        set(&mut used, &self.tenant, (of_tenant - self.bytes).saturating_add(bytes));
        self.bytes = bytes;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.found(0);
    }
}

/// Who has nothing is not in the books.
fn set(used: &mut HashMap<Tenant, u64>, tenant: &Tenant, bytes: u64) {
    if bytes == 0 {
        used.remove(tenant);
    } else {
        used.insert(tenant.clone(), bytes);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> Tenant {
        Tenant::new(name).unwrap()
    }

    #[test]
    fn a_tenant_has_half_and_the_bound_holds_below_at_and_above_it() {
        let quota = Quota::new(10);
        let mut first = quota.hold(&tenant("a"));
        let mut second = quota.hold(&tenant("a"));
        first.resize(3).unwrap();
        second.resize(1).unwrap();
        second.resize(2).unwrap();
        assert_eq!(second.resize(3), Err(Full::Tenant { share: 5 }));
        // A refusal changes nothing, and less is always possible.
        assert_eq!(first.resize(4), Err(Full::Tenant { share: 5 }));
        first.resize(1).unwrap();
        second.resize(4).unwrap();
        drop(first);
        second.resize(5).unwrap();
        assert!(second.resize(u64::MAX).is_err(), "no overflow");
    }

    #[test]
    fn all_together_have_a_bound_and_what_is_dropped_is_free() {
        let quota = Quota::new(3);
        let mut held: Vec<Held> = ["a", "b"].map(|name| quota.hold(&tenant(name))).into();
        held[0].resize(2).unwrap();
        held[1].resize(1).unwrap();
        assert_eq!(held[1].resize(2), Err(Full::Host { most: 3 }));
        held.remove(0);
        held[0].resize(2).unwrap();
        held.clear();
        assert!(quota.used().is_empty());
    }

    #[test]
    fn what_was_there_before_counts_though_it_is_too_much() {
        let quota = Quota::new(4);
        let mut log = quota.hold(&tenant("a"));
        log.found(9);
        let mut other = quota.hold(&tenant("b"));
        assert_eq!(other.resize(1), Err(Full::Host { most: 4 }));
        log.resize(2).unwrap();
        other.resize(2).unwrap();
    }
}
