//! Sending a checked image to the registry.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use http::{HeaderValue, Method, StatusCode, header};
use tokio_util::io::ReaderStream;

use super::{Checked, CheckedBlob, PublishError};
use crate::gateway::backing::{Backing, BackingError, Target};
use crate::gateway::path::{Name, Reference, Route, is_tag};
use crate::gateway::relay;
use crate::gateway::upstream::{Place, Upstreams};
use crate::staging::Digest;

/// Tries of one request that fails for a reason that may pass. With the pauses between them they
/// outlast a restart of the managed registry.
const TRIES: u32 = 6;
/// The first pause between two tries; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Blobs that are sent at a time. Disk and network are shared with other builds.
const PARALLEL: usize = 3;
/// Read from a file at a time.
const CHUNK: usize = 128 * 1024;
/// How much of a refusal is read.
const MAX_REFUSAL: usize = 16 * 1024;
/// How much of a refusal is repeated.
const SHOWN_REFUSAL: usize = 300;

/// Publishes the image under the repository and tag. May be repeated.
pub async fn push(
    checked: &Checked,
    backing: &Backing,
    upstreams: &Upstreams,
    repository: &str,
    tag: &str,
) -> Result<(), PublishError> {
    let name = Name::parse(repository).filter(|_| is_tag(tag));
    let name = name.ok_or_else(|| PublishError::BadName(format!("{repository}:{tag}")))?;
    let to = Destination { checked, backing, upstreams, name: &name };
    // What is found there now has to be there when the manifest comes, which refers to it from then on.
    let digests = checked.blobs.iter().map(|blob| blob.digest).chain([checked.digest]);
    let _wanted = backing.want(digests.collect()).await;
    futures_util::stream::iter(checked.blobs.clone())
        .map(|blob| async move { retry(|| to.blob(&blob)).await })
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await?;
    for reference in [Reference::Digest(checked.digest), Reference::Tag(tag.to_owned())] {
        retry(|| to.manifest(&reference)).await?;
        retry(|| to.confirm(&reference)).await?;
    }
    Ok(())
}

/// Whether the registry has the manifest in this repository.
pub async fn is_published(
    backing: &Backing,
    repository: &str,
    digest: Digest,
) -> Result<bool, PublishError> {
    let name = Name::parse(repository);
    let name = name.ok_or_else(|| PublishError::BadName(repository.to_owned()))?;
    let reference = Reference::Digest(digest);
    let found = retry(|| head(backing, &name, &reference)).await?;
    Ok(found.is_some())
}

#[derive(Clone, Copy)]
struct Destination<'a> {
    checked: &'a Checked,
    backing: &'a Backing,
    upstreams: &'a Upstreams,
    name: &'a Name,
}

impl Destination<'_> {
    /// Gets one blob there, in the cheapest way.
    async fn blob(&self, blob: &CheckedBlob) -> Result<(), PublishError> {
        let digest = blob.digest;
        let operation = || format!("look for {digest}");
        let route = Route::Blob(self.name.clone(), digest);
        let found = self.backing.request(Method::HEAD, route).send().await;
        let found = found.map_err(failed(operation))?;
        match found.status() {
            StatusCode::OK => return Ok(()),
            StatusCode::NOT_FOUND => {}
            _ => return Err(refused(operation(), found).await),
        }
        let Some(upload) = self.begin(blob).await? else { return Ok(()) };
        let operation = || format!("take {digest}");
        let octets = HeaderValue::from_static("application/octet-stream");
        let request = self.backing.request_to(Method::PUT, upload.with("digest", &digest));
        let request = request.header(header::CONTENT_TYPE, octets);
        let request =
            if blob.staged {
                let path = self.checked.path(blob);
                let file = tokio::fs::File::open(&path).await.map_err(|source| {
                    PublishError::Io { operation: "read", path: path.display().to_string(), source }
                })?;
                request.stream(ReaderStream::with_capacity(file, CHUNK), Some(blob.size))
            } else if let Some(place) = self.elsewhere(blob) {
                let digest = blob.digest;
                let from = self.upstreams.blob(&place, digest).await;
                let from = from.map_err(|source| PublishError::Upstream {
                    digest,
                    place: place.image(),
                    source,
                })?;
                request.stream(from.body, Some(blob.size))
            } else {
                request.stream(self.copy(blob).await?, Some(blob.size))
            };
        let done = request.send().await.map_err(failed(operation))?;
        expect(StatusCode::CREATED, operation(), done).await
    }

    /// Mounts the blob from where it was pulled, or starts an upload and returns where it goes on.
    async fn begin(&self, blob: &CheckedBlob) -> Result<Option<Target>, PublishError> {
        let operation = || format!("start an upload of {}", blob.digest);
        let mut target = Target { route: Route::Uploads(self.name.clone()), query: vec![] };
        if let Some(source) = &blob.source
            && self.elsewhere(blob).is_none()
        {
            target = target.with("mount", &blob.digest).with("from", source);
        }
        let answer = self.backing.request_to(Method::POST, target).send().await;
        let answer = answer.map_err(failed(operation))?;
        match answer.status() {
            StatusCode::CREATED => Ok(None),
            // To a mount this says: not possible, upload it instead (distribution spec).
            StatusCode::ACCEPTED => {
                self.backing.location(self.name, &answer).map(Some).map_err(failed(operation))
            }
            _ => Err(refused(operation(), answer).await),
        }
    }

    /// Where a blob was pulled from, if that was another registry.
    fn elsewhere(&self, blob: &CheckedBlob) -> Option<Place> {
        self.upstreams.find(&Name::parse(blob.source.as_deref()?)?).ok()
    }

    /// The content of a blob that the registry has in another repository but does not mount.
    async fn copy(
        &self,
        blob: &CheckedBlob,
    ) -> Result<
        impl futures_util::Stream<Item = Result<Bytes, BackingError>> + Send + 'static,
        PublishError,
    > {
        let digest = blob.digest;
        let source = blob.source.as_deref().and_then(Name::parse);
        let source = source.ok_or(PublishError::BlobMissing(digest))?;
        let operation = || format!("read {digest} of {source}");
        let route = Route::Blob(source.clone(), digest);
        let from = self.backing.request(Method::GET, route).send().await;
        let from = from.map_err(failed(operation))?;
        if from.status() != StatusCode::OK {
            return Err(refused(operation(), from).await);
        }
        Ok(relay::patient(from))
    }

    async fn manifest(&self, reference: &Reference) -> Result<(), PublishError> {
        let operation = || format!("take the manifest as {}:{reference}", self.name);
        let media_type = HeaderValue::try_from(self.checked.media_type.as_str());
        let media_type = media_type.map_err(|e| PublishError::NotAnImage(e.to_string()))?;
        let bytes = Bytes::copy_from_slice(self.checked.manifest.as_bytes());
        let route = Route::Manifest(self.name.clone(), reference.clone());
        let request = self.backing.request(Method::PUT, route);
        let request = request.header(header::CONTENT_TYPE, media_type).bytes(bytes);
        let _change = self.backing.change().await;
        let done = request.send().await.map_err(failed(operation))?;
        expect(StatusCode::CREATED, operation(), done).await
    }

    /// Asks the registry what it has now.
    async fn confirm(&self, reference: &Reference) -> Result<(), PublishError> {
        let expected = self.checked.digest;
        let actual = head(self.backing, self.name, reference).await?.flatten();
        // Not every registry says a digest; one that has it by its digest has said so.
        let by_digest = matches!(reference, Reference::Digest(_)) && actual.is_none();
        if by_digest || actual.as_deref() == Some(&expected.to_string()) {
            Ok(())
        } else {
            Err(PublishError::NotConfirmed { expected, actual })
        }
    }
}

/// `None`: the registry has no such manifest. Otherwise the digest, where the registry says it.
async fn head(
    backing: &Backing,
    name: &Name,
    reference: &Reference,
) -> Result<Option<Option<String>>, PublishError> {
    let operation = || format!("look for {name}:{reference}");
    let route = Route::Manifest(name.clone(), reference.clone());
    let accept = HeaderValue::try_from(super::MANIFEST_TYPES.join(", "));
    let accept = accept.map_err(|e| PublishError::NotAnImage(e.to_string()))?;
    let request = backing.request(Method::HEAD, route).header(header::ACCEPT, accept);
    let answer = request.send().await.map_err(failed(operation))?;
    match answer.status() {
        StatusCode::OK => {
            let digest = answer.headers().get(&relay::CONTENT_DIGEST);
            Ok(Some(digest.and_then(|v| v.to_str().ok()).map(str::to_owned)))
        }
        StatusCode::NOT_FOUND => Ok(None),
        _ => Err(refused(operation(), answer).await),
    }
}

async fn retry<T, F>(mut attempt: impl FnMut() -> F) -> Result<T, PublishError>
where
    F: Future<Output = Result<T, PublishError>>,
{
    let mut pause = FIRST_PAUSE;
    for _ in 1..TRIES {
        match attempt().await {
            Err(error) if error.is_transient() => {
                tracing::warn!(error = error.detail(), again_in = ?pause, "publishing failed for now");
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            done => return done,
        }
    }
    attempt().await
}

fn failed(operation: impl FnOnce() -> String) -> impl FnOnce(BackingError) -> PublishError {
    move |source| PublishError::Backing { operation: operation(), source }
}

async fn expect(
    status: StatusCode,
    operation: String,
    answer: reqwest::Response,
) -> Result<(), PublishError> {
    if answer.status() == status { Ok(()) } else { Err(refused(operation, answer).await) }
}

async fn refused(operation: String, answer: reqwest::Response) -> PublishError {
    let status = answer.status();
    let body = relay::collect(answer, MAX_REFUSAL).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&body);
    let message = text.chars().take(SHOWN_REFUSAL).flat_map(char::escape_debug).collect();
    PublishError::Refused { operation, status, message }
}
