//! GET `/health` and `/ready`: no token, and nothing told but yes or no.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::Shared;
use super::error::{ApiError, log};
use super::openapi::problems::Unavailable;

/// That it is well.
#[derive(Serialize, ToSchema)]
pub(super) struct Health {
    /// In a word.
    status: &'static str,
}

/// Whether the process answers
#[utoipa::path(
    get, path = "/health", tag = "server", security(()),
    responses((status = 200, description = "It does.", body = Health)),
)]
pub(super) async fn health() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// Whether builds can be taken and run
#[utoipa::path(
    get, path = "/ready", tag = "server", security(()),
    responses((status = 200, description = "They can.", body = Health), Unavailable),
)]
pub(super) async fn ready(State(api): State<Shared>) -> Result<Json<Health>, ApiError> {
    let not_ready = |why: String| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", why);
    if let Err(error) = api.state.store.ready().await {
        // A caller without a token is told no more.
        log(&error);
        return Err(not_ready("the store cannot be written".into()));
    }
    api.state.ready.ready().await.map_err(not_ready)?;
    Ok(Json(Health { status: "ready" }))
}
