//! From a TCP port on a loopback of the VM to a port of the host: 5000 to the registry, 3128 of
//! the steps' namespace to the egress proxy.
//!
//! Each connection gets a vsock connection of its own, which begins with the preamble that shows
//! the VM's nonce. A program in the VM cannot leave the preamble out or write one itself: it has
//! no AF_VSOCK.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::preamble::{Channel, Preamble};
use tokio::io::{AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::accept;
use crate::runtime::CurrentStep;
use crate::vsock::Connector;

/// Most connections at one time.
pub const MAX_CONNECTIONS: usize = 128;

/// Bytes copied at once, per direction. Half a virtio-vsock packet; with every connection in use
/// it is 8 MiB.
const COPY_BYTES: usize = 32 * 1024;

/// How long the host may take to accept a connection. It listens since before the VM started.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// A tunnel to one port of the host.
#[derive(Debug)]
pub struct Tunnel<C> {
    /// Dials the host.
    pub connector: Arc<C>,
    /// The port of the host.
    pub port: u32,
    /// What the host is to expect, and the proof that this VM asks.
    pub preamble: Preamble,
    /// Whose connections these are, where it is steps'.
    pub step: CurrentStep,
    /// Most connections at one time, usually [`MAX_CONNECTIONS`].
    pub connections: usize,
}

impl<C: Connector> Tunnel<C> {
    /// A tunnel to `port` for `channel`, with the usual bound.
    pub fn new(connector: Arc<C>, port: u32, channel: Channel, nonce: [u8; 32]) -> Self {
        let preamble = Preamble::new(channel, nonce);
        let step = CurrentStep::default();
        Self { connector, port, preamble, step, connections: MAX_CONNECTIONS }
    }

    /// The same, whose preambles name the step that connects.
    #[must_use]
    pub fn of_steps(self, step: CurrentStep) -> Self {
        Self { step, ..self }
    }

    /// Accepts connections until it is cancelled, which also ends those that are open.
    pub async fn serve(self, listener: TcpListener, cancel: CancellationToken) {
        let _open_ones_end = cancel.clone().drop_guard();
        let tunnel = Arc::new(self);
        let task = |client| {
            let (tunnel, cancel) = (Arc::clone(&tunnel), cancel.clone());
            async move {
                tokio::select! {
                    // How a connection ends is its two ends' business; both have seen it.
                    _ = tunnel.join(client) => {}
                    () = cancel.cancelled() => {}
                }
            }
        };
        let whose = format!("the tunnel to port {}", tunnel.port);
        accept::serve(&whose, listener, tunnel.connections, task, cancel.clone()).await;
    }

    async fn join(&self, mut client: TcpStream) -> io::Result<()> {
        // Before anything is waited for: it runs now.
        let preamble = self.preamble.of_step(self.step.now());
        client.set_nodelay(true)?;
        let dial = async {
            let mut host = self.connector.connect(self.port).await?;
            host.write_all(&preamble.encode()).await?;
            Ok::<_, io::Error>(host)
        };
        let mut host = match timeout(DIAL_TIMEOUT, dial).await {
            Ok(Ok(host)) => host,
            Ok(Err(error)) => {
                tracing::warn!(port = self.port, %error, "the host does not take a connection");
                return Err(error);
            }
            Err(late) => {
                tracing::warn!(port = self.port, "the host took too long to take a connection");
                return Err(late.into());
            }
        };
        copy_bidirectional_with_sizes(&mut client, &mut host, COPY_BYTES, COPY_BYTES).await?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::preamble;
    use tokio::io::{AsyncReadExt, DuplexStream};
    use tokio::sync::mpsc;

    use super::*;

    /// Hands the other end of each connection to the test.
    struct ToTest(mpsc::UnboundedSender<(u32, DuplexStream)>);

    impl Connector for ToTest {
        type Stream = DuplexStream;
        async fn connect(&self, port: u32) -> io::Result<DuplexStream> {
            let (near, far) = tokio::io::duplex(1024);
            self.0.send((port, far)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
            Ok(near)
        }
    }

    struct Fixture {
        address: std::net::SocketAddr,
        dialed: mpsc::UnboundedReceiver<(u32, DuplexStream)>,
        cancel: CancellationToken,
        serving: tokio::task::JoinHandle<()>,
    }

    async fn serve(connections: usize) -> Fixture {
        let (to_test, dialed) = mpsc::unbounded_channel();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cancel = CancellationToken::new();
        let mut tunnel = Tunnel::new(Arc::new(ToTest(to_test)), 5003, Channel::Registry, [9; 32]);
        tunnel.connections = connections;
        let serving = tokio::spawn(tunnel.serve(listener, cancel.clone()));
        Fixture { address, dialed, cancel, serving }
    }

    async fn read_preamble(host: &mut DuplexStream) -> Preamble {
        let mut bytes = [0; preamble::LEN];
        host.read_exact(&mut bytes).await.unwrap();
        Preamble::decode(&bytes).unwrap()
    }

    #[tokio::test]
    async fn a_connection_shows_the_nonce_and_then_carries_bytes_and_half_closes() {
        let mut fixture = serve(MAX_CONNECTIONS).await;
        let mut client = TcpStream::connect(fixture.address).await.unwrap();
        let (port, mut host) = fixture.dialed.recv().await.unwrap();
        assert_eq!(port, 5003);
        let expected = Preamble::new(Channel::Registry, [9; 32]);
        assert_eq!(read_preamble(&mut host).await, expected);

        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = Vec::new();
        host.read_to_end(&mut question).await.unwrap();
        assert_eq!(question, b"question");

        host.write_all(b"answer after the client's end").await.unwrap();
        host.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer after the client's end");
    }

    #[tokio::test]
    async fn connections_over_the_bound_wait_for_a_place() {
        let mut fixture = serve(1).await;
        let first = TcpStream::connect(fixture.address).await.unwrap();
        let (_, first_host) = fixture.dialed.recv().await.unwrap();
        let mut second = TcpStream::connect(fixture.address).await.unwrap();
        second.write_all(b"early").await.unwrap();
        assert!(fixture.dialed.try_recv().is_err());

        drop((first, first_host));
        let (_, mut second_host) = fixture.dialed.recv().await.unwrap();
        read_preamble(&mut second_host).await;
        let mut early = [0; 5];
        second_host.read_exact(&mut early).await.unwrap();
        assert_eq!(&early, b"early");
    }

    #[tokio::test]
    async fn cancellation_ends_the_tunnel_and_its_connections() {
        let mut fixture = serve(MAX_CONNECTIONS).await;
        let mut client = TcpStream::connect(fixture.address).await.unwrap();
        let (_, mut host) = fixture.dialed.recv().await.unwrap();
        read_preamble(&mut host).await;
        fixture.cancel.cancel();
        fixture.serving.await.unwrap();
        assert_eq!(host.read(&mut [0; 1]).await.unwrap(), 0);
        assert!(matches!(client.read(&mut [0; 1]).await, Ok(0) | Err(_)));
        assert!(TcpStream::connect(fixture.address).await.is_err());
    }

    #[tokio::test]
    async fn a_host_that_does_not_answer_costs_one_connection() {
        let mut fixture = serve(1).await;
        drop(std::mem::replace(&mut fixture.dialed, mpsc::unbounded_channel().1));
        for _ in 0..3 {
            let mut client = TcpStream::connect(fixture.address).await.unwrap();
            assert!(matches!(client.read(&mut [0; 1]).await, Ok(0) | Err(_)));
        }
    }
}
