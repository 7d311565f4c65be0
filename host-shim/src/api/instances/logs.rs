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

use super::get::{Wanted, find};
use crate::api::build_events::{LastEventId, RETRY, parse_last_event_id};
use crate::api::error::{ApiError, log};
use crate::api::openapi::events::InstanceBlock;
use crate::api::openapi::params::{self, params};
use crate::api::openapi::problems::{BadRequest, NotFound};
use crate::api::openapi::schemas;
use crate::api::types::rfc3339;
use crate::api::{Clock, Shared, query};
use crate::instances::log::{Batch, From, Reader};
use crate::instances::{Instance, State as Lifecycle};
use crate::token::Caller;

/// Most lines that a caller may ask back for: more than any log holds.
const MAX_TAIL: u64 = i64::MAX.unsigned_abs();

params!(Asked:
    params::query("follow", "`false`: what there is. `true`: all up to the end.", schemas::flag().default(Some(false.into()))),
    params::query("tail", "Only so many lines of what there is.", schemas::number(0, MAX_TAIL)),
    params::query("source", "hypeman's; there is no other.", schemas::words(["app"])),
    params::query("format", "`lines`: each a JSON text, as hypeman has it. `events`: objects, as of a build.", schemas::words(["lines", "events"])),
);

/// Stream what an instance printed
///
/// Server-sent events: the data of each block is one line as a JSON text, or with `format=events` an `InstanceEvent`.
#[utoipa::path(
    get, path = "/instances/{id}/logs", tag = "instances", params(Wanted, Asked, LastEventId),
    responses(
        (status = 200, description = "The stream.", body = inline(InstanceBlock), content_type = "text/event-stream"),
        BadRequest, NotFound,
    ),
)]
pub(in crate::api) async fn instance_logs(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let instance = find(&api, &caller, &id).await?;
    let asked = Asked::parse(query.as_deref())?;
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
    fn parse(text: Option<&str>) -> Result<Self, ApiError> {
        let (mut follow, mut tail, mut source, mut format) = (None, None, None, None);
        for (name, value) in query::pairs(text)? {
            let refused = |allowed: &str| query::invalid(&name, &value, allowed);
            let fresh = match (name.as_str(), value.as_str()) {
                ("follow", _) => follow.replace(query::flag(&name, &value)?).is_none(),
                ("tail", text) => {
                    let lines = query::number(text, &(0..=MAX_TAIL));
                    let lines = lines.ok_or_else(|| refused("a number of lines"))?;
                    tail.replace(lines).is_none()
                }
                ("source", "app") => source.replace(()).is_none(),
                ("source", _) => return Err(refused("app: other logs are the operator's")),
                ("format", "events") => format.replace(true).is_none(),
                ("format", "lines") => format.replace(false).is_none(),
                ("format", _) => return Err(refused("lines or events")),
                _ => return Err(query::unknown(&name, "follow, tail, source and format")),
            };
            if !fresh {
                return Err(query::twice(&name));
            }
        }
        Ok(Self { follow: follow.unwrap_or(false), tail, events: format.unwrap_or(false) })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_and_what_it_is_not_is_refused() {
        let parse = |query| Asked::parse(Some(query)).map_err(|error| error.code());
        assert_eq!(parse(""), Ok(Asked::default()));
        let all = Asked { follow: true, tail: Some(10), events: true };
        assert_eq!(parse("follow=true&tail=10&source=app&format=events"), Ok(all));
        for bad in
            ["follow=yes", "tail=-1", "tail=", "tail=x", "source=vmm", "format=x", "tail=1&tail=1"]
        {
            assert_eq!(parse(bad), Err("invalid_query"), "{bad}");
        }
        assert_eq!(parse("lines=1"), Err("unknown_parameter"));
    }
}
