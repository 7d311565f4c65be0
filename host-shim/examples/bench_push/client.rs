//! A client of HTTP/1.1 that costs next to nothing.

use std::io::{Read, Write};

use anyhow::{Context, ensure};

/// What skopeo, podman and buildah put into a chunk of a blob.
const CHUNK: usize = 32 * 1024;

/// A connection that stays.
pub struct Connection {
    stream: Box<dyn Stream>,
    bearer: Option<String>,
}

pub trait Stream: Read + Write + Send {}
impl<S: Read + Write + Send> Stream for S {}

/// An answer, but for its body where that is nothing.
pub struct Answer {
    pub status: u16,
    head: String,
    pub body: Vec<u8>,
}

impl Connection {
    pub fn new(stream: Box<dyn Stream>, bearer: Option<&str>) -> Self {
        Self { stream, bearer: bearer.map(ToOwned::to_owned) }
    }

    /// A request without a body.
    pub fn ask(&mut self, method: &str, path: &str, headers: &str) -> anyhow::Result<Answer> {
        let length = if method == "HEAD" || method == "GET" { "" } else { "Content-Length: 0\r\n" };
        self.head(method, path, &format!("{headers}{length}"))?;
        self.answer(method)
    }

    /// A request whose body is sent as a whole.
    pub fn send(
        &mut self,
        method: &str,
        path: &str,
        kind: &str,
        body: &[u8],
    ) -> anyhow::Result<Answer> {
        let headers = format!("Content-Type: {kind}\r\nContent-Length: {}\r\n", body.len());
        self.head(method, path, &headers)?;
        self.stream.write_all(body)?;
        self.answer(method)
    }

    /// A request whose body is sent in chunks, as clients send blobs.
    pub fn stream(&mut self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Answer> {
        let headers = "Content-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n";
        self.head(method, path, headers)?;
        let mut framed = Vec::with_capacity(CHUNK + 16);
        for chunk in body.chunks(CHUNK) {
            framed.clear();
            write!(framed, "{:x}\r\n", chunk.len())?;
            framed.extend_from_slice(chunk);
            framed.extend_from_slice(b"\r\n");
            self.stream.write_all(&framed)?;
        }
        self.stream.write_all(b"0\r\n\r\n")?;
        self.answer(method)
    }

    fn head(&mut self, method: &str, path: &str, headers: &str) -> anyhow::Result<()> {
        let bearer = self.bearer.as_ref().map(|token| format!("Authorization: Bearer {token}\r\n"));
        let bearer = bearer.unwrap_or_default();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: registry\r\n{bearer}{headers}\r\n");
        Ok(self.stream.write_all(head.as_bytes())?)
    }

    fn answer(&mut self, method: &str) -> anyhow::Result<Answer> {
        let mut read = vec![];
        let body = loop {
            self.more(&mut read)?;
            if let Some(at) = read.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
        };
        let head = String::from_utf8(read[..body].to_vec())?;
        let status = head.get(9..12).context("no status")?.parse()?;
        let mut answer = Answer { status, head, body: vec![] };
        if method != "HEAD" && status != 204 {
            let length: usize = answer.header("content-length").context("no length")?.parse()?;
            while read.len() < body + length {
                self.more(&mut read)?;
            }
            answer.body = read.split_off(body);
        }
        Ok(answer)
    }

    fn more(&mut self, read: &mut Vec<u8>) -> anyhow::Result<()> {
        let mut part = [0; 16 * 1024];
        let n = self.stream.read(&mut part)?;
        ensure!(n > 0, "the connection was closed");
        read.extend_from_slice(&part[..n]);
        Ok(())
    }
}

impl Answer {
    /// The one header of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let headers = self.head.lines().filter_map(|line| line.split_once(": "));
        headers.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value).next()
    }

    /// An error unless it has this status.
    pub fn expect(self, status: u16) -> anyhow::Result<Self> {
        ensure!(self.status == status, "{}: {}", self.head, String::from_utf8_lossy(&self.body));
        Ok(self)
    }
}
