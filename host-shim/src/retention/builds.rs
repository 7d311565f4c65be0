//! Builds that ended long ago go, with their events, tags and idempotency keys, and with images that have no name but theirs. Images
//! that users have named stay in the registry, and so do the sessions of the audit log, which have an age of their own.

use super::images::Images;
use super::{BATCH, Collected, days_ago, logs};
use crate::build::Millis;
use crate::causes::chain;
use crate::kept::Kept;
use crate::store::{Store, StoreError};

/// So many builds are looked up at one time.
const PAGE: u32 = 100;

pub(super) async fn remove(
    store: &dyn Store,
    kept: &Kept,
    days: u32,
    now: Millis,
    mut images: Option<&mut Images<'_>>,
    all: &mut Collected,
) -> Result<(), StoreError> {
    let Some(before) = days_ago(days, now) else { return Ok(()) };
    loop {
        // Those whose VMs are kept are passed over: there are others behind them.
        let kept: Vec<_> = kept.list(None).into_iter().map(|lease| lease.id).collect();
        let page = PAGE.saturating_add(u32::try_from(kept.len()).unwrap_or(u32::MAX));
        let mut old = store.finished_builds(before, page).await?;
        old.retain(|id| !kept.contains(id));
        if old.is_empty() {
            return Ok(());
        }
        for id in old {
            // Before the build, by which it is found.
            if let Some(images) = &mut images
                && let Err(error) = images.remove(&id).await
            {
                // They stay for another day, all that are left of them.
                tracing::error!(%id, error = chain(&error), "a build's image cannot be removed");
                return Ok(());
            }
            logs::trim(store, &id, all).await?;
            while !store.remove_build(&id, BATCH).await? {}
            all.builds += 1;
        }
    }
}
