//! Every answer, by method, route and class of status. The route is the pattern that matched and not the path: of those
//! there are as many as this program has.

use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use prometheus_client::encoding::EncodeLabelSet;

use super::Metrics;

/// What an answer is counted as.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Answer {
    method: &'static str,
    route: String,
    status: &'static str,
}

/// The code of a refusal, which it carries on its way out.
#[derive(Clone, Copy, Debug)]
pub struct Code(pub &'static str);

/// The layer that counts.
pub async fn count(State(metrics): State<Metrics>, request: Request, next: Next) -> Response {
    let method = method(request.method());
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("none", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    let answer = Answer { method, route, status: class(response.status()) };
    metrics.inner.requests.get_or_create(&answer).inc();
    if let Some(Code(code)) = response.extensions().get() {
        metrics.inner.refusals.get_or_create(&[("code", *code)]).inc();
    }
    response
}

/// Clients can make up methods.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

fn class(status: StatusCode) -> &'static str {
    match status.as_u16() {
        100..=199 => "1xx",
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_makes_up_is_no_label() {
        assert_eq!(method(&Method::from_bytes(b"PROPFIND").unwrap()), "other");
        assert_eq!(method(&Method::GET), "GET");
        for (status, expected) in
            [(101, "1xx"), (204, "2xx"), (304, "3xx"), (404, "4xx"), (503, "5xx")]
        {
            assert_eq!(class(StatusCode::from_u16(status).unwrap()), expected);
        }
        assert_eq!(class(StatusCode::from_u16(799).unwrap()), "5xx");
    }
}
