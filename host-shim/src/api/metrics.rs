//! GET `/metrics`: what the whole server counts, without a name of anybody's.

use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::Shared;
use super::error::{ApiError, log};
use crate::metrics::{MEDIA_TYPE, Now};
use crate::store::Role;
use crate::token::Caller;

/// What the server counts
///
/// For Prometheus (OpenMetrics). Numbers of the whole host, of all tenants together, without anybody's names. A server
/// may be set to need no token for it.
#[utoipa::path(
    get, path = "/metrics", tag = "server",
    responses((
        status = 200, description = "OpenMetrics 1.0.", body = String,
        content_type = "application/openmetrics-text",
    )),
)]
pub(super) async fn metrics(
    State(api): State<Shared>,
    request: Request,
) -> Result<Response, ApiError> {
    if !api.state.metrics_open {
        let (mut parts, _) = request.into_parts();
        Caller::from_request_parts(&mut parts, &api).await?.require(Role::Reader)?;
    }
    // The rest is worth knowing all the more when the store does not answer.
    let builds = api.state.store.unfinished().await.inspect_err(|error| log(error)).ok();
    let now = Now {
        builds,
        at: api.now(),
        instances: api.state.instances.counts(),
        kept: api.state.kept.list(None).len(),
        sessions: api.state.sessions.count(),
    };
    let text = api.state.events.metrics().encode(&now).map_err(|e| ApiError::internal(&e))?;
    Ok(([(CONTENT_TYPE, MEDIA_TYPE)], text).into_response())
}
