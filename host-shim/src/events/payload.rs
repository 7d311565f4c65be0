//! What events say: the JSON objects of the event stream without `timestamp`. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiln_protocol::event::{self as wire, LogStream, NumberedEvent, StepState};
use serde_json::{Value, json};

use crate::build::{Failure, Millis, Status};
use crate::store::NewEvent;

/// How far back a guest's clock is believed: longer than any broken connection holds events back.
const OLDEST: Millis = 60 * 60 * 1000;

/// The event to store for one of the agent's; `None` for a phase, which the driver turns into a
/// status, and for a name, which is told of with what else steps were refused. `now` is the host's clock, which bounds the guest's.
pub fn from_agent(numbered: &NumberedEvent, now: Millis) -> Option<NewEvent> {
    let payload = match &numbered.event {
        wire::Event::Log(line) => log(line.stream, line.step, line.partial, &line.content),
        wire::Event::Step(s) => step(s),
        wire::Event::Phase(_) | wire::Event::Name(_) => return None,
    };
    let at =
        i64::try_from(numbered.at_ms).unwrap_or(i64::MAX).clamp(now.saturating_sub(OLDEST), now);
    Some(NewEvent { at, agent_seq: Some(numbered.seq), payload })
}

/// An event of the host's own.
pub fn of_host(at: Millis, payload: Value) -> NewEvent {
    NewEvent { at, agent_seq: None, payload }
}

/// `log`: a line that somebody printed, or a part of one.
///
/// `content` is what can be shown of the bytes; where that is not all of them, `content_b64` has
/// them exactly. A newline cannot be in a line, so one that a guest sends all the same is not shown.
pub fn log(stream: LogStream, step: Option<u32>, partial: bool, bytes: &[u8]) -> Value {
    let lossy = String::from_utf8_lossy(bytes);
    let content = lossy.replace('\n', "\u{fffd}");
    let exact = content.as_bytes() == bytes;
    let mut payload = json!({ "type": "log", "stream": stream_name(stream), "content": content });
    if !exact {
        payload["content_b64"] = STANDARD.encode(bytes).into();
    }
    if let Some(step) = step {
        payload["step"] = step.into();
    }
    if partial {
        payload["partial"] = true.into();
    }
    payload
}

/// `log` of Kiln itself: one line for people.
pub fn kiln_log(line: &str) -> Value {
    log(LogStream::Kiln, None, false, line.as_bytes())
}

/// `status`.
pub fn status(status: Status, queue_position: Option<u32>) -> Value {
    let mut payload = json!({ "type": "status", "status": status.as_str() });
    if let Some(position) = queue_position {
        payload["queue_position"] = position.into();
    }
    payload
}

/// The status that a payload tells of, if it is one that does.
pub fn status_of(payload: &Value) -> Option<Status> {
    if payload["type"] != "status" {
        return None;
    }
    payload["status"].as_str().and_then(Status::from_name)
}

/// `trimmed`: the events with these numbers were there, and are not kept any more.
pub fn trimmed(from: u64, to: u64) -> Value {
    json!({ "type": "trimmed", "from": from, "to": to })
}

/// `step`: one RUN started or ended.
pub fn step(step: &wire::Step) -> Value {
    let mut payload = json!({ "type": "step", "index": step.index, "name": step.name });
    match &step.state {
        StepState::Started => payload["state"] = "started".into(),
        StepState::Ended(end) => {
            payload["state"] = if end.exit_code == 0 { "done" } else { "failed" }.into();
            payload["exit_code"] = end.exit_code.into();
            payload["duration_ms"] = end.duration_ms.into();
        }
    }
    payload
}

/// `egress`: a step reached a host, or was refused one.
pub fn egress(step: Option<u32>, host: &str, allowed: bool) -> Value {
    let mut payload = json!({ "type": "egress", "host": host, "allowed": allowed });
    if let Some(step) = step {
        payload["step"] = step.into();
    }
    payload
}

/// `failure`: the cause of a build's end.
pub fn failure(failure: &Failure) -> Value {
    let mut payload = json!({
        "type": "failure",
        "kind": failure.kind.as_str(),
        "message": failure.message,
    });
    if let Some(step) = failure.step {
        payload["step"] = step.into();
    }
    if let Some(code) = failure.exit_code {
        payload["exit_code"] = code.into();
    }
    if let Some(detail) = &failure.detail {
        payload["detail"] = detail.clone().into();
    }
    payload
}

const fn stream_name(stream: LogStream) -> &'static str {
    match stream {
        LogStream::Stdout => "stdout",
        LogStream::Stderr => "stderr",
        LogStream::Kiln => "kiln",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::event::{Event, Log, Phase, Step, StepEnd};
    use proptest::prelude::*;

    use super::*;
    use crate::build::FailureKind;

    #[test]
    fn text_is_content_alone() {
        assert_eq!(
            log(LogStream::Stdout, Some(2), false, "héllo".as_bytes()),
            json!({"type": "log", "stream": "stdout", "step": 2, "content": "héllo"})
        );
        assert_eq!(
            log(LogStream::Stderr, None, true, b""),
            json!({"type": "log", "stream": "stderr", "partial": true, "content": ""})
        );
        assert_eq!(kiln_log("hello")["stream"], "kiln");
    }

    #[test]
    fn other_bytes_come_in_base64_too() {
        let payload = log(LogStream::Stdout, None, false, b"a\xffb");
        assert_eq!(payload["content"], "a\u{fffd}b");
        assert_eq!(payload["content_b64"], "Yf9i");
        let payload = log(LogStream::Stdout, None, false, b"a\nb");
        assert_eq!(
            (&payload["content"], &payload["content_b64"]),
            (&json!("a\u{fffd}b"), &json!("YQpi"))
        );
    }

    #[test]
    fn control_characters_are_escaped_on_the_way_out() {
        let text = log(LogStream::Stdout, None, false, b"\x1b[31m\x00\r").to_string();
        assert!(text.bytes().all(|b| b >= 0x20), "{text}");
        assert!(text.contains(r"\u001b[31m\u0000\r") && !text.contains("content_b64"), "{text}");
    }

    #[test]
    fn steps_start_and_end() {
        let at = |state| Step { index: 3, name: "make".into(), state };
        let ended = |exit_code| {
            StepState::Ended(StepEnd {
                exit_code,
                duration_ms: 12,
                memory_peak_bytes: 1,
                oom_kills: 0,
            })
        };
        assert_eq!(
            step(&at(StepState::Started)),
            json!({"type": "step", "index": 3, "name": "make", "state": "started"})
        );
        assert_eq!(
            step(&at(ended(0))),
            json!({"type": "step", "index": 3, "name": "make", "state": "done", "exit_code": 0, "duration_ms": 12})
        );
        assert_eq!(step(&at(ended(137)))["state"], "failed");
    }

    #[test]
    fn failures_and_statuses() {
        let plain = Failure::new(FailureKind::VmLost, "gone");
        assert_eq!(
            failure(&plain),
            json!({"type": "failure", "kind": "vm_lost", "message": "gone"})
        );
        let full = Failure { step: Some(1), exit_code: Some(7), ..plain }.with_detail("tail");
        assert_eq!(failure(&full)["exit_code"], 7);
        assert_eq!(failure(&full)["detail"], "tail");
        assert_eq!(
            status(Status::Queued, Some(4)),
            json!({"type": "status", "status": "queued", "queue_position": 4})
        );
        for s in Status::ALL {
            assert_eq!(status_of(&status(s, None)), Some(s));
        }
        assert_eq!(status_of(&json!({"type": "log", "status": "ready"})), None);
    }

    #[test]
    fn the_guests_clock_is_believed_within_an_hour_of_the_past() {
        let now = 100 * OLDEST;
        let line = Event::Log(Log {
            stream: LogStream::Stdout,
            step: None,
            partial: false,
            content: vec![],
        });
        let at = |at_ms| {
            from_agent(&NumberedEvent { seq: 9, at_ms, event: line.clone() }, now).unwrap().at
        };
        let millis = |at: Millis| u64::try_from(at).unwrap();
        assert_eq!(at(millis(now)), now);
        assert_eq!(at(millis(now - OLDEST)), now - OLDEST);
        assert_eq!(at(millis(now - OLDEST - 1)), now - OLDEST);
        assert_eq!(at(millis(now + 1)), now);
        assert_eq!(at(u64::MAX), now);
        let phase = NumberedEvent { seq: 1, at_ms: 0, event: Event::Phase(Phase::Pushing) };
        assert_eq!(from_agent(&phase, now), None);
    }

    proptest! {
        #[test]
        fn no_byte_is_lost(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let payload = log(LogStream::Stdout, None, false, &bytes);
            let back = match payload["content_b64"].as_str() {
                Some(text) => STANDARD.decode(text).unwrap(),
                None => payload["content"].as_str().unwrap().as_bytes().to_vec(),
            };
            prop_assert_eq!(back, bytes);
            prop_assert!(!payload["content"].as_str().unwrap().contains('\n'));
        }
    }
}
