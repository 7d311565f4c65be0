//! A client that costs next to nothing: bytes that were made before, over a connection that stays.

use std::net::SocketAddr;

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A connection.
pub struct Connection {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Connection {
    pub async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, read: Vec::with_capacity(256 * 1024) })
    }

    /// The status and the body of the answer to a request.
    pub async fn ask(&mut self, request: &[u8]) -> anyhow::Result<(u16, &[u8])> {
        self.stream.write_all(request).await?;
        self.read.clear();
        let (head, length) = loop {
            if self.stream.read_buf(&mut self.read).await? == 0 {
                bail!("the server closed the connection");
            }
            if let Some(at) = find(&self.read, b"\r\n\r\n") {
                break (at, length_of(&self.read[..at])?);
            }
        };
        let body = head + 4;
        while self.read.len() < body + length {
            if self.stream.read_buf(&mut self.read).await? == 0 {
                bail!("the server closed the connection");
            }
        }
        let status = self.read.get(9..12).context("no status")?;
        Ok((std::str::from_utf8(status)?.parse()?, &self.read[body..]))
    }
}

/// Where bytes are.
pub fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

fn length_of(head: &[u8]) -> anyhow::Result<usize> {
    let head = std::str::from_utf8(head)?;
    let values = head.lines().filter_map(|line| line.split_once(": "));
    let mut lengths = values.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    Ok(lengths.next().context("an answer without a length")?.1.parse()?)
}

/// A request for a path.
pub fn get(path: &str, token: &str, more: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: kiln\r\nAuthorization: Bearer {token}\r\n{more}\r\n")
        .into_bytes()
}

const BOUNDARY: &str = "----------------------------kiln";

/// A request for a build of this source.
pub fn submit(token: &str, key: &str, source: &[u8]) -> Vec<u8> {
    let mut body = format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"dockerfile\"\r\n\r\nFROM scratch\nCOPY . /\n\r\n\
         --{BOUNDARY}\r\nContent-Disposition: form-data; name=\"source\"; filename=\"source.tar.gz\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n"
    )
    .into_bytes();
    body.extend_from_slice(source);
    body.extend_from_slice(format!("\r\n--{BOUNDARY}--\r\n").as_bytes());
    let mut request = format!(
        "POST /builds HTTP/1.1\r\nHost: kiln\r\nAuthorization: Bearer {token}\r\nIdempotency-Key: {key}\r\n\
         Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    request.append(&mut body);
    request
}

/// The source of a request that [`submit`] made.
pub fn source_of(body: &[u8]) -> Option<&[u8]> {
    let part = &body[find(body, b"name=\"source\"")?..];
    let content = &part[find(part, b"\r\n\r\n")? + 4..];
    content.strip_suffix(format!("\r\n--{BOUNDARY}--\r\n").as_bytes())
}

/// Bytes that begin as gzip does.
pub fn source(length: usize) -> Vec<u8> {
    let mut bytes = vec![0x1f, 0x8b];
    bytes.resize(length.max(2), 7);
    bytes
}
