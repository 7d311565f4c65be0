//! `/v2/*` for clients: a registry token is checked for the repository and action of every single
//! request, then the request goes on to the backing registry, streaming both ways.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use bytes::Bytes;
use futures_util::TryStreamExt;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use tokio::sync::Semaphore;
use url::{Url, form_urlencoded};

use super::backing::{Backing, BackingError, Target};
use super::error::Refusal;
use super::path::{Name, Route};
use super::relay;
use super::rights::{Action, Authorizer};
use super::token::{Claims, SERVICE, TokenKeys};
use super::token_endpoint;
use crate::staging::{Digest, MAX_MANIFEST_BYTES};

/// Longest query of a request. The state of an upload is the longest part, with about 300 bytes.
const MAX_QUERY_BYTES: usize = 8 * 1024;
/// How long a manifest may take to come. Other small bodies have as long.
const MANIFEST_PATIENCE: Duration = Duration::from_secs(30);
/// So many manifests come at one time, each of them in memory as a whole; more wait.
static MANIFESTS: Semaphore = Semaphore::const_new(64);
/// The path of the token endpoint. No repository's path looks like it.
const TOKEN_PATH: &str = "/v2/token";

/// What the gateway for clients works with. Cheap to clone.
#[derive(Clone)]
pub struct GatewayState {
    /// Where images are.
    pub backing: Backing,
    /// Who knows API tokens and builds.
    pub authorizer: Arc<dyn Authorizer>,
    /// Signs and verifies registry tokens.
    pub keys: Arc<TokenKeys>,
    /// How clients reach this server, such as `http://127.0.0.1:4973`. From configuration: a
    /// request's own headers could name anything.
    pub public_url: Url,
}

/// Serves `/v2/token` and everything below `/v2/`.
pub fn router(state: GatewayState) -> Router {
    Router::new()
        .route(TOKEN_PATH, any(token_endpoint::token))
        .route("/v2", any(proxy))
        .route("/v2/", any(proxy))
        .route("/v2/{*path}", any(proxy))
        .with_state(state)
}

async fn proxy(State(state): State<GatewayState>, request: Request<Body>) -> Response {
    match forward(&state, request).await {
        Ok(mut response) => {
            let version = HeaderValue::from_static("registry/2.0");
            response.headers_mut().insert(relay::API_VERSION, version);
            response
        }
        Err(refusal) => refusal.into_response(),
    }
}

async fn forward(state: &GatewayState, request: Request<Body>) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let claims = bearer(&parts.headers).and_then(|token| match state.keys.verify(token) {
        Ok(claims) => Some(claims),
        Err(error) => {
            tracing::debug!(%error, "a registry token was refused");
            None
        }
    });
    let route = match Route::parse(parts.uri.path()) {
        Ok(route) => route,
        // Who has no token learns nothing about paths either.
        Err(_) if claims.is_none() => return Err(state.unauthorized(None, false)),
        Err(bad) => return Err(bad.into()),
    };
    let needed = needed(&route, &parts.method)?;
    let Some(claims) = claims else {
        let scope = needed.as_ref().map(|(name, action)| (name, *action));
        return Err(state.unauthorized(scope, false));
    };
    let Some((name, action)) = needed else {
        return Ok(Response::new(Body::from("{}")));
    };
    if !claims.allow(&name, action) {
        return Err(state.unauthorized(Some((&name, action)), true));
    }
    let query = query(&route, parts.uri.query().unwrap_or_default(), &claims)?;
    let is_manifest = matches!(route, Route::Manifest(..));
    let of_tags = matches!(route, Route::Tags(_));
    // A place that nobody was shown is no upload.
    let target = state.backing.0.mapping.meant(Target { route, query });
    let target = target.ok_or_else(unknown_upload)?;
    // From here on what the registry says that it has stays until a manifest can follow.
    let wanted = wanted(&target, &parts.method, &claims);
    let mut wanted = state.backing.want(wanted).await;
    let request = state.backing.request_to(parts.method.clone(), target);
    let mut request = request.headers_of(&parts.headers, &relay::REQUEST_HEADERS);
    if is_manifest && action == Action::Pull {
        request = relay::accept_manifests(request, &parts.headers);
    }
    let length = content_length(&parts.headers)?;
    let chunked = parts.headers.contains_key(header::TRANSFER_ENCODING);
    let mut _change = None;
    if is_manifest && action == Action::Push {
        let manifest = manifest(body).await?;
        _change = state.backing.change().await;
        request = request.bytes(manifest);
    } else if action == Action::Delete {
        _change = state.backing.change().await;
    } else if length.is_some_and(|length| length > 0) || chunked {
        request = request.stream(body.into_data_stream().map_err(axum::Error::into_inner), length);
    }
    let response = request.send().await?;
    if let Some(wanted) = &mut wanted
        && matches!(response.status(), StatusCode::OK | StatusCode::CREATED)
    {
        wanted.last();
    }
    let answer = answer(state, &name, response, parts.method == Method::HEAD)?;
    if of_tags { state.backing.rename_tags(&name, answer).await } else { Ok(answer) }
}

fn unknown_upload() -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "there is no such upload")
}

/// The repository and the action that a request needs a right to; `None` for `/v2/` itself.
fn needed(route: &Route, method: &Method) -> Result<Option<(Name, Action)>, Refusal> {
    let Some(name) = route.name() else {
        return match (route, method) {
            (Route::Base, &Method::GET | &Method::HEAD) => Ok(None),
            (Route::Base, _) => Err(no_such_method(route)),
            _ => {
                Err(Refusal::unsupported("Kiln does not list repositories")
                    .allowing(methods(route)))
            }
        };
    };
    let action = match (route, method) {
        (Route::Uploads(_), &Method::POST)
        | (Route::Upload(..), &Method::GET | &Method::PATCH | &Method::PUT | &Method::DELETE)
        | (Route::Manifest(..), &Method::PUT) => Action::Push,
        (
            Route::Tags(_) | Route::Manifest(..) | Route::Blob(..) | Route::Referrers(..),
            &Method::GET | &Method::HEAD,
        ) => Action::Pull,
        (Route::Manifest(..) | Route::Blob(..), &Method::DELETE) => Action::Delete,
        _ => return Err(no_such_method(route)),
    };
    Ok(Some((name.clone(), action)))
}

fn no_such_method(route: &Route) -> Refusal {
    Refusal::unsupported("the distribution API has no such method here").allowing(methods(route))
}

/// For the Allow header: what [`needed`] takes. Of the catalogue there is none.
fn methods(route: &Route) -> &'static str {
    match route {
        Route::Base | Route::Tags(_) | Route::Referrers(..) => "GET, HEAD",
        Route::Catalog => "",
        Route::Uploads(_) => "POST",
        Route::Upload(..) | Route::Elsewhere(..) => "GET, PATCH, PUT, DELETE",
        Route::Manifest(..) => "GET, HEAD, PUT, DELETE",
        Route::Blob(..) => "GET, HEAD, DELETE",
    }
}

/// Those parts of the query that the route has. A mount from a repository that the token does not
/// let its owner read becomes an ordinary upload, as the spec allows.
fn query(route: &Route, query: &str, claims: &Claims) -> Result<Vec<(String, String)>, Refusal> {
    if query.len() > MAX_QUERY_BYTES {
        return Err(Refusal::new(StatusCode::URI_TOO_LONG, "UNSUPPORTED", "the query is too long"));
    }
    let known: &[&str] = match route {
        Route::Tags(_) => &["n", "last"],
        Route::Uploads(_) => &["digest", "mount", "from"],
        Route::Upload(..) => &["digest", "_state"],
        Route::Referrers(..) => &["artifactType"],
        _ => &[],
    };
    let pairs = form_urlencoded::parse(query.as_bytes()).into_owned();
    let mut pairs: Vec<_> = pairs.filter(|(key, _)| known.contains(&key.as_str())).collect();
    let mut sources = pairs.iter().filter(|(key, _)| key == "from");
    let source = match (sources.next(), sources.next()) {
        (Some((_, from)), None) => Name::parse(from),
        _ => None,
    };
    if !source.is_some_and(|from| claims.allow(&from, Action::Pull)) {
        pairs.retain(|(key, _)| key != "from" && key != "mount");
    }
    Ok(pairs)
}

/// The blobs that somebody who may push asks for, or has just sent: a manifest that refers to them may follow.
fn wanted(target: &Target, method: &Method, claims: &Claims) -> Vec<Digest> {
    let Target { route, query } = target;
    match route {
        Route::Blob(name, digest) if claims.allow(name, Action::Push) => vec![*digest],
        Route::Uploads(_) | Route::Upload(..) if matches!(*method, Method::POST | Method::PUT) => {
            let named = query.iter().filter(|(key, _)| key == "digest" || key == "mount");
            named.filter_map(|(_, digest)| Digest::parse(digest).ok()).collect()
        }
        _ => vec![],
    }
}

/// All of a manifest, before anything waits for it: who sends it slowly holds up nobody.
async fn manifest(body: Body) -> Result<Bytes, Refusal> {
    let refused = |status, message| Err(Refusal::new(status, "MANIFEST_INVALID", message));
    let _place = MANIFESTS.acquire().await;
    let collected = axum::body::to_bytes(body, MAX_MANIFEST_BYTES);
    match tokio::time::timeout(MANIFEST_PATIENCE, collected).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(_)) => {
            let message = "the manifest broke off, or is larger than 4 MiB";
            refused(StatusCode::PAYLOAD_TOO_LARGE, message)
        }
        Err(_) => refused(StatusCode::REQUEST_TIMEOUT, "the manifest did not come in 30 seconds"),
    }
}

fn answer(
    state: &GatewayState,
    name: &Name,
    from: reqwest::Response,
    head: bool,
) -> Result<Response, Refusal> {
    // The registry's own refusals are about Kiln's credential, never about the client's.
    if matches!(from.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        tracing::error!(status = %from.status(), "the registry refuses Kiln's credential");
        let message = "the registry behind Kiln refuses Kiln's credential; tell its operator";
        return Err(Refusal::new(StatusCode::BAD_GATEWAY, "UNKNOWN", message));
    }
    if from.status().is_redirection() && from.status() != StatusCode::NOT_MODIFIED {
        return Err(BackingError::Location.into());
    }
    let located = from.headers().contains_key(header::LOCATION);
    let location = located.then(|| where_to(&state.backing, name, &from)).transpose()?.flatten();
    let link = from.headers().get(header::LINK);
    let link = link.and_then(|link| next_page(&state.backing, link.to_str().ok()?));
    let mut to = relay::relay(from, head);
    for (name, text) in [(header::LOCATION, location), (header::LINK, link)] {
        if let Some(value) = text.and_then(|text| HeaderValue::try_from(text).ok()) {
            to.headers_mut().insert(name, value);
        }
    }
    Ok(to)
}

/// Where a client goes on, or finds what it has made; nothing where the registry's words for that are no path of the API.
fn where_to(
    backing: &Backing,
    name: &Name,
    from: &reqwest::Response,
) -> Result<Option<String>, BackingError> {
    if from.status() != StatusCode::CREATED {
        return Ok(Some(backing.0.mapping.shown(&backing.location(name, from)?)));
    }
    let text = from.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    let made = text.and_then(|text| from.url().join(text).ok());
    let route = made.and_then(|url| Route::parse(url.path()).ok());
    Ok(route.and_then(|route| backing.0.mapping.inward(route)).map(|route| route.to_path()))
}

/// `</v2/NAME/tags/list?…>; rel="next"`, without the registry's host.
fn next_page(backing: &Backing, link: &str) -> Option<String> {
    let (target, _) = link.strip_prefix('<')?.split_once('>')?;
    // Any base does: only path and query are used.
    let url = Url::parse("http://registry.local/").ok()?.join(target).ok()?;
    let route = backing.0.mapping.inward(Route::parse(url.path()).ok()?)?;
    let query = url.query_pairs().into_owned().collect();
    Some(format!("<{}>; rel=\"next\"", Target { route, query }.to_path_and_query()))
}

/// The token of the one `Authorization: Bearer` header; nothing else is looked at.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn content_length(headers: &HeaderMap) -> Result<Option<u64>, Refusal> {
    let Some(value) = headers.get(header::CONTENT_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    length.map(Some).ok_or_else(|| {
        Refusal::new(StatusCode::BAD_REQUEST, "SIZE_INVALID", "the Content-Length is invalid")
    })
}

impl GatewayState {
    /// 401 with the challenge that makes a standard client ask for the right token.
    fn unauthorized(&self, scope: Option<(&Name, Action)>, insufficient: bool) -> Refusal {
        let realm = self.public_url.join(TOKEN_PATH);
        let realm = realm.map_or_else(|_| TOKEN_PATH.to_owned(), Into::into);
        let mut challenge = vec![format!("Bearer realm=\"{realm}\",service=\"{SERVICE}\"")];
        if let Some((name, action)) = scope {
            let actions = match action {
                Action::Push => "pull,push",
                action => action.as_str(),
            };
            challenge.push(format!("scope=\"repository:{name}:{actions}\""));
        }
        let message = if insufficient {
            challenge.push("error=\"insufficient_scope\"".into());
            "the token does not allow this"
        } else {
            "a registry token is required; log in with a Kiln API token as the password"
        };
        Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message)
            .with_challenge(HeaderValue::try_from(challenge.join(",")).ok())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_method_is_told_those_that_are_not() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for path in [
            "/v2/".to_owned(),
            "/v2/_catalog".into(),
            "/v2/a/tags/list".into(),
            "/v2/a/manifests/x".into(),
            format!("/v2/a/blobs/{digest}"),
            "/v2/a/blobs/uploads/".into(),
            "/v2/a/blobs/uploads/0b6f2a52-7d4c-4f0e-9c39-5b0a1c1c2d3e".into(),
            format!("/v2/a/referrers/{digest}"),
        ] {
            let route = Route::parse(&path).unwrap();
            for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
                let needed = needed(&route, &method.parse().unwrap());
                let allowed = methods(&route).split(", ").any(|one| one == method);
                assert_eq!(needed.is_ok(), allowed, "{method} {path}");
            }
        }
    }
}
