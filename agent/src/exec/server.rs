//! Takes the host's dials on port 5002.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::hello::TOKEN_LEN;
use kiln_protocol::port;
use kiln_protocol::preamble::{self, Channel, Preamble};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use super::launch::Places;
use super::session;
use super::target::Enterable;
use crate::accept;

/// Most sessions at one time.
const MAX_SESSIONS: usize = 128;

/// The host sends a preamble at once.
const PREAMBLE_WAIT: Duration = Duration::from_secs(10);

/// Listens for the host.
pub fn listen() -> io::Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port::EXEC))
}

/// What sessions are served with.
#[derive(Debug)]
pub struct Server {
    nonce: [u8; TOKEN_LEN],
    places: Places,
    enterable: Enterable,
}

impl Server {
    /// For the host that knows the nonce.
    pub fn new(nonce: [u8; TOKEN_LEN], enterable: Enterable) -> Self {
        Self { nonce, places: Places::default(), enterable }
    }

    /// Serves sessions until it is cancelled.
    pub async fn serve(self, listener: VsockListener, cancel: CancellationToken) {
        let server = Arc::new(self);
        let task = |(stream, from): (VsockStream, VsockAddr)| {
            let server = Arc::clone(&server);
            async move {
                if from.cid() == port::HOST_CID {
                    server.session(stream).await;
                } else {
                    tracing::warn!(cid = from.cid(), "only the host may enter");
                }
            }
        };
        accept::serve("the port for sessions", listener, MAX_SESSIONS, task, cancel).await;
    }

    async fn session<S: AsyncRead + AsyncWrite + Send + Unpin>(&self, mut stream: S) {
        match timeout(PREAMBLE_WAIT, self.admitted(&mut stream)).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) | Err(_) => {
                return tracing::warn!("a session that did not show the nonce");
            }
            Ok(Err(error)) => return tracing::debug!(%error, "a session that did not begin"),
        }
        if let Err(error) = session::serve(stream, &self.places, &self.enterable).await {
            tracing::info!(%error, "a session was cut off");
        }
    }

    async fn admitted<S: AsyncRead + Unpin>(&self, stream: &mut S) -> io::Result<bool> {
        let mut bytes = [0; preamble::LEN];
        stream.read_exact(&mut bytes).await?;
        Ok(Preamble::decode(&bytes).is_ok_and(|preamble| {
            preamble.channel == Channel::Exec && same(&preamble.nonce, &self.nonce)
        }))
    }
}

/// Compares in a time that does not tell where they differ.
fn same(a: &[u8; TOKEN_LEN], b: &[u8; TOKEN_LEN]) -> bool {
    a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}
