//! What surrounds every request: an id, a span, and headers that make browsers careful.

use axum::Router;
use axum::extract::{MatchedPath, Request};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, HOST, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderName, HeaderValue, Version};
use axum::middleware::{Next, from_fn, from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use tracing::Instrument;

use super::error::{self, ApiError};
use crate::metrics::{Metrics, http};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Adds the layers to routes, the outermost last.
pub(super) fn add(routes: Router, metrics: Metrics) -> Router {
    routes
        .layer(from_fn(host))
        .layer(map_response(error::wrap))
        .layer(map_response(secure))
        .layer(from_fn_with_state(metrics, http::count))
        .layer(from_fn(trace))
}

/// Gives a request an id of the host's own (what a client sent is not believed) and a span. The
/// span has the route and not the path or query: what people type there is not for logs.
async fn trace(request: Request, next: Next) -> Response {
    let id = uuid::Uuid::now_v7().simple().to_string();
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let span = tracing::info_span!("request", id, method = %request.method(), route);
    let mut response = async {
        let response = next.run(request).await;
        tracing::debug!(status = response.status().as_u16(), "answered");
        response
    }
    .instrument(span)
    .await;
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// A request of HTTP/1.1 names one host (RFC 9112, 3.2). Which one is not looked at: nothing depends on it.
async fn host(request: Request, next: Next) -> Response {
    let named = request.headers().get_all(HOST).iter().count();
    if request.version() == Version::HTTP_11 && named != 1 {
        let message = format!("send one Host header; this request has {named}");
        return ApiError::bad_request("invalid_header", message).into_response();
    }
    next.run(request).await
}

async fn secure(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (CACHE_CONTROL, "no-store"),
        (REFERRER_POLICY, "no-referrer"),
        (CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    ] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}
