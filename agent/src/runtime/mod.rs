//! The OCI runtime that the engine calls: crun, wrapped, so that Kiln knows every step by itself.
//!
//! What a step prints may look like anything; what the engine prints about steps is mixed with it.
//! So the agent stands between engine and crun, as the same binary under another name:
//!
//! ```text
//! buildah ─ create ▶ wrapper ─ forks ▶ monitor ─ crun create ▶ the step's init
//!                      │                  │ reaps it, reports its exit code      │ stdout, stderr
//!                      └── who, policy ───┴──────────▶ agent (server) ◀──────────┘
//! buildah ─ start, state, kill, delete ▶ wrapper becomes crun (for `state`, see [`watch`])
//! ```
//!
//! [`create`] and [`monitor`] run in the wrapper's processes, [`server`] in the agent; [`wire`] is
//! between them. A failed step that is kept: [`hold`] in the monitor, [`stay`] in the agent. [`config`], [`seccomp`] and [`name`] are pure.

mod bounded;
mod cgroup;
mod config;
mod create;
mod current;
mod hold;
mod lines;
mod monitor;
mod name;
mod seccomp;
mod secrets;
mod server;
mod stay;
mod sys;
mod tail;
mod watch;
mod wire;

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

pub use cgroup::{Cgroup, Usage};
pub use current::CurrentStep;
pub use hold::{holder_main, is_holder_call};
pub use lines::{Part, report_bytes, report_lines};
pub use seccomp::tighten;
pub use secrets::{StepSecret, VARIABLE_MOUNTS};
pub use server::{Server, Settings, StepRecord};
pub use sys::receive_descriptors;
pub use tail::Begun;

/// The name that makes the agent's binary the wrapper.
pub const WRAPPER_NAME: &str = "kiln-oci-runtime";

/// Environment variable: the agent's socket. Set by the agent for the engine, which hands its
/// environment on.
pub const SOCKET_VARIABLE: &str = "KILN_RUNTIME_SOCKET";
/// Where the socket is otherwise.
pub const DEFAULT_SOCKET: &str = "/run/kiln/runtime.sock";
/// Environment variable: the runtime that is wrapped.
pub const PROGRAM_VARIABLE: &str = "KILN_RUNTIME_PROGRAM";
/// What is wrapped otherwise.
pub const DEFAULT_PROGRAM: &str = "/usr/bin/crun";

/// Whether the process was called as the wrapper.
pub fn is_wrapper_call(argv0: &OsStr) -> bool {
    Path::new(argv0).file_name() == Some(OsStr::new(WRAPPER_NAME))
}

/// The wrapper's `main`. Single-threaded: it forks.
pub fn wrapper_main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().skip(1).collect();
    let verb = args.first().and_then(|verb| verb.to_str());
    let program = path_from(PROGRAM_VARIABLE, DEFAULT_PROGRAM);
    let socket = path_from(SOCKET_VARIABLE, DEFAULT_SOCKET);
    if verb == Some("create") {
        return match create::create(&program, &socket, &args[1..]) {
            Ok(code) => ExitCode::from(code),
            Err(error) => complain(&error),
        };
    }
    if let (Some("state"), Some(id)) = (verb, args.last().and_then(|id| id.to_str())) {
        // If it cannot be waited for, it can be asked for all the same.
        let _ = watch::wait_until_over(&locks(&socket), id);
    }
    // Only comes back when it fails.
    let error = Command::new(&program).args(&args).exec();
    complain(&NoRuntime { program, source: error })
}

#[derive(Debug, thiserror::Error)]
#[error("the container runtime {} could not be run", program.display())]
struct NoRuntime {
    program: PathBuf,
    source: std::io::Error,
}

/// Where the locks of running steps are: beside the agent's socket.
fn locks(socket: &Path) -> PathBuf {
    socket.with_file_name("steps")
}

fn path_from(variable: &str, default: &str) -> PathBuf {
    env::var_os(variable).map_or_else(|| default.into(), PathBuf::from)
}

/// Tells the engine, which passes it on with its own error.
fn complain(error: &dyn std::error::Error) -> ExitCode {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    eprintln!("{WRAPPER_NAME}: {text}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_decides() {
        assert!(is_wrapper_call(OsStr::new("/run/kiln/kiln-oci-runtime")));
        assert!(is_wrapper_call(OsStr::new("kiln-oci-runtime")));
        assert!(!is_wrapper_call(OsStr::new("/run/kiln/agent")));
        assert!(!is_wrapper_call(OsStr::new("/kiln-oci-runtime/init")));
        assert!(!is_wrapper_call(OsStr::new("")));
    }
}
