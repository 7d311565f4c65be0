//! GET `/health` and `/ready`: no token; told is what is missing, by its name, and no more.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::error::{ApiError, log};
use super::openapi::problems::Unavailable;
use super::{Check, Shared};

/// That it is well.
#[derive(Serialize, ToSchema)]
pub(super) struct Health {
    /// In a word.
    status: &'static str,
}

/// That builds can be taken and run.
#[derive(Serialize, ToSchema)]
pub(super) struct Ready {
    /// In a word.
    status: &'static str,
    /// What was looked at.
    checks: Vec<Checked>,
}

/// One of the things that a server needs.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct Checked {
    /// `store`, `server`, `registry`, `builder`, `vms` or `disk`.
    name: &'static str,
    /// Whether it is there.
    ready: bool,
    /// What is missing of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    detail: Option<String>,
}

impl From<Check> for Checked {
    fn from(Check { name, missing }: Check) -> Self {
        Self { name, ready: missing.is_none(), detail: missing }
    }
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
///
/// A refusal lists everything that was looked at, in `checks`, with what is missing.
#[utoipa::path(
    get, path = "/ready", tag = "server", security(()),
    responses((status = 200, description = "They can.", body = Ready), Unavailable),
)]
pub(super) async fn ready(State(api): State<Shared>) -> Response {
    let (store, others) = tokio::join!(api.state.store.ready(), api.state.ready.checks());
    let missing = store.err().map(|error| {
        // A caller without a token is told no more.
        log(&error);
        "the store cannot be written".to_owned()
    });
    let store = Check { name: "store", missing };
    let checks: Vec<Checked> = [store].into_iter().chain(others).map(Checked::from).collect();
    if checks.iter().all(|check| check.ready) {
        return Json(Ready { status: "ready", checks }).into_response();
    }
    let why = sentence(&checks);
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", why).with_checks(&checks)
}

/// All that is missing, in one line.
fn sentence(checks: &[Checked]) -> String {
    let missing = checks.iter().filter_map(|check| check.detail.as_deref());
    missing.collect::<Vec<_>>().join("; ")
}
