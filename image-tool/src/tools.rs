//! Running other programs: found before work starts, bounded in time, ended as a group, and with the
//! end of what they said in the error.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

use crate::text;

/// A program, and the Debian package that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tool {
    /// Its name in `PATH`.
    pub program: &'static str,
    /// What to install.
    pub package: &'static str,
}

/// Makes Debian roots.
pub const MMDEBSTRAP: Tool = Tool { program: "mmdebstrap", package: "mmdebstrap" };
/// Makes the root disk.
pub const MKFS_EROFS: Tool = Tool { program: "mkfs.erofs", package: "erofs-utils" };
/// Packs a base image's layer, hard links and extended attributes included.
pub const TAR: Tool = Tool { program: "tar", package: "tar" };
/// Runs `depmod` of the kernel's own release.
pub const CHROOT: Tool = Tool { program: "chroot", package: "coreutils" };
/// Unpacks modules of releases that compress them.
pub const XZ: Tool = Tool { program: "xz", package: "xz-utils" };

/// The time that everything in an image is given unless `SOURCE_DATE_EPOCH` says otherwise:
/// 2025-01-01. Zero would make programs complain of implausibly old files.
const DEFAULT_EPOCH: u64 = 1_735_689_600;
/// How much of a program's messages an error shows.
const TAIL_LINES: usize = 12;
/// Kept of standard error while the program runs.
const TAIL_BYTES: usize = 16 * 1024;

/// A program is missing, or failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// Not installed.
    #[error("missing programs: {}; install them with: apt-get install {}", programs.join(", "), packages.join(" "))]
    Missing {
        /// What was looked for.
        programs: Vec<&'static str>,
        /// What brings it.
        packages: Vec<&'static str>,
    },
    /// It could not be started or waited for.
    #[error("cannot run {command}")]
    Start {
        /// The command line.
        command: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended badly.
    #[error("{command} failed ({status}):\n{stderr}")]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines of its standard error.
        stderr: String,
    },
    /// It took too long and was ended.
    #[error("{command} did not end within {} s and was stopped", limit.as_secs())]
    TooSlow {
        /// The command line.
        command: String,
        /// What it was given.
        limit: Duration,
    },
}

/// Checks that all are there, so that nothing fails half-way; names all that are not.
pub fn require(tools: &[Tool]) -> Result<(), ToolError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing: Vec<_> = tools.iter().filter(|t| find(t.program, &path).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(ToolError::Missing {
        programs: missing.iter().map(|t| t.program).collect(),
        packages: missing.iter().map(|t| t.package).collect(),
    })
}

fn find(program: &str, path: &std::ffi::OsStr) -> Option<PathBuf> {
    let executable = |p: &PathBuf| {
        p.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(path).map(|dir| dir.join(program)).find(executable)
}

/// Runs a program to its end; its standard output goes to `output`, or nowhere.
pub async fn run(
    tool: Tool,
    args: Vec<OsString>,
    output: Option<File>,
    limit: Duration,
) -> Result<(), ToolError> {
    let command = describe(tool, &args);
    tracing::debug!(%command, "running");
    let failed_start = |source| ToolError::Start { command: command.clone(), source };
    let mut child = Command::new(tool.program)
        .args(args)
        .env("LC_ALL", "C.UTF-8")
        .env("SOURCE_DATE_EPOCH", epoch().to_string())
        .env_remove(crate::registry::CREDS_VARIABLE)
        .stdin(Stdio::null())
        .stdout(output.map_or_else(Stdio::null, Stdio::from))
        .stderr(Stdio::piped())
        // A group of its own: what the program started is ended with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed_start)?;
    let mut group = Group(child.id());
    let stderr = child.stderr.take();
    let finish = async {
        let (tail, status) = tokio::join!(read_tail(stderr), child.wait());
        status.map(|status| (tail, status))
    };
    let Ok(ended) = tokio::time::timeout(limit, finish).await else {
        return Err(ToolError::TooSlow { command, limit });
    };
    let (tail, status) = ended.map_err(failed_start)?;
    group.0 = None;
    if status.success() {
        return Ok(());
    }
    Err(ToolError::Failed { command, status, stderr: last_lines(&tail) })
}

/// Kills the process group unless it was disarmed: on a deadline, and when Ctrl-C drops the future.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0.and_then(|pid| i32::try_from(pid).ok())
            && let Err(error) = killpg(Pid::from_raw(pid), Signal::SIGKILL)
        {
            tracing::debug!(pid, %error, "the process group was gone already");
        }
    }
}

async fn read_tail(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut tail = Vec::new();
    let Some(mut stream) = stream else { return tail };
    let mut buffer = [0; 4096];
    // A read error on a pipe ends the messages, not the run: the exit status decides.
    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
        tail.extend_from_slice(&buffer[..n]);
        tail.drain(..tail.len().saturating_sub(TAIL_BYTES));
    }
    tail
}

fn last_lines(tail: &[u8]) -> String {
    let text = String::from_utf8_lossy(tail);
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    text::printable(&lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n"))
}

fn describe(tool: Tool, args: &[OsString]) -> String {
    let mut words = vec![tool.program.to_owned()];
    words.extend(args.iter().map(|a| a.to_string_lossy().into_owned()));
    text::printable(&words.join(" "))
}

/// Seconds since 1970 that files in an image are given.
pub fn epoch() -> u64 {
    source_date_epoch().unwrap_or(DEFAULT_EPOCH)
}

/// The variable that reproducible builds agreed on, when it holds a number.
pub fn source_date_epoch() -> Option<u64> {
    std::env::var("SOURCE_DATE_EPOCH").ok()?.parse().ok()
}

/// An argument of the form `--option=PATH`, which need not be UTF-8.
pub fn with_path(option: &str, path: &Path) -> OsString {
    let mut argument = OsString::from(option);
    argument.push(path);
    argument
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SH: Tool = Tool { program: "sh", package: "dash" };
    const LIMIT: Duration = Duration::from_secs(30);

    fn script(text: &str) -> Vec<OsString> {
        vec!["-c".into(), text.into()]
    }

    #[test]
    fn all_missing_programs_are_named_with_their_packages() {
        let gone = Tool { program: "kiln-no-such", package: "none" };
        let error = require(&[SH, gone, XZ, gone]).unwrap_err().to_string();
        assert!(error.contains("apt-get install none"), "{error}");
        assert!(!error.contains("dash"), "{error}");
        require(&[SH]).unwrap();
    }

    #[tokio::test]
    async fn output_goes_to_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        run(SH, script("echo $LC_ALL"), Some(File::create(&path).unwrap()), LIMIT).await.unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "C.UTF-8\n");
    }

    #[tokio::test]
    async fn a_failure_shows_the_command_and_its_last_lines() {
        let text = "i=0; while [ $i -lt 9000 ]; do echo line $i; i=$((i+1)); done >&2; printf '\\033[31mend\\n' >&2; exit 3";
        let error = run(SH, script(text), None, LIMIT).await.unwrap_err().to_string();
        assert!(error.starts_with("sh -c i=0") && error.contains("exit status: 3"), "{error}");
        assert!(error.ends_with("line 8999\n\u{fffd}[31mend"), "{error}");
        assert_eq!(error.lines().count(), 1 + TAIL_LINES);
    }

    #[tokio::test]
    async fn what_a_slow_program_started_is_ended_with_it() {
        // The grandchild holds the pipe's write end: end of file says that it is gone.
        let (reader, writer) = std::io::pipe().unwrap();
        let output = File::from(std::os::fd::OwnedFd::from(writer));
        let run =
            run(SH, script("sleep 1000 & sleep 1000"), Some(output), Duration::from_millis(50));
        let error = run.await.unwrap_err();
        assert!(matches!(error, ToolError::TooSlow { .. }), "{error}");
        let end = tokio::task::spawn_blocking(move || std::io::read_to_string(reader));
        assert_eq!(tokio::time::timeout(LIMIT, end).await.unwrap().unwrap().unwrap(), "");
    }
}
