//! The egress proxy, spoken to as a step's client would, byte by byte; its upstreams are on this machine's loopback.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use kiln::egress::domains::Domain;
use kiln::egress::policy::Class;
use kiln::egress::{Denied, EgressContext, MAX_CONNECTIONS, Observer, Reach, Resolve, serve};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// Of every connection.
const STEP: Option<u32> = Some(7);

#[derive(Default)]
struct Seen(Mutex<Vec<String>>);

impl Observer for Seen {
    fn reached(&self, step: Option<u32>, host: &str, port: u16) {
        assert_eq!(step, STEP);
        self.0.lock().unwrap().push(format!("reached {host}:{port}"));
    }
    fn refused(&self, step: Option<u32>, host: &str, port: u16, why: Denied) {
        assert_eq!(step, STEP);
        self.0.lock().unwrap().push(format!("refused {host}:{port}: {why}"));
    }
}

impl Seen {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Answers each question for a name with the next of its lists.
#[derive(Default)]
struct Names(Mutex<HashMap<String, Vec<Vec<IpAddr>>>>, Mutex<Vec<String>>);

#[async_trait]
impl Resolve for Names {
    async fn addresses(&self, host: &str) -> io::Result<Vec<IpAddr>> {
        self.1.lock().unwrap().push(host.to_owned());
        let mut names = self.0.lock().unwrap();
        let answers = names.get_mut(host).filter(|answers| !answers.is_empty());
        answers.map(|answers| answers.remove(0)).ok_or_else(|| io::Error::other("no such name"))
    }
}

struct Proxy {
    context: Arc<EgressContext>,
    seen: Arc<Seen>,
    names: Arc<Names>,
    cancel: CancellationToken,
}

impl Proxy {
    fn new(reach: Reach, permitted: &[&str], names: &[(&str, &[&[&str]])]) -> Self {
        let seen = Arc::new(Seen::default());
        let permitted = permitted.iter().map(|range| range.parse().unwrap()).collect();
        let list = |ips: &&[&str]| ips.iter().map(|ip| ip.parse().unwrap()).collect();
        let names = names
            .iter()
            .map(|(name, answers)| ((*name).to_owned(), answers.iter().map(list).collect()));
        let names = Arc::new(Names(Mutex::new(names.collect()), Mutex::default()));
        let context =
            EgressContext::new(reach, permitted, vec![], Arc::clone(&seen) as Arc<dyn Observer>)
                .with_resolver(Arc::clone(&names) as Arc<dyn Resolve>);
        Self { context: Arc::new(context), seen, names, cancel: CancellationToken::new() }
    }

    /// Loopback is permitted, as in most tests.
    fn open() -> Self {
        Self::new(
            Reach::Public,
            &["127.0.0.0/8"],
            &[("site.test", &[&["127.0.0.1"] as &[&str]; 4])],
        )
    }

    fn client(&self) -> BufReader<DuplexStream> {
        let (ours, theirs) = duplex(64 * 1024);
        tokio::spawn(serve(theirs, STEP, Arc::clone(&self.context), self.cancel.clone()));
        BufReader::new(ours)
    }

    async fn ask(&self, request: &str) -> (u16, String) {
        let mut client = self.client();
        client.write_all(request.as_bytes()).await.unwrap();
        answer(&mut client).await
    }
}

async fn head(stream: &mut (impl AsyncBufReadExt + Unpin)) -> String {
    let mut head = String::new();
    while stream.read_line(&mut head).await.unwrap() > 2 {}
    head
}

/// Status and body, by `Content-Length`.
async fn answer(stream: &mut (impl AsyncBufReadExt + Unpin)) -> (u16, String) {
    let head = head(stream).await;
    let status =
        head.split(' ').nth(1).unwrap_or_else(|| panic!("no status in {head:?}")).parse().unwrap();
    let length = head
        .to_lowercase()
        .lines()
        .find_map(|l| l.strip_prefix("content-length: ").map(|n| n.parse().unwrap()));
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).await.unwrap();
    (status, String::from_utf8(body).unwrap())
}

/// A web server that answers every request with `reply` and gives back the heads that it saw.
async fn site(reply: &'static str) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            let tell = tell.clone();
            tokio::spawn(async move {
                let _ = tell.send(head(&mut stream).await);
                stream.write_all(reply.as_bytes()).await.unwrap();
                // Until the proxy is done.
                let _ = stream.read_to_end(&mut vec![]).await;
            });
        }
    });
    (port, told)
}

/// Says back what it is told, and half-closes when the other does.
async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    port
}

#[tokio::test]
async fn a_tunnel_carries_bytes_both_ways_and_half_closes() {
    let (proxy, port) = (Proxy::open(), echo().await);
    let mut client = proxy.client();
    client
        .write_all(format!("CONNECT site.test:{port} HTTP/1.1\r\nHost: x\r\n\r\nearly ").as_bytes())
        .await
        .unwrap();
    assert!(head(&mut client).await.starts_with("HTTP/1.1 200 "));
    let data = vec![b'd'; 300_000];
    let (mut read, mut write) = tokio::io::split(client);
    let sent = data.clone();
    let sender = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
        write
    });
    let mut got = vec![];
    read.read_to_end(&mut got).await.unwrap();
    assert_eq!(&got[..6], b"early ");
    assert!(got[6..] == data[..]);
    sender.await.unwrap();
    assert_eq!(proxy.seen.take(), [format!("reached site.test:{port}")]);
}

#[tokio::test]
async fn plain_http_is_forwarded_without_what_is_between_client_and_proxy() {
    let (port, mut heads) = site("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: x\r\nX-Kept: 1\r\n\r\nhi").await;
    let proxy = Proxy::open();
    let mut client = proxy.client();
    for _ in 0..2 {
        let request = format!(
            "GET http://Site.Test:{port}/a?b=c HTTP/1.1\r\nHost: elsewhere.test\r\nProxy-Authorization: Basic eDp5\r\n\
             Proxy-Connection: keep-alive\r\nConnection: x-mine, host, keep-alive\r\nX-Mine: 1\r\nX-Other: 2\r\nTE: trailers\r\n\
             Upgrade: h2c\r\nAccept: */*\r\n\r\n"
        );
        client.write_all(request.as_bytes()).await.unwrap();
        let answer_head = head(&mut client).await.to_lowercase();
        assert!(
            answer_head.starts_with("http/1.1 200") && answer_head.contains("x-kept: 1"),
            "{answer_head}"
        );
        assert!(
            !answer_head.contains("keep-alive") && !answer_head.contains("proxy-"),
            "{answer_head}"
        );
        let mut body = [0; 2];
        client.read_exact(&mut body).await.unwrap();
        assert_eq!(&body, b"hi");

        let seen = heads.recv().await.unwrap().to_lowercase();
        let mut lines: Vec<_> = seen.trim_end().lines().collect();
        assert_eq!(lines.remove(0), "get /a?b=c http/1.1");
        lines.sort_unstable();
        assert_eq!(lines, ["accept: */*", &format!("host: site.test:{port}"), "x-other: 2"]);
    }
    assert_eq!(proxy.seen.take().len(), 2, "the client's connection was kept");
}

#[tokio::test]
async fn bodies_stream_in_both_directions() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let proxy = Proxy::open();
    let mut client = proxy.client();
    let request = format!(
        "POST http://site.test:{port}/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
    );
    client.write_all(request.as_bytes()).await.unwrap();
    let mut upstream = BufReader::new(listener.accept().await.unwrap().0);
    let seen = head(&mut upstream).await.to_lowercase();
    assert!(seen.contains("transfer-encoding: chunked"), "{seen}");
    let mut first = [0; 6];
    upstream.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"1\r\na\r\n", "the first chunk is there before the last is sent");
    upstream
        .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        .await
        .unwrap();
    assert!(head(&mut client).await.starts_with("HTTP/1.1 200"));
    let mut chunk = [0; 8];
    client.read_exact(&mut chunk).await.unwrap();
    assert_eq!(&chunk, b"3\r\none\r\n", "the first part is there before the last is sent");
    client.write_all(b"0\r\n\r\n").await.unwrap();
    upstream.write_all(b"0\r\n\r\n").await.unwrap();
    let mut end = [0; 5];
    client.read_exact(&mut end).await.unwrap();
    assert_eq!(&end, b"0\r\n\r\n");
}

#[tokio::test]
async fn what_is_not_public_is_refused_with_a_reason() {
    let names: &[(&str, &[&[&str]])] = &[
        ("site.test", &[&["127.0.0.1"]]),
        ("mixed.test", &[&["93.184.216.34", "10.0.0.1"]]),
        ("meta.test", &[&["169.254.169.254"]]),
        ("2130706433", &[&["127.0.0.1"]]),
    ];
    let proxy = Proxy::new(Reach::Public, &[], names);
    for (host, reason) in [
        ("site.test", "site.test (127.0.0.1) is a loopback address, which builds may not reach"),
        ("mixed.test", "mixed.test (10.0.0.1) is a private address, which builds may not reach"),
        (
            "meta.test",
            "meta.test (169.254.169.254) is a link-local address, which builds may not reach",
        ),
        ("2130706433", "2130706433 (127.0.0.1) is a loopback address, which builds may not reach"),
        ("127.0.0.1", "127.0.0.1 is a loopback address, which builds may not reach"),
        (
            "[::ffff:127.0.0.1]",
            "::ffff:127.0.0.1 is a loopback address, which builds may not reach",
        ),
        ("[fd00::1]", "fd00::1 is a private address, which builds may not reach"),
    ] {
        let (status, body) =
            proxy.ask(&format!("CONNECT {host}:443 HTTP/1.1\r\nHost: x\r\n\r\n")).await;
        assert_eq!((status, body.as_str()), (403, format!("kiln egress: {reason}\n").as_str()));
        let bare = host.trim_matches(['[', ']']);
        let class = reason.split(" is ").nth(1).unwrap();
        assert_eq!(proxy.seen.take(), [format!("refused {bare}:443: it is {class}")]);
    }
    let (status, _) = proxy.ask("GET http://10.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(status, 403);
}

#[tokio::test]
async fn without_a_network_everything_is_refused() {
    let proxy = Proxy::new(Reach::Nothing, &["127.0.0.0/8"], &[("site.test", &[&["127.0.0.1"]])]);
    for request in [
        "CONNECT site.test:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n",
    ] {
        assert_eq!(
            proxy.ask(request).await,
            (403, "kiln egress: this build has no network\n".to_owned())
        );
    }
    assert_eq!(proxy.seen.take().len(), 2);
}

#[tokio::test]
async fn a_name_that_changes_its_mind_does_not_move_a_connection() {
    let port = echo().await;
    // Judged good, then private: had the name been asked again for the connection, it would have gone there.
    let names: &[(&str, &[&[&str]])] = &[("rebind.test", &[&["127.0.0.1"], &["10.0.0.1"]])];
    let proxy = Proxy::new(Reach::Public, &["127.0.0.0/8"], names);
    let request = format!("CONNECT rebind.test:{port} HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut client = proxy.client();
    client.write_all(request.as_bytes()).await.unwrap();
    assert!(head(&mut client).await.starts_with("HTTP/1.1 200"));
    assert_eq!(proxy.ask(&request).await.0, 403, "the next request is judged anew");
}

#[tokio::test]
async fn a_redirect_is_the_clients_own_next_request_and_judged_as_one() {
    let (port, _heads) = site("HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest/\r\nContent-Length: 0\r\n\r\n").await;
    let proxy = Proxy::open();
    let mut client = proxy.client();
    client
        .write_all(format!("GET http://site.test:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let redirect = head(&mut client).await.to_lowercase();
    assert!(
        redirect.starts_with("http/1.1 302")
            && redirect.contains("location: http://169.254.169.254/latest/")
    );
    client
        .write_all(b"GET http://169.254.169.254/latest/ HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(answer(&mut client).await.0, 403);
}

#[tokio::test]
async fn what_is_not_for_a_proxy_is_told_so() {
    let proxy = Proxy::open();
    for request in [
        "GET / HTTP/1.1\r\nHost: site.test\r\n\r\n",
        "GET https://site.test/ HTTP/1.1\r\nHost: x\r\n\r\n",
        "CONNECT site.test HTTP/1.1\r\nHost: x\r\n\r\n",
        "CONNECT site.test:0 HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://u:p@site.test/ HTTP/1.1\r\nHost: x\r\n\r\n",
    ] {
        assert_eq!(proxy.ask(request).await.0, 400, "{request:?}");
    }
    assert_eq!(proxy.ask("CONNECT nowhere.test:443 HTTP/1.1\r\nHost: x\r\n\r\n").await.0, 502);
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let (status, body) =
        proxy.ask(&format!("CONNECT 127.0.0.1:{closed} HTTP/1.1\r\nHost: x\r\n\r\n")).await;
    assert_eq!(status, 502, "{body}");
    assert!(proxy.seen.take().is_empty());
}

#[tokio::test]
async fn a_head_has_a_bound() {
    let (port, _heads) = site("HTTP/1.1 204 No Content\r\n\r\n").await;
    let proxy = Proxy::open();
    let request = |pad: usize| {
        format!(
            "GET http://site.test:{port}/ HTTP/1.1\r\nHost: x\r\nX-Pad: {}\r\n\r\n",
            "p".repeat(pad)
        )
    };
    assert_eq!(proxy.ask(&request(12 * 1024)).await.0, 204);
    assert_eq!(proxy.ask(&request(40 * 1024)).await.0, 431);
}

#[tokio::test]
async fn connections_above_the_bound_wait_for_a_place() {
    let (proxy, port) = (Proxy::open(), echo().await);
    let request = format!("CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut open = vec![];
    for _ in 0..MAX_CONNECTIONS {
        let mut client = proxy.client();
        client.write_all(request.as_bytes()).await.unwrap();
        assert!(head(&mut client).await.starts_with("HTTP/1.1 200"));
        open.push(client);
    }
    let mut waiting = proxy.client();
    waiting.write_all(request.as_bytes()).await.unwrap();
    // An exchange on another connection takes longer than an answer would; there is none.
    open[0].write_all(b"x").await.unwrap();
    assert_eq!(open[0].read_u8().await.unwrap(), b'x');
    assert_eq!(proxy.seen.take().len(), MAX_CONNECTIONS);
    drop(open.pop());
    assert!(head(&mut waiting).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_cancelled_proxy_closes_what_it_has_open() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let proxy = Proxy::open();
    let (mut tunnel, mut exchange) = (proxy.client(), proxy.client());
    tunnel
        .write_all(format!("CONNECT site.test:{port} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut one: TcpStream = listener.accept().await.unwrap().0;
    assert!(head(&mut tunnel).await.starts_with("HTTP/1.1 200"));
    exchange
        .write_all(format!("GET http://site.test:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut other = BufReader::new(listener.accept().await.unwrap().0);
    head(&mut other).await;
    proxy.cancel.cancel();
    let mut rest = vec![];
    assert_eq!(tunnel.read_to_end(&mut rest).await.unwrap(), 0);
    assert_eq!(exchange.read_to_end(&mut rest).await.unwrap(), 0);
    assert_eq!(one.read_to_end(&mut rest).await.unwrap(), 0);
    assert_eq!(other.read_to_end(&mut rest).await.unwrap(), 0);
}

#[tokio::test]
async fn an_idle_tunnel_is_closed() {
    let (proxy, port) = (Proxy::open(), echo().await);
    let mut client = proxy.client();
    client
        .write_all(format!("CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())
        .await
        .unwrap();
    assert!(head(&mut client).await.starts_with("HTTP/1.1 200"));
    // Time goes on by itself while everybody waits.
    tokio::time::pause();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
}

fn listed(entries: &[&str]) -> Reach {
    Reach::Listed(entries.iter().map(|entry| Domain::parse(entry).unwrap()).collect())
}

#[tokio::test]
async fn a_list_is_asked_before_any_name_server() {
    let names: &[(&str, &[&[&str]])] = &[
        ("site.test", &[&["127.0.0.1"] as &[&str]; 4]),
        ("a.below.test", &[&["127.0.0.1"]]),
        ("below.test", &[&["127.0.0.1"]]),
        ("secret-data.evil.test", &[&["127.0.0.1"]]),
        ("127.0.0.1", &[&["127.0.0.1"]]),
    ];
    let port = echo().await;
    let entries =
        [format!("site.test:{port}"), format!("*.below.test:{port}"), "plain.test".to_owned()];
    let entries: Vec<_> = entries.iter().map(String::as_str).collect();
    let proxy = Proxy::new(listed(&entries), &["127.0.0.0/8"], names);
    for host in ["site.test", "Site.Test.", "a.below.test"] {
        let mut client = proxy.client();
        let request = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: x\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let head = head(&mut client).await;
        // The resolver of this test knows no name with a dot at its end.
        let expected = if host.ends_with('.') { "HTTP/1.1 502 " } else { "HTTP/1.1 200 " };
        assert!(head.starts_with(expected), "{host}: {head}");
    }
    let asked = std::mem::take(&mut *proxy.names.1.lock().unwrap());
    assert_eq!(asked, ["site.test", "site.test.", "a.below.test"]);
    proxy.seen.take();

    for (host, port) in [
        ("secret-data.evil.test", port),
        ("below.test", port),
        ("site.test", port ^ 1),
        ("site.test", 443),
        ("site.test.evil.test", port),
        ("127.0.0.1", port),
        ("[::1]", port),
        ("plain.test", 8443),
    ] {
        let (status, body) =
            proxy.ask(&format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: x\r\n\r\n")).await;
        let bare = host.trim_matches(['[', ']']);
        let said = format!("{bare}:{port} is not on this build's list of allowed domains");
        assert_eq!((status, body), (403, format!("kiln egress: {said}\n")));
        let why = Denied::NotListed;
        assert_eq!(proxy.seen.take(), [format!("refused {bare}:{port}: {why}")]);
    }
    let (status, _) =
        proxy.ask("GET http://secret-data.evil.test/ HTTP/1.1\r\nHost: site.test\r\n\r\n").await;
    assert_eq!(status, 403, "a header does not say whom a request is for");
    assert!(proxy.names.1.lock().unwrap().is_empty(), "what is refused is not resolved");
}

#[tokio::test]
async fn a_listed_name_does_not_make_an_address_public() {
    let names: &[(&str, &[&[&str]])] = &[("site.test", &[&["10.0.0.1"]])];
    let proxy = Proxy::new(listed(&["site.test"]), &[], names);
    let (status, _) = proxy.ask("CONNECT site.test:443 HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(status, 403);
    let why = Denied::Address(Class::Private);
    assert_eq!(proxy.seen.take(), [format!("refused site.test:443: {why}")]);
}

#[tokio::test]
async fn an_empty_list_reaches_nothing() {
    let proxy = Proxy::new(listed(&[]), &["127.0.0.0/8"], &[("site.test", &[&["127.0.0.1"]])]);
    assert_eq!(proxy.ask("CONNECT site.test:443 HTTP/1.1\r\nHost: x\r\n\r\n").await.0, 403);
    assert!(proxy.names.1.lock().unwrap().is_empty());
}
