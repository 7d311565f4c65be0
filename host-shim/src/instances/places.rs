//! Who may have a VM now. Builds and instances share the host's room; instances have no end of their own, so together
//! they take all but one place of it (where there is only one, that one), and a tenant's take half of those at most.
//! What is more waits in line.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::build::Tenant;
use crate::queue::{Capacity, Memory};

/// The places for instances' VMs.
#[derive(Debug)]
pub struct Places {
    /// Of the host, builds included.
    room: Arc<Semaphore>,
    /// Of instances.
    own: Arc<Semaphore>,
    /// Of one tenant's instances.
    share: usize,
    /// The host's memory, builds included.
    capacity: Capacity,
    /// Of tenants that have a place or wait for one.
    of_tenants: Mutex<HashMap<Tenant, Weak<Semaphore>>>,
}

/// A place, until this is dropped.
#[derive(Debug)]
pub struct Place {
    _taken: [OwnedSemaphorePermit; 3],
    _memory: Memory,
}

impl Places {
    /// Shares `room`, of which there are `max_vms` places, with builds.
    pub fn new(room: Arc<Semaphore>, max_vms: usize, capacity: Capacity) -> Self {
        let places = max_vms.saturating_sub(1).max(1);
        let own = Arc::new(Semaphore::new(places));
        Self { room, own, share: (places / 2).max(1), capacity, of_tenants: Mutex::default() }
    }

    /// Waits for a place and so much memory, in MiB; `None` when there will be none. Dropping the future gives up the wait.
    pub async fn place(&self, tenant: &Tenant, memory_mb: u32) -> Option<Place> {
        // First what is the tenant's own: who waits for that stands in nobody else's way.
        let of_tenant = self.of(tenant).acquire_owned().await.ok()?;
        let own = Arc::clone(&self.own).acquire_owned().await.ok()?;
        let room = Arc::clone(&self.room).acquire_owned().await.ok()?;
        let memory = self.capacity.memory(memory_mb).await;
        Some(Place { _taken: [of_tenant, own, room], _memory: memory })
    }

    fn of(&self, tenant: &Tenant) -> Arc<Semaphore> {
        let mut all = self.of_tenants.lock().unwrap_or_else(PoisonError::into_inner);
        // Every permit, and everyone who waits, holds its semaphore: what nobody holds is as good as new.
        all.retain(|_, semaphore| semaphore.strong_count() > 0);
        if let Some(known) = all.get(tenant).and_then(Weak::upgrade) {
            return known;
        }
        let new = Arc::new(Semaphore::new(self.share));
        all.insert(tenant.clone(), Arc::downgrade(&new));
        new
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn places(max_vms: usize) -> Places {
        Places::new(Arc::new(Semaphore::new(max_vms)), max_vms, Capacity::new(9, "/".into()))
    }

    fn tenant(name: &str) -> Tenant {
        Tenant::new(name).unwrap()
    }

    /// As many as can be had without a wait.
    fn all_of(places: &Places, name: &str) -> Vec<Place> {
        std::iter::from_fn(|| places.place(&tenant(name), 1).now_or_never().flatten()).collect()
    }

    /// Rows are VMs of the host, and places of one tenant, of another, and of a third.
    #[test]
    fn one_tenant_leaves_places_to_others_and_all_leave_one_to_builds() {
        for (max_vms, expected) in
            [(1, [1, 0, 0]), (2, [1, 0, 0]), (3, [1, 1, 0]), (4, [1, 1, 1]), (9, [4, 4, 0])]
        {
            let places = places(max_vms);
            let held = ["a", "b", "c"].map(|name| all_of(&places, name));
            assert_eq!(held.each_ref().map(Vec::len), expected, "{max_vms} VMs");
        }
    }

    /// However many of a tenant's wait, another's comes next.
    #[tokio::test]
    async fn who_waits_for_its_own_share_stands_in_nobodys_way() {
        let places = Arc::new(places(3));
        let mut held = all_of(&places, "a");
        let waiting: Vec<_> = (0..5)
            .map(|_| {
                let places = Arc::clone(&places);
                tokio::spawn(async move { places.place(&tenant("a"), 1).await.unwrap() })
            })
            .collect();
        tokio::task::yield_now().await;
        held.extend(all_of(&places, "b"));
        assert_eq!(held.len(), 2);
        held.clear();
        for waited in waiting {
            drop(waited.await.unwrap());
        }
        // Nothing is kept of who has left.
        drop(all_of(&places, "c"));
        assert_eq!(places.of_tenants.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_wait_that_is_given_up_takes_nothing() {
        let places = places(3);
        let held = all_of(&places, "a");
        assert!(places.place(&tenant("a"), 1).now_or_never().is_none());
        drop(held);
        assert_eq!(all_of(&places, "a").len(), 1);
    }
}
