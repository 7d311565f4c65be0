//! GET `/health` and `/ready`: no token, and nothing told but yes or no.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::Shared;
use super::error::{ApiError, log};

/// The process answers.
pub(super) async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// Builds can be taken and run.
pub(super) async fn ready(State(api): State<Shared>) -> Result<Json<Value>, ApiError> {
    let not_ready = |why: String| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", why);
    if let Err(error) = api.state.store.ready().await {
        // A caller without a token is told no more.
        log(&error);
        return Err(not_ready("the store cannot be written".into()));
    }
    api.state.ready.ready().await.map_err(not_ready)?;
    Ok(Json(json!({ "status": "ready" })))
}
