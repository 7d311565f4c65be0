//! postcard's frames against JSON, on the events of a real build: `codec EVENTS PAIRS`.
//!
//! `EVENTS` is the build's event stream, one JSON object a line, as the API gives it. Each pair is one line of
//! output: nanoseconds an event to encode, postcard and JSON; the same to decode; bytes an event on the wire.
//!
//! JSON gets what a JSON protocol would have: the same messages with a line's content as text, not as the list of
//! numbers that the wire types would become.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Context;
use kiln_protocol::event::{
    Event, Log, LogStream, Name, NumberedEvent, Phase, Step, StepEnd, StepState,
};
use kiln_protocol::frame;
use kiln_protocol::message::AgentToHost;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Long enough that a timer's own time is nothing beside it.
const EVENTS_A_ROUND: usize = 200_000;

/// The bytes of a frame's length, which both have.
const PREFIX: usize = 4;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().context("usage: codec EVENTS PAIRS")?;
    let pairs: usize = args.next().context("usage: codec EVENTS PAIRS")?.parse()?;
    let text = std::fs::read_to_string(&path).with_context(|| format!("{path} cannot be read"))?;
    let mut events = Vec::new();
    for line in text.lines() {
        let shown: Value =
            serde_json::from_str(line).with_context(|| format!("no event: {line}"))?;
        if let Some(event) = from_api(&shown) {
            events.push(NumberedEvent { seq: events.len() as u64 + 1, at_ms: at_ms(), event });
        }
    }
    anyhow::ensure!(!events.is_empty(), "{path} has no events");
    let wire: Vec<_> = events.iter().cloned().map(AgentToHost::Event).collect();
    let json: Vec<_> = events.iter().map(JsonMessage::from).collect();
    eprintln!("{} events of a build", events.len());
    for pair in 0..pairs {
        // Whoever comes second finds a warmer processor.
        let (postcard, other) = if pair.is_multiple_of(2) {
            let postcard = measure(&wire, &Postcard)?;
            (postcard, measure(&json, &Json)?)
        } else {
            let other = measure(&json, &Json)?;
            (measure(&wire, &Postcard)?, other)
        };
        println!(
            "{:.0} {:.0} {:.0} {:.0} {:.1} {:.1}",
            postcard.encode_ns,
            other.encode_ns,
            postcard.decode_ns,
            other.decode_ns,
            postcard.bytes,
            other.bytes
        );
    }
    Ok(())
}

/// An event of the agent's from what the API shows of it; `None` for the host's own.
fn from_api(shown: &Value) -> Option<Event> {
    let text = |field: &str| shown[field].as_str().unwrap_or_default();
    let number = |field: &str| shown[field].as_u64();
    Some(match text("type") {
        "log" => Event::Log(Log {
            stream: match text("stream") {
                "stdout" => LogStream::Stdout,
                "stderr" => LogStream::Stderr,
                // Mostly the host's; from the agent they would look the same.
                _ => LogStream::Kiln,
            },
            step: number("step").and_then(|step| u32::try_from(step).ok()),
            partial: shown["partial"].as_bool().unwrap_or_default(),
            content: text("content").as_bytes().to_vec(),
        }),
        "step" => Event::Step(Step {
            index: u32::try_from(number("index")?).ok()?,
            name: text("name").to_owned(),
            state: match shown["exit_code"].as_i64() {
                None => StepState::Started,
                Some(code) => StepState::Ended(StepEnd {
                    exit_code: i32::try_from(code).ok()?,
                    duration_ms: number("duration_ms")?,
                    memory_peak_bytes: 4_321_280,
                    oom_kills: 0,
                }),
            },
        }),
        "status" if text("status") == "building" => Event::Phase(Phase::Building),
        "status" if text("status") == "pushing" => Event::Phase(Phase::Pushing),
        _ => return None,
    })
}

fn at_ms() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

struct Measured {
    encode_ns: f64,
    decode_ns: f64,
    bytes: f64,
}

trait Codec<T> {
    fn encode(&self, value: &T) -> anyhow::Result<Vec<u8>>;
    fn decode(&self, frame: &[u8]) -> anyhow::Result<T>;
}

struct Postcard;

impl Codec<AgentToHost> for Postcard {
    fn encode(&self, value: &AgentToHost) -> anyhow::Result<Vec<u8>> {
        Ok(frame::encode(value)?)
    }

    fn decode(&self, frame: &[u8]) -> anyhow::Result<AgentToHost> {
        Ok(frame::decode(&frame[PREFIX..])?)
    }
}

struct Json;

impl Codec<JsonMessage> for Json {
    fn encode(&self, value: &JsonMessage) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; PREFIX];
        serde_json::to_writer(&mut bytes, value)?;
        let len = u32::try_from(bytes.len() - PREFIX)?;
        bytes[..PREFIX].copy_from_slice(&len.to_be_bytes());
        Ok(bytes)
    }

    fn decode(&self, frame: &[u8]) -> anyhow::Result<JsonMessage> {
        Ok(serde_json::from_slice(&frame[PREFIX..])?)
    }
}

#[allow(clippy::cast_precision_loss, reason = "the numbers are small")]
fn measure<T: PartialEq>(values: &[T], codec: &impl Codec<T>) -> anyhow::Result<Measured> {
    let frames = values.iter().map(|value| codec.encode(value)).collect::<Result<Vec<_>, _>>()?;
    for (value, frame) in values.iter().zip(&frames) {
        anyhow::ensure!(codec.decode(frame)? == *value, "a message changed on its way");
    }
    let rounds = EVENTS_A_ROUND.div_ceil(values.len());
    let count = (rounds * values.len()) as f64;
    let begun = Instant::now();
    for _ in 0..rounds {
        for value in values {
            black_box(codec.encode(black_box(value))?);
        }
    }
    let encode_ns = begun.elapsed().as_nanos() as f64 / count;
    let begun = Instant::now();
    for _ in 0..rounds {
        for frame in &frames {
            black_box(codec.decode(black_box(frame))?);
        }
    }
    let decode_ns = begun.elapsed().as_nanos() as f64 / count;
    let bytes = frames.iter().map(Vec::len).sum::<usize>() as f64 / frames.len() as f64;
    Ok(Measured { encode_ns, decode_ns, bytes })
}

/// What an agent that speaks JSON would send.
#[derive(PartialEq, Serialize, Deserialize)]
enum JsonMessage {
    Event { seq: u64, at_ms: u64, event: JsonEvent },
}

#[derive(PartialEq, Serialize, Deserialize)]
enum JsonEvent {
    Log { stream: LogStream, step: Option<u32>, partial: bool, content: String },
    Step(Step),
    Phase(Phase),
    Name(Name),
}

impl From<&NumberedEvent> for JsonMessage {
    fn from(numbered: &NumberedEvent) -> Self {
        let event = match &numbered.event {
            Event::Log(log) => JsonEvent::Log {
                stream: log.stream,
                step: log.step,
                partial: log.partial,
                content: String::from_utf8_lossy(&log.content).into_owned(),
            },
            Event::Step(step) => JsonEvent::Step(step.clone()),
            Event::Phase(phase) => JsonEvent::Phase(*phase),
            Event::Name(name) => JsonEvent::Name(name.clone()),
        };
        Self::Event { seq: numbered.seq, at_ms: numbered.at_ms, event }
    }
}
