//! The first process of an instance's container: this program under another name, as the instance's own user.
//!
//! It starts the image's program, passes signals on to it, reaps what is left behind, and ends as the program
//! ends. So a program need not be fit to be process 1, for which the kernel ignores signals that have no
//! handler.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Where the container has this program, and the name that makes it what it is.
pub const INIT_PATH: &str = "/dev/kiln-init";

/// The exit code when there is no program; the agent knows better by then.
const NOT_STARTED: u8 = 127;
/// What shells add to the number of the signal that ended a program.
const SIGNALLED: i32 = 128;

/// What it tells the agent, once, on its standard input: a byte, and the number of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The program runs, and signals reach it.
    Started,
    /// It could not be executed, because of this error.
    NotStarted(i32),
}

/// Bytes of what is told.
pub const TOLD: usize = 5;

impl Told {
    /// As bytes.
    pub fn encode(self) -> [u8; TOLD] {
        let (kind, number) = match self {
            Self::Started => (b'S', 0),
            Self::NotStarted(number) => (b'N', number),
        };
        let [a, b, c, d] = number.to_be_bytes();
        [kind, a, b, c, d]
    }

    /// From bytes; nothing else is believed.
    pub fn decode(bytes: [u8; TOLD]) -> Option<Self> {
        let [kind, number @ ..] = bytes;
        match (kind, i32::from_be_bytes(number)) {
            (b'S', 0) => Some(Self::Started),
            (b'N', number) => Some(Self::NotStarted(number)),
            _ => None,
        }
    }
}

/// Whether the process was called as the first one of a container.
pub fn is_init_call(argv0: &OsStr) -> bool {
    Path::new(argv0) == Path::new(INIT_PATH)
}

/// Its `main`. One thread.
pub fn init_main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match run(&args) {
        Ok(code) => ExitCode::from(code),
        // Whoever listened is gone, and with it the VM soon.
        Err(error) => {
            eprintln!("{INIT_PATH}: {error}");
            ExitCode::from(NOT_STARTED)
        }
    }
}

fn run(args: &[OsString]) -> io::Result<u8> {
    let mut agent = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let started = match args.split_first() {
        Some((program, rest)) => Command::new(program).args(rest).stdin(Stdio::null()).spawn(),
        None => Err(Errno::ENOENT.into()),
    };
    let child = match started {
        Ok(child) => Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?),
        Err(error) => {
            let number = error.raw_os_error().unwrap_or(Errno::EINVAL as i32);
            agent.write_all(&Told::NotStarted(number).encode())?;
            return Ok(NOT_STARTED);
        }
    };
    // After the program was started, which would have them blocked too. What comes earlier is lost on a process 1:
    // hence the agent is told only now.
    let signals = SigSet::all();
    signals.thread_block()?;
    agent.write_all(&Told::Started.encode())?;
    drop(agent);
    loop {
        if let Some(code) = reap(child)? {
            return Ok(code);
        }
        match signals.wait() {
            // The last error is for a signal that has no name.
            Ok(Signal::SIGCHLD) | Err(Errno::EINTR | Errno::EINVAL) => {}
            // It may have ended since.
            Ok(signal) => drop(kill(child, signal)),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes every process that has ended; the exit code once the program has.
fn reap(program: Pid) -> nix::Result<Option<u8>> {
    loop {
        let code = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == program => code,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == program => SIGNALLED + signal as i32,
            Ok(WaitStatus::StillAlive) => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(error) => return Err(error),
        };
        // Codes are of eight bits.
        return Ok(Some(u8::try_from(code & 0xff).unwrap_or(u8::MAX)));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_arrives_and_nothing_else() {
        for told in [Told::Started, Told::NotStarted(2), Told::NotStarted(-1)] {
            assert_eq!(Told::decode(told.encode()), Some(told));
        }
        assert_eq!(Told::decode([0; TOLD]), None);
        assert_eq!(Told::decode([b'S', 0, 0, 0, 1]), None);
    }

    #[test]
    fn the_whole_name_decides() {
        assert!(is_init_call(OsStr::new("/dev/kiln-init")));
        assert!(!is_init_call(OsStr::new("kiln-init")));
        assert!(!is_init_call(OsStr::new("/init")));
    }
}
