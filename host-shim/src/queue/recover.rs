//! What a new process does with the builds that an earlier one had claimed.

use std::sync::Arc;

use super::driver::publish_failure;
use super::workshop::Workshop;
use crate::build::{Build, Change, Failure, FailureKind};
use crate::events::payload;
use crate::publish::{self, Checked};
use crate::staging::Digest;
use crate::store::{Claimed, StoreError};

/// Ends every build that was under way when the last process ended. VMs were swept before.
///
/// A publication that was recorded is finished, for it may already be in the registry; the rest
/// fails as `host_restarted`.
pub async fn recover(workshop: &Arc<Workshop>, owner: &str) -> Result<(), StoreError> {
    for Claimed { build, fence } in workshop.store.reclaim(owner).await? {
        let change = match &build.publishing {
            Some(digest) => match republish(workshop, &build, digest).await {
                Ok(()) => Change::Finish,
                Err(failure) => Change::Fail(failure),
            },
            None => Change::Fail(Failure::new(
                FailureKind::HostRestarted,
                "the host was restarted while the build ran; submit it again",
            )),
        };
        tracing::info!(id = %build.id, ?change, "ended a build of an earlier process");
        let now = crate::clock::now();
        let mut events = Vec::new();
        if let Change::Fail(failure) = &change {
            events.push(payload::of_host(now, payload::failure(failure)));
        }
        let next = build.apply(change.clone(), now)?;
        events.push(payload::of_host(now, payload::status(next.status, None)));
        if let Err(error) = tokio::fs::remove_dir_all(workshop.build_dir(&build)).await {
            tracing::debug!(%error, id = %build.id, "no directory of the build to remove");
        }
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
