//! `/kept`: the VMs of failed builds that can still be entered.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use super::error::ApiError;
use super::get_build::{self, Wanted};
use super::{Shared, fields, types};
use crate::build::BuildId;
use crate::kept;
use crate::store::Role;
use crate::token::Caller;

/// A kept VM, as GET `/kept` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The build that failed.
    pub id: String,
    /// Whose it is.
    pub tenant: String,
    /// What the VM holds of the host's memory.
    pub memory_mb: u32,
    /// Since when it is kept, RFC 3339.
    pub since: String,
    /// When it goes, RFC 3339.
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Extend {
    /// From now.
    seconds: u32,
}

pub(super) async fn list_kept(
    State(api): State<Shared>,
    caller: Caller,
) -> Result<Json<Vec<Lease>>, ApiError> {
    caller.require(Role::Tenant)?;
    let tenant = (caller.role != Role::Admin).then_some(&caller.tenant);
    Ok(Json(api.state.kept.list(tenant).iter().map(Lease::new).collect()))
}

pub(super) async fn extend_kept(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
    body: Bytes,
) -> Result<Json<Lease>, ApiError> {
    caller.require(Role::Tenant)?;
    get_build::find(&api, &caller, &id).await?;
    let allowed = 1..=fields::MAX_KEEP_SECONDS;
    let wanted: Extend = serde_json::from_slice(&body).map_err(|e| {
        ApiError::bad_request("invalid_body", format!("the body is not {{\"seconds\":N}}: {e}"))
    })?;
    if !allowed.contains(&wanted.seconds) {
        let range = format!("a number from {} to {}", allowed.start(), allowed.end());
        return Err(ApiError::invalid("seconds", &wanted.seconds.to_string(), &range));
    }
    let lease = api.state.kept.extend(&id, wanted.seconds).ok_or_else(|| not_kept(&id))?;
    Ok(Json(Lease::new(&lease)))
}

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
