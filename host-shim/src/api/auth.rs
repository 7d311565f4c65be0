//! Who calls, and not too often: the token, and nothing else. There is no way in by address, header or path.

use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;

use super::Shared;
use super::error::ApiError;
use crate::store::Role;
use crate::token::{self, AuthError, Caller};

impl FromRequestParts<Shared> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Shared) -> Result<Self, ApiError> {
        let mut values = parts.headers.get_all(AUTHORIZATION).iter();
        let value = values.next();
        // Two of them: which one counts is not for us to guess.
        if values.next().is_some() {
            return Err(AuthError::Invalid.into());
        }
        let value = value.map(|v| v.to_str().map_err(|_| AuthError::Invalid)).transpose()?;
        let caller = token::authenticate(&*api.state.store, value, api.now()).await?;
        api.state.uses.note(&caller.token_id, api.now());
        api.rates.admit(&caller.token_id)?;
        Ok(caller)
    }
}

impl Caller {
    /// Refuses a caller whose role is less.
    pub(super) fn require(&self, role: Role) -> Result<(), ApiError> {
        if self.role >= role {
            return Ok(());
        }
        let message = format!("this token's role is {}; this needs the role {role}", self.role);
        Err(ApiError::forbidden(message))
    }
}
