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

use std::time::Duration;

use bytes::Bytes;
use kiln_protocol::exec::{Cause, Open, Stream, Terminal};
use kiln_protocol::preamble::{Channel, Preamble};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tokio_util::sync::CancellationToken;

use super::agent::{Agent, Deaf, Heard, START_DEADLINE};
use super::entrance::{Entrance, Line};
use super::inward::inward;
use super::record::How;
use crate::token::Lapse;

/// How often the client is written to, so that one that is lost is noticed although its input is stuck behind a
/// command that does not read it: after the first write its system says that nobody is there, and the second fails.
pub const PING: Duration = Duration::from_secs(5);

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
    /// The command is being started, or the copy has begun.
    fn started(&mut self) -> impl Future<Output = Result<(), Gone>> + Send {
        std::future::ready(Ok(()))
    }
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
    /// What the agent calls it, where the agent refused or failed.
    pub cause: Option<Cause>,
}

impl Outcome {
    fn own(how: How, why: impl Into<String>) -> Self {
        Self { how, exit_code: Some(OWN), why: Some(why.into()), cause: None }
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
            Gone::Lost => Self { how: How::ClientLost, exit_code: None, why: None, cause: None },
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
    /// Why the client's token opens nothing any more, once that is so.
    pub lapse: watch::Receiver<Option<Lapse>>,
    /// How often the client is written to.
    pub ping: Duration,
}

/// Runs a session to its end. Dropping the future ends it at once. What has to be done `before` anything is
/// begun in the VM is done once the VM was reached.
pub async fn run<I: ClientInput, O: ClientOutput>(
    entrance: &Entrance,
    open: Open,
    bounds: Bounds,
    before: impl Future<Output = Result<(), Outcome>> + Send,
    input: &mut I,
    output: &mut O,
) -> Outcome {
    let Bounds { timeout, stop, lapse, ping } = bounds;
    let deadline = timeout.map(|timeout| (Instant::now() + timeout, timeout));
    let work = converse(entrance, open, ping, before, input, output);
    tokio::pin!(work);
    tokio::select! {
        // A guest that never stops talking does not keep these from being looked at.
        biased;
        () = stop.cancelled() => Outcome::own(How::ServerStopped, "the server is being stopped"),
        lapse = lapsed(lapse) => Outcome::own(How::Revoked, match lapse {
            Lapse::Revoked => "the token that this session was opened with is revoked",
            Lapse::Expired => "the token that this session was opened with has expired; enter again with another one",
        }),
        timeout = at(deadline) => Outcome {
            how: How::TimedOut,
            exit_code: Some(TIMED_OUT),
            why: Some(format!("the command ran longer than its timeout of {} s and was ended", timeout.as_secs())),
            cause: None,
        },
        () = entrance.closed() => {
            // What it had sent before may still be on its way.
            match tokio::time::timeout(LAST_WORDS, work).await {
                Ok(outcome) => outcome,
                Err(_) => vm_ended(),
            }
        }
        outcome = &mut work => outcome,
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

async fn lapsed(mut lapse: watch::Receiver<Option<Lapse>>) -> Lapse {
    let told = lapse.wait_for(Option::is_some).await.ok().and_then(|lapse| *lapse);
    match told {
        Some(lapse) => lapse,
        // Nobody is left who could tell.
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
    before: impl Future<Output = Result<(), Outcome>> + Send,
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
    if let Err(outcome) = before.await {
        return outcome;
    }
    let (reader, writer) = stream.into_split();
    let preamble = Preamble::new(Channel::Exec, entrance.nonce());
    let (taken, window) = watch::channel(0);
    tokio::select! {
        // A guest that never stops talking does not hide that its client is gone.
        biased;
        gone = inward(writer, preamble, open, window, input) => gone.into(),
        outcome = outward(Agent::new(reader), &taken, entrance, ping, output) => outcome,
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
            _ = pings.tick() => match output.ping().await {
                Ok(()) => continue,
                Err(gone) => return gone.into(),
            },
            () = sleep_until(start), if !agent.started() => {
                let seconds = START_DEADLINE.as_secs();
                return Outcome::refused(format!("the VM's agent did not start the command within {seconds} s"));
            }
            heard = agent.hear() => heard,
        };
        match heard {
            Ok(Heard::Started) => {
                if let Err(gone) = output.started().await {
                    return gone.into();
                }
            }
            Ok(Heard::Taken(total)) => drop(taken.send_replace(total)),
            Ok(Heard::Output(stream, bytes)) => {
                if let Err(gone) = output.output(stream, bytes).await {
                    return gone.into();
                }
            }
            Ok(Heard::Exited(code)) => {
                return Outcome { how: How::Exited, exit_code: Some(code), why: None, cause: None };
            }
            Ok(Heard::Failed { cause, why, started }) => {
                // The agent may find only while it starts a command that it cannot be started.
                let how = match cause {
                    Cause::Internal if started => How::Failed,
                    _ => How::Refused,
                };
                let exit_code = Some(exit_code(cause));
                return Outcome { how, exit_code, why: Some(why), cause: Some(cause) };
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
