//! The container: one process of crun that stays until the container's first process has ended.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use anyhow::Context;
use kiln_protocol::event::{Event, LogStream, Phase};
use kiln_protocol::run::RunJob;
use nix::errno::Errno;
use nix::libc::{ENOENT, ENOTDIR};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use super::config;
use super::inside::{TOLD, Told};
use super::{NOT_EXECUTABLE, NOT_FOUND, Places, STOP_GRACE};
use crate::events::{Report, Reporter};
use crate::exec::Target;
use crate::runtime::{Cgroup, report_bytes};

/// The container's name, for whoever enters it.
pub const NAME: &str = "instance";

/// Holds the container's cgroup: its counters go on when that is removed.
const CGROUP: &str = "/kiln/instance";

/// As much of the runtime's own words as is repeated.
const MAX_WORDS: usize = 1024;

/// What other container tools write. There is no name server, and no way to one.
const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
const RESOLV_CONF: &str = "# This instance has no network.\n";

/// Writes what the container is made from.
pub fn write_files(
    places: &Places,
    job: &RunJob,
    config: &serde_json::Value,
) -> anyhow::Result<()> {
    let hosts = format!("{HOSTS}127.0.0.1\t{}\n", job.hostname);
    fs::create_dir_all(&places.files)
        .and_then(|()| fs::write(places.files.join("hosts"), hosts))
        .and_then(|()| fs::write(places.files.join("hostname"), format!("{}\n", job.hostname)))
        .and_then(|()| fs::write(places.files.join("resolv.conf"), RESOLV_CONF))
        .and_then(|()| fs::write(places.files.join("config.json"), config.to_string()))
        .with_context(|| format!("{} cannot be written", places.files.display()))
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Its program ended.
    Exited {
        /// 128 + n when signal n ended it.
        code: u8,
        /// Of its processes, for want of memory.
        oom_kills: u32,
    },
    /// Its program could not be executed.
    NotStarted {
        /// 126 or 127.
        code: u8,
        /// For people.
        why: String,
    },
    /// It was stopped before its program ran.
    Stopped,
}

/// A container that is about to run.
#[derive(Debug)]
pub struct Container<'a> {
    places: &'a Places,
    stop_signal: u8,
    cgroup: Cgroup,
}

/// What became of the conversation with the container's first process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    told: Option<Told>,
    stopped: bool,
}

impl<'a> Container<'a> {
    /// Of the files that [`write_files`] wrote.
    pub fn new(places: &'a Places, stop_signal: u8) -> Self {
        let cgroup = Cgroup::new(&places.cgroup_mount, Path::new(CGROUP));
        Self { places, stop_signal, cgroup }
    }

    /// Runs it to its end. Every byte of its output is reported when this returns.
    pub async fn run(
        self,
        reporter: &Reporter,
        cancel: &CancellationToken,
    ) -> anyhow::Result<Ended> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut child = self.spawn(theirs.into()).context("the container runtime")?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (stdout, stderr) = stdout.zip(stderr).context("the container has no pipes")?;
        let conversation = UnixStream::from_std(ours)?;
        let mut state = State::default();
        // Whoever reads what the program says knows that it runs.
        let heard = CancellationToken::new();
        let ended = async {
            let status =
                self.watch(&mut child, conversation, &mut state, reporter, cancel, &heard).await;
            self.places.enterable.close(NAME);
            heard.cancel();
            // What it left must not keep its pipes open.
            self.cgroup.kill();
            status
        };
        let out = async {
            heard.cancelled().await;
            report_bytes(stdout, LogStream::Stdout, reporter).await;
        };
        let err = async {
            heard.cancelled().await;
            report_bytes(stderr, LogStream::Stderr, reporter).await;
        };
        let (status, (), ()) = tokio::join!(ended, out, err);
        let status = status.context("the container runtime cannot be waited for")?;
        self.judge(status, state)
    }

    fn target(&self) -> Target {
        let files = &self.places.files;
        let (root, file) = (Some(self.runtime_root()), files.join("config.json"));
        Target {
            id: NAME.to_owned(),
            root,
            config: file,
            cgroup: config::CGROUP.into(),
            secrets: false,
        }
    }

    fn runtime_root(&self) -> PathBuf {
        self.places.files.join("crun")
    }

    /// crun with a pipe for each stream of the container, and a socket for what its first process has to say.
    fn spawn(&self, socket: OwnedFd) -> io::Result<Child> {
        let files = &self.places.files;
        let flag = |name: &str, path: PathBuf| {
            let mut flag = std::ffi::OsString::from(name);
            flag.push(path);
            flag
        };
        Command::new(&self.places.program)
            .arg(flag("--root=", self.runtime_root()))
            // The VM has no systemd.
            .arg("--cgroup-manager=cgroupfs")
            // Not among what the container says.
            .arg(flag("--log=file:", self.words_file()))
            .arg("run")
            .arg("--no-new-keyring")
            .arg(flag("--bundle=", files.clone()))
            .arg(flag("--pid-file=", self.pid_file()))
            .arg(NAME)
            .env_clear()
            .stdin(socket)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    }

    /// Waits for the end, and stops the container when that is asked for.
    async fn watch(
        &self,
        child: &mut Child,
        conversation: UnixStream,
        state: &mut State,
        reporter: &Reporter,
        cancel: &CancellationToken,
        heard: &CancellationToken,
    ) -> io::Result<ExitStatus> {
        let mut hearing = Box::pin(hear(conversation));
        let mut deadline = None;
        loop {
            tokio::select! {
                biased;
                told = &mut hearing, if !heard.is_cancelled() => {
                    state.told = told;
                    if told == Some(Told::Started) {
                        self.places.enterable.open(self.target());
                        reporter.report(Report::Event(Event::Phase(Phase::Running))).await;
                    }
                    heard.cancel();
                }
                status = child.wait() => return status,
                () = cancel.cancelled(), if !state.stopped => {
                    state.stopped = true;
                    deadline = Some(tokio::time::Instant::now() + STOP_GRACE);
                    // Before its first process passes signals on there is nobody to be gentle with.
                    if state.told != Some(Told::Started) || self.signal().is_err() {
                        self.kill(child);
                    }
                }
                () = at(deadline) => {
                    deadline = None;
                    self.kill(child);
                }
            }
        }
    }

    fn judge(&self, status: ExitStatus, state: State) -> anyhow::Result<Ended> {
        match state.told {
            Some(Told::Started) => {
                let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
                let code = code.and_then(|code| u8::try_from(code & 0xff).ok()).unwrap_or(u8::MAX);
                Ok(Ended::Exited { code, oom_kills: self.cgroup.usage().oom_kills })
            }
            Some(Told::NotStarted(ENOENT | ENOTDIR)) => Ok(Ended::NotStarted {
                code: NOT_FOUND,
                why: "the image has no such program, or it needs an interpreter or library that is missing: check the \
                      command, and PATH"
                    .to_owned(),
            }),
            Some(Told::NotStarted(number)) => Ok(Ended::NotStarted {
                code: NOT_EXECUTABLE,
                why: format!("the program cannot be executed: {}", Errno::from_raw(number).desc()),
            }),
            None if state.stopped => Ok(Ended::Stopped),
            None => {
                let words = fs::read_to_string(self.words_file()).unwrap_or_default();
                let words = words.lines().next_back().unwrap_or("it did not say why");
                let words: String = words.chars().take(MAX_WORDS).collect();
                anyhow::bail!("the container runtime gave up ({status}): {words}")
            }
        }
    }

    /// Sends the stop signal to the container's first process, which passes it on.
    fn signal(&self) -> anyhow::Result<()> {
        let pid = fs::read_to_string(self.pid_file())?.trim().parse()?;
        let signal = Signal::try_from(i32::from(self.stop_signal))?;
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    fn kill(&self, child: &mut Child) {
        self.cgroup.kill();
        // While it is still being made it is not in there.
        if let Err(error) = child.start_kill() {
            tracing::debug!(%error, "the container runtime has ended already");
        }
    }

    fn pid_file(&self) -> PathBuf {
        self.places.files.join("pid")
    }

    fn words_file(&self) -> PathBuf {
        self.places.files.join("crun.log")
    }
}

/// What the container's first process tells, if anything.
async fn hear(mut conversation: UnixStream) -> Option<Told> {
    let mut bytes = [0; TOLD];
    conversation.read_exact(&mut bytes).await.ok()?;
    Told::decode(bytes)
}

async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
