//! The host's half of `scripts/bench.d/vsock.sh`: `bench_host UDS PAIRS`.
//!
//! Prints a line for every pair: MB/s of a bare stream in writes of 64 KiB and of 16 KiB, of frames by the codec, of
//! the same frames through the agent's parts, of lines; then the round trip of a control message in microseconds:
//! idle p50, p99, in a flood p50, p99.
//!
//! A round trip is Source → `SourceTaken`, on the control connection: what the host sends is taken by the agent's session
//! and answered. Events are acknowledged when and as often as the host does it, but as if storing them took no time, which
//! makes for the hardest flood.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kiln_protocol::event::{Event, NumberedEvent};
use kiln_protocol::frame::{self, FrameError, FrameReader};
use kiln_protocol::hello::{Hello, HelloReply, TOKEN_LEN, Welcome};
use kiln_protocol::message::{ACKNOWLEDGE_EVENTS, ACKNOWLEDGE_WAIT, AgentToHost, HostToAgent};
use kiln_protocol::port;
use kiln_protocol::version::{Features, SUPPORTED};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep_until, timeout};

/// As in the guest.
const BARE_PORT: u32 = 6001;
const SMALL_PORT: u32 = 6002;
const CODEC_PORT: u32 = 6003;
const STREAM_BYTES: usize = 32 * 1024 * 1024;
const KINDS: [&str; 7] = ["bare", "small", "codec", "framed", "lines", "idle", "flood"];
/// So that the 99th percentile is not the worst of them.
const ROUND_TRIPS: usize = 400;
/// Between an answer and the next question.
const PAUSE: Duration = Duration::from_millis(2);
/// Events after which a flood is one.
const FLOODED: u64 = 5000;
/// Events that the host takes at once, as it does.
const BATCH: u64 = 256;
/// For everything together; a VM without KVM may need a minute a pair.
const PATIENCE: Duration = Duration::from_secs(90);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let uds = args.next().context("usage: bench_host UDS PAIRS")?;
    let pairs: u32 = args.next().context("usage: bench_host UDS PAIRS")?.parse()?;
    let control = UnixListener::bind(format!("{uds}_{}", port::CONTROL))?;
    let bare = UnixListener::bind(format!("{uds}_{BARE_PORT}"))?;
    let small = UnixListener::bind(format!("{uds}_{SMALL_PORT}"))?;
    let codec = UnixListener::bind(format!("{uds}_{CODEC_PORT}"))?;
    let listeners = Listeners { control, bare, small, codec };
    timeout(PATIENCE * (pairs + 1), serve(&listeners, pairs)).await.context("it is late")?
}

struct Listeners {
    control: UnixListener,
    bare: UnixListener,
    small: UnixListener,
    codec: UnixListener,
}

async fn serve(listeners: &Listeners, pairs: u32) -> anyhow::Result<()> {
    for _ in 0..pairs {
        let mut measured: HashMap<String, Vec<f64>> = HashMap::new();
        while measured.len() < KINDS.len() {
            let one = tokio::select! {
                accepted = listeners.bare.accept() => received(accepted?.0, "bare").await,
                accepted = listeners.small.accept() => received(accepted?.0, "small").await,
                accepted = listeners.codec.accept() => frames(accepted?.0).await,
                accepted = listeners.control.accept() => session(accepted?.0).await,
            };
            if let Some((kind, numbers)) = one? {
                eprintln!("{kind}: {numbers:.1?}");
                measured.insert(kind, numbers);
            }
        }
        let mut line = String::new();
        for kind in KINDS {
            for number in measured.get(kind).with_context(|| format!("no {kind} in this pair"))? {
                line.push_str(&format!("{number:.1} "));
            }
        }
        println!("{}", line.trim_end());
    }
    Ok(())
}

/// A kind and its numbers.
type Measured = Option<(String, Vec<f64>)>;

/// Megabytes a second, from the first bytes to the last.
#[allow(clippy::cast_precision_loss, reason = "the numbers are small")]
fn rate(bytes: usize, begun: Instant) -> f64 {
    bytes as f64 / 1e6 / begun.elapsed().as_secs_f64()
}

/// The bare stream; nothing for a dial that came to nothing.
async fn received(mut stream: UnixStream, kind: &str) -> anyhow::Result<Measured> {
    let mut buffer = vec![0; 64 * 1024];
    let first = stream.read(&mut buffer).await?;
    if first == 0 {
        return Ok(None);
    }
    let begun = Instant::now();
    let mut bytes = first;
    // The device does not pass on that one side is done.
    while bytes < STREAM_BYTES {
        match stream.read(&mut buffer).await? {
            0 => bail!("the bare stream ended after {bytes} bytes"),
            count => bytes += count,
        }
    }
    Ok(Some((kind.to_owned(), vec![rate(bytes - first, begun)])))
}

/// A stream of frames and nothing else; nothing for a dial that came to nothing.
async fn frames(stream: UnixStream) -> anyhow::Result<Measured> {
    let mut reader = FrameReader::new(stream);
    let (mut begun, mut first, mut bytes) = (None, 0, 0);
    while bytes < STREAM_BYTES {
        let event = match reader.read().await {
            Ok(AgentToHost::Event(NumberedEvent { event: Event::Log(log), .. })) => log,
            Err(FrameError::Closed) if bytes == 0 => return Ok(None),
            other => bail!("the guest sent {other:?}"),
        };
        bytes += event.content.len();
        if begun.is_none() {
            (begun, first) = (Some(Instant::now()), bytes);
        }
    }
    let begun = begun.context("a stream of no frames")?;
    Ok(Some(("codec".to_owned(), vec![rate(bytes - first, begun)])))
}

/// A session; nothing for a dial that came to nothing.
async fn session(stream: UnixStream) -> anyhow::Result<Measured> {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = FrameReader::new(reader);
    let Ok(Hello { image: kind, .. }) = reader.read().await else { return Ok(None) };
    if frame::write(&mut writer, &HelloReply::Welcome(welcome())).await.is_err() {
        return Ok(None);
    }
    let asks = matches!(kind.as_str(), "idle" | "flood");
    let first = if kind == "flood" { FLOODED } else { 0 };
    let (mut sent, mut asked, mut next) = (0, None::<Instant>, Instant::now());
    let mut trips = Vec::new();
    let (mut begun, mut bytes) = (None, 0);
    let (mut seq, mut acknowledged, mut due) = (0, 0, Instant::now());
    while trips.len() < ROUND_TRIPS {
        if seq - acknowledged >= BATCH {
            acknowledged = seq;
            frame::write(&mut writer, &HostToAgent::Acknowledge { seq }).await?;
        }
        tokio::select! {
            biased;
            () = sleep_until(next.into()), if asks && asked.is_none() && seq >= first => {
                sent += 1;
                asked = Some(Instant::now());
                frame::write(&mut writer, &HostToAgent::Source(vec![1])).await?;
            }
            heard = reader.read() => match heard? {
                AgentToHost::SourceTaken { total } if total == sent => {
                    let asked = asked.take().context("an answer to no question")?;
                    trips.push(asked.elapsed().as_secs_f64() * 1e6);
                    next = Instant::now() + PAUSE;
                }
                AgentToHost::Event(NumberedEvent { seq: number, event: Event::Log(log), .. }) => {
                    if seq == acknowledged {
                        due = Instant::now() + ACKNOWLEDGE_WAIT;
                    }
                    seq += 1;
                    anyhow::ensure!(number == seq, "event {number} comes where {seq} should");
                    match begun {
                        // The first is what the time begins with.
                        None => begun = Some(Instant::now()),
                        Some(_) => bytes += log.content.len(),
                    }
                }
                AgentToHost::Outcome(_) => {
                    let speed = rate(bytes, begun.context("a stream of no events")?);
                    finish(&mut writer, reader).await?;
                    return Ok(Some((kind, vec![speed])));
                }
                other => bail!("the guest said {other:?}"),
            },
            // Nothing more has arrived.
            () = std::future::ready(()), if seq - acknowledged >= ACKNOWLEDGE_EVENTS => {
                acknowledged = seq;
                frame::write(&mut writer, &HostToAgent::Acknowledge { seq }).await?;
            }
            () = sleep_until(due.into()), if seq > acknowledged => {
                acknowledged = seq;
                frame::write(&mut writer, &HostToAgent::Acknowledge { seq }).await?;
            }
        }
    }
    finish(&mut writer, reader).await?;
    trips.sort_by(f64::total_cmp);
    Ok(Some((kind, vec![trips[ROUND_TRIPS / 2], trips[ROUND_TRIPS * 99 / 100]])))
}

/// Ends a session and takes what was under way, until the guest closes.
async fn finish<R, W>(writer: &mut W, mut reader: FrameReader<R>) -> anyhow::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    frame::write(writer, &HostToAgent::Finish).await?;
    while reader.read::<AgentToHost>().await.is_ok() {}
    Ok(())
}

fn welcome() -> Welcome {
    let none = [0; TOKEN_LEN];
    Welcome {
        version: SUPPORTED.max,
        features: Features::RESUME,
        resume_token: none,
        nonce: none,
        time_ms: 0,
        entropy: none,
        acknowledged: 0,
    }
}
