//! How many sessions there may be at one time. Pure but for a lock.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use super::record::Subject;
use crate::build::Tenant;

/// Of one VM: people, and the programs that watch it. Each is a process of the guest's, with a connection through
/// the device, which has descriptors for 512.
pub const PER_VM: usize = 64;
/// Of the tokens of one tenant.
pub const PER_TENANT: usize = 256;
/// Of the host: each holds two connections, and up to a megabyte of a client's message.
pub const PER_HOST: usize = 1024;

/// There are as many sessions as there may be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// In this VM.
    #[error("{0} has {PER_VM} sessions already; end one of them first")]
    Vm(Subject),
    /// Of this tenant.
    #[error("tenant {0} has {PER_TENANT} sessions already; end one of them first")]
    Tenant(Tenant),
    /// Of this host.
    #[error("the host has {PER_HOST} sessions already; try again later")]
    Host,
}

/// The places for sessions.
#[derive(Clone, Debug, Default)]
pub struct Room(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    vms: HashMap<Subject, usize>,
    tenants: HashMap<Tenant, usize>,
    all: usize,
}

/// A place; free again when it is dropped.
#[derive(Debug)]
pub struct Place {
    room: Room,
    subject: Subject,
    tenant: Tenant,
}

impl Room {
    /// Takes a place in a VM, for a session of a tenant's.
    pub fn take(&self, subject: &Subject, tenant: &Tenant) -> Result<Place, Full> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |taken: Option<&usize>| taken.copied().unwrap_or(0);
        if of(counts.vms.get(subject)) >= PER_VM {
            return Err(Full::Vm(subject.clone()));
        }
        if of(counts.tenants.get(tenant)) >= PER_TENANT {
            return Err(Full::Tenant(tenant.clone()));
        }
        if counts.all >= PER_HOST {
            return Err(Full::Host);
        }
        *counts.vms.entry(subject.clone()).or_default() += 1;
        *counts.tenants.entry(tenant.clone()).or_default() += 1;
        counts.all += 1;
        Ok(Place { room: self.clone(), subject: subject.clone(), tenant: tenant.clone() })
    }
}

impl Room {
    /// How many places are taken.
    pub fn taken(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).all
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
        give_back(&mut counts.vms, &self.subject);
        give_back(&mut counts.tenants, &self.tenant);
        counts.all -= 1;
    }
}

/// Who has none is forgotten.
fn give_back<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::build::BuildId;

    fn vm(n: usize) -> Subject {
        Subject::Build(BuildId::new(format!("b{n}")).unwrap())
    }

    fn tenant(n: usize) -> Tenant {
        Tenant::new(format!("t{n}")).unwrap()
    }

    #[test]
    fn each_bound_holds_and_a_place_comes_back() {
        let room = Room::default();
        let mut places: Vec<_> =
            (0..PER_VM).map(|n| room.take(&vm(0), &tenant(n % 2)).unwrap()).collect();
        assert_eq!(room.take(&vm(0), &tenant(2)).unwrap_err(), Full::Vm(vm(0)));
        places.pop();
        places.push(room.take(&vm(0), &tenant(2)).unwrap());

        let of_one: Vec<_> =
            (0..PER_TENANT).map(|n| room.take(&vm(1 + n / PER_VM), &tenant(9)).unwrap()).collect();
        let full = Full::Tenant(tenant(9));
        assert_eq!(room.take(&vm(99), &tenant(9)).unwrap_err(), full);
        let rest: Vec<_> = (places.len() + of_one.len()..PER_HOST)
            .map(|n| room.take(&vm(100 + n), &tenant(100 + n)).unwrap())
            .collect();
        assert_eq!(room.take(&vm(98), &tenant(98)).unwrap_err(), Full::Host);
        drop((places, of_one, rest));
        let counts = room.0.lock().unwrap();
        assert!(counts.vms.is_empty() && counts.tenants.is_empty() && counts.all == 0);
    }
}
