//! What comes from the backing registry, on its way out: only headers that belong to the
//! distribution API, and bodies that may not stand still.

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::backing::{Backing, BackingError, PATIENCE};
use super::error::Refusal;
use super::path::Name;
use super::request::Request;

/// `Docker-Content-Digest`.
pub(crate) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// `Docker-Upload-UUID`.
pub(super) const UPLOAD_UUID: HeaderName = HeaderName::from_static("docker-upload-uuid");
/// `Docker-Distribution-Api-Version`.
pub(super) const API_VERSION: HeaderName =
    HeaderName::from_static("docker-distribution-api-version");

/// Headers of requests that go on to the registry. `Authorization` and cookies never do.
pub(super) const REQUEST_HEADERS: [HeaderName; 6] = [
    header::ACCEPT,
    header::CONTENT_TYPE,
    header::CONTENT_RANGE,
    header::RANGE,
    header::IF_NONE_MATCH,
    header::IF_MATCH,
];

/// Headers of answers that go back. `Location` and `Link` are rewritten by who relays.
const RESPONSE_HEADERS: [HeaderName; 12] = [
    header::CONTENT_TYPE,
    header::CONTENT_LENGTH,
    header::CONTENT_RANGE,
    header::ACCEPT_RANGES,
    header::RANGE,
    header::ETAG,
    header::RETRY_AFTER,
    CONTENT_DIGEST,
    UPLOAD_UUID,
    API_VERSION,
    HeaderName::from_static("oci-subject"),
    HeaderName::from_static("oci-filters-applied"),
];

/// Every type of manifest that there is.
pub(super) const ANY_MANIFEST: HeaderValue = HeaderValue::from_static(
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json",
);

/// Largest list of tags that is read as a whole: some thirty thousand.
const MAX_TAGS_BYTES: usize = 4 * 1024 * 1024;

/// Lets a client that takes anything have any manifest: to such a one docker-registry answers 404
/// for an OCI manifest, and turns Docker's into one of schema 1.
pub(super) fn accept_manifests<'a>(request: Request<'a>, headers: &HeaderMap) -> Request<'a> {
    let mut accepted = headers.get_all(header::ACCEPT).iter().peekable();
    let anything = accepted.peek().is_none()
        || accepted.any(|accept| accept.to_str().is_ok_and(|text| text.contains("*/*")));
    if anything { request.header(header::ACCEPT, ANY_MANIFEST) } else { request }
}

/// The answer for the other side; the body streams and is not kept.
pub(super) fn relay(from: reqwest::Response, head: bool) -> Response {
    let mut to = Response::new(Body::empty());
    *to.status_mut() = from.status();
    for name in &RESPONSE_HEADERS {
        for value in from.headers().get_all(name) {
            to.headers_mut().append(name, value.clone());
        }
    }
    if !head {
        *to.body_mut() = Body::from_stream(patient(from));
    }
    to
}

impl Backing {
    /// A list of tags under the repository's name here, where the registry has it under another.
    pub(super) async fn rename_tags(
        &self,
        name: &Name,
        answer: Response,
    ) -> Result<Response, Refusal> {
        if !self.0.mapping.renames() {
            return Ok(answer);
        }
        let (mut parts, body) = answer.into_parts();
        let bad =
            |_| Refusal::new(StatusCode::BAD_GATEWAY, "UNKNOWN", "the list of tags broke off");
        let bytes = axum::body::to_bytes(body, MAX_TAGS_BYTES).await.map_err(bad)?;
        let body = match serde_json::from_slice::<serde_json::Value>(&bytes) {
            Ok(mut list) if list["name"].is_string() => {
                list["name"] = name.as_str().into();
                parts.headers.remove(header::CONTENT_LENGTH);
                Body::from(list.to_string())
            }
            _ => Body::from(bytes),
        };
        Ok(Response::from_parts(parts, body))
    }
}

/// A small body as a whole.
pub(crate) async fn collect(from: reqwest::Response, limit: usize) -> Result<Bytes, BackingError> {
    let mut bytes = BytesMut::new();
    let mut body = std::pin::pin!(patient(from));
    while let Some(chunk) = body.next().await {
        let chunk = chunk?;
        if bytes.len() + chunk.len() > limit {
            return Err(BackingError::AnswerTooLarge { limit });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}

/// A body as it comes, ended by an error when it stands still.
pub(crate) fn patient(
    from: reqwest::Response,
) -> impl Stream<Item = Result<Bytes, BackingError>> + Send + 'static {
    let path = from.url().path().to_owned();
    futures_util::stream::unfold(Some((from, path)), |state| async {
        let (mut from, path) = state?;
        match tokio::time::timeout(PATIENCE, from.chunk()).await {
            Ok(Ok(Some(chunk))) => Some((Ok(chunk), Some((from, path)))),
            Ok(Ok(None)) => None,
            Ok(Err(error)) => Some((Err(BackingError::Body(error.without_url())), None)),
            Err(_) => {
                let method = http::Method::GET;
                Some((Err(BackingError::Deadline { method, path }), None))
            }
        }
    })
}
