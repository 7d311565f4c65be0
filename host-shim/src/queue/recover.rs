//! What a new process does with the builds that an earlier one had claimed.

use std::sync::Arc;

use super::driver::Workshop;
use crate::build::{Build, Change, Failure, FailureKind};
use crate::events::payload;
use crate::gateway::guests::GuestContext;
use crate::publish;
use crate::staging::Staging;
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
        workshop.store.change(&build.id, fence, change, now, &events).await?;
    }
    Ok(())
}

async fn republish(workshop: &Arc<Workshop>, build: &Build, digest: &str) -> Result<(), Failure> {
    let repository = build.repository();
    if publish::is_published(&workshop.backing, &repository, digest)
        .await
        .map_err(publish::PublishError::into_failure)?
    {
        return Ok(());
    }
    let staging = Staging::open(&workshop.build_dir(build).join("staging")).map_err(|error| {
        Failure::new(FailureKind::HostRestarted, format!("the staged image is gone ({error}); submit the build again"))
    })?;
    let context = GuestContext::new(
        build.id.clone(),
        build.tenant.clone(),
        staging,
        Arc::clone(&workshop.backing),
    );
    let checked =
        publish::check(&context, digest).await.map_err(publish::PublishError::into_failure)?;
    publish::push(&checked, &workshop.backing, &repository, build.tag())
        .await
        .map_err(publish::PublishError::into_failure)
}
