//! `/tokens`: for administrators, what `kiln token` does when it is not offline.

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::StatusCode;
use axum::http::request::Parts;

use super::Shared;
use super::body::ApiJson;
use super::error::ApiError;
use super::openapi::params::{self, params};
use super::openapi::problems::{
    BadRequest, Forbidden, NoRoom, NotFound, Stalled, TooLarge, Unavailable, Unprocessable,
    UnsupportedMediaType,
};
use super::openapi::schemas;
use super::types::{NewToken, Token, role_names};
use crate::build::Tenant;
use crate::store::{Role, StoreError};
use crate::token::{self, Caller, CreateError};

/// Make a token
///
/// For administrators. The answer is the only one that ever holds the token itself.
#[utoipa::path(
    post, path = "/tokens", tag = "tokens", request_body = NewToken,
    responses(
        (status = 201, description = "It is made.", body = Token),
        BadRequest, Forbidden, Stalled, TooLarge, UnsupportedMediaType, Unprocessable, Unavailable, NoRoom,
    ),
)]
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
    Ok((StatusCode::CREATED, Json(Token { token: Some(text), ..Token::new(&record, api.now()) })))
}

/// List tokens
///
/// For administrators. All of them, the oldest first, revoked and expired ones too, with when they were last used.
#[utoipa::path(
    get, path = "/tokens", tag = "tokens",
    responses((status = 200, description = "All of them.", body = Vec<Token>), Forbidden),
)]
pub(super) async fn list_tokens(
    State(api): State<Shared>,
    caller: Caller,
) -> Result<Json<Vec<Token>>, ApiError> {
    caller.require(Role::Admin)?;
    let (tokens, now) = (api.state.store.tokens().await?, api.now());
    Ok(Json(tokens.iter().map(|token| Token::new(token, now)).collect()))
}

/// Revoke a token
///
/// For administrators. From now on it opens nothing, and its sessions end.
#[utoipa::path(
    delete, path = "/tokens/{id}", tag = "tokens", params(TokenId),
    responses((status = 204, description = "It is revoked."), Forbidden, NotFound),
)]
pub(super) async fn revoke_token(
    State(api): State<Shared>,
    caller: Caller,
    TokenId(id): TokenId,
) -> Result<StatusCode, ApiError> {
    caller.require(Role::Admin)?;
    api.state.store.revoke_token(&id).await?;
    api.state.sessions.revoke(&id);
    tracing::info!(token = id, "a token was revoked");
    Ok(StatusCode::NO_CONTENT)
}

/// The id in the path: the public one, not the token.
pub(super) struct TokenId(String);

params!(TokenId: params::path("id", "The token's public id.", schemas::text()));

impl FromRequestParts<Shared> for TokenId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Shared) -> Result<Self, ApiError> {
        // What is not UTF-8 is no token's.
        let unknown = |_| StoreError::NotFound("token");
        let Path(id) = Path::from_request_parts(parts, api).await.map_err(unknown)?;
        Ok(Self(id))
    }
}
