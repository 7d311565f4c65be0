//! What follows the Hello on the control connection.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event::{NumberedEvent, Outcome};
use crate::job::Job;
use crate::secret::{SecretAnswer, SecretId};

/// Most source bytes of one [`HostToAgent::Source`].
pub const MAX_SOURCE_CHUNK: usize = 256 * 1024;

/// Source bytes that the host may send beyond what the agent has taken. It bounds the memory of
/// both sides and keeps the connection free for [`HostToAgent::Cancel`].
pub const SOURCE_WINDOW: u64 = 2 * 1024 * 1024;

/// Stored events after which the host acknowledges at once. An acknowledgement costs the guest about as much as an
/// event of the longest content; these are a quarter of what the agent keeps of such.
pub const ACKNOWLEDGE_EVENTS: u64 = 16;

/// How long stored events may wait for more of them before they are acknowledged.
pub const ACKNOWLEDGE_WAIT: Duration = Duration::from_millis(5);

/// Host → guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostToAgent {
    /// The job. Once in a session, before anything else.
    Job(Box<Job>),
    /// The next bytes of the source archive as the user sent it (tar, gzip or zstd by its first
    /// bytes).
    Source(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The source archive is complete.
    SourceEnd {
        /// Its length in bytes.
        total: u64,
    },
    /// Every event up to this number is stored; the agent may forget it. See [`ACKNOWLEDGE_EVENTS`].
    Acknowledge {
        /// The number.
        seq: u64,
    },
    /// Stop. A build stops at once and its outcome is [`Outcome::Cancelled`]; an instance's program gets its stop
    /// signal and some time, and its outcome says how it ended.
    Cancel,
    /// The outcome is stored: power off.
    Finish,
    /// What was asked for by [`AgentToHost::SecretRequest`].
    Secret {
        /// Which one.
        id: SecretId,
        /// It, or why not.
        answer: SecretAnswer,
    },
}

/// Guest → host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentToHost {
    /// Something happened.
    Event(NumberedEvent),
    /// So many source bytes have been taken since the start: the window moves on.
    SourceTaken {
        /// Of the archive, in bytes.
        total: u64,
    },
    /// The engine's process is running.
    EngineStarted,
    /// How the job ended. Sent after every event; repeated after a resume until [`HostToAgent::Finish`].
    Outcome(Outcome),
    /// What the agent itself cost, before each [`AgentToHost::Outcome`].
    Usage(AgentUsage),
    /// The build needs this secret. One at a time; repeated after a resume until it is answered.
    SecretRequest {
        /// Which one.
        id: SecretId,
    },
    /// The step that failed stays as it is. Right before the [`AgentToHost::Outcome`], after which the agent waits
    /// without a deadline, and does not dial again when the connection ends.
    Kept,
}

/// What a build cost beside its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentUsage {
    /// The most memory of the agent's that was resident at one time, in bytes.
    pub memory_peak_bytes: u64,
    /// How long the kernel took to start the engine's process, in microseconds; `None` when there was none.
    pub engine_spawn_us: Option<u64>,
}
