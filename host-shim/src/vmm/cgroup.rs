//! A cgroup for each VM, so that all of its processes are ended together, none is missed, and they have bounds ([`super::limits`]).
//!
//! The processes are ended by version 2 where it can be written (also when it has no controllers), else by a hierarchy of
//! version 1. Each controller limits them where the host has it: in version 2, or in a hierarchy of version 1, in which the VM
//! then has a cgroup as well. What no hierarchy has is [`CgroupRoot::missing`].

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::limits::{Controller, Limits, Setting, Version, weight};
use super::process;

/// The directories that the VMs' cgroups are made in.
#[derive(Debug)]
pub(crate) struct CgroupRoot {
    /// The first ends processes.
    hierarchies: Vec<Hierarchy>,
}

#[derive(Debug)]
struct Hierarchy {
    /// `kiln/<instance>` in it.
    dir: PathBuf,
    version: Version,
    /// What it limits.
    controllers: Vec<Controller>,
}

/// The cgroup of one VM, in every hierarchy that is used.
#[derive(Debug)]
pub(crate) struct Cgroup {
    /// The first ends processes.
    dirs: Vec<PathBuf>,
    /// The ones that it is in go after it.
    _root: Option<Arc<CgroupRoot>>,
}

impl CgroupRoot {
    /// Finds the hierarchies that can be written and makes `kiln/<instance>` in them.
    pub(crate) fn find(instance: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let places = candidates(&mounts, &own, rustix::process::geteuid().is_root());
        Self::among(places, instance)
    }

    /// Of these places, the first that can be written, and those after it that limit what it does not.
    fn among(places: Vec<Place>, instance: &str) -> Option<Self> {
        let mut found = Self { hierarchies: vec![] };
        for place in places {
            let offered = place.controllers.iter().copied().filter(|c| found.lacks(*c)).collect();
            let useful = found.hierarchies.is_empty() || !Vec::is_empty(&offered);
            if useful && let Some(made) = Hierarchy::make(&place, offered, instance) {
                found.hierarchies.push(made);
            }
        }
        (!found.hierarchies.is_empty()).then_some(found)
    }

    fn lacks(&self, controller: Controller) -> bool {
        !self.hierarchies.iter().any(|hierarchy| hierarchy.controllers.contains(&controller))
    }

    /// What VMs' processes are not limited in.
    pub(crate) fn missing(&self) -> Vec<Controller> {
        Controller::ALL.into_iter().filter(|controller| self.lacks(*controller)).collect()
    }

    pub(crate) fn create(self: &Arc<Self>, id: &str, limits: &Limits) -> io::Result<Cgroup> {
        let mut made = Cgroup { dirs: vec![], _root: Some(Arc::clone(self)) };
        for hierarchy in &self.hierarchies {
            let dir = hierarchy.dir.join(id);
            let limited = fs::create_dir(&dir).and_then(|()| {
                made.dirs.push(dir.clone());
                hierarchy.limit(&dir, limits)
            });
            if let Err(error) = limited {
                // Nothing is in them yet.
                made.dirs.iter().for_each(|dir| drop(fs::remove_dir(dir)));
                return Err(error);
            }
        }
        Ok(made)
    }

    /// Those that exist, of an earlier process too.
    pub(crate) fn existing(&self) -> Vec<(String, Cgroup)> {
        let entries = |hierarchy: &Hierarchy| fs::read_dir(&hierarchy.dir).into_iter().flatten();
        self.hierarchies
            .iter()
            .flat_map(entries)
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                (name, Cgroup::recorded(vec![entry.path()]))
            })
            .collect()
    }
}

impl Hierarchy {
    fn make(place: &Place, offered: Vec<Controller>, instance: &str) -> Option<Self> {
        let above = place.base.join("kiln");
        let dir = above.join(instance);
        // Another instance may just be removing an empty `kiln`: once more, then.
        let made = fs::create_dir_all(&dir).is_ok() || fs::create_dir_all(&dir).is_ok();
        if !made || !dir.join("cgroup.procs").exists() {
            return None;
        }
        let controllers = match place.version {
            Version::One => offered,
            Version::Two => {
                let handed_down = [&place.base, &above, &dir];
                offered.into_iter().filter(|c| hand_down(&handed_down, *c)).collect()
            }
        };
        if controllers.contains(&Controller::Cpu) {
            // All VMs together count as much as all CPUs; among them each has its own weight.
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            let weight = weight(place.version, u32::try_from(cpus).unwrap_or(u32::MAX));
            for dir in [&above, &dir] {
                if let Err(error) = write(dir, &weight) {
                    tracing::debug!(%error, "cgroups keep their weight");
                }
            }
        }
        Some(Self { dir, version: place.version, controllers })
    }

    fn limit(&self, dir: &Path, limits: &Limits) -> io::Result<()> {
        let of = |controller| limits.settings(self.version, controller);
        self.controllers.iter().copied().flat_map(of).try_for_each(|setting| write(dir, &setting))
    }
}

/// Lets the cgroups below have a controller, from the top. A cgroup that has processes itself cannot, but for the host's first.
fn hand_down(dirs: &[&PathBuf], controller: Controller) -> bool {
    let word = controller.name();
    dirs.iter().all(|dir| {
        let file = dir.join("cgroup.subtree_control");
        let has =
            || fs::read_to_string(&file).unwrap_or_default().split_whitespace().any(|c| c == word);
        has() || (fs::write(&file, format!("+{word}")).is_ok() && has())
    })
}

fn write(dir: &Path, setting: &Setting) -> io::Result<()> {
    let path = dir.join(setting.file);
    // Never made: in a hierarchy they are there, or the kernel has none.
    let written = File::options()
        .write(true)
        .open(&path)
        .and_then(|mut file| io::Write::write_all(&mut file, setting.value.as_bytes()));
    match written {
        Err(_) if setting.optional => Ok(()),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("{} in {}: {error}", setting.value, path.display()),
        )),
        Ok(()) => Ok(()),
    }
}

impl Drop for CgroupRoot {
    fn drop(&mut self) {
        for Hierarchy { dir, .. } in &self.hierarchies {
            // Empty ones only, by what rmdir is: the instance's, then `kiln` when it was the last.
            if fs::remove_dir(dir).is_ok() {
                let _ = dir.parent().map(fs::remove_dir);
            }
        }
    }
}

impl Cgroup {
    /// One that an earlier server recorded.
    pub(crate) fn recorded(dirs: Vec<PathBuf>) -> Self {
        Self { dirs, _root: None }
    }

    /// Open for writing: a child writes `0` there before it executes.
    pub(crate) fn procs(&self) -> io::Result<Vec<File>> {
        let open = |dir: &PathBuf| File::options().write(true).open(dir.join("cgroup.procs"));
        self.dirs.iter().map(open).collect()
    }

    pub(crate) fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// How much memory its processes may have, in MiB, if the kernel ended one of them because they wanted more.
    pub(crate) fn ended_for_memory(&self) -> Option<u64> {
        self.dirs.iter().find_map(|dir| {
            let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
            let events = read("memory.events").or_else(|| read("memory.oom_control"))?;
            let limit = read("memory.max").or_else(|| read("memory.limit_in_bytes"))?;
            let limit: u64 = limit.trim().parse().ok()?;
            (kills(&events) > 0).then_some(limit >> 20)
        })
    }

    /// Ends every process in it.
    pub(crate) fn kill(&self) {
        let killed = self.dirs.first().map(|dir| fs::write(dir.join("cgroup.kill"), "1"));
        if !matches!(killed, Some(Ok(()))) {
            for pid in self.members() {
                process::end_pid(pid, Instant::now());
            }
        }
    }

    /// Ends every process in it, waits for that, and removes it.
    pub(crate) fn remove(&self, deadline: Instant) -> io::Result<()> {
        self.kill();
        self.dirs.iter().try_for_each(|dir| self.remove_one(dir, deadline))
    }

    fn remove_one(&self, dir: &Path, deadline: Instant) -> io::Result<()> {
        loop {
            match fs::remove_dir(dir) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                // A dead task is taken out of its cgroup a moment after its end is told.
                Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    self.kill();
                    for pid in self.members() {
                        process::end_pid(pid, deadline);
                    }
                    std::thread::yield_now();
                }
                other => return other,
            }
        }
    }

    /// Each is in all of them, or on its way.
    fn members(&self) -> Vec<i32> {
        let list = |dir: &PathBuf| fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        let lists: Vec<_> = self.dirs.iter().map(list).collect();
        lists.iter().flat_map(|list| list.lines()).filter_map(|line| line.parse().ok()).collect()
    }
}

/// Of `memory.events` (version 2) and `memory.oom_control` (version 1).
fn kills(events: &str) -> u64 {
    let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// Where VMs' cgroups may go.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    base: PathBuf,
    version: Version,
    controllers: Vec<Controller>,
}

/// Best first. An unprivileged process has, at most, its own place in version 2.
fn candidates(mountinfo: &str, own: &str, root: bool) -> Vec<Place> {
    let own_v2 = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let mut places = vec![];
    let mut v1 = vec![];
    for (mount, kind, options) in mountinfo.lines().filter_map(mount_of) {
        let has = |name: &str| options.split(',').any(|option| option == name);
        if kind == "cgroup2" {
            let base = if root { mount } else { mount.join(own_v2.trim_start_matches('/')) };
            places.push(Place { base, version: Version::Two, controllers: Controller::ALL.into() });
        } else if kind == "cgroup" && root {
            let rank = ["pids", "freezer", "memory", "cpu"].iter().position(|name| has(name));
            let controllers = Controller::ALL.into_iter().filter(|c| has(c.name())).collect();
            let place = Place { base: mount, version: Version::One, controllers };
            v1.extend(rank.map(|rank| (rank, place)));
        }
    }
    v1.sort_by_key(|(rank, _)| *rank);
    places.extend(v1.into_iter().map(|(_, place)| place));
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
        let paths: Vec<_> = root.iter().map(|p| (p.base.to_str().unwrap(), p.version)).collect();
        assert_eq!(
            paths,
            [
                ("/sys/fs/cgroup/unified", Version::Two),
                ("/sys/fs/cgroup/pids", Version::One),
                ("/sys/fs/cgroup/memory", Version::One),
                ("/sys/fs/cgroup/cpu", Version::One),
            ]
        );
        assert_eq!(root[2].controllers, [Controller::Memory]);
    }

    #[test]
    fn a_user_has_only_what_was_delegated() {
        let own = candidates(HYBRID, "0::/user.slice/u1", false);
        let bases: Vec<_> = own.into_iter().map(|place| place.base).collect();
        assert_eq!(bases, [PathBuf::from("/sys/fs/cgroup/unified/user.slice/u1")]);
        assert!(candidates("nonsense\n\n", "", true).is_empty());
    }

    /// Directories that look like a hierarchy: what is written there can be read.
    fn pretended(base: &Path, id: &str, above: &[&str], files: &[&str]) {
        let (kiln, instance) = (base.join("kiln"), base.join("kiln/i"));
        let one = instance.join(id);
        fs::create_dir_all(&one).unwrap();
        for dir in [base, &kiln, &instance] {
            for name in above {
                fs::write(dir.join(name), "memory pids cpu").unwrap();
            }
        }
        fs::write(instance.join("cgroup.procs"), "").unwrap();
        for name in files {
            fs::write(one.join(name), "").unwrap();
        }
    }

    #[test]
    fn limits_are_written_where_their_controllers_are() {
        let dir = tempfile::tempdir().unwrap();
        let files = ["memory.max", "memory.swap.max", "pids.max", "cpu.max", "cpu.weight"];
        pretended(dir.path(), "one", &["cgroup.subtree_control"], &files);
        let place = Place {
            base: dir.path().to_owned(),
            version: Version::Two,
            controllers: Controller::ALL.into(),
        };
        let root = CgroupRoot::among(vec![place], "i").unwrap();
        assert_eq!(root.missing(), []);
        let one = dir.path().join("kiln/i/one");
        let limits = Limits { memory_mb: 1024, cpus: 2 };
        root.hierarchies[0].limit(&one, &limits).unwrap();
        let read = |name: &str| fs::read_to_string(one.join(name)).unwrap();
        assert_eq!(files.map(read), ["1073741824", "0", "512", "300000 100000", "200"]);
        // One that the kernel does not have is not made, and not missed.
        assert!(!one.join("memory.oom.group").exists());
        fs::remove_file(one.join("memory.max")).unwrap();
        let error = root.hierarchies[0].limit(&one, &limits).unwrap_err().to_string();
        assert!(error.contains("memory.max"), "{error}");
    }

    #[test]
    fn what_no_hierarchy_has_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let (two, one) = (dir.path().join("two"), dir.path().join("one"));
        // Version 2 as it is beside version 1: without controllers.
        pretended(&two, "vm", &[], &[]);
        pretended(&one, "vm", &[], &[]);
        let place = |base: &Path, version, controllers: &[Controller]| Place {
            base: base.to_owned(),
            version,
            controllers: controllers.to_vec(),
        };
        let places = vec![
            place(&two, Version::Two, &[]),
            place(&one, Version::One, &[Controller::Memory]),
            place(&dir.path().join("none"), Version::One, &[]),
        ];
        let root = CgroupRoot::among(places, "i").unwrap();
        assert_eq!(root.hierarchies.len(), 2);
        assert_eq!(root.missing(), [Controller::Pids, Controller::Cpu]);
        // Both have it; each is removed.
        let names: Vec<_> = root.existing().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["vm", "vm"]);
        // Here the file could be written, but does not say afterwards that it was taken.
        assert!(!hand_down(&[&dir.path().join("nowhere")], Controller::Cpu));
    }

    #[test]
    fn whom_the_kernel_ended_for_memory_is_told_by_both_versions() {
        let v2 = "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 1\n";
        let v1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n";
        assert_eq!((kills(v2), kills(v1), kills("oom_kill 0\n"), kills("")), (1, 2, 0, 0));
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::recorded(vec![dir.path().to_owned()]);
        assert_eq!(cgroup.ended_for_memory(), None);
        fs::write(dir.path().join("memory.events"), v2).unwrap();
        fs::write(dir.path().join("memory.max"), "1073741824\n").unwrap();
        assert_eq!(cgroup.ended_for_memory(), Some(1024));
    }

    #[test]
    fn what_is_inside_ends_and_the_cgroup_goes() {
        let root = Arc::new(
            CgroupRoot::find(&format!("test-{}", std::process::id()))
                .expect("root can write cgroups"),
        );
        let cgroup = root.create("one", &Limits { memory_mb: 64, cpus: 1 }).unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        for dir in cgroup.dirs() {
            fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        assert_eq!(root.existing().len(), cgroup.dirs().len());
        cgroup.remove(Instant::now() + Duration::from_secs(5)).unwrap();
        assert!(cgroup.dirs().iter().all(|dir| !dir.exists()));
        assert!(!child.wait().unwrap().success());
    }
}
