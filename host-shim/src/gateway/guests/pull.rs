//! Pulls of a guest: read-only, from the repositories that its build may read.

use axum::body::Body;
use axum::response::Response;
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode, header};
use kiln_protocol::name::{REGISTRY, STAGING_REPOSITORY};

use super::{GuestContext, upstream};
use crate::gateway::backing::Target;
use crate::gateway::error::Refusal;
use crate::gateway::path::{Name, Reference, Route};
use crate::gateway::relay;
use crate::staging::{Digest, MAX_MANIFEST_BYTES};

pub(super) async fn respond(
    ctx: &GuestContext,
    parts: &Parts,
    route: Route,
) -> Result<Response, Refusal> {
    if !matches!(parts.method, Method::GET | Method::HEAD) {
        return Err(Refusal::denied(format!(
            "a build pushes only to {REGISTRY}/{STAGING_REPOSITORY}; Kiln publishes the result itself"
        )));
    }
    if let Some(name) = route.name() {
        if upstream::is_elsewhere(name) {
            return upstream::respond(ctx, parts, route).await;
        }
        ctx.check_pull(name)?;
    }
    match route {
        Route::Manifest(name, reference) => manifest(ctx, parts, name, reference).await,
        Route::Blob(name, digest) => blob(ctx, parts, name, digest).await,
        Route::Tags(name) => tags(ctx, parts, name).await,
        _ => Err(Refusal::unsupported("a build only pulls from here")),
    }
}

/// A manifest is read as a whole, so that it is known what was served before it is served.
async fn manifest(
    ctx: &GuestContext,
    parts: &Parts,
    name: Name,
    reference: Reference,
) -> Result<Response, Refusal> {
    let route = Route::Manifest(name.clone(), reference.clone());
    let request = ctx.backing.request(parts.method.clone(), route);
    let request = relay::accept_manifests(
        request.headers_of(&parts.headers, &[header::ACCEPT]),
        &parts.headers,
    );
    let from = request.send().await?;
    if from.status() != StatusCode::OK {
        return Err(refused(&from, "MANIFEST_UNKNOWN", &name, &reference.to_string()));
    }
    if parts.method == Method::HEAD {
        return Ok(relay::relay(from, true));
    }
    let media_type = from.headers().get(header::CONTENT_TYPE).cloned();
    let place = ctx.manifests.place().await;
    let bytes = relay::collect(from, MAX_MANIFEST_BYTES).await?;
    let digest = Digest::of(&bytes);
    if matches!(reference, Reference::Digest(wanted) if wanted != digest) {
        tracing::error!(%name, %reference, actual = %digest, "the registry served another manifest");
        let message =
            format!("{REGISTRY}/{name}@{reference}: the registry served another manifest");
        return Err(Refusal::new(StatusCode::BAD_GATEWAY, "MANIFEST_INVALID", message));
    }
    let at = match &reference {
        Reference::Tag(tag) => format!("{REGISTRY}/{name}:{tag}"),
        Reference::Digest(digest) => format!("{REGISTRY}/{name}@{digest}"),
    };
    let blobs = ctx.record_pull(at, &name, digest, &bytes)?;
    ctx.want(blobs).await;
    let mut to = Response::new(Body::from(place.hold(bytes)));
    if let Some(media_type) = media_type {
        to.headers_mut().insert(header::CONTENT_TYPE, media_type);
    }
    if let Ok(digest) = HeaderValue::try_from(digest.to_string()) {
        to.headers_mut().insert(relay::CONTENT_DIGEST, digest);
    }
    Ok(to)
}

/// A blob streams; the engine checks its digest.
pub(super) async fn blob(
    ctx: &GuestContext,
    parts: &Parts,
    name: Name,
    digest: Digest,
) -> Result<Response, Refusal> {
    if upstream::is_elsewhere(&name) {
        return upstream::blob(ctx, parts, &name, digest).await;
    }
    let route = Route::Blob(name.clone(), digest);
    let request = ctx.backing.request(parts.method.clone(), route);
    let from = request.headers_of(&parts.headers, &[header::RANGE]).send().await?;
    match from.status() {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
            Ok(relay::relay(from, parts.method == Method::HEAD))
        }
        _ => Err(refused(&from, "BLOB_UNKNOWN", &name, &digest.to_string())),
    }
}

async fn tags(ctx: &GuestContext, parts: &Parts, name: Name) -> Result<Response, Refusal> {
    let query = parts.uri.query().unwrap_or_default().as_bytes();
    let query = url::form_urlencoded::parse(query).into_owned();
    let query = query.filter(|(key, _)| key == "n" || key == "last").collect();
    let target = Target { route: Route::Tags(name.clone()), query };
    let from = ctx.backing.request_to(parts.method.clone(), target).send().await?;
    if from.status() == StatusCode::OK {
        let answer = relay::relay(from, parts.method == Method::HEAD);
        ctx.backing.rename_tags(&name, answer).await
    } else {
        Err(refused(&from, "NAME_UNKNOWN", &name, "tags"))
    }
}

/// What the guest is told instead of the registry's own answer.
fn refused(from: &reqwest::Response, code: &'static str, name: &Name, what: &str) -> Refusal {
    let status = from.status();
    match status {
        StatusCode::NOT_FOUND => {
            let message = format!("{REGISTRY}/{name} has no {what}");
            Refusal::new(StatusCode::NOT_FOUND, code, message)
        }
        StatusCode::TOO_MANY_REQUESTS => {
            let message = "the registry behind Kiln asks to slow down";
            Refusal::new(status, "TOOMANYREQUESTS", message)
        }
        _ => {
            tracing::warn!(%name, %status, "the registry behind Kiln refuses a pull");
            let message = format!("the registry behind Kiln answered {status} for {name}");
            Refusal::new(StatusCode::BAD_GATEWAY, "UNKNOWN", message)
        }
    }
}
