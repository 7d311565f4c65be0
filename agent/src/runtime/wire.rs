//! What wrapper and agent say to each other over the agent's Unix socket.
//!
//! The wrapper first sends one byte, [`HELLO`], and with it the read ends of the two pipes that
//! become the step's stdout and stderr. Then each side sends lines of JSON:
//!
//! ```text
//! wrapper  ── HELLO + stdout, stderr ──▶  agent
//!          ── FromWrapper::Create    ──▶
//!          ◀─────── StepPolicy ────────
//!          ── FromWrapper::Created  ──▶
//!          ── FromWrapper::Ended or NotStarted ──▶    (the pipes reach their end)
//!          ◀── HOLD, as often as wanted ──    of a failed step that stays
//!          ── FromWrapper::Held or NotHeld ──▶
//!          ◀────── one byte, ACK ──────
//! ```
//!
//! Both sides are Kiln's, but a line holds what a Dockerfile wrote, so lines are bounded.

use std::io;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The first byte; the pipes come with it.
pub const HELLO: u8 = b'K';
/// The agent has read the pipes to their end and reported the step.
pub const ACK: u8 = b'A';
/// Instead: make the step's container again, for people to enter.
pub const HOLD: u8 = b'H';
/// The same with the step's secrets.
pub const HOLD_WITH_SECRETS: u8 = b'S';

/// Longest line in bytes: a step's name of 8 KiB may grow sixfold as JSON.
pub const MAX_LINE: usize = 64 * 1024;

/// Wrapper → agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromWrapper {
    /// The engine wants a step to run.
    Create {
        /// The command as people know it, cut to the bound of a report.
        name: String,
    },
    /// The step's container is there: from now on it can be entered.
    Created {
        /// What the container runtime calls it.
        id: String,
        /// Its config.
        config: PathBuf,
        /// Whether its processes see secrets of the build.
        secrets: bool,
    },
    /// The step ran and ended.
    Ended {
        /// Its exit code; 128 + n for signal n.
        code: i32,
    },
    /// The answer to [`HOLD`]: it can be entered.
    Held {
        /// What the container runtime calls it.
        id: String,
        /// The config that sessions are like.
        config: PathBuf,
        /// Its cgroup, from the hierarchy's root.
        cgroup: PathBuf,
    },
    /// The other answer.
    NotHeld {
        /// Why.
        why: String,
    },
    /// The step could not be started. What the runtime says about it is on the step's stderr.
    NotStarted {
        /// Why, where Kiln itself refused.
        message: Option<String>,
    },
}

/// A line that is none of ours.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Reading or writing failed.
    #[error("the connection between runtime wrapper and agent failed")]
    Io(#[from] io::Error),
    /// Longer than [`MAX_LINE`].
    #[error("a line between runtime wrapper and agent is over {MAX_LINE} bytes")]
    TooLong,
    /// Not the JSON that was expected.
    #[error("a line between runtime wrapper and agent could not be read")]
    Malformed(#[from] serde_json::Error),
    /// The other side is gone.
    #[error("the other side closed the connection between runtime wrapper and agent")]
    Closed,
    /// The first byte or its pipes are not there.
    #[error("the runtime wrapper sent no pipes")]
    NoPipes,
}

/// A value as a line.
pub fn encode(value: &impl Serialize) -> Result<Vec<u8>, WireError> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    if line.len() > MAX_LINE { Err(WireError::TooLong) } else { Ok(line) }
}

/// A line, with its newline, as a value.
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, WireError> {
    if line.len() > MAX_LINE {
        return Err(WireError::TooLong);
    }
    match line.split_last() {
        Some((b'\n', value)) => Ok(serde_json::from_slice(value)?),
        _ => Err(WireError::Closed),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kiln_protocol::event::MAX_REPORT_TEXT;

    #[test]
    fn the_worst_name_fits_a_line() {
        let create = FromWrapper::Create { name: "\u{1}".repeat(MAX_REPORT_TEXT) };
        let line = encode(&create).unwrap();
        assert!(line.len() > 6 * MAX_REPORT_TEXT);
        assert_eq!(decode::<FromWrapper>(&line).unwrap(), create);
    }

    #[test]
    fn lines_are_bounded() {
        let name = |n: usize| FromWrapper::Create { name: "n".repeat(n) };
        let around = encode(&name(0)).unwrap().len();
        assert_eq!(encode(&name(MAX_LINE - around)).unwrap().len(), MAX_LINE);
        assert!(matches!(encode(&name(MAX_LINE - around + 1)), Err(WireError::TooLong)));
        let long = vec![b'\n'; MAX_LINE + 1];
        assert!(matches!(decode::<FromWrapper>(&long), Err(WireError::TooLong)));
    }

    #[test]
    fn a_torn_line_is_a_closed_connection() {
        assert!(matches!(decode::<FromWrapper>(b""), Err(WireError::Closed)));
        assert!(matches!(
            decode::<FromWrapper>(b"{\"Ended\":{\"code\":0}}"),
            Err(WireError::Closed)
        ));
        assert!(matches!(decode::<FromWrapper>(b"{}\n"), Err(WireError::Malformed(_))));
    }
}
