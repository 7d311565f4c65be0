//! One control connection: dialling with a deadline, Hello and Welcome, then frames both ways.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::frame::{self, FrameError, FrameReader};
use kiln_protocol::hello::{Hello, HelloReply, MAGIC, Reject, Resume, Welcome};
use kiln_protocol::message::{AgentToHost, HostToAgent};
use kiln_protocol::port;
use kiln_protocol::version::{Features, SUPPORTED, Version};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep_until, timeout};

use crate::events::Frame;
use crate::vsock::Connector;

/// How long the host may stay out of reach, at the start and whenever the connection breaks. A
/// host process that is restarted is back within seconds.
pub const DIAL_DEADLINE: Duration = Duration::from_secs(30);

/// How long one attempt may take: far more than a busy host needs, and several fit the deadline.
const ATTEMPT: Duration = Duration::from_secs(10);

/// The pause after a first refusal, and the longest one. A device that has just come up refuses
/// for milliseconds; a host that is restarted, for seconds.
const PAUSE: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(5)..=Duration::from_millis(500);

/// How long one dial may take, at first and at most. The vsock device can lose a dial that it gets
/// while it is being set up (measured: 16 of 42 boots on a busy host); the next one gets through.
const CONNECT: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(200)..=Duration::from_secs(2);

/// Bytes that are made ready for one write. More would only wait here, and not where it is bounded.
pub const OUT_BATCH: usize = 64 * 1024;

/// Who the agent says it is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The agent and its version.
    pub agent: String,
    /// The builder image, as its initrd states it.
    pub image: String,
}

/// A connection that did not come about.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The host does not want this agent.
    #[error("the host refuses this VM ({:?}): {}", .0.reason, .0.message)]
    Rejected(Reject),
    /// The host answered with a version that this agent did not offer.
    #[error("the host speaks {0}, this agent {SUPPORTED}")]
    Version(Version),
    /// Nobody answered in time.
    #[error("the host was out of reach for {} s", DIAL_DEADLINE.as_secs())]
    OutOfReach(#[source] AttemptError),
}

/// What became of one attempt.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// vsock said no.
    #[error("the control port cannot be dialled")]
    Connect(#[source] std::io::Error),
    /// The connection broke before Welcome.
    #[error("the connection broke before Welcome")]
    Frame(#[from] FrameError),
    /// No answer.
    #[error("no answer within {} s", ATTEMPT.as_secs())]
    Late,
}

/// An open control connection.
#[derive(Debug)]
pub struct Link<S> {
    reader: FrameReader<ReadHalf<S>>,
    writer: WriteHalf<S>,
    out: Out,
}

/// Bytes on their way out. The writer is a socket, which has no buffer to be flushed.
#[derive(Debug, Default)]
struct Out {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that have left.
    written: usize,
    /// Bytes that have not.
    left: usize,
    /// Room for the next that are copied.
    spare: Vec<u8>,
}

#[derive(Debug)]
enum Piece {
    /// Messages and short frames, one behind the other.
    Copied(Vec<u8>),
    /// The content of a long one.
    Shared(Arc<Vec<u8>>),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Copied(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

/// Most pieces of one write: as many frames with long content as are made ready at one time, and their heads.
const MAX_PIECES: usize = 32;

impl Out {
    fn copy(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.left += bytes.len();
        if let Some(Piece::Copied(last)) = self.pieces.back_mut() {
            last.extend_from_slice(bytes);
            return;
        }
        let mut piece = std::mem::take(&mut self.spare);
        piece.extend_from_slice(bytes);
        self.pieces.push_back(Piece::Copied(piece));
    }

    fn share(&mut self, bytes: Arc<Vec<u8>>) {
        if bytes.is_empty() {
            return;
        }
        self.left += bytes.len();
        self.pieces.push_back(Piece::Shared(bytes));
    }

    /// What is to be written next, and how many slices that is.
    fn slices(&self) -> ([IoSlice<'_>; MAX_PIECES], usize) {
        let mut slices = [IoSlice::new(&[]); MAX_PIECES];
        let mut from = self.written;
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = IoSlice::new(&piece.bytes()[std::mem::take(&mut from)..]);
        }
        (slices, self.pieces.len().min(MAX_PIECES))
    }

    fn wrote(&mut self, len: usize) {
        self.left -= len;
        self.written += len;
        while let Some(first) = self.pieces.front_mut() {
            let size = first.bytes().len();
            if self.written < size {
                if let Piece::Copied(bytes) = first {
                    // More may be copied behind it: it would never be done.
                    bytes.drain(..std::mem::take(&mut self.written));
                }
                break;
            }
            self.written -= size;
            if let Some(Piece::Copied(mut bytes)) = self.pieces.pop_front() {
                bytes.clear();
                self.spare = bytes;
            }
        }
    }
}

/// Something that the connection did.
#[derive(Debug)]
pub enum Moved {
    /// A frame arrived.
    Frame(HostToAgent),
    /// Bytes went out.
    Wrote,
}

/// Dials until the host welcomes the agent, refuses it for good, or the deadline passes.
pub async fn dial<C: Connector>(
    connector: Arc<C>,
    identity: Identity,
    resume: Option<Resume>,
) -> Result<(Link<C::Stream>, Welcome), DialError> {
    let hello = Hello {
        magic: MAGIC,
        versions: SUPPORTED,
        features: Features::RESUME,
        agent: identity.agent,
        image: identity.image,
        resume,
    };
    let deadline = Instant::now() + DIAL_DEADLINE;
    let (mut pause, mut patience) = (*PAUSE.start(), *CONNECT.start());
    loop {
        let error = match timeout(ATTEMPT, attempt(&*connector, &hello, patience)).await {
            Ok(Ok((link, HelloReply::Welcome(welcome)))) => {
                let known = SUPPORTED.min <= welcome.version && welcome.version <= SUPPORTED.max;
                return if known {
                    Ok((link, welcome))
                } else {
                    Err(DialError::Version(welcome.version))
                };
            }
            Ok(Ok((_, HelloReply::Reject(reject)))) => return Err(DialError::Rejected(reject)),
            Ok(Err(error)) => error,
            Err(_) => AttemptError::Late,
        };
        let again = Instant::now() + pause;
        if again >= deadline {
            return Err(DialError::OutOfReach(error));
        }
        sleep_until(again).await;
        pause = (pause * 2).min(*PAUSE.end());
        patience = (patience * 2).min(*CONNECT.end());
    }
}

async fn attempt<C: Connector>(
    connector: &C,
    hello: &Hello,
    patience: Duration,
) -> Result<(Link<C::Stream>, HelloReply), AttemptError> {
    let lost = |_| AttemptError::Connect(std::io::ErrorKind::TimedOut.into());
    let dialled = timeout(patience, connector.connect(port::CONTROL)).await.map_err(lost)?;
    let stream = dialled.map_err(AttemptError::Connect)?;
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = FrameReader::new(reader);
    frame::write(&mut writer, hello).await?;
    let reply = reader.read().await?;
    Ok((Link { reader, writer, out: Out::default() }, reply))
}

impl<S: AsyncRead + AsyncWrite> Link<S> {
    /// Whether there is room to make more ready.
    pub fn has_room(&self) -> bool {
        self.out.left < OUT_BATCH
    }

    /// Makes a message ready to go out.
    pub fn send(&mut self, message: &AgentToHost) -> Result<(), FrameError> {
        self.out.copy(&frame::encode(message)?);
        Ok(())
    }

    /// Makes an event ready to go out.
    pub fn send_frame(&mut self, frame: &Frame) {
        self.out.copy(&frame.before);
        if let Some(content) = &frame.content {
            self.out.share(Arc::clone(content));
        }
        self.out.copy(&frame.behind);
    }

    /// Reads and writes until one of them got on. It may be dropped at any point.
    pub async fn moved(&mut self) -> Result<Moved, FrameError> {
        let Self { reader, writer, out } = self;
        let (slices, count) = out.slices();
        let wrote = tokio::select! {
            biased;
            frame = reader.read() => return Ok(Moved::Frame(frame?)),
            wrote = writer.write_vectored(&slices[..count]), if count > 0 => wrote,
        };
        match wrote.map_err(FrameError::Io)? {
            0 => Err(FrameError::Io(std::io::ErrorKind::WriteZero.into())),
            len => {
                out.wrote(len);
                Ok(Moved::Wrote)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_goes_out_is_whole_and_in_order(
            steps in proptest::collection::vec((any::<bool>(), 0..6000_usize, 0..20_000_usize), 1..80),
        ) {
            let (mut out, mut ready, mut gone) = (Out::default(), vec![], vec![]);
            let mut write = |out: &mut Out, most: usize| {
                let (slices, count) = out.slices();
                let next: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
                let len = next.len().min(most);
                gone.extend_from_slice(&next[..len]);
                out.wrote(len);
                len
            };
            for (at, (shared, len, most)) in steps.into_iter().enumerate() {
                let bytes = vec![u8::try_from(at % 251).unwrap(); len];
                ready.extend_from_slice(&bytes);
                if shared { out.share(Arc::new(bytes)) } else { out.copy(&bytes) }
                write(&mut out, most);
            }
            while write(&mut out, 1000) > 0 {}
            prop_assert_eq!(out.left, 0);
            prop_assert!(out.pieces.is_empty());
            prop_assert!(gone == ready);
        }
    }

    #[test]
    fn what_was_written_of_a_piece_that_grows_is_given_back() {
        let mut out = Out::default();
        for _ in 0..1000 {
            out.copy(&[7; 1000]);
            out.wrote(out.left - 1);
        }
        assert!(out.pieces.len() == 1 && out.slices().0[0].len() == 1);
        assert!(out.pieces[0].bytes().len() == 1);
    }
}
