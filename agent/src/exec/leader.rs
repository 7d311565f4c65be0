//! The first process of a session in the VM itself: this program under another name. It begins a session of the
//! kernel's, takes the terminal, and becomes the command. In a container the runtime does the same.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use nix::unistd::setsid;
use rustix::process::ioctl_tiocsctty;

use crate::run::{NOT_EXECUTABLE, NOT_FOUND};

/// The name that makes the agent's binary this.
pub const LEADER_NAME: &str = "kiln-session";

/// The second argument when standard input is the session's terminal.
pub const TERMINAL: &str = "terminal";
/// And when there is none.
pub const PIPES: &str = "pipes";

/// Whether the process was called as the first one of a session.
pub fn is_leader_call(argv0: &OsStr) -> bool {
    Path::new(argv0) == Path::new(LEADER_NAME)
}

/// Its `main`: the arguments are the file through which its cgroup is joined, [`TERMINAL`] or [`PIPES`], and the
/// command.
pub fn leader_main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let [cgroup, kind, program, rest @ ..] = args.as_slice() else { return ExitCode::FAILURE };
    // Only comes back when it fails.
    let error = match begin(cgroup, kind) {
        Ok(()) => Command::new(program).args(rest).exec(),
        Err(error) => error,
    };
    eprintln!("kiln: {} could not be run in the VM: {error}", program.display());
    let not_found = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    ExitCode::from(if not_found { NOT_FOUND } else { NOT_EXECUTABLE })
}

fn begin(cgroup: &OsStr, kind: &OsStr) -> io::Result<()> {
    std::fs::write(cgroup, "0")?;
    setsid()?;
    if kind == TERMINAL {
        ioctl_tiocsctty(io::stdin())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_name_decides() {
        assert!(is_leader_call(OsStr::new("kiln-session")));
        assert!(!is_leader_call(OsStr::new("/run/kiln/agent")));
    }
}
