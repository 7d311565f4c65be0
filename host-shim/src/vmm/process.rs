//! A process of a VM: held by a pidfd, named in records by pid and start time, so that neither
//! waiting nor killing ever meets a stranger.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use super::sys;

/// Which process: a pid alone may belong to a stranger by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid.
    pub pid: i32,
    /// When it started, in ticks since the host's boot: field 22 of `/proc/<pid>/stat`.
    pub start: u64,
}

/// A child of ours, which stays a zombie, and its pid its own, until it is reaped; or one of an earlier server's.
#[derive(Debug)]
pub(crate) struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Takes over a child that nobody has waited for.
    pub(crate) fn adopt(pid: u32) -> io::Result<Self> {
        let raw = i32::try_from(pid).map_err(io::Error::other)?;
        let pidfd = rustix::process::pidfd_open(to_pid(raw)?, PidfdFlags::empty())?;
        let start = start_time(raw)?;
        Ok(Self { id: ProcessId { pid: raw, start }, pidfd: sys::watched(pidfd)? })
    }

    /// Takes over exactly this process, which an earlier server started; `None` when it is gone.
    pub(crate) fn of_another(id: ProcessId) -> io::Result<Option<Self>> {
        let Some(pidfd) = held(id) else { return Ok(None) };
        // A zombie that nobody has reaped yet has a pidfd as well.
        if wait_gone(&pidfd, Instant::now()) {
            return Ok(None);
        }
        Ok(Some(Self { id, pidfd: sys::watched(pidfd)? }))
    }

    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    /// Resolves when it has ended, with how. Any number of callers may wait.
    pub(crate) async fn exited(&self) -> String {
        match self.pidfd.readable().await {
            // The guard keeps the readiness: a process that ended stays ended.
            Ok(_guard) => self.how_it_ended(),
            Err(error) => format!("cannot be watched any more: {error}"),
        }
    }

    pub(crate) fn kill(&self) {
        kill(self.pidfd.get_ref());
    }

    /// Gives it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(self.pidfd.get_ref(), signal)?)
    }

    /// Waits for a killed process and reaps it. `false` when the deadline passed first.
    pub(crate) fn reap(&self, deadline: Instant) -> bool {
        let gone = wait_gone(self.pidfd.get_ref(), deadline);
        if gone {
            let id = WaitId::PidFd(self.pidfd.get_ref().as_fd());
            let _ = rustix::process::waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        }
        gone
    }

    fn how_it_ended(&self) -> String {
        let id = WaitId::PidFd(self.pidfd.get_ref().as_fd());
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        match rustix::process::waitid(id, options) {
            Ok(Some(status)) => describe(&status),
            Ok(None) | Err(_) => "ended".to_owned(),
        }
    }
}

fn describe(status: &WaitIdStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// Whether exactly this process still runs.
#[cfg(test)]
pub(crate) fn alive(id: ProcessId) -> bool {
    held(id).is_some()
}

/// Kills exactly this process, child of ours or not, and waits for its end. `Ok(false)` when it was not there;
/// an error when it would not go.
pub(crate) fn end(id: ProcessId, deadline: Instant) -> io::Result<bool> {
    let Some(pidfd) = held(id) else { return Ok(false) };
    kill(&pidfd);
    if wait_gone(&pidfd, deadline) {
        Ok(true)
    } else {
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("process {} does not end", id.pid)))
    }
}

/// Kills whatever has this pid now, and waits; for members of a cgroup of ours.
pub(crate) fn end_pid(pid: i32, deadline: Instant) {
    if let Ok(pidfd) =
        to_pid(pid).and_then(|pid| Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?))
    {
        kill(&pidfd);
        wait_gone(&pidfd, deadline);
    }
}

/// The pidfd is opened before the start time is read: if that matches, the pidfd is of that process.
fn held(id: ProcessId) -> Option<OwnedFd> {
    let pidfd = rustix::process::pidfd_open(to_pid(id.pid).ok()?, PidfdFlags::empty()).ok()?;
    (start_time(id.pid).ok()? == id.start).then_some(pidfd)
}

fn kill(pidfd: &OwnedFd) {
    // It fails only when the process is gone already.
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
}

fn wait_gone(pidfd: &OwnedFd, deadline: Instant) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    loop {
        // Rounded up, so that the last wait does not spin.
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= deadline => return false,
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}

fn to_pid(raw: i32) -> io::Result<Pid> {
    if raw <= 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{raw} is not a pid")));
    }
    Pid::from_raw(raw).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Field 22 of `/proc/<pid>/stat`.
pub(crate) fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat)
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not as expected")))
}

/// The process's own name, field 2, may hold anything, brackets and blanks too: count from its last bracket.
fn parse_start_time(stat: &[u8]) -> Option<u64> {
    let after_name = stat.iter().rposition(|b| *b == b')')? + 1;
    std::str::from_utf8(&stat[after_name..]).ok()?.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 987654 20";
        for name in ["sh", "a b", "x) R 1 (y", ")))"] {
            let stat = format!("77 ({name}) {fields}");
            assert_eq!(parse_start_time(stat.as_bytes()), Some(987_654), "{name}");
        }
        assert_eq!(parse_start_time(b"77 (sh) S 1 2"), None);
        assert_eq!(parse_start_time(b""), None);
    }

    #[tokio::test]
    #[allow(clippy::zombie_processes)] // `Process` reaps it.
    async fn an_end_is_told_to_every_waiter_and_again() {
        let child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::adopt(child.id()).unwrap();
        assert!(alive(process.id()));
        process.kill();
        let (a, b) = tokio::join!(process.exited(), process.exited());
        assert_eq!((a.as_str(), b.as_str()), ("was killed by signal 9", "was killed by signal 9"));
        assert_eq!(process.exited().await, "was killed by signal 9");
        assert!(process.reap(Instant::now() + Duration::from_secs(5)));
        assert!(!alive(process.id()));
    }
}
