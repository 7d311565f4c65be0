//! One process of the engine: its cgroup, its output, its end.

use std::io;
use std::process::ExitStatus;

use kiln_protocol::event::LogStream;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, ChildStderr, ChildStdout};

use super::output::{self, LastLines};
use crate::events::Reporter;
use crate::runtime::Cgroup;

/// A process that leads a process group and has pipes for its output. Dropped, it is killed; once it is
/// waited for, with all that it started.
pub struct Process {
    child: Child,
    stdout: ChildStdout,
    stderr: ChildStderr,
    own: Cgroup,
    whole: Cgroup,
}

impl Process {
    /// Of a child that was just started: `own` is to hold it, `whole` holds all that it starts besides.
    pub fn new(mut child: Child, own: Cgroup, whole: Cgroup) -> io::Result<Self> {
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (Some(stdout), Some(stderr)) = (stdout, stderr) else {
            return Err(io::Error::other("no pipes"));
        };
        Ok(Self { child, stdout, stderr, own, whole })
    }

    /// Takes it into its cgroup, reports its output, and gives its end. Called at once, before it can have
    /// started anything, so all of it will be in there.
    pub async fn finish(self, reporter: &Reporter, last: &LastLines) -> io::Result<ExitStatus> {
        let Self { child, stdout, stderr, own, whole } = self;
        if let Err(error) = child.id().map_or(Ok(()), |pid| own.adopt(pid)) {
            tracing::warn!(%error, "the engine has no cgroup of its own");
        }
        let mut group = Group { child, whole };
        let out = output::report(stdout, LogStream::Stdout, reporter.clone(), last.clone());
        let err = output::report(stderr, LogStream::Stderr, reporter.clone(), last.clone());
        let ended = async {
            let status = group.child.wait().await;
            // What it left behind must not keep its pipes open.
            group.kill();
            status
        };
        let (status, (), ()) = tokio::join!(ended, out, err);
        status
    }
}

struct Group {
    child: Child,
    whole: Cgroup,
}

impl Group {
    fn kill(&self) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        self.whole.kill();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}
