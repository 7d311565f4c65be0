//! A VM's agent as the host meets it: the other end of each dial, speaking the protocol of sessions, or not.

#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use async_trait::async_trait;
use kiln::exec::{Dial, Entrance};
use kiln::vmm::DialError;
use kiln_protocol::exec::{Cause, Ended, Exec, HostToSession, Open, SessionToHost, Stream};
use kiln_protocol::frame::{self, FrameError, FrameReader};
use kiln_protocol::hello::TOKEN_LEN;
use kiln_protocol::preamble::{self, Channel, Preamble};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, mpsc};

pub const NONCE: [u8; TOKEN_LEN] = [9; TOKEN_LEN];

/// A VM: whoever dials it is met by the next agent.
pub struct Vm {
    dialled: Mutex<mpsc::UnboundedReceiver<UnixStream>>,
    dial: mpsc::UnboundedSender<UnixStream>,
}

pub struct Line(mpsc::UnboundedSender<UnixStream>);

#[async_trait]
impl Dial for Line {
    async fn dial(&self) -> Result<kiln::exec::Line, DialError> {
        let (near, far) = UnixStream::pair().unwrap();
        self.0.send(far).map_err(|_| DialError::Nobody(5002))?;
        Ok(kiln::exec::Line { stream: near, hold: None })
    }
}

impl Vm {
    pub fn new() -> Self {
        let (dial, dialled) = mpsc::unbounded_channel();
        Self { dialled: Mutex::new(dialled), dial }
    }

    pub fn entrance(&self) -> Entrance {
        Entrance::new(self.line(), NONCE)
    }

    pub fn line(&self) -> Line {
        Line(self.dial.clone())
    }

    /// The agent's end of the next dial, before anything is read.
    pub async fn stream(&self) -> UnixStream {
        self.dialled.lock().await.recv().await.unwrap()
    }

    /// The next session, and what it is to run.
    pub async fn session(&self) -> (Agent, Exec) {
        let (agent, open) = self.opened().await;
        let Open::Exec(exec) = open else { panic!("no command") };
        (agent, exec)
    }

    /// The next session, and what it is for.
    pub async fn opened(&self) -> (Agent, Open) {
        let mut stream = self.stream().await;
        let mut bytes = [0; preamble::LEN];
        stream.read_exact(&mut bytes).await.unwrap();
        let expected = Preamble::new(Channel::Exec, NONCE);
        assert_eq!(Preamble::decode(&bytes).unwrap(), expected);
        let (reader, writer) = stream.into_split();
        let mut agent = Agent { reader: FrameReader::new(reader), writer, taken: 0 };
        let HostToSession::Open(open) = agent.hear().await.unwrap() else { panic!("no Open") };
        (agent, *open)
    }

    /// The next session, which has started.
    pub async fn started(&self) -> (Agent, Exec) {
        let (mut agent, exec) = self.session().await;
        agent.say(SessionToHost::Started).await;
        (agent, exec)
    }
}

/// The agent's side of one session.
pub struct Agent {
    pub reader: FrameReader<OwnedReadHalf>,
    pub writer: OwnedWriteHalf,
    /// Bytes of input so far.
    taken: u64,
}

impl Agent {
    pub async fn say(&mut self, message: SessionToHost) {
        frame::write(&mut self.writer, &message).await.unwrap();
    }

    pub async fn print(&mut self, stream: Stream, bytes: &[u8]) {
        self.say(SessionToHost::Output { stream, bytes: bytes.to_vec() }).await;
    }

    pub async fn exit(&mut self, code: u8) {
        self.say(SessionToHost::Ended(Ended::Exited { code })).await;
    }

    pub async fn fail(&mut self, cause: Cause, why: &str) {
        self.say(SessionToHost::Ended(Ended::Failed { cause, why: why.into() })).await;
    }

    pub async fn hear(&mut self) -> Result<HostToSession, FrameError> {
        self.reader.read().await
    }

    /// The next of the input, which is taken; `None` at its end.
    pub async fn input(&mut self) -> Option<Vec<u8>> {
        match self.hear().await.unwrap() {
            HostToSession::Input(bytes) => {
                self.taken += bytes.len() as u64;
                self.say(SessionToHost::InputTaken { total: self.taken }).await;
                Some(bytes)
            }
            HostToSession::InputEnd => None,
            other => panic!("no input but {other:?}"),
        }
    }

    /// Waits for the host to hang up, whatever it says until then.
    pub async fn hung_up(&mut self) {
        while self.hear().await.is_ok() {}
    }

    /// As `cat`: gives back what it gets, then exits.
    pub async fn cat(&mut self) {
        while let Some(bytes) = self.input().await {
            self.print(Stream::Out, &bytes).await;
        }
        self.exit(0).await;
    }
}
