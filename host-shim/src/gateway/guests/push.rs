//! Pushes of a guest: into the staging area of its build, and nowhere else.

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt, BodyStream, Limited};
use hyper::body::Incoming;
use kiln_protocol::name::STAGING_REPOSITORY;
use oci_spec::image::ImageManifest;
use tokio_stream::StreamExt;
use tokio_util::io::ReaderStream;

use super::{GuestContext, pull};
use crate::gateway::error::Refusal;
use crate::gateway::path::{Reference, Route};
use crate::gateway::relay;
use crate::publish::{self, MANIFEST_TYPES};
use crate::staging::{Digest, MAX_MANIFEST_BYTES, UploadId};

pub(super) async fn respond(
    ctx: &GuestContext,
    parts: &Parts,
    route: Route,
    body: Incoming,
) -> Result<Response, Refusal> {
    let method = &parts.method;
    if !matches!(*method, Method::GET | Method::HEAD) && !ctx.may_push().await {
        return Err(Refusal::denied("the build does not push its result yet"));
    }
    match (route, method) {
        (Route::Blob(_, digest), &Method::GET | &Method::HEAD) => {
            get_blob(ctx, parts, digest).await
        }
        (Route::Uploads(_), &Method::POST) => begin(ctx, parts, body).await,
        (Route::Upload(_, id), method) => {
            let unknown = "there is no such upload";
            let id = UploadId::parse(&id).ok_or_else(|| {
                Refusal::new(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", unknown)
            })?;
            upload(ctx, parts, method, id, body).await
        }
        (Route::Manifest(_, reference), &Method::PUT) => {
            put_manifest(ctx, parts, reference, body).await
        }
        (Route::Manifest(_, reference), &Method::GET | &Method::HEAD) => {
            get_manifest(ctx, method, reference).await
        }
        _ => Err(Refusal::unsupported("the staging area has no such method here")),
    }
}

/// A blob that is known by a pull counts as present: base layers need not be sent again.
async fn get_blob(ctx: &GuestContext, parts: &Parts, digest: Digest) -> Result<Response, Refusal> {
    if let Some((file, size)) = ctx.staging.open_blob(&digest).await? {
        let mut response = Response::new(Body::empty());
        if parts.method == Method::GET {
            *response.body_mut() = Body::from_stream(ReaderStream::new(file));
        }
        put(&mut response, header::CONTENT_LENGTH, &size);
        put(&mut response, header::CONTENT_TYPE, &"application/octet-stream");
        put(&mut response, relay::CONTENT_DIGEST, &digest);
        return Ok(response);
    }
    match ctx.pulled_blob(&digest) {
        Some(blob) if parts.method == Method::HEAD => {
            let mut response = Response::new(Body::empty());
            put(&mut response, header::CONTENT_LENGTH, &blob.size);
            put(&mut response, relay::CONTENT_DIGEST, &digest);
            Ok(response)
        }
        Some(blob) => pull::blob(ctx, parts, blob.repository, digest).await,
        None => {
            let message = format!("{digest} was not pushed");
            Err(Refusal::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", message))
        }
    }
}

/// `POST …/uploads/`: a mount, a whole blob (`?digest=`), or the start of an upload.
async fn begin(ctx: &GuestContext, parts: &Parts, body: Incoming) -> Result<Response, Refusal> {
    if let Some(digest) = query_digest(parts, "mount")?
        && ctx.known_blob(&digest).is_some()
    {
        return Ok(created(digest));
    }
    let whole = query_digest(parts, "digest")?;
    let id = ctx.staging.begin_upload().await?;
    match whole {
        Some(digest) => {
            let done = ctx.staging.finish(id, None, data(body), digest).await;
            if done.is_err() {
                // One that broke off would be kept to be continued, but nobody knows its id.
                let _ = ctx.staging.cancel_upload(id).await;
            }
            done?;
            Ok(created(digest))
        }
        None => Ok(progress(StatusCode::ACCEPTED, id, 0)),
    }
}

async fn upload(
    ctx: &GuestContext,
    parts: &Parts,
    method: &Method,
    id: UploadId,
    body: Incoming,
) -> Result<Response, Refusal> {
    match *method {
        Method::GET => {
            let offset = ctx.staging.upload_offset(id)?;
            Ok(progress(StatusCode::NO_CONTENT, id, offset))
        }
        Method::PATCH => {
            let offset = ctx.staging.append(id, chunk_start(parts)?, data(body)).await?;
            Ok(progress(StatusCode::ACCEPTED, id, offset))
        }
        Method::PUT => {
            let digest = query_digest(parts, "digest")?
                .ok_or_else(|| Refusal::bad_digest("the upload needs ?digest="))?;
            ctx.staging.finish(id, chunk_start(parts)?, data(body), digest).await?;
            Ok(created(digest))
        }
        Method::DELETE => {
            ctx.staging.cancel_upload(id).await?;
            Ok(status(StatusCode::NO_CONTENT))
        }
        _ => Err(Refusal::unsupported("an upload has no such method")),
    }
}

/// Takes an image manifest whose blobs are all here, or known by a pull.
async fn put_manifest(
    ctx: &GuestContext,
    parts: &Parts,
    reference: Reference,
    body: Incoming,
) -> Result<Response, Refusal> {
    let media_type = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let media_type = MANIFEST_TYPES.into_iter().find(|known| Some(*known) == media_type);
    let media_type = media_type.ok_or_else(|| {
        Refusal::bad_manifest("a build pushes one image manifest (OCI, or Docker schema 2)")
    })?;
    let _place = ctx.manifests.place().await;
    let bytes = Limited::new(body, MAX_MANIFEST_BYTES).collect().await;
    let bytes: Bytes = bytes.map_err(|e| Refusal::bad_manifest(e.to_string()))?.to_bytes();
    let digest = Digest::of(&bytes);
    let tag = match &reference {
        Reference::Tag(tag) => Some(tag.as_str()),
        Reference::Digest(wanted) if *wanted == digest => None,
        Reference::Digest(_) => {
            return Err(Refusal::bad_digest(format!("the manifest is {digest}")));
        }
    };
    let manifest: ImageManifest = publish::parse_manifest(media_type, &bytes)
        .map_err(|error| Refusal::bad_manifest(error.to_string()))?;
    for (blob, size) in
        publish::blobs_of(&manifest).map_err(|e| Refusal::bad_manifest(e.to_string()))?
    {
        match ctx.known_blob(&blob) {
            Some(known) if known == size => {}
            Some(known) => {
                let message = format!("{blob} has {known} bytes, not {size}");
                return Err(Refusal::bad_manifest(message));
            }
            None => {
                let message = format!("{blob} was not pushed");
                return Err(Refusal::new(
                    StatusCode::BAD_REQUEST,
                    "MANIFEST_BLOB_UNKNOWN",
                    message,
                ));
            }
        }
    }
    ctx.staging.put_manifest(tag, media_type, bytes).await?;
    let mut response = status(StatusCode::CREATED);
    put(&mut response, header::LOCATION, &format!("/v2/{STAGING_REPOSITORY}/manifests/{digest}"));
    put(&mut response, relay::CONTENT_DIGEST, &digest);
    Ok(response)
}

async fn get_manifest(
    ctx: &GuestContext,
    method: &Method,
    reference: Reference,
) -> Result<Response, Refusal> {
    let digest = match &reference {
        Reference::Tag(tag) => ctx.staging.tag(tag),
        Reference::Digest(digest) => Some(*digest),
    };
    let staged = match digest {
        Some(digest) => ctx.staging.manifest(&digest).await?,
        None => None,
    };
    let staged = staged.ok_or_else(|| {
        let message = format!("{reference} was not pushed");
        Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", message)
    })?;
    let mut response = Response::new(Body::empty());
    put(&mut response, header::CONTENT_TYPE, &staged.media_type);
    put(&mut response, header::CONTENT_LENGTH, &staged.bytes.len());
    put(&mut response, relay::CONTENT_DIGEST, &staged.digest);
    if method == Method::GET {
        *response.body_mut() = Body::from(staged.bytes);
    }
    Ok(response)
}

/// The content of a body, frame by frame.
fn data(body: Incoming) -> impl tokio_stream::Stream<Item = Result<Bytes, hyper::Error>> + Unpin {
    BodyStream::new(body).filter_map(|frame| match frame {
        Ok(frame) => frame.into_data().ok().map(Ok),
        Err(error) => Some(Err(error)),
    })
}

fn query_digest(parts: &Parts, key: &str) -> Result<Option<Digest>, Refusal> {
    let query = parts.uri.query().unwrap_or_default().as_bytes();
    let value = url::form_urlencoded::parse(query).find(|(name, _)| name == key);
    let digest = value.map(|(_, value)| Digest::parse(&value)).transpose();
    digest.map_err(|error| Refusal::bad_digest(error.to_string()))
}

/// Where a chunk starts, from `Content-Range: START-END`; `None` when it does not say.
fn chunk_start(parts: &Parts) -> Result<Option<u64>, Refusal> {
    let Some(value) = parts.headers.get(header::CONTENT_RANGE) else { return Ok(None) };
    let range = value.to_str().unwrap_or_default();
    let range = range.strip_prefix("bytes ").unwrap_or(range);
    let start = range.split_once('-').and_then(|(start, _)| start.parse().ok());
    start.map(Some).ok_or_else(|| {
        let message = "the Content-Range is invalid";
        Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", message)
    })
}

fn created(digest: Digest) -> Response {
    let mut response = status(StatusCode::CREATED);
    put(&mut response, header::LOCATION, &format!("/v2/{STAGING_REPOSITORY}/blobs/{digest}"));
    put(&mut response, relay::CONTENT_DIGEST, &digest);
    response
}

fn progress(code: StatusCode, id: UploadId, offset: u64) -> Response {
    let mut response = status(code);
    let location = format!("/v2/{STAGING_REPOSITORY}/blobs/uploads/{id}");
    put(&mut response, header::LOCATION, &location);
    // The spec's range is inclusive; both ends are 0 when there is nothing, as in docker-registry.
    put(&mut response, header::RANGE, &format!("0-{}", offset.saturating_sub(1)));
    put(&mut response, relay::UPLOAD_UUID, &id);
    response
}

fn status(code: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = code;
    response
}

fn put(response: &mut Response, name: HeaderName, value: &dyn ToString) {
    if let Ok(value) = HeaderValue::try_from(value.to_string()) {
        response.headers_mut().insert(name, value);
    }
}
