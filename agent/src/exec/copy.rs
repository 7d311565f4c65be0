//! Sessions that copy files: an archive out of the VM, or one into it.
//!
//! ```text
//! out:    a thread packs ──▶ Output ──▶ host, and last, on the other stream, what was left out
//! inward: host ──▶ Input ──▶ pieces ──▶ a thread unpacks ──▶ InputTaken ──▶ host
//! ```
//! The threads look at a flag that is set when the session is over, whichever way, and their queues are bounded: by the
//! frames that wait to be sent, and by the window.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_archive::{ArchiveError, LandError, Landing, Limits, Packing, land, unpack};
use kiln_protocol::exec::{Cause, Ended, HostToSession, SessionToHost, Stream};
use kiln_protocol::frame::{FrameError, FrameReader};
use tokio::io::AsyncRead;
use tokio::sync::mpsc;
use tokio::task::{JoinError, spawn_blocking};

use super::launch::Refused;
use super::session::{PIECE, unexpected};
use super::spot::Spot;
use super::taken::Taken;

type Host = mpsc::Sender<SessionToHost>;

/// Sends what is at the spot.
pub async fn out<R>(spot: Spot, frames: FrameReader<R>, host: &Host) -> Result<Ended, FrameError>
where
    R: AsyncRead + Unpin,
{
    let over = Over::default();
    let (stop, to) = (over.flag(), host.clone());
    let work = spawn_blocking(move || {
        let packing = Packing::find(&spot.path, |path| spot.open(path))
            .map_err(|error| not_found(&spot, &error))?;
        pack(packing, &to, &stop).map_err(|error| failed(&error))
    });
    tokio::select! {
        done = work => Ok(ended(done)),
        lost = listen(frames, None) => Err(lost),
        () = host.closed() => Err(FrameError::Closed),
    }
}

fn pack(packing: Packing, host: &Host, stop: &AtomicBool) -> io::Result<()> {
    send(host, SessionToHost::Started)?;
    let out = Chunks { host: host.clone(), buffer: Vec::with_capacity(PIECE) };
    let left_out = packing.pack(out, &|| stop.load(Ordering::Relaxed))?;
    if left_out.is_empty() {
        return Ok(());
    }
    let bytes = left_out.to_string().into_bytes();
    send(host, SessionToHost::Output { stream: Stream::Err, bytes })
}

/// Unpacks what the host sends at the spot.
pub async fn inward<R>(spot: Spot, frames: FrameReader<R>, host: &Host) -> Result<Ended, FrameError>
where
    R: AsyncRead + Unpin,
{
    let over = Over::default();
    let (stop, to) = (over.flag(), host.clone());
    let taken = Arc::<Taken>::default();
    let (pieces, waiting) = mpsc::unbounded_channel();
    let incoming = Incoming { pieces: waiting, current: vec![], at: 0, end: false };
    let incoming = Counted { incoming, taken: taken.clone(), host: host.clone() };
    let work = spawn_blocking(move || {
        let landing: Landing =
            land(&spot.path, |path| spot.open(path)).map_err(|error| no_landing(&error))?;
        send(&to, SessionToHost::Started).map_err(|error| failed(&error))?;
        let tree = landing.tree(spot.owner);
        unpack(incoming, tree, Limits::NONE, &|| stop.load(Ordering::Relaxed))
            .map_err(|error| not_unpacked(&error))
    });
    tokio::select! {
        done = work => Ok(ended(done)),
        lost = listen(frames, Some((pieces, &taken))) => Err(lost),
        () = host.closed() => Err(FrameError::Closed),
    }
}

/// Takes what the host says, until it is gone or breaks the rules: why. Input is taken where there is somebody to read it.
async fn listen<R>(
    mut frames: FrameReader<R>,
    mut input: Option<(mpsc::UnboundedSender<Piece>, &Taken)>,
) -> FrameError
where
    R: AsyncRead + Unpin,
{
    let (mut sent, mut over) = (0u64, false);
    loop {
        let message = match frames.read::<HostToSession>().await {
            Ok(message) => message,
            Err(error) => return error,
        };
        match (message, &mut input) {
            (HostToSession::Input(bytes), Some((pieces, taken))) => {
                sent = sent.saturating_add(bytes.len() as u64);
                if over || !taken.allows(sent) {
                    return unexpected("input that nobody may send");
                }
                // Nobody reads it when the thread has ended, and then this does neither.
                let _ = pieces.send(Piece::Bytes(bytes));
            }
            (HostToSession::InputEnd, Some((pieces, _))) => {
                over = true;
                let _ = pieces.send(Piece::End);
            }
            (HostToSession::Input(_), None) => return unexpected("input for a copy out"),
            (HostToSession::Open(_), _) => return unexpected("a second session"),
            // A copy has no terminal and no process.
            (HostToSession::InputEnd, None)
            | (HostToSession::Resize(_) | HostToSession::Signal(_), _) => {}
        }
    }
}

fn ended(done: Result<Result<(), Refused>, JoinError>) -> Ended {
    match done {
        Ok(Ok(())) => Ended::Exited { code: 0 },
        Ok(Err(refused)) => refused.into(),
        Err(error) => failed(&error).into(),
    }
}

fn failed(error: &dyn std::fmt::Display) -> Refused {
    Refused::new(Cause::Internal, format!("the copy failed: {error}"))
}

fn not_found(spot: &Spot, error: &io::Error) -> Refused {
    let path = &spot.path;
    match error.kind() {
        ErrorKind::NotFound => {
            Refused::new(Cause::NotFound, format!("there is nothing at {}", path.display()))
        }
        ErrorKind::NotADirectory => Refused::new(
            Cause::NotFound,
            format!("{} goes through what is no directory", path.display()),
        ),
        _ => Refused::new(Cause::Invalid, format!("{} cannot be copied: {error}", path.display())),
    }
}

fn no_landing(error: &LandError) -> Refused {
    match error {
        LandError::Missing(_) => Refused::new(Cause::NotFound, error.to_string()),
        LandError::Open { cause, .. } => Refused::new(Cause::Invalid, format!("{error}: {cause}")),
    }
}

fn not_unpacked(error: &ArchiveError) -> Refused {
    let cause = match error {
        ArchiveError::Stopped | ArchiveError::Disk { .. } => Cause::Internal,
        _ => Cause::Invalid,
    };
    Refused::new(cause, error.to_string())
}

/// Says that the session is over, by being dropped.
#[derive(Default)]
struct Over(Arc<AtomicBool>);

impl Over {
    fn flag(&self) -> Arc<AtomicBool> {
        self.0.clone()
    }
}

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn send(host: &Host, message: SessionToHost) -> io::Result<()> {
    host.blocking_send(message).map_err(|_| ErrorKind::BrokenPipe.into())
}

/// Collects what is written into frames, and waits while the host does not take them.
struct Chunks {
    host: Host,
    buffer: Vec<u8>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == PIECE {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE));
        send(&self.host, SessionToHost::Output { stream: Stream::Out, bytes })
    }
}

/// What is on its way to the thread.
enum Piece {
    Bytes(Vec<u8>),
    End,
}

/// Gives the thread what the host sent.
struct Incoming {
    pieces: mpsc::UnboundedReceiver<Piece>,
    current: Vec<u8>,
    at: usize,
    end: bool,
}

impl Read for Incoming {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() && !self.end {
            match self.pieces.blocking_recv() {
                Some(Piece::Bytes(bytes)) => (self.current, self.at) = (bytes, 0),
                Some(Piece::End) => self.end = true,
                None => return Err(io::Error::other("the session ended before the archive did")),
            }
        }
        let len = into.len().min(self.current.len() - self.at);
        into[..len].copy_from_slice(&self.current[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

/// Tells the host how much has been taken.
struct Counted {
    incoming: Incoming,
    taken: Arc<Taken>,
    host: Host,
}

impl Read for Counted {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.incoming.read(into)?;
        if let Some(total) = self.taken.more(len) {
            send(&self.host, SessionToHost::InputTaken { total })?;
        }
        Ok(len)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
