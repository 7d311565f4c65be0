//! The VMs of builds that failed, for as long as somebody may want to look around in the step that failed.
//!
//! ```text
//! driver ── a failed step that stays ──▶ Kept ──▶ one task for each VM: paused, resumed for a session, paused …
//! api::exec ── entrance(build) ──────────▶ │                            └─ until its lease ends, it is released,
//! api::kept ── list, extend, release ────▶ │                               or room is needed: the oldest goes first
//! ```
//! A VM that is paused takes no CPU and no build's place, and all of its memory: what it has not touched yet is not free
//! for others. Nothing that it says counts any more: its build has ended, its control connection and its way to the
//! registry are closed.

mod room;
mod stay;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_protocol::hello::TOKEN_LEN;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::room::Memory;
pub(crate) use self::room::total_mb;
pub use self::stay::Machine;
use self::stay::{Ask, Stay};
use crate::build::{BuildId, Millis, Tenant};
use crate::clock;
use crate::exec::Entrance;

/// Longest time that a VM stays, however often its lease is extended: two days.
pub const MAX_STAY_SECONDS: u32 = 2 * 24 * 60 * 60;

/// Kept VMs of a server. Cheap to clone.
#[derive(Clone)]
pub struct Kept {
    inner: Arc<Inner>,
}

struct Inner {
    most: usize,
    house: Mutex<House>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[derive(Default)]
struct House {
    /// The oldest first.
    vms: Vec<Lodger>,
    /// Memory of VMs that are being started, in MiB.
    starting_mb: u64,
}

/// Memory for a VM that is being started: until this is dropped nobody else is given it.
#[must_use]
pub struct Starting {
    inner: Arc<Inner>,
    memory_mb: u32,
}

/// What is known of a kept VM.
#[derive(Clone, Debug)]
pub struct Lease {
    /// The build that failed.
    pub id: BuildId,
    /// Whose it is.
    pub tenant: Tenant,
    /// Of the VM.
    pub memory_mb: u32,
    /// Since when it is kept.
    pub since: Millis,
    /// When it goes.
    pub until: Millis,
    /// Sessions in it now.
    pub sessions: usize,
}

/// Whose VM is kept, and for how long.
pub struct Guest {
    /// The build that failed.
    pub id: BuildId,
    /// Whose it is.
    pub tenant: Tenant,
    /// Of the VM.
    pub memory_mb: u32,
    /// How long it stays, in seconds.
    pub seconds: u32,
    /// What its agent wants to see first.
    pub nonce: [u8; TOKEN_LEN],
    /// Goes when the VM goes.
    pub with_it: Box<dyn Send + Sync>,
}

struct Lodger {
    lease: Lease,
    entrance: Entrance,
    asks: mpsc::UnboundedSender<Ask>,
    /// The process that has its memory.
    qemu: Option<i32>,
    /// Its VM is being removed: it takes its place until that is done, and cannot be entered.
    going: bool,
}

/// Who cannot come in before somebody else goes.
struct Waiting {
    lodger: Lodger,
    instead: BuildId,
}

impl Kept {
    /// For at most so many VMs at one time.
    pub fn new(most: usize) -> Self {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        Self { inner: Arc::new(Inner { most, house: Mutex::default(), tasks, stop }) }
    }

    /// Whether any VM may be kept.
    pub fn is_open(&self) -> bool {
        self.inner.most > 0
    }

    /// Lets VMs go, the oldest first, until the host has memory for another one and those that stay have no more than so much, or there
    /// are none left.
    pub async fn make_room(&self, memory_mb: u32, beside_mb: u64) -> Starting {
        loop {
            let first = match self.reserve(memory_mb, beside_mb, room::free_mb) {
                Ok(starting) => return starting,
                Err(first) => first,
            };
            self.let_go(&first, "a VM is about to start and needs its memory").await;
        }
    }

    /// Sets memory aside where so much is free, or says which VM has to go first. With none to go it is given all the same.
    fn reserve(
        &self,
        memory_mb: u32,
        beside_mb: u64,
        free_mb: impl FnOnce() -> Option<u64>,
    ) -> Result<Starting, BuildId> {
        let mut house = self.lock();
        let taken = house.vms.iter().map(|vm| Memory::of(vm.lease.memory_mb, vm.qemu));
        let kept_mb: u64 = house.vms.iter().map(|vm| u64::from(vm.lease.memory_mb)).sum();
        let fits = kept_mb <= beside_mb
            && room::has_room_for(memory_mb, free_mb(), taken, house.starting_mb);
        if !fits && let Some(first) = room::first_to_go(house.vms.iter().map(|vm| &vm.lease)) {
            return Err(first.clone());
        }
        house.starting_mb += u64::from(memory_mb);
        Ok(Starting { inner: Arc::clone(&self.inner), memory_mb })
    }

    /// Keeps a VM. Where there are as many as may be, or as many of its tenant, another one goes.
    pub async fn keep(&self, vm: impl Machine, guest: Guest) {
        let dial = match vm.dial() {
            Ok(dial) if self.is_open() && !self.inner.stop.is_cancelled() => dial,
            refused => {
                if let Err(error) = refused {
                    tracing::error!(%error, "a VM is not kept: its sockets are not to be had");
                }
                return vm.remove().await;
            }
        };
        let Guest { id, tenant, memory_mb, seconds, nonce, with_it } = guest;
        let since = clock::now();
        let until = since + i64::from(seconds) * 1000;
        let lease = Lease { id: id.clone(), tenant, memory_mb, since, until, sessions: 0 };
        let (asks, asked) = mpsc::unbounded_channel();
        let entrance = Entrance::new(stay::Door::new(dial, asks.clone()), nonce);
        let stay = Stay { kept: self.clone(), id, entrance: entrance.clone(), until, with_it };
        let mut lodger = Lodger { lease, entrance, asks, qemu: vm.qemu(), going: false };
        while let Err(waiting) = self.admit(lodger) {
            lodger = waiting.lodger;
            self.let_go(&waiting.instead, "there are as many kept VMs as there may be").await;
        }
        let stop = self.inner.stop.clone();
        self.inner.tasks.spawn(stay.run(vm, asked, stop));
    }

    /// Takes one in, or says which has to go first.
    fn admit(&self, lodger: Lodger) -> Result<(), Box<Waiting>> {
        let vms = &mut self.lock().vms;
        let most = self.inner.most;
        let leases = vms.iter().map(|lodger| &lodger.lease);
        let instead = room::in_the_way(&leases, &lodger.lease.tenant, most).cloned();
        if let Some(instead) = instead {
            return Err(Box::new(Waiting { lodger, instead }));
        }
        vms.push(lodger);
        Ok(())
    }

    /// The way into a build's VM.
    pub fn entrance(&self, id: &BuildId) -> Option<Entrance> {
        self.staying(id).map(|(_, entrance)| entrance)
    }

    /// Those of a tenant, or all. The oldest first.
    pub fn list(&self, tenant: Option<&Tenant>) -> Vec<Lease> {
        let vms = &self.lock().vms;
        let leases = vms.iter().filter(|lodger| !lodger.going).map(|lodger| &lodger.lease);
        leases
            .filter(|lease| tenant.is_none_or(|tenant| lease.tenant == *tenant))
            .cloned()
            .collect()
    }

    /// The lease of a build's VM.
    pub fn lease(&self, id: &BuildId) -> Option<Lease> {
        self.staying(id).map(|(lease, _)| lease)
    }

    fn staying(&self, id: &BuildId) -> Option<(Lease, Entrance)> {
        let vms = &self.lock().vms;
        let lodger = vms.iter().find(|lodger| lodger.lease.id == *id && !lodger.going)?;
        Some((lodger.lease.clone(), lodger.entrance.clone()))
    }

    /// Lets a VM stay for so many seconds from now, at most [`MAX_STAY_SECONDS`] in all. `None` when it is not kept.
    pub fn extend(&self, id: &BuildId, seconds: u32) -> Option<Lease> {
        let vms = &mut self.lock().vms;
        let lodger = vms.iter_mut().find(|lodger| lodger.lease.id == *id && !lodger.going)?;
        let last = lodger.lease.since + i64::from(MAX_STAY_SECONDS) * 1000;
        let until = (clock::now() + i64::from(seconds) * 1000).min(last);
        lodger.lease.until = until;
        lodger.asks.send(Ask::Until(until)).ok().map(|()| lodger.lease.clone())
    }

    /// Lets a VM go, and waits until it is gone. False when it is not kept.
    pub async fn release(&self, id: &BuildId) -> bool {
        let asks = {
            let vms = &self.lock().vms;
            vms.iter().find(|lodger| lodger.lease.id == *id).map(|lodger| lodger.asks.clone())
        };
        let Some(asks) = asks else { return false };
        // Fails when it goes already, which is waited for as well.
        let _ = asks.send(Ask::Go);
        asks.closed().await;
        true
    }

    async fn let_go(&self, id: &BuildId, why: &str) {
        tracing::info!(%id, why, "a kept VM goes before its time");
        self.release(id).await;
    }

    /// Ends all of them, and waits for that.
    pub async fn close(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    fn lock(&self) -> MutexGuard<'_, House> {
        self.inner.lock()
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, House> {
        self.house.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.inner.lock().starting_mb -= u64::from(self.memory_mb);
    }
}
