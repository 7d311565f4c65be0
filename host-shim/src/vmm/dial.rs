//! The host's dials into a VM: `CONNECT <port>\n` … `OK <n>\n` on the device's own socket, as Firecracker's hybrid
//! vsock has it.
//!
//! The device may write in its directory, and serves a hostile guest: its socket is opened as what it is, in the
//! directory that is held, and whoever listens there has to be the VM's own user.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::vsock::{self, NotConnected};

/// For the device and the guest's kernel together. Generous, as a guest under software emulation may be busy.
const DEADLINE: Duration = Duration::from_secs(10);

/// Longest answer of the device: `OK ` and a port.
const MAX_ANSWER: usize = 32;

/// Why a VM was not reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The device is gone, or takes nothing.
    #[error("the VM's vsock device takes no connection")]
    Device(#[source] io::Error),
    /// Something else has the socket's name.
    #[error("the VM's vsock device has no socket of its own")]
    NotTheDevice,
    /// Nobody listens on that port in the guest.
    #[error("nothing in the VM takes connections on port {0}")]
    Nobody(u32),
    /// It was paused, and stays so.
    #[error("the VM could not be woken: {0}")]
    Asleep(String),
    /// The device or the guest's kernel does not answer.
    #[error("the VM did not take a connection within {DEADLINE:?}")]
    Deadline,
    /// The device says something else.
    #[error("the VM's vsock device answers what is not its protocol")]
    Strange,
}

/// Dials into one VM, for as long as that VM is there: never into another one that has its name later.
#[derive(Clone, Debug)]
pub struct Dialer {
    /// Of the device's sockets.
    dir: Arc<OwnedFd>,
    /// Whose device it is.
    uid: u32,
}

impl Dialer {
    /// For the VM whose sockets are in `dir`, which only the user `uid` (and root) can write in.
    pub(crate) fn open(dir: &Path, uid: u32) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(dir, flags, Mode::empty())?;
        Ok(Self { dir: Arc::new(dir), uid })
    }

    /// Connects to a port of the guest.
    pub async fn dial(&self, port: u32) -> Result<UnixStream, DialError> {
        let dialled = tokio::time::timeout(DEADLINE, self.connected(port)).await;
        dialled.map_err(|_| DialError::Deadline)?
    }

    async fn connected(&self, port: u32) -> Result<UnixStream, DialError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = rustix::fs::openat(&*self.dir, vsock::UDS, flags, Mode::empty())
            .map_err(|error| DialError::Device(error.into()))?;
        let address = vsock::address(&socket).map_err(|error| match error {
            NotConnected::Io(error) => DialError::Device(error),
            _ => DialError::NotTheDevice,
        })?;
        let mut stream = UnixStream::connect(address).await.map_err(DialError::Device)?;
        let peer = stream.peer_cred().map_err(DialError::Device)?;
        if peer.uid() != self.uid {
            return Err(DialError::NotTheDevice);
        }
        let hello = format!("CONNECT {port}\n");
        stream.write_all(hello.as_bytes()).await.map_err(DialError::Device)?;
        let mut answer = Vec::with_capacity(MAX_ANSWER);
        loop {
            // One byte at a time: what follows the line is the guest's.
            match stream.read_u8().await {
                Ok(b'\n') => break,
                Ok(byte) if answer.len() < MAX_ANSWER => answer.push(byte),
                Ok(_) => return Err(DialError::Strange),
                // The device hangs up where the guest refuses.
                Err(_) => return Err(DialError::Nobody(port)),
            }
        }
        let number = answer.strip_prefix(b"OK ").unwrap_or_default();
        if number.is_empty() || !number.iter().all(u8::is_ascii_digit) {
            return Err(DialError::Strange);
        }
        Ok(stream)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    fn own_uid() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    /// Dials a device that answers these bytes and then hangs up.
    async fn dialled(answer: &'static [u8]) -> Result<Vec<u8>, DialError> {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(vsock::UDS)).unwrap();
        let device = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut hello = [0; 13];
            stream.read_exact(&mut hello).await.unwrap();
            assert_eq!(&hello, b"CONNECT 5002\n");
            stream.write_all(answer).await.unwrap();
        });
        let dialer = Dialer::open(dir.path(), own_uid()).unwrap();
        let stream = dialer.dial(5002).await;
        device.await.unwrap();
        let mut rest = vec![];
        stream?.read_to_end(&mut rest).await.unwrap();
        Ok(rest)
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_the_guests() {
        assert_eq!(dialled(b"OK 1073741824\nhello\n").await.unwrap(), b"hello\n");
    }

    #[tokio::test]
    async fn what_is_not_the_answer_is_refused() {
        assert!(matches!(dialled(b"").await, Err(DialError::Nobody(5002))));
        assert!(matches!(dialled(b"OK 1").await, Err(DialError::Nobody(5002))));
        for strange in [&b"OK \n"[..], b"OK x\n", b"KO 1\n", b"\n", &[b'1'; 40]] {
            let dialled = dialled(strange).await;
            assert!(matches!(dialled, Err(DialError::Strange)), "{strange:?}: {dialled:?}");
        }
    }

    #[tokio::test]
    async fn a_link_a_file_and_a_stranger_are_not_the_device() {
        let dir = tempfile::tempdir().unwrap();
        let dialer = Dialer::open(dir.path(), own_uid()).unwrap();
        assert!(matches!(dialer.dial(1).await, Err(DialError::Device(_))), "not there yet");
        let at = dir.path().join(vsock::UDS);
        let _elsewhere = UnixListener::bind(dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", &at).unwrap();
        assert!(matches!(dialer.dial(1).await, Err(DialError::NotTheDevice)));
        std::fs::remove_file(&at).unwrap();
        std::fs::write(&at, "x").unwrap();
        assert!(matches!(dialer.dial(1).await, Err(DialError::NotTheDevice)));
        std::fs::remove_file(&at).unwrap();
        let _listener = UnixListener::bind(&at).unwrap();
        let of_another = Dialer::open(dir.path(), own_uid() + 1).unwrap();
        assert!(matches!(of_another.dial(1).await, Err(DialError::NotTheDevice)));
    }

    #[tokio::test]
    async fn a_directory_that_was_replaced_is_not_entered() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("sock");
        std::fs::create_dir(&dir).unwrap();
        let dialer = Dialer::open(&dir, own_uid()).unwrap();
        std::fs::remove_dir(&dir).unwrap();
        std::fs::create_dir(&dir).unwrap();
        let _next = UnixListener::bind(dir.join(vsock::UDS)).unwrap();
        assert!(matches!(dialer.dial(1).await, Err(DialError::Device(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_device_that_does_not_answer_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(dir.path().join(vsock::UDS)).unwrap();
        let dialer = Dialer::open(dir.path(), own_uid()).unwrap();
        assert!(matches!(dialer.dial(1).await, Err(DialError::Deadline)));
    }
}
