//! A cgroup for each VM, so that all of its processes are ended together, and none is missed.
//!
//! Version 2 where it can be written (also when it has no controllers), else a hierarchy of
//! version 1. Limits on memory and tasks are not set here: the guest's memory is fixed by QEMU, and
//! the jail bounds tasks and files by the VM's own uid.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::process;

/// The directory that the VMs' cgroups are made in.
#[derive(Debug)]
pub(crate) struct CgroupRoot {
    dir: PathBuf,
}

/// The cgroup of one VM.
#[derive(Debug)]
pub(crate) struct Cgroup {
    dir: PathBuf,
    /// The one that it is in goes after it.
    _root: Option<Arc<CgroupRoot>>,
}

impl CgroupRoot {
    /// Finds a hierarchy that can be written and makes `kiln/<instance>` in it.
    pub(crate) fn find(instance: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let places = candidates(&mounts, &own, rustix::process::geteuid().is_root());
        places.into_iter().map(|place| place.join("kiln").join(instance)).find_map(|dir| {
            // Another instance may just be removing an empty `kiln`: once more, then.
            let made = fs::create_dir_all(&dir).is_ok() || fs::create_dir_all(&dir).is_ok();
            (made && dir.join("cgroup.procs").exists()).then_some(Self { dir })
        })
    }

    pub(crate) fn create(self: &Arc<Self>, id: &str) -> io::Result<Cgroup> {
        let dir = self.dir.join(id);
        fs::create_dir(&dir)?;
        Ok(Cgroup { dir, _root: Some(Arc::clone(self)) })
    }

    /// Those that exist, of an earlier process too.
    pub(crate) fn existing(&self) -> Vec<(String, Cgroup)> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| {
                (entry.file_name().to_string_lossy().into_owned(), Cgroup::recorded(entry.path()))
            })
            .collect()
    }
}

impl Drop for CgroupRoot {
    fn drop(&mut self) {
        // Empty ones only, by what rmdir is: the instance's, then `kiln` when it was the last.
        if fs::remove_dir(&self.dir).is_ok() {
            let _ = self.dir.parent().map(fs::remove_dir);
        }
    }
}

impl Cgroup {
    /// One that an earlier server recorded.
    pub(crate) fn recorded(dir: PathBuf) -> Self {
        Self { dir, _root: None }
    }

    /// Open for writing: a child writes `0` there before it executes.
    pub(crate) fn procs(&self) -> io::Result<File> {
        File::options().write(true).open(self.dir.join("cgroup.procs"))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }

    /// Ends every process in it.
    pub(crate) fn kill(&self) {
        if fs::write(self.dir.join("cgroup.kill"), "1").is_err() {
            for pid in self.members() {
                process::end_pid(pid, Instant::now());
            }
        }
    }

    /// Ends every process in it, waits for that, and removes it.
    pub(crate) fn remove(&self, deadline: Instant) -> io::Result<()> {
        loop {
            self.kill();
            for pid in self.members() {
                process::end_pid(pid, deadline);
            }
            match fs::remove_dir(&self.dir) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                // A dead task is taken out of its cgroup a moment after its end is told.
                Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    std::thread::yield_now();
                }
                other => return other,
            }
        }
    }

    fn members(&self) -> Vec<i32> {
        let list = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        list.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

/// Where VMs' cgroups may go, best first. An unprivileged process has, at most, its own place in version 2.
fn candidates(mountinfo: &str, own: &str, root: bool) -> Vec<PathBuf> {
    let own_v2 = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let mut places = vec![];
    let mut v1 = vec![];
    for (mount, kind, options) in mountinfo.lines().filter_map(mount_of) {
        if kind == "cgroup2" {
            let base = if root { mount } else { mount.join(own_v2.trim_start_matches('/')) };
            places.push(base);
        } else if kind == "cgroup" && root {
            let rank = ["pids", "freezer", "memory"]
                .iter()
                .position(|c| options.split(',').any(|o| o == *c));
            v1.extend(rank.map(|rank| (rank, mount)));
        }
    }
    v1.sort();
    places.extend(v1.into_iter().map(|(_, mount)| mount));
    places
}

/// Mount point, type and super options of a line (proc(5)): optional fields end with a lone `-`.
fn mount_of(line: &str) -> Option<(PathBuf, &str, &str)> {
    let (mount, fs) = line.split_once(" - ")?;
    let point = mount.split(' ').nth(4)?;
    let mut fs = fs.split(' ');
    Some((PathBuf::from(point), fs.next()?, fs.nth(1)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HYBRID: &str = "\
30 23 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
32 30 0:28 / /sys/fs/cgroup/memory rw,relatime shared:3 - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
34 30 0:30 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn version_2_comes_first_and_then_what_counts_tasks() {
        let root = candidates(HYBRID, "5:memory:/a\n0::/\n", true);
        let paths: Vec<_> = root.iter().map(|p| p.to_str().unwrap()).collect();
        assert_eq!(
            paths,
            ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/memory"]
        );
    }

    #[test]
    fn a_user_has_only_what_was_delegated() {
        let own = candidates(HYBRID, "0::/user.slice/u1", false);
        assert_eq!(own, [PathBuf::from("/sys/fs/cgroup/unified/user.slice/u1")]);
        assert!(candidates("nonsense\n\n", "", true).is_empty());
    }

    #[test]
    fn what_is_inside_ends_and_the_cgroup_goes() {
        let root = Arc::new(
            CgroupRoot::find(&format!("test-{}", std::process::id()))
                .expect("root can write cgroups"),
        );
        let cgroup = root.create("one").unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        fs::write(cgroup.path().join("cgroup.procs"), child.id().to_string()).unwrap();
        assert_eq!(root.existing().len(), 1);
        cgroup.remove(Instant::now() + Duration::from_secs(5)).unwrap();
        assert!(!cgroup.path().exists());
        assert!(!child.wait().unwrap().success());
    }
}
