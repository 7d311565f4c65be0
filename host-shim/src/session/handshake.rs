//! Hello and its answer: who may open, or continue, the session of a VM.

use kiln_protocol::frame;
use kiln_protocol::hello::{Hello, HelloReply, Reject, RejectReason, TOKEN_LEN, Welcome};
use kiln_protocol::version::{Features, SUPPORTED, Version};
use subtle::ConstantTimeEq;
use tokio::time::{Instant, timeout};

use super::{Connections, End, HELLO_DEADLINE, RESUME_DEADLINE, Sink, Stream, Tokens};
use crate::build::Millis;

/// What this host can do beyond the version.
const FEATURES: Features = Features::RESUME;

/// The state that decides whom to let in.
pub(super) struct Handshake {
    nonce: [u8; TOKEN_LEN],
    /// Replaced at every Welcome.
    token: [u8; TOKEN_LEN],
    /// The one that the agent showed for the last Welcome, which may not have arrived.
    spent: Option<Spent>,
}

/// A token that was shown and answered. It is good until the agent is heard on the connection that it got for it, and no
/// longer than an agent without its answer tries: one that has nothing to say proves nothing.
struct Spent {
    token: [u8; TOKEN_LEN],
    until: Instant,
}

/// The stream of a session that goes on.
pub(super) struct Resumed<T> {
    pub(super) stream: T,
    /// What the agent knows to be stored.
    pub(super) acknowledged: u64,
}

impl Handshake {
    /// Of a session that begins, or of one that an earlier server had.
    pub(super) fn new(nonce: [u8; TOKEN_LEN], resumed: Option<&Tokens>) -> Self {
        let Some(&Tokens { current, before }) = resumed else {
            return Self { nonce, token: random(), spent: None };
        };
        let until = Instant::now() + RESUME_DEADLINE;
        Self { nonce, token: current, spent: before.map(|token| Spent { token, until }) }
    }

    /// The agent was heard on the newest connection: its Welcome has arrived, and what it showed for it is worth nothing.
    pub(super) fn arrived(&mut self, sink: &mut impl Sink) {
        if self.spent.take().is_some() {
            sink.tokens(&self.tokens());
        }
    }

    fn tokens(&self) -> Tokens {
        Tokens { current: self.token, before: self.spent.as_ref().map(|spent| spent.token) }
    }

    /// Whether whoever shows this is the agent. Takes as long whatever it is.
    fn knows(&self, shown: &[u8; TOKEN_LEN]) -> bool {
        let spent = self.spent.as_ref().filter(|spent| Instant::now() < spent.until);
        let again = spent.is_some_and(|spent| shown.ct_eq(&spent.token).into());
        bool::from(shown.ct_eq(&self.token)) | again
    }

    /// The first Hello of the VM, said before any untrusted code runs in it. A dial that the agent
    /// gave up, because the device was slow to come up, arrives as a connection that says nothing.
    pub(super) async fn first<C: Connections>(
        &mut self,
        connections: &mut C,
        sink: &mut impl Sink,
    ) -> Result<(C::Stream, Hello), End> {
        loop {
            let mut stream = connections.accept().await.map_err(|e| cannot_accept(&e))?;
            let hello = match read_hello(&mut stream).await {
                Ok(hello) => hello,
                Err(BadHello::GivenUp(error)) => {
                    tracing::debug!(%error, "the agent gave up a dial");
                    continue;
                }
                Err(BadHello::NotOne(why)) => {
                    let why = format!("the VM's first connection is not an agent's: {why}");
                    return Err(End::Protocol(why));
                }
            };
            if hello.resume.is_some() {
                reject(&mut stream, RejectReason::Resume, "this session has not begun").await;
                let why = "the VM's first connection shows a resume token";
                return Err(End::Protocol(why.into()));
            }
            let Some(version) = hello.versions.agree(SUPPORTED) else {
                let message = format!(
                    "the agent ({}) speaks {} and this host speaks {SUPPORTED}: rebuild the builder image with this release's kiln-image",
                    hello.agent.escape_default(),
                    hello.versions
                );
                reject(&mut stream, RejectReason::Version, &message).await;
                return Err(End::Version(message));
            };
            match self.welcome(&mut stream, version, hello.features, 0, sink).await {
                Ok(()) => return Ok((stream, hello)),
                Err(error) => tracing::debug!(%error, "the agent gave up a dial"),
            }
        }
    }

    /// The next connection that continues the session; all others are refused. Cancel-safe but
    /// for a handshake that is under way, whose agent then dials again.
    pub(super) async fn again<C: Connections>(
        &mut self,
        connections: &mut C,
        stored: u64,
        sink: &mut impl Sink,
    ) -> Result<Resumed<C::Stream>, End> {
        loop {
            let mut stream = connections.accept().await.map_err(|e| cannot_accept(&e))?;
            let hello = match read_hello(&mut stream).await {
                Ok(hello) => hello,
                Err(why) => {
                    tracing::warn!(%why, "refused a further control connection of the VM");
                    continue;
                }
            };
            let reason = match &hello.resume {
                None => RejectReason::Taken,
                Some(resume) if !self.knows(&resume.token) => RejectReason::Resume,
                Some(resume) => match hello.versions.agree(SUPPORTED) {
                    None => RejectReason::Version,
                    Some(version) => {
                        let until = Instant::now() + RESUME_DEADLINE;
                        self.spent = Some(Spent { token: resume.token, until });
                        let welcome =
                            self.welcome(&mut stream, version, hello.features, stored, sink);
                        if welcome.await.is_ok() {
                            return Ok(Resumed { stream, acknowledged: resume.acknowledged });
                        }
                        continue;
                    }
                },
            };
            tracing::warn!(?reason, "refused a further control connection of the VM");
            reject(&mut stream, reason, "the session belongs to another connection").await;
        }
    }

    async fn welcome(
        &mut self,
        stream: &mut impl Stream,
        version: Version,
        features: Features,
        acknowledged: u64,
        sink: &mut impl Sink,
    ) -> Result<(), frame::FrameError> {
        self.token = random();
        // Before the agent: a server that comes after this one has to know it.
        sink.tokens(&self.tokens());
        let welcome = Welcome {
            version,
            features: features.common(FEATURES),
            resume_token: self.token,
            nonce: self.nonce,
            time_ms: u64::try_from(now_ms()).unwrap_or(0),
            entropy: random(),
            acknowledged,
        };
        let reply = HelloReply::Welcome(welcome);
        in_time(frame::write(stream, &reply)).await
    }
}

/// Why a connection did not begin with a Hello.
#[derive(Debug, thiserror::Error)]
enum BadHello {
    #[error("it ended before its Hello: {0}")]
    GivenUp(frame::FrameError),
    #[error("{0}")]
    NotOne(String),
}

async fn read_hello(stream: &mut impl Stream) -> Result<Hello, BadHello> {
    // No byte more: whoever takes the stream after the handshake has a reader of its own.
    let hello: Hello = match in_time(frame::read(stream)).await {
        Ok(hello) => hello,
        Err(error @ (frame::FrameError::Closed | frame::FrameError::Io(_))) => {
            return Err(BadHello::GivenUp(error));
        }
        Err(error) => return Err(BadHello::NotOne(error.to_string())),
    };
    match hello.check() {
        Ok(()) => Ok(hello),
        Err(reason) => Err(BadHello::NotOne(format!("{reason:?}"))),
    }
}

async fn reject(stream: &mut impl Stream, reason: RejectReason, message: &str) {
    let reply = HelloReply::Reject(Reject { reason, message: message.to_owned() });
    // The peer may be gone already; it is refused either way.
    let _ = in_time(frame::write(stream, &reply)).await;
}

async fn in_time<T>(
    step: impl Future<Output = Result<T, frame::FrameError>>,
) -> Result<T, frame::FrameError> {
    let late = || frame::FrameError::Io(std::io::ErrorKind::TimedOut.into());
    timeout(HELLO_DEADLINE, step).await.unwrap_or_else(|_| Err(late()))
}

fn cannot_accept(error: &std::io::Error) -> End {
    End::Lost(format!("the VM's control socket failed: {error}"))
}

/// Fresh random bytes.
fn random() -> [u8; TOKEN_LEN] {
    crate::random::bytes()
}

fn now_ms() -> Millis {
    crate::clock::now()
}
