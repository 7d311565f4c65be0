//! Blobs of upstreams, each from the nearest place that has it.
//!
//! ```text
//! blob ─▶ in the cache? ─────────────────────────────▶ kept ───┐
//!           └─▶ somebody fetches it? ─▶ along               ◀──┤ checked against the digest
//!                 └─▶ fetch ─▶ room? ─▶ along, then kept       │
//!                                └─▶ no: direct ───────────────┘
//! ```

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt, TryStreamExt};
use http::{HeaderMap, Method, header};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncReadExt as _;
use tokio::sync::watch;
use tokio_util::io::{ReaderStream, StreamReader};

use super::cache::{self, Cache, Key, Kind};
use super::error::UpstreamError;
use super::flight::{self, Flight, Joined, Progress};
use super::{MAX_FETCH, Place, Upstreams, expect_ok};
use crate::gateway::path::Route;
use crate::gateway::relay;
use crate::staging::Digest;

/// Largest blob. Nothing that is larger is a layer that a VM could unpack.
const MAX_BLOB_BYTES: u64 = 256 << 30;
/// Read from a file at a time.
const CHUNK: usize = 256 * 1024;

/// A blob. Its body breaks off where it turns out to be something else than its digest says.
pub struct Blob {
    /// Where it is known.
    pub size: Option<u64>,
    /// Its content.
    pub body: BoxStream<'static, Result<Bytes, BoxError>>,
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Upstreams {
    /// A blob: from the cache, along with who fetches it already, or from the upstream.
    pub async fn blob(&self, place: &Place, digest: Digest) -> Result<Blob, Arc<UpstreamError>> {
        let Some(cache) = &self.0.cache else { return Ok(direct(place, digest).await?) };
        let registry = Arc::clone(&place.upstream.registry);
        let key = Key { registry, kind: Kind::Blob, digest };
        let wanted = (key.clone(), place.name.clone());
        let mut reader = match self.0.flights.join(&wanted, || cache.get(&key)) {
            Joined::Kept((file, size)) => return Ok(kept(Arc::clone(cache), key, file, size)),
            Joined::Along(reader) => reader,
            Joined::First(flight, reader) => {
                tokio::spawn(fetch(Arc::clone(cache), place.clone(), flight));
                reader
            }
        };
        match begun(&mut reader).await? {
            Some(size) => Ok(Blob {
                size: Some(size),
                body: flight::along(reader).map_err(Into::into).boxed(),
            }),
            None => Ok(direct(place, digest).await?),
        }
    }

    /// The size of a blob, where it is known.
    pub async fn blob_size(
        &self,
        place: &Place,
        digest: Digest,
    ) -> Result<Option<u64>, UpstreamError> {
        let registry = Arc::clone(&place.upstream.registry);
        let kept = self.0.cache.as_ref();
        let kept = kept.and_then(|cache| cache.get(&Key { registry, kind: Kind::Blob, digest }));
        if let Some((_, size)) = kept {
            return Ok(Some(size));
        }
        let from = place.send(Method::HEAD, |name| Route::Blob(name, digest)).await?;
        Ok(length(expect_ok(from)?.headers()))
    }

    /// A small blob as a whole.
    pub async fn small_blob(
        &self,
        place: &Place,
        digest: Digest,
        limit: usize,
    ) -> Result<Vec<u8>, Arc<UpstreamError>> {
        let blob = self.blob(place, digest).await?;
        let body = StreamReader::new(blob.body.map_err(std::io::Error::other));
        let mut bytes = Vec::new();
        let read = body.take(limit as u64 + 1).read_to_end(&mut bytes).await;
        match read {
            Ok(_) if bytes.len() <= limit => Ok(bytes),
            Ok(_) => Err(Arc::new(UpstreamError::Large(digest))),
            Err(error) => {
                tracing::warn!(%digest, error = %crate::causes::chain(&error), "a blob broke off");
                Err(Arc::new(UpstreamError::Changed(digest)))
            }
        }
    }
}

/// Waits until it is known whether a blob arrives; its size. `None`: it is not kept.
async fn begun(reader: &mut watch::Receiver<Progress>) -> Result<Option<u64>, Arc<UpstreamError>> {
    let begun = reader.wait_for(|progress| !matches!(progress, Progress::Asking)).await;
    match &*begun.map_err(|_| UpstreamError::Broken)? {
        Progress::Arriving { size, .. } | Progress::Whole { size, .. } => Ok(Some(*size)),
        Progress::NoRoom => Ok(None),
        Progress::Failed(error) => Err(Arc::clone(error)),
        Progress::Asking => Err(Arc::new(UpstreamError::Broken)),
    }
}

/// Fetches a blob into the cache, for as long as anybody waits for it.
async fn fetch(cache: Arc<Cache>, place: Place, flight: Flight) {
    let fetching = tokio::time::timeout(MAX_FETCH, arrive(&cache, &place, &flight));
    let arrived = tokio::select! {
        arrived = fetching => arrived.unwrap_or(Err(UpstreamError::Slow)),
        () = flight.deserted() => return,
    };
    let room = match arrived {
        Ok(Some(room)) => room,
        Ok(None) => return flight.tell(Progress::NoRoom),
        Err(error) => return flight.tell(Progress::Failed(Arc::new(error))),
    };
    let key = flight.wanted().0.clone();
    tracing::info!(upstream = place.upstream.host(), name = %place.name, digest = %key.digest, "fetched a blob");
    // Who reads along has all of it by now: who comes later finds it here or there.
    let kept = tokio::task::spawn_blocking(move || room.keep(&key)).await;
    if let Err(error) = kept.unwrap_or(Err(UpstreamError::Broken)) {
        tracing::warn!(error = %crate::causes::chain(&error), "a blob was not kept");
    }
}

/// `None`: there is no room for it.
async fn arrive(
    cache: &Arc<Cache>,
    place: &Place,
    flight: &Flight,
) -> Result<Option<cache::Place>, UpstreamError> {
    let digest = flight.wanted().0.digest;
    let from = expect_ok(place.send(Method::GET, |name| Route::Blob(name, digest)).await?)?;
    let Some(size) = length(from.headers()) else { return Ok(None) };
    if size > MAX_BLOB_BYTES {
        return Err(UpstreamError::Large(digest));
    }
    let of = Arc::clone(cache);
    let room = tokio::task::spawn_blocking(move || of.place(size)).await;
    let Some(room) = room.unwrap_or(Err(UpstreamError::Broken))? else { return Ok(None) };
    flight.land(&room, size, from).await?;
    Ok(Some(room))
}

/// A blob that is fetched for one reader, and not kept.
async fn direct(place: &Place, digest: Digest) -> Result<Blob, UpstreamError> {
    let from = expect_ok(place.send(Method::GET, |name| Route::Blob(name, digest)).await?)?;
    let size = length(from.headers());
    let body = relay::patient(from).map_err(BoxError::from);
    Ok(Blob { size, body: checked(body, digest, || {}).boxed() })
}

fn kept(cache: Arc<Cache>, key: Key, file: std::fs::File, size: u64) -> Blob {
    let digest = key.digest;
    let file = tokio::fs::File::from_std(file);
    let body = ReaderStream::with_capacity(file, CHUNK).map_err(BoxError::from);
    let forget = move || {
        tracing::warn!(?key, "a blob in the cache of upstreams has changed");
        cache.forget(&key);
    };
    Blob { size: Some(size), body: checked(body, digest, forget).boxed() }
}

/// Holds the last part of a body back until all of it is what the digest says.
fn checked(
    body: impl Stream<Item = Result<Bytes, BoxError>> + Send + 'static,
    digest: Digest,
    on_other: impl FnOnce() + Send + 'static,
) -> impl Stream<Item = Result<Bytes, BoxError>> + Send + 'static {
    struct State<S, F> {
        body: S,
        hash: Sha256,
        held: Option<Bytes>,
        taken: u64,
        on_other: F,
    }
    let state = State { body: Box::pin(body), hash: Sha256::new(), held: None, taken: 0, on_other };
    futures_util::stream::unfold(Some(state), move |state| async move {
        let mut state = state?;
        loop {
            match state.body.next().await {
                Some(Ok(part)) => {
                    state.taken += part.len() as u64;
                    if state.taken > MAX_BLOB_BYTES {
                        return Some((Err(UpstreamError::Large(digest).into()), None));
                    }
                    state.hash.update(&part);
                    if let Some(before) = state.held.replace(part) {
                        return Some((Ok(before), Some(state)));
                    }
                }
                Some(Err(error)) => return Some((Err(error), None)),
                None if Digest::from_hasher(state.hash) == digest => {
                    return state.held.map(|last| (Ok(last), None));
                }
                None => {
                    (state.on_other)();
                    return Some((Err(UpstreamError::Changed(digest).into()), None));
                }
            }
        }
    })
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
