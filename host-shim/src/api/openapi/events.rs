//! The blocks of event streams in the document. These types only describe: what they describe is made in
//! [`crate::events::payload`] and [`crate::instances`].

use serde::Deserialize;
use utoipa::openapi::schema::{AnyOfBuilder, ObjectBuilder, Schema, Type};
use utoipa::openapi::{Ref, RefOr};
use utoipa::{PartialSchema, ToSchema};

use super::schemas::{FailureKind, InstanceState, Time, number, text, words};
use crate::build::Status;

/// What the data of a build's event holds, by its type.
#[derive(Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[expect(dead_code, reason = "it only describes")]
pub(crate) enum BuildEvent {
    /// One line, or a part of one that is longer than 16 KiB.
    Log {
        #[schema(value_type = Time)]
        timestamp: String,
        /// Without the newline.
        content: String,
        /// The exact bytes, where they are not UTF-8.
        #[schema(nullable = false)]
        content_b64: Option<String>,
        stream: Stream,
        #[schema(nullable = false)]
        step: Option<u32>,
        /// Whether the line goes on.
        #[schema(nullable = false)]
        partial: Option<bool>,
    },
    /// The build is there now.
    Status {
        #[schema(value_type = Time)]
        timestamp: String,
        status: Status,
        #[schema(nullable = false)]
        queue_position: Option<u32>,
    },
    /// A step began or ended.
    Step {
        #[schema(value_type = Time)]
        timestamp: String,
        index: u32,
        #[schema(nullable = false)]
        total: Option<u32>,
        name: String,
        state: StepState,
        #[schema(nullable = false)]
        exit_code: Option<i32>,
        #[schema(nullable = false)]
        duration_ms: Option<u64>,
    },
    /// Why the build failed.
    Failure {
        #[schema(value_type = Time)]
        timestamp: String,
        #[schema(value_type = FailureKind)]
        kind: String,
        message: String,
        #[schema(nullable = false)]
        step: Option<u32>,
        #[schema(nullable = false)]
        exit_code: Option<i32>,
        #[schema(nullable = false)]
        detail: Option<String>,
    },
    /// A host that a step reached, or was refused: its connection, or its address. Once for each step and host.
    Egress {
        #[schema(value_type = Time)]
        timestamp: String,
        /// In lower case.
        host: String,
        allowed: bool,
        /// The step, as the VM says, where it is known.
        #[schema(nullable = false)]
        step: Option<u32>,
    },
    /// Events that are not kept any more: log lines of a build that ended long ago. The block's id is `to`, its time that of the
    /// event after them.
    Trimmed {
        #[schema(value_type = Time)]
        timestamp: String,
        /// The first number that is not there.
        from: u64,
        /// The last.
        to: u64,
    },
    /// 15 seconds of silence.
    Heartbeat {
        #[schema(value_type = Time)]
        timestamp: String,
    },
}

/// Who wrote a line.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Stream {
    Stdout,
    Stderr,
    Kiln,
}

/// Where a step is.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StepState {
    Started,
    Done,
    Cached,
    Failed,
}

/// What the data of an instance's event holds with `format=events`, by its type.
#[derive(Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[expect(dead_code, reason = "it only describes")]
pub(crate) enum InstanceEvent {
    /// One line, or a part of one that is longer than 16 KiB.
    Log {
        #[schema(value_type = Time)]
        timestamp: String,
        /// Without the newline.
        content: String,
        /// The exact bytes, where they are not UTF-8.
        #[schema(nullable = false)]
        content_b64: Option<String>,
        stream: Stream,
        /// Whether the line goes on.
        #[schema(nullable = false)]
        partial: Option<bool>,
    },
    /// Where the instance is when the stream ends.
    Status {
        #[schema(value_type = Time)]
        timestamp: String,
        #[schema(value_type = InstanceState)]
        status: String,
        exit_code: Option<u8>,
        exit_message: Option<String>,
    },
    /// Silence.
    Heartbeat {
        #[schema(value_type = Time)]
        timestamp: String,
    },
}

/// A block of a build's stream.
pub(crate) struct BuildBlock;

impl PartialSchema for BuildBlock {
    fn schema() -> RefOr<Schema> {
        block(Ref::from_schema_name(BuildEvent::name()).into())
            .property("id", text().pattern(Some("^[0-9]+$")))
            .property(
                "event",
                words(["log", "status", "step", "failure", "egress", "trimmed", "heartbeat"]),
            )
            .build()
            .into()
    }
}

impl ToSchema for BuildBlock {}

/// A block of an instance's stream: a line as a JSON text, or an event.
pub(crate) struct InstanceBlock;

impl PartialSchema for InstanceBlock {
    fn schema() -> RefOr<Schema> {
        let either =
            AnyOfBuilder::new().item(text()).item(Ref::from_schema_name(InstanceEvent::name()));
        block(Schema::from(either.build()).into())
            .property("id", text().pattern(Some("^[0-9]+$")))
            .property("event", words(["log", "status", "heartbeat"]))
            .build()
            .into()
    }
}

impl ToSchema for InstanceBlock {}

/// A block, by what its data is as JSON.
fn block(data: RefOr<Schema>) -> ObjectBuilder {
    let data = text().content_media_type("application/json").content_schema(Some(data));
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .property("data", data)
        .property("retry", number(0, 60_000))
        .required("data")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::event::{LogStream, Step, StepEnd, StepState};
    use serde_json::{Value, json};

    use super::*;
    use crate::build::{Failure, FailureKind};
    use crate::events::payload;

    #[test]
    fn what_is_made_is_what_is_described() {
        let failure =
            Failure { step: Some(1), exit_code: Some(7), ..Failure::new(FailureKind::VmLost, "m") };
        let step = |state| payload::step(&Step { index: 1, name: "s".into(), state });
        let end = StepEnd { exit_code: 1, duration_ms: 1, memory_peak_bytes: 1, oom_kills: 0 };
        for mut payload in [
            payload::log(LogStream::Stdout, Some(1), true, b"a\xff"),
            payload::kiln_log("hello"),
            payload::status(Status::Queued, Some(1)),
            step(StepState::Started),
            step(StepState::Ended(end)),
            payload::failure(&failure.with_detail("d")),
            payload::egress(Some(1), "a.example", false),
            payload::egress(None, "a.example", true),
            payload::trimmed(2, 9),
            json!({ "type": "heartbeat" }),
        ] {
            payload["timestamp"] = "2026-01-01T00:00:00.000Z".into();
            assert!(serde_json::from_value::<BuildEvent>(payload.clone()).is_ok(), "{payload}");
            payload["more"] = Value::Null;
            assert!(serde_json::from_value::<BuildEvent>(payload).is_err());
        }
    }
}
