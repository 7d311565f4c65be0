//! Connections of clients, plain or TLS: so many at one time, each with so long for the head of a request.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt::set_tcp_user_timeout;
use rustix::process::{Resource, getrlimit};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::tls::Tls;

/// Connections at one time; more wait in the kernel. Some hundred people and programs follow builds with
/// one each, and idle ones cost about 20 KiB. Never more than half of the descriptors that the process
/// may have: VMs need the others.
const MAX_CONNECTIONS: usize = 4096;
/// A client sends the head of its request within this, the first and each after it, or is closed: before
/// its token is read, nobody is trusted with a connection for longer.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);
/// What was sent is taken within this, or the kernel closes the connection: a client that asks and does
/// not read would keep its place for ever. One that follows a log can come back and go on.
const UNREAD: Duration = Duration::from_mins(2);

/// The bounds of connections.
pub struct Connections {
    most: usize,
    head: Duration,
    unread: Duration,
    tls: Option<Tls>,
}

impl Default for Connections {
    fn default() -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let half = usize::try_from(files / 2).unwrap_or(usize::MAX);
        Self { most: MAX_CONNECTIONS.min(half), head: HEAD_DEADLINE, unread: UNREAD, tls: None }
    }
}

impl Connections {
    /// The same, in TLS where it is given.
    #[must_use]
    pub fn over(self, tls: Option<Tls>) -> Self {
        Self { tls, ..self }
    }

    /// Serves until it is told to hang up, and then what requests are still open.
    pub async fn serve(
        self,
        mut listener: TcpListener,
        router: Router,
        hang_up: CancellationToken,
    ) {
        let places = Arc::new(Semaphore::new(self.most));
        let open = TaskTracker::new();
        let mut full = false;
        let accepting = async {
            loop {
                let none_left = places.available_permits() == 0;
                if none_left && !full {
                    tracing::warn!(most = self.most, "as many connections as may be; more wait");
                }
                full = none_left;
                let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                let (stream, _) = Listener::accept(&mut listener).await;
                let unread = u32::try_from(self.unread.as_millis()).unwrap_or(u32::MAX);
                if let Err(error) = set_tcp_user_timeout(&stream, unread) {
                    tracing::debug!(%error, "a client may leave its answers unread for long");
                }
                // Each its own: it is looked at, under a lock, whenever its connection is woken.
                let hang_up = hang_up.child_token();
                let (router, head) = (router.clone(), self.head);
                let tls = self.tls.clone();
                open.spawn(async move {
                    match tls {
                        None => converse(stream, router, head, hang_up).await,
                        // Apart: the others' tasks are not to have its size.
                        Some(tls) => {
                            Box::pin(async move {
                                let accepted = tls.accept(stream);
                                match hang_up.run_until_cancelled(accepted).await {
                                    Some(Ok(stream)) => {
                                        converse(stream, router, head, hang_up).await;
                                    }
                                    Some(Err(error)) => {
                                        tracing::debug!(%error, "a client's TLS handshake failed");
                                    }
                                    None => {}
                                }
                            })
                            .await;
                        }
                    }
                    drop(place);
                });
            }
        };
        tokio::select! {
            () = accepting => {}
            () = hang_up.cancelled() => {}
        }
        // Nobody is let in any more while the last are served.
        drop(listener);
        open.close();
        open.wait().await;
    }
}

async fn converse<S>(stream: S, router: Router, head: Duration, hang_up: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(head);
    let connection = http
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = hang_up.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a client's connection broke");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;

    use super::*;

    const LONG: Duration = Duration::from_hours(1);
    const SHORT: Duration = Duration::from_millis(50);
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";

    struct Serving {
        address: std::net::SocketAddr,
        hang_up: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Serving {
        async fn start(most: usize, head: Duration) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let router = Router::new()
                .route("/", get(|| async { "hello" }))
                .route("/much", get(|| async { vec![b'x'; 64 << 20] }));
            let hang_up = CancellationToken::new();
            let connections = Connections { most, head, unread: SHORT, tls: None };
            let task = connections.serve(listener, router, hang_up.clone());
            Self { address, hang_up, task: tokio::spawn(task) }
        }

        async fn send(&self, bytes: &[u8]) -> TcpStream {
            let mut client = TcpStream::connect(self.address).await.unwrap();
            client.write_all(bytes).await.unwrap();
            client
        }
    }

    async fn answer(client: &mut TcpStream) -> String {
        let mut text = String::new();
        while !text.ends_with("hello") {
            let mut part = [0; 512];
            let read = client.read(&mut part).await.unwrap();
            assert!(read > 0, "closed after {text:?}");
            text += std::str::from_utf8(&part[..read]).unwrap();
        }
        text
    }

    /// Everything up to the end of the connection, which is a reset where the server had closed before
    /// the client's last words.
    async fn rest(client: &mut TcpStream) -> Vec<u8> {
        let mut bytes = vec![];
        if let Err(error) = client.read_to_end(&mut bytes).await {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        bytes
    }

    #[tokio::test]
    async fn half_a_head_is_not_waited_for() {
        let serving = Serving::start(8, SHORT).await;
        for begun in [&b""[..], b"GET / HTTP/1.1\r\nHost: h\r\nX-Slow:"] {
            let mut client = serving.send(begun).await;
            assert!(!rest(&mut client).await.windows(3).any(|w| w == b"200"));
        }
        // The same holds for the next request of a connection. A busy machine needs its time for the first.
        let serving = Serving::start(8, Duration::from_secs(2)).await;
        let mut client = serving.send(REQUEST).await;
        assert!(answer(&mut client).await.starts_with("HTTP/1.1 200 OK\r\n"));
        client.write_all(b"GET /").await.unwrap();
        rest(&mut client).await;
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_gives_up_its_place() {
        let serving = Serving::start(1, LONG).await;
        let deaf = serving.send(b"GET /much HTTP/1.1\r\nHost: h\r\n\r\n").await;
        let mut next = serving.send(REQUEST).await;
        answer(&mut next).await;
        drop(deaf);
    }

    #[tokio::test]
    async fn one_connection_more_than_may_be_waits_for_another_to_end() {
        let serving = Serving::start(2, LONG).await;
        let mut first = serving.send(REQUEST).await;
        let mut second = serving.send(REQUEST).await;
        answer(&mut first).await;
        answer(&mut second).await;
        let mut third = serving.send(REQUEST).await;
        let early = tokio::time::timeout(Duration::from_millis(100), answer(&mut third)).await;
        assert!(early.is_err(), "it was served beside two others");
        drop(first);
        answer(&mut third).await;
    }

    /// The deadlines are of HTTP's heads; a session may be quiet for as long as it likes.
    #[tokio::test]
    async fn a_connection_that_changed_its_protocol_may_be_quiet() {
        use axum::extract::ws::WebSocketUpgrade;
        use futures_util::{SinkExt, StreamExt};
        use tokio_tungstenite::tungstenite::Message;

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let echo = |upgrade: WebSocketUpgrade| async {
            upgrade.on_upgrade(|mut socket| async move {
                while let Some(Ok(message)) = socket.recv().await {
                    let _ = socket.send(message).await;
                }
            })
        };
        let router = Router::new().route("/", get(echo));
        let connections = Connections { most: 1, head: SHORT, unread: SHORT, tls: None };
        let task = tokio::spawn(connections.serve(listener, router, CancellationToken::new()));
        let url = format!("ws://{address}/");
        let (mut socket, _) = tokio_tungstenite::connect_async(url).await.unwrap();
        // Time itself is what is tested here.
        tokio::time::sleep(SHORT * 10).await;
        socket.send(Message::text("still there")).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("still there"));
        task.abort();
    }

    #[tokio::test]
    async fn hanging_up_ends_idle_connections_and_the_server() {
        let serving = Serving::start(2, LONG).await;
        let mut idle = serving.send(REQUEST).await;
        answer(&mut idle).await;
        serving.hang_up.cancel();
        assert!(rest(&mut idle).await.is_empty());
        serving.task.await.unwrap();
        assert!(TcpStream::connect(serving.address).await.is_err());
    }
}
