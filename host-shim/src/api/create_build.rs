//! POST `/builds`: the source goes to the disk while it arrives, the build into the store, and only
//! then is it accepted.
//!
//! ```text
//! role ▸ idempotency key ▸ queue's limit ▸ upload's place ▸ parts (in any order) ▸ fsync ▸ store ▸ wake ▸ 202
//! ```
//!
//! Until the store has the build, everything that was made for it goes when it fails. From the
//! end of the upload on it runs in a task of its own, so that a client that goes away cannot leave
//! a build without its source.

use std::sync::{Arc, PoisonError};

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, LOCATION};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::error::{ApiError, TRY_AGAIN, log, shown};
use super::fields::schema::NewBuild;
use super::fields::{self, Fields, SOURCE};
use super::get_build::shape;
use super::multipart::{self, Part, Parts};
use super::openapi::params::{self, params};
use super::openapi::problems::{
    BadRequest, Conflict, Forbidden, NoRoom, Stalled, TooLarge, Unavailable, Unprocessable,
    UnsupportedMediaType,
};
use super::openapi::schemas;
use super::own_secrets::{self, OwnSecrets};
use super::source::{Received, SourceError, Upload};
use super::uploads::Place;
use super::{Api, Shared, types};
use crate::build::{self, Build, BuildId, Millis, Status, Tenant};
use crate::events::payload;
use crate::store::{IdempotencyKey, Role, StoreError};
use crate::token::Caller;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Longest idempotency key, in bytes.
const MAX_KEY: usize = 255;
/// What a body may have beside its source: every text part at its bound, and what surrounds them.
const MAX_BESIDE_SOURCE: u64 = 24 * 1024 * 1024;

/// The key of a submit.
struct Key;

params!(Key: params::header(
    "idempotency-key",
    "A request with the same key and the same body makes no second build: it gets the first one.",
    schemas::matching(format!("^[!-~](?:[ -~]{{0,{}}}[!-~])?$", MAX_KEY - 2)),
));

/// Submit a build
///
/// The source is on the disk and the build in the store, with its idempotency key, before the answer is sent.
#[utoipa::path(
    post, path = "/builds", tag = "builds", params(Key),
    request_body(content = NewBuild, content_type = "multipart/form-data"),
    responses(
        (status = 202, description = "It is queued.", body = types::Build, headers(
            ("location" = String, description = "The build's path.")
        )),
        BadRequest, Forbidden, Stalled, Conflict, TooLarge, UnsupportedMediaType, Unprocessable, Unavailable, NoRoom,
    ),
)]
pub(super) async fn create_build(
    State(api): State<Shared>,
    caller: Caller,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, ApiError> {
    let (_place, in_flight) = match admit(&api, &caller, &headers).await {
        Ok(admitted) => admitted,
        Err(refusal) => {
            multipart::discard(request).await;
            return Err(refusal);
        }
    };
    let id = new_id()?;
    let mut parts = Parts::new(request).await?;
    let submitted = match receive(&api, &caller.tenant, &id, &mut parts).await {
        Ok(received) => received,
        Err(refusal) => {
            parts.drain().await;
            return Err(refusal);
        }
    };
    let task = accept(Arc::clone(&api), caller.tenant, id, submitted, in_flight);
    let build = tokio::spawn(task).await.map_err(|error| ApiError::internal(&error))??;
    let location = format!("/builds/{}", build.id);
    let body = Json(shape(&api, &build).await?);
    Ok((StatusCode::ACCEPTED, [(LOCATION, location)], body).into_response())
}

/// What can be refused before anything is received.
async fn admit(
    api: &Arc<Api>,
    caller: &Caller,
    headers: &HeaderMap,
) -> Result<(Place, Option<InFlight>), ApiError> {
    caller.require(Role::Tenant)?;
    let key = parse_key(headers)?;
    let tenant = &caller.tenant;
    check_length(headers, api.limits_of(tenant).max_source_bytes)?;
    let in_flight = key.map(|key| InFlight::reserve(api, tenant, key)).transpose()?;
    // A request that is sent again adds nothing to the queue: it is to get the build that it made.
    let again = match &in_flight {
        Some(held) => api.state.store.build_by_key(tenant, &held.key).await?.is_some(),
        None => false,
    };
    if !again {
        check_queue(api, tenant).await?;
        if !api.state.sources.have_room() {
            return Err(ApiError::no_room());
        }
    }
    Ok((api.uploads.enter(tenant)?, in_flight))
}

/// What came with a request.
struct Submitted {
    /// When its parts began to come.
    begun: Millis,
    wanted: build::Request,
    source: Received,
    /// For this build alone.
    secrets: OwnSecrets,
}

/// Reads every part.
async fn receive(
    api: &Api,
    tenant: &Tenant,
    id: &BuildId,
    parts: &mut Parts,
) -> Result<Submitted, ApiError> {
    let begun = api.now();
    let limits = &api.limits_of(tenant);
    let mut fields = Fields::default();
    let mut source = None;
    let mut secrets = OwnSecrets::default();
    while let Some(part) = parts.next().await? {
        if let Some(id) = part.name().strip_prefix(own_secrets::PREFIX) {
            let id = id.to_owned();
            secrets.insert(&id, part).await?;
            continue;
        }
        let name = fields::known(part.name())?;
        if name != SOURCE {
            fields.insert(name, part.text().await?)?;
        } else if source.is_some() {
            return Err(fields::duplicate(SOURCE));
        } else {
            // What has come before the source is refused before the source is received.
            fields.request(tenant, limits)?;
            source = Some(receive_source(api, id, part, limits.max_source_bytes).await?);
        }
    }
    let mut wanted = fields.request(tenant, limits)?;
    let source = source.ok_or_else(|| {
        ApiError::bad_request(
            "missing_source",
            "send the source, a tar, tar.gz or tar.zst, as the part source",
        )
    })?;
    wanted.source_digest.clone_from(&source.digest);
    wanted.source_bytes = source.bytes;
    Ok(Submitted { begun, wanted, source, secrets })
}

async fn receive_source(
    api: &Api,
    id: &BuildId,
    mut part: Part<'_>,
    limit: u64,
) -> Result<Received, ApiError> {
    let mut upload = Upload::begin(&api.state.sources, id, limit).await?;
    while let Some(chunk) = part.chunk().await? {
        upload.write(&chunk).await?;
    }
    Ok(upload.finish().await?)
}

impl From<SourceError> for ApiError {
    fn from(error: SourceError) -> Self {
        match &error {
            SourceError::NotAnArchive => Self::bad_request("invalid_source", error.to_string()),
            SourceError::TooLarge(_) => Self::too_large(error.to_string()),
            SourceError::Io(io) if io.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {
                log(&error);
                Self::read_only()
            }
            SourceError::Io(io) if io.kind() == std::io::ErrorKind::StorageFull => {
                log(&error);
                Self::no_room()
            }
            SourceError::Io(_) => Self::internal(&error),
        }
    }
}

/// Stores the build, or finds the one that the same key has made.
async fn accept(
    api: Arc<Api>,
    tenant: Tenant,
    id: BuildId,
    submitted: Submitted,
    in_flight: Option<InFlight>,
) -> Result<Build, ApiError> {
    let Submitted { begun, wanted, source, secrets } = submitted;
    let vault = &api.state.vault;
    let key = in_flight.as_ref().map(|held| IdempotencyKey {
        key: held.key.clone(),
        digest: digest(&wanted, secrets.fingerprint(vault)),
    });
    let secrets = secrets.seal(vault, &id, &wanted.secrets)?;
    if let Some(key) = &key
        && let Some(build) = made_before(&api, &tenant, key).await?
    {
        return Ok(build);
    }
    // Once more: many may have been received since the first look.
    check_queue(&api, &tenant).await?;
    let now = api.now();
    let build = Build::queued(id, tenant, wanted, now);
    let first = payload::of_host(now, payload::status(Status::Queued, None));
    // Before anybody can claim it.
    api.state.events.traces().received(&build, begun);
    if let Err(error) = api.state.store.insert_build(&build, &[first], key.as_ref(), &secrets).await
    {
        api.state.events.traces().forgotten(&build.id);
        // A commit that failed may have reached the disk all the same. Its source goes only when
        // it surely has not.
        if !matches!(error, StoreError::Taken(_))
            && !matches!(api.state.store.build(&build.id).await, Ok(None))
        {
            source.keep();
        }
        return Err(error.into());
    }
    source.keep();
    crate::points::point("stored");
    api.state.scheduler.wake();
    api.state.events.metrics().source(build.request.source_bytes);
    tracing::info!(build = %build.id, tenant = %build.tenant, "a build was accepted");
    Ok(build)
}

async fn made_before(
    api: &Api,
    tenant: &Tenant,
    key: &IdempotencyKey,
) -> Result<Option<Build>, ApiError> {
    let Some((id, digest)) = api.state.store.build_by_key(tenant, &key.key).await? else {
        return Ok(None);
    };
    if digest != key.digest {
        let message =
            format!("the Idempotency-Key {} was used for another request", shown(&key.key));
        return Err(ApiError::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "idempotency_key_reused",
            message,
        ));
    }
    // Where it has just gone, being old, its key has gone with it.
    Ok(api.state.store.build(&id).await?)
}

/// Of what was asked for: fields in a fixed order, the source by its digest, secrets by the keyed one. The bytes
/// of the body would not do: every sending of it has another boundary.
fn digest(wanted: &build::Request, secrets: Option<[u8; 32]>) -> String {
    let mut digest = Sha256::new();
    digest.update(serde_json::to_vec(wanted).unwrap_or_default());
    if let Some(secrets) = secrets {
        digest.update(secrets);
    }
    hex::encode(digest.finalize())
}

/// A new id: sortable by time, a name for a directory and a repository. Nothing depends on its not
/// being guessed.
fn new_id() -> Result<BuildId, ApiError> {
    BuildId::new(uuid::Uuid::now_v7().simple().to_string())
        .map_err(|error| ApiError::internal(&error))
}

fn parse_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    // Spaces at the ends are no part of a header's value (RFC 9110, 5.5).
    let text = value.to_str().unwrap_or_default().trim_matches([' ', '\t']);
    let plain = text.bytes().all(|b| (b' '..=b'~').contains(&b));
    if values.next().is_some() || text.is_empty() || text.len() > MAX_KEY || !plain {
        let message =
            format!("Idempotency-Key must be one of 1 to {MAX_KEY} visible ASCII characters");
        return Err(ApiError::bad_request("invalid_header", message));
    }
    Ok(Some(text.to_owned()))
}

/// Refuses by its length what would be refused after having been received.
fn check_length(headers: &HeaderMap, limit: u64) -> Result<(), ApiError> {
    let length =
        headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit.saturating_add(MAX_BESIDE_SOURCE)) {
        let message = format!("the source is larger than the {limit} bytes that this host takes");
        return Err(ApiError::too_large(message));
    }
    Ok(())
}

async fn check_queue(api: &Api, tenant: &Tenant) -> Result<(), ApiError> {
    let most = api.limits_of(tenant).max_queued;
    if api.state.store.queued_count(tenant).await? < most {
        return Ok(());
    }
    let message = format!(
        "{tenant} has {most} queued builds, as many as it may; try again when some are done"
    );
    Err(ApiError::too_many("queue_full", message, TRY_AGAIN))
}

/// An idempotency key while its submit is under way.
struct InFlight {
    api: Arc<Api>,
    tenant: Tenant,
    key: String,
}

impl InFlight {
    fn reserve(api: &Arc<Api>, tenant: &Tenant, key: String) -> Result<Self, ApiError> {
        let mut keys = api.keys_in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        if !keys.insert((tenant.clone(), key.clone())) {
            let message =
                format!("a request with the Idempotency-Key {} is still under way", shown(&key));
            return Err(ApiError::conflict("idempotency_key_in_flight", message).retry_after(1));
        }
        Ok(Self { api: Arc::clone(api), tenant: tenant.clone(), key })
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut keys = self.api.keys_in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        keys.remove(&(self.tenant.clone(), std::mem::take(&mut self.key)));
    }
}
