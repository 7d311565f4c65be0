//! The API's answers as the client reads them: leniently, so that a newer server does no harm, and
//! only what is shown. The shapes themselves belong to `api/types.rs`.

use jiff::Timestamp;
use serde::Deserialize;

use super::error::CliError;
use super::flag_names::in_failure;
use crate::build::Status;

/// The parts of a build that commands use.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the API's field names")]
pub struct BuildView {
    pub id: String,
    pub tenant: Option<String>,
    pub status: String,
    pub queue_position: Option<u64>,
    pub image_ref: Option<String>,
    pub image_digest: Option<String>,
    pub error: Option<String>,
    pub failure: Option<FailureView>,
    pub created_at: Option<String>,
    pub started_at: Option<String>,
    pub completed_at: Option<String>,
    pub duration_ms: Option<u64>,
    pub attempt: Option<u64>,
    pub entered: bool,
    #[serde(default)]
    pub kept_until: Option<String>,
    pub tags: Option<std::collections::BTreeMap<String, String>>,
    pub usage: Option<UsageView>,
    pub reached: Option<Vec<ReachedView>>,
}

/// A host that a build reached.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the API's field names")]
pub struct ReachedView {
    pub host: String,
    pub port: u16,
}

/// Why a build failed.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the API's field names")]
pub struct FailureView {
    pub kind: String,
    pub message: String,
    pub step: Option<u64>,
    pub exit_code: Option<i64>,
    pub detail: Option<String>,
}

/// What a build used.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the API's field names")]
pub struct UsageView {
    pub memory_peak_bytes: Option<u64>,
    pub log_bytes: Option<u64>,
}

/// What an event says.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[expect(missing_docs, reason = "the API's field names")]
pub enum EventView {
    Log {
        #[serde(default)]
        content: String,
        content_b64: Option<String>,
        #[serde(default)]
        stream: String,
        step: Option<u64>,
        #[serde(default)]
        partial: bool,
    },
    Status {
        status: String,
        queue_position: Option<u64>,
    },
    Step {
        index: u64,
        total: Option<u64>,
        #[serde(default)]
        name: String,
        state: String,
        exit_code: Option<i64>,
        duration_ms: Option<u64>,
    },
    Failure {
        kind: String,
        #[serde(default)]
        message: String,
    },
    Egress {
        host: String,
        allowed: bool,
        step: Option<u64>,
    },
    Trimmed {
        from: u64,
        to: u64,
    },
    #[serde(other)]
    Other,
}

impl EventView {
    /// Whether nothing follows.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Status { status, .. } => Status::from_name(status).is_some_and(Status::is_final),
            _ => false,
        }
    }
}

impl BuildView {
    /// The view of an API's answer.
    pub fn of(value: &serde_json::Value) -> Result<Self, CliError> {
        let view = Self::deserialize(value)
            .map_err(|e| CliError::host(format!("the server's build is not understood: {e}")))?;
        if view.id.is_empty() || view.status.is_empty() {
            return Err(CliError::host("the server's answer is not a build"));
        }
        Ok(view)
    }

    /// `Err` where the build did not end well, with the exit code and words for it.
    pub fn verdict(&self) -> Result<(), CliError> {
        let id = &self.id;
        match Status::from_name(&self.status) {
            Some(Status::Ready) => Ok(()),
            Some(Status::Cancelled) => {
                Err(CliError::cancelled(format!("build {id} was cancelled")))
            }
            Some(Status::Failed) => Err(self.why_failed()),
            _ => {
                let status = &self.status;
                Err(CliError::host(format!("the server says that build {id} ended as {status}"))
                    .hint(format!("look again: kiln show {id}")))
            }
        }
    }

    fn why_failed(&self) -> CliError {
        let id = &self.id;
        let failure = self.failure.clone().unwrap_or_default();
        let message = match (&self.error, failure.message.as_str()) {
            (Some(error), _) if !error.is_empty() => error.clone(),
            (_, "") => "the server gives no cause".to_owned(),
            (_, message) => message.to_owned(),
        };
        let message = in_failure(&failure.kind, &message);
        // A server's message names step and exit code already; this is for one that does not.
        let blame = match (failure.step, failure.exit_code) {
            (Some(step), Some(code)) => Some(format!("step {step}, exit code {code}")),
            (Some(step), None) => Some(format!("step {step}")),
            _ => None,
        };
        let named = |n: Option<i64>| n.is_none_or(|n| message.contains(&n.to_string()));
        let step = failure.step.and_then(|step| i64::try_from(step).ok());
        let message = match blame {
            Some(blame) if !named(step) || !named(failure.exit_code) => {
                format!("build {id} failed ({blame}): {message}")
            }
            _ => format!("build {id} failed: {message}"),
        };
        let mut error = if failure.kind == "timed_out" {
            CliError::cancelled(message).hint(format!(
                "give it more time with --timeout, or see what it did: kiln logs {id}"
            ))
        } else {
            CliError::failed(message).hint(format!("{}: kiln logs {id}", advice(&failure.kind)))
        };
        error.detail = failure.detail;
        error
    }

    /// How long ago it was stored.
    pub fn age_ms(&self, now: Timestamp) -> Option<u64> {
        let created: Timestamp = self.created_at.as_deref()?.parse().ok()?;
        u64::try_from(now.as_millisecond() - created.as_millisecond()).ok()
    }
}

/// What to do about a failure, before the pointer to the log.
fn advice(kind: &str) -> &'static str {
    match kind {
        "dockerfile_missing" => {
            "put a Dockerfile at the root of the source, or name one with -f; the log"
        }
        "dockerfile_invalid" => "correct the Dockerfile; the log",
        "source_invalid" => "check what is sent (.dockerignore, links that lead outside); the log",
        "pull_failed" | "base_digest_mismatch" => "check the FROM lines; the log",
        "egress_denied" => "permit the domain with --allow; the log",
        "out_of_memory" => "give it more with --memory; the log",
        "disk_full" => "give it more with --disk; the log",
        "log_limit" => "make the steps print less; the log so far",
        "vm_lost" | "host_restarted" | "engine_crashed" | "internal" | "push_failed" => {
            "this is not the Dockerfile's fault, build again; the log"
        }
        _ => "the whole log",
    }
}

/// A duration for people: `0.4s`, `12.0s`, `3m05s`, `2h00m`, `3d04h`.
pub fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{seconds}.{}s", ms % 1000 / 100),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}

/// A number for people: `1,234`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A size for people: `17 B`, `1.5 KiB`, `12.3 MiB`.
pub fn size(bytes: u64) -> String {
    let (mut whole, mut tenths, mut unit) = (bytes, 0, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if whole < 1024 {
            break;
        }
        (tenths, whole, unit) = (whole % 1024 * 10 / 1024, whole / 1024, next);
    }
    if unit == "B" { format!("{whole} B") } else { format!("{whole}.{tenths} {unit}") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::error::Exit;
    use super::*;

    fn failed(failure: &serde_json::Value) -> CliError {
        let build = serde_json::json!({
            "id": "b1", "status": "failed", "error": failure["message"], "failure": failure,
        });
        BuildView::of(&build).unwrap().verdict().unwrap_err()
    }

    #[test]
    fn step_and_exit_code_are_named_once() {
        let error = failed(&serde_json::json!({
            "kind": "step_failed", "message": "the command failed", "step": 2, "exit_code": 7,
        }));
        assert_eq!(error.message, "build b1 failed (step 2, exit code 7): the command failed");
        assert_eq!(error.exit, Exit::Failed);
        let error = failed(&serde_json::json!({
            "kind": "step_failed", "message": "step 2 (make) exited with code 7", "step": 2, "exit_code": 7,
        }));
        assert_eq!(error.message, "build b1 failed: step 2 (make) exited with code 7");
        assert_eq!(error.hint.as_deref(), Some("the whole log: kiln logs b1"));
    }

    #[test]
    fn time_that_ran_out_is_not_an_ordinary_failure() {
        let error = failed(&serde_json::json!({"kind": "timed_out", "message": "600 s are over"}));
        assert_eq!(error.exit, Exit::Cancelled);
    }

    #[test]
    fn a_newer_server_does_no_harm() {
        let event = r#"{"type":"telepathy","thought":1}"#;
        assert_eq!(serde_json::from_str::<EventView>(event).unwrap(), EventView::Other);
        let event = r#"{"type":"status","status":"ready","new":true}"#;
        assert!(serde_json::from_str::<EventView>(event).unwrap().is_final());
        assert!(BuildView::of(&serde_json::json!({"id": "b1", "status": "ready", "x": 1})).is_ok());
        assert!(BuildView::of(&serde_json::json!({"message": "hello"})).is_err());
    }

    #[test]
    fn durations_and_sizes_are_for_people() {
        let shown = [0, 59_990, 60_000, 185_000, 7_200_000, 277_200_000].map(duration);
        assert_eq!(shown, ["0.0s", "59.9s", "1m00s", "3m05s", "2h00m", "3d05h"]);
        let shown = [0, 999, 1000, 123_456, 1_234_567].map(count);
        assert_eq!(shown, ["0", "999", "1,000", "123,456", "1,234,567"]);
        let shown = [0, 1023, 1024, 1536, 12_900_000, u64::MAX].map(size);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "12.3 MiB", "16777215.9 TiB"]);
    }
}
