//! One session: what the client says goes to the VM, what the VM says to the client, until one of many ends.
//!
//! ```text
//!            ┌──────── inward ────────▶ one frame at a time
//!   client ──┤                                              ├── the VM's connection
//!            └─ output ◀─── outward ──── one frame at a time
//! ```
//! The two directions flow by themselves, and each holds little: who does not read holds back only what comes to it.
//! Input that the command does not take stays within the agent's window, and some waits here, so that a signal
//! overtakes it. The VM's connection is closed whatever the end is, and the agent ends what runs there.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use kiln_protocol::exec::{Cause, HostToSession, INPUT_WINDOW, MAX_CHUNK, Open, Stream, Terminal};
use kiln_protocol::frame::{self, FrameError};
use kiln_protocol::preamble::{Channel, Preamble};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tokio_util::sync::CancellationToken;

use super::agent::{Agent, Deaf, Heard, START_DEADLINE};
use super::entrance::{Entrance, Line};
use super::record::How;

/// How often the client is written to, so that one that is lost is noticed although its input is stuck behind a
/// command that does not read it: after the first write its system says that nobody is there, and the second fails.
pub const PING: Duration = Duration::from_secs(5);

/// Input that waits here for the command to take more. What a client sends beyond it stays in its connection.
const MAX_WAITING: usize = 1024 * 1024;

/// How long what the VM had still sent may take to come when its door is closed, and how long it may be told
/// after a connection broke that its VM is over.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Exit codes for what is no command's end: as env(1), timeout(1) and shells have them.
const TIMED_OUT: u8 = 124;
const OWN: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// The next bytes of standard input.
    Input(Bytes),
    /// There is no more of it.
    InputEnd,
    /// Its terminal has another size.
    Resize(Terminal),
    /// A signal for the command.
    Signal(u8),
}

/// Why a client is not listened to any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It went away.
    Lost,
    /// It said what it may not.
    Misused(String),
}

/// What a client says, piece by piece.
pub trait ClientInput: Send {
    /// The next. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Result<Said, Gone>> + Send;
}

/// Where a client is written to. Each returns when there is room for the next.
pub trait ClientOutput: Send {
    /// What the command printed.
    fn output(
        &mut self,
        stream: Stream,
        bytes: Vec<u8>,
    ) -> impl Future<Output = Result<(), Gone>> + Send;
    /// Something that costs nothing and finds out whether there is anybody.
    fn ping(&mut self) -> impl Future<Output = Result<(), Gone>> + Send;
}

/// How a session ended, for the client and for the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How.
    pub how: How,
    /// For the client; `None` when there is none any more.
    pub exit_code: Option<u8>,
    /// Why, where it was not the command's own end. May quote the guest.
    pub why: Option<String>,
}

impl Outcome {
    fn own(how: How, why: impl Into<String>) -> Self {
        Self { how, exit_code: Some(OWN), why: Some(why.into()) }
    }

    /// No command was started.
    pub fn refused(why: impl Into<String>) -> Self {
        Self::own(How::Refused, why)
    }

    /// Something failed, and the session with it.
    pub fn failed(why: impl Into<String>) -> Self {
        Self::own(How::Failed, why)
    }
}

impl From<Gone> for Outcome {
    fn from(gone: Gone) -> Self {
        match gone {
            Gone::Lost => Self { how: How::ClientLost, exit_code: None, why: None },
            Gone::Misused(why) => Self::failed(why),
        }
    }
}

/// What bounds a session.
pub struct Bounds {
    /// From its beginning.
    pub timeout: Option<Duration>,
    /// The server ends.
    pub stop: CancellationToken,
    /// How often the client is written to.
    pub ping: Duration,
}

/// Runs a session to its end. Dropping the future ends it at once.
pub async fn run<I: ClientInput, O: ClientOutput>(
    entrance: &Entrance,
    open: Open,
    bounds: Bounds,
    input: &mut I,
    output: &mut O,
) -> Outcome {
    let Bounds { timeout, stop, ping } = bounds;
    let deadline = timeout.map(|timeout| (Instant::now() + timeout, timeout));
    let work = converse(entrance, open, ping, input, output);
    tokio::pin!(work);
    tokio::select! {
        biased;
        outcome = &mut work => outcome,
        () = stop.cancelled() => Outcome::own(How::ServerStopped, "the server is being stopped"),
        timeout = at(deadline) => Outcome {
            how: How::TimedOut,
            exit_code: Some(TIMED_OUT),
            why: Some(format!("the command ran longer than its timeout of {} s and was ended", timeout.as_secs())),
        },
        () = entrance.closed() => {
            // What it had sent before may still be on its way.
            match tokio::time::timeout(LAST_WORDS, work).await {
                Ok(outcome) => outcome,
                Err(_) => vm_ended(),
            }
        }
    }
}

async fn at(deadline: Option<(Instant, Duration)>) -> Duration {
    match deadline {
        Some((deadline, timeout)) => {
            sleep_until(deadline).await;
            timeout
        }
        None => std::future::pending().await,
    }
}

fn vm_ended() -> Outcome {
    Outcome::own(How::VmEnded, "the VM ended while the command ran: its build or instance is over")
}

async fn converse<I: ClientInput, O: ClientOutput>(
    entrance: &Entrance,
    open: Open,
    ping: Duration,
    input: &mut I,
    output: &mut O,
) -> Outcome {
    // What is held goes when this returns.
    let Line { stream, hold: _hold } = match entrance.dial().await {
        Ok(line) => line,
        Err(error) => {
            tracing::warn!(error = crate::causes::chain(&error), "a VM cannot be entered");
            return Outcome::refused(format!("the VM cannot be entered: {error}; try again"));
        }
    };
    let (reader, writer) = stream.into_split();
    let preamble = Preamble { channel: Channel::Exec, nonce: entrance.nonce() };
    let (taken, window) = watch::channel(0);
    tokio::select! {
        biased;
        outcome = outward(Agent::new(reader), &taken, entrance, ping, output) => outcome,
        gone = inward(writer, preamble, open, window, input) => gone.into(),
    }
}

/// Takes the session's output to the client, up to the end.
async fn outward<O: ClientOutput>(
    mut agent: Agent<impl tokio::io::AsyncRead + Unpin + Send>,
    taken: &watch::Sender<u64>,
    entrance: &Entrance,
    ping: Duration,
    output: &mut O,
) -> Outcome {
    let mut pings = interval_at(Instant::now() + ping, ping);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let start = Instant::now() + START_DEADLINE;
    loop {
        let heard = tokio::select! {
            biased;
            heard = agent.hear() => heard,
            _ = pings.tick() => match output.ping().await {
                Ok(()) => continue,
                Err(gone) => return gone.into(),
            },
            () = sleep_until(start), if !agent.started() => {
                let seconds = START_DEADLINE.as_secs();
                return Outcome::refused(format!("the VM's agent did not start the command within {seconds} s"));
            }
        };
        match heard {
            Ok(Heard::Started) => {}
            Ok(Heard::Taken(total)) => drop(taken.send_replace(total)),
            Ok(Heard::Output(stream, bytes)) => {
                if let Err(gone) = output.output(stream, bytes).await {
                    return gone.into();
                }
            }
            Ok(Heard::Exited(code)) => {
                return Outcome { how: How::Exited, exit_code: Some(code), why: None };
            }
            Ok(Heard::Failed { cause, why, started }) => {
                let how = if started { How::Failed } else { How::Refused };
                return Outcome { how, exit_code: Some(exit_code(cause)), why: Some(why) };
            }
            Err(Deaf::Broken) => {
                let over = tokio::time::timeout(LAST_WORDS, entrance.closed()).await.is_ok();
                return if over { vm_ended() } else { Outcome::failed(Deaf::Broken.to_string()) };
            }
            Err(broken @ Deaf::Protocol(_)) => {
                tracing::warn!(%broken, "a session was given up");
                return Outcome::failed(broken.to_string());
            }
        }
    }
}

fn exit_code(cause: Cause) -> u8 {
    match cause {
        Cause::NotFound => NOT_FOUND,
        Cause::NotExecutable => NOT_EXECUTABLE,
        Cause::NoStep | Cause::Invalid | Cause::Internal => OWN,
    }
}

/// Takes what the client says to the VM, until the client is gone.
async fn inward<I: ClientInput>(
    mut writer: impl AsyncWrite + Unpin + Send,
    preamble: Preamble,
    open: Open,
    window: watch::Receiver<u64>,
    input: &mut I,
) -> Gone {
    let done = async {
        writer.write_all(&preamble.encode()).await.map_err(FrameError::Io)?;
        frame::write(&mut writer, &HostToSession::Open(Box::new(open))).await?;
        pass_on(&mut writer, window, input).await
    };
    if let Ok(gone) = done.await {
        return gone;
    }
    // The agent has closed the connection, and its last word is heard elsewhere.
    loop {
        if let Err(gone) = input.next().await {
            return gone;
        }
    }
}

/// As [`inward`], of a session that is open.
async fn pass_on<I: ClientInput>(
    writer: &mut (impl AsyncWrite + Unpin),
    mut window: watch::Receiver<u64>,
    input: &mut I,
) -> Result<Gone, FrameError> {
    let mut waiting = Waiting::default();
    let mut sent = 0;
    loop {
        let taken = *window.borrow_and_update();
        while let Some(next) = waiting.next(sent, taken) {
            if let HostToSession::Input(bytes) = &next {
                sent += bytes.len() as u64;
            }
            frame::write(writer, &next).await?;
        }
        let said = tokio::select! {
            said = input.next(), if waiting.has_room() => match said {
                Ok(said) => said,
                Err(gone) => return Ok(gone),
            },
            moved = window.changed() => match moved {
                Ok(()) => continue,
                // Nobody listens to the agent any more.
                Err(_) => return Err(FrameError::Closed),
            },
        };
        match said {
            Said::Input(bytes) => waiting.input(bytes),
            Said::InputEnd => waiting.ended = true,
            Said::Resize(size) => frame::write(writer, &HostToSession::Resize(size)).await?,
            Said::Signal(number) => frame::write(writer, &HostToSession::Signal(number)).await?,
        }
    }
}

/// Input that waits for the command to take more.
#[derive(Default)]
struct Waiting {
    bytes: VecDeque<Bytes>,
    len: usize,
    ended: bool,
    told: bool,
}

impl Waiting {
    fn has_room(&self) -> bool {
        self.len < MAX_WAITING
    }

    fn input(&mut self, bytes: Bytes) {
        self.len += bytes.len();
        self.bytes.push_back(bytes);
    }

    /// What the agent may be told now, when it has been sent and has taken so many bytes.
    fn next(&mut self, sent: u64, taken: u64) -> Option<HostToSession> {
        let room = taken.saturating_add(INPUT_WINDOW).saturating_sub(sent);
        let room = usize::try_from(room).unwrap_or(usize::MAX).min(MAX_CHUNK);
        while let Some(first) = self.bytes.front_mut() {
            if first.is_empty() {
                self.bytes.pop_front();
                continue;
            }
            if room == 0 {
                return None;
            }
            let chunk = first.split_to(room.min(first.len()));
            self.len -= chunk.len();
            return Some(HostToSession::Input(chunk.to_vec()));
        }
        let tell = self.ended && !self.told;
        self.told |= tell;
        tell.then_some(HostToSession::InputEnd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(pieces: &[usize]) -> Waiting {
        let mut waiting = Waiting::default();
        for len in pieces {
            waiting.input(Bytes::from(vec![7; *len]));
        }
        waiting
    }

    fn len(message: Option<HostToSession>) -> Option<usize> {
        message.map(|message| match message {
            HostToSession::Input(bytes) => bytes.len(),
            _ => 0,
        })
    }

    #[test]
    fn the_window_is_filled_and_no_more() {
        let mut some = waiting(&[0, MAX_CHUNK + 10, 5]);
        assert_eq!(len(some.next(0, 0)), Some(MAX_CHUNK));
        assert_eq!(len(some.next(INPUT_WINDOW - 3, 0)), Some(3));
        assert_eq!(len(some.next(INPUT_WINDOW, 0)), None);
        assert_eq!(len(some.next(INPUT_WINDOW, 100)), Some(7));
        some.ended = true;
        assert_eq!(len(some.next(0, 0)), Some(5), "the end waits for its turn");
        assert_eq!(some.next(INPUT_WINDOW, 0), Some(HostToSession::InputEnd));
        assert_eq!(some.next(0, 0), None, "it is told once");
        assert_eq!(some.len, 0);
        // An agent that says that it took more than there was gains a larger window of its own memory.
        assert_eq!(len(waiting(&[9]).next(0, u64::MAX)), Some(9));
    }

    #[test]
    fn what_waits_is_bounded() {
        assert!(waiting(&[MAX_WAITING - 1]).has_room());
        assert!(!waiting(&[MAX_WAITING - 1, 1]).has_room());
    }
}
