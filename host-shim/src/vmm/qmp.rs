//! QEMU's monitor (QMP), as far as Kiln needs it: when the guest ended, and what its console said.
//!
//! A guest that has broken out into QEMU writes what it likes here. So: lines are bounded, commands have deadlines,
//! what is unknown is ignored, and a peer that is not a monitor at all is given up.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::qemu_args::CONSOLE_BYTES;

/// The longest reply is the console's ring, every byte of it escaped as `\u0000`, and a frame around it.
const MAX_LINE: usize = 6 * CONSOLE_BYTES as usize + 4096;

/// A monitor that is well answers within milliseconds; a loaded host gets more.
const COMMAND_DEADLINE: Duration = Duration::from_secs(2);

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It powered off.
    PowerOff,
    /// It reset, which is what its kernel does after a panic.
    Reset,
    /// Some other way.
    Other,
}

/// What is known of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Monitor {
    /// It runs.
    Running,
    /// It ended; QEMU is paused and can still be asked.
    Ended(GuestEnd),
    /// The monitor is gone, or is none.
    Lost(String),
}

/// Why a command has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("QEMU's monitor is gone: {0}")]
    Lost(String),
    #[error("QEMU's monitor did not answer within {COMMAND_DEADLINE:?}")]
    Deadline,
    #[error("QEMU refused the command: {0}")]
    Refused(String),
}

/// How long a guest waits whose disk found no room on the host's, before it tries again.
const ROOM_PAUSE: Duration = Duration::from_secs(2);

/// A client. Dropping it closes the connection.
#[derive(Debug)]
pub(crate) struct Qmp {
    commands: Arc<tokio::sync::Mutex<Commands>>,
    monitor: watch::Receiver<Monitor>,
    waiting: Waiting,
    /// The guest waits for room on the host's disk.
    full: watch::Sender<()>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

#[derive(Debug)]
struct Commands {
    writer: OwnedWriteHalf,
    next_id: u64,
}

/// The one command that waits for its answer, by its id.
type Waiting = Arc<Mutex<Option<(u64, oneshot::Sender<Result<Value, String>>)>>>;

impl Qmp {
    /// Takes our end of the monitor's connection. Commands are allowed at once: QEMU reads them once it is up.
    pub(crate) fn new(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        let (told, monitor) = watch::channel(Monitor::Running);
        let waiting = Waiting::default();
        let full = watch::Sender::new(());
        let commands = Arc::new(tokio::sync::Mutex::new(Commands { writer, next_id: 1 }));
        let tries = try_again(Arc::clone(&commands), full.subscribe()).in_current_span();
        let reads = read(reader, told, full.clone(), Arc::clone(&waiting));
        let tasks = [tokio::spawn(reads), tokio::spawn(tries)].map(AbortOnDropHandle::new);
        Self { commands, monitor, waiting, full, _tasks: tasks }
    }

    /// Without this QEMU tells no events.
    pub(crate) async fn negotiate(&self) -> Result<(), QmpError> {
        // Not waited for: QEMU answers when its machine is built.
        let mut commands = self.commands.lock().await;
        let line = json!({"execute": "qmp_capabilities", "id": 0});
        write_line(&mut commands.writer, &line).await
    }

    /// Resolves when the guest has ended or the monitor is lost. Any number of callers may wait.
    pub(crate) async fn ended(&self) -> Monitor {
        let mut monitor = self.monitor.clone();
        match monitor.wait_for(|m| *m != Monitor::Running).await {
            Ok(m) => m.clone(),
            Err(_) => Monitor::Lost("its reader ended".to_owned()),
        }
    }

    /// Takes what the guest's console said since the last call.
    pub(crate) async fn take_console(&self) -> Result<String, QmpError> {
        let arguments = json!({"device": "console", "size": CONSOLE_BYTES, "format": "utf8"});
        let answer = self.command("ringbuf-read", &arguments).await?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Whether the guest runs: one that ended, or began to wait for room, while nobody listened told nobody.
    pub(crate) async fn is_running(&self) -> Result<bool, QmpError> {
        let answer = self.command("query-status", &json!({})).await?;
        let waits = answer["status"] == "io-error";
        if waits {
            self.full.send_replace(());
        }
        Ok(waits || answer["status"] == "running")
    }

    async fn command(&self, name: &str, arguments: &Value) -> Result<Value, QmpError> {
        let work = async {
            let mut commands = self.commands.lock().await;
            let id = commands.next_id;
            commands.next_id += 1;
            let (answer, answered) = oneshot::channel();
            *lock(&self.waiting) = Some((id, answer));
            if let Monitor::Lost(why) = &*self.monitor.borrow() {
                return Err(QmpError::Lost(why.clone()));
            }
            write_line(
                &mut commands.writer,
                &json!({"execute": name, "arguments": arguments, "id": id}),
            )
            .await?;
            match answered.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(refusal)) => Err(QmpError::Refused(refusal)),
                Err(_) => Err(QmpError::Lost("it closed the connection".to_owned())),
            }
        };
        tokio::time::timeout(COMMAND_DEADLINE, work).await.map_err(|_| QmpError::Deadline)?
    }
}

async fn write_line(writer: &mut OwnedWriteHalf, message: &Value) -> Result<(), QmpError> {
    let line = format!("{message}\n");
    let written = tokio::time::timeout(COMMAND_DEADLINE, writer.write_all(line.as_bytes())).await;
    written.map_err(|_| QmpError::Deadline)?.map_err(|e| QmpError::Lost(e.to_string()))
}

/// QEMU stops a guest whose disk cannot grow, and does what the guest asked of it once it may go on: where there is room
/// again the guest never knows, and where there is none it is stopped again.
async fn try_again(commands: Arc<tokio::sync::Mutex<Commands>>, mut full: watch::Receiver<()>) {
    let mut told = false;
    // Its sender is the client's.
    while full.changed().await.is_ok() {
        if !std::mem::replace(&mut told, true) {
            tracing::error!(
                "the host's disk is full: a VM waits until there is room. Make some: kiln gc"
            );
        }
        tokio::time::sleep(ROOM_PAUSE).await;
        let line = json!({"execute": "cont", "id": 0});
        if write_line(&mut commands.lock().await.writer, &line).await.is_err() {
            // Whoever waits for the guest's end is told by the reader.
            return;
        }
    }
}

async fn read(
    stream: OwnedReadHalf,
    told: watch::Sender<Monitor>,
    full: watch::Sender<()>,
    waiting: Waiting,
) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    let why = loop {
        match read_line(&mut stream, &mut line).await {
            Ok(()) => {}
            Err(why) => break why,
        }
        match parse(&line) {
            Ok(Message::Ended(end)) => {
                // The first end is the one that counts.
                told.send_if_modified(|m| {
                    let first = *m == Monitor::Running;
                    if first {
                        *m = Monitor::Ended(end);
                    }
                    first
                });
            }
            Ok(Message::Answer { id, answer }) => {
                let mut slot = lock(&waiting);
                if let Some((_, sender)) = slot.take_if(|(expected, _)| *expected == id) {
                    let _ = sender.send(answer);
                }
            }
            Ok(Message::Full) => {
                full.send_replace(());
            }
            Ok(Message::Ignored) => {}
            Err(why) => break why,
        }
        // One long reply must not hold its memory for the VM's life.
        line.clear();
        line.shrink_to(4096);
    };
    told.send_if_modified(|m| {
        let running = *m == Monitor::Running;
        if running {
            *m = Monitor::Lost(why);
        }
        running
    });
    *lock(&waiting) = None;
}

/// A line without its end; an error for one that is too long, and at the end of the stream.
async fn read_line(
    stream: &mut (impl AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
) -> Result<(), String> {
    loop {
        let chunk = stream.fill_buf().await.map_err(|e| e.to_string())?;
        if chunk.is_empty() {
            return Err("it closed the connection".to_owned());
        }
        let end = chunk.iter().position(|b| *b == b'\n');
        let taken = end.unwrap_or(chunk.len());
        if line.len() + taken > MAX_LINE {
            return Err(format!("it sent a line of more than {MAX_LINE} bytes"));
        }
        line.extend_from_slice(&chunk[..taken]);
        stream.consume(end.map_or(taken, |at| at + 1));
        if end.is_some() {
            return Ok(());
        }
    }
}

#[derive(Debug, PartialEq)]
enum Message {
    Ended(GuestEnd),
    /// It was stopped because its disk found no room.
    Full,
    Answer {
        id: u64,
        answer: Result<Value, String>,
    },
    Ignored,
}

/// QMP specification, section 2: a line is a greeting, an event, a return or an error.
fn parse(line: &[u8]) -> Result<Message, String> {
    #[derive(Deserialize)]
    struct Line {
        event: Option<String>,
        data: Option<Value>,
        #[serde(rename = "return")]
        returned: Option<Value>,
        error: Option<Value>,
        id: Option<Value>,
    }
    let Line { event, data, returned, error, id } = serde_json::from_slice(line)
        .map_err(|_| "it sent a line that is not a JSON object".to_owned())?;
    let id = id.as_ref().and_then(Value::as_u64);
    Ok(match (event.as_deref(), id, returned, error) {
        (Some("SHUTDOWN"), ..) => {
            Message::Ended(match data.as_ref().and_then(|d| d["reason"].as_str()) {
                Some("guest-shutdown") => GuestEnd::PowerOff,
                Some("guest-reset") => GuestEnd::Reset,
                _ => GuestEnd::Other,
            })
        }
        (Some("BLOCK_IO_ERROR"), ..) => match data {
            Some(data) if data["action"] == "stop" && data["nospace"] == true => Message::Full,
            _ => Message::Ignored,
        },
        (Some("GUEST_PANICKED"), ..) => Message::Ended(GuestEnd::Reset),
        (None, Some(id), _, Some(error)) => {
            let why = error["desc"].as_str().unwrap_or("no reason").chars().take(200).collect();
            Message::Answer { id, answer: Err(why) }
        }
        (None, Some(id), Some(value), None) => Message::Answer { id, answer: Ok(value) },
        _ => Message::Ignored,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::AsyncBufReadExt;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;

    async fn send(peer: &mut UnixStream, line: &str) {
        peer.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    #[tokio::test]
    async fn a_shutdown_is_told_once_and_what_comes_after_changes_nothing() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let qmp = Qmp::new(ours);
        send(&mut peer, GREETING).await;
        send(&mut peer, r#"{"event": "NIC_RX_FILTER_CHANGED", "data": {"x": [[[]]]}}"#).await;
        send(&mut peer, r#"{"return": {}, "id": 99}"#).await;
        send(&mut peer, r#"{"timestamp": {"seconds": 1}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#).await;
        assert_eq!(qmp.ended().await, Monitor::Ended(GuestEnd::PowerOff));
        send(&mut peer, r#"{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}"#).await;
        drop(peer);
        assert!(matches!(qmp.take_console().await, Err(QmpError::Lost(_))));
        assert_eq!(qmp.ended().await, Monitor::Ended(GuestEnd::PowerOff));
    }

    #[tokio::test]
    async fn a_command_gets_its_own_answer_only() {
        let (ours, peer) = UnixStream::pair().unwrap();
        let qmp = Qmp::new(ours);
        qmp.negotiate().await.unwrap();
        let peer = tokio::spawn(async move {
            let mut peer = BufReader::new(peer);
            let mut line = String::new();
            peer.read_line(&mut line).await.unwrap();
            assert_eq!(line.trim(), r#"{"execute":"qmp_capabilities","id":0}"#);
            line.clear();
            peer.read_line(&mut line).await.unwrap();
            let asked: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(asked["execute"], "ringbuf-read");
            let mut peer = peer.into_inner();
            send(&mut peer, r#"{"return": {}, "id": 0}"#).await;
            send(&mut peer, r#"{"return": "forged", "id": 77}"#).await;
            send(&mut peer, r#"{"return": "no id"}"#).await;
            send(&mut peer, &format!(r#"{{"return": "real", "id": {}}}"#, asked["id"])).await;
            let mut second = String::new();
            BufReader::new(&mut peer).read_line(&mut second).await.unwrap();
            let asked: Value = serde_json::from_str(&second).unwrap();
            send(
                &mut peer,
                &format!(
                    r#"{{"error": {{"class": "GenericError", "desc": "no"}}, "id": {}}}"#,
                    asked["id"]
                ),
            )
            .await;
            peer
        });
        assert_eq!(qmp.take_console().await.unwrap(), "real");
        assert!(matches!(qmp.take_console().await, Err(QmpError::Refused(why)) if why == "no"));
        drop(peer.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_whose_disk_found_no_room_is_let_try_again() {
        let (ours, peer) = UnixStream::pair().unwrap();
        let qmp = Qmp::new(ours);
        let mut peer = BufReader::new(peer);
        let full = r#"{"event": "BLOCK_IO_ERROR", "data": {"device": "", "operation": "write", "action": "stop", "nospace": true}}"#;
        let other = full.replace("true", "false");
        for _ in 0..2 {
            send(peer.get_mut(), &other).await;
            send(peer.get_mut(), full).await;
            // More than one of its requests failed.
            send(peer.get_mut(), full).await;
            let mut line = String::new();
            peer.read_line(&mut line).await.unwrap();
            assert_eq!(line.trim(), r#"{"execute":"cont","id":0}"#);
            send(peer.get_mut(), r#"{"return": {}, "id": 0}"#).await;
        }
        // One that was stopped while nobody listened.
        let asks = async {
            let mut line = String::new();
            peer.read_line(&mut line).await.unwrap();
            let asked: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(asked["execute"], "query-status");
            let answer =
                json!({"return": {"status": "io-error", "running": false}, "id": asked["id"]});
            send(peer.get_mut(), &answer.to_string()).await;
            line.clear();
            peer.read_line(&mut line).await.unwrap();
            assert_eq!(line.trim(), r#"{"execute":"cont","id":0}"#);
        };
        let (running, ()) = tokio::join!(qmp.is_running(), asks);
        assert!(running.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_has_a_deadline() {
        let (ours, peer) = UnixStream::pair().unwrap();
        let qmp = Qmp::new(ours);
        assert!(matches!(qmp.take_console().await, Err(QmpError::Deadline)));
        drop(peer);
    }

    #[tokio::test]
    async fn a_line_at_the_bound_is_read_and_one_above_ends_it() {
        for (length, fits) in [(MAX_LINE, true), (MAX_LINE + 1, false)] {
            let (ours, mut peer) = UnixStream::pair().unwrap();
            let qmp = Qmp::new(ours);
            let frame = r#"{"event": "SHUTDOWN", "pad": ""}"#;
            let line = frame.replace(r#""""#, &format!("\"{}\"", "x".repeat(length - frame.len())));
            assert_eq!(line.len(), length);
            let sender = tokio::spawn(async move {
                // The other end stops reading where the line is too long.
                let _ = peer.write_all(line.as_bytes()).await;
                let _ = peer.write_all(b"\n").await;
                peer
            });
            match qmp.ended().await {
                Monitor::Ended(GuestEnd::Other) => assert!(fits),
                Monitor::Lost(why) => assert!(!fits, "{why}"),
                other => panic!("{other:?}"),
            }
            sender.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_peer_that_is_no_monitor_is_given_up() {
        for garbage in ["hello\n", "[]\n", "\n", "{\"event\": 3}\n", "\u{0}\u{1}\n", "{\n"] {
            let (ours, mut peer) = UnixStream::pair().unwrap();
            let qmp = Qmp::new(ours);
            peer.write_all(garbage.as_bytes()).await.unwrap();
            assert!(matches!(qmp.ended().await, Monitor::Lost(_)), "{garbage:?}");
            assert!(matches!(qmp.take_console().await, Err(QmpError::Lost(_))));
        }
    }

    #[test]
    fn deep_nesting_is_refused_and_not_recursed_into() {
        let deep = format!(r#"{{"data": {}"#, "[".repeat(100_000));
        assert!(parse(deep.as_bytes()).is_err());
    }
}
