//! What a new process does with the builds that an earlier one had claimed.
//!
//! ```text
//! reclaimed ─▶ adopt ─┬─ its VM runs, and can be gone on with ─▶ a driver of this process
//!                     └─ the rest ─▶ (their VMs are swept) ─▶ recover ─┬─ published ─▶ finished
//!                                                                     └─ not ─▶ queued again, once
//! ```

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::driver::{AGAIN, Place, publish_failure};
use super::journal::Notes;
use super::outcome;
use super::workshop::Workshop;
use crate::build::{Build, Change, Failure, FailureKind, Status};
use crate::events::payload;
use crate::publish::{self, Checked};
use crate::staging::Digest;
use crate::store::{Claimed, StoreError};
use crate::vmm::Vm;

/// A build whose VM runs, in its place.
pub struct Adopted {
    pub(super) claimed: Claimed,
    pub(super) vm: Vm,
    pub(super) notes: Notes,
    pub(super) place: Place,
}

/// Takes over the VMs that still run what their builds want. Gives the builds that are left without one.
pub async fn adopt(
    workshop: &Arc<Workshop>,
    claimed: Vec<Claimed>,
    room: &Arc<Semaphore>,
) -> (Vec<Adopted>, Vec<Claimed>) {
    let (mut adopted, mut left) = (vec![], vec![]);
    for claimed in claimed {
        match taken_over(workshop, &claimed.build, room).await {
            Some((vm, notes, place)) => adopted.push(Adopted { claimed, vm, notes, place }),
            None => left.push(claimed),
        }
    }
    (adopted, left)
}

async fn taken_over(
    workshop: &Workshop,
    build: &Build,
    room: &Arc<Semaphore>,
) -> Option<(Vm, Notes, Place)> {
    let notes = Notes::read(&workshop.vmm.dir_of(build.id.as_str())).ok()?;
    // What a masker holds back of a line, and half a secret in it, went with the earlier server.
    let has_secrets = !build.request.secrets.is_empty();
    if build.status != Status::Building || has_secrets || !notes.can_be_continued() {
        return None;
    }
    let permit = Arc::clone(room).try_acquire_owned().ok()?;
    let memory = workshop.capacity.claiming(build.request.memory_mb);
    if memory.mb() < build.request.memory_mb {
        return None;
    }
    let memory = memory.keep(build.request.memory_mb);
    let adopted = workshop.vmm.adopt(build.id.as_str()).await;
    let vm = adopted.unwrap_or_else(|error| {
        let error = crate::causes::chain(&error);
        tracing::warn!(id = %build.id, error, "cannot go on with the VM of an earlier server");
        None
    });
    Some((vm?, notes, (permit, memory)))
}

/// Ends or requeues builds that were under way when the last process ended. VMs were swept before.
///
/// A publication that was recorded is finished, for it may already be in the registry; the rest is built again, once,
/// and then fails as `host_restarted`.
pub async fn recover(workshop: &Arc<Workshop>, left: Vec<Claimed>) -> Result<(), StoreError> {
    for Claimed { build, fence } in left {
        let change = match &build.publishing {
            Some(digest) => match republish(workshop, &build, digest).await {
                Ok(()) => Change::Finish,
                Err(failure) => Change::Fail(failure),
            },
            None => outcome::gone_with_its_server(&build),
        };
        tracing::info!(id = %build.id, ?change, "a build of an earlier process");
        let now = crate::clock::now();
        let mut events = Vec::new();
        let mut gone = workshop.build_dir(&build);
        match &change {
            Change::Fail(failure) => events.push(payload::of_host(now, payload::failure(failure))),
            Change::Requeue => {
                events.push(payload::of_host(now, payload::kiln_log(AGAIN)));
                // Its source is needed again.
                gone.push("staging");
            }
            _ => {}
        }
        let next = build.apply(change.clone(), now)?;
        events.push(payload::of_host(now, payload::status(next.status, None)));
        if let Err(error) = tokio::fs::remove_dir_all(&gone).await {
            tracing::debug!(%error, id = %build.id, "nothing of the build to remove");
        }
        crate::points::point("recovering");
        workshop.events.change(&build.id, fence, change, now, &events).await?;
    }
    Ok(())
}

async fn republish(workshop: &Workshop, build: &Build, digest: &str) -> Result<(), Failure> {
    let lost = || {
        Failure::new(
            FailureKind::HostRestarted,
            "the host was restarted while the image was published, and what was staged is gone; submit the build again",
        )
    };
    let digest = Digest::parse(digest).map_err(|_| lost())?;
    let repository = build.repository();
    let staging = workshop.build_dir(build).join("staging");
    let checked = Checked::load(&staging).await.map_err(|e| publish_failure(&e))?;
    let Some(checked) = checked.filter(|checked| checked.digest == digest) else {
        // Staging goes when all is pushed, the tag last.
        let published = publish::is_published(&workshop.backing, &repository, digest).await;
        return published.map_err(|e| publish_failure(&e))?.then_some(()).ok_or_else(lost);
    };
    // Also where the digest is there: the tag may not be. What is there is not sent again.
    let Workshop { backing, upstreams, .. } = workshop;
    let pushed = publish::push(&checked, backing, upstreams, &repository, build.tag()).await;
    pushed.map_err(|e| publish_failure(&e))
}
