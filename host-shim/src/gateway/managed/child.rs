//! One life of the registry's process.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::process::Command;

use super::ManagedError;
use super::files::{BoundedLog, Files, SOCKET_NAME};
use crate::gateway::backing::socket_path;

/// How much of its last output is kept for an error message.
const LAST_WORDS: usize = 1024;
/// Where its programs are looked for, and nothing else of Kiln's environment.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Read at a time.
const CHUNK: usize = 8 * 1024;

/// What becomes the program of its further arguments, as this user without rights, and ends with the thread that starts it.
pub(super) fn setpriv(identity: Option<(Uid, Gid)>) -> std::process::Command {
    let mut command = std::process::Command::new("setpriv");
    if let Some((uid, gid)) = identity {
        command
            .args(["--reuid", &uid.to_string(), "--regid", &gid.to_string(), "--clear-groups"])
            .args(["--bounding-set=-all", "--inh-caps=-all"]);
    }
    command.args(["--no-new-privs", "--pdeathsig", "KILL"]);
    command
}

pub(super) struct Child {
    process: tokio::process::Child,
    pid: u32,
    output: pipe::Receiver,
    log: BoundedLog,
    tail: Vec<u8>,
}

impl Child {
    /// Starts it: `setpriv` (of util-linux) becomes the registry.
    pub fn spawn(program: &Path, files: &Files) -> Result<Self, ManagedError> {
        let failed = |source| ManagedError::Io {
            operation: "start",
            path: format!("setpriv {}", program.display()),
            source,
        };
        let (reader, writer) = std::io::pipe().map_err(failed)?;
        let mut command = Command::from(setpriv(files.identity));
        command
            .arg(program)
            .args(["serve", "config.yml"])
            .current_dir(files.dir())
            .env_clear()
            .env("PATH", PATH)
            // Only its own user can read its environment.
            .env("REGISTRY_HTTP_SECRET", &files.secret)
            // A Ctrl-C at the terminal is for Kiln, which ends the registry last.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(writer.try_clone().map_err(failed)?)
            .stderr(writer)
            .kill_on_drop(true);
        let process = command.spawn().map_err(failed)?;
        let pid = process.id().unwrap_or_default();
        // The command holds the pipe's writing end; without it the end of output can be seen.
        drop(command);
        let output = pipe::Receiver::from_owned_fd(reader.into()).map_err(failed)?;
        Ok(Self { process, pid, output, log: files.log()?, tail: Vec::new() })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns once it listens. Each piece of output is a reason to look: it says so when it does.
    pub async fn listens(&mut self, files: &Files) -> Result<(), ManagedError> {
        let dir = files.socket_dir()?;
        loop {
            if !self.read_output().await {
                return Err(self.ends().await);
            }
            if UnixStream::connect(socket_path(&dir, SOCKET_NAME)).await.is_ok() {
                return Ok(());
            }
        }
    }

    /// Keeps its output until it ends, and says how it ended.
    pub async fn ends(&mut self) -> ManagedError {
        while self.read_output().await {}
        let status = self.process.wait().await;
        let status = status.map_or_else(|e| e.to_string(), |status: ExitStatus| status.to_string());
        ManagedError::Died { status, output: self.last_words() }
    }

    /// Asks it to end, insists after a while, and returns once it is gone.
    pub async fn stop(&mut self, patience: Duration) {
        if let Ok(raw) = i32::try_from(self.pid)
            && self.process.id().is_some()
        {
            let _ = kill(Pid::from_raw(raw), Signal::SIGTERM);
        }
        if tokio::time::timeout(patience, self.ends()).await.is_err() {
            let _ = self.process.kill().await;
        }
    }

    /// The end of its output, printable.
    pub fn last_words(&self) -> String {
        String::from_utf8_lossy(&self.tail).trim().escape_debug().to_string()
    }

    /// False at the end of the output. A log that cannot be written does not stop the registry.
    async fn read_output(&mut self) -> bool {
        let mut chunk = [0; CHUNK];
        match self.output.read(&mut chunk).await {
            Ok(0) | Err(_) => false,
            Ok(n) => {
                if let Err(error) = self.log.write(&chunk[..n]) {
                    tracing::warn!(%error, "cannot write the managed registry's log");
                }
                self.tail.extend_from_slice(&chunk[..n]);
                let excess = self.tail.len().saturating_sub(LAST_WORDS);
                self.tail.drain(..excess);
                true
            }
        }
    }
}
