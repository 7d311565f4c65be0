//! Followers of one build: what each of them is sent, what that costs the server, and how late it comes.
//!
//! One batch of lines is stored at a time, and the next when every follower has all of the last: so that each follower is written to
//! once for each batch, by Kiln and by the bare loop, which writes what one of Kiln's followers was sent.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::task::LocalSet;

use super::bare;
use super::child::Server;
use super::http::{self, Connection};

const FOLLOWERS: usize = 1000;
const BATCHES: u64 = 100;
/// Of a batch: as many as an agent sends before it wants to hear that they are stored.
const LINES: u64 = 16;
const WIDTH: usize = 80;
/// What the build has printed before: one that stalls has it before it, which no socket's buffers hold.
const BEFORE: u64 = 512;
const WIDTH_BEFORE: usize = 16 * 1024;
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of a run.
#[derive(Default)]
struct Run {
    cpu_ms: u64,
    kib_each: f64,
    p99_us: u128,
    /// What the first follower was sent: up to the first batch, for each batch, and at the end.
    pieces: Vec<Vec<u8>>,
}

/// Who is watched.
#[derive(Clone, Copy, PartialEq)]
enum Who {
    Kiln,
    KilnWithOneStalled,
    Bare,
}

/// A line for every pair.
pub async fn measure(pairs: usize, dir: &Path) -> anyhow::Result<()> {
    // What the bare loop writes is known then, and the machine warm.
    bare::write_pieces(dir, &run(Who::Kiln, dir).await?.pieces)?;
    for pair in 0..pairs {
        let mut runs =
            [Who::Kiln, Who::Bare, Who::KilnWithOneStalled].map(|who| (who, Run::default()));
        runs.rotate_left(pair % 3);
        for (who, measured) in &mut runs {
            *measured = run(*who, dir).await?;
        }
        let of = |wanted| runs.iter().find(|(who, _)| *who == wanted).map(|(_, run)| run);
        let kiln = of(Who::Kiln).context("no run")?;
        let stalled = of(Who::KilnWithOneStalled).context("no run")?;
        let bare = of(Who::Bare).context("no run")?;
        println!(
            "{} {} {:.1} {} {} {}",
            kiln.cpu_ms, bare.cpu_ms, kiln.kib_each, kiln.p99_us, stalled.p99_us, bare.p99_us
        );
    }
    Ok(())
}

async fn run(who: Who, dir: &Path) -> anyhow::Result<Run> {
    LocalSet::new().run_until(followed(who, dir)).await
}

async fn followed(who: Who, dir: &Path) -> anyhow::Result<Run> {
    let (mut server, data, build) = if who == Who::Bare {
        let build = Build { last: 1 + BEFORE, ..Build::default() };
        (Server::start("bare-followers", FOLLOWERS, dir).await?, None, build)
    } else {
        let data = dir.join("followed");
        std::fs::create_dir(&data)?;
        let mut server = Server::start("serve", 0, &data).await?;
        let build = Build::submit(&mut server).await?;
        (server, Some(data), build)
    };
    let stalled = if who == Who::KilnWithOneStalled {
        Some(stall(server.address, &build).await?)
    } else {
        None
    };
    let before = server.resident_kib()?;
    let seen = Rc::new(Seen::default());
    let mut tasks = vec![];
    for n in 0..FOLLOWERS {
        let stream = TcpStream::connect(server.address).await?;
        let follower = Follower::new(build.last, Rc::clone(&seen), n == 0);
        let request = build.follow(&build.last.to_string());
        tasks.push(tokio::task::spawn_local(follower.follow(stream, request)));
    }
    seen.all(|seen| seen.begun.get()).await?;
    let cpu = server.cpu_ms()?;
    for batch in 1..=BATCHES {
        seen.expect(build.last + batch * LINES);
        let append = format!("append {} {LINES} {WIDTH}", build.id);
        server.order(if who == Who::Bare { "next" } else { &append }).await?;
        seen.all(|seen| seen.reached.get()).await?;
    }
    let resident = server.resident_kib()?;
    let end = format!("end {}", build.id);
    server.order(if who == Who::Bare { "next" } else { &end }).await?;
    let mut pieces = vec![];
    for task in tasks {
        let sent =
            tokio::time::timeout(PATIENCE, task).await.context("the end did not come")???;
        pieces = if pieces.is_empty() { sent } else { pieces };
    }
    let cpu_ms = server.cpu_ms()? - cpu;
    drop(stalled);
    server.stop().await?;
    if let Some(data) = data {
        std::fs::remove_dir_all(data)?;
    }
    let late = &mut *seen.late_us.borrow_mut();
    late.sort_unstable();
    let at = |part: usize| late[(late.len() - 1) * part / 100];
    let kib_each = (resident.saturating_sub(before)) as f64 / FOLLOWERS as f64;
    let name = match who {
        Who::Kiln => "kiln",
        Who::KilnWithOneStalled => "kiln, one stalled",
        Who::Bare => "bare",
    };
    eprintln!(
        "{name}: CPU {cpu_ms} ms, {kib_each:.1} KiB each, p50 {} µs, p99 {} µs",
        at(50),
        at(99)
    );
    Ok(Run { cpu_ms, kib_each, p99_us: at(99), pieces })
}

/// The build that is followed.
#[derive(Default)]
struct Build {
    id: String,
    token: String,
    /// The number of its last event when followers come.
    last: u64,
}

impl Build {
    async fn submit(server: &mut Server) -> anyhow::Result<Self> {
        let token = server.ask("token bench").await?;
        let mut connection = Connection::open(server.address).await?;
        let request = http::submit(&token, "followed", &http::source(1000));
        let (status, body) = connection.ask(&request).await?;
        ensure!(status == 202, "{status}");
        let build: serde_json::Value = serde_json::from_slice(body)?;
        let id = build["id"].as_str().context("no id")?.to_owned();
        for _ in 0..BEFORE / 64 {
            server.order(&format!("append {id} 64 {WIDTH_BEFORE}")).await?;
        }
        // Once this is answered, all before it was done.
        server.ask("token bench").await?;
        Ok(Self { id, token, last: 1 + BEFORE })
    }

    fn follow(&self, last: &str) -> Vec<u8> {
        let path = format!("/builds/{}/events?follow=true", self.id);
        http::get(&path, &self.token, &format!("Last-Event-ID: {last}\r\n"))
    }
}

/// One that asks for everything and reads nothing.
async fn stall(address: SocketAddr, build: &Build) -> anyhow::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    let mut stream = socket.connect(address).await?;
    stream.write_all(&build.follow("0")).await?;
    // It has been answered.
    stream.readable().await?;
    Ok(stream)
}

/// What all followers have seen.
#[derive(Default)]
struct Seen {
    /// Those whose answer has begun.
    begun: Cell<usize>,
    /// The number that is waited for, since when, and how many have it.
    expected: Cell<u64>,
    since: Cell<Option<Instant>>,
    reached: Cell<usize>,
    late_us: RefCell<Vec<u128>>,
    changed: Notify,
    failed: Cell<bool>,
}

impl Seen {
    fn expect(&self, last: u64) {
        self.reached.set(0);
        self.since.set(Some(Instant::now()));
        self.expected.set(last);
    }

    async fn all(&self, count: impl Fn(&Self) -> usize) -> anyhow::Result<()> {
        let counted = async {
            while count(self) < FOLLOWERS && !self.failed.get() {
                self.changed.notified().await;
            }
        };
        tokio::time::timeout(PATIENCE, counted).await.context("not all of them came")?;
        ensure!(!self.failed.get(), "a follower failed");
        Ok(())
    }

    fn count(&self, counter: &Cell<usize>) {
        counter.set(counter.get() + 1);
        if counter.get() == FOLLOWERS {
            self.changed.notify_one();
        }
    }

    fn saw(&self, last: u64) {
        if last == self.expected.get() {
            if let Some(since) = self.since.get() {
                self.late_us.borrow_mut().push(since.elapsed().as_micros());
            }
            self.count(&self.reached);
        }
    }
}

thread_local! {
    /// Bytes are looked at where they are read: a thousand followers need no room of their own.
    static ROOM: RefCell<Vec<u8>> = RefCell::new(vec![0; 256 * 1024]);
}

/// One that reads everything, and checks that it is everything.
struct Follower {
    seen: Rc<Seen>,
    /// The number of the last event that is whole.
    last: u64,
    /// Of the event that is coming.
    coming: Option<u64>,
    /// Of the chunk that is coming: its size's digits, then how much of it is missing.
    size: String,
    missing: usize,
    /// The beginning of the line that is coming.
    line: Vec<u8>,
    ended: bool,
    pieces: Option<Vec<Vec<u8>>>,
}

impl Follower {
    fn new(last: u64, seen: Rc<Seen>, recorded: bool) -> Self {
        Self {
            seen,
            last,
            coming: None,
            size: String::new(),
            missing: 0,
            line: vec![],
            ended: false,
            pieces: recorded.then(|| vec![vec![]]),
        }
    }

    async fn follow(mut self, stream: TcpStream, request: Vec<u8>) -> anyhow::Result<Vec<Vec<u8>>> {
        let read = self.read(stream, request).await;
        if read.is_err() {
            self.seen.failed.set(true);
            self.seen.changed.notify_one();
        }
        read?;
        let mut pieces = self.pieces.unwrap_or_default();
        // Nothing comes after the end.
        pieces.retain(|piece| !piece.is_empty());
        Ok(pieces)
    }

    async fn read(&mut self, mut stream: TcpStream, request: Vec<u8>) -> anyhow::Result<()> {
        stream.write_all(&request).await?;
        let mut head = vec![];
        while http::find(&head, b"\r\n\r\n").is_none() {
            ensure!(stream.read_buf(&mut head).await? > 0, "no answer");
        }
        ensure!(head.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&head));
        let body = http::find(&head, b"\r\n\r\n").unwrap_or_default() + 4;
        if let Some(pieces) = &mut self.pieces {
            pieces[0].extend_from_slice(&head[..body]);
            pieces.push(vec![]);
        }
        self.take(&head[body..])?;
        self.seen.count(&self.seen.begun);
        while !self.ended {
            stream.readable().await?;
            ROOM.with_borrow_mut(|room| match stream.try_read(room) {
                Ok(0) => bail!("the stream broke off after {}", self.last),
                Ok(read) => self.take(&room[..read]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
                Err(error) => Err(error.into()),
            })?;
        }
        ensure!(self.last > self.seen.expected.get(), "it ended after {}", self.last);
        Ok(())
    }

    fn take(&mut self, mut bytes: &[u8]) -> anyhow::Result<()> {
        if let Some(last) = self.pieces.as_mut().and_then(|pieces| pieces.last_mut()) {
            last.extend_from_slice(bytes);
        }
        let before = self.last;
        while let Some(byte) = bytes.first() {
            if self.missing > 0 {
                let (content, rest) = bytes.split_at(self.missing.min(bytes.len()));
                self.missing -= content.len();
                bytes = rest;
                self.lines(content)?;
            } else {
                bytes = &bytes[1..];
                match byte {
                    b'\r' => {}
                    b'\n' if self.size.is_empty() => {}
                    b'\n' => {
                        self.missing = usize::from_str_radix(&self.size, 16)?;
                        self.ended = self.missing == 0;
                        self.size.clear();
                    }
                    digit => self.size.push(char::from(*digit)),
                }
            }
        }
        if self.last == self.seen.expected.get()
            && self.last != before
            && let Some(pieces) = &mut self.pieces
        {
            pieces.push(vec![]);
        }
        Ok(())
    }

    fn lines(&mut self, mut content: &[u8]) -> anyhow::Result<()> {
        while let Some(end) = content.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&content[..end]);
            content = &content[end + 1..];
            if let Some(id) = self.line.strip_prefix(b"id: ") {
                let id: u64 = std::str::from_utf8(id)?.parse()?;
                ensure!(id == self.last + 1, "{id} after {}", self.last);
                self.coming = Some(id);
            } else if self.line.is_empty()
                && let Some(id) = self.coming.take()
            {
                self.last = id;
                self.seen.saw(id);
            }
            self.line.clear();
        }
        self.line.extend_from_slice(content);
        Ok(())
    }
}
