//! The lease of a claim. A driver renews it while it lives ([`hold`]); a build whose lease ran out, and that nobody here drives, is ended or
//! queued again like one of an earlier server ([`run`]): it would be `building` for ever otherwise.
//!
//! ```text
//! claim ─▶ lease ─┬─ renewed ─▶ lease …
//!                 ├─ not renewed in time, nobody drives it ─▶ taken over (a new fence) ─▶ recovered
//!                 └─ taken over by somebody else ─▶ the driver stops, and its VM with it
//! ```
//!
//! A driver whose renewals fail goes on: a disk that is full for an hour must not end its builds, and the fence refuses whatever it writes
//! after somebody else took over.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::dispatcher::Scheduling;
use super::recover::recover;
use super::workshop::Workshop;
use crate::api::Scheduler;
use crate::build::{BuildId, Refused};
use crate::causes::chain;
use crate::store::{Fence, LEASE, StoreError};

/// How often a claim is renewed, and looked for one that was not: two renewals in a row may be lost.
pub const BEAT: Duration = Duration::from_secs(LEASE.as_secs() / 3);

/// Renews a claim. Returns once it is somebody else's.
pub(super) async fn hold(workshop: &Workshop, id: &BuildId, fence: Fence) {
    loop {
        tokio::time::sleep(workshop.beat).await;
        match workshop.store.renew(id, fence, crate::clock::now()).await {
            // Its end is stored: the driver is about to find out.
            Ok(()) | Err(StoreError::Refused(Refused::Final(_))) => {}
            Err(StoreError::Fenced | StoreError::NotFound(_)) => return,
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(%id, error, "cannot renew the claim on a build; trying again");
            }
        }
    }
}

/// Takes over what nobody drives, until `stop`.
pub(super) async fn run(
    workshop: Arc<Workshop>,
    scheduling: Scheduling,
    owner: String,
    stop: CancellationToken,
) {
    loop {
        if let Err(error) = pass(&workshop, &scheduling, &owner).await {
            tracing::error!(error = %chain(&error), "cannot take over builds that nobody drives; trying again");
        }
        if stop.run_until_cancelled(tokio::time::sleep(workshop.beat)).await.is_none() {
            return;
        }
    }
}

async fn pass(
    workshop: &Arc<Workshop>,
    scheduling: &Scheduling,
    owner: &str,
) -> Result<(), StoreError> {
    let now = crate::clock::now();
    for id in workshop.store.lapsed(now).await? {
        // Its renewals fail, or the clock has jumped.
        if scheduling.drives(&id) {
            continue;
        }
        let Some(claimed) = workshop.store.take_over(&id, owner, now).await? else { continue };
        tracing::error!(%id, "nobody drives this build any more, though it has not ended");
        // Its driver's VM, if that has just gone.
        workshop.vmm.wait_for_removals().await;
        recover(workshop, vec![claimed]).await?;
        scheduling.wake();
    }
    Ok(())
}
