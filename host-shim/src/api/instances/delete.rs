//! DELETE `/instances/{id}`: 204 once nothing of it is left. An instance that runs gets its stop signal, and some
//! time.

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;

use super::get::{Wanted, find};
use crate::api::Shared;
use crate::api::error::ApiError;
use crate::api::openapi::problems::{Conflict, Forbidden, NotFound, Unavailable};
use crate::store::Role;
use crate::token::Caller;

/// How long the answer waits. The removal goes on behind it.
const DEADLINE: Duration = Duration::from_mins(1);

/// Stop and remove an instance
#[utoipa::path(
    delete, path = "/instances/{id}", tag = "instances", params(Wanted),
    responses((status = 204, description = "Nothing of it is left."), Forbidden, NotFound, Conflict, Unavailable),
)]
pub(in crate::api) async fn delete_instance(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
) -> Result<StatusCode, ApiError> {
    caller.require(Role::Tenant)?;
    find(&api, &caller, &id).await?;
    let (instances, wanted) = (api.state.instances.clone(), id.clone());
    // A task of its own: a client that goes away does not stop what it has asked for.
    let task = tokio::spawn(async move { instances.delete(&wanted).await });
    let Ok(joined) = tokio::time::timeout(DEADLINE, task).await else {
        let message =
            format!("{id} is being stopped, but its VM has not gone yet; look again soon");
        let status = StatusCode::SERVICE_UNAVAILABLE;
        return Err(ApiError::new(status, "still_stopping", message).retry_after(5));
    };
    joined.map_err(|error| ApiError::internal(&error))??;
    Ok(StatusCode::NO_CONTENT)
}
