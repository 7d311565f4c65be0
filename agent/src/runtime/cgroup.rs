//! Cgroups (version 2): what the kernel counted for a step, read before the runtime removes it, and
//! the end of all processes at once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

/// A cgroup in the file system.
#[derive(Clone, Debug)]
pub struct Cgroup {
    directory: PathBuf,
}

/// What a step used. Zero where the kernel does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The most memory at one time, in bytes.
    pub memory_peak: u64,
    /// Processes that were killed for want of memory.
    pub oom_kills: u32,
    /// How often a new process was refused because of the limit.
    pub forks_refused: u64,
}

impl Cgroup {
    /// The cgroup at `path` of the hierarchy mounted at `mount`.
    pub fn new(mount: &Path, path: &Path) -> Self {
        Self { directory: mount.join(path.strip_prefix("/").unwrap_or(path)) }
    }

    /// What was used so far.
    pub fn usage(&self) -> Usage {
        let read = |file: &str| fs::read_to_string(self.directory.join(file)).unwrap_or_default();
        Usage {
            memory_peak: read("memory.peak").trim().parse().unwrap_or(0),
            oom_kills: counter(&read("memory.events"), "oom_kill")
                .map_or(0, |kills| u32::try_from(kills).unwrap_or(u32::MAX)),
            forks_refused: counter(&read("pids.events"), "max").unwrap_or(0),
        }
    }

    /// Makes it.
    pub fn make(&self) -> io::Result<()> {
        fs::create_dir_all(&self.directory)
    }

    /// Has the kernel count memory, and who is killed for want of it, for each cgroup below.
    pub fn count_memory_below(&self) -> io::Result<()> {
        fs::write(self.directory.join("cgroup.subtree_control"), "+memory")
    }

    /// Moves a process into it.
    pub fn adopt(&self, pid: u32) -> io::Result<()> {
        fs::write(self.directory.join("cgroup.procs"), pid.to_string())
    }

    /// One below it.
    pub fn below(&self, name: &str) -> Self {
        Self { directory: self.directory.join(name) }
    }

    /// Makes it, where the one above is there.
    pub fn make_leaf(&self) -> io::Result<()> {
        fs::create_dir(&self.directory)
    }

    /// The file that says which processes are in it.
    pub fn processes_file(&self) -> PathBuf {
        self.directory.join("cgroup.procs")
    }

    /// Kills every process in it, also those below, and removes it when they are gone. It blocks.
    pub fn end(&self, within: Duration) -> io::Result<()> {
        let events = inotify::init(CreateFlags::CLOEXEC)?;
        let file = self.directory.join("cgroup.events");
        match inotify::add_watch(&events, file, WatchFlags::MODIFY) {
            Err(Errno::NOENT) => return Ok(()),
            watched => watched?,
        };
        self.kill();
        let until = Instant::now() + within;
        loop {
            match fs::remove_dir(&self.directory) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => return Ok(()),
            }
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut ready = [PollFd::new(&events, PollFlags::IN)];
            if rustix::event::poll(&mut ready, Some(&left))? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            rustix::io::read(&events, &mut [0; 4096][..])?;
        }
    }

    /// Kills every process in it, also those below. A cgroup that is not there has none.
    pub fn kill(&self) {
        let _ = fs::write(self.directory.join("cgroup.kill"), "1");
    }
}

/// A value of a flat keyed file (kernel's cgroup-v2.rst, *Format*).
fn counter(file: &str, key: &str) -> Option<u64> {
    file.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_what_the_files_say() {
        let mount = tempfile::tempdir().unwrap();
        let directory = mount.path().join("kiln/steps/3");
        fs::create_dir_all(&directory).unwrap();
        let cgroup = Cgroup::new(mount.path(), Path::new("/kiln/steps/3"));
        assert_eq!(cgroup.usage(), Usage::default());
        fs::write(directory.join("memory.peak"), "73728\n").unwrap();
        let events = "low 0\nhigh 0\nmax 4\noom 1\noom_kill 2\noom_group_kill 0\n";
        fs::write(directory.join("memory.events"), events).unwrap();
        fs::write(directory.join("pids.events"), "max 9\n").unwrap();
        let usage = Usage { memory_peak: 73728, oom_kills: 2, forks_refused: 9 };
        assert_eq!(cgroup.usage(), usage);
        cgroup.kill();
        assert_eq!(fs::read_to_string(directory.join("cgroup.kill")).unwrap(), "1");
    }

    #[test]
    fn nonsense_counts_as_unknown() {
        assert_eq!(counter("oom_kill x\n", "oom_kill"), None);
        assert_eq!(counter("oom_kill", "oom_kill"), None);
        assert_eq!(counter("", "oom_kill"), None);
    }
}
