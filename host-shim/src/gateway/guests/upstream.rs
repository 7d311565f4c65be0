//! Pulls of a guest from other registries, `upstream/<registry>/<repository>`: read-only, only those that the operator
//! names, and only where the build's tenant may.

use axum::body::Body;
use axum::response::Response;
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use kiln_protocol::name::UPSTREAM_SPACE;

use super::GuestContext;
use crate::gateway::error::Refusal;
use crate::gateway::path::{Name, Reference, Route};
use crate::gateway::relay;
use crate::gateway::upstream::{Nowhere, Place};
use crate::staging::Digest;

pub(super) async fn respond(
    ctx: &GuestContext,
    parts: &Parts,
    route: Route,
) -> Result<Response, Refusal> {
    match route {
        Route::Manifest(name, reference) => manifest(ctx, parts, &name, reference).await,
        Route::Blob(name, digest) => blob(ctx, parts, &name, digest).await,
        _ => Err(Refusal::unsupported("a build only pulls images from other registries")),
    }
}

/// Whether a name at the gateway is of another registry.
pub(super) fn is_elsewhere(name: &Name) -> bool {
    name.split_first().0 == UPSTREAM_SPACE
}

/// Where the name leads, if the build may go there.
fn place(ctx: &GuestContext, name: &Name) -> Result<Place, Refusal> {
    let unknown = |message| Refusal::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", message);
    let place = ctx.upstreams.find(name).map_err(|nowhere| match nowhere {
        Nowhere::Unknown(host) => unknown(format!(
            "{host} is not an upstream of this host: ask the operator for --upstream {host}"
        )),
        Nowhere::NoName => unknown(format!("{name} names no repository of a registry")),
    })?;
    let host = place.upstream.host();
    if !place.upstream.admits(&ctx.tenant) {
        let message = format!("tenant {} may not pull from {host}: ask the operator", ctx.tenant);
        return Err(Refusal::denied(message));
    }
    Ok(place)
}

async fn manifest(
    ctx: &GuestContext,
    parts: &Parts,
    full: &Name,
    reference: Reference,
) -> Result<Response, Refusal> {
    let place = place(ctx, full)?;
    let room = ctx.manifests.place().await;
    let manifest = ctx.upstreams.manifest(&place, &reference).await.map_err(|error| {
        let at = at(&place.name, &reference);
        error.refusal(place.upstream.host(), &at, "MANIFEST_UNKNOWN")
    })?;
    let mut to = Response::new(Body::empty());
    put(&mut to, header::CONTENT_LENGTH, &manifest.bytes.len());
    put(&mut to, header::CONTENT_TYPE, &manifest.media_type);
    put(&mut to, relay::CONTENT_DIGEST, &manifest.digest);
    if parts.method == Method::GET {
        let named = at(&place.image(), &reference);
        ctx.record_pull(named, full, manifest.digest, &manifest.bytes)?;
        *to.body_mut() = Body::from(room.hold(manifest.bytes));
    }
    Ok(to)
}

/// As a whole: a `Range` may be left out of account (RFC 9110, 14.2).
pub(super) async fn blob(
    ctx: &GuestContext,
    parts: &Parts,
    full: &Name,
    digest: Digest,
) -> Result<Response, Refusal> {
    let place = place(ctx, full)?;
    let host = place.upstream.host();
    let what = || format!("{}@{digest}", place.name);
    let mut to = Response::new(Body::empty());
    let size = if parts.method == Method::GET {
        let blob = ctx.upstreams.blob(&place, digest).await;
        let blob = blob.map_err(|error| error.refusal(host, &what(), "BLOB_UNKNOWN"))?;
        *to.body_mut() = Body::from_stream(blob.body);
        blob.size
    } else {
        let size = ctx.upstreams.blob_size(&place, digest).await;
        size.map_err(|error| error.refusal(host, &what(), "BLOB_UNKNOWN"))?
    };
    if let Some(size) = size {
        put(&mut to, header::CONTENT_LENGTH, &size);
    }
    put(&mut to, header::CONTENT_TYPE, &"application/octet-stream");
    put(&mut to, relay::CONTENT_DIGEST, &digest);
    Ok(to)
}

/// An image's name.
fn at(name: &dyn std::fmt::Display, reference: &Reference) -> String {
    match reference {
        Reference::Tag(tag) => format!("{name}:{tag}"),
        Reference::Digest(digest) => format!("{name}@{digest}"),
    }
}

fn put(response: &mut Response, name: HeaderName, value: &dyn ToString) {
    if let Ok(value) = HeaderValue::try_from(value.to_string()) {
        response.headers_mut().insert(name, value);
    }
}
