//! The guest's half of `scripts/bench.d/vsock.sh`: an init that sends to [`bench_host`](bench_host.rs) and ends.
//!
//! It has the agent's own parts between a step's pipe and the host: `lines`, `events` and `link`. Its loop has the
//! order of the agent's session: what the host waits for goes out before log lines.
//!
//! A session's kind is the image's name in its Hello; the kernel gives `kiln_pairs=N` of its command line as a variable.
#![allow(dead_code, reason = "not every part of the agent's files is used here")]

use std::io::Write as _;
use std::sync::Arc;

use anyhow::Context;
use kiln_protocol::event::{Event, Log, LogStream, NumberedEvent, Outcome};
use kiln_protocol::frame;
use kiln_protocol::message::{AgentToHost, HostToAgent};
use kiln_protocol::port::HOST_CID;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::time::{Duration, sleep};
use tokio_vsock::{VsockAddr, VsockStream};

#[path = "../src/events.rs"]
mod events;
#[path = "../src/init/heap.rs"]
mod heap;
#[path = "../src/runtime/lines.rs"]
mod lines;
#[path = "../src/session/link.rs"]
mod link;
#[path = "../src/init/modules.rs"]
mod modules;
#[path = "../src/vsock.rs"]
mod vsock;

use events::{Outbox, Report, Reporter, WAITING_REPORTS};
use link::{Identity, Moved, OUT_BATCH, dial};

/// Where streams without a session arrive: a bare one in the agent's largest writes, one in writes of a
/// frame's size, and one of frames.
const BARE_PORT: u32 = 6001;
const SMALL_PORT: u32 = 6002;
const CODEC_PORT: u32 = 6003;
/// Of a stream, bare or framed: a second or more under emulation.
const STREAM_BYTES: usize = 32 * 1024 * 1024;
/// The longest content of a frame that a step's output makes.
const CONTENT: usize = kiln_protocol::event::MAX_LOG_BYTES;
/// A time of the guest's.
const AT_MS: u64 = 1_764_000_000_000;
/// What a compiler prints, more or less.
const LINE: &str =
    "   Compiling something-of-some-length v0.12.3 (/src/crates/something) [1234/5678]";

fn main() -> anyhow::Result<()> {
    heap::keep();
    let pairs: usize = std::env::var("kiln_pairs").context("kiln_pairs=N is missing")?.parse()?;
    let modules::Modules { drivers, file_systems: _ } = modules::open()?;
    modules::load(drivers)?;
    // As the agent has it.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let done = runtime.block_on(async {
        for pair in 0..pairs {
            for kind in order(pair) {
                match kind {
                    "bare" => bare(BARE_PORT, OUT_BATCH).await.context("the bare stream")?,
                    "small" => bare(SMALL_PORT, CONTENT).await.context("the bare stream")?,
                    "codec" => codec().await.context("the stream of frames")?,
                    kind => session(kind).await.with_context(|| format!("the session {kind}"))?,
                }
            }
        }
        anyhow::Ok(())
    });
    runtime.shutdown_background();
    done
}

/// Each of a pair goes first in turn.
fn order(pair: usize) -> [&'static str; 7] {
    if pair.is_multiple_of(2) {
        ["bare", "small", "codec", "framed", "lines", "idle", "flood"]
    } else {
        ["framed", "codec", "small", "bare", "lines", "flood", "idle"]
    }
}

/// Bytes and nothing else.
async fn bare(port: u32, size: usize) -> anyhow::Result<()> {
    let mut stream = connect(port).await;
    let chunk = vec![b'x'; size];
    for _ in 0..STREAM_BYTES / size {
        AsyncWriteExt::write_all(&mut stream, &chunk).await?;
    }
    closed(stream).await
}

/// Frames by the codec, with nothing of a session.
async fn codec() -> anyhow::Result<()> {
    let mut stream = connect(CODEC_PORT).await;
    for seq in 1..=(STREAM_BYTES / CONTENT) as u64 {
        let event = NumberedEvent { seq, at_ms: AT_MS, event: content() };
        frame::write(&mut stream, &AgentToHost::Event(event)).await?;
    }
    closed(stream).await
}

/// Dials until somebody answers: a device that has just come up loses or refuses a dial.
async fn connect(port: u32) -> VsockStream {
    loop {
        let dialled = VsockStream::connect(VsockAddr::new(HOST_CID, port));
        match tokio::time::timeout(Duration::from_millis(500), dialled).await {
            Ok(Ok(stream)) => return stream,
            Ok(Err(_)) | Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

/// The host closes once it has everything.
async fn closed(mut stream: VsockStream) -> anyhow::Result<()> {
    tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    Ok(())
}

/// A session as the agent has one. Streams end by themselves, the others by Finish.
async fn session(kind: &str) -> anyhow::Result<()> {
    let identity = Identity { agent: "bench".to_owned(), image: kind.to_owned() };
    let (mut link, _welcome) = dial(Arc::new(vsock::Vsock), identity, None).await?;
    let (reporter, mut reports) = events::channel();
    let mut producing = match kind {
        "framed" => Some(tokio::spawn(contents(reporter))),
        "lines" => Some(tokio::spawn(printed(reporter, Some(STREAM_BYTES / 4)))),
        "flood" => Some(tokio::spawn(printed(reporter, None))),
        _ => None,
    };
    let mut outbox = Outbox::new();
    let (mut taken, mut taken_sent) = (0, 0);
    let (mut ended, mut outcome_sent) = (false, false);
    loop {
        while link.has_room() {
            if taken > taken_sent {
                taken_sent = taken;
                link.send(&AgentToHost::SourceTaken { total: taken })?;
            } else if let Some(frame) = outbox.next_frame() {
                link.send_frame(frame);
            } else if ended && !outcome_sent {
                outcome_sent = true;
                link.send(&AgentToHost::Outcome(Outcome::Cancelled))?;
            } else {
                break;
            }
        }
        let has_room = outbox.has_room();
        tokio::select! {
            biased;
            moved = link.moved() => match moved? {
                Moved::Frame(HostToAgent::Source(bytes)) => taken += bytes.len() as u64,
                Moved::Frame(HostToAgent::Acknowledge { seq }) => outbox.acknowledge(seq)?,
                Moved::Frame(HostToAgent::Finish) => break,
                Moved::Frame(_) | Moved::Wrote => {}
            },
            report = reports.recv(), if has_room && producing.is_some() && !ended => {
                let mut next = report;
                ended = next.is_none();
                for _ in 0..WAITING_REPORTS {
                    let Some(Report::Event(event)) = next else { break };
                    outbox.push(AT_MS, event)?;
                    next = if outbox.has_room() { reports.try_recv().ok() } else { None };
                }
            }
        }
    }
    drop(reports);
    if let Some(producing) = producing.take() {
        producing.abort();
    }
    Ok(())
}

/// Contents as long as they may be: a stream of frames.
async fn contents(reporter: Reporter) {
    for _ in 0..STREAM_BYTES / CONTENT {
        reporter.report(Report::Event(content())).await;
    }
}

fn content() -> Event {
    let content = vec![b'x'; CONTENT];
    Event::Log(Log { stream: LogStream::Stdout, step: Some(1), partial: true, content })
}

/// Lines through a pipe, as a step prints them: so many bytes, or until nobody reads.
async fn printed(reporter: Reporter, bytes: Option<usize>) {
    let Ok((sender, receiver)) = pipe::pipe() else { return };
    let Ok(fd) = sender.into_blocking_fd() else { return };
    let program = std::thread::spawn(move || {
        let mut file = std::fs::File::from(fd);
        let chunk = format!("{LINE}\n").repeat(4096 / (LINE.len() + 1));
        let mut left = bytes.unwrap_or(usize::MAX);
        while left > 0 && file.write_all(chunk.as_bytes()).is_ok() {
            left = left.saturating_sub(chunk.len());
        }
    });
    lines::report_lines(receiver, LogStream::Stdout, Some(1), &reporter, |_| {}).await;
    drop(program);
}
