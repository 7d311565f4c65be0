//! The host's half of a control session with one VM: hello → job → source → events → outcome.
//!
//! ```text
//!            accept + Hello            SourceEnd, events            Outcome
//! (booting) ───────────────▶ connected ──────────────▶ connected ──────────▶ ended
//!                              │    ▲
//!                    connection │    │ Hello with the current resume token, or with the one
//!                       breaks  ▼    │ before while nothing was heard since
//!  (another server) ───────▶ waiting ──deadline──▶ lost
//! ```
//! A session outlives its server: what the next one needs to go on with it ([`Tokens`], and that all of the source was
//! sent) the sink is told before the agent is.
//!
//! The session knows nothing of builds' states, stores or VMs: it takes connections from
//! [`Connections`], gives what the guest says to a [`Sink`], and returns how it [`End`]ed.
//! What the guest says is checked here: every bound, every order.

mod connection;
mod handshake;

use std::time::Duration;

use kiln_protocol::event::{Failure, NumberedEvent, Outcome};
use kiln_protocol::hello::TOKEN_LEN;
use kiln_protocol::job::{Job, Role};
use kiln_protocol::message::AgentUsage;
use kiln_protocol::secret::{SecretAnswer, SecretId};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use connection::{Connection, Event as Heard};
use handshake::Handshake;

/// How long a guest has to say Hello on a connection that it opened.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// How long a broken connection may stay broken: as long as the agent tries to dial again.
const RESUME_DEADLINE: Duration = Duration::from_secs(30);

/// How long a build's agent has to end by itself after a cancel, before its VM is destroyed. Long enough
/// for the last log lines, and well within the two seconds that a cancel may take.
pub const CANCEL_GRACE: Duration = Duration::from_millis(500);

/// How often a guest may ask for a secret: every one that it can declare, over many resumes.
const MAX_SECRET_REQUESTS: u32 = 1000;

/// A byte stream to the guest.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// Where control connections come from.
pub trait Connections: Send {
    /// What a connection is.
    type Stream: Stream;
    /// The next connection that the guest opened. Cancel-safe.
    fn accept(&mut self) -> impl Future<Output = std::io::Result<Self::Stream>> + Send;
}

/// Where the guest's reports go.
pub trait Sink: Send {
    /// Stores events, in order, and returns only when they are durable.
    fn events(
        &mut self,
        events: Vec<NumberedEvent>,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
    /// The agent said Hello.
    fn hello(&mut self, agent: &str, image: &str) -> impl Future<Output = ()> + Send;
    /// The engine's process is running.
    fn engine_started(&mut self) -> impl Future<Output = ()> + Send;
    /// What the agent cost, as it says.
    fn agent_usage(&mut self, usage: AgentUsage) -> impl Future<Output = ()> + Send;
    /// The guest asks for a secret.
    fn secret(
        &mut self,
        id: &SecretId,
    ) -> impl Future<Output = anyhow::Result<SecretAnswer>> + Send;
    /// What whoever continues the session is to know from now on.
    fn tokens(&mut self, _tokens: &Tokens) {}
    /// All of the source was sent: from now on the session can be continued.
    fn source_sent(&mut self) {}
}

/// What the agent shows to continue its session.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tokens {
    /// Of the newest Welcome.
    pub current: [u8; TOKEN_LEN],
    /// Of the one before, while that one may not have arrived.
    pub before: Option<[u8; TOKEN_LEN]>,
}

/// What a session needs to know.
pub struct Params {
    /// What the guest is to do.
    pub job: Job,
    /// When the VM was started: its timeout runs from there.
    pub started: Instant,
    /// The source archive, for a build.
    pub source: Option<tokio::fs::File>,
    /// For the preambles of the VM's other connections.
    pub nonce: [u8; TOKEN_LEN],
    /// How long a VM may take to say Hello, and then to report that it works on its job.
    pub boot_deadline: Duration,
    /// How long the agent has to end by itself after a cancel.
    pub cancel_grace: Duration,
    /// Where an earlier server had begun the session: its agent shows one of these.
    pub resumed: Option<Tokens>,
}

/// How a session ended.
#[derive(Debug)]
pub enum End {
    /// The agent reported its outcome; every event before it is stored.
    Outcome(Outcome),
    /// The agent reported that the build failed in a step, which stays to be entered. The VM runs on, and nothing
    /// that it says from now on counts.
    Kept(Failure),
    /// A cancel was asked for. The VM may still run. The outcome, where the agent reported one in its grace.
    Cancelled(Option<Outcome>),
    /// The agent was not heard of in time, or any more.
    Lost(String),
    /// The agent of an earlier server's session did not come back.
    NotResumed,
    /// The guest broke the protocol.
    Protocol(String),
    /// The agent speaks no version that this host speaks.
    Version(String),
    /// The host could not store what the guest said.
    Store(anyhow::Error),
}

/// Runs a session to its end. Deadlines of the build itself are the caller's; dropping the future
/// ends the session at once.
pub async fn run<C: Connections, S: Sink>(
    mut connections: C,
    sink: &mut S,
    params: Params,
    cancel: CancellationToken,
) -> End {
    let handshake = Handshake::new(params.nonce, params.resumed.as_ref());
    let boot_deadline = params.boot_deadline;
    let cancel_grace = params.cancel_grace;
    let mut session = Session {
        handshake,
        boot_deadline,
        cancel_grace,
        stored: 0,
        asked: 0,
        may_keep: matches!(&params.job.role, Role::Build(build) if build.keep_failed),
        kept: false,
        source_sent: false,
        outcome: None,
        sink,
    };
    if params.resumed.is_some() {
        let ended = session.go_on(&mut connections, &cancel).await;
        return ended.map_or_else(|end| end, End::Outcome);
    }
    let booted = Instant::now() + params.boot_deadline;
    let opened = tokio::select! {
        biased;
        () = cancel.cancelled() => return End::Cancelled(None),
        opened = timeout_at(booted, session.handshake.first(&mut connections, &mut *session.sink)) => opened,
    };
    let (stream, hello) = match opened {
        Err(_) => {
            let seconds = params.boot_deadline.as_secs();
            return End::Lost(format!(
                "the VM's agent did not connect within {seconds} s of its start"
            ));
        }
        Ok(Err(end)) => return end,
        Ok(Ok(opened)) => opened,
    };
    session.sink.hello(&hello.agent, &hello.image).await;
    let mut job = params.job;
    job.limits.spent_ms = u64::try_from(params.started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let connection = Connection::start(stream, job, params.source);
    match session.converse(connection, &mut connections, &cancel).await {
        Ok(outcome) => End::Outcome(outcome),
        Err(end) => end,
    }
}

struct Session<'s, S> {
    handshake: Handshake,
    boot_deadline: Duration,
    cancel_grace: Duration,
    /// The highest event number that is stored.
    stored: u64,
    /// How often it asked for a secret.
    asked: u32,
    /// Whether a step that fails may stay.
    may_keep: bool,
    /// Whether one does.
    kept: bool,
    /// Whether the sink knows that all of the source was sent.
    source_sent: bool,
    outcome: Option<Outcome>,
    sink: &'s mut S,
}

impl<S: Sink> Session<'_, S> {
    /// Goes on where an earlier server was.
    async fn go_on<C: Connections>(
        &mut self,
        connections: &mut C,
        cancel: &CancellationToken,
    ) -> Result<Outcome, End> {
        let again = self.handshake.again(connections, 0, &mut *self.sink);
        let resumed = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(End::Cancelled(None)),
            resumed = tokio::time::timeout(RESUME_DEADLINE, again) => resumed,
        };
        let Ok(resumed) = resumed else { return Err(End::NotResumed) };
        let handshake::Resumed { stream, acknowledged } = resumed?;
        // It has the host's word for these: they are stored.
        self.stored = acknowledged;
        tracing::info!(acknowledged, "the agent resumed the session of an earlier server");
        self.converse(Connection::resume(stream), connections, cancel).await
    }

    /// Listens to the agent until it reports its outcome, over as many connections as it takes.
    async fn converse<C: Connections>(
        &mut self,
        mut connection: Connection<C::Stream>,
        connections: &mut C,
        cancel: &CancellationToken,
    ) -> Result<Outcome, End> {
        let begun = Instant::now() + self.boot_deadline;
        loop {
            let broken = tokio::select! {
                biased;
                () = cancel.cancelled() => return self.wind_down(connection).await,
                () = sleep_until(begun), if self.stored == 0 => {
                    let seconds = self.boot_deadline.as_secs();
                    return Err(End::Lost(format!(
                        "the VM's agent connected but did not begin its job within {seconds} s"
                    )));
                }
                // Before another connection is looked at: who is heard here has its token, and nobody else the old one.
                heard = connection.hear() => match heard {
                    Ok(heard) => {
                        self.handshake.arrived(&mut *self.sink);
                        if !self.source_sent && connection.can_resume() {
                            self.source_sent = true;
                            self.sink.source_sent();
                        }
                        self.take(heard, &mut connection).await?;
                        match self.outcome.take() {
                            None => {}
                            Some(Outcome::Failed(failure)) if self.kept => {
                                return Err(End::Kept(failure));
                            }
                            Some(_) if self.kept => {
                                let why = "it kept a step, and its build did not fail";
                                return Err(End::Protocol(why.into()));
                            }
                            Some(outcome) => {
                                connection.finish().await;
                                return Ok(outcome);
                            }
                        }
                        continue;
                    }
                    Err(broken) => broken.fatal()?,
                },
                // A second connection is either the agent's, which shows the token, or refused.
                resumed = self.handshake.again(connections, self.stored, &mut *self.sink) => {
                    connection = self.resume(&connection, resumed?)?;
                    continue;
                }
            };
            tracing::warn!(reason = %broken, "the control connection broke");
            if !connection.can_resume() {
                return Err(End::Lost(format!(
                    "the connection to the VM broke while the source was sent: {broken}"
                )));
            }
            let resumed = tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(End::Cancelled(None)),
                resumed = tokio::time::timeout(
                    RESUME_DEADLINE,
                    self.handshake.again(connections, self.stored, &mut *self.sink),
                ) => resumed,
            };
            let Ok(resumed) = resumed else {
                return Err(End::Lost(format!(
                    "the connection to the VM broke ({broken}) and did not come back"
                )));
            };
            connection = self.resume(&connection, resumed?)?;
        }
    }

    fn resume<T: Stream>(
        &self,
        old: &Connection<T>,
        resumed: handshake::Resumed<T>,
    ) -> Result<Connection<T>, End> {
        if !old.can_resume() {
            return Err(End::Protocol("the agent resumed while the source was sent".into()));
        }
        tracing::info!(stored = self.stored, "the agent resumed its session");
        Ok(Connection::resume(resumed.stream))
    }

    /// Takes what was heard: events are checked, stored, and then acknowledged.
    async fn take<T: Stream>(
        &mut self,
        heard: Vec<Heard>,
        connection: &mut Connection<T>,
    ) -> Result<(), End> {
        let mut events = Vec::new();
        for heard in heard {
            match heard {
                Heard::Event(event) => {
                    let last = events.last().map_or(self.stored, |e: &NumberedEvent| e.seq);
                    // After a resume the agent repeats what it does not know to be stored.
                    if event.seq <= last {
                        continue;
                    }
                    if event.seq != last + 1 {
                        let got = event.seq;
                        return Err(End::Protocol(format!("event {got} follows event {last}")));
                    }
                    event.event.check().map_err(|e| End::Protocol(e.to_string()))?;
                    events.push(event);
                }
                Heard::EngineStarted => self.sink.engine_started().await,
                Heard::Kept if self.may_keep => self.kept = true,
                Heard::Kept => {
                    return Err(End::Protocol("it kept a step that nobody wants to enter".into()));
                }
                Heard::Usage(usage) => self.sink.agent_usage(usage).await,
                Heard::SecretRequest(id) => {
                    self.asked += 1;
                    if self.asked > MAX_SECRET_REQUESTS {
                        let end = format!("it asked for secrets {MAX_SECRET_REQUESTS} times");
                        return Err(End::Protocol(end));
                    }
                    let answer = self.sink.secret(&id).await.map_err(End::Store)?;
                    connection.answer(id, answer);
                }
                Heard::Outcome(outcome) => {
                    outcome.check().map_err(|e| End::Protocol(e.to_string()))?;
                    self.outcome = Some(outcome);
                    break;
                }
            }
        }
        if let Some(last) = events.last().map(|e| e.seq) {
            self.sink.events(events).await.map_err(End::Store)?;
            self.stored = last;
            connection.acknowledge(last);
        }
        Ok(())
    }

    /// After a cancel: asks the agent to stop and takes its last words, for a moment.
    async fn wind_down<T: Stream>(
        &mut self,
        mut connection: Connection<T>,
    ) -> Result<Outcome, End> {
        connection.cancel();
        let until = Instant::now() + self.cancel_grace;
        while let Ok(Ok(heard)) = timeout_at(until, connection.hear()).await {
            self.take(heard, &mut connection).await?;
            if self.outcome.is_some() {
                connection.finish().await;
                break;
            }
        }
        Err(End::Cancelled(self.outcome.take()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
