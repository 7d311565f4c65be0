//! The end of a server, step by step.
//!
//! ```text
//! asked to stop ─▶ drain   no build is claimed, no instance or session begun; what runs goes on
//!     builds have ended, --drain-seconds are over, or asked again
//!               ─▶ stop    builds that still run are given up; instances and sessions are told to end
//!     5 s
//!               ─▶ abandon instances that still run are killed
//!     15 s
//!               ─▶ what is left is the next start's to end
//! ```
//! Meanwhile the API answers, the registry gateway too, and readers of events and logs read on: the connections are closed last.
//!
//! **Invariant**: a build that waits is not touched. It is in the store, with its source, for the next server.

use std::time::Duration;

use anyhow::bail;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long instances and sessions may take to end once they are told to.
const GRACE: Duration = Duration::from_secs(5);

/// How long a publication that was recorded may go on after that, and a VM be removed.
const LAST: Duration = Duration::from_secs(15);

/// How long the end may take beside the drain: both of these, the last requests and the registry.
pub(super) const AFTER: Duration = Duration::from_secs(40);

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drained {
    /// No build runs any more.
    Done,
    /// The time for it is over.
    Late,
    /// Somebody did not want to wait.
    Hurried,
}

/// Waits for the builds that run.
pub(super) async fn drain(
    builds: &TaskTracker,
    limit: Duration,
    hurry: &CancellationToken,
) -> Drained {
    tokio::select! {
        biased;
        () = builds.wait() => Drained::Done,
        () = hurry.cancelled() => Drained::Hurried,
        () = tokio::time::sleep(limit) => Drained::Late,
    }
}

/// Waits for everything that was told to end, then ends it, then gives up.
pub(super) async fn finish(
    mut all: JoinHandle<()>,
    abandon: &CancellationToken,
) -> anyhow::Result<()> {
    if timeout(GRACE, &mut all).await.is_ok() {
        return Ok(());
    }
    abandon.cancel();
    if timeout(LAST, &mut all).await.is_err() {
        let seconds = (GRACE + LAST).as_secs();
        bail!("builds or instances did not end within {seconds} s; the next start ends them");
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SHORTER: Duration = Duration::from_secs(299);
    const LIMIT: Duration = Duration::from_secs(300);
    const LONGER: Duration = Duration::from_secs(301);

    fn builds(lasting: Duration) -> TaskTracker {
        let builds = TaskTracker::new();
        builds.spawn(tokio::time::sleep(lasting));
        builds.close();
        builds
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_with_the_last_build_at_its_limit_or_when_somebody_hurries() {
        let hurry = CancellationToken::new();
        let begun = tokio::time::Instant::now();
        let in_time = builds(SHORTER);
        assert_eq!(drain(&in_time, LIMIT, &hurry).await, Drained::Done);
        assert_eq!(begun.elapsed(), SHORTER);

        let begun = tokio::time::Instant::now();
        let late = builds(LONGER);
        assert_eq!(drain(&late, LIMIT, &hurry).await, Drained::Late);
        assert_eq!(begun.elapsed(), LIMIT);

        hurry.cancel();
        let begun = tokio::time::Instant::now();
        assert_eq!(drain(&builds(LIMIT), LIMIT, &hurry).await, Drained::Hurried);
        assert!(begun.elapsed().is_zero());
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_end_is_abandoned_and_then_left() {
        let abandon = CancellationToken::new();
        let told = abandon.clone();
        let begun = tokio::time::Instant::now();
        finish(tokio::spawn(async move { told.cancelled().await }), &abandon).await.unwrap();
        assert_eq!(begun.elapsed(), GRACE);
        let left = finish(tokio::spawn(std::future::pending()), &abandon).await.unwrap_err();
        assert!(left.to_string().contains("20 s"), "{left}");
    }
}
