//! What a driver has to store: tried again until it is.

use std::ops::RangeInclusive;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::causes::chain;
use crate::queue::reserve::Reserve;
use crate::store::{Disk, StoreError};

/// The pause after a first failure, and the longest one. A disk that is full has room again when somebody makes some.
const PAUSE: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(30);

/// The tries of one write.
pub(super) struct Tries {
    pause: Duration,
    /// The server ends: one more try, and then the next start's recovery has the build.
    abandon: CancellationToken,
    reserve: Reserve,
    failed: bool,
    last: bool,
}

impl Tries {
    pub(super) fn new(abandon: CancellationToken, reserve: Reserve) -> Self {
        let last = abandon.is_cancelled();
        Self { pause: *PAUSE.start(), abandon, reserve, failed: false, last }
    }

    /// Whether a try has failed: what it wrote may be stored all the same.
    pub(super) fn have_failed(&self) -> bool {
        self.failed
    }

    /// Waits before the next try. Gives back what is no failure of the database, and what there is no time for.
    pub(super) async fn after(&mut self, error: StoreError) -> Result<(), StoreError> {
        let StoreError::Database { disk, .. } = error else { return Err(error) };
        if disk == Some(Disk::Full) && self.reserve.give() {
            self.failed = true;
            return Ok(());
        }
        if self.last {
            return Err(error);
        }
        self.failed = true;
        let (error, pause) = (chain(&error), self.pause);
        tracing::error!(error, ?pause, "cannot store what became of the build; trying again");
        let waited = self.abandon.run_until_cancelled(tokio::time::sleep(pause)).await;
        self.last = waited.is_none();
        self.pause = (pause * 2).min(*PAUSE.end());
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    fn failure() -> StoreError {
        StoreError::Database { operation: "write", disk: None, source: "it is broken".into() }
    }

    fn tries(abandon: CancellationToken) -> Tries {
        Tries::new(abandon, Reserve::new(std::path::Path::new("/nowhere")))
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_and_have_a_bound() {
        let mut tries = self::tries(CancellationToken::new());
        let mut pauses = vec![];
        for _ in 0..12 {
            let begun = Instant::now();
            tries.after(failure()).await.unwrap();
            pauses.push(begun.elapsed());
        }
        assert_eq!(pauses[..3], [100, 200, 400].map(Duration::from_millis));
        assert!(pauses.is_sorted());
        assert_eq!(pauses[10..], [*PAUSE.end(); 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_disk_gets_what_was_kept_for_it_and_is_tried_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("reserve");
        std::fs::write(&kept, "room").unwrap();
        // Also where there is no time for a pause.
        let abandon = CancellationToken::new();
        abandon.cancel();
        let mut tries = Tries::new(abandon, Reserve::new(dir.path()));
        let full = || StoreError::Database {
            operation: "write",
            disk: Some(Disk::Full),
            source: "it is full".into(),
        };
        let begun = Instant::now();
        tries.after(full()).await.unwrap();
        assert!(!kept.exists() && tries.have_failed());
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert!(tries.after(full()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_database_is_tried_again() {
        let mut tries = self::tries(CancellationToken::new());
        assert!(matches!(tries.after(StoreError::Fenced).await, Err(StoreError::Fenced)));
        assert!(!tries.have_failed());
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_server_ends_a_pause_and_leaves_one_try() {
        let abandon = CancellationToken::new();
        let mut tries = self::tries(abandon.clone());
        for _ in 0..9 {
            tries.after(failure()).await.unwrap();
        }
        let begun = Instant::now();
        let end = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            abandon.cancel();
        };
        let (waited, ()) = tokio::join!(tries.after(failure()), end);
        waited.unwrap();
        assert_eq!(begun.elapsed(), Duration::from_secs(1));
        assert!(tries.after(failure()).await.is_err());
        assert!(self::tries(abandon).after(failure()).await.is_err());
    }
}
