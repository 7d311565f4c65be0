//! The agent's side: takes what wrappers announce, reads the steps' pipes, reports.
//!
//! Every step is a task of its own: `Started`, its lines, `Ended`, in this order; only then does
//! its monitor get its acknowledgement and the engine learn that the step is over.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kiln_protocol::event::{Event, Log, LogStream, Step, StepEnd, StepState, cut_text};
use kiln_protocol::job::StepNetwork;
use nix::sys::statvfs::statvfs;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Interest};
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::cgroup::{Cgroup, Usage};
use super::config::StepPolicy;
use super::current::CurrentStep;
use super::lines::report_lines;
use super::secrets::StepSecret;
use super::stay::stay;
use super::sys;
use super::tail::{Begun, Tail};
use super::wire::{self, ACK, FromWrapper, HELLO, MAX_LINE, WireError};
use crate::events::{Report, Reporter};
use crate::exec::{Enterable, Target};

/// A wrapper that connected has all it wants to say at hand.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What holds for all steps of a build.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What steps may reach.
    pub network: StepNetwork,
    /// Certificates that they trust, where they are not their image's own.
    pub certificates: Option<PathBuf>,
    /// What they may mount, or have as a variable.
    pub secrets: Vec<StepSecret>,
    /// Where copies of what they mount go: memory.
    pub mounted_secrets: PathBuf,
    /// Their network namespace.
    pub netns: PathBuf,
    /// The most processes of a step.
    pub processes: u32,
    /// The most memory of a step, in bytes.
    pub memory: Option<u64>,
    /// Where the cgroup hierarchy (version 2) is mounted.
    pub cgroup_mount: PathBuf,
    /// The cgroup, from the hierarchy's root, that holds one for each step.
    pub steps_cgroup: PathBuf,
    /// What can be entered: each step while it runs.
    pub enterable: Enterable,
    /// Which step runs.
    pub current: CurrentStep,
    /// Whether a step that fails stays.
    pub keep_failed: bool,
    /// Ends the processes of the step that runs.
    pub end_step: CancellationToken,
    /// The one that stays, once there is one.
    pub held: watch::Sender<Option<StepRecord>>,
    /// A directory on the disk that steps write to.
    pub scratch: PathBuf,
}

/// A step that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepRecord {
    /// Its number.
    pub index: u32,
    /// Its command.
    pub name: String,
    /// Whether its command ran at all.
    pub started: bool,
    /// Its exit code; where it did not start, what a shell would have given.
    pub exit_code: i32,
    /// What it used.
    pub usage: Usage,
    /// Bytes that were free on the disk when it ended.
    pub disk_free: Option<u64>,
    /// The last line of its stderr.
    pub last_words: String,
    /// Its last lines, of both streams.
    pub tail: String,
}

/// Listens for wrappers.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
}

impl Server {
    /// Listens at the path. Only this user can connect.
    pub fn bind(socket: &Path) -> io::Result<Self> {
        match fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener })
    }

    /// Serves until `stop`, then until the steps that began are over. Gives them in order.
    pub async fn run(
        self,
        settings: Settings,
        reporter: Reporter,
        stop: CancellationToken,
    ) -> Vec<StepRecord> {
        let settings = Arc::new(settings);
        let counter = Arc::new(AtomicU32::new(0));
        let mut steps = JoinSet::new();
        let mut records = Vec::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let served = serve(stream, Arc::clone(&settings), Arc::clone(&counter), reporter.clone());
                        steps.spawn(served);
                    }
                    Err(error) => {
                        tracing::error!(%error, "runtime wrappers can no longer connect");
                        break;
                    }
                },
                Some(done) = steps.join_next() => records.extend(done.ok().flatten()),
                () = stop.cancelled() => break,
            }
        }
        drop(self.listener);
        while let Some(done) = steps.join_next().await {
            records.extend(done.ok().flatten());
        }
        records.sort_by_key(|record: &StepRecord| record.index);
        records
    }
}

async fn serve(
    stream: UnixStream,
    settings: Arc<Settings>,
    counter: Arc<AtomicU32>,
    reporter: Reporter,
) -> Option<StepRecord> {
    let announced = match timeout(HANDSHAKE, Announced::receive(stream)).await {
        Ok(Ok(announced)) => announced,
        Ok(Err(error)) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "a runtime wrapper failed");
            return None;
        }
        Err(_) => {
            tracing::warn!("a runtime wrapper connected and said nothing");
            return None;
        }
    };
    let index = counter.fetch_add(1, Ordering::Relaxed) + 1;
    Some(announced.follow(index, &settings, &reporter).await)
}

/// A step that a wrapper announced.
struct Announced {
    wrapper: BufReader<UnixStream>,
    name: String,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
}

impl Announced {
    async fn receive(stream: UnixStream) -> Result<Self, WireError> {
        // The socket's mode says so already; a container must not get here by any mistake.
        if stream.peer_cred()?.uid() != nix::unistd::geteuid().as_raw() {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied).into());
        }
        let hello =
            stream.async_io(Interest::READABLE, || sys::receive_with_pipes(&stream)).await?;
        let (Some(HELLO), pipes) = hello else { return Err(WireError::NoPipes) };
        let [stdout, stderr] = <[_; 2]>::try_from(pipes).map_err(|_| WireError::NoPipes)?;
        let (stdout, stderr) =
            (pipe::Receiver::from_owned_fd(stdout)?, pipe::Receiver::from_owned_fd(stderr)?);
        let mut wrapper = BufReader::new(stream);
        match read_message(&mut wrapper).await? {
            FromWrapper::Create { name } => {
                Ok(Self { wrapper, name: cut_text(&name), stdout, stderr })
            }
            _ => Err(WireError::NoPipes),
        }
    }

    async fn follow(mut self, index: u32, settings: &Settings, reporter: &Reporter) -> StepRecord {
        let step =
            |state| Report::Event(Event::Step(Step { index, name: self.name.clone(), state }));
        let cgroup_path = settings.steps_cgroup.join(index.to_string());
        let cgroup = Cgroup::new(&settings.cgroup_mount, &cgroup_path);
        let begun = Instant::now();
        let running = settings.current.begin(index);
        reporter.report(step(StepState::Started)).await;

        let policy = StepPolicy {
            certificates: settings.certificates.clone(),
            secrets: settings.secrets.clone(),
            mounted_secrets: settings.mounted_secrets.clone(),
            network: settings.network,
            netns: settings.netns.clone(),
            cgroup: cgroup_path,
            processes: settings.processes,
            memory: settings.memory,
        };
        let mut last_words = String::new();
        let tail = Tail::default();
        let (mut begun_out, mut begun_err) = (Begun::default(), Begun::default());
        let mut words = Begun::default();
        let wrapper = &mut self.wrapper;
        let (ended, (), ()) = tokio::join!(
            async {
                let exchanged = exchange(wrapper, &policy, &settings.enterable);
                let ended = killed_at(exchanged, &settings.end_step, &cgroup).await;
                if ended.is_err() {
                    // Its monitor is gone, so nobody waits for the step: it ends here, or its
                    // pipes would never.
                    cgroup.kill();
                }
                ended
            },
            report_lines(self.stdout, LogStream::Stdout, Some(index), reporter, |part| {
                tail.see(&mut begun_out, part);
            }),
            report_lines(self.stderr, LogStream::Stderr, Some(index), reporter, |part| {
                tail.see(&mut begun_err, part);
                if let Some(line) = words.take(part).filter(|line| !line.is_empty()) {
                    last_words = line;
                }
            }),
        );

        drop(running);
        let is_watched = matches!(ended, Ok(FromWrapper::Ended { .. }));
        let (started, exit_code) = match ended {
            Ok(FromWrapper::Ended { code }) => (true, code),
            Ok(FromWrapper::NotStarted { message }) => {
                if let Some(message) = message {
                    last_words = cut_text(&message);
                    let content = last_words.clone().into_bytes();
                    let log =
                        Log { stream: LogStream::Kiln, step: Some(index), partial: false, content };
                    reporter.report(Report::Event(Event::Log(log))).await;
                }
                (false, not_started_code(&last_words))
            }
            Ok(_) | Err(_) => (true, KILLED),
        };
        let is_held = is_watched && exit_code != 0;
        let usage = cgroup.usage();
        let end = StepEnd {
            exit_code,
            duration_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            memory_peak_bytes: usage.memory_peak,
            oom_kills: usage.oom_kills,
        };
        reporter.report(step(StepState::Ended(end))).await;
        let record = StepRecord {
            index,
            name: self.name,
            started,
            exit_code,
            usage,
            disk_free: free_bytes(&settings.scratch),
            last_words,
            tail: tail.text(),
        };
        if settings.keep_failed && is_held {
            stay(&mut self.wrapper, settings, &record).await;
        }
        // A monitor that is gone waits for nothing.
        let _ = self.wrapper.write_all(&[ACK]).await;
        record
    }
}

/// What SIGKILL leaves: the exit code of a step whose monitor was killed.
const KILLED: i32 = 128 + 9;

/// Waits for a step's end, and kills its processes when it is to end; its monitor then tells of it as ever.
async fn killed_at<T>(
    ended: impl Future<Output = T>,
    end: &CancellationToken,
    cgroup: &Cgroup,
) -> T {
    tokio::pin!(ended);
    tokio::select! {
        biased;
        ended = &mut ended => return ended,
        () = end.cancelled() => cgroup.kill(),
    }
    ended.await
}

/// Gives the wrapper its policy and waits for its last message. While the step runs, it can be entered.
async fn exchange(
    wrapper: &mut BufReader<UnixStream>,
    policy: &StepPolicy,
    enterable: &Enterable,
) -> Result<FromWrapper, WireError> {
    wrapper.write_all(&wire::encode(policy)?).await?;
    let first = read_message(wrapper).await?;
    let FromWrapper::Created { id, config, secrets } = first else { return Ok(first) };
    let cgroup = policy.cgroup.clone();
    enterable.open(Target { id: id.clone(), root: None, config, cgroup, secrets });
    let last = read_message(wrapper).await;
    enterable.close(&id);
    last
}

pub(super) async fn read_message(
    wrapper: &mut BufReader<UnixStream>,
) -> Result<FromWrapper, WireError> {
    let mut line = Vec::new();
    wrapper.take(MAX_LINE as u64).read_until(b'\n', &mut line).await?;
    wire::decode(&line)
}

/// The exit code that shells give for a command that does not start, by what crun says.
fn not_started_code(words: &str) -> i32 {
    if words.contains("not found") || words.contains("No such file") {
        127
    } else if words.contains("ermission denied") {
        126
    } else {
        125
    }
}

/// Free bytes of the file system, as far as they can be told.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let stat = statvfs(path).ok()?;
    Some(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
