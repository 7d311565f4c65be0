//! Starts a session's command: in the container that can be entered, by the container runtime, or in the VM itself.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_protocol::event::cut_text;
use kiln_protocol::exec::{Cause, Ended, Exec, Place};
use nix::pty::openpty;
use nix::unistd::Pid;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use serde_json::{Map, Value};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use super::leader::{LEADER_NAME, PIPES, TERMINAL};
use super::process::process;
use super::sys::watched;
use super::target::{Enterable, Target, Wanted, Way};
use super::terminal::Master;
use crate::run::{Root, User};
use crate::runtime::{Cgroup, receive_descriptors};

/// As much of the runtime's own words as is repeated.
const MAX_WORDS: usize = 1024;

/// Where things are. The default is how they are in the VM.
#[derive(Clone, Debug)]
pub struct Places {
    /// The container runtime.
    pub program: PathBuf,
    /// This program.
    pub agent: PathBuf,
    /// In memory: a directory for each session.
    pub files: PathBuf,
    /// Where the cgroup hierarchy (version 2) is mounted.
    pub cgroup_mount: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            program: crate::runtime::DEFAULT_PROGRAM.into(),
            agent: "/run/kiln/agent".into(),
            files: "/run/kiln/sessions".into(),
            cgroup_mount: "/sys/fs/cgroup".into(),
        }
    }
}

/// Holds a cgroup for each session in the VM itself.
const VM_SESSIONS: &str = "/kiln/sessions";

/// No two sessions have the same.
fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Why a command was not started.
#[derive(Debug)]
pub struct Refused {
    /// For programs.
    pub cause: Cause,
    /// For people.
    pub why: String,
}

impl Refused {
    pub fn new(cause: Cause, why: impl AsRef<str>) -> Self {
        Self { cause, why: cut_text(why.as_ref()) }
    }

    pub fn internal(action: &str, error: &dyn std::fmt::Display) -> Self {
        Self::new(Cause::Internal, format!("the agent could not {action}: {error}"))
    }
}

impl From<Refused> for Ended {
    fn from(Refused { cause, why }: Refused) -> Self {
        Self::Failed { cause, why }
    }
}

/// A command that is being started.
#[derive(Debug)]
pub struct Launched {
    /// Ends as the command ends.
    pub child: Child,
    /// How the command is found.
    pub leader: Leader,
    /// What it reads and writes.
    pub io: Io,
    /// Every process of the session is in it.
    pub cgroup: Cgroup,
}

/// What a command reads and writes.
#[derive(Debug)]
pub enum Io {
    /// Three pipes.
    Pipes {
        /// What it reads.
        stdin: pipe::Sender,
        /// What it writes.
        stdout: pipe::Receiver,
        /// Its complaints.
        stderr: pipe::Receiver,
    },
    /// A terminal that is there.
    Terminal(Master),
    /// A terminal that the container runtime makes and sends here.
    Coming(UnixListener),
}

/// The command's process: the leader of the kernel's session.
#[derive(Debug)]
pub enum Leader {
    /// In the VM.
    Known(Pid),
    /// In a container: the runtime writes it down.
    Written(Files),
}

impl Leader {
    /// Waits until it is known.
    pub async fn pid(&self) -> io::Result<Pid> {
        match self {
            Self::Known(pid) => Ok(*pid),
            Self::Written(files) => files.pid().await,
        }
    }

    /// What the container runtime said when it could not run the command.
    pub fn complaint(&self) -> Option<String> {
        match self {
            Self::Known(_) => None,
            Self::Written(files) => complaint(&fs::read_to_string(files.path("log")).ok()?),
        }
    }
}

/// Starts the command.
pub async fn launch(
    places: &Places,
    enterable: &Enterable,
    exec: &Exec,
) -> Result<Launched, Refused> {
    if exec.command.is_empty() {
        return Err(Refused::new(Cause::Invalid, "there is no command to run"));
    }
    match exec.place {
        Place::Vm => in_vm(places, exec),
        Place::Job { secrets } => in_container(places, enterable, exec, secrets).await,
    }
}

async fn in_container(
    places: &Places,
    enterable: &Enterable,
    exec: &Exec,
    secrets: bool,
) -> Result<Launched, Refused> {
    let target = find(enterable, secrets).await?;
    let own = own_process(&target)?;
    let user = match &exec.user {
        Some(user) => Some(find_user(places, &target, user).await?),
        None => None,
    };
    let name = format!("session-{}", next_number());
    let cgroup = Cgroup::new(&places.cgroup_mount, &target.cgroup).below(&name);
    let files = Files::make(places.files.join(&name))
        .map_err(|e| Refused::internal("make a session's files", &e))?;
    let made = Value::Object(process(own, exec, user.as_ref()));
    files
        .write("process.json", made.to_string().as_bytes())
        .map_err(|error| Refused::internal("write the command down", &error))?;
    cgroup.make_leaf().map_err(|error| {
        let why = format!("the step is over, or cannot be entered: its cgroup: {error}");
        Refused::new(Cause::NoStep, why)
    })?;
    let mut command = runtime(places, &target);
    command.arg("--cgroup-manager=cgroupfs").arg("--log").arg(files.path("log"));
    command.args(["--log-format", "json", "exec", "--process"]).arg(files.path("process.json"));
    command.arg("--pid-file").arg(files.path("pid")).arg("--cgroup").arg(&name);
    let spawned = if exec.terminal.is_some() {
        UnixListener::bind(files.path("console")).and_then(|console| {
            command.arg("--console-socket").arg(files.path("console")).arg(&target.id);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            Ok((command.kill_on_drop(true).spawn()?, Io::Coming(console)))
        })
    } else {
        command.arg(&target.id);
        piped(command)
    };
    let (child, io) =
        spawned.map_err(|error| Refused::internal("start the container runtime", &error))?;
    Ok(Launched { child, leader: Leader::Written(files), io, cgroup })
}

/// The container to enter.
pub async fn find(enterable: &Enterable, secrets: bool) -> Result<Target, Refused> {
    match enterable.now() {
        None => {
            let why = "no step of the build runs now, so there is nothing to enter; try again when one does";
            Err(Refused::new(Cause::NoStep, why))
        }
        Some(Way::Open(target)) if target.secrets && !secrets => {
            let why = "the step that runs has secrets of the build; to enter it with them, say --with-secrets";
            Err(Refused::new(Cause::Invalid, why))
        }
        Some(Way::Open(target)) => Ok(target),
        Some(Way::Ask(failed)) => {
            let (answer, made) = oneshot::channel();
            // When nobody answers, the sender is gone.
            let _ = failed.send(Wanted { secrets, answer }).await;
            match made.await {
                Ok(Ok(target)) => Ok(target),
                Ok(Err(why)) => Err(Refused::new(Cause::Internal, why)),
                Err(_) => Err(Refused::new(Cause::NoStep, "the failed step is gone")),
            }
        }
    }
}

fn in_vm(places: &Places, exec: &Exec) -> Result<Launched, Refused> {
    if exec.user.as_ref().is_some_and(|user| user != "root" && user != "0") {
        return Err(Refused::new(Cause::Invalid, "the VM has no user but root; leave -u away"));
    }
    let directory = exec.directory.as_deref().unwrap_or("/");
    if !Path::new(directory).is_dir() {
        let why = format!("the VM has no directory {directory:?}");
        return Err(Refused::new(Cause::Invalid, why));
    }
    let all = Cgroup::new(&places.cgroup_mount, Path::new(VM_SESSIONS));
    let cgroup = all.below(&next_number().to_string());
    cgroup.make().map_err(|error| Refused::internal("make a session's cgroup", &error))?;
    let mut command = Command::new(&places.agent);
    command
        .arg0(LEADER_NAME)
        .arg(cgroup.processes_file())
        .arg(if exec.terminal.is_some() { TERMINAL } else { PIPES })
        .args(&exec.command);
    command.current_dir(directory).envs(exec.env.iter().map(|(name, value)| (name, value)));
    let spawned = match exec.terminal {
        Some(size) => with_terminal(command, size),
        None => piped(command),
    };
    let (child, io) = spawned.map_err(|error| Refused::internal("start a process", &error))?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
    let pid =
        pid.ok_or_else(|| Refused::new(Cause::Internal, "the command's process has no number"))?;
    Ok(Launched { child, leader: Leader::Known(pid), io, cgroup })
}

/// What a pipe of a command holds: the more, the fewer switches between the command and the agent.
const PIPE_SIZE: usize = 256 * 1024;

fn piped(mut command: Command) -> io::Result<(Child, Io)> {
    let (stdin, ours_in) = io::pipe()?;
    let (ours_out, stdout) = io::pipe()?;
    let (ours_err, stderr) = io::pipe()?;
    for pipe in [&stdin, &ours_out] {
        // A smaller one serves as well, only slower.
        let _ = rustix::pipe::fcntl_setpipe_size(pipe, PIPE_SIZE);
    }
    let io = Io::Pipes {
        stdin: pipe::Sender::from_owned_fd(ours_in.into())?,
        stdout: pipe::Receiver::from_owned_fd(ours_out.into())?,
        stderr: pipe::Receiver::from_owned_fd(ours_err.into())?,
    };
    // The command is dropped at once, and with it our copies of the command's ends.
    let child = command.stdin(stdin).stdout(stdout).stderr(stderr).kill_on_drop(true).spawn()?;
    Ok((child, io))
}

fn with_terminal(
    mut command: Command,
    size: kiln_protocol::exec::Terminal,
) -> io::Result<(Child, Io)> {
    mount_terminals()?;
    let pty = openpty(None, None)?;
    let master = Master::new(pty.master)?;
    master.resize(size)?;
    let copy = || pty.slave.try_clone();
    command.stdin(copy()?).stdout(copy()?).stderr(copy()?).env("TERM", "xterm");
    Ok((command.kill_on_drop(true).spawn()?, Io::Terminal(master)))
}

/// The VM has no use for terminals until somebody wants one.
fn mount_terminals() -> io::Result<()> {
    if Path::new("/dev/pts/ptmx").exists() {
        return Ok(());
    }
    let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NOEXEC;
    crate::init::mount_new("devpts", "/dev/pts", "devpts", flags, "mode=0620,ptmxmode=0666")
        .map_err(io::Error::other)
}

/// The container runtime, as it knows the container.
fn runtime(places: &Places, target: &Target) -> Command {
    let mut command = Command::new(&places.program);
    if let Some(root) = &target.root {
        command.arg("--root").arg(root);
    }
    command
}

/// What the container's own process is like.
pub fn own_process(target: &Target) -> Result<Map<String, Value>, Refused> {
    let unreadable =
        |error: &dyn std::fmt::Display| Refused::internal("read the container's config", error);
    let config = fs::read(&target.config).map_err(|error| unreadable(&error))?;
    let mut config: Value = serde_json::from_slice(&config).map_err(|error| unreadable(&error))?;
    match config.get_mut("process").map(Value::take) {
        Some(Value::Object(process)) => Ok(process),
        _ => Err(unreadable(&"it has no process")),
    }
}

/// Looks a user up in the container's own files.
async fn find_user(places: &Places, target: &Target, user: &str) -> Result<User, Refused> {
    let root = root_of(places, target).await?;
    let found = Root::open(&root).and_then(|root| root.user(user));
    found.map_err(|error| Refused::new(Cause::Invalid, format!("{error:#}")))
}

/// The container's root, as its first process has it.
pub async fn root_of(places: &Places, target: &Target) -> Result<PathBuf, Refused> {
    let state = runtime(places, target).arg("state").arg(&target.id).output().await;
    let state = state.map_err(|error| Refused::internal("start the container runtime", &error))?;
    let over = || Refused::new(Cause::NoStep, "the step is over; there is nothing to enter");
    let state: Value = serde_json::from_slice(&state.stdout).map_err(|_| over())?;
    // A container that has ended has the number 0.
    let pid = state["pid"].as_u64().filter(|pid| *pid > 0).ok_or_else(over)?;
    Ok(PathBuf::from(format!("/proc/{pid}/root")))
}

/// The error in the runtime's log, without what it says of its own.
fn complaint(log: &str) -> Option<String> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut errors = lines.filter(|line| line["level"] == "error");
    let words = errors.next()?["msg"].as_str()?.trim().to_owned();
    Some(words.chars().take(MAX_WORDS).collect())
}

/// The files of a session: a directory in memory that goes with it.
#[derive(Debug)]
pub struct Files {
    directory: PathBuf,
    changes: AsyncFd<OwnedFd>,
}

impl Files {
    fn make(directory: PathBuf) -> io::Result<Self> {
        DirBuilder::new().mode(0o700).recursive(true).create(&directory)?;
        let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&changes, &directory, WatchFlags::CLOSE_WRITE | WatchFlags::ONLYDIR)?;
        let changes = watched(changes, Interest::READABLE)?;
        Ok(Self { directory, changes })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.path(name))?
            .write_all(content)
    }

    async fn pid(&self) -> io::Result<Pid> {
        loop {
            let text = fs::read_to_string(self.path("pid")).unwrap_or_default();
            if let Ok(pid) = text.trim().parse() {
                return Ok(Pid::from_raw(pid));
            }
            let mut ready = self.changes.readable().await?;
            // Which file it was is found by looking again.
            let _ = ready
                .try_io(|changes| Ok(rustix::io::read(changes.get_ref(), &mut [0; 4096][..])?));
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            tracing::warn!(%error, "the files of a session stay");
        }
    }
}

/// Takes the terminal that the container runtime made.
pub async fn terminal(console: &UnixListener) -> io::Result<Master> {
    let (stream, _) = console.accept().await?;
    let received = stream.async_io(Interest::READABLE, || receive_descriptors(&stream)).await?;
    let descriptor: Option<OwnedFd> = received.into_iter().next();
    Master::new(
        descriptor.ok_or_else(|| io::Error::other("the container runtime sent no terminal"))?,
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_of_the_runtime_is_repeated() {
        let log = "{\"msg\":\"careful\",\"level\":\"warning\"}\nnot json\n\
                   {\"msg\":\"executable file `x` not found in $PATH: No such file or directory\",\"level\":\"error\"}\n";
        let words = complaint(log).unwrap();
        assert_eq!(words, "executable file `x` not found in $PATH: No such file or directory");
        assert_eq!(complaint(""), None);
    }

    #[tokio::test]
    async fn a_pid_that_is_written_later_is_found_and_the_files_go() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::make(dir.path().join("one")).unwrap();
        let path = files.path("pid");
        assert!(
            tokio::time::timeout(std::time::Duration::from_millis(20), files.pid()).await.is_err()
        );
        tokio::task::spawn_blocking(move || fs::write(path, "42")).await.unwrap().unwrap();
        assert_eq!(files.pid().await.unwrap(), Pid::from_raw(42));
        drop(files);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
