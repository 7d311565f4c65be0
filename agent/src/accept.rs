//! A listener's connections: each is a task of its own, and there are no more than so many at one time.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_vsock::{VsockAddr, VsockListener, VsockStream};

/// A pause after `accept` failed for want of memory or descriptors, which it does again at once
/// until a connection ends.
const PAUSE: Duration = Duration::from_millis(100);

/// What connections come from.
pub trait Listen {
    /// A connection, and what is known of its other end.
    type Connection;

    /// The next.
    fn accept(&self) -> impl Future<Output = io::Result<Self::Connection>> + Send;
}

impl Listen for TcpListener {
    type Connection = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Listen for VsockListener {
    type Connection = (VsockStream, VsockAddr);

    async fn accept(&self) -> io::Result<Self::Connection> {
        self.accept().await
    }
}

/// Serves connections until it is cancelled; those that it has go on. Beyond `most` they wait in the listener's backlog
/// and are not refused: who opens many gets slower, not broken. `whose` is for the log.
pub async fn serve<L, T>(
    whose: &str,
    listener: L,
    most: usize,
    task: impl Fn(L::Connection) -> T,
    cancel: CancellationToken,
) where
    L: Listen,
    T: Future<Output = ()> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(most));
    loop {
        let next = async {
            // The semaphore is never closed, so that this waits for a place and no more.
            let place = Arc::clone(&room).acquire_owned().await.ok();
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            () = cancel.cancelled() => return,
        };
        match accepted {
            Ok(connection) => {
                let work = task(connection);
                tokio::spawn(async move {
                    work.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "{whose} cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::mpsc;

    use super::*;

    /// Fails, then gives one connection.
    #[derive(Default)]
    struct FailsOnce(AtomicUsize);

    impl Listen for FailsOnce {
        type Connection = &'static str;

        async fn accept(&self) -> io::Result<&'static str> {
            match self.0.fetch_add(1, Ordering::Relaxed) {
                0 => Err(io::ErrorKind::OutOfMemory.into()),
                1 => Ok("connection"),
                _ => std::future::pending().await,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_listener_that_fails_is_asked_again_and_not_at_once() {
        let (served, mut seen) = mpsc::unbounded_channel();
        let task = |connection| {
            let served = served.clone();
            async move { served.send(connection).unwrap() }
        };
        let begun = tokio::time::Instant::now();
        let serving = serve("a test", FailsOnce::default(), 2, task, CancellationToken::new());
        tokio::select! {
            () = serving => panic!("it goes on"),
            connection = seen.recv() => assert_eq!(connection, Some("connection")),
        }
        assert!(begun.elapsed() >= PAUSE);
    }
}
