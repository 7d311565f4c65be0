//! What the guest reports: events while it works, one outcome at the end.

use serde::{Deserialize, Serialize};

/// Most content bytes of one log event. Longer lines come in parts.
pub const MAX_LOG_BYTES: usize = 16 * 1024;
/// Longest text of a report (a step's name, a message, a detail), in bytes. Longer ones are cut.
pub const MAX_REPORT_TEXT: usize = 8 * 1024;

/// Longest digest in a job or a report, in bytes.
pub const MAX_DIGEST: usize = 256;

/// Most lockfiles of a report.
pub const MAX_LOCKFILES: usize = 64;
/// Longest path of one, in bytes.
pub const MAX_LOCKFILE_PATH: usize = 1024;

/// An event with its number. Numbers start at 1 and have no gaps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumberedEvent {
    /// The number.
    pub seq: u64,
    /// When it happened by the guest's clock, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What happened.
    pub event: Event,
}

/// Something that happened in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A line that somebody printed, or a part of one.
    Log(Log),
    /// A step started or ended.
    Step(Step),
    /// The build reached its next phase.
    Phase(Phase),
    /// A step asked for the address of a name. There is none to be had.
    Name(Name),
}

/// A name that a step asked the name server for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Name {
    /// The step, where it is known.
    pub step: Option<u32>,
    /// The name in lower case, without a dot at its end; letters, digits, `-`, `_` and `.`, and `?` for every byte
    /// that is another. At most [`MAX_NAME`] bytes.
    pub host: String,
}

/// Longest name of a host, in bytes (RFC 1035, section 2.3.4, as text).
pub const MAX_NAME: usize = 253;

impl Name {
    fn check(&self) -> Result<(), ReportTooLarge> {
        at_most("name", self.host.len(), MAX_NAME)?;
        let plain = |b: u8| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.' | b'?')
        };
        let is_name = !self.host.is_empty() && self.host.bytes().all(plain);
        if is_name { Ok(()) } else { Err(ReportTooLarge { field: "name" }) }
    }
}

/// A line, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Log {
    /// Who printed it.
    pub stream: LogStream,
    /// The step that printed it, as the runtime wrapper knows it; `None` for the engine and agent.
    pub step: Option<u32>,
    /// True when the line goes on in the next event of the same stream and step.
    pub partial: bool,
    /// The bytes, without the newline. At most [`MAX_LOG_BYTES`]; any bytes at all.
    #[serde(with = "serde_bytes")]
    pub content: Vec<u8>,
}

/// What a line counts towards the log limit at least: its record costs more than its content.
const MIN_COST: u64 = 16;

impl Log {
    /// What the line counts towards the log limit, in bytes.
    pub fn cost(&self) -> u64 {
        (self.content.len() as u64).max(MIN_COST)
    }
}

/// Who printed a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogStream {
    /// A program's standard output.
    Stdout,
    /// A program's standard error.
    Stderr,
    /// Kiln itself.
    Kiln,
}

/// A step (one RUN) as the OCI runtime's wrapper saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Counts from 1 over the whole build.
    pub index: u32,
    /// The command. At most [`MAX_REPORT_TEXT`] bytes.
    pub name: String,
    /// Where it is.
    pub state: StepState,
}

/// The state of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StepState {
    /// It runs from now on.
    Started,
    /// It ended.
    Ended(StepEnd),
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepEnd {
    /// Its exit code; 128 + n when signal n ended it.
    pub exit_code: i32,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// The most memory it used at one time, in bytes; 0 when unknown.
    pub memory_peak_bytes: u64,
    /// Processes of it that were killed for want of memory.
    pub oom_kills: u32,
}

/// The phases of a job inside the guest: those of a build, in order, and the one of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// The source arrives.
    Unpacking,
    /// The engine runs the Dockerfile.
    Building,
    /// The image goes to the host's staging.
    Pushing,
    /// The program of an instance has started.
    Running,
}

/// Guest → host: how the job ended. The last message of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The image is in staging.
    Built(Built),
    /// It failed.
    Failed(Failure),
    /// The host cancelled it.
    Cancelled,
    /// The program of an instance has ended; every byte of its output was reported before.
    Exited(Exited),
}

/// An image that was built and pushed to staging.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Built {
    /// Digest of its manifest, as `sha256:…`. The host checks it.
    pub digest: String,
    /// The engine and its version, as the guest says.
    pub engine: String,
    /// The source's lists of exact versions, by path.
    pub lockfiles: Vec<Lockfile>,
}

/// A list of exact versions that a package manager has written into the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lockfile {
    /// In the source.
    pub path: String,
    /// SHA-256 of its content.
    pub sha256: [u8; 32],
}

/// How the program of an instance ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exited {
    /// Its exit code; 128 + n when signal n ended it; 126 when it could not be executed and 127 when it was
    /// not found.
    pub code: u8,
}

/// Why a build failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The cause, for programs.
    pub kind: FailureKind,
    /// What happened, to what, and what to do: for people.
    pub message: String,
    /// The step, where one is to blame.
    pub step: Option<u32>,
    /// The step's exit code.
    pub exit_code: Option<i32>,
    /// More, such as the engine's last lines.
    pub detail: Option<String>,
}

/// The causes of a failed build. Some only the host can find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it, and docs/FAILURES.md explains each")]
pub enum FailureKind {
    StepFailed,
    DockerfileMissing,
    DockerfileInvalid,
    SourceInvalid,
    BaseDigestMismatch,
    PullFailed,
    PushFailed,
    SecretMissing,
    SecretLeaked,
    EgressDenied,
    OutOfMemory,
    DiskFull,
    ProcessLimit,
    LogLimit,
    TimedOut,
    EngineCrashed,
    ProtocolMismatch,
    VmLost,
    HostRestarted,
    Internal,
}

impl FailureKind {
    /// Every cause, in wire order.
    pub const ALL: [Self; 20] = [
        Self::StepFailed,
        Self::DockerfileMissing,
        Self::DockerfileInvalid,
        Self::SourceInvalid,
        Self::BaseDigestMismatch,
        Self::PullFailed,
        Self::PushFailed,
        Self::SecretMissing,
        Self::SecretLeaked,
        Self::EgressDenied,
        Self::OutOfMemory,
        Self::DiskFull,
        Self::ProcessLimit,
        Self::LogLimit,
        Self::TimedOut,
        Self::EngineCrashed,
        Self::ProtocolMismatch,
        Self::VmLost,
        Self::HostRestarted,
        Self::Internal,
    ];

    /// The name that the API uses.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::StepFailed => "step_failed",
            Self::DockerfileMissing => "dockerfile_missing",
            Self::DockerfileInvalid => "dockerfile_invalid",
            Self::SourceInvalid => "source_invalid",
            Self::BaseDigestMismatch => "base_digest_mismatch",
            Self::PullFailed => "pull_failed",
            Self::PushFailed => "push_failed",
            Self::SecretMissing => "secret_missing",
            Self::SecretLeaked => "secret_leaked",
            Self::EgressDenied => "egress_denied",
            Self::OutOfMemory => "out_of_memory",
            Self::DiskFull => "disk_full",
            Self::ProcessLimit => "process_limit",
            Self::LogLimit => "log_limit",
            Self::TimedOut => "timed_out",
            Self::EngineCrashed => "engine_crashed",
            Self::ProtocolMismatch => "protocol_mismatch",
            Self::VmLost => "vm_lost",
            Self::HostRestarted => "host_restarted",
            Self::Internal => "internal",
        }
    }

    /// The cause of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

impl std::fmt::Display for FailureKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A report that breaks a bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} of a report is not within its bounds")]
pub struct ReportTooLarge {
    /// Which field.
    pub field: &'static str,
}

impl Event {
    /// What it counts towards the log limit, in bytes: the host stores it.
    pub fn cost(&self) -> u64 {
        match self {
            Self::Log(log) => log.cost(),
            // Each step is told of twice.
            Self::Step(step) => step.name.len() as u64,
            Self::Name(name) => name.host.len() as u64,
            Self::Phase(_) => 0,
        }
    }

    /// Whether every bound holds. The host asks before it believes.
    pub fn check(&self) -> Result<(), ReportTooLarge> {
        match self {
            Self::Log(log) => at_most("log content", log.content.len(), MAX_LOG_BYTES),
            Self::Step(step) => at_most("step name", step.name.len(), MAX_REPORT_TEXT),
            Self::Phase(_) => Ok(()),
            Self::Name(name) => name.check(),
        }
    }
}

impl Outcome {
    /// Whether every bound holds. The host asks before it believes.
    pub fn check(&self) -> Result<(), ReportTooLarge> {
        match self {
            Self::Built(built) => {
                at_most("digest", built.digest.len(), MAX_DIGEST)?;
                at_most("engine", built.engine.len(), 256)?;
                at_most("lockfiles", built.lockfiles.len(), MAX_LOCKFILES)?;
                built.lockfiles.iter().try_for_each(|lockfile| {
                    at_most("lockfile path", lockfile.path.len(), MAX_LOCKFILE_PATH)
                })
            }
            Self::Failed(failure) => {
                at_most("message", failure.message.len(), MAX_REPORT_TEXT)?;
                at_most("detail", failure.detail.as_ref().map_or(0, String::len), MAX_REPORT_TEXT)
            }
            Self::Cancelled | Self::Exited(_) => Ok(()),
        }
    }
}

/// Cuts a text to [`MAX_REPORT_TEXT`] bytes at a character's edge, marking the cut.
pub fn cut_text(text: &str) -> String {
    cut(text, MAX_REPORT_TEXT)
}

fn cut(text: &str, limit: usize) -> String {
    const MARK: &str = "…";
    if text.len() <= limit {
        return text.to_owned();
    }
    let mut end = limit - MARK.len();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{MARK}", &text[..end])
}

fn at_most(field: &'static str, actual: usize, limit: usize) -> Result<(), ReportTooLarge> {
    if actual > limit { Err(ReportTooLarge { field }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(n: usize) -> Event {
        Event::Log(Log {
            stream: LogStream::Stdout,
            step: None,
            partial: false,
            content: vec![0; n],
        })
    }

    fn step(n: usize) -> Event {
        Event::Step(Step { index: 1, name: "n".repeat(n), state: StepState::Started })
    }

    fn failed(message: usize, detail: usize) -> Outcome {
        Outcome::Failed(Failure {
            kind: FailureKind::Internal,
            message: "m".repeat(message),
            step: None,
            exit_code: None,
            detail: Some("d".repeat(detail)),
        })
    }

    #[test]
    fn bounds_hold_at_and_break_above() {
        assert!(log(MAX_LOG_BYTES).check().is_ok());
        assert!(log(MAX_LOG_BYTES + 1).check().is_err());
        assert!(step(MAX_REPORT_TEXT).check().is_ok());
        assert!(step(MAX_REPORT_TEXT + 1).check().is_err());
        let name = |host: &str| Event::Name(Name { step: None, host: host.into() }).check().is_ok();
        assert!(name(&"n".repeat(MAX_NAME)) && !name(&"n".repeat(MAX_NAME + 1)));
        assert!(name("_a.b-1.?") && !name("") && !name("A") && !name("a\n") && !name("é"));
        assert!(failed(MAX_REPORT_TEXT, MAX_REPORT_TEXT).check().is_ok());
        assert!(failed(MAX_REPORT_TEXT + 1, 0).check().is_err());
        assert!(failed(0, MAX_REPORT_TEXT + 1).check().is_err());
        let built = |n: usize| {
            Outcome::Built(Built {
                digest: "d".repeat(n),
                engine: String::new(),
                lockfiles: vec![],
            })
        };
        assert!(built(256).check().is_ok());
        assert!(built(257).check().is_err());
    }

    #[test]
    fn a_cut_text_fits_and_stays_text() {
        assert_eq!(cut_text("short"), "short");
        let long = "é".repeat(MAX_REPORT_TEXT);
        let cut = cut_text(&long);
        assert!(cut.len() <= MAX_REPORT_TEXT && cut.ends_with('…'));
    }

    #[test]
    fn names_of_causes_go_both_ways() {
        for kind in FailureKind::ALL {
            assert_eq!(FailureKind::from_name(kind.as_str()), Some(kind));
        }
        assert_eq!(FailureKind::from_name("nothing"), None);
    }
}
