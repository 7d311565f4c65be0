//! Waiting for a device node, by the kernel's word and not by trying again.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::os::fd::AsFd;

/// How long a device may take to appear. On a busy machine without KVM a bus scan takes seconds.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Waits until a path exists.
pub fn wait_for(path: &str) -> anyhow::Result<()> {
    wait_until(Path::new(path), Instant::now() + DEADLINE)
        .with_context(|| format!("waiting for {path}"))
}

fn wait_until(path: &Path, deadline: Instant) -> anyhow::Result<()> {
    let directory = path.parent().context("a device has a directory")?;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    // Subscribe, then look: what appears in between is not missed.
    inotify.add_watch(directory, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)?;
    while !path.exists() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("it did not appear in time; is the disk or the vsock device attached?");
        }
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1))?;
        match poll(&mut [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        match inotify.read_events() {
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_waited_for_and_what_appears_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("vda");
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| wait_until(&node, Instant::now() + DEADLINE));
            std::fs::write(dir.path().join("other"), "").unwrap();
            std::fs::write(&node, "").unwrap();
            waiter.join().unwrap().unwrap();
        });
        wait_until(&node, Instant::now()).unwrap();
    }

    #[test]
    fn what_never_appears_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("vda");
        let error = wait_until(&node, Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("did not appear"), "{error}");
    }
}
