//! The vsock device: one vhost-device-vsock process for each VM, in the VM's own directory.
//!
//! The device may write in that directory, and the device serves a hostile guest. So nothing there is opened
//! by following a link: its socket is opened as what it is, checked, and connected to through that handle.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{FileType, Mode, OFlags};
use tokio::io::unix::AsyncFd;

use super::process::Process;
use super::qemu_args::GUEST_CID;
use super::sys;

/// The device's socket for the host's dials; a guest's dial to port P goes to `v_P`.
pub(crate) const UDS: &str = "v";

/// The device's socket for QEMU.
const VHOST_USER: &str = "vu";

/// Bounds how many connections a guest can have open, and so the memory and threads behind them.
pub(crate) const MAX_FILES: u64 = 512;

/// It takes milliseconds; this is for a host that swaps.
const READY_DEADLINE: Duration = Duration::from_secs(10);

/// The device's arguments. Its directory is its working directory, so that the length of a path never matters.
pub(crate) fn args() -> Vec<OsString> {
    ["--guest-cid", &GUEST_CID.to_string(), "--socket", VHOST_USER, "--uds-path", UDS]
        .into_iter()
        .map(OsString::from)
        .collect()
}

/// Watches the directory for the device's socket. Made before the device starts.
pub(crate) struct Appearing {
    inotify: AsyncFd<OwnedFd>,
}

/// Why there is no connection to the device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotConnected {
    #[error("it {0}")]
    Ended(String),
    #[error("it did not listen within {READY_DEADLINE:?}")]
    Deadline,
    #[error("what it made is not a socket")]
    NotASocket,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Appearing {
    pub(crate) fn watch(dir: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&inotify, dir, WatchFlags::CREATE | WatchFlags::ONLYDIR)?;
        Ok(Self { inotify: sys::watched(inotify)? })
    }

    /// Waits for the socket and connects QEMU's side of it.
    pub(crate) async fn connect(
        self,
        dir: &Path,
        device: &Process,
    ) -> Result<UnixStream, NotConnected> {
        let work = async {
            tokio::select! {
                biased;
                how = device.exited() => Err(NotConnected::Ended(how)),
                stream = self.connected(dir) => stream,
            }
        };
        tokio::time::timeout(READY_DEADLINE, work).await.map_err(|_| NotConnected::Deadline)?
    }

    async fn connected(&self, dir: &Path) -> Result<UnixStream, NotConnected> {
        loop {
            match rustix::fs::open(
                dir.join(VHOST_USER),
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            ) {
                Ok(socket) => return connect_to(&socket).await,
                Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            // Which name it was is found by looking again.
            let mut ready = self.inotify.readable().await?;
            let _ = ready
                .try_io(|inotify| Ok(rustix::io::read(inotify.get_ref(), &mut [0; 4096][..])?));
        }
    }
}

/// Where the socket that is held can be connected to, wherever its name leads by now. Holds while it is open.
pub(super) fn address(socket: &OwnedFd) -> Result<String, NotConnected> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(socket).map_err(io::Error::from)?.st_mode);
    if kind != FileType::Socket {
        return Err(NotConnected::NotASocket);
    }
    Ok(format!("/proc/self/fd/{}", socket.as_raw_fd()))
}

async fn connect_to(socket: &OwnedFd) -> Result<UnixStream, NotConnected> {
    let path = address(socket)?;
    loop {
        match tokio::net::UnixStream::connect(&path).await {
            Ok(stream) => {
                let stream = stream.into_std()?;
                // QEMU's vhost-user code expects a socket that blocks.
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            // The name appears at bind(2) and listen(2) follows at once, without an event to wait for.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock
                ) =>
            {
                tokio::task::yield_now().await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn sleeper() -> Process {
        Process::adopt(std::process::Command::new("sleep").arg("1000").spawn().unwrap().id())
            .unwrap()
    }

    fn done(process: &Process) {
        process.kill();
        assert!(process.reap(std::time::Instant::now() + Duration::from_secs(5)));
    }

    #[tokio::test]
    async fn a_socket_that_comes_later_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let device = sleeper();
        let appearing = Appearing::watch(dir.path()).unwrap();
        let (there, other) = (dir.path().join(VHOST_USER), dir.path().join(UDS));
        let maker = tokio::task::spawn_blocking(move || {
            let other = UnixListener::bind(other).unwrap();
            (other, UnixListener::bind(there).unwrap())
        });
        appearing.connect(dir.path(), &device).await.unwrap();
        drop(maker.await.unwrap());
        done(&device);
    }

    #[tokio::test]
    async fn a_link_is_not_followed_and_a_file_is_no_socket() {
        let dir = tempfile::tempdir().unwrap();
        let device = sleeper();
        let _elsewhere = UnixListener::bind(dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", dir.path().join(VHOST_USER)).unwrap();
        let appearing = Appearing::watch(dir.path()).unwrap();
        let refused = appearing.connect(dir.path(), &device).await;
        assert!(matches!(refused, Err(NotConnected::NotASocket)), "{refused:?}");
        done(&device);
    }

    #[tokio::test]
    async fn a_device_that_dies_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let device = sleeper();
        let appearing = Appearing::watch(dir.path()).unwrap();
        device.kill();
        let refused = appearing.connect(dir.path(), &device).await;
        assert!(matches!(refused, Err(NotConnected::Ended(_))), "{refused:?}");
        done(&device);
    }
}
