//! Places for sources that are being received: so many on this host, half of them at most for one tenant,
//! so that one whose uploads trickle does not keep the others out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::StatusCode;

use super::error::ApiError;
use crate::build::Tenant;

/// The places of a host.
pub(super) struct Uploads {
    most: usize,
    taken: Mutex<HashMap<Tenant, usize>>,
}

/// A place that is taken until it is dropped.
pub(super) struct Place {
    uploads: Arc<Uploads>,
    tenant: Tenant,
}

impl Uploads {
    /// As many places.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::default() })
    }

    /// Takes a place for a tenant.
    pub(super) fn enter(self: &Arc<Self>, tenant: &Tenant) -> Result<Place, ApiError> {
        let mut taken = self.taken();
        if taken.values().sum::<usize>() >= self.most {
            let message = "the host receives as many sources as it can; try again soon";
            let status = StatusCode::SERVICE_UNAVAILABLE;
            return Err(ApiError::new(status, "busy", message).retry_after(5));
        }
        let own = taken.get(tenant).copied().unwrap_or_default();
        let share = self.most.div_ceil(2);
        if own >= share {
            let message = format!(
                "{tenant} sends {share} sources at this time, as many as one tenant may; try again when \
                 some are there"
            );
            return Err(ApiError::too_many("too_many_uploads", message, 5));
        }
        taken.insert(tenant.clone(), own + 1);
        Ok(Place { uploads: Arc::clone(self), tenant: tenant.clone() })
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<Tenant, usize>> {
        // Every change is a single step, so a panic elsewhere leaves nothing half done.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.uploads.taken();
        match taken.get_mut(&self.tenant) {
            Some(own) if *own > 1 => *own -= 1,
            // Tenants that send nothing take no memory.
            _ => drop(taken.remove(&self.tenant)),
        }
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
    fn one_tenant_has_half_of_the_places_and_all_together_have_all() {
        let uploads = Uploads::new(5);
        let enter = |name: &str| uploads.enter(&tenant(name));
        let code = |name: &str| enter(name).err().unwrap().code();
        let mut first: Vec<_> = (0..3).map(|_| enter("a").unwrap()).collect();
        assert_eq!(code("a"), "too_many_uploads");
        let second = [enter("b").unwrap(), enter("c").unwrap()];
        assert_eq!((code("a"), code("d")), ("busy", "busy"));
        drop(first.pop());
        first.push(enter("a").unwrap());
        drop((first, second));
        assert!(uploads.taken().is_empty());
    }

    #[test]
    fn a_single_place_is_everybodys() {
        let uploads = Uploads::new(1);
        let place = uploads.enter(&tenant("a")).unwrap();
        assert_eq!(uploads.enter(&tenant("a")).err().unwrap().code(), "busy");
        drop(place);
        uploads.enter(&tenant("b")).unwrap();
    }
}
