//! `/tokens`: for administrators, what `kiln token` does when it is not offline.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::Shared;
use super::error::{ApiError, ApiJson};
use super::types::{NewToken, Token, role_names};
use crate::build::Tenant;
use crate::store::Role;
use crate::token::{self, Caller, CreateError};

/// POST `/tokens`: the only answer that ever holds the token itself.
pub(super) async fn create_token(
    State(api): State<Shared>,
    caller: Caller,
    ApiJson(wanted): ApiJson<NewToken>,
) -> Result<(StatusCode, Json<Token>), ApiError> {
    caller.require(Role::Admin)?;
    let invalid =
        |message: String| ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", message);
    let tenant = Tenant::new(wanted.tenant).map_err(|error| invalid(error.to_string()))?;
    let role = Role::from_name(&wanted.role).ok_or_else(|| {
        ApiError::invalid("role", &wanted.role, &format!("one of {}", role_names()))
    })?;
    let store = &*api.state.store;
    let made = token::create(store, tenant, role, wanted.ttl_seconds, wanted.name, api.now()).await;
    let (text, record) = made.map_err(|error| match error {
        CreateError::Ttl(_) | CreateError::Name => invalid(error.to_string()),
        CreateError::Store(error) => error.into(),
        CreateError::Random => ApiError::internal(&error),
    })?;
    tracing::info!(token = record.id, tenant = %record.tenant, role = %record.role, "a token was made");
    Ok((StatusCode::CREATED, Json(Token { token: Some(text), ..Token::new(&record) })))
}

/// GET `/tokens`: all of them, oldest first, revoked and expired ones too.
pub(super) async fn list_tokens(
    State(api): State<Shared>,
    caller: Caller,
) -> Result<Json<Vec<Token>>, ApiError> {
    caller.require(Role::Admin)?;
    Ok(Json(api.state.store.tokens().await?.iter().map(Token::new).collect()))
}

/// DELETE `/tokens/{id}`: from now on it opens nothing, and its sessions end.
pub(super) async fn revoke_token(
    State(api): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    caller.require(Role::Admin)?;
    api.state.store.revoke_token(&id).await?;
    api.state.sessions.revoke(&id);
    tracing::info!(token = id, "a token was revoked");
    Ok(StatusCode::NO_CONTENT)
}
