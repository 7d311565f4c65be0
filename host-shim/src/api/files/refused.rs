//! A copy that came to nothing, as a problem. Pure.

use axum::http::StatusCode;
use axum::http::header::WWW_AUTHENTICATE;
use kiln_protocol::exec::Cause;

use crate::api::error::ApiError;
use crate::exec::{How, Outcome};

/// What a client is told of a copy that did not begin, or of one into the VM that did not end well.
pub(super) fn problem(outcome: Outcome) -> ApiError {
    let Outcome { how, why, cause, .. } = outcome;
    let why = why.unwrap_or_else(|| "the copy did not come to its end".into());
    match (cause, how) {
        (Some(Cause::NotFound), _) => ApiError::new(StatusCode::NOT_FOUND, "not_found", why),
        (Some(Cause::NoStep), _) => ApiError::conflict("no_step", why),
        (Some(Cause::Invalid | Cause::NotExecutable), _) => {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "not_copied", why)
        }
        (Some(Cause::Internal), _) | (None, How::Failed) => {
            ApiError::new(StatusCode::BAD_GATEWAY, "copy_failed", why)
        }
        (None, How::Revoked) => ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", why)
            .with_header(WWW_AUTHENTICATE, "Bearer error=\"invalid_token\""),
        (None, How::VmEnded) => ApiError::conflict("finished", why),
        (None, How::ServerStopped) => {
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", why).retry_after(5)
        }
        (None, _) => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_open", why).retry_after(1),
    }
}
