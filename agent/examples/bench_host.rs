//! The host's half of `scripts/bench.d/vsock.sh`: `bench_host UDS PAIRS`.
//!
//! Prints a line for every pair: MB/s of the bare stream, of the framed one and of lines; then the round trip of a
//! control message in microseconds: idle p50, p99, in a flood p50, p99.
//!
//! A round trip is Source → `SourceTaken`, on the control connection: what the host sends is taken by the agent's session
//! and answered. Events are acknowledged as soon as they are decoded, which makes for the hardest flood.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kiln_protocol::event::{Event, NumberedEvent};
use kiln_protocol::frame::{self, FrameReader};
use kiln_protocol::hello::{Hello, HelloReply, TOKEN_LEN, Welcome};
use kiln_protocol::message::{AgentToHost, HostToAgent};
use kiln_protocol::port;
use kiln_protocol::version::{Features, SUPPORTED};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep_until, timeout};

/// As in the guest.
const BARE_PORT: u32 = 6001;
const STREAM_BYTES: usize = 32 * 1024 * 1024;
const KINDS: usize = 5;
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
    timeout(PATIENCE * (pairs + 1), serve(&control, &bare, pairs)).await.context("it is late")?
}

async fn serve(control: &UnixListener, bare: &UnixListener, pairs: u32) -> anyhow::Result<()> {
    for _ in 0..pairs {
        let mut measured: HashMap<String, Vec<f64>> = HashMap::new();
        while measured.len() < KINDS {
            let one = tokio::select! {
                accepted = bare.accept() => received(accepted?.0).await,
                accepted = control.accept() => session(accepted?.0).await,
            };
            if let Some((kind, numbers)) = one? {
                eprintln!("{kind}: {numbers:.1?}");
                measured.insert(kind, numbers);
            }
        }
        let mut line = String::new();
        for kind in ["bare", "framed", "lines", "idle", "flood"] {
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
async fn received(mut stream: UnixStream) -> anyhow::Result<Measured> {
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
    Ok(Some(("bare".to_owned(), vec![rate(bytes - first, begun)])))
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
    let (mut seq, mut acknowledged) = (0, 0);
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
            () = std::future::ready(()), if seq > acknowledged => {
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
