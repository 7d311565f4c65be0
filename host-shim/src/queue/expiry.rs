//! Builds that wait for too long: they fail, and say that they were never started.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::workshop::Workshop;
use crate::build::{Failure, FailureKind, Status};
use crate::events::payload;
use crate::store::StoreError;

/// How often is looked: a tenth of the limit, and within these.
const EVERY: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(30);

/// How many are ended at one time. The next follow at once.
const BATCH: u32 = 100;

/// Ends builds that have been queued for longer than this, until `stop`.
pub(super) async fn run(workshop: Arc<Workshop>, most: Duration, stop: CancellationToken) {
    let every = (most / 10).clamp(*EVERY.start(), *EVERY.end());
    loop {
        let more = match pass(&workshop, most).await {
            Ok(more) => more,
            Err(error) => {
                let error = crate::causes::chain(&error);
                tracing::error!(error, "cannot end builds that wait for too long; trying again");
                false
            }
        };
        let pause = if more { Duration::ZERO } else { every };
        if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return;
        }
    }
}

/// Ends those that are over the limit now. Whether there may be more.
pub(super) async fn pass(workshop: &Workshop, most: Duration) -> Result<bool, StoreError> {
    let now = crate::clock::now();
    let before = now.saturating_sub(i64::try_from(most.as_millis()).unwrap_or(i64::MAX));
    let failure = failure(most);
    let told = [
        payload::of_host(now, payload::failure(&failure)),
        payload::of_host(now, payload::status(Status::Failed, None)),
    ];
    let expired = workshop.events.expire_queued(before, BATCH, &failure, now, &told).await?;
    for id in &expired {
        tracing::warn!(%id, "a build waited for too long, and failed");
        let dir = workshop.builds_dir.join(id.as_str());
        if let Err(error) = tokio::fs::remove_dir_all(&dir).await {
            tracing::warn!(%id, %error, "the source of a build that never started cannot be removed");
        }
    }
    Ok(expired.len() >= BATCH as usize)
}

fn failure(most: Duration) -> Failure {
    let seconds = most.as_secs();
    let message = format!(
        "the build waited for more than {seconds} s, which is the host's limit (--max-queue-seconds), and was never started: submit it again, or ask the host's operator for more room"
    );
    Failure::new(FailureKind::TimedOut, message)
}
