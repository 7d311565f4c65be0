//! DELETE `/builds/{id}`: 204 once the build is `cancelled`.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;

use super::error::ApiError;
use super::get_build::{Wanted, find};
use super::openapi::problems::{Conflict, Forbidden, NotFound, Unavailable};
use super::{Api, CancelOutcome, Shared};
use crate::build::{Build, BuildId, Refused, Status};
use crate::events::payload;
use crate::store::{Role, StoreError};
use crate::token::Caller;

/// How long the answer waits for a VM to go. The cancellation goes on behind it.
const DEADLINE: Duration = Duration::from_mins(1);
/// A build can be requeued between the look at the queue and the look at the drivers; each try
/// needs another such race.
const TRIES: usize = 3;

/// Cancel a build
#[utoipa::path(
    delete, path = "/builds/{id}", tag = "builds", params(Wanted),
    responses((status = 204, description = "It is `cancelled`."), Forbidden, NotFound, Conflict, Unavailable),
)]
pub(super) async fn cancel_build(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
) -> Result<StatusCode, ApiError> {
    caller.require(Role::Tenant)?;
    let build = find(&api, &caller, &id).await?;
    // A task of its own: a client that goes away does not stop what it has asked for.
    let task = tokio::spawn(cancel(Arc::clone(&api), build));
    let Ok(joined) = tokio::time::timeout(DEADLINE, task).await else {
        let message =
            format!("{id} is being cancelled, but its VM has not gone yet; look again soon");
        let status = StatusCode::SERVICE_UNAVAILABLE;
        return Err(ApiError::new(status, "still_cancelling", message).retry_after(5));
    };
    joined.map_err(|error| ApiError::internal(&error))?
}

async fn cancel(api: Arc<Api>, build: Build) -> Result<StatusCode, ApiError> {
    let id = build.id;
    for _ in 0..TRIES {
        if cancel_queued(&api, &id).await? {
            return Ok(StatusCode::NO_CONTENT);
        }
        match api.state.scheduler.cancel(&id).await {
            CancelOutcome::Cancelled => return Ok(StatusCode::NO_CONTENT),
            CancelOutcome::Finished => return Err(finished(&api, &id).await),
            CancelOutcome::Publishing => {
                let message = format!("{id} is being published already and cannot be cancelled");
                return Err(ApiError::conflict("publishing", message));
            }
            CancelOutcome::Unknown => {}
        }
    }
    let message = format!("{id} is between two states; try again");
    Err(ApiError::conflict("conflict", message).retry_after(1))
}

/// Whether it was queued and is cancelled now.
async fn cancel_queued(api: &Api, id: &BuildId) -> Result<bool, ApiError> {
    let now = api.now();
    let event = payload::of_host(now, payload::status(Status::Cancelled, None));
    match api.state.events.cancel_queued(id, now, &[event]).await {
        Ok(_) => {
            // Nobody else will: only claimed builds have a driver.
            if let Err(error) = tokio::fs::remove_dir_all(api.state.sources.of(id)).await {
                tracing::warn!(%id, %error, "the source of a cancelled build cannot be removed");
            }
            Ok(true)
        }
        Err(StoreError::Refused(Refused::Final(_))) => Err(finished(api, id).await),
        Err(StoreError::Refused(_)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

async fn finished(api: &Api, id: &BuildId) -> ApiError {
    let status = match api.state.store.build(id).await {
        Ok(Some(build)) => build.status.as_str(),
        _ => "finished",
    };
    ApiError::conflict("finished", format!("{id} is {status} already and cannot be cancelled"))
}
