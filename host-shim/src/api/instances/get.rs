//! GET `/instances/{id}`, and how every verb finds the instance that it is about.

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;

use super::Instance;
use crate::api::error::ApiError;
use crate::api::openapi::params::{self, params};
use crate::api::openapi::problems::NotFound;
use crate::api::openapi::schemas;
use crate::api::{Api, Shared};
use crate::instances::{Instance as Stored, InstanceId};
use crate::token::Caller;

/// Get an instance
#[utoipa::path(
    get, path = "/instances/{id}", tag = "instances", params(Wanted),
    responses((status = 200, description = "The instance.", body = Instance), NotFound),
)]
pub(in crate::api) async fn get_instance(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
) -> Result<Json<Instance>, ApiError> {
    Ok(Json(Instance::new(&find(&api, &caller, &id).await?)))
}

/// The id in the path. What is no id at all is no instance either.
pub(in crate::api) struct Wanted(pub(in crate::api) InstanceId);

params!(Wanted: params::path("id", "The instance's id.", schemas::id()));

impl FromRequestParts<Shared> for Wanted {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Shared) -> Result<Self, ApiError> {
        let Path(id) = Path::<String>::from_request_parts(parts, api)
            .await
            .map_err(|_| ApiError::no_such_instance())?;
        InstanceId::parse(&id).map(Self).ok_or_else(ApiError::no_such_instance)
    }
}

/// An instance that the caller may see. Another tenant's is as unknown as one that never was.
pub(in crate::api) async fn find(
    api: &Api,
    caller: &Caller,
    id: &InstanceId,
) -> Result<Stored, ApiError> {
    let instance = api.state.store.instance(id).await?;
    instance.filter(|instance| caller.owns(&instance.tenant)).ok_or_else(ApiError::no_such_instance)
}
