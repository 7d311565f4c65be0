//! How the agent reaches the host: by a port number, over vsock.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use kiln_protocol::port::HOST_CID;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
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
    type Stream = Line;

    async fn connect(&self, port: u32) -> io::Result<Line> {
        VsockStream::connect(VsockAddr::new(HOST_CID, port)).await.map(Line)
    }
}

/// A connection that writes several slices at once, which its stream does not.
#[derive(Debug)]
pub struct Line(VsockStream);

impl AsyncRead for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Line {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let nothing = &mut SendAncillaryBuffer::default();
        match sendmsg(&self.0, slices, nothing, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            // The stream waits for its room, and may find that it has come.
            Err(Errno::AGAIN | Errno::INTR) => {
                let first = slices.iter().find(|slice| !slice.is_empty());
                Pin::new(&mut self.0).poll_write(context, first.map_or(&[], |first| first))
            }
            sent => Poll::Ready(Ok(sent?)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
