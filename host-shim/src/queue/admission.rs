//! Whether a build may start now, and who may start before one that has to wait. Pure.
//!
//! Whoever is next in the line starts as soon as there is room for it. While it waits for memory others may start past it where
//! they fit, [`MAX_PASSED`] of them; then nobody does until it has started. So a large build waits for those under way and for a
//! few more, and small ones do not wait for a large one for as long as there is something to start. Its tenant's place in the line is kept meanwhile.

use crate::build::BuildId;

/// How many builds may start past one that has to wait.
const MAX_PASSED: u32 = 8;

/// What has to be free for each VM on the file system of the scratch disks, in bytes. A reserve and not the disk's size: disks are sparse,
/// and hardly any build fills its own. A disk that cannot grow any more fails its build by name.
const DISK_RESERVE: u64 = 1 << 30;

/// What there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Memory for all VMs, in MiB.
    pub total_mb: u32,
    /// Of that, what no build and no instance has. What kept VMs have is theirs until it is needed.
    pub free_mb: u32,
    /// VMs of builds and instances.
    pub vms: u32,
    /// Free for disks, in bytes; `None` when that cannot be asked.
    pub disk: Option<u64>,
}

/// Whether a build may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Fits,
    /// When others have ended.
    NoMemory,
    /// When there is room on the disk. That is nobody's of the queue to make.
    NoDisk,
    /// There will never be so much memory. It was queued when there was.
    Never,
}

/// Judges a build that wants so much memory.
pub fn judge(memory_mb: u32, room: &Room) -> Verdict {
    let reserved = DISK_RESERVE * (u64::from(room.vms) + 1);
    if room.disk.is_some_and(|free| free < reserved) {
        Verdict::NoDisk
    } else if memory_mb > room.total_mb {
        Verdict::Never
    } else if memory_mb > room.free_mb {
        Verdict::NoMemory
    } else {
        Verdict::Fits
    }
}

/// The build that waits at the head of the line, and how many have started past it.
#[derive(Debug, Default)]
pub struct Passing {
    head: Option<(BuildId, u32)>,
}

impl Passing {
    /// How much memory a build may want to start now, in MiB, where this one is next and was judged so; `None`: nobody starts.
    pub fn most_mb(&mut self, next: &BuildId, verdict: Verdict, room: &Room) -> Option<u32> {
        let passed = match &self.head {
            Some((head, passed)) if head == next => *passed,
            _ => {
                self.head = Some((next.clone(), 0));
                0
            }
        };
        match verdict {
            Verdict::Fits | Verdict::Never => Some(room.free_mb),
            Verdict::NoMemory => (passed < MAX_PASSED).then_some(room.free_mb),
            Verdict::NoDisk => None,
        }
    }

    /// Whether this one is known to wait.
    pub fn knows(&self, id: &BuildId) -> bool {
        self.head.as_ref().is_some_and(|(head, _)| head == id)
    }

    /// This build has started.
    pub fn started(&mut self, id: &BuildId) {
        match &mut self.head {
            Some((head, _)) if head == id => self.head = None,
            Some((_, passed)) => *passed += 1,
            None => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn room(free_mb: u32) -> Room {
        Room { total_mb: 4096, free_mb, vms: 0, disk: Some(u64::MAX) }
    }

    #[test]
    fn bounds_hold_below_at_and_above_them() {
        assert_eq!(judge(4096, &room(4096)), Verdict::Fits);
        assert_eq!(judge(4097, &room(4096)), Verdict::Never);
        assert_eq!(judge(1024, &room(1024)), Verdict::Fits);
        assert_eq!(judge(1025, &room(1024)), Verdict::NoMemory);
        let disk = |free, vms| judge(1, &Room { disk: Some(free), vms, ..room(4096) });
        assert_eq!(disk(DISK_RESERVE, 0), Verdict::Fits);
        assert_eq!(disk(DISK_RESERVE - 1, 0), Verdict::NoDisk);
        assert_eq!(disk(3 * DISK_RESERVE, 2), Verdict::Fits);
        assert_eq!(disk(3 * DISK_RESERVE, 3), Verdict::NoDisk);
        assert_eq!(judge(1, &Room { disk: None, ..room(4096) }), Verdict::Fits);
    }

    #[test]
    fn a_large_build_is_passed_by_a_few_and_no_more() {
        let id = |name: &str| BuildId::new(name).unwrap();
        let (mut passing, room) = (Passing::default(), room(1024));
        for n in 0..MAX_PASSED {
            let most = passing.most_mb(&id("large"), Verdict::NoMemory, &room);
            assert_eq!(most, Some(1024), "{n}");
            passing.started(&id("small"));
        }
        assert_eq!(passing.most_mb(&id("large"), Verdict::NoMemory, &room), None);
        // It waits for room on the disk as everybody does, and its turn comes.
        assert_eq!(passing.most_mb(&id("large"), Verdict::NoDisk, &room), None);
        assert_eq!(passing.most_mb(&id("large"), Verdict::Fits, &room), Some(1024));
        passing.started(&id("large"));
        // Another one has its own count, also when the one before was cancelled.
        assert_eq!(passing.most_mb(&id("other"), Verdict::NoMemory, &room), Some(1024));
    }

    #[test]
    fn one_that_never_fits_is_in_nobodys_way() {
        let (mut passing, room) = (Passing::default(), room(1024));
        let id = BuildId::new("huge").unwrap();
        for _ in 0..=2 * MAX_PASSED {
            assert_eq!(passing.most_mb(&id, Verdict::Never, &room), Some(1024));
            passing.started(&BuildId::new("small").unwrap());
        }
    }
}
