//! Refusals in the form of the distribution spec: `{"errors":[{"code","message","detail"}]}`.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;

use super::backing::BackingError;
use super::path::BadPath;
use crate::causes::chain;
use crate::metrics::http::Code;
use crate::staging::StagingError;

/// What a registry client gets instead of what it asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub status: StatusCode,
    pub code: &'static str,
    pub message: String,
    pub challenge: Option<HeaderValue>,
    /// The methods that the path has.
    pub allow: Option<&'static str>,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), challenge: None, allow: None }
    }

    pub fn denied(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "DENIED", message)
    }

    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "UNKNOWN", message)
    }

    pub fn bad_manifest(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message)
    }

    pub fn bad_digest(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", message)
    }

    /// With the methods that the path has (RFC 9110, 15.5.6).
    pub fn allowing(self, methods: &'static str) -> Self {
        Self { allow: Some(methods), ..self }
    }

    pub fn with_challenge(mut self, challenge: Option<HeaderValue>) -> Self {
        self.challenge = challenge;
        self
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body =
            json!({"errors": [{"code": self.code, "message": self.message, "detail": null}]});
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = self.status;
        response.extensions_mut().insert(Code(self.code));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(methods) = self.allow {
            headers.insert(header::ALLOW, HeaderValue::from_static(methods));
        }
        if let Some(challenge) = self.challenge {
            headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

impl From<BadPath> for Refusal {
    fn from(bad: BadPath) -> Self {
        let (status, code) = match bad {
            BadPath::Unknown => (StatusCode::NOT_FOUND, "UNSUPPORTED"),
            BadPath::Name => (StatusCode::BAD_REQUEST, "NAME_INVALID"),
            BadPath::Tag => (StatusCode::BAD_REQUEST, "TAG_INVALID"),
            BadPath::Digest => (StatusCode::BAD_REQUEST, "DIGEST_INVALID"),
        };
        Self::new(status, code, bad.to_string())
    }
}

/// The cause goes to the log: it names hosts and paths of the operator's.
impl From<BackingError> for Refusal {
    fn from(error: BackingError) -> Self {
        tracing::warn!(error = %chain(&error), "the registry behind Kiln failed");
        let status = match error {
            BackingError::Deadline { .. } => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::BAD_GATEWAY,
        };
        Self::new(status, "UNKNOWN", "the registry behind Kiln does not answer; try again")
    }
}

impl From<StagingError> for Refusal {
    fn from(error: StagingError) -> Self {
        use StagingError as E;
        let message = error.to_string();
        let (status, code) = match &error {
            E::TooLarge { .. } | E::ManifestTooLarge => {
                (StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID")
            }
            E::TooMany { .. } => (StatusCode::FORBIDDEN, "DENIED"),
            E::UnknownUpload => (StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN"),
            E::Busy => (StatusCode::CONFLICT, "BLOB_UPLOAD_INVALID"),
            E::WrongOffset { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID"),
            E::DigestMismatch { .. } => (StatusCode::BAD_REQUEST, "DIGEST_INVALID"),
            E::Body(_) => (StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID"),
            E::Removed => (StatusCode::GONE, "DENIED"),
            E::Io { .. } => {
                tracing::error!(error = %chain(&error), "a staging area failed");
                (StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN")
            }
        };
        Self::new(status, code, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_its_code_to_who_counts() {
        let refused = Refusal::from(BadPath::Name).into_response();
        assert_eq!(refused.extensions().get::<Code>().map(|code| code.0), Some("NAME_INVALID"));
    }
}
