//! The VM's registry and egress connections on their way in: a preamble with the VM's nonce, then
//! whatever the channel speaks.
//!
//! The socket says which VM it is; the nonce says that it is the agent and not a process that only
//! reached the socket.

use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::hello::TOKEN_LEN;
use kiln_protocol::preamble::{self, Channel, Preamble};
use subtle::ConstantTimeEq;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::session::Connections;

/// How long a connection may take to show its preamble.
const PREAMBLE_DEADLINE: Duration = Duration::from_secs(10);

/// Most connections of one channel of one VM at one time. buildah pulls and pushes with six at
/// once; package managers open a few dozen. More wait in the socket's backlog.
pub const MAX_CONNECTIONS: usize = 128;

/// Accepts connections of one channel until `cancel`, and gives each to `serve`, with its preamble, in a task of its
/// own. Returns when all of them have ended.
pub async fn accept<C, F, Serving>(
    mut connections: C,
    channel: Channel,
    nonce: [u8; TOKEN_LEN],
    cancel: CancellationToken,
    serve: F,
) where
    C: Connections,
    F: Fn(C::Stream, Preamble) -> Serving + Send + Sync + 'static,
    Serving: Future<Output = ()> + Send + 'static,
{
    let serve = Arc::new(serve);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = cancel.cancelled() => break,
            accepted = async {
                let permit = Arc::clone(&room).acquire_owned().await;
                (permit, connections.accept().await)
            } => accepted,
        };
        let (Ok(permit), Ok(mut stream)) = accepted else {
            tracing::warn!(?channel, "the VM's socket does not accept any more");
            break;
        };
        let (serve, cancel) = (Arc::clone(&serve), cancel.clone());
        tasks.spawn(async move {
            let served = async {
                match read_preamble(&mut stream, channel, &nonce).await {
                    Ok(preamble) => serve(stream, preamble).await,
                    Err(why) => tracing::warn!(?channel, why, "refused a connection of the VM"),
                }
            };
            // Dropping the future closes the connection: a VM that is gone keeps nothing.
            cancel.run_until_cancelled(served).await;
            drop(permit);
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn read_preamble(
    stream: &mut (impl AsyncRead + Unpin),
    channel: Channel,
    nonce: &[u8; TOKEN_LEN],
) -> Result<Preamble, &'static str> {
    let mut bytes = [0; preamble::LEN];
    match tokio::time::timeout(PREAMBLE_DEADLINE, stream.read_exact(&mut bytes)).await {
        Err(_) => return Err("no preamble in time"),
        Ok(Err(_)) => return Err("it ended inside the preamble"),
        Ok(Ok(_)) => {}
    }
    let shown = Preamble::decode(&bytes).map_err(|_| "not a preamble")?;
    if shown.channel != channel {
        return Err("the preamble of another channel");
    }
    if bool::from(shown.nonce.ct_eq(nonce)) { Ok(shown) } else { Err("not this VM's nonce") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncWriteExt, DuplexStream};
    use tokio::sync::mpsc;

    use super::*;

    const NONCE: [u8; TOKEN_LEN] = [3; TOKEN_LEN];

    struct Dialled(mpsc::Receiver<DuplexStream>);

    impl Connections for Dialled {
        type Stream = DuplexStream;
        async fn accept(&mut self) -> std::io::Result<DuplexStream> {
            self.0.recv().await.ok_or_else(|| std::io::ErrorKind::BrokenPipe.into())
        }
    }

    /// Sends `first` as the first bytes of a connection and returns what comes back.
    async fn answer_to(first: &[u8]) -> Vec<u8> {
        let (dial, dialled) = mpsc::channel(1);
        let cancel = CancellationToken::new();
        let tunnel = tokio::spawn(accept(
            Dialled(dialled),
            Channel::Egress,
            NONCE,
            cancel.clone(),
            |mut stream: DuplexStream, shown: Preamble| async move {
                let served = format!("served {}", shown.step.map_or(0, std::num::NonZeroU16::get));
                stream.write_all(served.as_bytes()).await.unwrap();
            },
        ));
        let (mut guest, host) = tokio::io::duplex(1024);
        dial.send(host).await.unwrap();
        guest.write_all(first).await.unwrap();
        guest.shutdown().await.unwrap();
        let mut answer = Vec::new();
        guest.read_to_end(&mut answer).await.unwrap();
        cancel.cancel();
        tunnel.await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_nonce_opens_its_own_channel_only() {
        let egress = Preamble::new(Channel::Egress, NONCE).encode();
        let registry = Preamble::new(Channel::Registry, NONCE).encode();
        let stranger = Preamble::new(Channel::Egress, [4; TOKEN_LEN]).encode();
        let of_step = Preamble::new(Channel::Egress, NONCE).of_step(Some(7)).encode();
        assert_eq!(answer_to(&egress).await, b"served 0");
        assert_eq!(answer_to(&of_step).await, b"served 7");
        assert_eq!(answer_to(&registry).await, b"");
        assert_eq!(answer_to(&stranger).await, b"");
        assert_eq!(answer_to(&egress[..preamble::LEN - 1]).await, b"");
        assert_eq!(answer_to(b"GET / HTTP/1.1\r\n\r\n").await, b"");
    }

    #[tokio::test]
    async fn a_cancelled_tunnel_closes_what_it_serves() {
        let (dial, dialled) = mpsc::channel(1);
        let cancel = CancellationToken::new();
        let tunnel = tokio::spawn(accept(
            Dialled(dialled),
            Channel::Registry,
            NONCE,
            cancel.clone(),
            |mut stream: DuplexStream, _| async move {
                stream.write_all(b"!").await.unwrap();
                std::future::pending::<()>().await;
            },
        ));
        let (mut guest, host) = tokio::io::duplex(1024);
        dial.send(host).await.unwrap();
        let preamble = Preamble::new(Channel::Registry, NONCE);
        guest.write_all(&preamble.encode()).await.unwrap();
        assert_eq!(guest.read_u8().await.unwrap(), b'!');
        cancel.cancel();
        tunnel.await.unwrap();
        assert!(guest.read_u8().await.is_err());
    }
}
