//! One session, from its first frame to its last.
//!
//! What comes from the host, what the command writes, and the command's end are looked at together, so that no
//! one of them keeps another waiting. Whichever way a session ends, its processes end with it.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use kiln_protocol::exec::{
    Cause, Ended, Exec, HostToSession, MAX_CHUNK, Open, SessionToHost, Stream, Terminal,
};
use kiln_protocol::frame::{self, FrameError, FrameReader};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, split};
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::sync::{OnceCell, mpsc};
use tokio::time::timeout;

use super::copy;
use super::launch::{self, Io, Launched, Leader, Places, Refused, launch};
use super::processes;
use super::spot::spot;
use super::taken::Taken;
use super::target::Enterable;
use super::terminal::{END_OF_INPUT, Master};
use crate::runtime::Cgroup;

/// The host says at once what it wants.
const OPEN_WAIT: Duration = Duration::from_secs(10);

/// How long the container runtime may take to say which process it started, when that is to be ended.
const LEADER_WAIT: Duration = Duration::from_secs(10);

/// Frames that wait to be sent: with the two that are being made, what a slow host costs.
const WAITING_FRAMES: usize = 2;

/// A terminal gives no more at once.
const TERMINAL_PIECE: usize = 4096;

/// The most of one frame of output: with what a frame has beside it, one packet of the VM's vsock.
pub const PIECE: usize = MAX_CHUNK - 64;

/// Bytes that are read of a pipe after its command has ended: more than a pipe holds.
const LAST_BYTES: usize = 2 * 1024 * 1024;

/// Serves one session. Gives why it was cut off, if it was.
pub async fn serve<S>(stream: S, places: &Places, enterable: &Enterable) -> Result<(), FrameError>
where
    S: AsyncRead + AsyncWrite + Send,
{
    let (read, write) = split(stream);
    let mut frames = FrameReader::new(read);
    let late = |_| FrameError::Io(io::ErrorKind::TimedOut.into());
    let open = match timeout(OPEN_WAIT, frames.read()).await.map_err(late)?? {
        HostToSession::Open(open) => *open,
        _ => return Err(unexpected("the first frame does not open a session")),
    };
    let (frames_out, queue) = mpsc::channel(WAITING_FRAMES);
    let work = run(open, frames, frames_out, places, enterable);
    let (worked, sent) = tokio::join!(work, send(write, queue));
    worked.and(sent)
}

/// Sends what is queued until nobody is left to queue more.
async fn send<W>(mut write: W, mut queue: mpsc::Receiver<SessionToHost>) -> Result<(), FrameError>
where
    W: AsyncWrite + Unpin,
{
    while let Some(message) = queue.recv().await {
        frame::write(&mut write, &message).await?;
    }
    Ok(())
}

async fn run<R>(
    open: Open,
    frames: FrameReader<R>,
    host: mpsc::Sender<SessionToHost>,
    places: &Places,
    enterable: &Enterable,
) -> Result<(), FrameError>
where
    R: AsyncRead + Unpin,
{
    let ended = match (open.check(), open) {
        (Err(error), _) => Refused::new(Cause::Invalid, error.to_string()).into(),
        (Ok(()), Open::Exec(exec)) => match launch(places, enterable, &exec).await {
            Ok(launched) => exec_session(launched, &exec, frames, &host).await?,
            Err(refused) => refused.into(),
        },
        (Ok(()), Open::CopyOut(copy)) => match spot(places, enterable, &copy).await {
            Ok(spot) => copy::out(spot, frames, &host).await?,
            Err(refused) => refused.into(),
        },
        (Ok(()), Open::CopyIn(copy)) => match spot(places, enterable, &copy).await {
            Ok(spot) => copy::inward(spot, frames, &host).await?,
            Err(refused) => refused.into(),
        },
    };
    // A host that is gone needs no last word.
    let _ = host.send(SessionToHost::Ended(ended)).await;
    Ok(())
}

async fn exec_session<R>(
    launched: Launched,
    exec: &Exec,
    frames: FrameReader<R>,
    host: &mpsc::Sender<SessionToHost>,
) -> Result<Ended, FrameError>
where
    R: AsyncRead + Unpin,
{
    let Launched { mut child, leader, io, cgroup } = launched;
    let command = Command { leader, cgroup, io: OnceCell::new(), taken: Taken::default() };
    let done = {
        let (input, waiting) = mpsc::unbounded_channel();
        tokio::select! {
            ended = command.run(&mut child, io, exec.terminal, waiting, host) => Ok(ended),
            lost = command.listen(frames, input) => Err(lost),
            () = host.closed() => Err(FrameError::Closed),
        }
    };
    if done.is_err() {
        command.end(&mut child).await;
    }
    done
}

/// A command that runs.
struct Command {
    leader: Leader,
    /// Every process of the session is in it.
    cgroup: Cgroup,
    /// Its terminal, once there is one.
    io: OnceCell<Master>,
    /// Of its input.
    taken: Taken,
}

/// What is for the command to read.
enum Input {
    Bytes(Vec<u8>),
    End,
}

impl Command {
    /// To its end, and to that of its output.
    async fn run(
        &self,
        child: &mut Child,
        io: Io,
        size: Option<Terminal>,
        waiting: mpsc::UnboundedReceiver<Input>,
        host: &mpsc::Sender<SessionToHost>,
    ) -> Ended {
        // Who is gone is noticed elsewhere.
        let _ = host.send(SessionToHost::Started).await;
        let worked = match io {
            Io::Pipes { stdin, stdout, stderr } => {
                self.with_pipes(child, stdin, stdout, stderr, waiting, host).await
            }
            Io::Terminal(master) => self.with_terminal(child, master, waiting, host).await,
            Io::Coming(console) => {
                let early = tokio::select! {
                    biased;
                    master = launch::terminal(&console) => Ok(master),
                    status = child.wait() => Err(status),
                };
                match early {
                    Ok(Ok(master)) => {
                        // The runtime need not have given it the size.
                        let sized = size.map_or(Ok(()), |size| master.resize(size));
                        match sized {
                            Ok(()) => self.with_terminal(child, master, waiting, host).await,
                            Err(error) => Err(error),
                        }
                    }
                    Ok(Err(error)) => Err(error),
                    Err(status) => status,
                }
            }
        };
        match worked {
            Ok(status) => self.ended(status),
            Err(error) => {
                let why = format!("the agent could not follow the command: {error}");
                Refused::new(Cause::Internal, why).into()
            }
        }
    }

    async fn with_pipes(
        &self,
        child: &mut Child,
        stdin: pipe::Sender,
        stdout: pipe::Receiver,
        stderr: pipe::Receiver,
        waiting: mpsc::UnboundedReceiver<Input>,
        host: &mpsc::Sender<SessionToHost>,
    ) -> io::Result<ExitStatus> {
        let beside = async {
            tokio::join!(
                self.feed_pipe(stdin, waiting, host),
                pass_on(&stdout, Stream::Out, host),
                pass_on(&stderr, Stream::Err, host)
            );
            pending::<Infallible>().await
        };
        let status = tokio::select! {
            status = child.wait() => status?,
            never = beside => match never {},
        };
        self.end_rest().await;
        rest(&stdout, Stream::Out, host).await;
        rest(&stderr, Stream::Err, host).await;
        Ok(status)
    }

    async fn with_terminal(
        &self,
        child: &mut Child,
        master: Master,
        waiting: mpsc::UnboundedReceiver<Input>,
        host: &mpsc::Sender<SessionToHost>,
    ) -> io::Result<ExitStatus> {
        let master = self.io.get_or_init(|| async { master }).await;
        let beside = async {
            tokio::join!(
                self.feed_terminal(master, waiting, host),
                pass_on(master, Stream::Out, host)
            );
            pending::<Infallible>().await
        };
        let status = tokio::select! {
            status = child.wait() => status?,
            never = beside => match never {},
        };
        self.end_rest().await;
        rest(master, Stream::Out, host).await;
        Ok(status)
    }

    /// Writes input until there is no more, or the command reads no more. From then on it is thrown away.
    async fn feed_pipe(
        &self,
        stdin: pipe::Sender,
        mut waiting: mpsc::UnboundedReceiver<Input>,
        host: &mpsc::Sender<SessionToHost>,
    ) {
        let mut stdin = Some(stdin);
        while let Some(input) = waiting.recv().await {
            match input {
                Input::Bytes(bytes) => {
                    if let Some(pipe) = &mut stdin
                        && pipe.write_all(&bytes).await.is_err()
                    {
                        stdin = None;
                    }
                    self.took(bytes.len(), host).await;
                }
                Input::End => stdin = None,
            }
        }
    }

    async fn feed_terminal(
        &self,
        master: &Master,
        mut waiting: mpsc::UnboundedReceiver<Input>,
        host: &mpsc::Sender<SessionToHost>,
    ) {
        while let Some(input) = waiting.recv().await {
            // A terminal that nobody has any more takes nothing; the command's end is seen elsewhere.
            match input {
                Input::Bytes(bytes) => {
                    let _ = master.write_all(&bytes).await;
                    self.took(bytes.len(), host).await;
                }
                Input::End => drop(master.write_all(&[END_OF_INPUT]).await),
            }
        }
    }

    async fn took(&self, count: usize, host: &mpsc::Sender<SessionToHost>) {
        if let Some(total) = self.taken.more(count) {
            let _ = host.send(SessionToHost::InputTaken { total }).await;
        }
    }

    /// Takes what the host says, until it is gone or breaks the rules: why.
    async fn listen<R>(
        &self,
        mut frames: FrameReader<R>,
        input: mpsc::UnboundedSender<Input>,
    ) -> FrameError
    where
        R: AsyncRead + Unpin,
    {
        let mut sent = 0u64;
        let mut over = false;
        loop {
            let message = match frames.read::<HostToSession>().await {
                Ok(message) => message,
                Err(error) => return error,
            };
            match message {
                HostToSession::Input(bytes) => {
                    sent = sent.saturating_add(bytes.len() as u64);
                    if over || !self.taken.allows(sent) {
                        return unexpected("input that nobody may send");
                    }
                    // Nobody reads it when the command has ended, and then this does neither.
                    let _ = input.send(Input::Bytes(bytes));
                }
                HostToSession::InputEnd => {
                    over = true;
                    let _ = input.send(Input::End);
                }
                HostToSession::Resize(size) => {
                    if let Some(Err(error)) = self.io.get().map(|master| master.resize(size)) {
                        tracing::warn!(%error, "a terminal was not resized");
                    }
                }
                HostToSession::Signal(number) => {
                    let Ok(signal) = Signal::try_from(i32::from(number)) else {
                        return unexpected("a signal that there is not");
                    };
                    if let Ok(leader) = self.leader.pid().await {
                        processes::signal(leader, signal);
                    }
                }
                HostToSession::Open(_) => return unexpected("a second command"),
            }
        }
    }

    /// Ends everything: nobody wants it any more.
    async fn end(&self, child: &mut Child) {
        let leader = tokio::select! {
            // It is over, and may have left others.
            _ = child.wait() => self.known_leader().await,
            leader = timeout(LEADER_WAIT, self.leader.pid()) => leader.ok().and_then(Result::ok),
        };
        self.end_all(leader).await;
        // The runtime ends with the command.
        let _ = child.start_kill();
        let _ = child.wait().await;
    }

    /// Ends what the command left behind.
    async fn end_rest(&self) {
        let leader = self.known_leader().await;
        self.end_all(leader).await;
    }

    /// The command's process, if it is known by now.
    async fn known_leader(&self) -> Option<Pid> {
        tokio::select! {
            biased;
            leader = self.leader.pid() => leader.ok(),
            () = std::future::ready(()) => None,
        }
    }

    async fn end_all(&self, leader: Option<Pid>) {
        let cgroup = self.cgroup.clone();
        // It reads all of /proc, and waits.
        let _ = tokio::task::spawn_blocking(move || processes::end(leader, &cgroup)).await;
    }

    fn ended(&self, status: ExitStatus) -> Ended {
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
        let code = code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX);
        match self.leader.complaint() {
            Some(words) if code != 0 => {
                let cause = cause_of(&words);
                Ended::from(Refused::new(cause, words))
            }
            _ => Ended::Exited { code },
        }
    }
}

/// What the container runtime's words mean.
fn cause_of(words: &str) -> Cause {
    let lower = words.to_lowercase();
    if lower.contains("executable file") && lower.contains("not found") {
        Cause::NotFound
    } else if lower.contains("permission denied")
        || lower.contains("not executable")
        || lower.contains("exec format error")
    {
        Cause::NotExecutable
    } else if lower.contains("chdir") {
        Cause::Invalid
    } else if lower.contains("not running") || lower.contains("does not exist") {
        Cause::NoStep
    } else if lower.contains("no such file or directory") {
        Cause::NotFound
    } else {
        Cause::Internal
    }
}

/// Sends on what the command writes, until nobody has the other end any more. It may be dropped at any time: what
/// was read has been handed on.
async fn pass_on(from: &impl Output, stream: Stream, host: &mpsc::Sender<SessionToHost>) {
    while from.readable().await.is_ok() {
        // A host that is gone is noticed elsewhere.
        let Ok(place) = host.reserve().await else { return };
        match from.try_read() {
            Ok(Some(bytes)) if !bytes.is_empty() => {
                place.send(SessionToHost::Output { stream, bytes });
            }
            Ok(Some(_)) | Err(_) => return,
            Ok(None) => {}
        }
    }
}

/// What was written before the command's end: it is there, and need not be waited for.
async fn rest(from: &impl Output, stream: Stream, host: &mpsc::Sender<SessionToHost>) {
    let mut left = LAST_BYTES;
    while left > 0 {
        let Ok(Some(bytes)) = from.try_read() else { return };
        if bytes.is_empty() {
            return;
        }
        left = left.saturating_sub(bytes.len());
        let _ = host.send(SessionToHost::Output { stream, bytes }).await;
    }
}

/// Our end of what a command writes to.
trait Output {
    /// Waits until there may be something.
    async fn readable(&self) -> io::Result<()>;
    /// Reads what is there, up to a frame's content: `None` when nothing is, no bytes at the end.
    fn try_read(&self) -> io::Result<Option<Vec<u8>>>;
}

impl Output for pipe::Receiver {
    async fn readable(&self) -> io::Result<()> {
        self.readable().await
    }

    fn try_read(&self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = Vec::with_capacity(PIECE);
        match self.try_read_buf(&mut bytes) {
            Ok(_) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Output for Master {
    async fn readable(&self) -> io::Result<()> {
        self.readable().await
    }

    fn try_read(&self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; TERMINAL_PIECE];
        let read = self.try_read(&mut bytes)?;
        Ok(read.map(|count| {
            bytes.truncate(count);
            bytes
        }))
    }
}

/// The host says what it may not.
pub fn unexpected(what: &'static str) -> FrameError {
    FrameError::Io(io::Error::new(io::ErrorKind::InvalidData, what))
}
