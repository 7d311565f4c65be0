//! How full the disk is.

use std::path::PathBuf;
use std::time::Duration;

use super::images::ImagesError;

/// How often somebody looks.
const LOOK: Duration = Duration::from_mins(1);

/// A file system, and how full it may get.
#[derive(Clone, Debug)]
pub struct Disk {
    dir: PathBuf,
    percent: u32,
    /// How often somebody looks at it.
    pub(super) look: Duration,
}

impl Disk {
    /// The one that this directory is on, and the percentage.
    pub fn new(dir: PathBuf, percent: u32) -> Self {
        Self { dir, percent, look: crate::points::shorter("KILN_TEST_GC_LOOK_MS", LOOK) }
    }

    /// How many bytes there are beyond what there may be.
    pub(super) fn excess(&self) -> Result<u64, ImagesError> {
        let stat = rustix::fs::statvfs(&self.dir).map_err(|e| ImagesError::Disk(e.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        let used = bytes(stat.f_blocks.saturating_sub(stat.f_bfree));
        Ok(excess(self.percent, used, bytes(stat.f_bavail)))
    }
}

/// By the measure of `df`: what only root may take counts neither as used nor as free. Pure.
fn excess(percent: u32, used: u64, available: u64) -> u64 {
    let all = u128::from(used) + u128::from(available);
    let may = all * u128::from(percent) / 100;
    used.saturating_sub(u64::try_from(may).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_at_the_mark_is_not_beyond_it() {
        for (percent, used, available, expected) in [
            (90, 90, 10, 0),
            (90, 91, 9, 1),
            (90, 100, 0, 10),
            (99, 0, 0, 0),
            (95, 1 << 60, 0, (1 << 60) - ((1 << 60) / 100 * 95 + 72)),
            (90, u64::MAX, u64::MAX, 0),
        ] {
            let found = excess(percent, used, available);
            assert!(found.abs_diff(expected) <= 1, "{percent} {used} {available}: {found}");
        }
    }
}
