//! `/secrets`: a tenant's secrets. Values go in and never come out.

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use kiln_protocol::secret::{MAX_SECRET_VALUE, SecretId};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::body::Whole;
use super::error::{ApiError, shown};
use super::openapi::params::{self, params};
use super::openapi::problems::{
    BadRequest, Conflict, Forbidden, NoRoom, NotFound, Stalled, TooLarge, Unavailable,
    Unprocessable,
};
use super::openapi::schemas;
use super::types::Secret;
use super::{Api, Shared};
use crate::secrets::Owner;
use crate::store::{Role, StoreError};
use crate::token::Caller;

/// Of a request that sets one: a byte more than a value may have, so that this verb says so.
pub(super) const MAX_BODY: usize = MAX_SECRET_VALUE + 1;
/// Most secrets of a tenant.
const MAX_SECRETS: u32 = 1000;

/// Set a secret
///
/// The body is its value: any bytes, at most 512 KiB; none is an empty value.
#[utoipa::path(
    put, path = "/secrets/{id}", tag = "secrets", params(Named),
    request_body(content = inline(Option<Raw>), content_type = "application/octet-stream"),
    responses((status = 204, description = "It is set."), BadRequest, Forbidden, Stalled, Conflict, TooLarge, Unprocessable, Unavailable, NoRoom),
)]
pub(super) async fn put_secret(
    State(api): State<Shared>,
    caller: Caller,
    Named(id): Named,
    body: Result<Whole, ApiError>,
) -> Result<StatusCode, ApiError> {
    caller.require(Role::Tenant)?;
    let Whole(value) = body.map_err(|error| match error.code() {
        "too_large" => too_large(),
        _ => error,
    })?;
    if value.len() > MAX_SECRET_VALUE {
        return Err(too_large());
    }
    let Api { state, .. } = &*api;
    let tenant = &caller.tenant;
    let sealed = state.vault.seal(Owner::Tenant(tenant), id.as_str(), value.to_vec());
    let sealed = sealed.map_err(|error| ApiError::internal(&error))?;
    let stored = state.store.put_secret(tenant, &id, &sealed, api.now(), MAX_SECRETS).await;
    stored.map_err(|error| match error {
        StoreError::TooMany { limit, .. } => {
            let message = format!("{tenant} has {limit} secrets, as many as it may; remove some");
            ApiError::conflict("too_many_secrets", message)
        }
        error => error.into(),
    })?;
    tracing::info!(secret = %id, %tenant, token = caller.token_id, "a secret was set");
    Ok(StatusCode::NO_CONTENT)
}

/// List secrets
///
/// Names and times of the caller's tenant's; values never come out.
#[utoipa::path(
    get, path = "/secrets", tag = "secrets",
    responses((status = 200, description = "All of them.", body = Vec<Secret>), Forbidden),
)]
pub(super) async fn list_secrets(
    State(api): State<Shared>,
    caller: Caller,
) -> Result<Json<Vec<Secret>>, ApiError> {
    caller.require(Role::Tenant)?;
    let secrets = api.state.store.secrets(&caller.tenant).await?;
    Ok(Json(secrets.iter().map(Secret::new).collect()))
}

/// Remove a secret
#[utoipa::path(
    delete, path = "/secrets/{id}", tag = "secrets", params(Named),
    responses((status = 204, description = "It is gone."), Forbidden, NotFound, Unprocessable),
)]
pub(super) async fn delete_secret(
    State(api): State<Shared>,
    caller: Caller,
    Named(id): Named,
) -> Result<StatusCode, ApiError> {
    caller.require(Role::Tenant)?;
    let tenant = &caller.tenant;
    api.state.store.delete_secret(tenant, &id).await?;
    tracing::info!(secret = %id, %tenant, token = caller.token_id, "a secret was removed");
    Ok(StatusCode::NO_CONTENT)
}

/// The id in the path.
pub(super) struct Named(SecretId);

params!(Named: params::path("id", "The secret's id.", schemas::secret_id()));

/// What a secret's body may be.
struct Raw;

impl PartialSchema for Raw {
    fn schema() -> RefOr<Schema> {
        schemas::bytes().max_length(Some(MAX_SECRET_VALUE)).build().into()
    }
}

impl ToSchema for Raw {}

impl FromRequestParts<Shared> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Shared) -> Result<Self, ApiError> {
        let Path(text) = Path::<String>::from_request_parts(parts, api)
            .await
            .map_err(|_| bad_id("(not UTF-8)"))?;
        SecretId::new(text.as_str()).map(Self).map_err(|_| bad_id(&text))
    }
}

/// A text that cannot be a secret's id.
pub(super) fn bad_id(text: &str) -> ApiError {
    let message = format!("{} cannot be: {}", shown(text), kiln_protocol::secret::BadSecretId);
    ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", message)
}

fn too_large() -> ApiError {
    ApiError::too_large(format!("a secret has at most {MAX_SECRET_VALUE} bytes"))
}
