//! The process between engine and step: the engine waits for it as if it were the step.
//!
//! It is forked by the wrapper, outlives it, and becomes a child of the engine's subreaper. It is
//! itself the subreaper of what crun leaves behind, so it learns the true exit status of the
//! container's init, and passes it on only when the agent has everything of the step.

use std::ffi::OsString;
use std::fs;
use std::io::{self, PipeWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

use nix::errno::Errno;
use nix::sys::prctl::set_child_subreaper;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;

use super::create::Agent;
use super::hold::Hold;
use super::sys;
use super::watch::Held;
use super::wire::{FromWrapper, HOLD, HOLD_WITH_SECRETS};

/// The exit code of a failure of our own, as container tools have it.
const OWN_FAILURE: u8 = 125;

/// What there is to do.
#[derive(Debug)]
pub struct Monitor {
    /// crun.
    pub program: PathBuf,
    /// Its arguments for `create`.
    pub args: Vec<OsString>,
    /// The container's name.
    pub id: OsString,
    /// Its config.
    pub config: PathBuf,
    /// Whether its processes see secrets of the build.
    pub secrets: bool,
    /// For when the agent wants the step to stay.
    pub hold: Hold,
    /// Where the locks of running steps are.
    pub locks: PathBuf,
    /// Where crun writes the pid of the container's init.
    pub init_pid_file: PathBuf,
    /// Where the engine reads the pid that it waits for.
    pub pid_file: PathBuf,
}

/// Creates the container, says so through `ready`, waits for its end, reports it and ends the same
/// way.
pub fn run(
    monitor: &Monitor,
    mut agent: Agent,
    stdout: PipeWriter,
    stderr: PipeWriter,
    mut ready: PipeWriter,
) -> ! {
    let mut complaint = stderr.try_clone().ok();
    match monitor.create(stdout, stderr) {
        Ok((init, held)) => {
            drop(complaint);
            let _ = agent.tell(&monitor.created());
            let _ = ready.write_all(&[0]);
            drop(ready);
            let end = wait_for(init);
            // Without the agent nobody is left to wait for: the end is still the step's.
            let _ = agent.tell(&FromWrapper::Ended { code: end.code() });
            monitor.stay(&mut agent);
            held.release();
            end.imitate()
        }
        Err(failure) => {
            if let (Failed::Own(error), Some(stderr)) = (&failure, &mut complaint) {
                let _ = writeln!(stderr, "{error}");
            }
            drop(complaint);
            let _ = agent.tell(&FromWrapper::NotStarted { message: None });
            let _ = agent.wait_for_ack();
            let code = failure.code();
            let _ = ready.write_all(&[code]);
            exit(code.into())
        }
    }
}

/// Why there is no container.
#[derive(Debug)]
enum Failed {
    /// crun said why on the step's stderr.
    Runtime(u8),
    /// The monitor itself could not do its part.
    Own(io::Error),
}

impl Failed {
    fn code(&self) -> u8 {
        match self {
            Self::Runtime(code) => *code,
            Self::Own(_) => OWN_FAILURE,
        }
    }
}

impl Monitor {
    fn create(&self, stdout: PipeWriter, stderr: PipeWriter) -> Result<(Pid, Held), Failed> {
        set_child_subreaper(true).map_err(|errno| Failed::Own(errno.into()))?;
        // The command is a temporary, so that the write ends of the pipes are closed right here.
        let status = Command::new(&self.program)
            .args(&self.args)
            .stdout(stdout)
            .stderr(stderr)
            .status()
            .map_err(Failed::Own)?;
        if !status.success() {
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Err(Failed::Runtime(code.unwrap_or(OWN_FAILURE)));
        }
        self.take_over().map_err(|error| {
            // A container that nobody watches must not stay.
            let _ = Command::new(&self.program).args(["delete", "--force"]).arg(&self.id).status();
            Failed::Own(error)
        })
    }

    /// Until the agent lets the step go.
    fn stay(&self, agent: &mut Agent) {
        while let Ok(order @ (HOLD | HOLD_WITH_SECRETS)) = agent.order() {
            if agent.tell(&self.hold.make(order == HOLD_WITH_SECRETS)).is_err() {
                break;
            }
        }
    }

    fn created(&self) -> FromWrapper {
        FromWrapper::Created {
            id: self.id.to_string_lossy().into_owned(),
            config: self.config.clone(),
            secrets: self.secrets,
        }
    }

    fn take_over(&self) -> io::Result<(Pid, Held)> {
        let held = Held::take(&self.locks, &self.id.to_string_lossy())?;
        let init = read_pid(&self.init_pid_file)?;
        fs::write(&self.pid_file, std::process::id().to_string())?;
        // The engine reads its end of these to the end.
        sys::detach_stdio()?;
        Ok((init, held))
    }
}

fn read_pid(path: &Path) -> io::Result<Pid> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map(Pid::from_raw).map_err(io::Error::other)
}

/// Reaps until the container's init has ended.
fn wait_for(init: Pid) -> End {
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == init => return End::Exited(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == init => {
                return End::Signaled(signal);
            }
            Ok(_) | Err(Errno::EINTR) => {}
            // There is no such child, which crun would not have said.
            Err(_) => return End::Exited(OWN_FAILURE.into()),
        }
    }
}

/// How the container's init ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Exited(i32),
    Signaled(Signal),
}

impl End {
    fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(signal) => 128 + signal as i32,
        }
    }

    /// Ends this process the same way.
    fn imitate(self) -> ! {
        if let Self::Signaled(signal) = self {
            // This is not the program that crashed: no core of it.
            let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
            let _ = raise(signal);
        }
        // Also for a signal that this process happens to ignore.
        exit(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_reported_as_shells_do() {
        assert_eq!(End::Exited(7).code(), 7);
        assert_eq!(End::Signaled(Signal::SIGKILL).code(), 137);
    }
}
