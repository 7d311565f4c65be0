//! Claims queued builds while there is room for a VM, and starts a driver for each.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Mutex, Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::driver::Driver;
use super::expiry;
use super::live::Live;
use super::workshop::Workshop;
use crate::api::{CancelOutcome, Scheduler};
use crate::build::{BuildId, Status};
use crate::events::payload;
use crate::exec::Entrance;
use crate::store::Store;

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
        Self { workshop, scheduling, room, owner, longest }
    }

    /// Claims and drives until `stop`; then waits for the drivers, whose builds `abandon` ends.
    pub async fn run(self, stop: CancellationToken, abandon: CancellationToken) {
        let drivers = TaskTracker::new();
        // Before the first claim: what waited for too long while no server ran is not started any more.
        if let Err(error) = expiry::pass(&self.workshop, self.longest).await {
            let error = crate::causes::chain(&error);
            tracing::error!(error, "cannot end builds that wait for too long");
        }
        drivers.spawn(expiry::run(Arc::clone(&self.workshop), self.longest, stop.clone()));
        loop {
            let permit = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                permit = Arc::clone(&self.room).acquire_owned() => permit,
            };
            let Ok(permit) = permit else { break };
            // Listen before asking, so that a build that is queued in between is not missed.
            let woken = self.scheduling.wake.notified();
            let claiming = self.scheduling.claiming.lock().await;
            let now = crate::clock::now();
            let told = payload::of_host(now, payload::status(Status::Building, None));
            let claimed = match self.workshop.events.claim(&self.owner, now, &[told]).await {
                Ok(Some(claimed)) => claimed,
                Ok(None) => {
                    drop((claiming, permit));
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = woken => {}
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
            let entry = self.scheduling.live.enter(&claimed.build.id);
            drop(claiming);
            let workshop = Arc::clone(&self.workshop);
            let driver = Driver::new(workshop, claimed, entry, permit, abandon.clone());
            drivers.spawn(driver.run());
        }
        drivers.close();
        drivers.wait().await;
    }
}
