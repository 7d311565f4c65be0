//! Every refusal, as `application/problem+json` (RFC 9457) with hypeman's `code` and `message`.

use axum::http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::health::Checked;
use crate::build::Refused;
use crate::causes::chain;
use crate::metrics::http::Code;
use crate::store::{Disk, StoreError};
use crate::token::AuthError;

/// The media type of refusals.
pub(super) const PROBLEM: &str = "application/problem+json";

/// When a client may look again whether one of too many has gone, in seconds.
pub(super) const TRY_AGAIN: u32 = 30;

/// A refusal.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    header: Option<(HeaderName, HeaderValue)>,
}

/// A refusal (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Problem<'a> {
    /// `urn:kiln:problem:` and the code.
    r#type: String,
    /// The status in words.
    title: &'static str,
    /// The answer's status.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// What happened, to what, and what to do.
    detail: &'a str,
    /// For programs.
    code: &'static str,
    /// The same as `detail`: hypeman's name of it.
    message: &'a str,
    /// What `/ready` has looked at.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    #[schema(required = false)]
    checks: &'a [Checked],
}

impl ApiError {
    /// A refusal with a status, a code for programs and a message for people.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), header: None }
    }

    /// The code for programs.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// What is told to people.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// As many as there may be, or too fast: a client may try again after so many seconds.
    pub(super) fn too_many(code: &'static str, message: impl Into<String>, seconds: u32) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, code, message).retry_after(seconds)
    }

    pub(super) fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// A field that does not hold what it may.
    pub(super) fn invalid(field: &str, value: &str, allowed: &str) -> Self {
        let message = format!("{field} is {}; it must be {allowed}", shown(value));
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", message)
    }

    /// Something that Kiln will do one day, and does not pretend to do today.
    pub(super) fn not_supported(field: &str, instead: &str) -> Self {
        let message = format!("{field} is not available yet; {instead}");
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "not_supported", message)
    }

    pub(super) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    pub(super) fn conflict(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, message)
    }

    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    /// Nothing was changed.
    pub(super) fn no_room() -> Self {
        let message = "the host's disk is full; try again later, and tell its operator";
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "disk_full", message)
    }

    /// Nothing was changed.
    pub(super) fn read_only() -> Self {
        let message = "the host's data directory cannot be written; tell its operator";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "read_only", message).retry_after(TRY_AGAIN)
    }

    /// No such build, or none that this caller may know of.
    pub(super) fn no_such_build() -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", "there is no such build")
    }

    /// No such instance, or none that this caller may know of.
    pub(super) fn no_such_instance() -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", "there is no such instance")
    }

    /// The host's own fault. The cause goes to the log, with its chain; the client gets no more
    /// than that it happened.
    pub(super) fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        log(error);
        let message = "the host failed; its log says why, under this response's x-request-id";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    /// The answer, with what `/ready` has looked at.
    pub(super) fn with_checks(self, checks: &[Checked]) -> Response {
        let problem = Problem {
            r#type: format!("urn:kiln:problem:{}", self.code),
            title: self.status.canonical_reason().unwrap_or("Error"),
            status: self.status.as_u16(),
            detail: &self.message,
            code: self.code,
            message: &self.message,
            checks,
        };
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = (self.status, [(CONTENT_TYPE, PROBLEM)], body).into_response();
        response.extensions_mut().insert(Code(self.code));
        if let Some((name, value)) = self.header {
            response.headers_mut().insert(name, value);
        }
        response
    }

    #[must_use]
    pub(super) fn with_header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.header = Some((name, HeaderValue::from_static(value)));
        self
    }

    #[must_use]
    pub(super) fn retry_after(mut self, seconds: u32) -> Self {
        self.header = Some((RETRY_AFTER, seconds.into()));
        self
    }
}

/// A user's text for a message: escaped, and cut where it is long.
pub(super) fn shown(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// Writes a request's failure to the log, with its causes.
pub(super) fn log(error: &(dyn std::error::Error + 'static)) {
    tracing::error!(error = chain(error), "a request failed");
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.with_checks(&[])
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::NotFound("build") => Self::no_such_build(),
            StoreError::NotFound("instance") => Self::no_such_instance(),
            StoreError::NotFound(_) => {
                Self::new(StatusCode::NOT_FOUND, "not_found", error.to_string())
            }
            StoreError::Refused(Refused::Final(_)) => Self::conflict("finished", error.to_string()),
            StoreError::Refused(_)
            | StoreError::InstanceRefused(_)
            | StoreError::Taken(_)
            | StoreError::Fenced => Self::conflict("conflict", error.to_string()),
            StoreError::TooMany { .. } => Self::too_many("too_many", error.to_string(), TRY_AGAIN),
            StoreError::Database { disk: Some(Disk::Full), .. } => {
                log(&error);
                Self::no_room()
            }
            StoreError::Database { disk: Some(Disk::ReadOnly), .. } => {
                log(&error);
                Self::read_only()
            }
            StoreError::Database { disk: None, .. } => Self::internal(&error),
        }
    }
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        let challenge = match error {
            AuthError::Missing => "Bearer",
            AuthError::Invalid => "Bearer error=\"invalid_token\"",
            AuthError::Store(error) => return error.into(),
        };
        let refusal = Self::new(StatusCode::UNAUTHORIZED, "unauthorized", error.to_string());
        let header = Some((WWW_AUTHENTICATE, HeaderValue::from_static(challenge)));
        Self { header, ..refusal }
    }
}

/// For paths that are not the API's.
pub(super) async fn no_such_route() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "not_found", "the API has no such path")
}

/// For verbs that a path does not have.
pub(super) async fn no_such_method() -> ApiError {
    let message = "this path has no such method; the Allow header lists those it has";
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

/// Gives the API's shape to every refusal that has another: those that axum makes itself.
pub(super) async fn wrap(response: Response) -> Response {
    let status = response.status();
    let ours = response.headers().get(CONTENT_TYPE).is_some_and(|value| value == PROBLEM);
    if ours || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let code = match status {
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::METHOD_NOT_ALLOWED => "method_not_allowed",
        StatusCode::PAYLOAD_TOO_LARGE => "too_large",
        StatusCode::UNSUPPORTED_MEDIA_TYPE => "unsupported_media_type",
        _ if status.is_client_error() => "bad_request",
        _ => "internal",
    };
    let message = status.canonical_reason().unwrap_or("the request was refused");
    let mut wrapped = ApiError::new(status, code, message).into_response();
    if let Some(allow) = response.headers().get(ALLOW) {
        wrapped.headers_mut().insert(ALLOW, allow.clone());
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_text_is_escaped_and_cut() {
        assert_eq!(shown("a\u{1b}[31m\"b"), r#""a\u{1b}[31m\"b""#);
        assert_eq!(shown(&"é".repeat(80)), format!("\"{}\"", "é".repeat(80)));
        assert_eq!(shown(&"é".repeat(81)), format!("\"{}\"…", "é".repeat(80)));
    }

    #[tokio::test]
    async fn refusals_of_axum_are_wrapped_and_others_left() {
        let plain = (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, "GET")], "plain").into_response();
        let wrapped = wrap(plain).await;
        assert_eq!(wrapped.headers()[CONTENT_TYPE], PROBLEM);
        assert_eq!(wrapped.headers()[ALLOW], "GET");
        let fine = wrap("fine".into_response()).await;
        assert_eq!(fine.headers()[CONTENT_TYPE], "text/plain; charset=utf-8");
        let ours = wrap(ApiError::no_such_build().retry_after(3).into_response()).await;
        assert_eq!(ours.headers()[RETRY_AFTER], "3");
    }
}
