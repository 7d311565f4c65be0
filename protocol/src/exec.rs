//! Sessions in a VM: commands that run there, and files that are copied in or out.
//!
//! ```text
//! host ── dials 5002 ──▶ agent
//!   preamble (Channel::Exec, the VM's nonce)
//!   Open          ──▶
//!                 ◀──  Started, or Ended when nothing could be started
//!   Input, Signal ──▶
//!                 ◀──  Output, InputTaken
//!                 ◀──  Ended, the last
//! ```
//! One connection is one session. Each direction flows by itself: a client that does not read holds back the output
//! alone, and a command that does not read gets [`INPUT_WINDOW`] and no more, so that a signal always passes. A
//! connection that ends before `Ended` ends every process of the session.

use serde::{Deserialize, Serialize};

use crate::job::{JobTooLarge, MAX_JOB_TEXT, at_most};
use crate::run::{MAX_ARGS, MAX_DIRECTORY, MAX_ENV, MAX_RUN_BYTES, MAX_USER};

/// Most bytes of one [`HostToSession::Input`] or [`SessionToHost::Output`].
pub const MAX_CHUNK: usize = 64 * 1024;
/// Input bytes that the host may send beyond what the command has taken.
pub const INPUT_WINDOW: u64 = 1024 * 1024;
/// Longest text of [`Ended::Failed`], in bytes.
pub const MAX_WHY: usize = 4096;

/// Host → guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostToSession {
    /// What the session is. Once, before anything else.
    Open(Box<Open>),
    /// The next bytes for the command's standard input, or of the archive that is copied in.
    Input(#[serde(with = "serde_bytes")] Vec<u8>),
    /// There is no more input.
    InputEnd,
    /// The terminal has another size.
    Resize(Terminal),
    /// A signal for the command and its children: its number.
    Signal(u8),
}

/// Guest → host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionToHost {
    /// The command is being started, or the copy has begun.
    Started,
    /// The next bytes of the command's output, or of the archive that is copied out.
    Output {
        /// Where it was written; [`Stream::Out`] for a terminal and for an archive.
        stream: Stream,
        /// At most [`MAX_CHUNK`].
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// So many bytes of input have been taken, or thrown away because nobody reads them any more, since the start:
    /// the window moves on. At least once for each quarter of it.
    InputTaken {
        /// In bytes.
        total: u64,
    },
    /// The end. Nothing follows.
    Ended(Ended),
}

/// Which output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// What a session is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Open {
    /// Run a command.
    Exec(Exec),
    /// Send what is at this path as a tar archive.
    CopyOut(Copy),
    /// Unpack a tar archive at this path: into the directory that is there, or else under this very name.
    CopyIn(Copy),
}

/// Whose files and processes a session meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// The job's: the step that runs or that failed, or the instance.
    Job {
        /// With the step's secrets.
        secrets: bool,
    },
    /// The VM itself, as root.
    Vm,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub cols: u16,
}

/// A command to run.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Where.
    pub place: Place,
    /// The program and its arguments; the program is looked for along `PATH` when it has no slash.
    pub command: Vec<String>,
    /// Variables beside those of the place; they win.
    pub env: Vec<(String, String)>,
    /// Absolute; the place's own otherwise.
    pub directory: Option<String>,
    /// `user` or `user:group`, each a name or a number; the place's own otherwise.
    pub user: Option<String>,
    /// With a terminal of this size.
    pub terminal: Option<Terminal>,
}

// An environment is where people put passwords.
impl std::fmt::Debug for Exec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exec")
            .field("place", &self.place)
            .field("command", &format_args!("{} words", self.command.len()))
            .field("env", &format_args!("{} of them", self.env.len()))
            .field("directory", &self.directory)
            .field("user", &self.user)
            .field("terminal", &self.terminal)
            .finish()
    }
}

/// Files to copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copy {
    /// Where.
    pub place: Place,
    /// Relative to the place's working directory unless it is absolute.
    pub path: String,
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// The command ended, or the copy is complete (0).
    Exited {
        /// 128 + n when signal n ended it.
        code: u8,
    },
    /// The command did not run, or the copy failed.
    Failed {
        /// Why, for programs.
        cause: Cause,
        /// Why, for people; at most [`MAX_WHY`].
        why: String,
    },
}

/// Why a session failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// There is no such program, or nothing at the path that is to be copied.
    NotFound,
    /// The program cannot be executed.
    NotExecutable,
    /// There is no step to enter now.
    NoStep,
    /// What was asked for does not make sense: an unknown user, a directory that is not there, a bad archive.
    Invalid,
    /// The agent's own failure.
    Internal,
}

impl Open {
    /// Whether every bound holds. Both sides ask.
    pub fn check(&self) -> Result<(), JobTooLarge> {
        match self {
            Self::Exec(exec) => exec.check(),
            Self::CopyOut(copy) | Self::CopyIn(copy) => {
                at_most("path", copy.path.len(), MAX_DIRECTORY)
            }
        }
    }
}

impl Exec {
    fn check(&self) -> Result<(), JobTooLarge> {
        at_most("command's words", self.command.len(), MAX_ARGS)?;
        let mut total = 0;
        for word in &self.command {
            at_most("argument", word.len(), MAX_JOB_TEXT)?;
            total += word.len();
        }
        at_most("command", total, MAX_RUN_BYTES)?;
        at_most("env count", self.env.len(), MAX_ENV)?;
        let mut total = 0;
        for (name, value) in &self.env {
            at_most("variable", name.len().max(value.len()), MAX_JOB_TEXT)?;
            total += name.len() + value.len();
        }
        at_most("env", total, MAX_RUN_BYTES)?;
        at_most("directory", self.directory.as_ref().map_or(0, String::len), MAX_DIRECTORY)?;
        at_most("user", self.user.as_ref().map_or(0, String::len), MAX_USER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec() -> Exec {
        Exec {
            place: Place::Job { secrets: false },
            command: vec!["true".into()],
            env: vec![],
            directory: None,
            user: None,
            terminal: None,
        }
    }

    #[test]
    fn each_bound_is_named() {
        assert_eq!(Open::Exec(exec()).check(), Ok(()));
        let long = "x".repeat(MAX_JOB_TEXT + 1);
        let broken = [
            (Exec { command: vec![String::new(); MAX_ARGS + 1], ..exec() }, "command's words"),
            (Exec { command: vec![long.clone()], ..exec() }, "argument"),
            (Exec { env: vec![(String::new(), long.clone())], ..exec() }, "variable"),
            (Exec { directory: Some(long.clone()), ..exec() }, "directory"),
            (Exec { user: Some(long), ..exec() }, "user"),
        ];
        for (exec, field) in broken {
            assert_eq!(Open::Exec(exec).check().map_err(|e| e.field), Err(field));
        }
        let path = "x".repeat(MAX_DIRECTORY + 1);
        let copy = Copy { place: Place::Vm, path };
        assert_eq!(Open::CopyOut(copy).check().map_err(|e| e.field), Err("path"));
    }

    #[test]
    fn a_session_s_variables_are_not_shown() {
        let exec = Exec { env: vec![("TOKEN".into(), "hunter2".into())], ..exec() };
        assert!(
            !format!("{:?}", HostToSession::Open(Box::new(Open::Exec(exec)))).contains("hunter2")
        );
    }
}
