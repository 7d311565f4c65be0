//! Which VMs live, and which user each of them is. A user is given out again once its VM is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Users in a row: more VMs than any host runs at once.
const MAX_SLOTS: u32 = 1024;

/// The VMs of this process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slots {
    /// Slot by VM id.
    taken: Arc<Mutex<BTreeMap<String, u32>>>,
}

/// A VM's place. Dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Slots,
    id: String,
    number: u32,
}

impl Slots {
    /// The lowest free place; `None` when the id has one already, or all are taken.
    pub(crate) fn take(&self, id: &str) -> Option<Slot> {
        let mut taken = self.lock();
        if taken.contains_key(id) {
            return None;
        }
        let used: BTreeSet<u32> = taken.values().copied().collect();
        let number = (0..MAX_SLOTS).find(|n| !used.contains(n))?;
        taken.insert(id.to_owned(), number);
        Some(Slot { slots: self.clone(), id: id.to_owned(), number })
    }

    /// The ids of living VMs.
    pub(crate) fn live(&self) -> BTreeSet<String> {
        self.lock().keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Never gives it back: something of the VM may still run.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.lock().remove(&self.id);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_one_vms_and_comes_back() {
        let slots = Slots::default();
        let a = slots.take("a").unwrap();
        let b = slots.take("b").unwrap();
        assert_eq!((a.number(), b.number()), (0, 1));
        assert!(slots.take("a").is_none());
        drop(a);
        assert_eq!(slots.take("c").map(|c| c.number()), Some(0));
        b.keep();
        assert_eq!(slots.live(), BTreeSet::from(["b".to_owned()]));
        let all: Vec<_> =
            (0..MAX_SLOTS - 1).map(|n| slots.take(&format!("n{n}")).unwrap()).collect();
        assert!(slots.take("one more").is_none());
        assert!(all.iter().all(|slot| slot.number() != 1));
    }
}
