//! Which VMs live, and which user each of them is. A user is given out again once its VM is gone, and
//! the server can wait for that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Users in a row: more VMs than any host runs at once.
const MAX_SLOTS: u32 = 1024;

/// The VMs of this process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slots {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    removed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Slot by VM id.
    taken: BTreeMap<String, u32>,
    /// VMs that were dropped, and are being removed by a thread.
    removals: usize,
}

/// A removal that goes on. The end of the server waits for it.
#[derive(Debug)]
pub(crate) struct Removal {
    shared: Arc<Shared>,
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
        let taken = &mut self.shared.lock().taken;
        if taken.contains_key(id) {
            return None;
        }
        let used: BTreeSet<u32> = taken.values().copied().collect();
        let number = (0..MAX_SLOTS).find(|n| !used.contains(n))?;
        taken.insert(id.to_owned(), number);
        Some(Slot { slots: self.clone(), id: id.to_owned(), number })
    }

    /// This very place, for a VM that has it already; `None` when it is another's.
    pub(crate) fn take_again(&self, id: &str, number: u32) -> Option<Slot> {
        let taken = &mut self.shared.lock().taken;
        if number >= MAX_SLOTS || taken.contains_key(id) || taken.values().any(|n| *n == number) {
            return None;
        }
        taken.insert(id.to_owned(), number);
        Some(Slot { slots: self.clone(), id: id.to_owned(), number })
    }

    /// The ids of living VMs.
    pub(crate) fn live(&self) -> BTreeSet<String> {
        self.shared.lock().taken.keys().cloned().collect()
    }

    /// Waits until every removal that was begun has ended, or for `most`.
    pub(crate) fn wait_for_removals(&self, most: Duration) {
        let state = self.shared.lock();
        let _ = self.shared.removed.wait_timeout_while(state, most, |state| state.removals > 0);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Begins the removal of its VM by a thread of its own.
    pub(crate) fn removal(&self) -> Removal {
        let shared = Arc::clone(&self.slots.shared);
        shared.lock().removals += 1;
        Removal { shared }
    }

    /// Never gives it back: something of the VM may still run.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.shared.lock().taken.remove(&self.id);
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        self.shared.lock().removals -= 1;
        self.shared.removed.notify_all();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_end_waits_for_what_is_being_removed() {
        let slots = Slots::default();
        slots.wait_for_removals(Duration::from_mins(1));
        let slot = slots.take("a").unwrap();
        let removal = slot.removal();
        slots.wait_for_removals(Duration::ZERO);
        let thread = std::thread::spawn(move || {
            drop(slot);
            drop(removal);
        });
        slots.wait_for_removals(Duration::from_mins(1));
        assert!(slots.live().is_empty());
        thread.join().unwrap();
    }

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
        assert!(slots.take_again("one more", 1).is_none());
        assert!(Slots::default().take_again("a", MAX_SLOTS).is_none());
        let again = Slots::default();
        let a = again.take_again("a", 7).unwrap();
        assert_eq!(a.number(), 7);
        assert!(again.take_again("a", 8).is_none() && again.take_again("b", 7).is_none());
        assert_eq!(again.take("c").map(|c| c.number()), Some(0));
        assert!(all.iter().all(|slot| slot.number() != 1));
    }
}
