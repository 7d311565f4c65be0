//! POST `/gc`: a round of retention now.

use axum::Json;
use axum::extract::State;

use super::error::ApiError;
use super::openapi::problems::Forbidden;
use super::{Shared, types};
use crate::store::Role;
use crate::token::Caller;

/// Collect garbage
///
/// For administrators. Removes what is not to be kept any more by the server's settings, as it does by itself once a day, and answers when
/// that is done. Only one round runs at a time: a second one waits for the first. It goes on where the client does not wait.
#[utoipa::path(
    post, path = "/gc", tag = "server",
    responses((status = 200, description = "What was removed.", body = types::Collected), Forbidden),
)]
pub(super) async fn collect_garbage(
    State(api): State<Shared>,
    caller: Caller,
) -> Result<Json<types::Collected>, ApiError> {
    caller.require(Role::Admin)?;
    let (retention, now) = (api.state.retention.clone(), api.now());
    let round = tokio::spawn(async move { retention.collect(now).await });
    let collected = round.await.map_err(|error| ApiError::internal(&error))??;
    Ok(Json(types::Collected::new(&collected)))
}
