//! How much of a session's input has been taken, and when the host is to hear of it.

use std::sync::atomic::{AtomicU64, Ordering};

use kiln_protocol::exec::INPUT_WINDOW;

/// Counts what is taken.
#[derive(Debug, Default)]
pub struct Taken {
    total: AtomicU64,
    told: AtomicU64,
}

impl Taken {
    /// So many bytes more. Gives the total when the host is to be told: before it runs short, and not of every piece,
    /// since a word to the host costs a switch into it. One caller at a time.
    pub fn more(&self, count: usize) -> Option<u64> {
        let count = count as u64;
        let total = self.total.fetch_add(count, Ordering::Relaxed) + count;
        let tell = total - self.told.load(Ordering::Relaxed) >= INPUT_WINDOW / 4;
        tell.then(|| {
            self.told.store(total, Ordering::Relaxed);
            total
        })
    }

    /// Whether the host may have sent so many bytes by now.
    pub fn allows(&self, sent: u64) -> bool {
        sent <= self.total.load(Ordering::Relaxed) + INPUT_WINDOW
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_hears_of_each_quarter_of_the_window() {
        let taken = Taken::default();
        let quarter = usize::try_from(INPUT_WINDOW / 4).unwrap_or(usize::MAX);
        assert_eq!(taken.more(quarter - 1), None);
        assert_eq!(taken.more(1), Some(quarter as u64));
        assert_eq!(taken.more(1), None);
        assert_eq!(taken.more(3 * quarter), Some(4 * quarter as u64 + 1));
        assert!(taken.allows(2 * INPUT_WINDOW + 1) && !taken.allows(2 * INPUT_WINDOW + 2));
    }
}
