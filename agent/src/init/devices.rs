//! Waiting for a device, by the kernel's word and not by trying again, but for the last moment.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::libc::{ENOENT, ENXIO};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::os::fd::AsFd;

/// How long a device may take to appear. On a busy machine without KVM a bus scan takes seconds.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A disk's node is there a moment before the disk can be opened (`device_add_disk` of the kernel), and what
/// says that it can is no event of the node.
const MOMENT: Duration = Duration::from_millis(1);

/// Waits until a device can be opened.
pub fn wait_for(path: &str) -> anyhow::Result<()> {
    wait_until(Path::new(path), Instant::now() + DEADLINE)
        .with_context(|| format!("waiting for {path}"))
}

fn wait_until(path: &Path, deadline: Instant) -> anyhow::Result<()> {
    let directory = path.parent().context("a device has a directory")?;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    // Subscribe, then look: what appears in between is not missed.
    inotify.add_watch(directory, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)?;
    loop {
        let pause = match File::open(path).map_err(|error| error.raw_os_error()) {
            Err(Some(ENOENT)) => DEADLINE,
            Err(Some(ENXIO)) => MOMENT,
            // Whoever uses it says what else is wrong with it.
            Ok(_) | Err(_) => return Ok(()),
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("it did not appear in time; is the disk or the vsock device attached?");
        }
        let timeout = PollTimeout::try_from(pause.min(left + Duration::from_millis(1)))?;
        match poll(&mut [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        match inotify.read_events() {
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

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
    fn a_node_that_cannot_be_opened_yet_is_waited_for_without_a_sign() {
        let dir = tempfile::tempdir().unwrap();
        let (early, ready, device) =
            (dir.path().join("early"), dir.path().join("ready"), dir.path().join("device"));
        for place in [&early, &ready] {
            std::fs::create_dir(place).unwrap();
        }
        // Opened, it answers as a disk does that is not there yet.
        let _socket = std::os::unix::net::UnixListener::bind(early.join("vda")).unwrap();
        std::fs::write(ready.join("vda"), "").unwrap();
        symlink(&early, &device).unwrap();
        let node = device.join("vda");
        let (waits, waited) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| waits.send(wait_until(&node, Instant::now() + DEADLINE)).unwrap());
            assert!(waited.recv_timeout(Duration::from_millis(20)).is_err(), "not waited for");
            // No event of the watched directory.
            symlink(&ready, dir.path().join("new")).unwrap();
            std::fs::rename(dir.path().join("new"), &device).unwrap();
            waited.recv_timeout(DEADLINE / 2).unwrap().unwrap();
        });
    }

    #[test]
    fn what_never_appears_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("vda");
        let error = wait_until(&node, Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("did not appear"), "{error}");
    }
}
