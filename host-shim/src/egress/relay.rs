//! Bytes both ways, half-closes honoured, and a watch on whether any of them move.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::Instant;

/// Of each direction.
const BUFFER: usize = 16 * 1024;

/// Copies both ways until both have ended, or one has failed.
pub(super) async fn relay(
    client: impl AsyncRead + AsyncWrite,
    upstream: impl AsyncRead + AsyncWrite,
) {
    let (from_client, to_client) = tokio::io::split(client);
    let (from_upstream, to_upstream) = tokio::io::split(upstream);
    // A failure of one direction ends the other: nobody is there for it.
    if let Err(error) =
        tokio::try_join!(pump(from_client, to_upstream), pump(from_upstream, to_client))
    {
        tracing::debug!(%error, "an egress tunnel broke");
    }
}

async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await? {
            0 => return to.shutdown().await,
            n => to.write_all(&buffer[..n]).await?,
        }
    }
}

/// When something last moved.
#[derive(Clone, Debug)]
pub(super) struct Activity(Arc<Mutex<Instant>>);

impl Activity {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    pub(super) fn touch(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Resolves when nothing has moved for that long.
    pub(super) async fn idle_for(&self, most: Duration) {
        loop {
            let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner) + most;
            if Instant::now() >= until {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

/// A stream whose bytes count as activity.
pub(super) struct Watched<S> {
    inner: S,
    activity: Activity,
}

impl<S> Watched<S> {
    pub(super) fn new(inner: S, activity: Activity) -> Self {
        Self { inner, activity }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.inner).poll_read(cx, buf);
        if done.is_ready() {
            self.activity.touch();
        }
        done
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.inner).poll_write(cx, buf);
        if done.is_ready() {
            self.activity.touch();
        }
        done
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_mins(5);
    const ALMOST: Duration = Duration::from_secs(299);

    #[tokio::test(start_paused = true)]
    async fn what_moves_is_not_idle() {
        let (mut far, near) = tokio::io::duplex(64);
        let activity = Activity::new();
        let mut near = Watched::new(near, activity.clone());
        let began = Instant::now();
        let busy = async {
            for _ in 0..3 {
                tokio::time::sleep(ALMOST).await;
                far.write_all(b"x").await.unwrap();
                assert_eq!(near.read_u8().await.unwrap(), b'x');
                tokio::time::sleep(ALMOST).await;
                near.write_all(b"y").await.unwrap();
                assert_eq!(far.read_u8().await.unwrap(), b'y');
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = activity.idle_for(MOST) => {}
            () = busy => unreachable!(),
        }
        assert_eq!(began.elapsed(), 6 * ALMOST + MOST);
    }
}
