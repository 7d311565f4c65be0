//! GET `/builds/{id}`, and how every verb finds the build that it is about.

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;

use super::error::ApiError;
use super::openapi::params::{self, params};
use super::openapi::problems::NotFound;
use super::openapi::schemas;
use super::{Api, Shared, types};
use crate::build::{Build, BuildId, Status};
use crate::store::StoreError;
use crate::token::Caller;

/// Get a build
#[utoipa::path(
    get, path = "/builds/{id}", tag = "builds", params(Wanted),
    responses((status = 200, description = "The build.", body = types::Build), NotFound),
)]
pub(super) async fn get_build(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
) -> Result<Json<types::Build>, ApiError> {
    let build = find(&api, &caller, &id).await?;
    Ok(Json(shape(&api, &build).await?))
}

/// The id in the path. What is no id at all is no build either.
pub(super) struct Wanted(pub(super) BuildId);

params!(Wanted: params::path("id", "The build's id.", schemas::id()));

impl FromRequestParts<Shared> for Wanted {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Shared) -> Result<Self, ApiError> {
        let Path(id) = Path::<String>::from_request_parts(parts, api)
            .await
            .map_err(|_| ApiError::no_such_build())?;
        BuildId::new(id).map(Self).map_err(|_| ApiError::no_such_build())
    }
}

/// A build that the caller may see. Another tenant's is as unknown as one that never was.
pub(super) async fn find(api: &Api, caller: &Caller, id: &BuildId) -> Result<Build, ApiError> {
    let build = api.state.store.build(id).await?;
    build.filter(|build| caller.owns(&build.tenant)).ok_or_else(ApiError::no_such_build)
}

/// The JSON of a build, with its place in the queue.
pub(super) async fn shape(api: &Api, build: &Build) -> Result<types::Build, StoreError> {
    let position = match build.status {
        Status::Queued => api.state.store.queue_position(&build.id).await?,
        _ => None,
    };
    let mut shape = types::Build::new(build, position, &api.state.public_host);
    shape.kept_until = api.state.kept.lease(&build.id).map(|lease| types::rfc3339(lease.until));
    Ok(shape)
}
