//! GET `/builds/{id}/events`: the build's events as an SSE stream.
//!
//! What those who follow a build at one time are sent is made once for all of them ([`crate::events`]); each takes it at its own pace, so
//! a slow client holds what it has not taken yet and keeps nobody waiting.

use super::error::{ApiError, log, shown};
use super::get_build::{Wanted, find};
use super::openapi::events::BuildBlock;
use super::openapi::params::{self, params};
use super::openapi::problems::{BadRequest, NotFound};
use super::openapi::schemas;
use super::{Clock, Shared, query};
use crate::events::blocks::heartbeat;
use crate::events::{Batch, Follower};
use crate::token::Caller;
use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// How long a client waits before it connects again, in milliseconds.
pub(super) const RETRY: u32 = 1000;

/// Largest id of an event: the store's numbers have a sign.
const MAX_EVENT_ID: u64 = i64::MAX.unsigned_abs();

/// Where a client goes on.
pub(super) struct LastEventId;

params!(LastEventId: params::header(
    LAST_EVENT_ID.as_str(),
    "The id of the last event that was seen: the stream goes on after it.",
    schemas::number(0, MAX_EVENT_ID),
));

/// How long a client stays.
struct Follow;

params!(Follow: params::query(
    "follow",
    "`false`: what there is. `true`: all up to the final status.",
    schemas::flag().default(Some(false.into())),
));

/// Stream a build's events
///
/// Server-sent events: the data of each block is a `BuildEvent` as JSON. `id` is the event's number, which `Last-Event-ID` goes
/// on after; a heartbeat has none.
#[utoipa::path(
    get, path = "/builds/{id}/events", tag = "builds", params(Wanted, Follow, LastEventId),
    responses(
        (status = 200, description = "The stream.", body = inline(BuildBlock), content_type = "text/event-stream"),
        BadRequest, NotFound,
    ),
)]
pub(super) async fn build_events(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let build = find(&api, &caller, &id).await?;
    let follow = parse_follow(query.as_deref())?;
    let after = parse_last_event_id(&headers)?;
    let reader = Reader {
        follower: api.state.events.read(&build.id, after, follow),
        clock: api.state.clock.clone(),
        first: true,
    };
    let blocks = futures_util::stream::try_unfold(reader, Reader::next);
    let headers = [
        (CONTENT_TYPE, "text/event-stream"),
        (CACHE_CONTROL, "no-store"),
        // For proxies that would hold the stream back otherwise.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(blocks)).into_response())
}

struct Reader {
    follower: Follower,
    clock: Clock,
    first: bool,
}

impl Reader {
    /// The next blocks. A store that fails breaks the connection: the client comes back with the
    /// last id that it saw.
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, std::io::Error> {
        let batch = self.follower.next().await.map_err(|error| {
            log(&error);
            std::io::Error::other("the event stream broke")
        })?;
        let text = match batch {
            Batch::End => return Ok(None),
            Batch::Quiet => heartbeat((self.clock)()),
            Batch::Events(blocks) => blocks.text(),
        };
        let first = std::mem::take(&mut self.first);
        Ok(Some((if first { with_retry(&text) } else { text }, self)))
    }
}

/// The same blocks, the first of which says when to come back.
fn with_retry(blocks: &Bytes) -> Bytes {
    const DATA: &[u8] = b"\ndata: ";
    // Where the first block's data begins: nothing before it can hold a line break.
    let at = blocks.windows(DATA.len()).position(|window| window == DATA).map_or(0, |at| at + 1);
    let (before, after) = blocks.split_at(at);
    [before, format!("retry: {RETRY}\n").as_bytes(), after].concat().into()
}

fn parse_follow(text: Option<&str>) -> Result<bool, ApiError> {
    let mut follow = None;
    for (name, value) in query::pairs(text)? {
        if name != "follow" {
            return Err(query::unknown(&name, "follow and no other"));
        }
        if follow.replace(query::flag(&name, &value)?).is_some() {
            return Err(query::twice(&name));
        }
    }
    Ok(follow.unwrap_or(false))
}

/// 0 without one, which is before the first event.
pub(super) fn parse_last_event_id(headers: &HeaderMap) -> Result<u64, ApiError> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let values: Vec<String> = headers.get_all(LAST_EVENT_ID).iter().map(text).collect();
    let refused = |value: &str| {
        let message = format!("Last-Event-ID is {}; it must be an id of this stream", shown(value));
        ApiError::bad_request("invalid_header", message)
    };
    match values.as_slice() {
        [] => Ok(0),
        [one] => query::number(one, &(0..=MAX_EVENT_ID)).ok_or_else(|| refused(one)),
        [one, ..] => Err(refused(one)),
    }
}
