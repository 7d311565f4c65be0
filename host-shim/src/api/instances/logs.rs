//! GET `/instances/{id}/logs`: what an instance printed, as an SSE stream.
//!
//! By default as hypeman has it: the data of every block is one line as a JSON text, whichever stream it came from.
//! With `format=events`, which is Kiln's own, the data is an object as in a build's events: `log` with its stream,
//! `heartbeat`, and at the end `status` with the exit code; `id:` is where `Last-Event-ID` goes on.

use std::fmt::Write;

use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use url::form_urlencoded;

use super::get::{Wanted, find};
use crate::api::build_events::{RETRY, parse_last_event_id};
use crate::api::error::{ApiError, log, shown};
use crate::api::types::rfc3339;
use crate::api::{Clock, Shared};
use crate::instances::log::{Batch, From, Reader};
use crate::instances::{Instance, State as Lifecycle};
use crate::token::Caller;

pub(in crate::api) async fn instance_logs(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let instance = find(&api, &caller, &id).await?;
    let asked = Asked::parse(query.as_deref().unwrap_or_default())?;
    let from = match asked.tail {
        Some(lines) => From::Tail(lines),
        None => From::Byte(parse_last_event_id(&headers)?),
    };
    let reader = api.state.instances.read(instance, from, asked.follow).await?;
    let stream =
        Stream { reader: Some(reader), events: asked.events, clock: api.state.clock.clone() };
    let blocks = futures_util::stream::try_unfold(stream, Stream::next);
    let headers = [
        (CONTENT_TYPE, "text/event-stream"),
        (CACHE_CONTROL, "no-store"),
        // For proxies that would hold the stream back otherwise.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(blocks)).into_response())
}

struct Stream {
    /// None at the end.
    reader: Option<Reader>,
    events: bool,
    clock: Clock,
}

impl Stream {
    /// The next blocks. A log that cannot be read breaks the connection.
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, std::io::Error> {
        let mut text = String::new();
        while text.is_empty() {
            let Some(reader) = &mut self.reader else { return Ok(None) };
            let batch = reader.next().await.inspect_err(|error| log(error))?;
            match batch {
                Batch::Lines(lines) => {
                    for line in lines {
                        self.line(&mut text, line.end, &line.payload);
                    }
                }
                Batch::Quiet if self.events => {
                    let now = rfc3339((self.clock)());
                    block(&mut text, None, &json!({ "type": "heartbeat", "timestamp": now }));
                }
                Batch::Quiet => {}
                Batch::End(instance) => {
                    self.reader = None;
                    if self.events {
                        block(&mut text, None, &status(&instance));
                    }
                }
            }
        }
        Ok(Some((text.into(), self)))
    }

    fn line(&self, out: &mut String, end: u64, payload: &Value) {
        if self.events {
            return block(out, Some(end), payload);
        }
        // A line that is only ended here was shown before.
        if payload["content"] != "" || payload["partial"] != true {
            block(out, None, &payload["content"]);
        }
    }
}

/// One block. JSON escapes every line break, so that data is always one line.
fn block(out: &mut String, id: Option<u64>, data: &Value) {
    if let Some(id) = id {
        let _ = writeln!(out, "id: {id}");
    }
    if let Some(kind) = data["type"].as_str() {
        let _ = write!(out, "event: {kind}\nretry: {RETRY}\n");
    }
    let _ = write!(out, "data: {data}\n\n");
}

/// Where the instance is when the stream ends.
fn status(instance: &Instance) -> Value {
    let at = instance.stopped_at.or(instance.started_at).unwrap_or(instance.created_at);
    let mut status = json!({
        "type": "status",
        "status": instance.state.as_str(),
        "timestamp": rfc3339(at),
    });
    if instance.state == Lifecycle::Stopped {
        status["exit_code"] = instance.exit_code.into();
        status["exit_message"] = instance.exit_message.clone().into();
    }
    status
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    follow: bool,
    tail: Option<u64>,
    events: bool,
}

impl Asked {
    fn parse(query: &str) -> Result<Self, ApiError> {
        let mut asked = Self::default();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let refused = |allowed: &str| {
                let message = format!("{name} is {}; it must be {allowed}", shown(&value));
                ApiError::bad_request("invalid_query", message)
            };
            match (&*name, &*value) {
                ("follow", "true") => asked.follow = true,
                ("follow", "false") => asked.follow = false,
                ("follow", _) => return Err(refused("true or false")),
                ("tail", text) if text.bytes().all(|b| b.is_ascii_digit()) => {
                    asked.tail = Some(text.parse().map_err(|_| refused("a number of lines"))?);
                }
                ("tail", _) => return Err(refused("a number of lines")),
                ("source", "app") => {}
                ("source", _) => return Err(refused("app: other logs are the operator's")),
                ("format", "events") => asked.events = true,
                ("format", "lines") => asked.events = false,
                ("format", _) => return Err(refused("lines or events")),
                _ => {
                    let message = format!(
                        "there is no parameter {}; logs have follow, tail, source and format",
                        shown(&name)
                    );
                    return Err(ApiError::bad_request("unknown_parameter", message));
                }
            }
        }
        Ok(asked)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_and_what_it_is_not_is_refused() {
        let parse = |query| Asked::parse(query).map_err(|error| error.code());
        assert_eq!(parse(""), Ok(Asked::default()));
        let all = Asked { follow: true, tail: Some(10), events: true };
        assert_eq!(parse("follow=true&tail=10&source=app&format=events"), Ok(all));
        for bad in ["follow=yes", "tail=-1", "tail=", "tail=x", "source=vmm", "format=x"] {
            assert_eq!(parse(bad), Err("invalid_query"), "{bad}");
        }
        assert_eq!(parse("lines=1"), Err("unknown_parameter"));
    }
}
