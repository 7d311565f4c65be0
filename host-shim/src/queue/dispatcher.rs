//! Claims queued builds while there is room for a VM, and starts a driver for each.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Mutex, Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::admission::{self, Passing, Verdict};
use super::capacity::Memory;
use super::driver::Driver;
use super::expiry;
use super::lease;
use super::live::Live;
use super::recover::Adopted;
use super::workshop::Workshop;
use crate::api::{CancelOutcome, Scheduler};
use crate::build::{BuildId, Status};
use crate::events::payload;
use crate::exec::Entrance;
use crate::store::{Claimed, Store, StoreError};

/// How often the queue is looked at without being woken: only for a wake-up that was lost.
const FALLBACK: Duration = Duration::from_secs(30);

/// Runs the queue.
pub struct Dispatcher {
    workshop: Arc<Workshop>,
    scheduling: Scheduling,
    room: Arc<Semaphore>,
    owner: String,
    /// How long a build may wait.
    longest: Duration,
    passing: Passing,
    /// Builds whose VMs run already.
    adopted: Vec<Adopted>,
}

/// What came of a look at the queue.
enum Looked {
    /// This one is to be driven.
    Claimed(Box<Claimed>, Memory),
    /// Nobody waits, or nobody fits.
    Nothing,
}

/// The queue's face to the API.
#[derive(Clone)]
pub struct Scheduling {
    wake: Arc<Notify>,
    live: Live,
    store: Arc<dyn Store>,
    /// Held from a claim until its driver is live: a cancel never looks in between.
    claiming: Arc<Mutex<()>>,
}

impl Scheduling {
    /// For a queue over this store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self {
            wake: Arc::new(Notify::new()),
            live: Live::default(),
            store,
            claiming: Arc::new(Mutex::new(())),
        }
    }

    /// Whether a build has a driver.
    pub(super) fn drives(&self, id: &BuildId) -> bool {
        self.live.has(id)
    }

    /// How many builds have a driver.
    pub fn running(&self) -> usize {
        self.live.count()
    }
}

#[async_trait]
impl Scheduler for Scheduling {
    fn wake(&self) {
        self.wake.notify_one();
    }

    fn entrance(&self, id: &BuildId) -> Option<Entrance> {
        self.live.entrance(id)
    }

    async fn cancel(&self, id: &BuildId) -> CancelOutcome {
        drop(self.claiming.lock().await);
        self.live.cancel(id).await;
        match self.store.build(id).await {
            Ok(Some(build)) => match build.status {
                Status::Cancelled => CancelOutcome::Cancelled,
                status if status.is_final() => CancelOutcome::Finished,
                _ if build.publishing.is_some() => CancelOutcome::Publishing,
                _ => CancelOutcome::Unknown,
            },
            Ok(None) | Err(_) => CancelOutcome::Unknown,
        }
    }
}

impl Dispatcher {
    /// A queue that runs as many builds at one time as there is room for VMs, and in which none waits for longer than `longest`.
    pub fn new(
        workshop: Arc<Workshop>,
        scheduling: Scheduling,
        room: Arc<Semaphore>,
        owner: String,
        longest: Duration,
    ) -> Self {
        let (passing, adopted) = (Passing::default(), vec![]);
        Self { workshop, scheduling, room, owner, longest, passing, adopted }
    }

    /// Goes on with these, first.
    #[must_use]
    pub fn going_on(self, adopted: Vec<Adopted>) -> Self {
        Self { adopted, ..self }
    }

    /// Claims and drives until `stop`; then waits for the drivers, whose builds `abandon` ends.
    pub async fn run(mut self, stop: CancellationToken, abandon: CancellationToken) {
        let drivers = TaskTracker::new();
        for Adopted { claimed, vm, notes, place } in self.adopted.drain(..) {
            let entry = self.scheduling.live.enter(&claimed.build.id);
            let workshop = Arc::clone(&self.workshop);
            let driver = Driver::new(workshop, claimed, entry, place, abandon.clone());
            drivers.spawn(driver.going_on(vm, notes).run());
        }
        // Before the first claim: what waited for too long while no server ran is not started any more.
        if let Err(error) = expiry::pass(&self.workshop, self.longest).await {
            let error = crate::causes::chain(&error);
            tracing::error!(error, "cannot end builds that wait for too long");
        }
        drivers.spawn(expiry::run(Arc::clone(&self.workshop), self.longest, stop.clone()));
        let scheduling = self.scheduling.clone();
        let (workshop, owner) = (Arc::clone(&self.workshop), self.owner.clone());
        drivers.spawn(lease::run(workshop, scheduling.clone(), owner, stop.clone()));
        let mut freed = self.workshop.capacity.freed();
        loop {
            let permit = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                permit = Arc::clone(&self.room).acquire_owned() => permit,
            };
            let Ok(permit) = permit else { break };
            // Listen before asking, so that a build that is queued in between is not missed, nor memory that is given back.
            let woken = scheduling.wake.notified();
            freed.mark_unchanged();
            let claiming = scheduling.claiming.lock().await;
            let (claimed, memory) = match self.look().await {
                Ok(Looked::Claimed(claimed, memory)) => (*claimed, memory),
                Ok(Looked::Nothing) => {
                    drop((claiming, permit));
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = woken => {}
                        // Its sender is the workshop's.
                        _ = freed.changed() => {}
                        () = tokio::time::sleep(FALLBACK) => {}
                    }
                    continue;
                }
                Err(error) => {
                    tracing::error!(error = %crate::causes::chain(&error), "cannot claim a build; trying again");
                    drop((claiming, permit));
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                    }
                    continue;
                }
            };
            crate::points::point("claimed");
            let entry = scheduling.live.enter(&claimed.build.id);
            drop(claiming);
            let workshop = Arc::clone(&self.workshop);
            let place = (permit, memory);
            let driver = Driver::new(workshop, claimed, entry, place, abandon.clone());
            drivers.spawn(driver.run());
        }
        drivers.close();
        drivers.wait().await;
    }

    /// Claims whoever may start now: who is next in the line, or who may pass it.
    async fn look(&mut self) -> Result<Looked, StoreError> {
        let Some(next) = self.workshop.store.next_queued().await? else {
            return Ok(Looked::Nothing);
        };
        let room = self.workshop.capacity.room();
        let verdict = admission::judge(next.memory_mb, &room);
        if verdict != Verdict::Fits && !self.passing.knows(&next.id) {
            tracing::warn!(id = %next.id, memory_mb = next.memory_mb, ?verdict, ?room, "the next build waits for room");
        }
        let Some(most_mb) = self.passing.most_mb(&next.id, verdict, &room) else {
            return Ok(Looked::Nothing);
        };
        let free = self.workshop.capacity.claiming(most_mb);
        let now = crate::clock::now();
        let told = [payload::of_host(now, payload::status(Status::Building, None))];
        let claimed = self.workshop.events.claim_within(&self.owner, now, &told, free.mb()).await?;
        let Some(claimed) = claimed else { return Ok(Looked::Nothing) };
        self.passing.started(&claimed.build.id);
        let memory = free.keep(claimed.build.request.memory_mb);
        Ok(Looked::Claimed(Box::new(claimed), memory))
    }
}
