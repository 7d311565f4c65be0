//! How the agent reaches the host: by a port number, over vsock.

use std::future::Future;
use std::io;

use kiln_protocol::port::HOST_CID;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_vsock::{VsockAddr, VsockStream};

/// Dials a port of the host. Tests dial a peer of their own.
pub trait Connector: Send + Sync + 'static {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Dials once. The deadline is the caller's.
    fn connect(&self, port: u32) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

/// The VM's own vsock device.
#[derive(Clone, Copy, Debug)]
pub struct Vsock;

impl Connector for Vsock {
    type Stream = VsockStream;

    async fn connect(&self, port: u32) -> io::Result<VsockStream> {
        VsockStream::connect(VsockAddr::new(HOST_CID, port)).await
    }
}
