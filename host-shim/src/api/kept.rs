//! `/kept`: the VMs of failed builds that can still be entered.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::body::Whole;
use super::error::ApiError;
use super::get_build::{self, Wanted};
use super::openapi::problems::{
    BadRequest, Conflict, Forbidden, NotFound, Stalled, TooLarge, Unprocessable,
};
use super::openapi::schemas;
use super::{Shared, fields, types, whole};
use crate::build::BuildId;
use crate::kept;
use crate::store::Role;
use crate::token::Caller;

/// A kept VM, as GET `/kept` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Lease {
    /// The build that failed.
    #[schema(value_type = schemas::Id)]
    pub id: String,
    /// Whose it is.
    #[schema(value_type = schemas::TenantName)]
    pub tenant: String,
    /// What the VM holds of the host's memory.
    pub memory_mb: u32,
    /// Since when it is kept, RFC 3339.
    #[schema(value_type = schemas::Time)]
    pub since: String,
    /// When it goes, RFC 3339.
    #[schema(value_type = schemas::Time)]
    pub until: String,
    /// Sessions in it now; with none it is paused.
    pub sessions: usize,
}

impl Lease {
    fn new(lease: &kept::Lease) -> Self {
        Self {
            id: lease.id.to_string(),
            tenant: lease.tenant.to_string(),
            memory_mb: lease.memory_mb,
            since: types::rfc3339(lease.since),
            until: types::rfc3339(lease.until),
            sessions: lease.sessions,
        }
    }
}

/// For how long a kept VM stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Extend {
    #[serde(deserialize_with = "whole::number")]
    #[schema(value_type = Seconds)]
    seconds: u64,
}

/// The same, for the document.
struct Seconds;

impl PartialSchema for Seconds {
    fn schema() -> RefOr<Schema> {
        let schema = schemas::number(1, fields::MAX_KEEP_SECONDS.into());
        schema.description(Some("From now.")).build().into()
    }
}

impl ToSchema for Seconds {}

/// List kept VMs
///
/// Failed builds that can still be entered, the oldest first.
#[utoipa::path(
    get, path = "/kept", tag = "sessions",
    responses((status = 200, description = "All of them.", body = Vec<Lease>), Forbidden),
)]
pub(super) async fn list_kept(
    State(api): State<Shared>,
    caller: Caller,
) -> Result<Json<Vec<Lease>>, ApiError> {
    caller.require(Role::Tenant)?;
    let tenant = (caller.role != Role::Admin).then_some(&caller.tenant);
    Ok(Json(api.state.kept.list(tenant).iter().map(Lease::new).collect()))
}

/// Keep a VM for longer
#[utoipa::path(
    put, path = "/kept/{id}", tag = "sessions", params(Wanted), request_body = Extend,
    responses(
        (status = 200, description = "It stays.", body = Lease),
        BadRequest, Forbidden, NotFound, Stalled, Conflict, TooLarge, Unprocessable,
    ),
)]
pub(super) async fn extend_kept(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
    Whole(body): Whole,
) -> Result<Json<Lease>, ApiError> {
    caller.require(Role::Tenant)?;
    get_build::find(&api, &caller, &id).await?;
    let allowed = 1..=fields::MAX_KEEP_SECONDS;
    let wanted: Extend = serde_json::from_slice(&body).map_err(|e| {
        ApiError::bad_request("invalid_body", format!("the body is not {{\"seconds\":N}}: {e}"))
    })?;
    let seconds = u32::try_from(wanted.seconds).ok().filter(|seconds| allowed.contains(seconds));
    let Some(seconds) = seconds else {
        let range = format!("a number from {} to {}", allowed.start(), allowed.end());
        return Err(ApiError::invalid("seconds", &wanted.seconds.to_string(), &range));
    };
    let lease = api.state.kept.extend(&id, seconds).ok_or_else(|| not_kept(&id))?;
    Ok(Json(Lease::new(&lease)))
}

/// Let a kept VM go
#[utoipa::path(
    delete, path = "/kept/{id}", tag = "sessions", params(Wanted),
    responses((status = 204, description = "It goes."), Forbidden, NotFound, Conflict),
)]
pub(super) async fn release_kept(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
) -> Result<StatusCode, ApiError> {
    caller.require(Role::Tenant)?;
    get_build::find(&api, &caller, &id).await?;
    if api.state.kept.release(&id).await { Ok(StatusCode::NO_CONTENT) } else { Err(not_kept(&id)) }
}

fn not_kept(id: &BuildId) -> ApiError {
    ApiError::conflict("not_kept", format!("the VM of {id} is not kept, or no more"))
}
