//! Where a guest's dials arrive: the Unix socket `v_<port>` in the VM's directory.
//!
//! A guest can dial as often as it likes. The device's own bound on descriptors is a bound on how many
//! connections are open at once ([`super::vsock::MAX_FILES`]); whoever accepts bounds how many it serves.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::{UnixListener, UnixStream};

use crate::session::Connections;

/// Before the next try, when the host has no descriptor left for a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// Bound before the VM starts, so that a guest never finds nobody there.
#[derive(Debug)]
pub struct GuestListener {
    listener: UnixListener,
    uid: u32,
    port: u32,
}

impl GuestListener {
    /// Binds in a directory that only we can write as yet. Only the user `uid` (and root) can connect.
    pub(crate) fn bind(dir: &Path, port: u32, uid: u32) -> io::Result<Self> {
        let path = dir.join(format!("{}_{port}", super::vsock::UDS));
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        if uid != rustix::process::geteuid().as_raw() {
            std::os::unix::fs::lchown(&path, Some(uid), Some(uid))?;
        }
        Ok(Self { listener, uid, port })
    }

    /// Whose connections are taken: the VM's user.
    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// The next connection of the VM's own processes; a stranger's is closed. Cancel-safe.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let (stream, _) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) if passes(&error) => {
                    tracing::warn!(port = self.port, %error, "a connection of a VM has to wait");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == self.uid => return Ok(stream),
                Ok(peer) => {
                    tracing::warn!(
                        port = self.port,
                        uid = peer.uid(),
                        "refused a connection that is not the VM's"
                    );
                }
                Err(error) => {
                    tracing::warn!(port = self.port, %error, "refused a connection of unknown origin");
                }
            }
        }
    }
}

/// Whether the host ran out of something that others will give back. The VM must not suffer for it longer.
fn passes(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
    matches!(
        errno,
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::CONNABORTED)
    )
}

impl Connections for Arc<GuestListener> {
    type Stream = UnixStream;

    async fn accept(&mut self) -> io::Result<UnixStream> {
        GuestListener::accept(self).await
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn only_want_of_resources_passes() {
        for errno in [Errno::MFILE, Errno::NFILE, Errno::CONNABORTED] {
            assert!(passes(&errno.into()), "{errno}");
        }
        for errno in [Errno::BADF, Errno::INVAL, Errno::NOTSOCK] {
            assert!(!passes(&errno.into()), "{errno}");
        }
        assert!(!passes(&io::ErrorKind::Other.into()));
    }

    #[tokio::test]
    async fn only_the_vms_user_is_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let own = rustix::process::geteuid().as_raw();
        let ours = GuestListener::bind(dir.path(), 1, own).unwrap();
        let mut client = UnixStream::connect(dir.path().join("v_1")).await.unwrap();
        let mut accepted = ours.accept().await.unwrap();
        client.write_all(b"x").await.unwrap();
        assert_eq!(accepted.read_u8().await.unwrap(), b'x');

        // Root can connect to any socket; the listener still tells that it is not the VM.
        let theirs = GuestListener::bind(dir.path(), 2, own + 1).unwrap();
        let mut stranger = UnixStream::connect(dir.path().join("v_2")).await.unwrap();
        let mut nothing = [0];
        tokio::select! {
            accepted = theirs.accept() => panic!("a stranger was let in: {accepted:?}"),
            end = stranger.read(&mut nothing) => assert_eq!(end.unwrap(), 0),
        }
        let meta = std::fs::metadata(dir.path().join("v_2")).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&meta), own + 1);
        assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    }
}
