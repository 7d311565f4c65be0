//! Bodies that are read whole: bounded, and within a deadline, so that one that trickles does not keep its connection.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use tokio::time::timeout;

use super::error::ApiError;

/// How long a body of at most a few MiB may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// A whole body.
pub(super) struct Whole(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for Whole {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let body = timeout(DEADLINE, Bytes::from_request(request, state)).await;
        let body = body.map_err(|_| {
            let message = format!("the body was not sent within {} seconds", DEADLINE.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "upload_stalled", message)
        })?;
        body.map(Self).map_err(|rejection| refused(&rejection))
    }
}

fn refused(rejection: &BytesRejection) -> ApiError {
    match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::too_large("the body is longer than this path takes")
        }
        _ => ApiError::bad_request(
            "upload_broken",
            "the connection broke before the end of the body",
        ),
    }
}

/// A JSON body.
pub(super) struct ApiJson<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let kind = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if !kind.is_some_and(is_json) {
            let message = "send the body as application/json, and say so in Content-Type";
            let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return Err(ApiError::new(status, "unsupported_media_type", message));
        }
        let Whole(body) = Whole::from_request(request, state).await?;
        serde_json::from_slice(&body).map(Self).map_err(|error| match error.classify() {
            Category::Data => {
                let message = format!("the body is not what this path takes: {error}");
                ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", message)
            }
            _ => ApiError::bad_request("invalid_json", format!("the body is not JSON: {error}")),
        })
    }
}

/// `application/json` or `application/*+json` (RFC 6839), whatever its parameters.
fn is_json(kind: &str) -> bool {
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind.strip_prefix("application/").is_some_and(|sub| sub == "json" || sub.ends_with("+json"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use axum::body::Body;
    use futures_util::{StreamExt, stream};

    use super::*;

    async fn json(kind: &str, body: impl Into<Body>) -> Result<u8, &'static str> {
        let request = Request::builder().header(CONTENT_TYPE, kind).body(body.into()).unwrap();
        let read = ApiJson::from_request(request, &()).await;
        read.map(|ApiJson(number)| number).map_err(|error| error.code())
    }

    #[tokio::test]
    async fn a_body_is_json_that_says_so() {
        for kind in ["application/json", "Application/JSON; charset=utf-8", "application/a+json"] {
            assert_eq!(json(kind, "7").await, Ok(7), "{kind}");
        }
        for kind in ["text/json", "application/jsonp", "application", ""] {
            assert_eq!(json(kind, "7").await, Err("unsupported_media_type"), "{kind}");
        }
        let kind = "application/json";
        assert_eq!(json(kind, "7 7").await, Err("invalid_json"));
        assert_eq!(json(kind, "").await, Err("invalid_json"));
        assert_eq!(json(kind, "256").await, Err("invalid_field"));
        assert_eq!(json(kind, vec![b' '; 3 << 20]).await, Err("too_large"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_is_given_up() {
        let drops = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Some((Ok::<_, std::io::Error>(" "), ()))
        });
        let body = Body::from_stream(drops.boxed());
        assert_eq!(json("application/json", body).await, Err("upload_stalled"));
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_refused() {
        let broken = stream::iter([Ok("1"), Err(std::io::Error::other("gone"))]);
        assert_eq!(json("application/json", Body::from_stream(broken)).await, Err("upload_broken"));
    }
}
