//! Logs of finished builds go when they are old, and the oldest while all are too large together.
//!
//! A log goes as a whole: half a log, without what came first, helps nobody. What tells how the build ended stays: its
//! status, steps, failure, and what it reached.

use super::{BATCH, Collected, Keep, days_ago};
use crate::build::{BuildId, Millis};
use crate::store::{Store, StoreError};

/// So many logs are looked up at one time.
const PAGE: u32 = 100;

pub(super) async fn remove(
    store: &dyn Store,
    keep: &Keep,
    now: Millis,
    all: &mut Collected,
) -> Result<(), StoreError> {
    let mut left = store.log_bytes().await?;
    loop {
        let page = store.finished_logs(PAGE).await?;
        if page.is_empty() {
            return Ok(());
        }
        for log in page {
            if !goes(keep, log.completed_at, left, now) {
                return Ok(());
            }
            left = left.saturating_sub(trim(store, &log.id, all).await?);
        }
    }
}

/// Whether the oldest of the logs that are left goes. Pure.
fn goes(keep: &Keep, completed_at: Millis, left: u64, now: Millis) -> bool {
    let is_old = days_ago(keep.logs_days, now).is_some_and(|before| completed_at < before);
    is_old || (keep.logs_bytes > 0 && left > keep.logs_bytes)
}

/// Removes the log of a finished build; how many bytes it had.
pub(super) async fn trim(
    store: &dyn Store,
    id: &BuildId,
    all: &mut Collected,
) -> Result<u64, StoreError> {
    let (mut after, mut bytes) = (0, 0);
    loop {
        let piece = store.trim_log(id, after, BATCH).await?;
        bytes += piece.bytes;
        all.log_events += piece.events;
        all.log_bytes += piece.bytes;
        match piece.next {
            Some(next) => after = next,
            None => return Ok(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_and_size_are_bounds_of_their_own_and_none_where_they_are_nothing() {
        const DAY: Millis = 24 * 60 * 60 * 1000;
        let now = 100 * DAY;
        let keep = |logs_days, logs_bytes| Keep { logs_days, logs_bytes, ..Keep::default() };
        for (keep, age, left, expected) in [
            (keep(0, 0), 99 * DAY, u64::MAX, false),
            (keep(2, 0), 2 * DAY, u64::MAX, false),
            (keep(2, 0), 2 * DAY + 1, 1, true),
            (keep(0, 10), 99 * DAY, 10, false),
            (keep(0, 10), 0, 11, true),
            (keep(2, 10), DAY, 10, false),
            (keep(2, 10), DAY, 11, true),
            (keep(2, 10), 3 * DAY, 0, true),
        ] {
            assert_eq!(goes(&keep, now - age, left, now), expected, "{keep:?} {age} {left}");
        }
    }
}
